"""Memory that was lent is lent again when no tensor refers to it any more, and never before."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from quant_core.reused_memory import ReusedMemory

MB = 2**20


@pytest.fixture
def memory() -> ReusedMemory:
    return ReusedMemory()


def lend(memory: ReusedMemory, megabytes: int) -> Tensor:
    return memory.empty((megabytes, MB), torch.uint8)


def test_a_tensor_that_is_gone_leaves_its_memory_to_the_next(memory: ReusedMemory):
    first = memory.empty((3, MB), torch.bfloat16)
    place = first.data_ptr()
    del first
    second = memory.empty((MB,), torch.int32)
    assert (second.data_ptr(), second.shape, second.dtype) == (place, (MB,), torch.int32)
    assert second.is_contiguous()


@pytest.mark.parametrize(
    "part",
    [lambda t: t[1:], lambda t: t.numpy(), lambda t: t.view(torch.int16).t()],
    ids=["rows", "array", "transposed"],
)
def test_whatever_part_somebody_still_sees_is_not_overwritten(memory: ReusedMemory, part):
    whole = lend(memory, 2).fill_(7)
    seen = part(whole)
    before = seen.copy() if hasattr(seen, "copy") else seen.clone()
    del whole
    lend(memory, 2).fill_(9)
    assert (seen == before).all()


def test_tensors_of_one_moment_have_memory_of_their_own(memory: ReusedMemory):
    tensors = [lend(memory, 2).fill_(number) for number in range(5)]
    assert [int(tensor[0, 0]) for tensor in tensors] == list(range(5))


def test_a_larger_block_takes_the_place_of_one_that_is_too_small(memory: ReusedMemory):
    for megabytes in (1, 2, 3, 4):
        lend(memory, megabytes)
    assert [block.numel() for block in memory._free] == [4 * MB]
    lend(memory, 2)
    assert [block.numel() for block in memory._free] == [4 * MB]


def test_what_nobody_uses_can_be_given_back_while_the_rest_is_in_use(memory: ReusedMemory):
    kept, gone = lend(memory, 2).fill_(3), lend(memory, 2)
    del gone
    memory.release()
    assert not memory._free
    assert int(kept[1, 5]) == 3


def test_small_tensors_take_no_block(memory: ReusedMemory):
    large = lend(memory, 1)
    del large
    assert memory.empty((10,), torch.float32).untyped_storage().nbytes() == 40
    assert len(memory._free) == 1


def test_memory_comes_back_from_another_thread(memory: ReusedMemory):
    box = [lend(memory, 2)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert len(memory._free) == 1
