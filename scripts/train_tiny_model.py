"""Train a tiny FLUX or Stable Diffusion 3 pipeline that paints what its prompt says, or check one.

    python scripts/train_tiny_model.py flux OUT_FOLDER
    python scripts/train_tiny_model.py check OUT_FOLDER

The pictures are drawn by our own code, nothing is downloaded, and the same seed gives the same pipeline on the same
machine with the same number of threads. The training is counted in steps and leaves a checkpoint every 200, so the same
command goes on after an interruption, with the same result. Both kinds share the autoencoder of a --work folder.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed works as well
from launcher.failure.exit_codes import exit_code
from quant_core.errors import ConfigurationError, ExplainedError, InputError
from scripts.new_folder import require_new
from scripts.tiny_training import vae as autoencoder
from scripts.tiny_training.checking import held_out_scenes, look, paint, save_grid, summary
from scripts.tiny_training.drawing import Scene, split_scenes
from scripts.tiny_training.export import export_pipeline
from scripts.tiny_training.flow import PLACEMENTS, train_transformer
from scripts.tiny_training.flux import FLUX
from scripts.tiny_training.sd3 import SD3
from scripts.tiny_training.steps import Budget, Report, Setting
from scripts.tiny_training.text import write_tokenizers

RECIPES = {"flux": FLUX, "sd3": SD3}


@dataclass(frozen=True)
class Budgets:
    """Say what is drawn and how long each stage takes; the defaults, and None, are what the shipped models had."""

    scenes: tuple[Scene, ...] = split_scenes()[0]
    vae: Budget = autoencoder.BUDGET
    transformer: Budget | None = None
    placements: int = PLACEMENTS


def train_tiny_model(
    kind: str,
    folder: Path,
    work: Path,
    seed: int = 0,
    device: str = "cpu",
    budgets: Budgets | None = None,
    report: Report = print,
) -> Path:
    """Train a pipeline of `kind` (flux, sd3), or go on from the checkpoints in `work`, and write it into `folder`.

    Returns the folder. Raises InputError for a folder that holds something, or checkpoints of another training.
    """
    require_new(folder)
    recipe, budgets = RECIPES[kind], budgets or Budgets()
    setting = Setting(work, seed, budgets.scenes, budgets.placements, device, report)
    tokenizers = recipe.tokenizers(work)
    shutil.rmtree(tokenizers, ignore_errors=True)
    tokenizers.mkdir(parents=True)
    write_tokenizers(tokenizers, recipe.components, recipe.clip_padding)
    vae = autoencoder.train_vae(setting, budgets.vae)
    models = train_transformer(recipe, vae, setting, budgets.transformer or recipe.budget)
    return export_pipeline(recipe, {**models, "vae": vae}, tokenizers, folder)


def _train(asked: argparse.Namespace) -> None:
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "there is no CUDA device", where="--device", why="torch finds none on this machine", advice="--device cpu"
        )
    work = Path(asked.work) if asked.work else Path(asked.folder).resolve().parent / "tiny_training"
    recipe = RECIPES[asked.kind]
    budgets = Budgets(
        vae=replace(autoencoder.BUDGET, steps=asked.vae_steps),
        transformer=replace(recipe.budget, steps=asked.steps),
    )
    report = functools.partial(print, flush=True)
    folder = train_tiny_model(asked.kind, Path(asked.folder), work, asked.seed, asked.device, budgets, report)
    print(f"pipeline  {folder}")


def _check(asked: argparse.Namespace) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(_pipeline_folder(asked.folder), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = {recipe.pipeline: recipe.guidance for recipe in RECIPES.values()}
    guidance = wanted.get(type(pipeline).__name__, 1.0) if asked.guidance is None else asked.guidance
    scenes = held_out_scenes(asked.pictures)
    pictures = paint(pipeline, scenes, asked.steps, guidance, asked.seed)
    if asked.grid:
        save_grid(pictures, asked.grid)
    print(f"guidance  {guidance}")
    print(f"right     {summary([look(picture) for picture in pictures], scenes)}")


def _pipeline_folder(folder: str) -> Path:
    if not Path(folder, "model_index.json").is_file():
        raise InputError(
            f"{folder} is no pipeline",
            where="check",
            why="it has no model_index.json",
            advice="scripts/tiny_models/flux, or the folder of a finished training",
        )
    return Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a tiny diffusion pipeline on drawn pictures, or check one.")
    commands = parser.add_subparsers(dest="kind", required=True)
    for kind, recipe in RECIPES.items():
        command = commands.add_parser(kind, help=f"train a {recipe.pipeline}")
        command.add_argument("folder", metavar="OUT_FOLDER", help="new folder of the pipeline")
        command.add_argument("--work", metavar="FOLDER", help="checkpoints (default: tiny_training beside OUT_FOLDER)")
        command.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
        for flag, budget in (("--steps", recipe.budget), ("--vae-steps", autoencoder.BUDGET)):
            command.add_argument(flag, type=int, default=budget.steps, help="of training (default %(default)s)")
        command.set_defaults(run=_train)
    command = commands.add_parser("check", help="paint captions that were not trained on, and count the right pictures")
    command.add_argument("folder", metavar="FOLDER", help="a trained pipeline")
    command.add_argument("--pictures", type=int, default=88, help="how many (default 88, two a held-out caption)")
    command.add_argument("--steps", type=int, default=8, help="of the sampler (default 8)")
    command.add_argument("--guidance", type=float, help="guidance scale (default: what the model wants)")
    command.add_argument("--seed", type=int, default=0, help="of the first picture; each takes the next (default 0)")
    command.add_argument("--grid", metavar="FILE", help="also write the pictures into one PNG")
    command.set_defaults(run=_check)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, else what the launcher returns for the same mistake."""
    asked = _parser().parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        asked.run(asked)
    except ExplainedError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
