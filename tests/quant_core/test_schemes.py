"""Whatever stands in the table of schemes is quantized, streamed, published, read back and checked: a row is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

import quant_core
from quant_core import M4ProcessorConfig, SaveProcessorConfig, SessionConfig, TimestepManager, quant_model
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.errors import ConfigurationError, VerificationError
from quant_core.schemes import BY_TYPE, QUANT_TYPES, SCHEMES
from quant_core.schemes.tensor_rules import INTEGER, TensorRule
from quant_core.session.streaming import quantize_streaming, reads_activations
from tests.support.small_model import STEPS, SmallModel, session
from tests.support.smoothed_models import outlier_model, outputs, records, relative_error, structure_of
from tests.support.stored import Damage, add_attention, add_smoothing, damaged, written
from tests.support.tiny_models import build

each_scheme = pytest.mark.parametrize("name", SCHEMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_scheme
def test_a_scheme_has_one_name_everywhere(name: str):
    scheme = SCHEMES[name]
    assert scheme.config.key == name == scheme.quant_type.lower()  # the loader derives file names from the type
    assert BY_TYPE[scheme.quant_type] is scheme
    assert getattr(quant_core, scheme.config.__name__) is scheme.config
    assert (f"{name}_fa3" in QUANT_TYPES) == scheme.with_attention
    assert scheme.summary


@each_scheme
@each_dtype
def test_the_checkpoint_holds_the_tensors_that_the_row_promises_in_their_order(tmp_path: Path, name: str, dtype):
    checkpoint = open_checkpoint(written(tmp_path, name, dtype=dtype))
    checkpoint.verify()
    scheme = SCHEMES[name]
    assert list(checkpoint.inventory.layers["first"].members) == list(scheme.rules)
    without_bias = [tensor for tensor in scheme.rules if tensor != "bias"]
    assert list(checkpoint.inventory.layers["second"].members) == without_bias
    assert {group.type for group in checkpoint.inventory.layers.values()} == {scheme.quant_type}
    assert checkpoint.inventory.timesteps == (STEPS if scheme.per_step else None)


@each_scheme
@each_dtype
def test_a_deployed_layer_computes_what_its_dequantized_weight_does(tmp_path: Path, name: str, dtype: torch.dtype):
    model = SmallModel(dtype)
    files = quant_model(model, session(name, tmp_path, dtype=dtype)).files
    assert files is not None
    checkpoint, x = open_checkpoint(files), torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted = F.linear(x.float(), checkpoint.read_weight("first"), SmallModel(dtype).first.bias.float())
    for step in range(STEPS):
        TimestepManager.set_timestep_idx(step)
        # Inputs of 8 bits are off by half a step of the widest range: 1/255 of it, on each of 8 channels.
        assert relative_error(model.first(x).float(), wanted) < 0.05
    TimestepManager.set_timestep_idx(None)


streamed_schemes = [name for name, scheme in SCHEMES.items() if not scheme.observes_input]


@pytest.mark.parametrize("name", streamed_schemes)
@pytest.mark.parametrize(("kind", "dtype"), [("flux", torch.bfloat16), ("sd3", torch.float16)], ids=str)
def test_a_scheme_that_observes_nothing_streams_to_the_same_bytes(tmp_path: Path, name: str, kind: str, dtype):
    def config(folder: str) -> SessionConfig:
        save = SaveProcessorConfig(output_path=str(tmp_path / folder))
        return SessionConfig(processor_cfg_map={name: SCHEMES[name].config(), "save": save})

    model = build(kind).to(dtype)
    assert not reads_activations(model, config("streamed"))
    described = type(model)(**model.config).to(dtype).to("meta")
    streamed = quantize_streaming(described, model.state_dict().__getitem__, config("streamed")).files
    held = quant_model(build(kind).to(dtype), config("held")).files
    assert streamed is not None
    assert held is not None
    assert streamed.weights.read_bytes() == held.weights.read_bytes()
    assert streamed.description.read_bytes() == held.description.read_bytes()


def breaks(tensor: str, rule: TensorRule, dtype: torch.dtype) -> dict[str, tuple[Damage, str]]:
    """Return ways to break one rule of layer `first`, each with what the refusal names."""
    full = f"first.{tensor}"

    def drop(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        del tensors[full], description[full]

    def recast(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        tensors[full] = tensors[full].to(torch.float64)

    def reshape(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        tensors[full] = tensors[full].unsqueeze(0).contiguous()

    def spoil(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        spoilt = tensors[full].clone()
        spoilt.view(-1)[-1] = float("nan") if spoilt.is_floating_point() else -128
        tensors[full] = spoilt

    def retype(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        description[full] = "W8A32"

    found = {"dtype": (recast, full), "shape": (reshape, full), "type": (retype, full)}
    if rule.values is not INTEGER:
        found["value"] = (spoil, full)
    if rule.required:
        found["absence"] = (drop, f"'first' has no {tensor}")
    return found


@pytest.mark.parametrize(
    ("name", "tensor", "way"),
    [
        (name, tensor, way)
        for name, scheme in SCHEMES.items()
        for tensor, rule in scheme.rules.items()
        for way in breaks(tensor, rule, torch.float32)
    ],
)
def test_a_layer_that_breaks_a_rule_of_its_row_is_refused_by_name(tmp_path: Path, name: str, tensor: str, way: str):
    damage, named = breaks(tensor, SCHEMES[name].rules[tensor], torch.float32)[way]
    with pytest.raises(VerificationError) as caught:
        open_checkpoint(damaged(written(tmp_path, name), damage)).verify()
    assert named in str(caught.value)


@each_scheme
def test_a_smoothed_layer_is_read_where_the_runtime_multiplies_its_input_and_refused_elsewhere(tmp_path, name: str):
    files = damaged(written(tmp_path, name), add_smoothing)
    if SCHEMES[name].multiplies_input:
        open_checkpoint(files).verify()
    else:
        with pytest.raises(VerificationError, match=r"'first\.div\.mul_scale' belongs to no layer"):
            open_checkpoint(files)


@each_scheme
def test_a_layer_of_one_output_is_refused_where_the_runtime_cannot_compute_it(tmp_path: Path, name: str):
    model = SmallModel()
    model.second = torch.nn.Linear(16, 1, bias=False)  # its output is added to eight numbers
    if SCHEMES[name].least_outputs == 1:
        files = quant_model(model, session(name, tmp_path)).files
        assert files is not None
        open_checkpoint(files).verify()
    else:
        with pytest.raises(ConfigurationError, match=r"layers with one output: second") as caught:
            quant_model(model, session(name, tmp_path))
        assert "--disable_names second" in caught.value.advice


@each_scheme
def test_a_stored_layer_of_one_output_is_found_where_the_runtime_cannot_compute_it(tmp_path: Path, name: str):
    def cut(tensors: dict[str, Tensor], _: object) -> None:
        for tensor in [each for each in tensors if each.startswith("second.") and "input" not in each]:
            axis = -1 if tensor.endswith(("quant_bias", "deq_scale")) else 0
            tensors[tensor] = tensors[tensor].narrow(axis, 0, 1).contiguous()

    found = [each.rule for each in open_checkpoint(damaged(written(tmp_path, name), cut)).findings()]
    assert found == ([] if SCHEMES[name].least_outputs == 1 else ["operators"])


@each_scheme
def test_attention_scales_are_read_beside_any_scheme(tmp_path: Path, name: str):
    checkpoint = open_checkpoint(damaged(written(tmp_path, name), add_attention))
    checkpoint.verify()
    assert list(checkpoint.inventory.attentions) == ["attn"]


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if not scheme.multiplies_input])
def test_smoothing_that_the_runtime_would_ignore_is_refused_and_fused_smoothing_is_not(name: str):
    with pytest.raises(ValidationError, match=f"{name} can only be smoothed with fused"):
        SessionConfig(processor_cfg_map={name: SCHEMES[name].config(), "m4": M4ProcessorConfig()})
    model, exact, of = outlier_model("flux"), outputs(outlier_model("flux"), records("flux", 2)), records("flux", 2)
    processors: dict[str, Any] = {name: SCHEMES[name].config(), "m4": M4ProcessorConfig(fused=True)}
    result = quant_model(
        model, SessionConfig(processor_cfg_map=processors, calib_data=of), structure=structure_of("flux")
    )
    assert all(layer.mul_scale_I is None for layer in result.layers.values())
    assert relative_error(outputs(model, of), exact) < 0.05


def test_w8a16_is_the_float_product_with_the_weight_that_the_codes_stand_for():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, x = SmallModel(dtype), torch.randn(3, 8).to(dtype)
        layers = quant_model(model, session("w8a16", dtype=dtype)).layers
        tensors = layers["first"].tensors
        weight_OI = (tensors["weight"].float() * tensors["weight_scale"].float()).to(dtype)
        assert torch.equal(model.first(x), F.linear(x, weight_OI, SmallModel(dtype).first.bias))
        assert tensors["weight_offset"].tolist() == [[0.0]] * 16
