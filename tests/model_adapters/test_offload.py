"""A transformer runs on a device one block at a time, and whatever a quantizer does inside stays."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from model_adapters.pipeline.offload import blocks_of, run_block_by_block, visiting
from quant_core import SessionConfig, W8A8ProcessorConfig, quant_model
from quant_core.calibration.records import Record
from tests.support.tiny_models import KINDS, build, example_inputs


class Doubled(nn.Linear):
    """What a quantizer may make of a linear: another class in the same place."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def on_meta(model: nn.Module) -> AbstractContextManager[None]:
    """Visit the meta device, which has no numbers to be taken for the host's; the rest of the model is there."""
    blocks = blocks_of(model)
    at_home = [dict(block.state_dict(keep_vars=True)) for block in blocks]
    model.to("meta")
    for block, tensors in zip(blocks, at_home):
        block.load_state_dict(tensors, assign=True)
    return visiting(blocks, "meta")


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_same_and_nothing_stays_behind(kind):
    model, inputs = build(kind), example_inputs(kind)
    expected, before = model(**inputs)[0], dict(model.named_parameters())
    with run_block_by_block(model, "cpu"):
        assert torch.equal(model(**inputs)[0], expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_block_that_runs_is_on_the_device(kind):
    model, seen = build(kind), []
    blocks = blocks_of(model)
    for block in blocks:
        first = next(module for module in block.modules() if isinstance(module, nn.Linear))
        first.register_forward_pre_hook(lambda *_: seen.append([devices(other) for other in blocks]))
    inputs = {name: t.to("meta") if torch.is_tensor(t) else t for name, t in example_inputs(kind).items()}
    with on_meta(model):
        model(**inputs)
    assert all(devices(block) == {"cpu"} for block in blocks)
    assert len(seen) == len(blocks)
    for index, places in enumerate(seen):
        assert [place == {"meta"} for place in places] == [other == index for other in range(len(blocks))]


def test_a_linear_whose_class_is_exchanged_inside_computes_with_the_new_class():
    model, inputs = build("flux"), example_inputs("flux")
    before = model(**inputs)[0]
    with run_block_by_block(model, "cpu"):
        model.transformer_blocks[0].ff.net[2].__class__ = Doubled
        inside = model(**inputs)[0]
    assert not torch.equal(inside, before)
    assert torch.equal(model(**inputs)[0], inside)


def test_a_block_that_fails_gives_its_memory_back():
    model = build("flux")
    inputs = {name: t.to("meta") if torch.is_tensor(t) else t for name, t in example_inputs("flux").items()}

    def fail(*_: object) -> None:
        raise RuntimeError("no more memory")

    model.transformer_blocks[1].ff.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more memory"), on_meta(model):
        model(**inputs)
    assert devices(model.transformer_blocks) == {"cpu"}


def test_a_model_quantized_block_by_block_is_the_same_model():
    outputs = []
    for offload in (False, True):
        model, inputs = build("sd3"), example_inputs("sd3")
        config = SessionConfig(
            processor_cfg_map={"w8a8": W8A8ProcessorConfig()}, calib_data=[Record(kwargs=inputs)], numerics="float32"
        )
        if offload:
            with run_block_by_block(model, "cpu"):
                quant_model(model, config)
        else:
            quant_model(model, config)
        outputs.append(model(**inputs)[0])
    assert torch.equal(*outputs)
