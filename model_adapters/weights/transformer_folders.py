"""Find the transformer of a pipeline folder: whole, or already divided into one folder for each rank.

The dual-card runtime of FLUX has its own program that cuts `transformer/` into `transformer_0/` and `transformer_1/`,
under the original file names (spec: dual-card folders of the runtime). A machine that serves the model may keep only
those. They hold what this program would cut out of the whole, for one layout and one number of ranks, so they serve
only jobs of that very layout and number. Where the whole is there too it is read: it cannot be out of date.
"""

from __future__ import annotations

from pathlib import Path

from model_adapters.parallel.shard_plan import ShardPlan
from model_adapters.weights.brought import NOTHING, Brought
from model_adapters.weights.model_folder import (
    CONFIG_NAME,
    INDEX_NAME,
    PARTS_NAME,
    has_weights,
    read_parts,
    weight_files,
)
from quant_core.errors import ConfigurationError

WHOLE = "transformer"


def rank_folder(root: Path, tp_rank: int) -> Path:
    """Return where the runtime looks for a rank's part."""
    return root / f"{WHOLE}_{tp_rank}"


def divided_folders(root: Path) -> list[Path]:
    """Return the folders of all ranks in rank order; none for a model that nobody divided."""
    found = []
    while (folder := rank_folder(root, len(found))).is_dir():
        found.append(folder)
    return found


def used_folders(root: Path) -> list[Path]:
    """Return the folders that a job on this pipeline reads: the whole transformer's, else those of all ranks."""
    whole = root / WHOLE
    return [whole] if has_weights(whole) else divided_folders(root) or [whole]


def folder_of_rank(root: Path, plan: ShardPlan, tp_rank: int, tp_size: int) -> tuple[Path, bool]:
    """Return the folder that a rank reads, and whether its tensors are that rank's slices already.

    Raises ConfigurationError when only divided folders are there and the job divides the model in another way.
    """
    folders = used_folders(root)
    if folders == [root / WHOLE]:
        return folders[0], False
    if plan.has_rank_folders and len(folders) == tp_size:
        return folders[tp_rank], True
    names = f"{folders[0].name} to {folders[-1].name}"
    raise ConfigurationError(
        f"the transformer is divided already, and not as this job asks: {plan.name} over {tp_size}",
        where=f"{root} ({names}, and no weights in {WHOLE}/)",
        why=f"these folders hold the slices of {len(folders)} ranks in the runtime's own layout",
        advice=f"use --tp_size {len(folders)} and the default --layout, or give the folder of the whole model",
    )


def files_of(folder: Path, *, is_divided: bool, variant: str | None = None) -> list[Path]:
    """Return the weight files of a transformer's folder; the runtime's program may leave the index behind.

    Raises InputError when there are none.
    """
    if is_divided and not (folder / INDEX_NAME).exists() and (found := sorted(folder.glob("*.safetensors"))):
        return found
    return weight_files(folder, variant)


def pipeline_files(root: Path, brought: Brought = NOTHING) -> list[Path]:
    """Return every file that some rank of a job on this pipeline may read: of the transformer and of all other parts.

    Of a transformer in whose place a file is brought only the configuration is read.

    A folder that holds nothing but a transformer has no index of parts. Raises InputError when the index is damaged or
    weights of the transformer are missing.
    """
    folders = used_folders(root)
    is_divided = folders != [root / WHOLE]
    own = [folders[0] / CONFIG_NAME]
    if brought.transformer is None:
        found = {folder: files_of(folder, is_divided=is_divided, variant=brought.variant) for folder in folders}
        own = [path for folder, files in found.items() for path in (folder / CONFIG_NAME, *files)]
    index = root / PARTS_NAME
    if not index.exists():
        return own
    named = [name for name, kind in read_parts(root).items() if any(kind)]
    others = [path for name in named if name != WHOLE for path in _visible_files(root / name)]
    return [index, *own, *others]


def _visible_files(folder: Path) -> list[Path]:
    """Return all files below a folder but hidden ones: a desktop or a downloader left those."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
