"""The quantization schemes, one a file; adding one is a file and a row in this table."""

from __future__ import annotations

from quant_core.schemes import w8a8, w8a8_dynamic, w8a8_timestep
from quant_core.schemes.scheme import Scheme

# By the name that a session and a command line know them by.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (w8a8.SCHEME, w8a8_timestep.SCHEME, w8a8_dynamic.SCHEME)
}
