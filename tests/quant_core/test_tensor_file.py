"""A file written tensor by tensor has the bytes of one that the safetensors library writes from memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from quant_core.checkpoint.tensor_file import TensorFile
from quant_core.checkpoint.tensor_parts import write_tensors

DTYPES = [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def example(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


@given(
    st.dictionaries(st.text("abé.0", min_size=1, max_size=4), st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1),
    st.sampled_from([{}, {"format": "pt"}]),
)
def test_the_bytes_are_those_of_the_library(tmp_path_factory, shapes, metadata):
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: example(*shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "whole", metadata=metadata or None)
    with TensorFile(folder / "streamed", {name: t.to("meta") for name, t in tensors.items()}, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    assert (folder / "streamed").read_bytes() == (folder / "whole").read_bytes()


def test_rows_may_come_in_blocks_and_in_any_order(tmp_path: Path):
    whole = example((5, 3), torch.bfloat16)
    with TensorFile(tmp_path / "file", {"a": whole, "b": whole.float()}, {}) as file:
        file.write_rows("a", whole[3:], 3)
        file.write("b", whole.float())
        file.write_rows("a", whole[:3], 0)
    with safe_open(tmp_path / "file", "pt") as written:
        assert torch.equal(written.get_tensor("a"), whole)
        assert torch.equal(written.get_tensor("b"), whole.float())


def test_a_tensor_that_was_not_wholly_written_is_named(tmp_path: Path):
    whole = example((5, 3), torch.int8)
    file = TensorFile(tmp_path / "file", {"half": whole, "full": whole}, {}).__enter__()
    file.write("full", whole)
    file.write_rows("half", whole[:2], 0)
    with pytest.raises(AssertionError, match="half"):
        file.__exit__(None, None, None)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int8), torch.zeros(3, 3).char()])
def test_a_tensor_that_differs_from_its_description_is_refused(tmp_path: Path, wrong: torch.Tensor):
    file = TensorFile(tmp_path / "file", {"a": torch.zeros(2, 3, dtype=torch.int8)}, {})
    with pytest.raises(AssertionError, match="described as"), file:
        file.write("a", wrong)


def test_a_checkpoint_has_the_same_bytes_whenever_it_is_written(tmp_path: Path):
    # Eight strings: the library, whose order of them is random, would pass by chance once in 8! times.
    metadata = {f"key{i}": str(i) for i in range(8)}
    first, second = (
        write_tensors(tmp_path / name, {"a": example((2, 3), torch.int8)}, metadata=metadata).read_bytes()
        for name in ("first.safetensors", "second.safetensors")
    )
    assert first == second
