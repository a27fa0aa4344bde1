"""Copy a tiny pipeline and give its transformer outlier channels, without changing the pictures that it paints.

    python scripts/add_outlier_channels.py scripts/tiny_models/flux demo/flux-outliers

Few activations of a small trained transformer are large; those of a large one are, always in the same channels. The
copy computes the same function with channels 16 and 32 times larger in front of the linear layers (`tiny_outliers.py`),
so that a comparison of the two shows what outliers alone cost an int8 scheme.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed works as well
from launcher.failure.exit_codes import exit_code
from quant_core.errors import ExplainedError, InputError
from scripts.new_folder import new_folder
from scripts.tiny_outliers import EQUAL_GAINS, add_equal_outliers

TRANSFORMERS = ("FluxTransformer2DModel", "SD3Transformer2DModel")


def add_outlier_channels(pipeline: Path, target: Path) -> Path:
    """Write a copy of the folder `pipeline` with outlier channels into `target`, which is new or empty; return it.

    Raises InputError where `pipeline` has no FLUX or SD3 transformer wide enough, or `target` holds something.
    """
    transformer_class, dtype = _look_at(pipeline / "transformer")
    with new_folder(target) as whole:
        shutil.copytree(pipeline, whole, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
        transformer = transformer_class.from_pretrained(pipeline / "transformer")
        add_equal_outliers(transformer)
        transformer.to(dtype).save_pretrained(whole / "transformer")
    return target


def _look_at(folder: Path) -> tuple[Any, torch.dtype]:
    """Return the class of the transformer in `folder` and the dtype of its weights; refuse what has no place."""
    config_file, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    if config.get("_class_name") not in TRANSFORMERS or width <= max(EQUAL_GAINS) or not weights:
        raise InputError(
            f"{folder} holds no transformer to give outlier channels to",
            where="the pipeline to copy",
            why=f"needed are config.json of {' or '.join(TRANSFORMERS)}, {max(EQUAL_GAINS) + 1} or more channels wide, "
            "and its weights as safetensors",
            advice="scripts/tiny_models/flux",
        )
    return getattr(diffusers, config["_class_name"]), next(iter(load_file(weights[0]).values())).dtype


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, else what the launcher returns for the same mistake."""
    parser = argparse.ArgumentParser(description="Copy a tiny pipeline and give its transformer outlier channels.")
    parser.add_argument("pipeline", metavar="IN", help="folder of a FLUX or SD3 pipeline")
    parser.add_argument("folder", metavar="OUT", help="new folder of the copy")
    asked = parser.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    try:
        print(f"pipeline  {add_outlier_channels(Path(asked.pipeline), Path(asked.folder))}")
    except ExplainedError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
