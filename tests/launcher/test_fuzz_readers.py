"""Whatever stands in a file, its reader returns what it holds or says what is wrong; it never crashes or hangs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from launcher.config.layer_schemes import read_layer_schemes
from launcher.files.manifest import read_manifest
from launcher.files.shard_note import read_note
from launcher.journal.logs import LOGS
from launcher.journal.trace import trace
from model_adapters import load_adapter
from model_adapters.pipeline.prompts import read_prompts
from model_adapters.quality.card import Origin, QualityCard, read_card
from model_adapters.weights.brought import LoraFile
from model_adapters.weights.lora import read_changes
from model_adapters.weights.model_folder import open_weights, read_json
from model_adapters.weights.single_file import converted_tensors
from quant_core.calibration.records import load_dump
from quant_core.errors import ExplainedError

FAST = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def dump_bytes() -> bytes:
    """A sound dump, to be damaged."""
    buffer = io.BytesIO()
    record = {"args": [], "kwargs": {"x": torch.arange(6.0)}, "timestep_idx": 0}
    content = {"format": "dit-calibration", "version": 1, "header": {}, "records": [record], "complete": True}
    torch.save(content, buffer)
    return buffer.getvalue()


DUMP, TENSORS = dump_bytes(), save({"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3)})
LAYER = "transformer.proj_out"
LORA = {f"{LAYER}.lora_A.weight": torch.ones(3, 4), f"{LAYER}.lora_B.weight": torch.ones(2, 3)}
PUBLISHED = {"img_in.weight": torch.ones(3, 4), "double_blocks.0.img_attn.qkv.weight": torch.ones(6, 2)}
CARD = QualityCard(origin=Origin(model="flux", quant_type="w8a8", fingerprint="f", dtype="d", floor_dtype="e"))
LOG = b"\n".join(
    json.dumps(
        {"time": "2026-01-01T10:00:00.000", "rank": 0, "level": "info", "from": "launcher", "text": "said", **more}
    ).encode()
    for more in ({"stage": "prepare"}, {"ended": "prepare", "seconds": 0.5, "memory": 1}, {"wait": "all", "seconds": 1})
)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Cut a file, change some of its bytes, or put others in front."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return draw(st.binary(max_size=4)) + bytes(content[: draw(st.integers(0, len(content)))])


def read_tensors(path: Path) -> None:
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def read_lora(path: Path) -> None:
    read_changes(
        load_adapter("flux").pipeline_type(), [LoraFile(path, 1.0)], "transformer", {"proj_out.weight": (2, 4)}
    )


def read_published(path: Path) -> None:
    for tensor in converted_tensors(path, "FluxTransformer2DModel", {}).values():
        tensor.read()


def read_log(path: Path) -> None:
    (path.parent / LOGS).mkdir(exist_ok=True)
    (path.parent / LOGS / "rank0.jsonl").write_bytes(path.read_bytes())
    trace(path.parent)


def assert_read_or_explained(reader: Callable[[Path], Any], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o640)
    error: ExplainedError | None = None
    try:
        reader(path)
    except ExplainedError as raised:
        error = raised
    assert error is None or error.where
    assert len(str(error).splitlines()) <= 4


BINARY: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "dump": (load_dump, DUMP),
    "dump in memory": (lambda path: load_dump(path, mmap=False), DUMP),
    "safetensors": (read_tensors, TENSORS),
    "LoRA": (read_lora, save(LORA)),
    "transformer in one file": (read_published, save(PUBLISHED)),
    "quality card": (read_card, CARD.to_json().encode()),
    "log": (read_log, LOG),
}
TEXT: dict[str, Callable[[Path], Any]] = {
    "note": read_note,
    "manifest": read_manifest,
    "configuration": read_json,
    "layer schemes": lambda path: read_layer_schemes([f"@{path}"]),
    "quality card": read_card,
    "log": read_log,
    "plain prompts": lambda path: read_prompts(path, "plain"),
    "parti prompts": lambda path: read_prompts(path, "parti"),
    "hpsv2 prompts": lambda path: read_prompts(path, "hpsv2"),
}


@pytest.mark.parametrize("name", BINARY)
@FAST
@given(data=st.data())
def test_a_damaged_binary_file_is_read_or_explained(name: str, data: st.DataObject, tmp_path: Path) -> None:
    reader, sound = BINARY[name]
    assert_read_or_explained(reader, tmp_path / "file", data.draw(damaged(sound) | st.binary(max_size=200)))


@pytest.mark.parametrize("name", TEXT)
@FAST
@given(data=st.data())
def test_any_text_is_read_or_explained(name: str, data: st.DataObject, tmp_path: Path) -> None:
    content = data.draw(st.binary(max_size=200) | JSON.map(lambda tree: json.dumps(tree).encode()))
    assert_read_or_explained(TEXT[name], tmp_path / "file", content)


@FAST
@given(changes=st.dictionaries(st.sampled_from(["format", "version", "header", "records", "complete"]), JSON))
def test_a_dump_with_other_content_is_read_or_explained(changes: dict[str, Any], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({**torch.load(io.BytesIO(DUMP)), **changes}, buffer)
    assert_read_or_explained(load_dump, tmp_path / "file", buffer.getvalue())


@FAST
@given(data=st.data())
@pytest.mark.parametrize(("reader", "sound"), [(read_lora, LORA), (read_published, PUBLISHED)])
def test_tensors_of_other_names_and_shapes_are_read_or_explained(
    reader: Callable[[Path], Any], sound: dict[str, Tensor], data: st.DataObject, tmp_path: Path
) -> None:
    names = st.sampled_from([*sound, "x.lora_A.weight", f"{LAYER}.alpha"]) | st.text(max_size=12)
    shapes = st.lists(st.integers(0, 4), max_size=3)
    tensors = sound | {name: torch.ones(shape) for name, shape in data.draw(st.dictionaries(names, shapes)).items()}
    assert_read_or_explained(reader, tmp_path / "file.safetensors", save(tensors))
