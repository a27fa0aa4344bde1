"""Find the checkpoint that lies in a folder, and open what can be opened of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.files.manifest import Manifest, read_manifest
from launcher.files.run_folder import MANIFEST, shard_files
from model_adapters import load_adapter
from model_adapters.adapter import ModelAdapter
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.findings import Finding
from quant_core.checkpoint.inventory import Inventory
from quant_core.checkpoint.reader import Checkpoint
from quant_core.errors import ConfigurationError, ExplainedError, InputError
from quant_core.parallel.sharding import Shard, Style
from quant_core.schemes import SCHEMES

_FILE = re.compile(
    rf"quant_model_(?:weight|description)_(?P<scheme>{'|'.join(sorted(SCHEMES, key=len, reverse=True))})"
    r"(?:_(?P<rank>\d+))?\.(?:safetensors|json)"
)


@dataclass(frozen=True)
class RankCheckpoint:
    """One rank's two files, opened: tp_rank is None for a file without a rank in its name."""

    tp_rank: int | None
    files: CheckpointFiles
    checkpoint: Checkpoint

    @property
    def rank(self) -> int:
        """Return which part of the model the file is to hold, by its name."""
        return self.tp_rank or 0

    @property
    def inventory(self) -> Inventory:
        """Return what the files hold."""
        return self.checkpoint.inventory

    @property
    def metadata(self) -> dict[str, str]:
        """Return the strings of the header."""
        return self.checkpoint.metadata


@dataclass(frozen=True)
class Published:
    """A folder with a checkpoint: the ranks that could be opened, in order, and what vouches for them.

    scheme: in lower case, as in the names of files. names: of all files that belong to some checkpoint. adapter: of
    the model that the manifest names, where it is installed.
    """

    folder: Path
    scheme: str
    names: tuple[str, ...]
    ranks: tuple[RankCheckpoint, ...] = ()
    manifest: Manifest | None = None
    adapter: ModelAdapter | None = None
    findings: tuple[Finding, ...] = field(default=(), compare=False)

    @property
    def files(self) -> dict[str | None, CheckpointFiles]:
        """Return where each rank's two files are or have to be, by the rank in their names; None if there is none."""
        found = (_FILE.fullmatch(name) for name in self.names)
        ranks = dict.fromkeys(each["rank"] for each in found if each and each["scheme"] == self.scheme)
        return {rank: shard_files(self.folder, self.scheme, f"_{rank}" if rank else "") for rank in ranks}

    @property
    def paths(self) -> list[Path]:
        """Return all these files."""
        return [path for each in self.files.values() for path in (each.weights, each.description)]

    def shard(self, layer: str, rank: int) -> Shard | None:
        """Return how a linear layer is divided, by its name; None where nobody knows the model's plan."""
        if self.adapter is None or self.manifest is None:
            return None
        rule = self.adapter.shard_plan(self.manifest.layout).rule_for(layer) if len(self.ranks) > 1 else None
        return Shard(rule.style if rule else Style.REPLICATED, rank, len(self.ranks))

    def option(self, name: str) -> object:
        """Return what the manifest says that the job was asked for, `quantization.anti_method`; None if nothing."""
        return self.manifest.fields.get(name) if self.manifest else None


def read_published(folder: Path) -> Published:
    """Open what lies in a folder; what cannot be opened is a finding.

    Raises InputError when there is no checkpoint at all.
    """
    findings: list[Finding] = []
    names = tuple(sorted(path.name for path in folder.glob("quant_model_*")))
    manifest = _manifest(folder, findings)
    schemes = {found["scheme"] for name in names if (found := _FILE.fullmatch(name))}
    if not schemes:
        raise InputError(
            "there is no checkpoint in this folder",
            where=str(folder.absolute()),
            why="no file is called quant_model_weight_<type>.safetensors or quant_model_description_<type>.json",
            advice="give the folder that --quant_weight_save_folder named",
        )
    wanted = manifest.quant_type.lower() if manifest else ""
    scheme = wanted if wanted in schemes else min(schemes)
    found = Published(folder, scheme, names, (), manifest, _adapter(manifest))
    ranks = filter(None, (_open(rank, files, findings) for rank, files in found.files.items()))
    return replace(found, ranks=tuple(sorted(ranks, key=lambda each: each.rank)), findings=tuple(findings))


def _manifest(folder: Path, findings: list[Finding]) -> Manifest | None:
    try:
        return read_manifest(folder / MANIFEST)
    except InputError as error:
        findings.append(Finding("readable", folder / MANIFEST, "", error.what, error.why))
        return None


def _adapter(manifest: Manifest | None) -> ModelAdapter | None:
    try:
        return load_adapter(str(manifest.fields.get("model"))) if manifest else None
    except ConfigurationError:
        return None  # a stranger's model, that is not installed here


def _open(rank: str | None, files: CheckpointFiles, findings: list[Finding]) -> RankCheckpoint | None:
    try:
        checkpoint = Checkpoint(files)
    except ExplainedError as error:
        description = files.description
        where = Path(error.where) if Path(error.where).parent == description.parent else description
        findings.append(Finding("readable", where, "", error.what, error.why))
        return None
    return RankCheckpoint(int(rank) if rank else None, files, checkpoint)
