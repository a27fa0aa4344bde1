"""Open a checkpoint under the names that the reference tool gives its files."""

from __future__ import annotations

from pathlib import Path

from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint


def published(folder: Path, scheme: str) -> Checkpoint:
    """Open what was written under the reference tool's names, and check every value of it."""
    files = (folder / f"quant_model_weight_{scheme}.safetensors", folder / f"quant_model_description_{scheme}.json")
    checkpoint = open_checkpoint(CheckpointFiles(*files))
    checkpoint.verify()
    return checkpoint
