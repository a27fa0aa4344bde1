"""Print what each estimator of static ranges, each numerics and each smoothing is worth, in decibels.

    python scripts/compare_estimators.py               all tables, some minutes
    python scripts/compare_estimators.py estimators    the table in the documentation of `quant_core.ranges`
    python scripts/compare_estimators.py numerics      numerics reference against float32, each scheme and smoothing
    python scripts/compare_estimators.py spread        the same, dynamic in bf16, over models with shuffled weights

Models: the golden cases of the tests, and tiny pipelines with outlier channels. Records calibrate and measure. A cell
is the median layer and, behind the slash, the model's output. Timestep schemes run all their steps static.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and tests are not installed packages

import diffusers
import torch
import transformers
from torch import nn

from model_adapters import load_adapter, load_options
from quant_core import DumperManager, M6Config, M6ProcessorConfig, quant_model
from quant_core.calibration.records import Record, as_records
from quant_core.ranges import ESTIMATORS
from quant_core.schemes import SCHEMES
from scripts.make_tiny_pipeline import PROMPTS, make_tiny_pipeline
from scripts.sqnr import Quality, measure
from scripts.study import grid
from scripts.study.grid import STATIC, Method
from tests.support.golden_cases import GoldenCase

# Those of the study, but for m6's exponents: what the numerics differ by is not to be which ones a search finds.
SMOOTHINGS = grid.SMOOTHINGS | {"m6": M6ProcessorConfig(cfg=M6Config(alpha=0.8, beta=0.2), smoothing_groups="all")}
GOLDEN_CASES = ("sd3_w8a8_fp32", "flux_w8a8_timestep_fp32", "sd3_w8a8_bf16", "flux_w8a8_timestep_bf16")
SHUFFLES = 48
TINY_STEPS, TINY_SIDE, TINY_PROMPTS = 6, 128, 2


@dataclass(frozen=True)
class Subject:
    """A float model, records that run it, and the static scheme of its recipe."""

    name: str
    adapter: Any
    model: nn.Module
    records: Sequence[Record]
    scheme: str

    def quality(self, method: Method) -> Quality:
        """Quantize a copy of the model and measure it."""
        all_static = {"timestep_sep": 0} if SCHEMES[method.scheme].per_step else {}
        disabled = self.adapter.disabled_layers[method.scheme]
        config = method.session(list(self.records), disabled, SMOOTHINGS, **all_static)
        deployed = copy.deepcopy(self.model)
        quant_model(deployed, config, structure=self.adapter.structure)
        return measure(self.model, deployed, self.records)

    @property
    def methods(self) -> Iterator[Method]:
        """Yield each allowed scheme and smoothing that the records can calibrate: per-step ones need the step."""
        has_steps = all(record.step is not None for record in self.records)
        for scheme, smoothing in itertools.product(SCHEMES, SMOOTHINGS):
            method = Method(scheme, smoothing)
            if method.is_allowed and (has_steps or not SCHEMES[scheme].per_step):
                yield method


def golden(name: str) -> Subject:
    """Return a golden case."""
    case, kind, dtype = GoldenCase(name), name.split("_")[0], name.split("_")[-1]
    adapter = load_adapter(kind)
    return Subject(f"golden {kind} {dtype}", adapter, case.model(), as_records(case.records), STATIC[kind])


def tiny(kind: str, folder: Path) -> Subject:
    """Make a tiny float32 pipeline, run it on prompts and return its transformer with what it was called with."""
    adapter = load_adapter(kind)
    path = make_tiny_pipeline(kind, folder / kind, dtype="float32")
    pipeline = adapter.pipeline_type().from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    options = load_options(kind).OPTIONS(path=str(path), width=TINY_SIDE, height=TINY_SIDE, infer_steps=TINY_STEPS)
    dumper = DumperManager(
        pipeline.transformer, capture_mode="timestep", step_source=lambda: adapter.step_index(pipeline)
    )
    generator, prompts = torch.Generator().manual_seed(0), [str(prompt) for prompt in PROMPTS[:TINY_PROMPTS]]
    adapter.generate(pipeline, adapter.encode(pipeline, prompts, options), options, generator, decodes=False)
    dumper.close()
    return Subject(f"tiny {kind}", adapter, pipeline.transformer, as_records(dumper.records), STATIC[kind])


def estimators(subjects: Sequence[Subject]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the estimators' table, the heading first."""
    methods = {"reference": {"numerics": "reference"}, **{name: {"estimator": name} for name in ESTIMATORS["float32"]}}
    yield ("act_method", *(subject.name for subject in subjects))
    for name, parts in methods.items():
        yield (name, *(cell(subject.quality(Method(subject.scheme, **parts))) for subject in subjects))


