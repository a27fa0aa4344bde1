"""Values are rotated inside each attention head: nothing changes in floats, and outliers of one channel are spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from quant_core import FA3ProcessorConfig, M4ProcessorConfig, SaveProcessorConfig, SessionConfig, quant_model
from quant_core.arithmetic.rotation import Rotation
from quant_core.attention.rotated_values import find_rotations, levelled, rotate_values, rotation_of
from quant_core.calibration.records import as_records
from quant_core.checkpoint.loading import load_deployed
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint
from quant_core.checkpoint.rotations import ROTATIONS_KEY
from quant_core.errors import ConfigurationError
from quant_core.naming import linear_names
from quant_core.quality.decide import measure_layers
from quant_core.schemes.treatment import FLOAT, Treatment
from quant_core.session.streaming import quantize_streaming
from quant_core.structure import AttentionValues, ModelStructure, find_structure
from tests.support.massive_values import with_massive_values
from tests.support.small_model import SCHEMES
from tests.support.stored import damaged
from tests.support.tiny_models import HEAD_DIM, build, example_inputs, louder_records

TO_V, TO_OUT = "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.to_out.0"
# What an attention of each model consists of, by the linears that a rotation has to change.
LINEARS = {
    "flux": {"attn.to_v", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "proj_out"},
    "sd3": {"attn.to_v", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out"},
    "sd35": {"attn.to_v", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "attn2.to_v", "attn2.to_out.0"},
}
ATTENTIONS = {"flux": 4, "sd3": 3, "sd35": 5}


def session(
    folder: Path | None = None, scheme: str = "w8a8_dynamic", rotate: bool = True, **more: Any
) -> SessionConfig:
    save = {} if folder is None else {"save": SaveProcessorConfig(output_path=str(folder))}
    rules, kind = more.pop("layer_schemes", {}), more.pop("kind", "flux")
    return SessionConfig(
        processor_cfg_map={scheme: SCHEMES[scheme](), **save, **more},
        layer_schemes=rules,
        calib_data=louder_records(kind, 2),
        rotate_values=rotate,
    )


def rotated(kind: str, dtype: torch.dtype, **changes: Any) -> tuple[Any, Any]:
    """Return a model, and the same one rotated."""
    model, other = (build(kind, **changes).to(dtype) for _ in range(2))
    found = find_rotations(other, find_structure(other), targets=linear_names(other))
    rotate_values(other, levelled(other, found, other.get_parameter).linears)
    return model, other


def inputs(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    found = example_inputs(kind)
    return {name: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for name, t in found.items()}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["flux", "sd3", "sd35"])
def test_a_rotated_model_computes_what_it_did(kind: str, dtype: torch.dtype):
    model, other = rotated(kind, dtype)
    with torch.no_grad():
        exact, found = model(**inputs(kind, dtype))[0], other(**inputs(kind, dtype))[0]
    assert relative(found, exact) < (1e-6 if dtype is torch.float32 else 1e-14)


@pytest.mark.parametrize("kind", ["flux", "sd3", "sd35"])
def test_all_linears_around_each_attention_change_and_no_other(kind: str):
    model = build(kind)
    found = find_rotations(model, find_structure(model), targets=linear_names(model))
    assert {name.split(".", 2)[2] for name in found.linears} == LINEARS[kind]
    assert (len(found.attentions), found.skipped) == (ATTENTIONS[kind], {})
    model, other = rotated(kind, torch.float32)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, other.get_parameter(n))}
    values = {f"{name}.bias" for name, rotation in found.linears.items() if rotation.columns is None}
    assert changed == {f"{name}.weight" for name in found.linears} | values


def test_the_feed_forwards_columns_of_a_layer_that_reads_both_stay():
    model, other = rotated("flux", torch.float32)
    before, after = (each.get_parameter("single_transformer_blocks.0.proj_out.weight") for each in (model, other))
    width = model.single_transformer_blocks[0].attn.to_v.out_features
    assert torch.equal(before[:, width:], after[:, width:])
    assert (before[:, :width] != after[:, :width]).float().mean() > 0.9


def test_a_rotation_is_its_own_inverse_without_levels_and_spreads_one_massive_channel_over_its_head():
    values = torch.zeros(8)
    values[5] = 100.0
    rotation = Rotation(head_size=4, columns=8)
    assert rotation.input(values).abs().tolist() == [0, 0, 0, 0, 50, 50, 50, 50]
    assert torch.equal(rotation.input(rotation.input(values)), values)


@pytest.mark.parametrize("columns", [None, 8], ids=["makes values", "reads them"])
@pytest.mark.parametrize("levels", [(), (3, -1, 0, 0, 2, 7, -12, 1)], ids=["plain", "levelled"])
def test_what_changed_can_be_changed_back(columns: int | None, levels: tuple[int, ...]):
    makes, reads = Rotation(4, levels=levels), Rotation(4, 8, levels)
    values = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(makes.output(reads.input(values)), values)
    weight = torch.randn(8, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, rotation = (weight, makes) if columns is None else (weight[:, :8], reads)
    assert relative(rotation.weight(weight), weight) > 0.5
    torch.testing.assert_close(rotation.unchanged(rotation.weight(weight)), weight)


def test_a_narrow_weight_is_rounded_once():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rotation in (Rotation(8), Rotation(8, columns=8)):
        assert torch.equal(rotation.weight(weight), rotation.weight(weight.float()).bfloat16())


def test_massive_channels_of_values_cost_a_static_model_less():
    """Channel 3 of every head is 60 times larger, and read by columns as many times smaller."""
    exact = with_massive_values("flux")(**example_inputs("flux"))[0]
    errors = {}
    for rotate in (False, True):
        quant_model(model := with_massive_values("flux"), session(scheme="w8a8", rotate=rotate))
        errors[rotate] = relative(model(**example_inputs("flux"))[0], exact)
    assert errors[True] < errors[False] / 5


@pytest.mark.parametrize("kind", ["flux", "sd35"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_streamed_and_held_models_give_the_same_bytes(tmp_path: Path, kind: str, dtype: torch.dtype):
    state = build(kind).to(dtype).state_dict()
    described = build(kind).to(dtype).to("meta")
    streamed = quantize_streaming(described, state.__getitem__, session(tmp_path / "streamed", kind=kind)).files
    held = quant_model(build(kind).to(dtype), session(tmp_path / "held", kind=kind)).files
    assert streamed is not None
    assert held is not None
    assert streamed.weights.read_bytes() == held.weights.read_bytes()
    assert streamed.description.read_text() == held.description.read_text()


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("w8a8", {}),
        ("w8a16", {}),
        ("w8a8_dynamic", {"m4": M4ProcessorConfig(smoothing_groups="all")}),
        ("w8a8", {"m4": M4ProcessorConfig(smoothing_groups="all", fused=True)}),
        ("w8a8_dynamic", {"fa3": FA3ProcessorConfig()}),
        ("w8a8", {"layer_schemes": {"*.to_v": "w8a16", "*.to_out.0": "w8a8_dynamic"}}),
    ],
    ids=["static", "w8a16", "smoothed", "fused", "fa3", "mixed"],
)
def test_what_is_published_goes_into_the_unrotated_float_model(tmp_path: Path, scheme: str, more: dict[str, Any]):
    exact = build("flux")(**example_inputs("flux"))[0]
    model = build("flux")
    files = quant_model(model, session(tmp_path, scheme, **more)).files
    assert files is not None
    open_checkpoint(files).verify()
    load_deployed(again := build("flux"), files)
    found = again(**example_inputs("flux"))[0]
    assert torch.equal(found, model(**example_inputs("flux"))[0])
    assert relative(found, exact) < 0.1


def test_the_scales_of_attention_are_those_of_the_rotated_values(tmp_path: Path):
    scales = {}
    for rotate in (False, True):
        folder = tmp_path / str(rotate)
        files = quant_model(build("flux"), session(folder, rotate=rotate, fa3=FA3ProcessorConfig())).files
        assert files is not None
        checkpoint = open_checkpoint(files)
        group = checkpoint.inventory.attentions["transformer_blocks.0.attn"]
        scales[rotate] = {key: checkpoint.read_raw(full) for key, full in group.members.items()}
    assert not torch.equal(scales[True]["fa_v.scale"], scales[False]["fa_v.scale"])


def test_the_header_says_which_layers_were_rotated_and_nothing_without_a_rotation(tmp_path: Path):
    for rotate in (False, True):
        files = quant_model(build("flux"), session(tmp_path / str(rotate), rotate=rotate)).files
        assert files is not None
        checkpoint = open_checkpoint(files)
        assert len(checkpoint.rotations) == (12 if rotate else 0)
        with safe_open(files.weights, "pt") as file:
            assert (ROTATIONS_KEY in (file.metadata() or {})) == rotate
        if rotate:
            width = 12 * HEAD_DIM
            last = checkpoint.rotations["single_transformer_blocks.0.proj_out"]
            assert (last.head_size, last.columns, len(last.levels)) == (HEAD_DIM, width, width)
            exact, rotation = build("flux").get_parameter(f"{TO_V}.weight"), checkpoint.rotations[TO_V]
            assert relative(checkpoint.read_weight(TO_V), exact) > 1
            assert relative(rotation.unchanged(checkpoint.read_weight(TO_V)), exact) < 0.02


@pytest.mark.parametrize(
    "said",
    [
        "[]",
        "{",
        '{"proj_out": {"head_size": 8}}',
        '{"a": {"head_size": 6}}',
        f'{{"{TO_V}": {{"head_size": 64}}}}',
        f'{{"{TO_V}": {{"head_size": 8, "levels": [1, 2]}}}}',
        f'{{"{TO_OUT}": {{"head_size": 8, "columns": 128}}}}',
    ],
)
def test_a_header_that_says_what_cannot_be_is_found(tmp_path: Path, said: str):
    files = quant_model(build("flux"), session(tmp_path)).files
    assert files is not None
    damaged(files, lambda tensors, description: None, metadata={ROTATIONS_KEY: said})
    assert [finding.rule for finding in Checkpoint(files).findings()] == ["rotation"]


def test_an_attention_with_a_float_layer_is_left_alone_whole_and_the_reason_is_told():
    """The runtime never loads a float layer, so its changed weight would be lost."""
    exact = build("flux")(**example_inputs("flux"))[0]
    model = build("flux")
    result = quant_model(model, session(layer_schemes={TO_OUT: "float"}))
    assert result.unrotated == {"transformer_blocks.0.attn": f"{TO_OUT} stays float"}
    assert torch.equal(model.get_parameter(f"{TO_OUT}.weight"), build("flux").get_parameter(f"{TO_OUT}.weight"))
    assert relative(model(**example_inputs("flux"))[0], exact) < 0.1


@pytest.mark.parametrize(
    ("changes", "rules", "structure", "says"),
    [
        ({}, {"*.to_v": "float"}, None, "to_v stays float"),
        ({}, {}, ModelStructure(model_class="FluxTransformer2DModel"), "names no values of attentions"),
        ({"attention_head_dim": 12, "axes_dims_rope": (4, 4, 4)}, {}, None, "heads of 12 channels, which is no power"),
    ],
    ids=["float", "no structure", "head size"],
)
def test_where_nothing_can_be_rotated_the_session_is_refused_before_the_model_changes(
    changes: dict[str, Any], rules: dict[str, Any], structure: ModelStructure | None, says: str
):
    model = build("flux", **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match="no attention of FluxTransformer2DModel can be rotated") as caught:
        quant_model(model, session(layer_schemes=rules), structure=structure)
    assert says in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_was_measured_is_not_rotated_twice_and_no_rotated_layer_may_stay_float():
    records = as_records(louder_records("flux", 2))
    model = build("flux")
    exact = model(**example_inputs("flux"))[0]
    config = session(scheme="w8a8_dynamic").model_copy(update={"calib_data": records})
    measured = measure_layers(model, config)
    floats = {name for name, layer in measured.layers.items() if Treatment(FLOAT) in layer.errors}
    assert not floats & {TO_V, TO_OUT}
    assert "transformer_blocks.0.attn.to_q" in floats
    quant_model(model, config)
    assert relative(model(**example_inputs("flux"))[0], exact) < 0.1


def test_a_weight_that_two_blocks_share_is_rotated_once_for_each_of_them():
    """In place and twice it would be as it was, in front of readers that are rotated."""
    model = build("flux")
    first, second = (block.attn.to_v for block in model.transformer_blocks)
    second.weight = first.weight
    exact = model(**example_inputs("flux"))[0]
    measure_layers(model, session())
    assert relative(model(**example_inputs("flux"))[0], exact) < 1e-5


def test_what_a_model_calls_a_rotation_of_its_own_is_none_of_ours():
    model = build("flux")
    block = model.transformer_blocks[0]
    block.register_buffer("rotation", torch.eye(4))
    assert rotation_of(block) is None
    quant_model(model, session(rotate=False))
    assert torch.equal(block.rotation, torch.eye(4))  # the model's own, as it was


class Attending(nn.Module):
    """One attention of two heads, that is the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.to_v, self.to_out = nn.Module(), nn.Linear(8, 8), nn.Linear(8, 8)
        self.attn.heads = 2  # type: ignore[assignment]


