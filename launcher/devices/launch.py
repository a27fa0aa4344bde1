"""Learn from the environment which rank this process is, and who said so.

`LOCAL_RANK` is the key: only a launcher that starts one process per device sets it. Some schedulers put `RANK` and
`WORLD_SIZE` into every pod, where they count pods; alone they say nothing about this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant_core.errors import EnvironmentFailure

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Launch:
    """Say which rank of how many this process is, on its host and in the whole job; whatever needs to know refers here.

    `init_method` is how the ranks find each other; None for a single process that was started without a launcher.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    source: str = "single process"
    init_method: str | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether a launcher started this process, be it the only one."""
        return self.init_method is not None


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Read the variables of torchrun, else of srun, else find a single process.

    Raises:
        EnvironmentFailure: variables are missing, are no numbers, or contradict each other.
    """
    if "LOCAL_RANK" in environ:
        return _from_torchrun(environ)
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_srun(environ)
    if environ.get("WORLD_SIZE", "1") != "1":
        raise EnvironmentFailure(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set, but LOCAL_RANK is not",
            where=_shown(environ, ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
            why="without a local rank several processes would take the same device and write the same files",
            advice="start with torchrun --nproc_per_node N -m launcher, or unset RANK WORLD_SIZE for one process",
        )
    return Launch()


def _from_torchrun(environ: Mapping[str, str]) -> Launch:
    missing = [name for name in _TORCHRUN if not environ.get(name)]
    if missing:
        raise EnvironmentFailure(
            f"LOCAL_RANK={environ['LOCAL_RANK']} is set without {', '.join(missing)}",
            where=_shown(environ, _TORCHRUN),
            why="a launcher sets all of them, and the ranks find each other by them",
            advice="start with torchrun --nproc_per_node N -m launcher, or unset LOCAL_RANK for one process",
        )
    found = Launch(
        **_numbers(
            environ,
            {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"},
        ),
        source="torchrun" if "TORCHELASTIC_RUN_ID" in environ else "environment",
        init_method="env://",
    )
    _require_consistent(found, environ)
    return found


def _require_consistent(found: Launch, environ: Mapping[str, str]) -> None:
    one_node = environ.get("GROUP_WORLD_SIZE") == "1"
    contradictions = {
        f"RANK={found.rank} is not below WORLD_SIZE={found.world}": not 0 <= found.rank < found.world,
        f"LOCAL_RANK={found.local_rank} is not below LOCAL_WORLD_SIZE={found.local_world}": (
            not 0 <= found.local_rank < found.local_world
        ),
        f"LOCAL_WORLD_SIZE={found.local_world} is more than WORLD_SIZE={found.world}": found.local_world > found.world,
        f"one host runs {found.local_world} of WORLD_SIZE={found.world} ranks, and there is no other host": (
            one_node and found.local_world < found.world
        ),
    }
    if wrong := [text for text, is_wrong in contradictions.items() if is_wrong]:
        raise EnvironmentFailure(
            wrong[0],
            where=_shown(environ, _TORCHRUN),
            why="; ".join(wrong[1:]) or "ranks that do not exist would be waited for",
            advice="let torchrun set these variables, and do not export them in a job script",
        )


def _from_srun(environ: Mapping[str, str]) -> Launch:
    if environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
        raise EnvironmentFailure(
            f"srun started tasks on {environ['SLURM_STEP_NUM_NODES']} hosts without torchrun",
            where=_shown(environ, (*_SRUN, "SLURM_STEP_NUM_NODES")),
            why="tasks on several hosts do not know where rank 0 listens",
            advice="srun --ntasks-per-node=1 torchrun --nnodes N --nproc_per_node M --master-addr HOST -m launcher",
        )
    numbers = _numbers(
        environ, {"rank": "SLURM_PROCID", "world": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
    )
    names = {"job": "SLURM_JOB_ID", "step": "SLURM_STEP_ID"}
    job, step = _numbers({"SLURM_STEP_ID": "0", **environ}, names).values()
    # A port of its own for each step of each job, in the range that hosts leave to applications: jobs of one host have
    # numbers close to each other. The path tells those apart that share one all the same.
    address = f"tcp://127.0.0.1:{20000 + (job + 1000 * step) % 20000}/{job}.{step}"
    return Launch(**numbers, local_world=numbers["world"], source="srun", init_method=address)


def _numbers(environ: Mapping[str, str], names: Mapping[str, str]) -> dict[str, int]:
    wrong = [variable for variable in names.values() if not environ.get(variable, "").isdecimal()]
    if wrong:
        raise EnvironmentFailure(
            f"{' and '.join(wrong)} must be a number",
            where=_shown(environ, tuple(names.values())),
            why="ranks are counted from 0",
            advice="let torchrun set these variables, and do not export them in a job script",
        )
    return {name: int(environ[variable]) for name, variable in names.items()}


def _shown(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    return " ".join(f"{name}={environ.get(name, '(unset)')}" for name in names)
