"""The quantization schemes, one a file; adding one is a file and a row in this table."""

from __future__ import annotations

from typing import NamedTuple

from quant_core.schemes import w8a8, w8a8_dynamic, w8a8_timestep, w8a16
from quant_core.schemes.scheme import Scheme

_ROWS = (
    w8a8.SCHEME,
    w8a8_timestep.SCHEME,
    w8a8_dynamic.SCHEME,
    w8a16.SCHEME,
)

# By the name that a session and a command line know them by, and by the type in a description.
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}
BY_TYPE: dict[str, Scheme] = {scheme.quant_type: scheme for scheme in _ROWS}


class QuantType(NamedTuple):
    """Say what a quantization type of a command line means: a scheme, and whether attention is quantized too."""

    scheme: Scheme
    with_attention: bool


QUANT_TYPES: dict[str, QuantType] = {
    f"{scheme.name}_fa3" if with_attention else scheme.name: QuantType(scheme, with_attention)
    for scheme in _ROWS
    for with_attention in (False, True)
    if scheme.with_attention or not with_attention
}
