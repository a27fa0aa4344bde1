"""Print what ranges of the float model's own inputs cost or gain, against ranges behind quantized layers, in decibels.

    python scripts/compare_online.py [SEED ...]    the table in the README, some minutes; seeds 0 and 1 when left out

Models: the trained tiny ones in their own dtype, each calibrated on 8 prompts of its seed and measured on others, and
static in every step. A cell is the median layer and, behind the slash, the model's output.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are not an installed package

import torch

from quant_core import SessionConfig, quant_model
from quant_core.calibration.records import as_records
from quant_core.calibration.replay import replay
from quant_core.schemes import SCHEMES
from quant_core.session.online import OnlineCalibration
from scripts.sqnr import measure
from scripts.study.grid import STATIC, Method
from scripts.study.subject import MODELS, Subject

PICTURES = 8


def quality(subject: Subject, config: SessionConfig) -> str:
    """Quantize a copy of the model and return its cell."""
    deployed = copy.deepcopy(subject.transformer)
    quant_model(deployed, config, structure=subject.adapter.structure)
    found = measure(subject.transformer, deployed, subject.records)
    return f"{found.median_layer:5.2f} / {found.output:5.2f}"


def online(subject: Subject, config: SessionConfig) -> SessionConfig:
    """Return the session with ranges in place of records; the same calls make the same ranges as in the pipeline."""
    calibration = OnlineCalibration(subject.transformer, config, structure=subject.adapter.structure)
    with calibration.watching():
        replay(subject.transformer, as_records(config.calib_data), stage="measure")
    return config.model_copy(update={"calib_data": calibration.measured()})


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1], help="of prompts and noise (default: 0 1)")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(f"{'model':<6} {'seed':<5} {'scheme':<14} {'replayed':<14} online")
    for kind in STATIC:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as work:
                subject = Subject(kind, MODELS / kind, seed, PICTURES, Path(work))
                subject.float_figures()  # paints, and keeps the calls to measure on
                for scheme in (name for name, row in SCHEMES.items() if row.observes_input):
                    sep: dict[str, Any] = {"timestep_sep": 0} if SCHEMES[scheme].per_step else {}
                    disabled = subject.adapter.disabled_layers[scheme]
                    config = Method(scheme).session(subject.calibration, disabled, **sep)
                    cells = quality(subject, config), quality(subject, online(subject, config))
                    print(f"{kind:<6} {seed:<5} {scheme:<14} {cells[0]:<14} {cells[1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
