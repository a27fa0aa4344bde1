"""Quantize linear layers of diffusion transformers: the public names, each loaded when first used.

Importing this package imports nothing heavy, so that a command line built on it can answer `--help` at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant_core.attention.session import FA3ProcessorConfig as FA3ProcessorConfig
    from quant_core.calibration.capture import DumperManager as DumperManager
    from quant_core.calibration.safe_load import safe_torch_load as safe_torch_load
    from quant_core.calibration.timestep import TimestepManager as TimestepManager
    from quant_core.checkpoint.loading import load_deployed as load_deployed
    from quant_core.checkpoint.reader import open_checkpoint as open_checkpoint
    from quant_core.naming import get_disable_layer_names as get_disable_layer_names
    from quant_core.parallel.rank_files import get_rank as get_rank
    from quant_core.parallel.rank_files import get_rank_suffix_file as get_rank_suffix_file
    from quant_core.schemes.scheme import W8A8QuantConfig as W8A8QuantConfig
    from quant_core.schemes.w8a8 import W8A8ProcessorConfig as W8A8ProcessorConfig
    from quant_core.schemes.w8a8_dynamic import W8A8DynamicProcessorConfig as W8A8DynamicProcessorConfig
    from quant_core.schemes.w8a8_dynamic import W8A8DynamicQuantConfig as W8A8DynamicQuantConfig
    from quant_core.schemes.w8a8_timestep import W8A8TimeStepProcessorConfig as W8A8TimeStepProcessorConfig
    from quant_core.schemes.w8a8_timestep import W8A8TimeStepQuantConfig as W8A8TimeStepQuantConfig
    from quant_core.session.config import SaveProcessorConfig as SaveProcessorConfig
    from quant_core.session.config import SessionConfig as SessionConfig
    from quant_core.session.quantize import quant_model as quant_model
    from quant_core.smoothing.m3 import M3ProcessorConfig as M3ProcessorConfig
    from quant_core.smoothing.m4 import M4ProcessorConfig as M4ProcessorConfig
    from quant_core.smoothing.m6 import M6Config as M6Config
    from quant_core.smoothing.m6 import M6ProcessorConfig as M6ProcessorConfig

_HOME = {
    "FA3ProcessorConfig": "attention.session",
    "DumperManager": "calibration.capture",
    "safe_torch_load": "calibration.safe_load",
    "TimestepManager": "calibration.timestep",
    "load_deployed": "checkpoint.loading",
    "open_checkpoint": "checkpoint.reader",
    "get_disable_layer_names": "naming",
    "get_rank": "parallel.rank_files",
    "get_rank_suffix_file": "parallel.rank_files",
    "W8A8QuantConfig": "schemes.scheme",
    "W8A8DynamicQuantConfig": "schemes.w8a8_dynamic",
    "W8A8TimeStepQuantConfig": "schemes.w8a8_timestep",
    "SaveProcessorConfig": "session.config",
    "SessionConfig": "session.config",
    "quant_model": "session.quantize",
    "M3ProcessorConfig": "smoothing.m3",
    "M4ProcessorConfig": "smoothing.m4",
    "M6Config": "smoothing.m6",
    "M6ProcessorConfig": "smoothing.m6",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"quant_core.{_HOME[name]}"), name)
    found = _scheme_configs()
    if name == "__all__":
        return sorted({*_HOME, *found})
    if name not in found:
        raise AttributeError(f"module 'quant_core' has no attribute '{name}'")
    return found[name]


def _scheme_configs() -> dict[str, Any]:
    """Return the configuration of each scheme in the table, by its class's name."""
    from quant_core.schemes import SCHEMES

    return {scheme.config.__name__: scheme.config for scheme in SCHEMES.values()}
