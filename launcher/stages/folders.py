"""FOLDERS: make the output folders, keep them for this job alone, and see that the ranks share what they must.

The shards are staged by all ranks and published by rank 0, so all hosts need the same weights folder. Calibration data
and images are read only by the rank that wrote them: a host may have those on a disk of its own, and then keeps it
itself.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from launcher.config.job_config import JobConfig
from launcher.failure.phases import run_together
from launcher.files.calibration_parts import FOLDER as PARTS
from launcher.files.folder_lock import hold
from launcher.files.image_record import RECORDS
from launcher.files.run_folder import QUALITY, STAGING
from launcher.ranks.agreement import gather_objects
from launcher.stages.calibrate import FLOAT_IMAGES
from launcher.stages.job import Job
from launcher.stages.quant_images import QUANT_IMAGES
from quant_core.atomic_file import make_folder, sweep
from quant_core.errors import EnvironmentFailure

# How long a network file system may take to show one host what another has written.
_PATIENCE_S = 5.0
_SHARED = "--quant_weight_save_folder"
# Where a job writes below its folders.
_BELOW = (
    *(STAGING, QUALITY, f"{QUALITY}/*", f"{PARTS}/*"),
    *(RECORDS, FLOAT_IMAGES, f"{FLOAT_IMAGES}/{RECORDS}", QUANT_IMAGES, f"{QUANT_IMAGES}/{RECORDS}"),
)


@contextmanager
def own_folders(job: Job, *, only_weights: bool = False) -> Iterator[None]:
    """Keep the output folders for this job while the context lasts; all ranks enter it together.

    only_weights: the job writes nothing beside its weights folder.

    Raises:
        FolderInUse: another job holds one of them.
        EnvironmentFailure: hosts have different weights folders under the same name.
    """
    ranks, folders = job.ranks, _folders(job.config, only_weights)
    name = gather_objects(ranks, uuid4().hex, what="naming the job")[0]
    with ExitStack() as held:

        def take(options: Collection[str]) -> None:
            for option, folder in folders.items():
                make_folder(folder)
                if option in options and held.enter_context(hold(folder, option, name, job.console.say)):
                    for place in (folder, *(below for pattern in _BELOW for below in folder.glob(pattern))):
                        sweep(place)

        run_together(ranks, "making the output folders", lambda: take(folders if ranks.rank == 0 else ()))
        apart = _not_shared(job, folders, name)
        is_first_here = ranks.mesh.launch.local_rank == 0
        run_together(ranks, "taking the folders of each host", lambda: take(apart if is_first_here else ()))
        yield


def _not_shared(job: Job, folders: Mapping[str, Path], name: str) -> Collection[str]:
    """Return the options whose folders are not those of rank 0, which leaves a file in each for the others to find."""
    ranks = job.ranks
    if ranks.world == 1:
        return ()
    # One that an interruption leaves is swept by the next job.
    tokens = {option: folder / f".shared_{name}.0.tmp" for option, folder in folders.items()}
    with ExitStack() as shown:

        def show() -> None:
            for token in tokens.values() if ranks.rank == 0 else ():
                shown.callback(token.unlink, missing_ok=True)
                token.touch()

        run_together(ranks, "writing into the output folders", show)
        apart = {option for option, token in tokens.items() if not _appears(token, patiently=option == _SHARED)}
        everyone = gather_objects(ranks, (socket.gethostname(), apart), what="looking for the shared folders")
    run_together(ranks, "comparing the output folders", lambda: _require_shared(folders, everyone))
    return apart


def _folders(config: JobConfig, only_weights: bool) -> dict[str, Path]:
    """Return the folders that a job writes, by the option that chose them."""
    output, quantizes = config.output, config.quantization.do_quant
    chosen = {
        _SHARED: output.quant_weight_save_folder if quantizes else None,
        "--quant_dump_calib_folder": output.quant_dump_calib_folder if quantizes and not only_weights else None,
        "--save_path": output.save_path if output.do_save_img and not only_weights else None,
    }
    return {option: folder.resolve() for option, folder in chosen.items() if folder is not None}


def _appears(token: Path, *, patiently: bool) -> bool:
    until = time.monotonic() + (_PATIENCE_S if patiently else 0)
    while not token.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(_PATIENCE_S / 50)
    return True


def _require_shared(folders: Mapping[str, Path], everyone: Sequence[tuple[str, Collection[str]]]) -> None:
    """Refuse a weights folder that is not the same on all hosts; everyone: host, and folders apart, of each rank."""
    hosts = [host for host, _ in everyone]
    if apart := [f"rank {rank} on {host}" for rank, (host, apart) in enumerate(everyone) if _SHARED in apart]:
        raise EnvironmentFailure(
            f"{', '.join(apart)} and rank 0 on {hosts[0]} do not share a folder",
            where=f"{_SHARED} {folders[_SHARED]}",
            why="every rank writes its shard there and rank 0 publishes them all; what rank 0 wrote does not show up",
            advice=f"give {_SHARED} a folder on a file system that all hosts share, by the same path on each",
        )
