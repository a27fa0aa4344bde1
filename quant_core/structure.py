"""What the quantizer may know of a model without knowing the model: a little data, found by the model's class.

Adapters declare one `ModelStructure` each under the entry-point group `quant_core.structures`, named after the
model's class; a third party adds a model by adding an entry point.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from pydantic import BaseModel, ConfigDict
from torch import nn

ENTRY_POINT_GROUP = "quant_core.structures"
NO_STRUCTURE = f"no installed package declares a structure for its class (entry points '{ENTRY_POINT_GROUP}')"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Modulation(_Frozen):
    """Name the linear whose output shifts and scales a normalized input: `norm(x) * (1 + scale) + shift`.

    Its output is a row of equally wide chunks. `chunks`: how many there are -> where shift and scale stand among them.
    """

    linear: str
    chunks: Mapping[int, tuple[int, int]]


class SmoothingGroup(_Frozen):
    """Name linears that share one input: patterns relative to every module that matches `block`.

    An empty `block` is the model itself. What makes the input may absorb its factor: a `modulation`, or the `values`
    linears of the attention whose output it is (output channel i is a mean of value channel i). Groups with the same
    values have one factor then, because each value reaches them all.
    """

    block: str
    linears: tuple[str, ...]
    modulation: Modulation | None = None
    values: tuple[str, ...] = ()


class AttentionValues(_Frozen):
    """Name the linears that make an attention's values, and those whose input begins with its output.

    All are relative to every module that matches `block`, which is the model itself if empty; what a block lacks is
    left out. `attention` has `heads`, the number of heads, between which the outputs of `made_by` are divided. One
    softmax mixes all values, so all linears of an attention go together.
    """

    block: str
    attention: str
    made_by: tuple[str, ...]
    read_by: tuple[str, ...]


class ModelStructure(_Frozen):
    """Say which linears share an input and where the attentions are.

    `optional_smoothing_groups` are smoothed on request, or where all others stay float. `m4_alpha` and
    `smoothing_floor`: the model's own exponent of m4, and the least factor of m4 and m6; `reference_m4_alpha`: the
    reference tool's exponent, where it is another. `attentions` are patterns of attention modules, in the grammar of
    `quant_core.naming`; `values` what is linear in front of and behind each.
    """

    model_class: str
    smoothing_groups: tuple[SmoothingGroup, ...] = ()
    optional_smoothing_groups: tuple[SmoothingGroup, ...] = ()
    m4_alpha: float = 0.5
    reference_m4_alpha: float | None = None
    smoothing_floor: float = 1e-5
    attentions: tuple[str, ...] = ()
    values: tuple[AttentionValues, ...] = ()

    def m4_exponent(self, *, is_reference: bool) -> float:
        """Return the model's own exponent of m4. is_reference: in the numerics of the reference tool."""
        if is_reference and self.reference_m4_alpha is not None:
            return self.reference_m4_alpha
        return self.m4_alpha


def find_structure(model: nn.Module) -> ModelStructure | None:
    """Return the structure registered for the model's class or one of its bases, or None."""
    registered = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for base in type(model).__mro__:
        if base.__name__ in registered:
            return registered[base.__name__].load()
    return None
