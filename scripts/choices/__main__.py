"""Measure what the quantizer chooses by itself against the other choices, on the small trained models: markdown tables.

    python scripts/choices restep        rows made by `restep` against calibrating at that many steps
    python scripts/choices separator     the separator of `--timestep_sep auto` against every other
    python scripts/choices exponent      m4's exponent by scheme; `exponent_every` with m4 on every layer,
                                         `exponent_pictures`: pictures
    python scripts/choices estimator     how ranges are estimated, layer by layer

`scripts/choices.md` holds the tables, each with its command. A table takes ten minutes to an hour. A seed has its own
prompts and noise to calibrate, and its own noise to paint; what is measured was not calibrated with. All with float32
numerics, in this process; SD3's transformer computes in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone that is not installed works as well

import torch

from scripts.choices import estimator, exponent, restep, separator
from scripts.choices.asked import Asked
from scripts.study.subject import PAINTED, VARIANTS, quiet_libraries

TABLES: Mapping[str, Callable[[Asked], Iterator[Sequence[str]]]] = {
    "restep": restep.rows,
    "separator": separator.rows,
    "exponent": exponent.rows,
    "exponent_every": partial(exponent.rows, groups="every"),
    "exponent_pictures": exponent.pictures,
    "estimator": estimator.rows,
}


def main() -> int:
    """Measure and print the table that is asked for, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="MODEL")
    parser.add_argument("--seeds", type=int, nargs="+", choices=(0, 1, 2), default=[0, 1])
    parser.add_argument("--pictures", type=int, default=PAINTED, choices=range(1, PAINTED + 1), metavar="N")
    parser.add_argument("--work", type=Path, help="folder of models and pictures; left out: a temporary one")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for row in TABLES[asked.table](Asked(work, asked.models, asked.seeds, asked.pictures)):
            print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
