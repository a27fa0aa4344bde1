"""Put a published checkpoint into a float model: its quantized layers become deployed ones.

This is what the consumer does when it loads, with its silent cases refused: a layer that the model does not have, a
shape or dtype of another model, a bias on one side only, a parameter that neither side knows. Everything is compared
before the first tensor is replaced, so a model that is refused stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.findings import Finding
from quant_core.checkpoint.inventory import StoredGroup
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint
from quant_core.errors import VerificationError
from quant_core.layers.deployed import DeployedLinear, deploy_linear
from quant_core.naming import linear_at


@torch.no_grad()
def load_deployed(model: nn.Module, files: CheckpointFiles, *, load_floats: bool = True) -> Checkpoint:
    """Make the model's quantized layers compute from the checkpoint, in place, and return the open checkpoint.

    model: in the dtype that was quantized, whole or this rank's shard; a model on the meta device comes to the host.
    load_floats: take all other tensors from the checkpoint too; the runtime keeps those that its model has.
    Raises InputError for damaged files, VerificationError for files that break a rule or are of another model.
    """
    checkpoint = open_checkpoint(files)
    for finding in misfits(model, checkpoint):
        raise VerificationError(
            finding.what, where=str(finding.file), why=finding.why, advice="load it into the model that was quantized"
        )
    for name in checkpoint.inventory.layers:
        deploy_linear(linear_at(model, name), checkpoint.read_layer(name))
    for name in checkpoint.inventory.floats if load_floats else ():
        _put(model, name, checkpoint.read_raw(name))
    return checkpoint


def misfits(model: nn.Module, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield what does not fit between a float model, which may be on the meta device, and a checkpoint."""
    file, rule = checkpoint.files.weights, "fits the model"
    for tensor, what, why in _problems(model, checkpoint):
        yield Finding(rule, file, tensor, what, why)


def _problems(model: nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Yield what does not fit, as (layer or tensor, what, why)."""
    modules, floats = dict(model.named_modules()), _own_floats(model, checkpoint.inventory.layers)
    for name, group in checkpoint.inventory.layers.items():
        for what, why in _layer_problems(name, modules.get(name), group, checkpoint):
            yield name, what, why
    for name in checkpoint.inventory.floats:
        shape = checkpoint.info(name).shape
        if name not in floats:
            yield name, f"the model has no tensor '{name}'", f"the checkpoint holds one of shape {shape}"
        elif tuple(floats[name].shape) != shape:
            yield name, f"'{name}' has the shape {shape}", f"in the model it is {tuple(floats[name].shape)}"
    stored = set(checkpoint.inventory.floats)
    for name in sorted(name for name, tensor in floats.items() if name not in stored and _is_lost(tensor)):
        yield name, f"nothing says what the buffer '{name}' holds", "it lies on the meta device, and no file has it"
    for name, tensor in floats.items():
        # A reference-numerics checkpoint leaves buffers out: the model's own stay.
        if name not in stored and isinstance(tensor, nn.Parameter):
            yield name, f"the checkpoint has no '{name}'", "the model has such a parameter, quantized or not"


def _layer_problems(
    name: str, linear: nn.Module | None, group: StoredGroup, checkpoint: Checkpoint
) -> Iterator[tuple[str, str]]:
    if not isinstance(linear, nn.Linear):
        yield f"the model has no linear layer '{name}'", "the checkpoint quantizes one"
    elif isinstance(linear, DeployedLinear):
        yield f"the layer '{name}' is quantized already", "a checkpoint goes into a float model"
    else:
        shape = checkpoint.info(group.members["weight"]).shape
        if shape != tuple(linear.weight.shape):
            yield f"the weight of '{name}' has the shape {shape}", f"in the model it is {tuple(linear.weight.shape)}"
        if checkpoint.inventory.dtype != linear.weight.dtype:
            yield (
                f"the checkpoint is of a {checkpoint.inventory.dtype} model",
                f"'{name}' is {linear.weight.dtype}, and scales are rounded to the dtype",
            )
        if ("bias" in group.members) != (linear.bias is not None):
            side = "checkpoint" if "bias" in group.members else "model"
            yield f"only the {side} has a bias for '{name}'", "of a row-split layer the first rank alone has one"


def _own_floats(model: nn.Module, quantized: Mapping[str, StoredGroup]) -> dict[str, Tensor]:
    """Return the model's parameters and buffers, by name, but those of the layers that get quantized."""
    # A tensor that two modules own stands in the file twice; a module that has two names stands there once.
    tensors = _named(model.named_parameters(remove_duplicate=False), model)
    tensors |= _named(model.named_buffers(remove_duplicate=False), model)
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in quantized}


def _named(tensors: Iterable[tuple[str, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    return {name: tensor for name, tensor in tensors if name.rpartition(".")[0] in modules}


def _is_lost(tensor: Tensor) -> bool:
    return tensor.is_meta and not isinstance(tensor, nn.Parameter)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, key)
    if not old.is_meta:
        old.copy_(tensor)
    elif isinstance(old, nn.Parameter):
        setattr(module, key, nn.Parameter(tensor.clone(), requires_grad=False))
    else:
        setattr(module, key, tensor.clone())
