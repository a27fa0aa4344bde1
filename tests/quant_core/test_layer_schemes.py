"""A session may give each layer a scheme of its own; one scheme for all is the plain case of the same path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quant_core import M4ProcessorConfig, SaveProcessorConfig, SessionConfig, TimestepManager, quant_model
from quant_core.checkpoint.loading import load_deployed
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.errors import ConfigurationError
from quant_core.parallel.groups import Parallel
from quant_core.session.quantize import smoothing_of
from quant_core.session.session import Session
from quant_core.session.streaming import quantize_streaming, reads_activations
from quant_core.session.targets import layer_plan
from quant_core.structure import find_structure
from tests.support.small_model import SCHEMES
from tests.support.tiny_models import build, example_inputs

STEPS = 2
RULES: dict[str, Any] = {
    "transformer_blocks.0.attn.to_[qk]": "w8a8_dynamic",
    "*.norm*.linear": "w8a16",
    "transformer_blocks.1.*": "w8a8_timestep",
    "*.ff_context.*": "float",
}
Q, NORM, LATER, CONTEXT, OTHER = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.norm1.linear",
    "transformer_blocks.1.attn.to_q",
    "transformer_blocks.0.ff_context.net.0.proj",
    "transformer_blocks.0.attn.to_v",
)


def records() -> list[dict[str, Any]]:
    base = example_inputs("flux")
    return [
        {"args": [], "kwargs": base | {"hidden_states": base["hidden_states"] * (1 + step)}, "timestep_idx": step}
        for step in range(STEPS)
    ]


def session(folder: Path | None, rules: dict[str, Any] = RULES, main: str = "w8a8", **more: Any) -> SessionConfig:
    save = {} if folder is None else {"save": SaveProcessorConfig(output_path=str(folder))}
    processors = {main: SCHEMES[main](disable_names=["*net.2*"]), **save, **more}
    return SessionConfig(processor_cfg_map=processors, layer_schemes=rules, calib_data=records())


def types(model: nn.Module, config: SessionConfig) -> dict[str, str]:
    return {name: scheme.key for name, scheme in layer_plan(model, config).items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Quantize the tiny FLUX with every scheme in one checkpoint."""
    model = build("flux")
    return model, quant_model(model, session(tmp_path_factory.mktemp("mixed")))


def test_each_layer_has_its_own_type_in_the_description_and_the_file_is_called_after_the_one_of_all_others(mixed: Any):
    description = json.loads(mixed[1].files.description.read_text())
    assert description["model_quant_type"] == "W8A8"
    assert mixed[1].files.weights.name == "quant_model_weight_w8a8.safetensors"
    kinds = [description[f"{name}.weight"] for name in (Q, NORM, LATER, CONTEXT, OTHER)]
    assert kinds == ["W8A8_DYNAMIC", "W8A16", "W8A8_TIMESTEP", "FLOAT", "W8A8"]
    assert description[f"{OTHER}.input_scale"] == "W8A8"


def test_the_reader_knows_each_layers_type_and_computes_what_the_session_left(mixed: Any):
    model, result = mixed
    checkpoint = open_checkpoint(result.files)
    checkpoint.verify()
    assert {name: group.type for name, group in checkpoint.inventory.layers.items()} == {
        name: layer.scheme.quant_type for name, layer in result.layers.items()
    }
    assert (checkpoint.inventory.timesteps, checkpoint.timestep_sep) == (STEPS, STEPS // 2)
    again = build("flux")
    load_deployed(again, result.files)
    for step in range(STEPS):
        TimestepManager.set_timestep_idx(step)
        with torch.no_grad():
            assert torch.equal(again(**example_inputs("flux"))[0], model(**example_inputs("flux"))[0])
    TimestepManager.set_timestep_idx(None)


def test_the_first_pattern_wins_also_over_layers_that_are_kept_float():
    model = build("flux")
    found = types(model, session(None, {"*to_q": "float", "*.to_*": "w8a16", "*.ff.net.2": "w8a8_dynamic"}))
    assert Q not in found
    assert found[OTHER] == "w8a16"
    assert found["transformer_blocks.0.ff.net.2"] == "w8a8_dynamic"
    assert "transformer_blocks.0.ff_context.net.2" not in found
    assert "proj_out" not in found  # the last linear stays float whatever is asked


def test_without_patterns_every_layer_has_the_one_scheme():
    assert set(types(build("flux"), session(None, {})).values()) == {"w8a8"}


def test_a_pattern_that_matches_no_layer_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigurationError, match=r"no layer matches '\*.atn.to_q'") as caught:
        layer_plan(build("flux"), session(None, {"*.atn.to_q": "w8a16"}))
    assert "attn.to_q (nearest name)" in str(caught.value)


