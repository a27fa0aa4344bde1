"""A float model that loads a checkpoint computes what was quantized; another model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quant_core import TimestepManager, quant_model
from quant_core.checkpoint.loading import load_deployed
from quant_core.errors import VerificationError
from quant_core.layers.deployed import DeployedLinear
from tests.support.small_model import SCHEMES, STEPS, SmallModel, session
from tests.support.stored import written


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_model_that_loads_a_checkpoint_computes_what_the_quantized_one_did(tmp_path: Path, scheme: str):
    quantized, loaded = SmallModel(torch.bfloat16), SmallModel(torch.bfloat16)
    result = quant_model(quantized, session(scheme, tmp_path, dtype=torch.bfloat16))
    assert result.files is not None
    hooked: list[Tensor] = []
    loaded.first.register_forward_hook(lambda module, args, output: hooked.append(output))
    for parameter in loaded.parameters():
        parameter.data.zero_()  # everything has to come from the files
    load_deployed(loaded, result.files)
    x = torch.randn(3, 8).bfloat16()
    for step in range(STEPS):
        TimestepManager.set_timestep_idx(step)
        assert torch.equal(loaded(x), quantized(x))
    TimestepManager.set_timestep_idx(None)
    assert isinstance(loaded.first, DeployedLinear)
    assert len(hooked) == STEPS


def test_a_model_that_was_never_in_memory_comes_from_the_files_alone(tmp_path: Path):
    files = written(tmp_path, "w8a8_dynamic")
    with torch.device("meta"):
        empty = SmallModel()
    load_deployed(empty, files)
    other = SmallModel()
    load_deployed(other, files)
    x = torch.randn(3, 8)
    assert torch.equal(empty(x), other(x))


def test_the_models_own_floats_can_stay(tmp_path: Path):
    files, model = written(tmp_path, "w8a8_dynamic"), SmallModel()
    model.last.bias.data += 1
    before = model.last.bias.clone()
    load_deployed(model, files, load_floats=False)
    assert torch.equal(model.last.bias, before)
    assert isinstance(model.first, DeployedLinear)


def no_bias(model: SmallModel) -> None:
    model.first.bias = None  # type: ignore[assignment]


def wider(model: SmallModel) -> None:
    model.second = nn.Linear(16, 9, bias=False)


def a_norm(model: SmallModel) -> None:
    model.first = nn.LayerNorm(8)  # type: ignore[assignment]


def extra(model: SmallModel) -> None:
    model.more = nn.Linear(2, 2)


def other_float(model: SmallModel) -> None:
    model.norm = nn.LayerNorm(9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_bias, "only the checkpoint has a bias for 'first'"),
        (wider, "the weight of 'second' has the shape (8, 16)"),
        (a_norm, "the model has no linear layer 'first'"),
        (extra, "the checkpoint has no 'more.weight'"),
        (other_float, "'norm.weight' has the shape (8,)"),
        (lambda model: model.half(), "the checkpoint is of a torch.float32 model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_the_model_stays_as_it_was(tmp_path: Path, change, says: str):
    files, model = written(tmp_path, "w8a8_dynamic"), SmallModel()
    change(model)
    with pytest.raises(VerificationError) as caught:
        load_deployed(model, files)
    assert says in str(caught.value)
    assert not any(isinstance(module, DeployedLinear) for module in model.modules())


def test_a_checkpoint_is_not_loaded_over_another(tmp_path: Path):
    files, model = written(tmp_path, "w8a8_dynamic"), SmallModel()
    load_deployed(model, files)
    with pytest.raises(VerificationError, match="'first' is quantized already"):
        load_deployed(model, files)


def test_a_tensor_of_two_modules_and_a_module_of_two_names_are_loaded(tmp_path: Path):
    def tied() -> SmallModel:
        model = SmallModel()
        model.also = model.norm  # type: ignore[assignment]
        model.other = nn.LayerNorm(8, bias=False)  # type: ignore[assignment]
        model.other.weight = model.norm.weight
        return model

    files = quant_model(tied(), session("w8a8_dynamic", tmp_path)).files
    assert files is not None
    load_deployed(tied(), files)


def test_a_buffer_that_nobody_can_know_is_named(tmp_path: Path):
    files = written(tmp_path, "w8a8_dynamic")
    with torch.device("meta"):
        empty = SmallModel()
    empty.register_buffer("angles", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(VerificationError, match="nothing says what the buffer 'angles' holds"):
        load_deployed(empty, files)


def test_no_old_description_stands_beside_new_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = written(tmp_path, "w8a8_dynamic")

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quant_core.checkpoint.entries.write_text_atomically", ended)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, "w8a8_dynamic")
    assert files.weights.exists()
    assert not files.description.exists()
