"""Make a tiny, complete FLUX or Stable Diffusion 3 pipeline folder, without any network.

    python scripts/make_tiny_pipeline.py flux demo/tiny-flux --prompts demo/calib_prompts.txt

The folder has the layout of FLUX.1-dev, stable-diffusion-3-medium-diffusers or stable-diffusion-3.5-medium, loads with
the stock diffusers pipeline and weighs a few MB. Every stage of a quantization job runs on it in seconds on a CPU.

What was chosen, and why:

Shapes. A transformer of 4 heads x 16 dims, so width 64 and feed-forward width 256: both divide by 2 and by 4, hence
    every tensor-parallel size of a small machine works. FLUX has 2 double and 2 single blocks (a pattern over blocks
    must match more than one); SD3 has 3, the last of which is `context_pre_only` as in the real one. The latent has
    16 channels at 1/8 of the image's size, as the real VAEs make it, so that --width and --height mean the same.

Weights. Seeded normal with variance 1 / fan_in: a signal keeps its size through the depth, so the output depends on
    the prompt, the timestep and the noise, and nothing overflows in float16.

    Three outlier channels, 20 to 50 times larger than the rest, make int8 as hard as it is on a trained model
    (`tiny_outliers.py` says how). What is given up: the image is noise.

Tokenizers. Small, but able to encode any ASCII text (`tiny_tokenizers.py`).

The same seed gives byte-identical safetensors (draws are made in float32 on the CPU, in the order of the parameters).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed works as well
from launcher.failure.exit_codes import exit_code
from quant_core.errors import ConfigurationError, ExplainedError, InputError, suggestion
from scripts.new_folder import new_folder
from scripts.tiny_outliers import add_outliers
from scripts.tiny_tokenizers import (
    clip_vocabulary,
    t5_vocabulary,
    write_clip_tokenizer,
    write_json,
    write_t5_tokenizer,
)

PROMPTS = (
    "A photo of an astronaut riding a horse on mars",
    "A bowl of ripe cherries on a blue table, soft morning light",
    "The word 'quantize' written in chalk on a blackboard",
    "An old lighthouse in a storm, oil painting",
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_SIZE = "256KB"  # a transformer of about 1 MB becomes several files

CLIP_WIDTH = {"text_encoder": 32, "text_encoder_2": 64}  # together under T5's 128, as 768 + 1280 is under 4096
T5_WIDTH = 128
HEADS, HEAD_DIM = 4, 16
JOINT_SHAPES = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "joint_attention_dim": T5_WIDTH,
}
SD3_SHAPES = {
    **JOINT_SHAPES,
    "num_layers": 3,
    "caption_projection_dim": HEADS * HEAD_DIM,
    "pooled_projection_dim": sum(CLIP_WIDTH.values()),
    "pos_embed_max_size": 64,  # patches per side: 64 x 2 x 8 = 1024 pixels, the default size of an image
}


@dataclass(frozen=True)
class Recipe:
    """Say what a kind of pipeline is made of: its classes as model_index.json names them, and its tiny shapes.

    text_widths: features that each text encoder puts out.
    """

    pipeline: str
    components: Mapping[str, tuple[str, str]]
    scheduler: Mapping[str, object]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip_padding: Mapping[str, str]
    dtype: str
    text_widths: Mapping[str, int]


_DIFFUSERS_PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "vae": ("diffusers", "AutoencoderKL"),
}
FLUX = Recipe(
    pipeline="FluxPipeline",
    components={
        **_DIFFUSERS_PARTS,
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
    },
    scheduler={
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    transformer={
        **JOINT_SHAPES,
        "num_layers": 2,
        "num_single_layers": 2,
        "pooled_projection_dim": CLIP_WIDTH["text_encoder"],
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),  # sums to the head dim; each even, because rotations act on pairs
    },
    vae={"scaling_factor": 0.3611, "shift_factor": 0.1159},
    clip_padding={"tokenizer": "<|endoftext|>"},
    dtype="bfloat16",
    text_widths={"text_encoder": CLIP_WIDTH["text_encoder"], "text_encoder_2": T5_WIDTH},
)
SD3 = Recipe(
    pipeline="StableDiffusion3Pipeline",
    components={
        **_DIFFUSERS_PARTS,
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "SD3Transformer2DModel"),
    },
    scheduler={"num_train_timesteps": 1000, "shift": 3.0},
    transformer=SD3_SHAPES,
    vae={"scaling_factor": 1.5305, "shift_factor": 0.0609},
    clip_padding={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    dtype="float16",
    text_widths={**CLIP_WIDTH, "text_encoder_3": T5_WIDTH},
)
SD3_5 = Recipe(**{**vars(SD3), "transformer": {**SD3_SHAPES, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}})
RECIPES = {"flux": FLUX, "sd3": SD3, "sd3.5": SD3_5}


def make_tiny_pipeline(
    kind: str, folder: str | Path, seed: int = 0, dtype: str | None = None, sharded: bool = False
) -> Path:
    """Write a pipeline of `kind` (flux, sd3, sd3.5) into `folder`, which must be new or empty, and return its path.

    `dtype` defaults to that of the real repository; `sharded` splits the transformer's weights over several files.
    The folder appears whole or not at all. Raises ConfigurationError for an unknown kind or dtype, InputError for a
    folder that holds something.
    """
    recipe = RECIPES[_known("kind", kind, RECIPES)]
    torch_dtype = DTYPES[_known("dtype", dtype or recipe.dtype, DTYPES)]
    target = Path(folder).resolve()
    with new_folder(target, mode=0o750) as whole:
        write_components(recipe, whole, seed, torch_dtype, SHARD_SIZE if sharded else "10GB")
        for entry in whole.rglob("*"):
            entry.chmod(0o750 if entry.is_dir() else 0o640)
    return target


def write_prompts(file: str | Path) -> Path:
    """Write a small calibration prompt file (one prompt a line, mode 0640) and return its path.

    The mode is part of the job's contract: a wider one is refused. Raises InputError if `file` holds other text.
    """
    path, text = Path(file), "\n".join(PROMPTS) + "\n"
    if path.exists() and (not path.is_file() or path.read_text(encoding="utf-8") != text):
        raise InputError(
            f"{file} already holds something else",
            where="--prompts",
            why="your prompts are not overwritten",
            advice="name a new file, or drop the flag and use this one",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o640)
    return path


def _known(what: str, name: str, table: Mapping[str, object]) -> str:
    if name in table:
        return name
    raise ConfigurationError(
        f"no {what} {name!r} of a tiny pipeline",
        where="make_tiny_pipeline",
        why=f"known are {', '.join(table)}",
        advice=suggestion(name, table, next(iter(table))),
    )


def write_components(
    recipe: Recipe, folder: Path, seed: int, dtype: torch.dtype, shard_size: str, *, leave_out: Sequence[str] = ()
) -> None:
    """Write the components of a recipe, in its order: one generator serves all models, so order is part of it.

    leave_out: components that are somebody else's work, though model_index.json names them.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, (_, class_name) in recipe.components.items():
        if name in leave_out:
            continue
        place = folder / name
        if class_name == "CLIPTokenizer":
            write_clip_tokenizer(place, clip_vocabulary(), recipe.clip_padding[name])
        elif class_name == "T5TokenizerFast":
            write_t5_tokenizer(place, t5_vocabulary())
        elif name == "scheduler":
            write_json(place / "scheduler_config.json", _named(class_name) | dict(recipe.scheduler))
        else:
            model = _random_model(name, class_name, recipe, generator).to(dtype)
            limit = {"max_shard_size": shard_size} if name == "transformer" else {}
            model.save_pretrained(place, **limit)
    write_json(folder / "model_index.json", _named(recipe.pipeline) | dict(recipe.components))


