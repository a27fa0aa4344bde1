"""All that this folder uses of the product and of other tests, in one place: making files, and computing from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.files.manifest import TimestepPolicy as TimestepPolicy
from launcher.files.manifest import read_manifest as read_manifest
from model_adapters import load_adapter
from model_adapters.weights.loading import load_transformer
from quant_core import (
    FA3ProcessorConfig,
    M4ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    TimestepManager,
    quant_model,
)
from quant_core.checkpoint.entries import CheckpointFiles as CheckpointFiles
from quant_core.checkpoint.entries import description_file_name, weight_file_name
from quant_core.checkpoint.loading import load_deployed
from quant_core.checkpoint.reader import Checkpoint as Checkpoint
from quant_core.checkpoint.reader import open_checkpoint as open_checkpoint
from quant_core.schemes import BY_TYPE
from tests.support.forked_ranks import run_forked as run_forked
from tests.support.tiny_models import KINDS, build, example_inputs

SCHEMES: Mapping[str, Any] = {quant_type: scheme.config for quant_type, scheme in BY_TYPE.items()}
# What may come with a scheme, by a short name.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "m4": {"m4": M4ProcessorConfig(smoothing_groups="all")},
    "m4_fused": {"m4": M4ProcessorConfig(fused=True)},
    "fa3": {"fa3": FA3ProcessorConfig()},
}
# The smallest that has every kind of block: the last double-stream block of an SD3 is of another kind.
BLOCKS = {"flux": {"num_layers": 1, "num_single_layers": 1}, "sd3": {"num_layers": 2}}
STEPS = 3  # the first runs dynamic, the others static


def variants_of(quant_type: str, *variants: str) -> list[str]:
    """Return those of the variants that the type goes with: the factors of `m4` need layers that multiply by them."""
    return [variant for variant in variants if variant != "m4" or BY_TYPE[quant_type].multiplies_input]


def float_model(kind: str, dtype: torch.dtype) -> Any:
    """Build the same tiny transformer at each call."""
    return build(kind, **BLOCKS[kind]).to(dtype)


def float_part(kind: str, pipeline: Path, dtype: torch.dtype) -> nn.Module:
    """Load this rank's part of the float transformer of a pipeline folder, by the layout that the launcher uses."""
    return load_transformer(
        load_adapter(KINDS[kind][0]),
        str(pipeline),
        tp_rank=dist.get_rank(),
        tp_size=dist.get_world_size(),
        tp_group=dist.group.WORLD,
        dtype=dtype,
        device="cpu",
    ).model


def publish(
    kind: str,
    quant_type: str,
    dtype: torch.dtype,
    folder: Path,
    variant: str = "plain",
    layer_schemes: Mapping[str, Any] | None = None,
) -> Path:
    """Quantize the tiny transformer on one record a step, ever wider; save it in the folder, and return that.

    layer_schemes: of the layers that get another scheme than `quant_type`, by pattern.
    """
    base = example_inputs(kind, dtype)
    records = [
        {"args": [], "kwargs": base | {"hidden_states": base["hidden_states"] * (1 + step)}, "timestep_idx": step}
        for step in range(STEPS)
    ]
    scheme = SCHEMES[quant_type]()
    processors = {scheme.key: scheme, "save": SaveProcessorConfig(output_path=str(folder)), **VARIANTS[variant]}
    config = SessionConfig(processor_cfg_map=processors, layer_schemes=dict(layer_schemes or {}), calib_data=records)
    quant_model(float_model(kind, dtype), config)
    return folder


def files_in(folder: Path, quant_type: str, rank: int | None = None) -> CheckpointFiles:
    """Return where a checkpoint of this type lies in a folder."""
    suffix = "" if rank is None else f"_{rank}"
    return CheckpointFiles(
        folder / f"{weight_file_name(quant_type)}{suffix}.safetensors",
        folder / f"{description_file_name(quant_type)}{suffix}.json",
    )


def registration_line(timesteps: int) -> str:
    """Return the line that the product tells the user of MindIE-SD 3.1 to type, for half the steps."""
    return TimestepPolicy.of(timesteps, timesteps // 2).registration["3.1"]


def deployed_model(kind: str, files: CheckpointFiles, dtype: torch.dtype) -> Any:
    """Return the whole tiny transformer as the product says that the files compute, floats from the files too."""
    model = float_model(kind, dtype)
    load_deployed(model, files)
    return model


@torch.no_grad()
def output(model: Any, kind: str, dtype: torch.dtype, step: int) -> Tensor:
    """Return a tiny transformer's output for its example input; a deployed one in that step."""
    TimestepManager.set_timestep_idx(step)
    found = model(**example_inputs(kind, dtype))[0]
    TimestepManager.set_timestep_idx(None)
    return found