def test_an_attention_may_stand_in_the_model_itself():
    values = AttentionValues(block="", attention="attn", made_by=("to_v",), read_by=("to_out",))
    structure = ModelStructure(model_class="Attending", values=(values,))
    found = find_rotations(Attending(), structure, targets=["to_v", "to_out"])
    assert found.attentions == {"attn": ("to_v", "to_out")}
    assert found.linears == {"to_v": Rotation(4), "to_out": Rotation(4, columns=8)}


def test_a_rotated_model_is_refused_where_the_session_would_not_say_so():
    _, model = rotated("flux", torch.float32)
    with pytest.raises(ConfigurationError, match="values of the model are rotated already"):
        quant_model(model, session(rotate=False))


def test_a_layer_of_the_checkpoint_reads_and_makes_the_channels_of_the_float_model(tmp_path: Path):
    from model_adapters.quality.evaluate import published

    files = quant_model(model := build("flux"), session(tmp_path)).files
    assert files is not None
    for name in (TO_V, TO_OUT, "single_transformer_blocks.0.proj_out"):
        linear: nn.Linear = build("flux").get_submodule(name)
        x = torch.randn(50, linear.in_features, generator=torch.Generator().manual_seed(0))
        assert relative(published(files).layer(name)(x, None), linear(x)) < 0.03
        assert relative(model.get_submodule(name)(x), linear(x)) > 0.5


def test_the_structure_is_data_and_a_session_says_in_yaml_whether_it_rotates():
    said = find_structure(build("sd35"))
    assert said is not None
    assert [values.attention for values in said.values] == ["attn", "attn2"]
    assert json.loads(session().model_dump_json(include={"rotate_values"})) == {"rotate_values": True}
