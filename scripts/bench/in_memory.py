"""Quantize a FLUX-like model of 0.42 billion parameters in memory, or do the least that this takes.

    python -m scripts.bench.in_memory job|floor VARIANT FOLDER [--device cuda]

A process of its own for each measurement, because an allocator remembers. Prints what the work alone used, as JSON: the
model and its six records are made before the clock starts, and memory is counted above them: the processor's, or the
card's where it computes.

The floor does the forwards whose results the variant needs (none for weights alone; one a record for ranges, channel
maxima or attention scales), takes maxima and codes in blocks, and writes everything once. It fake-quantizes nothing,
observes nothing and searches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone that is not installed works as well
from model_adapters.flux.structure import STRUCTURE
from quant_core import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    W8A8TimeStepProcessorConfig,
    quant_model,
)
from scripts.bench.kernel import Workspace, quantize_rows
from scripts.bench.usage import forget_peak, moved, resident

# Half of FLUX.1-dev's width and a twelfth of its depth; its text encoders' widths.
MODEL = {
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 12,
    "num_layers": 3,
    "num_single_layers": 4,
    "pooled_projection_dim": 768,
}
TINY = MODEL | {"num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1}
RECORDS, STEPS = 6, 3
IMAGE_SIDE, TEXT_TOKENS = 16, 64
KEPT_FLOAT = "*net.2*"

_DYNAMIC = {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=[KEPT_FLOAT])}
# Processors by variant.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "dynamic": _DYNAMIC,
    "static": {"w8a8": W8A8ProcessorConfig(disable_names=[KEPT_FLOAT])},
    "timestep": {"w8a8_timestep": W8A8TimeStepProcessorConfig(disable_names=[KEPT_FLOAT])},
    "m4": _DYNAMIC | {"m4": M4ProcessorConfig()},
    "m3": _DYNAMIC | {"m3": M3ProcessorConfig()},
    "m6": _DYNAMIC | {"m6": M6ProcessorConfig()},
    "fa3": _DYNAMIC | {"fa3": FA3ProcessorConfig()},
}


def build(shape: Mapping[str, Any], device: str) -> Any:
    """Build the model with random weights, bfloat16, as large as a signal that keeps its size."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**shape)
    nn.Module.to(model, torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        bound = (3.0 / parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.uniform_(-bound, bound, generator=generator)
    return model


def records(shape: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Return calibration records: two prompts of three steps."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).bfloat16().to(device)

    side = torch.arange(float(IMAGE_SIDE))
    img_ids = torch.cartesian_prod(torch.zeros(1), side, side)
    ids = {"txt_ids": torch.zeros(TEXT_TOKENS, 3).to(device), "img_ids": img_ids.to(device)}
    prompts = [
        {
            "encoder_hidden_states": numbers(1, TEXT_TOKENS, shape["joint_attention_dim"]),
            "pooled_projections": numbers(1, shape["pooled_projection_dim"]),
        }
        for _ in range(RECORDS // STEPS)
    ]
    return [
        {
            "kwargs": {
                "hidden_states": numbers(1, IMAGE_SIDE**2, shape["in_channels"]),
                "timestep": torch.tensor([1 - step / STEPS], device=device).bfloat16(),
                "guidance": torch.tensor([3.5], device=device),
                "return_dict": False,
                **ids,
                **prompt,
            },
            "timestep_idx": step,
        }
        for prompt in prompts
        for step in range(STEPS)
    ]


def do_job(model: nn.Module, data: list[dict[str, Any]], variant: str, folder: Path) -> None:
    """Do what a user does."""
    save = SaveProcessorConfig(output_path=str(folder))
    config = SessionConfig(processor_cfg_map={**VARIANTS[variant], "save": save}, calib_data=data)
    quant_model(model, config, structure=STRUCTURE)


@torch.no_grad()
def do_floor(model: nn.Module, data: list[dict[str, Any]], variant: str, folder: Path) -> None:
    """Do the least that leads to the same tensors."""
    if variant != "dynamic":
        for record in data:
            model(**record["kwargs"])
    write_once(folder / "floor.bin", quantized(model, [KEPT_FLOAT]))


def quantized(model: nn.Module, kept_float: list[str]) -> Iterator[Tensor]:
    """Yield to the host the codes and scales of linears that are not kept float, and the other tensors as they are."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    widest = max((model.get_parameter(name) for name in linears), key=Tensor.numel)
    codes = torch.empty(widest.numel(), dtype=torch.int8, device=widest.device)
    work = Workspace.of(max(widest.shape), widest.numel(), widest.device)
    for name, tensor in model.state_dict().items():
        if name in linears and not any(fnmatchcase(name, pattern) for pattern in kept_float):
            codes_OI = codes[: tensor.numel()].view(tensor.shape)
            scale_O1 = quantize_rows(tensor, codes_OI, work)
            yield from (codes_OI.cpu(), scale_O1.cpu())
        else:
            yield tensor.cpu()


def write_once(path: Path, tensors: Iterator[Tensor]) -> None:
    """Write tensors one behind the other, and flush the file to the disk."""
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            file.write(as_bytes(tensor))
        os.fsync(file.fileno())


def as_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def measured(work: Callable[[], object], weights: int, device: str) -> dict[str, Any]:
    """Return what the work used: seconds of processor and clock, bytes above what was there, bytes moved."""
    ones = torch.ones(64, 64, device=device).bfloat16()
    torch.mm(ones, ones)  # wakes the kernels' library
    memory, io = (_HostMemory if device == "cpu" else _CardMemory)(), moved()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    used = {name: value - io[name] for name, value in moved().items()}
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "peak_bytes": memory.above(),
        "weights_bytes": weights,
        "read_bytes": used["read_bytes"],
        "called_bytes": used["rchar"],
        "written_bytes": used["write_bytes"],
    }


class _HostMemory:
    """Know the most that was resident since it was made, in bytes above what was resident then."""

    def __init__(self) -> None:
        self._before = resident()
        forget_peak()

    def above(self) -> int:
        return resident(mark="peak") - self._before


class _CardMemory:
    """The same of what was allocated on the card."""

    def __init__(self) -> None:
        torch.accelerator.synchronize()
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def above(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("who", choices=("job", "floor"))
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("folder", type=Path, help="new folder for what is written")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--tiny", action="store_true", help="a model of 6 million parameters, to see that it works")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    shape = TINY if asked.tiny else MODEL
    model, data = build(shape, asked.device), records(shape, asked.device)
    do = do_job if asked.who == "job" else do_floor
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(json.dumps(measured(lambda: do(model, data, asked.variant, asked.folder), weights, asked.device)))


if __name__ == "__main__":
    main()
