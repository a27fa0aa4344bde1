"""Read a published checkpoint back: to a layer's deployed output, to float tensors, or into a float model.

Nothing in the files is trusted: opening checks what descriptions and headers say, and each tensor's values are checked
when it is read. `verify` reads all of them, and looks whether those of a layer follow from each other; `findings` lists
what is wrong instead of raising the first of it. Headers are read at once, tensors when they are asked for, one layer
at a time.

    checkpoint = open_checkpoint(files)
    y = checkpoint.read_layer("transformer_blocks.0.attn.to_q")(x)     what the hardware makes of x
    model.load_state_dict(checkpoint.float_state_dict())               what the codes stand for, in a float model
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from quant_core.arithmetic.rotation import Rotation
from quant_core.checkpoint.content import Content
from quant_core.checkpoint.entries import NUMERICS_KEY, TIMESTEP_SEP_KEY, CheckpointFiles
from quant_core.checkpoint.findings import Finding
from quant_core.checkpoint.inventory import Inventory, StoredGroup, take_inventory
from quant_core.checkpoint.json_file import read_object
from quant_core.checkpoint.rotations import ROTATIONS_KEY, read_rotations
from quant_core.checkpoint.tensor_parts import TensorFiles, TensorInfo, index_path
from quant_core.errors import ConfigurationError, suggestion
from quant_core.layers.deployed import DeployedArithmetic, DeployedLayer
from quant_core.schemes import BY_TYPE
from quant_core.schemes.scheme import separator
from quant_core.schemes.tensor_rules import TensorRule


class Checkpoint:
    """Hold an open checkpoint: what it says of itself, and its tensors on demand; metadata: its header's strings."""

    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files
        self._description = read_object(files.description)
        self._tensors = TensorFiles(_existing_form(files.weights))
        self._infos = self._tensors.infos()
        self.metadata = self._tensors.metadata
        self._inventory, self._form = take_inventory(self._description, self._infos, files)

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing at all can be made of the files."""
        return self._inventory is None

    @property
    def inventory(self) -> Inventory:
        """Return what the checkpoint holds. Raises VerificationError where nothing can be made of it."""
        if self._inventory is None:
            raise self._form[0].error()
        return self._inventory

    def findings(self) -> Iterator[Finding]:
        """Yield all that breaks a rule: form first, then, reading layer by layer, values and what follows from them."""
        yield from self._form_findings()
        if self._inventory is not None:
            yield from self._content.findings(self._tensors.read)

    def _form_findings(self) -> Iterator[Finding]:
        yield from self._form
        yield from self._rotation_findings()
        written, timesteps = self.metadata.get(TIMESTEP_SEP_KEY), self._inventory and self._inventory.timesteps
        if timesteps is None or written is None:
            return
        if not (written.isascii() and written.isdigit() and int(written) <= timesteps):
            what = f"the header says {TIMESTEP_SEP_KEY} {written!r}"
            yield Finding("separator", self.files.weights, "", what, f"there are {timesteps} steps")

    def _rotation_findings(self) -> Iterator[Finding]:
        rotations, quantized = read_rotations(self.metadata), self._inventory.layers if self._inventory else {}
        if rotations is None:
            what = f"the header says {ROTATIONS_KEY} {self.metadata[ROTATIONS_KEY][:60]!r}"
            yield Finding("rotation", self.files.weights, "", what, "it says of each rotated layer the size of a head")
        for name, rotation in (rotations or {}).items() if self._inventory else ():
            if name not in quantized:
                what, why = f"'{name}' was rotated, and is no quantized layer", "the runtime keeps its own weight there"
            elif not rotation.fits(*self._infos[quantized[name].members["weight"]].shape):
                what, why = f"'{name}' cannot be rotated as the header says", "heads or levels do not fit its shape"
            else:
                continue
            yield Finding("rotation", self.files.weights, name, what, why)

    @cached_property
    def _content(self) -> Content:
        return Content(self.inventory, self._tensors.path, self.metadata.get(NUMERICS_KEY))

    @cached_property
    def rotations(self) -> dict[str, Rotation]:
        """Return how layers were rotated, by name; none where the header cannot be read, which is a finding."""
        return read_rotations(self.metadata) or {}

    @property
    def timestep_sep(self) -> int | None:
        """Return the first static step of a timestep scheme, None for others."""
        timesteps, written = self.inventory.timesteps, self.metadata.get(TIMESTEP_SEP_KEY)
        if timesteps is None:
            return None
        # One that is no number is a finding, and says nothing of the step.
        return separator(int(written) if written and written.isdecimal() else None, timesteps)

    def read_layer(self, name: str) -> DeployedLayer:
        """Return a quantized layer, by its name in the float model: call it with an input (and a step).

        Raises ConfigurationError when there is no such layer and VerificationError when its values break a rule.
        """
        group = self._layer(name)
        arithmetic = DeployedArithmetic(name, BY_TYPE[group.type], self.timestep_sep)
        return DeployedLayer(arithmetic, self._read_group(group))

    def read_weight(self, name: str) -> Tensor:
        """Return the (O, I) weight that a layer's codes stand for, float32, with smoothing undone, not rotation."""
        group = self._layer(name)
        tensors = self._read_group(group, only=("weight", "weight_scale", "mul_scale"))
        weight = BY_TYPE[group.type].codec.decode(tensors["weight"], tensors["weight_scale"])
        return weight * tensors["mul_scale"].to(torch.float32) if "mul_scale" in tensors else weight

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of that name."""
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a stored tensor, without reading it."""
        return self._infos[name]

    def read_raw(self, name: str) -> Tensor:
        """Return a tensor as it is stored, by its full name, whatever its values are."""
        return self._tensors.read(name)

    def float_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the float model by its name there, in the model's dtype, one at a time."""
        for name, group in self.inventory.layers.items():
            yield f"{name}.weight", self.read_weight(name).to(self.inventory.dtype)
            if "bias" in group.members:
                yield f"{name}.bias", self._read_group(group, only=("bias",))["bias"]
        for name in self.inventory.floats:
            yield name, self.read_raw(name)

    def float_state_dict(self) -> dict[str, Tensor]:
        """Return all of `float_tensors` at once: a state dict that the float model loads."""
        return dict(self.float_tensors())

    def verify(self) -> None:
        """Read everything. Raises VerificationError at the first that `findings` finds."""
        for finding in self.findings():
            raise finding.error()

    def check_form(self) -> None:
        """Raise VerificationError at the first thing that descriptions and headers show to be wrong."""
        for finding in self._form_findings():
            raise finding.error()

    def _layer(self, name: str) -> StoredGroup:
        layers = self.inventory.layers
        if name not in layers:
            raise ConfigurationError(
                f"the checkpoint has no quantized layer '{name}'",
                where=f"{self.files.description} ({len(layers)} quantized layers)",
                advice=suggestion(name, layers, "name one of `inventory.layers`"),
            )
        return layers[name]

    def _read_group(self, group: StoredGroup, only: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        wanted = {key: member for key, member in group.members.items() if only is None or key in only}
        return {key: self._read_checked(member, group.rules[key]) for key, member in wanted.items()}

    def _read_checked(self, member: str, rule: TensorRule) -> Tensor:
        tensor = self._tensors.read(member)
        if finding := self._content.bad_value(member, tensor, rule.values):
            raise finding.error()
        return tensor


def open_checkpoint(files: CheckpointFiles) -> Checkpoint:
    """Open a checkpoint of one rank; `files.weights` is the file, the index of its parts, or where the file would be.

    Raises InputError for files that are missing or damaged, and VerificationError for ones that break a rule.
    """
    checkpoint = Checkpoint(files)
    checkpoint.check_form()
    return checkpoint


def _existing_form(weights: Path) -> Path:
    parts = index_path(weights)
    return parts if parts.exists() and not weights.exists() else weights
