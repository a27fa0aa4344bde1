"""What the runtime needs of a model to load a checkpoint into: linear layers by name, and nothing else.

The runtime replaces linear layers by name, reads no float tensor, and takes each layer's weight from the file. So the
names, the local shapes and the biases that a checkpoint tells of make a model that it can load, on the meta device and
without the model's own code.
"""

from __future__ import annotations

from torch import nn

from quant_core.checkpoint.reader import Checkpoint


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return a tree of modules with a linear layer for each quantized one and for each float weight of two axes."""
    root, inventory = nn.Module(), checkpoint.inventory
    layers = {name: (group.members["weight"], "bias" in group.members) for name, group in inventory.layers.items()}
    for name in inventory.floats:
        if name.endswith(".weight") and len(checkpoint.info(name).shape) == 2:
            layer = name.removesuffix(".weight")
            layers[layer] = name, f"{layer}.bias" in inventory.floats
    for name, (weight, has_bias) in layers.items():
        outputs, inputs = checkpoint.info(weight).shape
        linear = nn.Linear(inputs, outputs, bias=has_bias, device="meta", dtype=inventory.dtype)
        _put(root, name, linear)
    return root


def _put(root: nn.Module, name: str, linear: nn.Module) -> None:
    *parents, last = name.split(".")
    owner = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    owner.add_module(last, linear)
