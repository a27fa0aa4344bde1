"""A checkpoint in parts holds what one file would, its index says where, and no form outlives the next write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant_core import quant_model
from quant_core.checkpoint.entries import CheckpointFiles, Entry, write_checkpoint
from quant_core.checkpoint.loading import load_deployed
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.checkpoint.tensor_file import WrittenDigests
from quant_core.checkpoint.tensor_parts import GB, TensorFiles, split, write_tensors
from quant_core.errors import InputError, VerificationError
from tests.support.small_model import SmallModel, session

KB = 1000 / GB  # in the option's unit
STEM = "quant_model_weight_w8a8"


def quantized(folder: Path, part_file_size: float | None) -> CheckpointFiles:
    """Save the small model, which has about 2 KB of tensors."""
    files = quant_model(SmallModel(), session("w8a8", folder, save={"part_file_size": part_file_size})).files
    assert files is not None
    return files


def in_parts(folder: Path, part_file_size: float) -> CheckpointFiles:
    with pytest.warns(UserWarning, match="MindIE-SD reads one file only"):
        return quantized(folder, part_file_size)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_have_the_usual_names_and_hold_together_what_one_file_holds(tmp_path: Path):
    whole = load_file(quantized(tmp_path / "one", None).weights)
    files = in_parts(tmp_path / "parts", 0.5 * KB)
    index = json.loads(files.weights.read_text())
    parts = sorted(set(index["weight_map"].values()))
    assert files.weights.name == f"{STEM}.safetensors.index.json"
    assert len(parts) > 2
    assert parts == [f"{STEM}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    assert names_in(files.weights.parent) == sorted([*parts, files.weights.name, "quant_model_description_w8a8.json"])
    found = {name: load_file(files.weights.parent / part)[name] for name, part in index["weight_map"].items()}
    assert set(found) == set(whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_both_forms_read_the_same(tmp_path: Path):
    one, parts = quantized(tmp_path / "one", None), in_parts(tmp_path / "parts", 0.5 * KB)
    beside = CheckpointFiles(parts.weights.parent / f"{STEM}.safetensors", parts.description)  # where the file would be
    x, wanted = torch.randn(3, 8), open_checkpoint(one)
    for files in (parts, beside):
        checkpoint = open_checkpoint(files)
        checkpoint.verify()
        assert torch.equal(checkpoint.read_layer("first")(x), wanted.read_layer("first")(x))
        model, control = SmallModel(), SmallModel()
        load_deployed(model, files)
        load_deployed(control, one)
        assert torch.equal(model(x), control(x))


def test_what_fits_in_one_part_is_one_file_without_a_warning(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        files = quantized(tmp_path, 1)
    assert files.weights.name == f"{STEM}.safetensors"
    assert names_in(tmp_path) == ["quant_model_description_w8a8.json", f"{STEM}.safetensors"]


def test_another_form_leaves_nothing_of_the_one_before(tmp_path: Path):
    quantized(tmp_path, None)
    (tmp_path / f"{STEM}-notes.safetensors").write_text("somebody else's")
    in_parts(tmp_path, 0.5 * KB)
    assert not (tmp_path / f"{STEM}.safetensors").exists()
    many = len(names_in(tmp_path))
    in_parts(tmp_path, 1 * KB)
    assert len(names_in(tmp_path)) < many
    quantized(tmp_path, None)
    one = [f"{STEM}-notes.safetensors", f"{STEM}.safetensors", "quant_model_description_w8a8.json"]
    assert names_in(tmp_path) == sorted(one)


def test_no_digest_stands_for_a_file_that_is_in_parts(tmp_path: Path):
    tensors = {name: torch.ones(256) for name in "ab"}
    for part_bytes, is_one in ((1024, False), (4096, True)):
        digests = WrittenDigests(wanted=lambda name, tensor: True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            write_tensors(tmp_path / "w.safetensors", tensors, metadata={}, part_bytes=part_bytes, digests=digests)
        assert (digests.file is not None) == is_one
        assert set(digests.tensors) == set(tensors)


def test_every_file_has_the_mode_that_the_consumer_accepts(tmp_path: Path):
    files = in_parts(tmp_path / "new", 0.5 * KB)
    assert {path.stat().st_mode & 0o777 for path in files.weights.parent.iterdir()} == {0o640}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 100))
def test_a_part_is_at_most_as_large_as_asked_unless_it_is_one_tensor(sizes: list[int], limit: int):
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.int8) for i, size in enumerate(sizes)}
    parts = split(tensors, limit)
    assert [name for part in parts for name in part] == list(tensors)
    filled = [sum(tensors[name].nbytes for name in part) for part in parts]
    assert all(size <= limit or len(part) == 1 for size, part in zip(filled, parts))
    # No part could have taken the first tensor of the next one.
    assert all(size + tensors[after[0]].nbytes > limit for size, after in zip(filled, parts[1:]))


def rewrite_index(files: CheckpointFiles, change) -> None:
    index = json.loads(files.weights.read_text())
    change(index)
    files.weights.write_text(json.dumps(index))


def first_part(files: CheckpointFiles) -> Path:
    return next(iter(sorted(files.weights.parent.glob("*-00001-of-*"))))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.pop("weight_map"), "it has no weight_map"),
        (lambda index: index.update(weight_map={}), "it has no weight_map"),
        (
            lambda index: index["weight_map"].update({"first.weight": "../secret.safetensors"}),
            "'../secret.safetensors'",
        ),
        (lambda index: index["weight_map"].update({"first.weight": "/etc/passwd"}), "'/etc/passwd'"),
        (lambda index: index["weight_map"].update({"first.weight": 7}), "lies in 7"),
        (lambda index: index["weight_map"].pop("first.weight"), "'first.weight' is not where it says"),
        (
            lambda index: index["weight_map"].update(more=index["weight_map"]["first.weight"]),
            "'more' is not where it says",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_parts_is_refused(tmp_path: Path, change, says: str):
    files = in_parts(tmp_path, 0.5 * KB)
    rewrite_index(files, change)
    with pytest.raises(VerificationError) as caught:
        open_checkpoint(files)
    assert says in str(caught.value)
    assert str(files.weights) in str(caught.value)


def test_parts_of_two_writes_are_told_apart_by_their_headers(tmp_path: Path):
    files = in_parts(tmp_path, 0.5 * KB)
    part = first_part(files)
    save_file(load_file(part), part, metadata={"fingerprint": "of another run"})
    with pytest.raises(VerificationError, match="does not fit its parts") as caught:
        open_checkpoint(files)
    assert "headers" in str(caught.value)


def test_a_missing_or_truncated_part_is_named(tmp_path: Path):
    files = in_parts(tmp_path, 0.5 * KB)
    part = first_part(files)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError) as caught:
        open_checkpoint(files)
    assert str(part) in str(caught.value)
    part.unlink()
    with pytest.raises(InputError) as caught:
        open_checkpoint(files)
    assert str(part) in str(caught.value)


@pytest.mark.parametrize(
    "borrowed",
    [torch.arange(12.0).reshape(4, 3).T, torch.arange(12.0)[3:], torch.ones(1).expand(5), nn.Parameter(torch.ones(2))],
)
def test_tensors_of_any_layout_are_stored_whole_and_alone(tmp_path: Path, borrowed: Tensor):
    path = write_tensors(tmp_path / "w.safetensors", {"a": borrowed}, metadata={})
    assert torch.equal(load_file(path)["a"], borrowed)
    assert path.stat().st_size < 200 + borrowed.nbytes


def test_entries_that_share_one_memory_are_stored_once_each(tmp_path: Path):
    tied = torch.arange(3.0)
    files = CheckpointFiles(tmp_path / "w.safetensors", tmp_path / "d.json")
    found = [Entry("a", "FLOAT", tied), Entry("b", "FLOAT", tied)]
    write_checkpoint(found, files, "W8A8", header={}, metadata={})
    stored = load_file(files.weights)
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {name: [0, 1, 2] for name in "ab"}


_PEAK_OF_A_WRITE = """
import sys
from pathlib import Path
import torch
from quant_core.checkpoint.tensor_parts import write_tensors
from scripts.bench.usage import resident
# Not contiguous, so that writing has to copy each: 24 tensors of 16 MB.
tensors = {str(i): torch.ones(2000, 2000).T for i in range(24)}
write_tensors(Path(sys.argv[1]), {"0": tensors["0"]}, metadata={})  # what the libraries load when first used
before = resident(mark="peak")
write_tensors(Path(sys.argv[1]), tensors, metadata={})
print((resident(mark="peak") - before) // 2**20)
"""


def test_writing_holds_one_copied_tensor_at_a_time(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _PEAK_OF_A_WRITE, str(tmp_path / "w.safetensors")]
    peak = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    # MiB: one copy, and the few that the allocator keeps for the next ones (60 measured); all copies would be 384.
    assert int(peak.stdout) < 8 * 16


def test_a_read_tensor_does_not_change_with_the_file(tmp_path: Path):
    path = write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1000)}, metadata={})
    tensor = TensorFiles(path).read("a")
    with path.open("r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert bool((tensor == 1).all())
