"""A job over two hosts publishes what it publishes on one, and ends when a host goes down.

The second host is a process namespace of this machine: its processes cannot be seen from outside, as a host's cannot.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.fault_matrix import files_below
from tests.support.forked_ranks import run_forked
from tests.support.torchrun import free_port, start_launcher

pytestmark = pytest.mark.distributed

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
# Run a command with a folder of this host alone: MOUNTED, FOLDER, COMMAND...
MOUNTED = ["sh", "-c", 'mkdir -p "$0" && mount -t tmpfs tmpfs "$0" && exec "$@"']
# Short enough for a test, long enough for a crowded machine.
HANG_S = 8


def has_namespaces() -> bool:
    """Tell whether this process may make a process namespace."""
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def job(model: Path, prompts: Path, out: Path) -> list[object]:
    """Return the words of the job of two ranks, without how its ranks are started."""
    return [
        "flux", "--path", model, "--device", "cpu", "--device_type", "A2-32g-dual", "--prompt_path", prompts,
        "--width", "64", "--height", "64", "--infer_steps", "4", "--do_quant", "--quant_type", "w8a8_timestep",
        "--quant_weight_save_folder", out / "weights", "--quant_dump_calib_folder", out / "dumps",
        "--hang_timeout", HANG_S,
    ]  # fmt: skip


@contextmanager
def two_hosts(
    *words: object, own: Path | None = None, differently: Sequence[object] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the job with a rank on each of two hosts; nothing is left behind the block.

    own: a folder that the second host has on a disk of its own. differently: further flags of the second host.
    """
    meeting = ("--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", free_port(), "--nproc_per_node", "1")
    second = [*NAMESPACE, *([*MOUNTED, str(own)] if own else [])]
    hosts = [
        start_launcher(*meeting, "--node_rank", 0, *words),
        start_launcher(*meeting, "--node_rank", 1, *words, *differently, namespace=second),
    ]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.wait()


def outputs(hosts: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for the end of all hosts, which must be a good one; return what they printed."""
    printed = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0] * len(hosts), printed
    return printed


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if not has_namespaces():
        pytest.skip("process namespaces cannot be made here")


def test_two_hosts_publish_the_bytes_of_one(tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path):
    words = map(str, job(tiny_flux_folder, prompt_file, tmp_path / "one"))
    assert run_forked(2, "-m", "launcher", *words).returncode == 0
    two = tmp_path / "two"
    with two_hosts(*job(tiny_flux_folder, prompt_file, two), own=two / "dumps") as hosts:
        first, second = outputs(hosts)
    assert "merge: 4 files" in first
    assert "merge:" not in second
    expected = files_below(tmp_path / "one")
    del expected["dumps/calib_data_rank1.pth"]  # lies on the second host
    assert files_below(two) == expected


def test_each_host_keeps_its_pictures_where_it_finds_the_weights_folder(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
):
    first, second = tmp_path / "first" / "weights", tmp_path / "second"
    second.mkdir()
    first.parent.mkdir()
    first.symlink_to(second)
    words = job(tiny_flux_folder, prompt_file, tmp_path)
    words += ["--quant_type", "w8a8_dynamic", "--infer_steps", 1, "--tp_size", 1, "--evaluate", 2]
    words += ["--quant_weight_save_folder", first]
    with two_hosts(*words, own=first.parent, differently=["--quant_weight_save_folder", second]) as hosts:
        outputs(hosts)
    assert len(list((second / "quality" / "quantized").glob("*.png"))) == 2


def test_hosts_that_do_not_share_the_weights_folder_are_told_before_anything_is_loaded(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
):
    words, weights = job(tiny_flux_folder, prompt_file, tmp_path), tmp_path / "weights"
    with two_hosts(*words, own=weights) as hosts:
        printed = "".join(host.communicate(timeout=120)[0] for host in hosts)  # either may be the first to speak
    assert [host.returncode for host in hosts] == [3, 3], printed
    assert f"rank 1 on {socket.gethostname()} and rank 0 on {socket.gethostname()} do not share a folder" in printed
    assert f"--quant_weight_save_folder {weights}" in printed
    assert "encode:" not in printed
    assert not list(tmp_path.rglob("*.tmp"))


def test_hosts_with_other_options_are_told_which_before_they_form_groups_by_them(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
):
    words = job(tiny_flux_folder, prompt_file, tmp_path)
    with two_hosts(*words, "--timeout_s", 60, differently=["--tp_size", 1]) as hosts:
        printed = "".join(host.communicate(timeout=120)[0] for host in hosts)  # either may be the first to speak
    assert [host.returncode for host in hosts] == [2, 2], printed
    assert "error: rank 0 and rank 1 differ in the options" in printed
    assert "why    ranks.tp_size: None, 1" in printed


def test_a_host_that_goes_down_ends_the_job_and_a_second_run_finishes_it(
    tiny_flux_folder: Path, prompt_file: Path, tmp_path: Path
):
    words = job(tiny_flux_folder, prompt_file, tmp_path)
    parts = [tmp_path / "dumps" / ".calib_parts" / f"calib_data_rank{rank}" / "batch_00000.pth" for rank in (0, 1)]
    with two_hosts(*words) as (left, lost):
        while not all(part.exists() for part in parts):  # a batch that one rank lacks is done again by both
            assert left.poll() is None, left.communicate()[0]
            time.sleep(0.02)
        lost.kill()
        printed, _ = left.communicate(timeout=HANG_S + 60)
    assert left.returncode == 6, printed
    # The connection breaks if rank 0 is in a collective; otherwise rank 1 falls silent.
    assert "error: rank 1 cannot be reached any more" in printed or "error: rank 1 hangs" in printed
    again = run_forked(2, "-m", "launcher", *map(str, words))
    assert again.returncode == 0, again.stderr
    assert "were finished by an earlier run" in again.stdout
