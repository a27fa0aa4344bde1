"""Each copy that evaluates reads its share of the calibration data, wherever the dumps of the others lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.devices.launch import Launch
from launcher.files.calibration_parts import DIGEST
from launcher.files.digests import digest_of_records
from launcher.ranks.mesh import Mesh
from launcher.stages.evaluate import calibration_records
from quant_core.calibration.records import load_dump, save_dump
from quant_core.errors import InputError

COPIES = 4


def dump(folder: Path, rank: int, fingerprint: str = "of this job") -> None:
    """Write the calibration data of one rank, a copy by itself: one record that says whose it is."""
    header = {"fingerprint": fingerprint, "rank": rank, "tp_rank": 0, "dp_rank": rank}
    records = [{"args": [], "kwargs": {"of": rank}, "timestep_idx": 0}]
    save_dump(folder / f"calib_data_rank{rank}.pth", records, {**header, DIGEST: digest_of_records(records)})


def read(folder: Path, rank: int, world: int) -> list[int]:
    """Return whose records a rank reads."""
    mesh = Mesh(Launch(rank=rank, world=world))
    records = calibration_records(folder, mesh, fingerprint="of this job", copies=COPIES)
    return [record.kwargs["of"] for record in records]


@pytest.mark.parametrize("world", [1, 2, 4, 6])
def test_together_they_read_all_of_it_once(tmp_path: Path, world: int):
    for rank in range(COPIES):
        dump(tmp_path, rank)
    everything = [of for rank in range(world) for of in read(tmp_path, rank, world)]
    assert sorted(everything) == list(range(COPIES))


def test_a_host_that_has_only_the_dumps_of_its_own_ranks_reads_these(tmp_path: Path):
    for rank in (2, 3):
        dump(tmp_path, rank)
    assert [read(tmp_path, rank, COPIES) for rank in (2, 3)] == [[2], [3]]
    dump(tmp_path, 0, fingerprint="of another job")
    with pytest.raises(InputError, match="no calibration data") as raised:
        read(tmp_path, 0, 2)
    assert "copy 0 of its job" in raised.value.why


def test_a_dump_that_was_changed_is_not_measured_on_unless_it_is_another_jobs(tmp_path: Path):
    for rank, fingerprint in ((0, "of this job"), (1, "of another job")):
        dump(tmp_path, rank, fingerprint)
        path = tmp_path / f"calib_data_rank{rank}.pth"
        saved = load_dump(path)
        save_dump(path, [{**saved["records"][0], "kwargs": {"of": 7}}], saved["header"])
    with pytest.raises(InputError, match="changed after it was saved") as raised:
        read(tmp_path, 0, COPIES)
    assert raised.value.where.endswith("calib_data_rank0.pth")
    dump(tmp_path, 0)
    assert read(tmp_path, 0, COPIES) == [0]


def test_damaged_files_are_passed_over_where_all_that_is_needed_is_there_and_named_where_it_is_not(tmp_path: Path):
    dump(tmp_path, 0)
    for rank, damage in ((1, b"no torch file"), (7, b"")):
        (tmp_path / f"calib_data_rank{rank}.pth").write_bytes(damage)
    assert read(tmp_path, 0, COPIES) == [0]
    with pytest.raises(InputError, match="no calibration data") as raised:
        read(tmp_path, 1, COPIES)
    assert "of 3 calib_data*.pth none is of shard 0 in copy 1 of its job; calib_data_rank1.pth cannot be read: " in (
        raised.value.why
    )
