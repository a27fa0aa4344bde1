"""Divide a FLUX transformer into one folder for each card, as the dual-card runtime loads it.

    python scripts/split_transformer.py FLUX.1-dev

writes `transformer_0/` and `transformer_1/` beside `transformer/`: the same file names, each tensor cut to the rank's
slice, and a copy of config.json. One tensor at a time is in memory. Folders have mode 0750, files 0640.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed works as well
from launcher.failure.exit_codes import exit_code
from model_adapters import load_adapter
from model_adapters.weights.model_folder import INDEX_NAME, pipeline_folder
from model_adapters.weights.transformer_folders import WHOLE, rank_folder, used_folders
from model_adapters.weights.transformer_part import TransformerPart, describe_transformer
from quant_core.atomic_file import write_atomically, write_text_atomically
from quant_core.checkpoint.tensor_file import TensorFile
from quant_core.errors import ExplainedError, InputError
from scripts.new_folder import new_folder, require_new


def split(root: Path, tp_size: int = 2) -> list[Path]:
    """Write the folders of all ranks, and return them.

    Raises InputError when the pipeline has no whole transformer, or one of the folders holds something: of an older
    division an index or a file too many would be read.
    """
    if used_folders(root) != [root / WHOLE]:
        raise InputError(
            "there is no whole transformer to divide",
            where=str(root / WHOLE),
            why=f"only divided folders are there ({rank_folder(root, 0).name}, ...)",
            advice="give the folder of the original model",
        )
    for tp_rank in range(tp_size):
        require_new(rank_folder(root, tp_rank))
    return [_write_rank(root, tp_rank, tp_size) for tp_rank in range(tp_size)]


def _write_rank(root: Path, tp_rank: int, tp_size: int) -> Path:
    part = describe_transformer(
        load_adapter("flux"), str(root), tp_rank=tp_rank, tp_size=tp_size, layout="mindie", dtype=torch.bfloat16
    )
    with new_folder(folder := rank_folder(root, tp_rank), mode=0o750) as whole:
        homes: dict[Path, list[str]] = {}
        for name in part.model.state_dict():
            homes.setdefault(part.stored[name].path, []).append(name)
        for source, names in sorted(homes.items()):
            write_atomically(whole / source.name, lambda path, names=names: _write_file(path, part, names))
        if len(homes) > 1:
            weight_map = {name: source.name for source, names in homes.items() for name in names}
            size = sum((whole / source.name).stat().st_size for source in homes)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_text_atomically(whole / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        write_text_atomically(whole / "config.json", (root / WHOLE / "config.json").read_text(encoding="utf-8"))
    return folder


def _write_file(path: Path, part: TransformerPart, names: Sequence[str]) -> None:
    state = part.model.state_dict()
    described = {name: torch.empty(state[name].shape, dtype=part.stored[name].dtype, device="meta") for name in names}
    with TensorFile(path, described, {"format": "pt"}) as file:
        for name in names:
            file.write(name, part.read(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Divide a FLUX transformer into one folder for each card.")
    parser.add_argument("folder", metavar="PIPELINE", help="pipeline folder with a transformer/")
    parser.add_argument("--tp_size", type=int, default=2, help="number of cards (default 2)")
    asked = parser.parse_args(arguments)
    try:
        for folder in split(pipeline_folder(asked.folder), asked.tp_size):
            print(f"written  {folder}")
    except ExplainedError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
