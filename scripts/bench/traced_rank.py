"""Run the launcher as one rank does, and note when it came how far.

    torchrun --nproc_per_node 2 scripts/bench/traced_rank.py flux ...

Marks go to `$BENCH_MARKS`/rank<n>.json as seconds since the epoch. They rest on what no change of the launcher moves:
when the interpreter began, when torch was first imported, when a transformer was first called.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_MARKS: dict[str, float] = {"interpreter": time.time()}
_TRANSFORMERS = ("FluxTransformer2DModel", "SD3Transformer2DModel")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "import":
        return
    if arguments[0] == "torch":
        _MARKS.setdefault("torch begins", time.time())
    elif arguments[0] == "diffusers" and "diffusers begins" not in _MARKS:
        _MARKS["diffusers begins"] = time.time()
        _watch_forwards()


def _watch_forwards() -> None:
    """Note the first call of a transformer that holds numbers; a description on the meta device is called too."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    def note(module: Any, inputs: Any) -> None:
        if type(module).__name__ in _TRANSFORMERS and not next(module.parameters()).is_meta:
            _MARKS.setdefault("first forward", time.time())
            _MARKS.setdefault("modules", float(len(sys.modules)))
            handle.remove()
            _write()

    handle = register_module_forward_pre_hook(note)


def _write() -> None:
    place = Path(os.environ["BENCH_MARKS"], f"rank{os.environ['RANK']}.json")
    place.write_text(json.dumps(_MARKS))


if __name__ == "__main__":
    sys.addaudithook(_audit)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    atexit.register(_write)
    from launcher.__main__ import main

    main(sys.argv[1:])
