"""The fault matrix as data: every way to break a job, where, and what must follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

RANKS = (0, 1)
STAGES = ("load", "calibrate", "quantize", "merge")
HANG_S = 4  # --hang_timeout: as short as a loaded machine allows
LIMIT_S = 10.0

# By name, the words of a job that differ: one copy of the model over both ranks, or a whole copy on each.
JOBS: Mapping[str, tuple[str, ...]] = {
    "one copy": ("--device_type", "A2-32g-dual", "--max_num_prompt", "3"),
    "two copies": ("--device_type", "A2-64g", "--max_num_prompt", "4"),
}


@dataclass(frozen=True)
class Row:
    """One way to break a job.

    status        what the job must end with; 0 where it goes on
    stages, ranks where it strikes
    culprit       a pattern of where it must have been, on the terminal and in status.json; {rank} is the struck one
    limit_s       seconds after the strike within which all processes are gone, if the job does not go on
    strikes       what the worker does, by its name in `fault_worker.KINDS`; the row's own name if left out
    outside       what somebody else does at that moment, by its name in `fault_bench.OUTSIDE`
    spoils        a file, by pattern, in which a byte is flipped before the next run; that run must end with
                  `then`, and name the file if it refuses it, which is removed then, as it says
    mounts        who mounts a file system, and so has to be root, be it in a name space: "matrix", "rank" or nobody
    """

    status: int
    stages: tuple[str, ...] = STAGES
    ranks: tuple[int, ...] = RANKS
    culprit: str = r"rank {rank}\b"
    limit_s: float = LIMIT_S
    strikes: str = ""
    outside: str = ""
    job: str = "one copy"
    spoils: str = ""
    then: int = 0
    mounts: str = ""


ROWS: Mapping[str, Row] = {
    "kill -9": Row(6),
    "SIGTERM": Row(75, (*STAGES, "observe", "write"), culprit=""),
    "exception": Row(1),
    "OOM error": Row(5),
    "full disk": Row(3, culprit=r"rank \d", mounts="matrix"),  # whoever writes next finds it full
    "frozen": Row(6, (*STAGES, "end"), limit_s=HANG_S + LIMIT_S),
    "other numbers": Row(7, ("batch",), culprit=r"rank \d, calibrate"),  # whoever is first
    "SIGTERM in one copy of two": Row(75, ("calibrate", "observe"), culprit="", strikes="SIGTERM", job="two copies"),
    "broken pipe": Row(0, ("calibrate",), (0,), culprit="", strikes="wait", outside="lose the reader"),
    "broken pipe, two interrupts": Row(
        130, ("calibrate", "quantize"), (0,), culprit="", strikes="wait", outside="lose the reader, interrupt twice"
    ),
    "second job": Row(0, ("calibrate",), (0,), culprit="", strikes="wait", outside="start a second job"),
    # It strikes before Python has imported anything, and a network file system gets seconds to show a file.
    "own disk": Row(3, ("start",), (1,), culprit=r"ranks 0, {rank}\b", limit_s=2 * LIMIT_S, mounts="rank"),
    "flipped byte in a dump": Row(
        6, ("quantize",), (0,), strikes="kill -9", spoils="dumps/calib_data_rank1.pth", then=4
    ),
    "flipped byte in a shard": Row(
        6, ("publish",), (0,), strikes="kill -9", spoils="weights/.shards/quant_model_weight_*_1.safetensors"
    ),
    "flipped byte in a published file": Row(
        0, ("merge",), (0,), culprit="", strikes="nothing", spoils="weights/quant_model_weight_*_1.safetensors"
    ),
}
# Who is asked to leave when nothing is left to do finishes; where one rank fills the disk while another needs its last
# few bytes, the faster one decides.
FINISHES = {("SIGTERM", "merge", 0): {0}, ("SIGTERM", "merge", 1): {0}, ("full disk", "merge", 1): {3, 0}}


@dataclass(frozen=True)
class Fault:
    """One cell of the matrix."""

    kind: str
    stage: str
    rank: int

    @property
    def row(self) -> Row:
        """The row that the cell is in."""
        return ROWS[self.kind]

    @property
    def statuses(self) -> set[int]:
        """The exit statuses that the job may end with, one but for a race."""
        return FINISHES.get((self.kind, self.stage, self.rank), {self.row.status})

    @property
    def culprit(self) -> str:
        """A pattern of where the terminal and status.json must say it was; empty where nobody is to blame."""
        return self.row.culprit.format(rank=self.rank)

    @property
    def strikes(self) -> str:
        """What happens in the rank."""
        return self.row.strikes or self.kind


def cells(kinds: tuple[str, ...], stages: tuple[str, ...], ranks: tuple[int, ...]) -> Iterator[Fault]:
    """Yield the cells of those kinds, stages and ranks, row by row; an empty tuple means all."""
    for kind in kinds or tuple(ROWS):
        row = ROWS[kind]
        for stage in row.stages:
            for rank in row.ranks:
                if (not stages or stage in stages) and (not ranks or rank in ranks):
                    yield Fault(kind, stage, rank)
