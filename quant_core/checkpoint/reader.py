"""Read a published checkpoint back: to a layer's deployed output, to float tensors, or into a float model.

Nothing in the files is trusted: opening checks what descriptions and headers say, and each tensor's values are checked
when it is read (`verify` reads all of them). Headers are read at once, tensors when they are asked for, one layer at a
time.

    checkpoint = open_checkpoint(files)
    y = checkpoint.read_layer("transformer_blocks.0.attn.to_q")(x)     what the hardware makes of x
    model.load_state_dict(checkpoint.float_state_dict())               what the codes stand for, in a float model
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quant_core.checkpoint.entries import TIMESTEP_SEP_KEY, CheckpointFiles
from quant_core.checkpoint.inventory import Inventory, StoredGroup, broken, take_inventory
from quant_core.checkpoint.json_file import read_object
from quant_core.checkpoint.tensor_parts import TensorFiles, TensorInfo, index_path
from quant_core.errors import ConfigurationError, suggestion
from quant_core.layers.deployed import DeployedArithmetic, DeployedLayer
from quant_core.schemes import BY_TYPE
from quant_core.schemes.scheme import separator
from quant_core.schemes.tensor_rules import TensorRule


class Checkpoint:
    """Hold an open checkpoint: what it says of itself, and its tensors on demand.

    inventory: what it holds. metadata: the strings of its header. timestep_sep: the first static step of a timestep
    scheme (as written into the header, or half the steps), None for others.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files
        description = read_object(files.description)
        self._tensors = TensorFiles(_existing_form(files.weights))
        self._infos = self._tensors.infos()
        self.inventory: Inventory = take_inventory(description, self._infos, files.description)
        self.metadata = self._tensors.metadata
        self.timestep_sep = self._timestep_sep()

    def read_layer(self, name: str) -> DeployedLayer:
        """Return a quantized layer, by its name in the float model: call it with an input (and a step).

        Raises ConfigurationError when there is no such layer and VerificationError when its values break a rule.
        """
        group = self._layer(name)
        arithmetic = DeployedArithmetic(name, BY_TYPE[group.type], self.timestep_sep)
        return DeployedLayer(arithmetic, self._read_group(group))

    def read_weight(self, name: str) -> Tensor:
        """Return the (O, I) weight that a layer's codes stand for, float32, with smoothing undone."""
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

    def read_float(self, name: str) -> Tensor:
        """Return a tensor that was not quantized."""
        return self._tensors.read(name)

    def float_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the float model by its name there, in the model's dtype, one at a time."""
        for name, group in self.inventory.layers.items():
            yield f"{name}.weight", self.read_weight(name).to(self.inventory.dtype)
            if "bias" in group.members:
                yield f"{name}.bias", self._read_group(group, only=("bias",))["bias"]
        for name in self.inventory.floats:
            yield name, self.read_float(name)

    def float_state_dict(self) -> dict[str, Tensor]:
        """Return all of `float_tensors` at once: a state dict that the float model loads."""
        return dict(self.float_tensors())

    def verify(self) -> None:
        """Read every quantized layer and every attention scale. Raises VerificationError at the first bad value."""
        for group in (*self.inventory.layers.values(), *self.inventory.attentions.values()):
            self._read_group(group)

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
        valid = rule.values.holds(tensor)
        if not bool(valid.all()):
            index = (~valid).nonzero()[0].tolist()
            raise broken(
                f"'{member}' holds {tensor[tuple(index)].item()} at {index}",
                self._tensors.path,
                f"it may hold {rule.values.says} only",
            )
        return tensor

    def _timestep_sep(self) -> int | None:
        timesteps, written = self.inventory.timesteps, self.metadata.get(TIMESTEP_SEP_KEY)
        if timesteps is None:
            return None
        if written is None:
            return separator(None, timesteps)
        if not (written.isascii() and written.isdigit() and int(written) <= timesteps):
            raise broken(
                f"the header says {TIMESTEP_SEP_KEY} {written!r}", self._tensors.path, f"there are {timesteps} steps"
            )
        return int(written)


def open_checkpoint(files: CheckpointFiles) -> Checkpoint:
    """Open a checkpoint of one rank; `files.weights` is the file, the index of its parts, or where the file would be.

    Raises InputError for files that are missing or damaged, and VerificationError for ones that break a rule.
    """
    return Checkpoint(files)


def _existing_form(weights: Path) -> Path:
    parts = index_path(weights)
    return parts if parts.exists() and not weights.exists() else weights
