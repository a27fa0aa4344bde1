"""Each copy that evaluates reads its share of the calibration data, wherever the dumps of the others lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.devices.launch import Launch
from launcher.ranks.mesh import Mesh
from launcher.stages.evaluate import calibration_records
from quant_core.calibration.records import save_dump
from quant_core.errors import InputError

COPIES = 4


def dump(folder: Path, rank: int, fingerprint: str = "of this job") -> None:
    """Write the calibration data of one rank, a copy by itself: one record that says whose it is."""
    header = {"fingerprint": fingerprint, "rank": rank, "tp_rank": 0, "dp_rank": rank}
    records = [{"args": [], "kwargs": {"of": rank}, "timestep_idx": 0}]
    save_dump(folder / f"calib_data_rank{rank}.pth", records, header)


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
