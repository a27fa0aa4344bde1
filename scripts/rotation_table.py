"""Print what rotating the values of attention is worth on the trained tiny models, with and without smoothing.

    python scripts/rotation_table.py            the table in README, some minutes
    python scripts/rotation_table.py --order    rotated before and after smoothing that is folded into the values

A cell is the signal over the error at the output in decibels and, in brackets, the PSNR of the pictures.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are not an installed package

import torch

from quant_core import M4ProcessorConfig, SessionConfig, quant_model
from quant_core.calibration.replay import silent
from quant_core.naming import linear_at
from quant_core.parallel.groups import Parallel
from quant_core.quality.replayed import compare_outputs, kept_outputs, replay
from quant_core.session.quantize import smoothing_of
from quant_core.session.session import Session
from scripts.study.grid import Method
from scripts.study.subject import AT_ONCE, VARIANTS, Subject, model_folder, quiet_libraries

SCHEMES, SMOOTHINGS = ("w8a8", "w8a8_dynamic"), ("none", "m4")
FUSED = {"none": None, "m4": M4ProcessorConfig(smoothing_groups="all", fused=True)}


@dataclass(frozen=True)
class Rotated(Method):
    """A method that rotates values first."""

    def session(self, *given: Any, **options: Any) -> SessionConfig:
        """Say it in the quantizer's words."""
        return super().session(*given, **options).model_copy(update={"rotate_values": True})


def subjects(work: Path) -> Iterator[tuple[str, Subject]]:
    """Yield the trained models, each as it is and with outlier channels."""
    for variant in VARIANTS:
        subject = Subject(variant.partition(",")[0], model_folder(variant, work), 0, AT_ONCE, work / variant)
        subject.float_figures()
        yield variant, subject


def gains(work: Path) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table, the heading first."""
    yield ("model", "scheme", *(f"{smoothing}{rotated}" for smoothing in SMOOTHINGS for rotated in ("", ", rotated")))
    for name, subject in subjects(work):
        for scheme in SCHEMES:
            methods = [kind(scheme, smoothing) for smoothing in SMOOTHINGS for kind in (Method, Rotated)]
            found = [subject.figures(method) for method in methods]
            yield (name, scheme, *(f"{figures['output']:.1f} ({figures['psnr']:.1f})" for figures in found))


def orders(work: Path) -> Iterator[tuple[str, ...]]:
    """Yield the output's decibels with smoothing that is folded into the linears in front."""
    yield ("model", "scheme", "m4 fused", "rotated, then m4 fused", "m4 fused, then rotated")
    for name, subject in subjects(work):
        for scheme in SCHEMES:
            yield (name, scheme, *(f"{_output(subject, scheme, steps):.1f}" for steps in ("m", "rm", "mr")))


@torch.no_grad()
def _output(subject: Subject, scheme: str, steps: str) -> float:
    """Quantize and measure the output. steps: `m` folds smoothing in, `r` rotates, in that order."""
    model, given = copy.deepcopy(subject.transformer), (subject.calibration, subject.adapter.disabled_layers[scheme])
    config = Method(scheme, "m4").session(*given, FUSED)
    if steps == "mr":
        smoothing = smoothing_of(Session(model, config, subject.adapter.structure, Parallel(), silent))
        for layer, change in smoothing.rescalings.items():
            linear = linear_at(model, layer)
            linear.weight.copy_(change.weight(linear.weight.float(), slice(None)))
            if linear.bias is not None:
                linear.bias.copy_(change.bias(linear.bias))
        config = Method(scheme).session(*given)
    quant_model(model, config.model_copy(update={"rotate_values": "r" in steps}), structure=subject.adapter.structure)
    with kept_outputs(subject.transformer) as exact:
        replay(subject.transformer, subject.records, stage="float outputs")
    return compare_outputs(model, subject.records, exact).overall.decibels


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, help="folder of models and pictures; left out: a temporary one")
    parser.add_argument("--order", action="store_true", help="compare the orders of rotation and smoothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for row in orders(work) if asked.order else gains(work):
            print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
