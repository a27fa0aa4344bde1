"""Look at a published checkpoint with the eyes of the runtime, and stricter: everything that is wrong, by name.

form and values     of each rank's files, and what follows from what inside a layer    (quant_core.checkpoint)
files               modes, links, owners, sizes                                        (file_rules)
ranks               what all ranks have to agree in                                    (rank_rules)
manifest            digests, fingerprints, options, smoothing                          (manifest_rules)
the model           with --path: shapes, floats, and what each weight lost             (against_model)
the runtime         what it will use, ignore or refuse, in words                       (runtime_words)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.files.run_folder import STAGING
from launcher.inspection.against_model import compare_with_model
from launcher.inspection.file_rules import FILE_RULES
from launcher.inspection.manifest_rules import MANIFEST_RULES
from launcher.inspection.published import Published, read_published
from launcher.inspection.rank_rules import RANK_RULES
from launcher.inspection.runtime_words import Word, words
from launcher.inspection.with_runtime import load_with_runtime
from quant_core.checkpoint.entries import NUMERICS_KEY
from quant_core.checkpoint.findings import Finding, check
from quant_core.errors import VerificationError
from quant_core.quality.ratio import Ratio, total


@dataclass
class Verdict:
    """What was found in a folder; layers: what each weight lost, where the model was at hand."""

    folder: Path
    ranks: int
    findings: list[Finding]
    words: list[Word] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    layers: Mapping[str, Ratio] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.findings

    def require_sound(self) -> None:
        """Raise VerificationError, which counts the findings, when there are any."""
        if self.findings:
            files = sorted({finding.file.name for finding in self.findings})
            raise VerificationError(
                f"{len(self.findings)} finding{'s' * (len(self.findings) > 1)} in the checkpoint",
                where=f"{self.folder}: {', '.join(files)}",
                why=self.findings[0].what,
                advice="quantize again, or copy the files again; do not serve it",
            )

    def as_plain(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "folder": str(self.folder),
            "sound": self.is_sound,
            "ranks": self.ranks,
            "findings": [
                {"rule": f.rule, "file": f.file.name, "tensor": f.tensor, "what": f.what, "why": f.why}
                for f in self.findings
            ],
            "runtime": [word._asdict() for word in self.words],
            "remarks": self.remarks,
            "weights_sqnr_db": {name: round(ratio.decibels, 2) for name, ratio in self.layers.items()},
        }


def verify(folder: Path, model: str | None = None, *, with_runtime: bool = False) -> Verdict:
    """Check the checkpoint in a folder by every rule; model: the pipeline folder of the float model, if at hand.

    with_runtime: have the installed runtime load the files too. Raises InputError when there is no checkpoint, or no
    such model, and EnvironmentFailure when there is no runtime.
    """
    published = read_published(folder)
    found = [*published.findings, *_of_files(published)]
    readable = [rank for rank in published.ranks if not rank.checkpoint.is_empty]
    for rank in published.ranks:
        found += rank.checkpoint.findings()
    shards = len(published.files)  # of which those that could not be opened are no ranks
    opened = len(readable) == shards
    if opened:
        found += check(RANK_RULES, published, folder)
    found += _of_manifest(published, opened)
    verdict = Verdict(folder, len(published.ranks), found, remarks=list(_remarks(published)))
    if opened:
        verdict.words = words(published)
        if model is not None:
            compared = compare_with_model(published, model)
            verdict.layers = compared.layers
            verdict.findings += compared.findings
        if with_runtime:
            findings, line = load_with_runtime(published)
            verdict.findings += findings
            verdict.remarks.append(line)
    elif others := [name for name, asked in (("the model", model), ("the runtime", with_runtime)) if asked]:
        why = f"the files of {shards - len(readable)} of {shards} ranks cannot be opened"
        verdict.remarks.append(f"not compared with {' and '.join(others)}: {why}")
    return verdict


def _of_files(published: Published) -> Iterator[Finding]:
    for path in published.paths:
        yield from check(FILE_RULES, path, path)


def _of_manifest(published: Published, opened: bool) -> Iterator[Finding]:
    # Of ranks that could not be opened the manifest's rules about files alone are left.
    rules = [rule for rule in MANIFEST_RULES if opened or rule.name in ("digests", "files of the manifest")]
    yield from check(rules, published, published.folder)


def _remarks(published: Published) -> Iterator[str]:
    if published.manifest is None:
        yield "no manifest: digests, options and the division of layers were not compared"
    elif published.adapter is None:
        yield "the model is not installed here: the division of its layers was not compared"
    if any(rank.checkpoint.metadata.get(NUMERICS_KEY) for rank in published.ranks):
        yield "written with --numerics reference: biases that leave int32 are the reference tool's, and not counted"
    if (published.folder / STAGING).exists():
        yield f"{STAGING}/ holds shards that a run staged and did not publish"


def told(verdict: Verdict) -> Iterator[str]:
    """Yield the verdict as lines for a terminal."""
    yield f"verify {verdict.folder}: {verdict.ranks} rank{'s' * (verdict.ranks != 1)}"
    for finding in verdict.findings:
        place = ": ".join(filter(None, [finding.file.name, finding.tensor]))
        yield f"  !! {finding.rule:<20} {place}"
        yield f"     {finding.what}; {finding.why}"
    yield from (f"  -- {remark}" for remark in verdict.remarks)
    if verdict.words:
        yield "the runtime (MindIE-SD):"
        yield from (f"  {word.kind:<8} {word.text}" for word in verdict.words)
    if verdict.layers:
        yield from _weights(verdict.layers)
    count = len(verdict.findings)
    yield f"!!: {count} finding{'s' * (count > 1)}" if count else "ok: every rule holds"


def _weights(layers: Mapping[str, Ratio]) -> Iterator[str]:
    worst = sorted(layers, key=lambda name: layers[name].decibels)
    yield f"weights against the model: {total(layers.values()).decibels:.1f} dB over {len(layers)} layers, worst first:"
    yield from (f"  {layers[name].decibels:7.1f} dB  {name}" for name in worst)
