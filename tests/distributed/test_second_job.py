"""A second job in the folder of one that still runs is refused at once, and changes nothing of the first one's."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.cli.command_line import parse
from launcher.run import run
from quant_core.errors import FolderInUse
from scripts.fault_matrix import files_below
from tests.support.forked_ranks import start_forked
from tests.support.torchrun import start_launcher

pytestmark = pytest.mark.distributed


def job(model: Path, prompts: Path, weights: Path, dumps: Path, *flags: object) -> list[object]:
    """Return the words of a job in one process."""
    return [
        "flux", "--path", model, "--device", "cpu", "--prompt_path", prompts, "--max_num_prompt", 2,
        "--width", 64, "--height", 64, "--infer_steps", 2, "--do_quant", "--quant_type", "w8a8",
        "--quant_weight_save_folder", weights, "--quant_dump_calib_folder", dumps, *flags,
    ]  # fmt: skip


@contextmanager
def halted_after_a_batch(words: list[object], dumps: Path, said: Path) -> Iterator[int]:
    """Run a job, which prints into a file, and let it stand still inside the block once it has saved its first batch.

    The block is given the number of its process.
    """
    first = start_forked("-m", "launcher", *map(str, words), terminal=said)
    assert first.pid
    try:
        while not (dumps / ".calib_parts" / "calib_data" / "batch_00000.pth").exists():
            assert first.is_alive(), said.read_text()
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        yield first.pid
        os.kill(first.pid, signal.SIGCONT)
        first.join(timeout=120)
        assert first.exitcode == 0, said.read_text()
    finally:
        first.kill()
        first.join()


def test_a_second_job_on_the_same_dumps_is_refused_and_the_first_publishes_its_own(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    weights, dumps, alone = tmp_path / "job" / "weights", tmp_path / "job" / "dumps", tmp_path / "alone"
    undisturbed = job(tiny_flux_folder, prompt_file, alone / "weights", alone / "dumps")
    run(parse(list(map(str, undisturbed))).options)
    capsys.readouterr()
    words = job(tiny_flux_folder, prompt_file, weights, dumps)
    with halted_after_a_batch(words, dumps, tmp_path / "said") as first:
        stale = weights / ".live.1.tmp"
        stale.touch()

        def refused(said: str, option: str, folder: Path) -> None:
            assert "error: another job works in this folder" in said
            assert f"process {first} on {socket.gethostname()} has held it since" in said
            assert f"--quant_{option}_folder {folder}" in said

        own, others = tmp_path / "own", ("--seed", 7, "--overwrite")
        other = start_launcher(*job(tiny_flux_folder, prompt_file, weights, own, *others))
        printed, _ = other.communicate(timeout=120)
        assert other.returncode == 6, printed
        refused(printed, "weight_save", weights)
        assert "encode:" not in printed
        words = job(tiny_flux_folder, prompt_file, own, dumps, *others)
        with pytest.raises(FolderInUse) as caught:  # in this process, which is not the first one's either
            run(parse(list(map(str, words))).options)
        refused(str(caught.value), "dump_calib", dumps)
        assert "encode:" not in capsys.readouterr().out
        assert stale.exists()
        stale.unlink()
    assert files_below(tmp_path / "job") == files_below(alone)
