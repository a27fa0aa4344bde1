"""FETCH: have a model that is named by a hub id on every host, before anybody reads it.

Only the first rank of each host asks the hub, so that a host fetches the model once. A first download may take an hour;
the other ranks wait for as long as it goes on, whatever `--timeout_s` says: its rank shows that it lives, and the hub's
client gives up by itself on a connection that says nothing.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from launcher.config.job_config import JobConfig
from launcher.failure.monitor import Monitor
from launcher.failure.phases import run_together
from launcher.ranks.agreement import gather_objects, group_agrees
from launcher.ranks.process_group import Ranks
from model_adapters.weights.model_folder import is_hub_id, pipeline_folder
from quant_core.errors import InputError

# How often the ranks tell each other whether they still fetch, and may leave if they were asked to.
_LOOK_S = 2.0


def fetch(config: JobConfig, ranks: Ranks, watch: Monitor) -> JobConfig:
    """Return the configuration with the model's folder on this host in the place of its hub id; all ranks together.

    Raises InputError, on all ranks, when the hub does not give the model out, and when only some ranks would ask it.
    """
    hub_id, launch = config.pipeline.path, ranks.mesh.launch
    if not _names_the_hub(hub_id, ranks):
        return config
    watch.enter("fetch")
    watch.console.say(f"model: the first rank of each host fetches {hub_id} from the hub")
    fetching = _begin(hub_id, config.pipeline.variant) if launch.local_rank == 0 else None
    while not group_agrees(ranks.control, fetching is None or fetching.done()):
        watch.safe_point(ranks.control)
        wait([fetching] if fetching else [], min(_LOOK_S, ranks.timeout_s / 4))
    folder = run_together(ranks, f"fetching {hub_id}", lambda: fetching and fetching.result())
    folders = gather_objects(ranks, folder, what="where the model is")
    mine = folders[launch.rank - launch.local_rank]
    watch.console.say(f"model: {hub_id} is in {mine}")
    return config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"path": str(mine)})})


def _names_the_hub(path: str, ranks: Ranks) -> bool:
    """Tell whether the model is to be fetched; what looks like a hub id is a folder on a host that has one."""
    said = gather_objects(ranks, path if is_hub_id(path) else None, what="where the model is")
    if len(set(said)) > 1:
        raise InputError(
            "the model is another one on other ranks",
            where=f"--path {path}",
            why="; ".join(f"rank {rank}: {hub_id or 'a folder'}" for rank, hub_id in enumerate(said)),
            advice="give all ranks one hub id where none has a folder owner/, or the whole path of a folder",
        )
    return said[0] is not None


def _begin(hub_id: str, variant: str | None) -> Future[Path]:
    """Fetch in a thread; nobody waits for it when the process is to leave."""
    pool = ThreadPoolExecutor(1)
    fetching = pool.submit(pipeline_folder, hub_id, variant)
    pool.shutdown(wait=False)
    return fetching
