"""A published checkpoint reads back to what was computed, and a file that breaks a rule is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN, GoldenCase
from small_model import STEPS, SmallModel, session
from stored import Damage, add_attention, add_smoothing, damaged, written
from torch import Tensor, nn

from quant_core import TimestepManager, quant_model
from quant_core.checkpoint import CheckpointFiles
from quant_core.deployed import DeployedLinear
from quant_core.errors import ConfigurationError, InputError, VerificationError
from quant_core.loading_deployed import load_deployed
from quant_core.reader import open_checkpoint

SCHEMES = ["w8a8", "w8a8_timestep", "w8a8_dynamic"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_read_back_computes_what_the_deployed_layer_computed(tmp_path: Path, scheme: str, dtype: torch.dtype):
    model = SmallModel(dtype)
    files = quant_model(model, session(scheme, tmp_path, dtype=dtype)).files
    assert files is not None
    checkpoint, x = open_checkpoint(files), torch.randn(3, 8).to(dtype)
    for step in range(STEPS):
        TimestepManager.set_timestep_idx(step)
        assert torch.equal(checkpoint.read_layer("first")(x, step), model.first(x))
    TimestepManager.set_timestep_idx(None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_float_state_dict_is_the_float_model_within_half_a_step_of_each_row(tmp_path: Path, scheme: str):
    files, model = written(tmp_path, scheme), SmallModel()
    state = open_checkpoint(files).float_state_dict()
    wanted = model.state_dict()
    assert set(state) == set(wanted)
    for name in ("first", "second"):
        step_O1 = wanted[f"{name}.weight"].abs().amax(1, keepdim=True) / 127
        error = (state[f"{name}.weight"] - wanted[f"{name}.weight"]).abs()
        assert bool((error <= step_O1 * (0.5 + 1e-4)).all())
    assert all(
        torch.equal(state[name], wanted[name]) for name in wanted if name not in ("first.weight", "second.weight")
    )
    model.load_state_dict(state)


def test_smoothing_is_undone_in_the_float_weight_and_done_in_the_deployed_layer(tmp_path: Path):
    files = written(tmp_path, "w8a8_dynamic")
    plain = open_checkpoint(files)
    plain_weight, layer = plain.read_weight("first"), plain.read_layer("first")
    smoothed = open_checkpoint(damaged(files, add_smoothing))
    factor_I, x = 2.0 ** torch.arange(8), torch.randn(3, 8)
    assert torch.equal(smoothed.read_weight("first"), plain_weight * factor_I)
    assert torch.equal(smoothed.read_layer("first")(x), layer(x * factor_I))
    assert {"first.weight", "first.bias"} <= set(smoothed.float_state_dict())
    assert not any(".div." in name or ".linear." in name for name in smoothed.float_state_dict())


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_every_golden_checkpoint_of_the_reference_tool_reads_back_close_to_its_float_model(name: str):
    case = GoldenCase(name)
    stem = f"{case.scheme}"
    files = CheckpointFiles(
        case.folder / f"quant_model_weight_{stem}.safetensors", case.folder / f"quant_model_description_{stem}.json"
    )
    checkpoint, float_model = open_checkpoint(files), case.model()
    checkpoint.verify()
    parameters = dict(float_model.named_parameters())
    state = checkpoint.float_state_dict()
    assert set(state) == set(parameters)  # reference numerics write no buffers
    for name in checkpoint.inventory.layers:
        wanted, found = parameters[f"{name}.weight"].float(), state[f"{name}.weight"].float()
        # 8 bits a row are 40 dB of a Gaussian one; a factor of smoothing left in or out would leave less than 10.
        assert (wanted - found).norm() < 0.02 * wanted.norm(), name


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


def test_the_separator_is_the_one_that_was_configured(tmp_path: Path):
    checkpoint = open_checkpoint(written(tmp_path, "w8a8_timestep", timestep_sep=3))
    assert checkpoint.timestep_sep == 3
    assert checkpoint.inventory.timesteps == STEPS


def test_without_a_separator_in_the_header_half_the_steps_are_dynamic(tmp_path: Path):
    files = damaged(written(tmp_path, "w8a8_timestep", timestep_sep=3), lambda t, d: None, metadata={"format": "pt"})
    assert open_checkpoint(files).timestep_sep == STEPS // 2


@pytest.mark.parametrize("separator", ["5", "-1", "two", "²", ""])
def test_a_separator_that_is_no_step_is_refused(tmp_path: Path, separator: str):
    files = damaged(written(tmp_path, "w8a8_timestep"), lambda t, d: None, metadata={"timestep_sep": separator})
    with pytest.raises(VerificationError, match="timestep_sep"):
        open_checkpoint(files)


def test_a_layer_that_is_not_there_is_an_error_with_the_nearest_name(tmp_path: Path):
    with pytest.raises(ConfigurationError) as caught:
        open_checkpoint(written(tmp_path, "w8a8")).read_layer("frist")
    assert "first (nearest name)" in str(caught.value)


def test_opening_reads_no_tensor_and_a_layer_reads_its_own_only(tmp_path: Path):
    files = written(tmp_path, "w8a8")
    files = damaged(files, lambda t, d: t["second.weight_scale"].fill_(-1))
    checkpoint = open_checkpoint(files)
    checkpoint.read_layer("first")
    with pytest.raises(VerificationError, match=r"second\.weight_scale"):
        checkpoint.read_layer("second")


def put(name: str, **change: Any) -> Damage:
    """Change one tensor: its first value, its dtype, its shape."""

    def damage(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        tensor = tensors[name].clone()
        if "value" in change:
            tensor.view(-1)[0] = change["value"]
        tensor = tensor.to(change.get("dtype", tensor.dtype))
        tensors[name] = tensor.reshape(change.get("shape", tensor.shape)).contiguous()

    return damage


def retype(name: str, kind: Any) -> Damage:
    return lambda tensors, description: description.update({name: kind})


def drop(name: str, *, tensor: bool = True, entry: bool = True) -> Damage:
    def damage(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        if tensor:
            del tensors[name]
        if entry:
            del description[name]

    return damage


def add(name: str, tensor: Tensor, kind: str) -> Damage:
    def damage(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        tensors[name], description[name] = tensor, kind

    return damage


def both(first: Damage, second: Damage) -> Damage:
    def damage(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        first(tensors, description)
        second(tensors, description)

    return damage


def fewer_steps(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    for name in ("input_scale", "input_offset", "quant_bias", "deq_scale"):
        tensors[f"second.{name}"] = tensors[f"second.{name}"][:-1].clone()


def nothing_quantized(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    for name in [name for name, kind in description.items() if kind == "W8A8" and name in tensors]:
        del tensors[name], description[name]


NAN, INF = float("nan"), float("inf")

# scheme, what is done to the files, which words the error must have
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "unknown model type": ("w8a8", retype("model_quant_type", "W4A8"), "model_quant_type is 'W4A8'"),
    "model type in lower case": ("w8a8", retype("model_quant_type", "w8a8"), "model_quant_type is 'w8a8'"),
    "no model type": ("w8a8", lambda t, d: d.pop("model_quant_type"), "model_quant_type is None"),
    "other known model type": ("w8a8", retype("model_quant_type", "W8A8_DYNAMIC"), "unknown type 'W8A8'"),
    "unknown type": ("w8a8", retype("first.weight", "W8A8_MIX"), "'first.weight' has the unknown type 'W8A8_MIX'"),
    "float in lower case": ("w8a8", retype("last.bias", "float"), "'last.bias' has the unknown type 'float'"),
    "type that is no string": ("w8a8", retype("last.bias", ["FLOAT"]), "'last.bias' has the unknown type ['FLOAT']"),
    "float weight in a quantized layer": ("w8a8", retype("first.weight", "FLOAT"), "'first.weight' has the type FLOAT"),
    "quantized bias": ("w8a8", retype("first.bias", "W8A8"), "'first.bias' has the type W8A8"),
    "layer typed by mistake": ("w8a8", retype("norm.weight", "W8A8"), "'norm' has no weight_scale"),
    "missing tensor": ("w8a8", drop("last.bias", entry=False), "the tensor 'last.bias' is missing"),
    "tensor without entry": ("w8a8", drop("last.bias", tensor=False), "'last.bias' is not described"),
    "missing parameter": ("w8a8", drop("first.deq_scale"), "'first' has no deq_scale"),
    "missing weight": ("w8a8", drop("first.weight"), "'first' has no weight"),
    "missing dynamic scale": ("w8a8_dynamic", drop("second.weight_scale"), "'second' has no weight_scale"),
    "tensor nobody knows": ("w8a8", add("first.zero", torch.zeros(1), "W8A8"), "'first.zero' is typed W8A8"),
    "static tensor in a dynamic layer": (
        "w8a8_dynamic",
        add("first.input_scale", torch.ones(1), "W8A8_DYNAMIC"),
        "'first.input_scale' is typed W8A8_DYNAMIC",
    ),
    "nothing quantized": ("w8a8", nothing_quantized, "no layer is quantized"),
    "float codes": ("w8a8", put("first.weight", dtype=torch.float32), "'first.weight' is torch.float32"),
    "code -128": ("w8a8", put("first.weight", value=-128), "'first.weight' holds -128 at [0, 0]"),
    "transposed weight": ("w8a8", put("first.weight", shape=(8, 16)), "'first.bias' has the shape (16,)"),
    "flat weight": ("w8a8", put("first.weight", shape=(128,)), "'first.weight' has the shape (128,)"),
    "flat weight scale": ("w8a8", put("first.weight_scale", shape=(16,)), "'first.weight_scale' has the shape (16,)"),
    "mixed dtypes": ("w8a8", put("second.weight_scale", dtype=torch.float16), "'second.weight_scale' is torch.float16"),
    "double scales": ("w8a8", put("first.weight_scale", dtype=torch.float64), "'first.weight_scale' is torch.float64"),
    "bias of another dtype": ("w8a8", put("first.bias", dtype=torch.bfloat16), "'first.bias' is torch.bfloat16"),
    "infinite bias": ("w8a8", put("first.bias", value=INF), "'first.bias' holds inf at [0]"),
    "weight scale 0": ("w8a8", put("first.weight_scale", value=0), "'first.weight_scale' holds 0.0 at [0, 0]"),
    "weight scale infinite": ("w8a8", put("first.weight_scale", value=INF), "'first.weight_scale' holds inf"),
    "weight scale not a number": ("w8a8", put("first.weight_scale", value=NAN), "'first.weight_scale' holds nan"),
    "weight offset": ("w8a8", put("first.weight_offset", value=1), "'first.weight_offset' holds 1.0"),
    "negative input scale": ("w8a8", put("first.input_scale", value=-1), "'first.input_scale' holds -1.0"),
    "offset with a fraction": ("w8a8", put("first.input_offset", value=0.5), "'first.input_offset' holds 0.5"),
    "offset too large": ("w8a8", put("first.input_offset", value=128), "'first.input_offset' holds 128.0"),
    "offset not a number": ("w8a8", put("first.input_offset", value=NAN), "'first.input_offset' holds nan"),
    "input scale of a scalar": ("w8a8", put("first.input_scale", shape=()), "'first.input_scale' has the shape ()"),
    "quant bias of another dtype": (
        "w8a8",
        put("first.quant_bias", dtype=torch.int64),
        "'first.quant_bias' is torch.int64",
    ),
    "deq scale as float in a float32 model": (
        "w8a8",
        put("first.deq_scale", dtype=torch.float32),
        "'first.deq_scale' is torch.float32",
    ),
    "deq scale of zero bits": ("w8a8", put("first.deq_scale", value=0), "'first.deq_scale' holds 0 at [0]"),
    "deq scale with a high half": (
        "w8a8",
        put("first.deq_scale", value=(1 << 40) | 0x3F800000),
        "'first.deq_scale' holds",
    ),
    "negative deq scale": ("w8a8", put("first.deq_scale", value=0xBF800000), "'first.deq_scale' holds"),
    "one step flat": (
        "w8a8_timestep",
        put("first.input_scale", shape=(STEPS,)),
        "'first.input_scale' has the shape (4,)",
    ),
    "layers with other steps": ("w8a8_timestep", fewer_steps, "'second.input_scale' has the shape (3, 1)"),
    "rows of a static scheme": (
        "w8a8",
        put("first.deq_scale", shape=(1, 16)),
        "'first.deq_scale' has the shape (1, 16)",
    ),
    "smoothing of a float layer": (
        "w8a8",
        add("last.div.mul_scale", torch.ones(8), "FLOAT"),
        "'last.div.mul_scale' belongs to no layer",
    ),
    "smoothing of another width": (
        "w8a8",
        both(add_smoothing, put("first.div.mul_scale", shape=(4, 2))),
        "'first.div.mul_scale' has the shape (4, 2)",
    ),
    "smoothing by 0": (
        "w8a8",
        both(add_smoothing, put("first.div.mul_scale", value=0)),
        "'first.div.mul_scale' holds 0.0 at [0]",
    ),
    "smoothing that is quantized": (
        "w8a8",
        both(add_smoothing, retype("first.div.mul_scale", "W8A8")),
        "'first.div.mul_scale' has the type W8A8",
    ),
    "attention without its header": (
        "w8a8_dynamic",
        both(add_attention, lambda t, d: d.pop("fa_quant_type")),
        "fa_quant_type is None",
    ),
    "header without attention": ("w8a8_dynamic", retype("fa_quant_type", "FAQuant"), "fa_quant_type is 'FAQuant'"),
    "half an attention": ("w8a8_dynamic", both(add_attention, drop("attn.fa_v.scale")), "'attn' has no fa_v.scale"),
    "attention scale 0": (
        "w8a8_dynamic",
        both(add_attention, put("attn.fa_q.scale", value=0)),
        "'attn.fa_q.scale' holds 0.0",
    ),
    "attention offset": (
        "w8a8_dynamic",
        both(add_attention, put("attn.fa_k.offset", value=1)),
        "'attn.fa_k.offset' holds 1",
    ),
    "heads that differ": (
        "w8a8_dynamic",
        both(add_attention, put("attn.fa_v.scale", shape=(2, 2))),
        "'attn.fa_v.scale' has the shape (2, 2)",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_file_that_breaks_a_rule_is_refused_with_four_lines_that_name_file_and_tensor(tmp_path: Path, case: str):
    scheme, damage, says = DAMAGES[case]
    files = damaged(written(tmp_path, scheme), damage)
    with pytest.raises(VerificationError) as caught:
        open_checkpoint(files).verify()
    lines = str(caught.value).splitlines()
    assert says in lines[0]
    assert [line.split()[0] for line in lines] == ["error:", "where", "why", "try"]
    assert str(tmp_path) in lines[1]


def test_deq_scale_of_a_bf16_model_is_float32_and_nothing_else(tmp_path: Path):
    files = written(tmp_path, "w8a8", dtype=torch.bfloat16)
    open_checkpoint(files).verify()
    with pytest.raises(VerificationError, match=r"'first.deq_scale' is torch.int64"):
        open_checkpoint(damaged(files, put("first.deq_scale", dtype=torch.int64)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_written_verifies_also_smoothed_and_with_attention(tmp_path: Path, scheme: str):
    files = written(tmp_path, scheme)
    checkpoint = open_checkpoint(files)
    checkpoint.verify()
    assert list(checkpoint.inventory.layers) == ["first", "second"]
    changed = open_checkpoint(damaged(files, both(add_attention, add_smoothing)))
    changed.verify()
    assert list(changed.inventory.attentions) == ["attn"]
    assert "shift" in changed.inventory.floats  # a persistent buffer belongs to the checkpoint


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def headless(path: Path) -> None:
    path.write_bytes(path.read_bytes()[3:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_noise(path: Path) -> None:
    path.write_bytes(os.urandom(4096))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncated, headless, empty, of_noise, a_folder, Path.unlink])
@pytest.mark.parametrize("which", ["weights", "description"])
def test_a_damaged_file_is_an_input_error_that_names_it(tmp_path: Path, damage, which: str):
    files = written(tmp_path, "w8a8")
    path: Path = getattr(files, which)
    damage(path)
    with pytest.raises(InputError) as caught:
        open_checkpoint(files)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_quant_type": "W8A8", "a": "FLOAT", "a": "W8A8"}', "the key 'a' is there twice"),
        ("[1, 2]", "it holds a list, not an object"),
        ("[" * 200_000, "recursion"),  # as deep as the parser goes and deeper
    ],
)
def test_a_description_that_is_no_object_is_refused(tmp_path: Path, text: str, says: str):
    files = written(tmp_path, "w8a8")
    files.description.write_text(text)
    with pytest.raises(InputError) as caught:
        open_checkpoint(files)
    assert says in str(caught.value)


def test_the_undamaged_control_passes_through_the_same_rewriting(tmp_path: Path):
    files = damaged(written(tmp_path, "w8a8"), lambda tensors, description: None)
    open_checkpoint(files).verify()
    assert json.loads(files.description.read_text())["model_quant_type"] == "W8A8"