def numerics(subjects: Sequence[Subject]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of numerics, the heading first."""
    yield ("model", "scheme", "smoothing", "reference", "float32", "gain")
    for subject in subjects:
        for method in subject.methods:
            found = _with_both_numerics(subject, method)
            yield (subject.name, method.scheme, method.smoothing, *map(cell, found), _gain(*found))


def spread(subjects: Sequence[Subject]) -> Iterator[tuple[str, ...]]:
    """Yield the output's gain over models whose weights are shuffled, which says how much of one gain is luck.

    Rounding errors of weights are fixed, so one model's output noise is one draw, however many records measure it.
    In the dynamic scheme the two numerics differ by little else: how bf16 rounds codes, and which records m3 tries.
    """
    yield ("model", "scheme", "smoothing", "draws", "mean gain", "its standard error", "one draw's deviation")
    for subject in subjects:
        if not subject.name.endswith("bf16"):
            continue
        others = [replace(subject, model=_shuffled(subject.model, seed)) for seed in range(SHUFFLES)]
        for smoothing in SMOOTHINGS:
            found = [_with_both_numerics(other, Method("w8a8_dynamic", smoothing)) for other in others]
            gains = [after.output - before.output for before, after in found]
            error = stdev(gains) / math.sqrt(SHUFFLES)
            figures = (f"{mean(gains):+.2f}", f"{error:.2f}", f"{stdev(gains):.2f}")
            yield (subject.name, "w8a8_dynamic", smoothing, str(SHUFFLES), *figures)


def _with_both_numerics(subject: Subject, method: Method) -> tuple[Quality, Quality]:
    return subject.quality(replace(method, numerics="reference")), subject.quality(replace(method, numerics="float32"))


@torch.no_grad()
def _shuffled(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose weight matrices have their rows and columns in another order."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.ndim == 2:
            rows, columns = (torch.randperm(size, generator=generator) for size in parameter.shape)
            parameter.copy_(parameter[rows][:, columns])
    return other


def cell(quality: Quality) -> str:
    """Write the median layer's and the output's decibels."""
    return f"{quality.median_layer:5.1f} / {quality.output:5.1f}"


def _gain(before: Quality, after: Quality) -> str:
    return f"{after.median_layer - before.median_layer:+5.1f} / {after.output - before.output:+5.1f}"


def print_table(rows: Iterator[tuple[str, ...]]) -> None:
    """Print the rows in columns as wide as their widest cell."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print()


TABLES = {"estimators": estimators, "numerics": numerics, "spread": spread}


def main() -> int:
    """Measure and print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE", help=" or ".join(TABLES))
    wanted = parser.parse_args().tables
    if unknown := [name for name in wanted if name not in TABLES]:
        parser.error(f"no table is called {unknown[0]}: {' or '.join(TABLES)}")
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        subjects = [golden(name) for name in GOLDEN_CASES] + [tiny(kind, Path(folder)) for kind in STATIC]
    for name in wanted:
        print_table(TABLES[name](subjects))
    return 0


if __name__ == "__main__":
    sys.exit(main())
