"""Run `python -m launcher sd3` under the file name of the inference project; same flags, and torchrun works too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed works as well
from launcher.__main__ import main

if __name__ == "__main__":
    main(["sd3", *sys.argv[1:]])
