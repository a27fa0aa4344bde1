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

from launcher.files.manifest import read_manifest
from launcher.files.shard_note import read_note
from model_adapters.pipeline.prompts import read_prompts
from model_adapters.weights.model_folder import open_weights, read_json
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
}
TEXT: dict[str, Callable[[Path], Any]] = {
    "note": read_note,
    "manifest": read_manifest,
    "configuration": read_json,
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
