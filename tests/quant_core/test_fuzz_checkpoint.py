"""Whatever is wrong with a checkpoint's two files, the reader reads it all or says what is wrong; it never crashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.errors import ExplainedError
from tests.support.small_model import SCHEMES
from tests.support.stored import written

FAST = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.none() | st.integers() | st.floats() | st.text(max_size=12) | st.lists(st.integers(), max_size=2)
TYPES = st.sampled_from(["FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A8_TIMESTEP", "FAQuant"])


@pytest.fixture(scope="module", params=SCHEMES)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointFiles:
    return written(tmp_path_factory.mktemp("sound"), request.param)


def outcome(weights: bytes, description: bytes, folder: Path) -> str:
    """Read every tensor of a checkpoint made of these bytes; returns "read", or the error's first line."""
    files = CheckpointFiles(folder / "weights.safetensors", folder / "description.json")
    files.weights.write_bytes(weights)
    files.description.write_bytes(description)
    try:
        checkpoint = open_checkpoint(files)
        checkpoint.verify()
        checkpoint.float_state_dict()
    except ExplainedError as error:
        lines = str(error).splitlines()
        assert len(lines) <= 4
        assert str(folder) in lines[1]
        return lines[0]
    return "read"


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Change some bytes, and perhaps cut the rest off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(0, len(changed)) | st.just(len(changed)))])


@st.composite
def altered(draw: st.DrawFn, content: bytes) -> bytes:
    """Give some entries of a description other values or names, or leave them out."""
    description: dict[str, Any] = json.loads(content)
    for name in draw(st.lists(st.sampled_from(sorted(description)), min_size=1, max_size=4, unique=True)):
        kind = description.pop(name)
        change = draw(st.sampled_from(["value", "name", "nothing"]))
        if change != "nothing":
            new_name = name if change == "value" else draw(st.text(max_size=20))
            description[new_name] = draw(TYPES | VALUES) if change == "value" else kind
    return json.dumps(description).encode()


def test_the_undamaged_control_is_read(sound: CheckpointFiles, tmp_path: Path) -> None:
    assert outcome(sound.weights.read_bytes(), sound.description.read_bytes(), tmp_path) == "read"


@FAST
@given(data=st.data())
def test_damaged_weights_are_read_or_explained(data: st.DataObject, sound: CheckpointFiles, tmp_path: Path) -> None:
    weights = data.draw(damaged(sound.weights.read_bytes()))
    assert outcome(weights, sound.description.read_bytes(), tmp_path)


@FAST
@given(data=st.data())
def test_wrong_descriptions_are_read_or_explained(data: st.DataObject, sound: CheckpointFiles, tmp_path: Path) -> None:
    content = sound.description.read_bytes()
    description = data.draw(damaged(content) | altered(content) | st.binary(max_size=200))
    assert outcome(sound.weights.read_bytes(), description, tmp_path)
