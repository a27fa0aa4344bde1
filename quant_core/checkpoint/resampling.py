"""Give a checkpoint with a row for each step other steps: rows follow from the noise level, not from the step's number.

The range of an activation is a smooth function of the noise level sigma. A row's scale and offset say the range that
was calibrated at its level; the range at another level is read off the line between its two neighbours, and the row
for it follows as it did from the first ones. Codes and scales of weights stay.

Worked example: rows at sigma 1.0 and 0.5 with the ranges [-2, 2] and [-4, 6]. A step at sigma 0.75 gets [-3, 4].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.scales import QMAX, QMIN
from quant_core.atomic_file import write_atomically, write_text_atomically
from quant_core.checkpoint.entries import TIMESTEP_SEP_KEY, CheckpointFiles
from quant_core.checkpoint.inventory import StoredGroup
from quant_core.checkpoint.json_file import read_object
from quant_core.checkpoint.reader import Checkpoint
from quant_core.checkpoint.tensor_file import TensorFile
from quant_core.checkpoint.tensor_parts import CODES
from quant_core.errors import InputError
from quant_core.schemes import BY_TYPE
from quant_core.schemes.quantized_layer import QuantizedLayer
from quant_core.schemes.scheme import Derivation
from quant_core.schemes.tensor_rules import STATIC_RULES

# In the header of the tensors: the noise level of each step, as JSON.
SIGMAS_KEY = "sigmas"
# Levels that differ by less are one level, computed twice.
_SAME = 1e-5


@dataclass(frozen=True)
class Levels:
    """Name the noise levels that were calibrated and those that are wanted, each by step, falling."""

    old: Sequence[float]
    new: Sequence[float]

    def check(self, where: str, rows: int | None) -> None:
        """Raise InputError for levels that are not those of the rows, or do not fall, and for a wanted one outside.

        rows: how many the checkpoint has.
        """
        for levels, which in ((self.old, "calibrated"), (self.new, "wanted")):
            if not all(one > other for one, other in pairwise(levels)):
                raise InputError(
                    f"the {which} noise levels do not fall from step to step",
                    where=where,
                    why=f"they are {', '.join(f'{level:.4f}' for level in levels)}, and a row follows from its level",
                    advice="calibrate with the steps that are wanted, or with a scheduler that leaves each level",
                )
        if rows != len(self.old):
            raise InputError(
                f"the checkpoint has {rows} rows and names {len(self.old)} noise levels",
                where=where,
                why="nobody can tell which row is of which level",
                advice="calibrate with the steps that are wanted",
            )
        highest, lowest = max(self.old), min(self.old)
        outside = [s for s in self.new if not lowest * (1 - _SAME) <= s <= highest * (1 + _SAME)]
        if outside:
            raise InputError(
                f"{len(outside)} of {len(self.new)} steps leave the calibrated noise levels: {outside[-1]:.4f}",
                where=where,
                why=f"{len(self.old)} steps from {highest:.4f} to {lowest:.4f} were calibrated, and ranges outside of "
                "these cannot be known",
                advice="calibrate with more steps, or ask for fewer",
            )

    def separator(self, old: int) -> int:
        """Return the first static step: the first new one as late in the noise as the old one."""
        if old >= len(self.old):
            return len(self.new)
        return sum(sigma > self.old[old] * (1 + _SAME) for sigma in self.new)

    def interpolated(self, rows_T: Tensor) -> Tensor:
        """Return what the rows of the old levels are at the new ones; both (T,), float64."""
        old = torch.tensor(self.old, dtype=torch.float64).flip(0)
        new = torch.tensor(self.new, dtype=torch.float64).clamp(old[0], old[-1])
        if len(old) == 1:
            return rows_T.expand(len(new))
        right = torch.searchsorted(old, new).clamp(1, len(old) - 1)
        part = (new - old[right - 1]) / (old[right] - old[right - 1])
        rows = rows_T.flip(0)
        return rows[right - 1] + part * (rows[right] - rows[right - 1])


@dataclass(frozen=True)
class _Rows:
    """Answer as an observer that knows a range for each step."""

    low_T: Tensor
    high_T: Tensor

    def range(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the low and the high end of a step's range, scalars."""
        return self.low_T[step], self.high_T[step]


def write_resampled(checkpoint: Checkpoint, levels: Levels, files: CheckpointFiles, metadata: Mapping[str, str]) -> int:
    """Write a checkpoint with the rows of other steps; return its first static step.

    metadata: strings of the header that change, the noise levels among them. Layers without rows are copied.
    """
    levels.check(str(checkpoint.files.weights), checkpoint.inventory.timesteps)
    assert checkpoint.timestep_sep is not None, "a checkpoint with rows has a separator"
    separator = levels.separator(checkpoint.timestep_sep)
    layers = {n: g for n, g in checkpoint.inventory.layers.items() if BY_TYPE[g.type].per_step}
    changed = {member: name for name, group in layers.items() for member in group.members.values()}
    names = [name for name in read_object(checkpoint.files.description) if name in checkpoint]
    described = {name: _described(checkpoint, name, len(levels.new) if name in changed else None) for name in names}
    header = {**checkpoint.metadata, **metadata, TIMESTEP_SEP_KEY: str(separator)}

    def write(path: Path) -> None:
        with TensorFile(path, described, header, in_front=CODES) as file:
            for name in names:
                if name not in changed:
                    file.write(name, checkpoint.read_raw(name))
            for name, group in layers.items():
                for key, tensor in _resampled(checkpoint, name, group, levels).items():
                    file.write(group.members[key], tensor)

    write_atomically(files.weights, write)
    write_text_atomically(files.description, checkpoint.files.description.read_text(encoding="utf-8"))
    return separator


def _described(checkpoint: Checkpoint, name: str, steps: int | None) -> Tensor:
    info, shape = checkpoint.info(name), list(checkpoint.info(name).shape)
    if steps is not None and name.rpartition(".")[2] in STATIC_RULES:
        shape[0] = steps
    return torch.empty(shape, dtype=info.dtype, device="meta")


def _resampled(checkpoint: Checkpoint, name: str, group: StoredGroup, levels: Levels) -> dict[str, Tensor]:
    """Return all tensors of a layer, with the rows of the new levels."""
    stored, scheme, numerics = dict(checkpoint.read_layer(name).tensors), BY_TYPE[group.type], NUMERICS["float32"]
    scale_T, offset_T = (stored[key].double().squeeze(1) for key in ("input_scale", "input_offset"))
    ends = (levels.interpolated((point - offset_T) * scale_T).float() for point in (QMIN, QMAX))
    layer = QuantizedLayer(name, scheme, stored["weight"], stored["weight_scale"], stored.get("bias"))
    layer.observer = _Rows(*ends)  # type: ignore[assignment]
    made = scheme.layer_tensors(layer, Derivation(range(len(levels.new)), numerics))
    return {key: made.get(key, stored[key]) for key in group.members}
