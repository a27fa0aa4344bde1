"""A file that breaks a rule is refused in four lines that name it and the tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.checkpoint.reader import open_checkpoint
from quant_core.errors import InputError, VerificationError
from tests.support.small_model import STEPS
from tests.support.stored import Damage, add_attention, add_smoothing, both, damaged, written


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
