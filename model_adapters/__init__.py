"""Each model's knowledge: how to load, shard and run it. One folder per model; importing this imports no torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from quant_core.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from model_adapters.adapter import ModelAdapter


def adapter_names() -> list[str]:
    """Return the names of all models: the folders beside this file that have an adapter, in alphabetical order."""
    return sorted(found.parent.name for found in Path(__file__).parent.glob("*/adapter.py"))


def load_options(name: str) -> ModuleType:
    """Import a model's `options` module, which has OPTIONS, DEFAULTS and DEVICE_TYPES and imports no torch.

    Raises ConfigurationError naming the nearest model for an unknown name.
    """
    return import_module(f"{__name__}.{_known(name)}.options")


def load_adapter(name: str) -> ModelAdapter:
    """Import a model's adapter, which imports torch and diffusers.

    Raises ConfigurationError naming the nearest model for an unknown name.
    """
    return import_module(f"{__name__}.{_known(name)}.adapter").ADAPTER


def _known(name: str) -> str:
    names = adapter_names()
    if name in names:
        return name
    close = nearest(name, names)
    raise ConfigurationError(
        f"no model is called '{name}'",
        where="model",
        why=f"the models are {', '.join(names)}",
        advice=f"{close} (nearest name)" if close else f"one of {', '.join(names)}",
    )