def _named(class_name: str) -> dict[str, object]:
    return {"_class_name": class_name, "_diffusers_version": diffusers.__version__}


def _random_model(name: str, class_name: str, recipe: Recipe, generator: torch.Generator) -> Any:
    with torch.random.fork_rng(devices=[]):  # constructors draw too; the caller's random state stays
        model = _build_model(name, class_name, recipe)
    _draw_weights(model, generator)
    add_outliers(model)
    return model


def _build_model(name: str, class_name: str, recipe: Recipe) -> nn.Module:
    if class_name == "AutoencoderKL":
        return _build_vae(recipe)
    if class_name == "T5EncoderModel":
        return transformers.T5EncoderModel(_t5_config(recipe.text_widths[name], len(t5_vocabulary())))
    if class_name.startswith("CLIP"):
        return getattr(transformers, class_name)(_clip_config(recipe.text_widths[name], len(clip_vocabulary())))
    return getattr(diffusers, class_name)(**recipe.transformer)


def _build_vae(recipe: Recipe) -> nn.Module:
    levels = 4  # three halvings: 8 pixels to a latent, as the real one
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=(8,) * levels,  # pyright: ignore[reportArgumentType]
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,  # quadratic in the pixels: seconds at 1024 x 1024
        **recipe.vae,
    )


def _clip_config(width: int, vocabulary_size: int) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,  # the pooled vector is read at this token
        pad_token_id=vocabulary_size - 1,
    )


def _t5_config(width: int, vocabulary_size: int) -> transformers.T5Config:
    return transformers.T5Config(
        vocab_size=vocabulary_size,
        d_model=width,
        d_kv=16,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )


@torch.no_grad()
def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter: matrices with variance 1 / fan_in, norms around 1, biases around 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 made, else what the launcher returns for the same mistake."""
    parser = argparse.ArgumentParser(description="Make a tiny, complete diffusion pipeline folder, without network.")
    parser.add_argument("kind", choices=RECIPES, help="which pipeline")
    parser.add_argument("folder", metavar="OUT", help="new folder of the pipeline")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as the real one, bfloat16 for flux, float16 for sd3")
    parser.add_argument("--sharded", action="store_true", help="split the transformer over several safetensors files")
    parser.add_argument("--prompts", metavar="FILE", help="also write a small calibration prompt file, mode 0640")
    asked = parser.parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if asked.prompts:
            print(f"prompts   {write_prompts(asked.prompts)}")
        print(f"pipeline  {make_tiny_pipeline(asked.kind, asked.folder, asked.seed, asked.dtype, asked.sharded)}")
    except ExplainedError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
