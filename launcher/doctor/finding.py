"""What a check found, and how a list of findings is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

# ok: as it should be; "!!": a job would fail or suffer; "--": worth knowing, or not looked at.
Mark = Literal["ok", "!!", "--"]


@dataclass(frozen=True)
class Finding:
    """Say what was looked at, what was found there, and what to do about it if it is not as it should be."""

    mark: Mark
    what: str
    found: str
    fix: str = ""
    section: str = ""


def judged(what: str, found: str, fix: str, *, is_well: bool) -> Finding:
    """Return a finding that is ok, or else to be fixed."""
    return Finding("ok", what, found) if is_well else Finding("!!", what, found, fix)


def as_text(findings: Sequence[Finding]) -> str:
    """Return findings for people, section by section."""
    width = max(len(finding.what) for finding in findings)
    lines, section = [], ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {finding.mark}  {finding.what:<{width}}  {finding.found}")
        lines += [f"      {'':<{width}}  -> {finding.fix}"] if finding.fix else []
    bad = sum(finding.mark == "!!" for finding in findings)
    return "\n".join([*lines, "", f"{bad} to fix" if bad else "nothing to fix"])


def as_json(findings: Sequence[Finding]) -> str:
    """Return findings for programs."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False)
