"""FA3's part of a session: which attentions to watch, and what the ranks agree on afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from quant_core.arithmetic.numerics import Numerics
from quant_core.attention.head_scales import AttentionObserver
from quant_core.calibration.finite import check_attention
from quant_core.errors import ConfigurationError, InputError
from quant_core.naming import matches
from quant_core.parallel.groups import Group, reduce_many, reduce_over
from quant_core.processor import ProcessorConfig
from quant_core.structure import NO_STRUCTURE, ModelStructure


class FA3ProcessorConfig(ProcessorConfig):
    """Measure scales for quantized attention."""

    key: ClassVar[str] = "fa3"
    kind: ClassVar[str] = "attention quantization"


def attention_observers(
    model: nn.Module, structure: ModelStructure | None, numerics: Numerics
) -> dict[str, AttentionObserver]:
    """Return an observer for each attention of the model, by module name in module order.

    Raises ConfigurationError when the structure does not say where the attentions are, or none is there.
    """
    patterns = structure.attentions if structure else ()
    modules = {name: module for name, module in model.named_modules() if matches(name, patterns)}
    if not modules:
        raise ConfigurationError(
            f"fa3 finds no attention in {type(model).__name__}",
            where="processor_cfg_map['fa3']",
            why=f"its structure names {list(patterns) or 'no attentions'}" if structure else NO_STRUCTURE,
            advice="install the packages (pip install -e .), or give quant_model a ModelStructure(attentions=...)",
        )
    return {
        name: AttentionObserver(name, next(module.parameters()).dtype, numerics) for name, module in modules.items()
    }


def reduce_attentions(observers: Mapping[str, AttentionObserver], group: Group | None) -> None:
    """Combine the ranges over the data-parallel ranks; heads are local, so tensor-parallel ranks share nothing.

    All ranks come through with the same outcome. Raises InputError naming an attention that no rank has seen, or one
    that multiplied NaN or infinity.
    """
    if not observers:
        return
    ranges = [found for observer in observers.values() for found in observer.ranges.values()]
    rows = reduce_over(group, "max", torch.tensor([found.rows for found in ranges])).tolist()
    missing = [name for name, observed in zip(observers, rows[:: len(rows) // len(observers)]) if not observed]
    if missing:
        raise _never_seen(missing)
    for found, count in zip(ranges, rows):
        found.with_rows(count)
    reduce_many(group, (part for observer in observers.values() for part in observer.state()))
    for name, observer in observers.items():
        for part, found in observer.ranges.items():
            check_attention(name, part, is_finite=found.is_finite)


def _never_seen(missing: list[str]) -> InputError:
    return InputError(
        f"the calibration never saw attention '{missing[0]}' multiply",
        where=f"calib_data ({len(missing)} such attentions in all)",
        why="no record ran it, or its kernel is not torch's scaled_dot_product_attention",
        advice="calibrate with records that run the whole model and with the 'native' attention backend",
    )
