"""Fill in the templates of job files, as a person would: every marked line, and no other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# `name=value   # FILL IN: remark` in shell, `#SBATCH --name=value   # FILL IN` for Slurm.
_MARKED = re.compile(r"^(?P<name>(#SBATCH --)?[a-z-_]+)=(?P<value>.*?)\s+# FILL IN.*$", re.MULTILINE)


def marked_names(text: str) -> list[str]:
    """Return the names on the marked lines of a job script."""
    return [found["name"].removeprefix("#SBATCH ") for found in _MARKED.finditer(text)]


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put values into the marked lines of a job script; a `--flag` that is not given is left out."""

    def line(found: re.Match[str]) -> str:
        name = found["name"].removeprefix("#SBATCH ")
        if name.startswith("--") and name not in values:
            return "#"
        return f"{found['name']}={values[name]}"

    assert text.count("# FILL IN") == len(marked_names(text)), "a mark stands where nobody can fill it in"
    return _MARKED.sub(line, text)
