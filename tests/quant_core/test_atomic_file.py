"""A file appears whole, with its final mode, or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quant_core.atomic_file import make_folder, sweep, write_atomically, write_text_atomically


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_are_0640_and_folders_0750_whatever_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        path = write_text_atomically(tmp_path / "a" / "b" / "file.json", "content")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "content"
    assert mode(path) == 0o640
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o750, 0o750]


def test_a_folder_that_exists_keeps_its_mode(tmp_path: Path):
    (tmp_path / "mine").mkdir(mode=0o700)
    make_folder(tmp_path / "mine" / "new")
    assert mode(tmp_path / "mine") == 0o700
    assert mode(tmp_path / "mine" / "new") == 0o750


def test_an_error_while_writing_leaves_the_old_file_and_no_temporary(tmp_path: Path):
    path = write_text_atomically(tmp_path / "file", "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_final_name_does_not_exist_while_the_content_is_written(tmp_path: Path):
    path, seen = tmp_path / "file", []

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        seen.append((path.exists(), temporary.parent == path.parent))

    write_atomically(path, write)
    assert seen == [(False, True)]  # the same folder, so that the rename stays inside one file system


def test_a_reader_that_has_the_old_file_open_goes_on_reading_it(tmp_path: Path):
    path = write_text_atomically(tmp_path / "file", "old")
    with path.open() as reader:
        write_text_atomically(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_read_only_file_can_be_replaced(tmp_path: Path):
    path = write_text_atomically(tmp_path / "file", "old")
    path.chmod(0o400)
    assert mode(write_text_atomically(path, "new")) == 0o640


_WRITE_SLOWLY = """
import sys, time
from pathlib import Path
from quant_core.atomic_file import write_atomically
def write(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), write)
"""


def test_a_killed_writer_leaves_a_temporary_that_sweep_removes_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", _WRITE_SLOWLY, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=10)
    kept = write_text_atomically(tmp_path / "kept", "whole")
    stale = list(tmp_path.glob(".*.tmp"))
    assert not path.exists()
    assert len(stale) == 1
    assert sweep(tmp_path) == stale
    assert list(tmp_path.iterdir()) == [kept]


def test_sweeping_leaves_folders_other_files_and_missing_folders_alone(tmp_path: Path):
    (tmp_path / ".a.1.tmp").mkdir()
    others = [".notes.tmp", ".notes.v1.tmp", "visible.1.tmp", ".1.tmp"]
    for name in others:
        (tmp_path / name).write_text("mine")
    assert sweep(tmp_path) == []
    assert sweep(tmp_path / "missing") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".a.1.tmp", *others])


def test_sweeping_leaves_what_this_process_is_writing(tmp_path: Path):
    path = write_atomically(tmp_path / "file", lambda temporary: (temporary.touch(), sweep(tmp_path)))
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_name_end_with_one_whole_file(tmp_path: Path):
    path = tmp_path / "file"
    code = (
        "import sys; from pathlib import Path; from quant_core.atomic_file import write_text_atomically\n"
        "for _ in range(30): write_text_atomically(Path(sys.argv[1]), sys.argv[2] * 100_000)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter], env=environment) for letter in "ab"]
    deadline = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
        if path.exists():
            assert path.read_text() in ("a" * 100_000, "b" * 100_000)
    assert [writer.wait(timeout=10) for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]
