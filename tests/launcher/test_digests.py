"""A file's digest is that of its content, always; a file that nobody touched is not read again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launcher.files.digests import digest_of_file, digest_of_records, move, remember
from model_adapters.weights import passing_read
from tests.support.page_cache import cached_bytes, require_pages_that_leave

MB = 2**20


def bytes_read() -> int:
    """Return how many bytes this process has asked of files so far."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(io["rchar"])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of 8 MB whose digest is remembered: it was written long enough ago."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(8 * MB))
    time.sleep(0.2)  # twice the grain of a clock that is reckoned with
    digest_of_file(path)
    return path


def test_a_file_that_nobody_touched_is_not_read_again_by_any_process(file: Path):
    expected, before = sha256(file), bytes_read()
    assert digest_of_file(file) == expected
    assert bytes_read() - before < MB
    program = (
        "import sys; from pathlib import Path; from launcher.files.digests import digest_of_file as d;"
        "from tests.launcher.test_digests import bytes_read; before = bytes_read();"
        "print(d(Path(sys.argv[1])), bytes_read() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True)
    digest, read = done.stdout.split()
    assert digest == expected
    assert int(read) < MB


def test_a_file_that_memory_has_no_room_for_has_the_same_digest_and_does_not_stay(file: Path, monkeypatch):
    require_pages_that_leave(file.parent)
    for limit in ("_LAG_BYTES", "_STRETCH_BYTES"):
        monkeypatch.setattr(passing_read, limit, 2 * MB)
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    assert digest_of_file(file, fresh=True) == digest_of_file(file, fresh=True, passing=True) == sha256(file)
    digest_of_file(file, fresh=True, passing=True)
    assert cached_bytes(file, 0, 4 * MB) == 0


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as opened:
        first = opened.read(1)
        opened.seek(0)
        opened.write(bytes([first[0] ^ 1]))


def change_a_byte_and_put_the_time_back(path: Path) -> None:
    status = path.stat()
    change_a_byte(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(os.urandom(8 * MB))
    other.rename(path)


def append(path: Path) -> None:
    with path.open("ab") as opened:
        opened.write(b"x")


@pytest.mark.parametrize("change", [change_a_byte, change_a_byte_and_put_the_time_back, replace, append])
def test_a_change_is_noticed(file: Path, change: Callable[[Path], None]):
    change(file)
    assert digest_of_file(file) == sha256(file)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, str]:
    """A file of 8 MB that was written long enough ago, and its digest, which its writer knows."""
    path = tmp_path / "shard.safetensors"
    path.write_bytes(os.urandom(8 * MB))
    time.sleep(0.2)  # twice the grain of a clock that is reckoned with
    return path, sha256(path)


def test_what_its_writer_knows_of_a_file_is_known_also_where_it_is_moved(written: tuple[Path, str], tmp_path: Path):
    path, digest = written
    remember(path, digest)
    move(path, tmp_path / "published")
    before = bytes_read()
    assert digest_of_file(tmp_path / "published") == digest
    assert bytes_read() - before < MB


def test_what_changed_between_writing_and_moving_is_noticed(written: tuple[Path, str], tmp_path: Path):
    path, digest = written
    remember(path, digest)
    change_a_byte_and_put_the_time_back(path)
    move(path, tmp_path / "published")
    assert digest_of_file(tmp_path / "published") == sha256(tmp_path / "published") != digest


def test_what_was_written_a_moment_ago_is_not_remembered(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"two")
    remember(path, hashlib.sha256(b"one").hexdigest())
    assert digest_of_file(path) == sha256(path)


def test_a_fresh_digest_is_of_the_content_whatever_is_remembered(written: tuple[Path, str]):
    path, digest = written
    remember(path, "0" * 64)
    assert digest_of_file(path) == "0" * 64
    assert digest_of_file(path, fresh=True) == digest


def test_what_changes_twice_within_one_grain_of_the_clock_is_noticed(tmp_path: Path):
    path = tmp_path / "file"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert digest_of_file(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"status": 7}', b"\xff\xfe"])
def test_a_damaged_memory_is_no_memory(file: Path, content: bytes):
    for remembered in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"):
        remembered.write_bytes(content)
    assert digest_of_file(file) == sha256(file)


def test_without_a_place_to_remember_the_file_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    assert digest_of_file(file) == sha256(file)


def test_processes_that_remember_at_the_same_time_all_have_the_digest(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MB))
    program = (
        "import sys; from pathlib import Path; from launcher.files.digests import digest_of_file as d;"
        "print(len({d(Path(sys.argv[1])) for _ in range(50)}), d(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].split() for process in running] == [["1", sha256(path)]] * 3


def test_the_digest_of_records_sees_every_tensor_and_every_number_but_not_who_made_them():
    def records(value: float = 1.0, step: int = 0) -> list[dict[str, object]]:
        return [{"args": [], "kwargs": {"x": torch.full((2, 3), value), "y": None}, "timestep_idx": step}]

    assert digest_of_records(records()) == digest_of_records(records())
    others = [records(value=1.0000001), records(step=1), records() * 2, []]
    assert len({digest_of_records(found) for found in [records(), *others]}) == 5
    with_shape = [{"x": torch.ones(6)}], [{"x": torch.ones(2, 3)}], [{"x": torch.ones(6, dtype=torch.float64)}]
    assert len({digest_of_records(found) for found in with_shape}) == 3
