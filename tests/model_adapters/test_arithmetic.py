"""A transformer computes in its own dtype, or in the floor's, inside a pipeline that is float32 around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_adapters.pipeline.arithmetic import other_arithmetic, own_arithmetic
from model_adapters.pipeline.offload import run_block_by_block
from tests.support.tiny_models import build, example_inputs

KINDS, DTYPES = ("flux", "sd3", "sd35"), (torch.bfloat16, torch.float16, torch.float32)
each_kind = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def seen(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the first output of every linear in the blocks, and what the model makes of time and guidance."""
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "blocks" in name:
                hook = module.register_forward_hook(lambda m, a, y, name=name: found.update({name: [y]}))
                stack.callback(hook.remove)
        time: Any = model.time_text_embed
        hook = time.register_forward_pre_hook(lambda m, args: found.update(time=[a for a in args if a.ndim == 1]))
        stack.callback(hook.remove)
        yield found


def dtypes(found: dict[str, list[Tensor]]) -> set[torch.dtype]:
    return {tensors[0].dtype for name, tensors in found.items() if name != "time"}


@torch.no_grad()
def outputs(model: nn.Module, kind: str, dtype: torch.dtype, *, floor: bool) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Call the model with float32 inputs, whose time no narrow dtype holds exactly."""
    inputs = example_inputs(kind)
    inputs["timestep"] = inputs["timestep"] * 0.7123
    with ExitStack() as stack:
        stack.enter_context(own_arithmetic(model, dtype))
        if floor:
            stack.enter_context(other_arithmetic(model, dtype))
        found = stack.enter_context(seen(model))
        return model(**inputs)[0], found


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_arithmetic_is_what_the_model_computes_of_rounded_inputs(kind: str, dtype: torch.dtype):
    model = build(kind).to(dtype)
    found, layers = outputs(model, kind, dtype, floor=False)
    assert found.dtype == torch.float32
    assert dtypes(layers) == {dtype}
    rounded = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.ndim > 1 else value
        for name, value in example_inputs(kind).items()
    }
    rounded["timestep"] = rounded["timestep"] * 0.7123
    with torch.no_grad():
        assert torch.equal(model(**rounded)[0].float(), found)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_floor_computes_every_block_in_the_other_dtype(kind: str, dtype: torch.dtype):
    model = build(kind).to(dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    found, layers = outputs(model, kind, dtype, floor=True)
    exact, _ = outputs(model, kind, dtype, floor=False)
    assert dtypes(layers) == {other}
    difference = (found - exact).norm() / exact.norm()
    assert 0 < difference < 0.1


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_time_and_guidance_are_the_same_on_the_floor(kind: str, dtype: torch.dtype):
    """FLUX rounds them to its dtype: 356.15 is 356 in bfloat16. With another time the floor would be 33 dB lower."""
    model = build(kind).to(dtype)
    times = [outputs(model, kind, dtype, floor=floor)[1]["time"] for floor in (False, True)]
    assert len(times[0]) == (2 if kind == "flux" else 1)
    for own, other in zip(*times, strict=True):
        assert torch.equal(own.float(), other.float())


@each_kind
def test_the_model_is_left_as_it_was_even_by_a_call_that_fails(kind: str):
    model = build(kind).to(torch.bfloat16)
    before = dict(model.named_parameters())
    outputs(model, kind, torch.bfloat16, floor=True)
    with pytest.raises(RuntimeError), other_arithmetic(model, torch.bfloat16):
        model(**example_inputs(kind) | {"hidden_states": torch.zeros(2, 3, 5, 7)})
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@each_kind
def test_the_floor_of_an_offloaded_model_is_the_same_and_its_weights_come_home(kind: str):
    model = build(kind).to(torch.bfloat16)
    before = dict(model.named_parameters())
    alone, _ = outputs(model, kind, torch.bfloat16, floor=True)
    with run_block_by_block(model, "cpu"):
        offloaded, _ = outputs(model, kind, torch.bfloat16, floor=True)
    assert torch.equal(alone, offloaded)
    blocks = {name for name in before if "blocks" in name}
    assert all(model.get_parameter(name) is before[name] for name in blocks)
