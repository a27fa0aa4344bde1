"""Tiny float transformers with outlier channels, records that run them, and what smoothing makes of them in float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import load_adapter
from quant_core.arithmetic.numerics import NUMERICS
from quant_core.calibration.records import Record
from quant_core.parallel.groups import Parallel
from quant_core.session.targets import target_layers
from quant_core.smoothing.method import SmoothingConfig
from quant_core.smoothing.smooth import Smoothing, smooth
from quant_core.structure import ModelStructure
from tests.support.tiny_models import KINDS, build, example_inputs

# A gain of 30 in every 16th channel: the outliers that smoothing is for (real models: 10 to 100).
OUTLIER_EVERY, OUTLIER_GAIN = 16, 30.0


def structure_of(kind: str) -> ModelStructure:
    """Return what the adapter declares of the model."""
    return load_adapter(KINDS[kind][0]).structure


def outlier_model(kind: str, seed: int = 0) -> Any:
    """Build a transformer whose modulations make some channels much larger than the others."""
    model = build(kind, seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm1.linear.bias", "norm1_context.linear.bias")):
            parameter[::OUTLIER_EVERY] += OUTLIER_GAIN * parameter[::OUTLIER_EVERY].sign()
        # Without a norm of q and k, logits of hundreds would make float32 itself wrong by 4e-4 (against float64).
        if kind == "sd3" and name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
            parameter.div_(OUTLIER_GAIN)
    return model


def records(kind: str, count: int, *, steps: int = 1) -> list[Record]:
    """Return records that differ in content and, every other one, in prompt length."""
    found = []
    for index in range(count):
        inputs = example_inputs(kind)
        generator = torch.Generator().manual_seed(index)
        for key in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
            inputs[key] = torch.randn(inputs[key].shape, generator=generator)
        if index % 2:
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :3]
            if "txt_ids" in inputs:
                inputs["txt_ids"] = inputs["txt_ids"][:3]
        found.append(Record((), inputs, index % steps))
    return found


@torch.no_grad()
def outputs(model: nn.Module, of: list[Record]) -> Tensor:
    """Return the samples of all records, flat."""
    return torch.cat([model(*record.args, **record.kwargs)[0].flatten() for record in of])


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact output."""
    return ((output.double() - exact.double()).norm() / exact.double().norm()).item()


def smoothed(
    kind: str,
    model: Any,
    config: SmoothingConfig,
    of: list[Record],
    disable: tuple[str, ...] = (),
    parallel: Parallel | None = None,
) -> Smoothing:
    """Choose the factors of a float model, or of this rank's part of one, in the better numerics."""
    return smooth(
        model,
        config,
        of,
        structure=structure_of(kind),
        targets=target_layers(model, disable),
        numerics=NUMERICS["float32"],
        parallel=parallel,
    )


@torch.no_grad()
def apply_in_float(model: Any, smoothing: Smoothing) -> None:
    """Change a float model as smoothing says, without quantizing it: weights in place, inputs by hooks."""
    for name, rescaling in smoothing.rescalings.items():
        linear = model.get_submodule(name)
        linear.weight.copy_(rescaling.weight(linear.weight, slice(None)))
        if linear.bias is not None:
            linear.bias.copy_(rescaling.bias(linear.bias))
        if rescaling.mul_scale_I is not None:
            linear.register_forward_pre_hook(lambda _, args, factor=rescaling.mul_scale_I: (args[0] * factor,))
