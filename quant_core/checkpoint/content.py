"""The rules of a checkpoint's values: what each tensor may hold, and what follows from what within a layer.

A reader holds what lies in a file against them, and a writer what it is about to write: then nobody has to read a file
again only to know that it is sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quant_core.checkpoint.entries import NUMERICS_KEY, CheckpointFiles, Entry, described
from quant_core.checkpoint.findings import Finding, check
from quant_core.checkpoint.inventory import Inventory, StoredGroup, take_inventory
from quant_core.checkpoint.layer_rules import LAYER_RULES, StoredLayer
from quant_core.checkpoint.tensor_parts import TensorInfo
from quant_core.schemes import BY_TYPE
from quant_core.schemes.tensor_rules import FINITE, ValueRule


@dataclass(frozen=True)
class Content:
    """Look for what breaks a rule in the values of one checkpoint.

    file: where they lie or will lie. numerics: what its header says of itself, if anything.
    """

    inventory: Inventory
    file: Path
    numerics: str | None = None

    def findings(self, read: Callable[[str], Tensor]) -> Iterator[Finding]:
        """Yield all that breaks a rule; read: returns a tensor by its name, each is asked for once."""
        for group in (*self.inventory.layers.values(), *self.inventory.attentions.values()):
            yield from self.of_group(group, {key: read(member) for key, member in group.members.items()})
        for name in self.inventory.floats:
            yield from self.of_float(name, read(name))

    def of_group(self, group: StoredGroup, tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
        """Yield what breaks a rule in one layer or attention; tensors: by their names in the rules."""
        bad = [self.bad_value(group.members[key], t, group.rules[key].values) for key, t in tensors.items()]
        yield from filter(None, bad)
        # Of values that are no scales or codes nothing follows.
        if not any(bad) and group.type in BY_TYPE:
            yield from check(LAYER_RULES, StoredLayer(group, tensors, self.numerics), self.file)

    def of_float(self, name: str, tensor: Tensor) -> Iterator[Finding]:
        """Yield what breaks a rule in a tensor that is not quantized."""
        if tensor.is_floating_point():
            yield from filter(None, [self.bad_value(name, tensor, FINITE)])

    def bad_value(self, member: str, tensor: Tensor, values: ValueRule) -> Finding | None:
        """Return what is wrong with a tensor's own values, if anything."""
        if values.all_hold(tensor):
            return None
        index = (~values.holds(tensor)).nonzero()[0].tolist()
        what = f"'{member}' holds {tensor[tuple(index)].item()} at {index}"
        return Finding("values", self.file, member, what, f"it may hold {values.says} only")


class ContentCheck:
    """Hold tensors against the rules before they are written; raises VerificationError at the first that breaks one.

    entries: all that will be written, with their shapes and dtypes, on any device. header, metadata: as they go into
    the description and into the tensors' header.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        files: CheckpointFiles,
        quant_type: str,
        header: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        infos = {entry.name: TensorInfo(entry.tensor.dtype, tuple(entry.tensor.shape)) for entry in entries}
        inventory, form = take_inventory(described(entries, quant_type, header), infos, files)
        _require_none(form)
        assert inventory is not None, "without one there is a finding"
        self._content = Content(inventory, files.weights, metadata.get(NUMERICS_KEY))

    def everything(self, tensors: Mapping[str, Tensor]) -> None:
        """Check all that will be written, by full name."""
        _require_none(self._content.findings(lambda name: tensors[name].cpu()))

    def quantized_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Check the tensors of one quantized layer, by full name."""
        group = self._content.inventory.layers[name]
        _require_none(self._content.of_group(group, {key: tensors[member] for key, member in group.members.items()}))

    def kept_float(self, name: str, tensor: Tensor) -> None:
        """Check a tensor that is not quantized."""
        _require_none(self._content.of_float(name, tensor))


def _require_none(findings: Iterable[Finding]) -> None:
    for finding in findings:
        raise finding.error()
