"""What the quantizer may know of a model without knowing the model: a little data, found by the model's class.

Adapters declare one `ModelStructure` each under the entry-point group `quant_core.structures`, named after the
model's class; a third party adds a model by adding an entry point.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from pydantic import BaseModel, ConfigDict
from torch import nn

ENTRY_POINT_GROUP = "quant_core.structures"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SmoothingGroup(_Frozen):
    """Name linears that share one input: patterns relative to every module that matches `block`.

    An empty `block` is the model itself.
    """

    block: str
    linears: tuple[str, ...]


class ModelStructure(_Frozen):
    """Say which linears share an input and where the attentions are.

    `attentions` are patterns of attention modules, in the grammar of `quant_core.naming`.
    """

    model_class: str
    smoothing_groups: tuple[SmoothingGroup, ...] = ()
    attentions: tuple[str, ...] = ()


def find_structure(model: nn.Module) -> ModelStructure | None:
    """Return the structure registered for the model's class or one of its bases, or None."""
    registered = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for base in type(model).__mro__:
        if base.__name__ in registered:
            return registered[base.__name__].load()
    return None
