"""Names of files that every rank writes its own of."""

from __future__ import annotations

import os


def get_rank() -> int:
    """Return this process's global rank, or -1 when it was not started by a distributed launcher."""
    return int(os.environ.get("RANK", "-1")) if "LOCAL_RANK" in os.environ else -1


def get_rank_suffix_file(base_name: str, ext: str, is_distributed: bool, rank: int) -> str:
    """Return `base_name.ext`, or `base_name_rank<rank>.ext` for dumps and `base_name_<rank>.ext` for checkpoints.

    The consumer of a checkpoint looks for `_<rank>` before the extension; a dump is ours and says `rank`.
    """
    if not is_distributed:
        return f"{base_name}.{ext}"
    return f"{base_name}_{'rank' if ext == 'pth' else ''}{rank}.{ext}"