def test_a_pattern_behind_wider_ones_that_take_all_its_layers_is_refused_with_the_order_that_works():
    wide = {"*.to_[qkv]": "w8a16", "*.to_add_out": "w8a16"}
    with pytest.raises(ConfigurationError, match=r"'\*\.attn\.to_\*' decides for no layer") as caught:
        layer_plan(build("flux"), session(None, {**wide, "*.to_out.0": "w8a16", "*.attn.to_*": "float"}))
    assert "'*.to_[qkv]', '*.to_out.0', '*.to_add_out'" in str(caught.value)
    assert "narrower" in str(caught.value)
    assert Q not in layer_plan(build("flux"), session(None, {Q: "float", "*": "w8a16"}))
    assert Q in layer_plan(build("flux"), session(None, {**wide, "*.attn.to_*": "float"}))  # it has to_out.0


def test_the_last_linear_may_be_called_float_behind_a_pattern_that_names_it_too():
    assert "proj_out" not in layer_plan(build("flux"), session(None, {"*": "w8a16", "proj_out": "float"}))


@pytest.mark.parametrize("pattern", ["proj_out", "proj_ou?"])
def test_a_scheme_for_the_last_linear_only_is_refused_and_float_is_not(pattern: str):
    with pytest.raises(ConfigurationError, match="gives a scheme to 'proj_out' only, which stays float"):
        layer_plan(build("flux"), session(None, {pattern: "w8a16"}))
    assert "proj_out" not in layer_plan(build("flux"), session(None, {pattern: "float"}))


def test_a_mix_that_reads_no_activations_streams_to_the_bytes_of_a_held_model(tmp_path: Path):
    rules = {"*.norm*.linear": "w8a16", "*.to_k": "float"}
    model = build("flux")
    described = type(model)(**model.config).to("meta")
    config = session(tmp_path / "streamed", rules, "w8a8_dynamic")
    assert not reads_activations(described, config)
    streamed = quantize_streaming(described, model.state_dict().__getitem__, config).files
    held = quant_model(model, session(tmp_path / "held", rules, "w8a8_dynamic")).files
    assert streamed is not None
    assert held is not None
    assert streamed.weights.read_bytes() == held.weights.read_bytes()
    assert streamed.description.read_text() == held.description.read_text()


def test_whether_activations_are_read_depends_on_the_layers_and_not_on_the_scheme_that_no_layer_has():
    model = build("flux")
    assert reads_activations(model, session(None, {"*.to_q": "w8a8"}, "w8a8_dynamic"))
    assert not reads_activations(model, session(None, {"*": "w8a16"}, "w8a8"))


def test_smoothing_leaves_alone_the_layers_that_multiply_nothing_and_those_that_are_to_be_plain(tmp_path: Path):
    """The runtime of W8A16 reads the factor and does not multiply: the output would be wrong."""
    rules = {"*.to_q": "w8a16", "*.to_k": SCHEMES["w8a8"](smoothed=False)}
    model = build("flux")
    exact = model(**example_inputs("flux"))[0]
    config = session(tmp_path, rules, m4=M4ProcessorConfig(smoothing_groups="all"))
    result = quant_model(model, config, structure=find_structure(model))
    smoothed = {name.rpartition(".")[2] for name, layer in result.layers.items() if layer.mul_scale_I is not None}
    assert "to_v" in smoothed
    assert not {"to_q", "to_k"} & smoothed
    assert (model(**example_inputs("flux"))[0] - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize(
    ("rules", "main", "says"),
    [
        ({"*": "w8a9"}, "w8a8", "w8a9"),
        ({"*.a": SCHEMES["w8a8_timestep"](timestep_sep=1)}, "w8a8_timestep", "a runtime has one"),
        ({"*": SCHEMES["w8a16"](cfg={"act_method": "mse"})}, "w8a8", "act_method mse has no meaning for w8a16"),
    ],
)
def test_rules_that_contradict_are_refused(rules: dict[str, Any], main: str, says: str):
    with pytest.raises(ValueError, match=says):
        session(None, rules, main)


def test_plain_layers_are_refused_beside_smoothing_that_the_layers_in_front_do():
    rules = {"*.to_k": SCHEMES["w8a8"](smoothed=False)}
    with pytest.raises(ValueError, match="no layer can be left without outlier suppression with fused=True"):
        session(None, rules, m4=M4ProcessorConfig(fused=True))


def test_no_records_are_replayed_for_factors_that_no_layer_takes():
    told: set[str] = set()
    model = build("flux")
    for rule, measured in (("w8a8_dynamic", True), ("w8a16", False)):
        config = session(None, {"*": rule}, m4=M4ProcessorConfig(smoothing_groups="every"))
        told.clear()
        smoothing_of(Session(model, config, find_structure(model), Parallel(), lambda stage, *_: told.add(stage)))
        assert bool(told) == measured


def test_smoothing_every_layer_needs_no_group_and_survives_a_float_member(tmp_path: Path):
    rules = {"*.to_q": "float", "*.net.2": "w8a8"}
    model = build("flux")
    exact = model(**example_inputs("flux"))[0]
    config = session(tmp_path, rules, m4=M4ProcessorConfig(smoothing_groups="every"))
    result = quant_model(model, config, structure=find_structure(model))
    assert all(layer.mul_scale_I is not None for layer in result.layers.values())
    assert {"transformer_blocks.0.attn.to_k", "transformer_blocks.0.ff.net.2"} <= set(result.layers)
    assert (model(**example_inputs("flux"))[0] - exact).norm() / exact.norm() < 0.1
