"""A file is written by a thread of its own: whole and digested, or not at all and with the cause."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest
import torch

from quant_core.atomic_file import write_atomically
from quant_core.checkpoint.ordered_writer import OrderedWriter
from quant_core.checkpoint.tensor_file import TensorFile, WrittenDigests
from quant_core.tensor_bytes import digest_of_tensor

TENSORS = {
    "codes": torch.arange(64, dtype=torch.int8).reshape(8, 8),
    "more": torch.ones(2, 4, dtype=torch.int8),
    "scale": torch.rand(8, 1),
}


def write(path: Path, order: list[str], digests: WrittenDigests) -> None:
    with TensorFile(path, TENSORS, {}, in_front=torch.int8, digests=digests) as file:
        for name in order:
            file.write(name, TENSORS[name])


@pytest.mark.parametrize("order", [["codes", "more", "scale"], ["scale", "more", "codes"], ["codes", "scale", "more"]])
def test_the_digest_is_that_of_the_file_in_whatever_order_it_was_written(tmp_path: Path, order: list[str]):
    digests = WrittenDigests(wanted=lambda name, tensor: name == "scale")
    write(tmp_path / "file", order, digests)
    assert digests.file == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert digests.tensors == {"scale": digest_of_tensor(TENSORS["scale"])}


def test_codes_come_first_where_the_tensors_behind_them_stay_aligned():
    assert TensorFile(Path("file"), TENSORS, {}, in_front=torch.int8).names == ["codes", "more", "scale"]
    odd = TENSORS | {"more": torch.ones(3, dtype=torch.int8)}
    assert TensorFile(Path("file"), odd, {}, in_front=torch.int8).names == ["scale", "codes", "more"]


def full_disk() -> memoryview:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_the_thread_is_raised_where_the_next_piece_is_handed_over(tmp_path: Path):
    writer = OrderedWriter(tmp_path / "file", digests=True)

    def hand_over_for_ever() -> None:
        writer.put(0, full_disk)
        while True:
            writer.put(0, lambda: memoryview(b"more"))

    with pytest.raises(OSError, match="No space left"):
        hand_over_for_ever()
    assert writer.close(keeps=False) is None


def test_an_error_in_the_last_piece_is_raised_at_the_end(tmp_path: Path):
    writer = OrderedWriter(tmp_path / "file", digests=False)
    writer.put(0, full_disk)
    with pytest.raises(OSError, match="No space left"):
        writer.close(keeps=True)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_whatever_ends_the_caller_leaves_no_file(tmp_path: Path, kind: type[BaseException]):
    def interrupted(path: Path) -> None:
        with TensorFile(path, TENSORS, {}) as file:
            file.write("codes", TENSORS["codes"])
            raise kind

    with pytest.raises(kind):
        write_atomically(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []
