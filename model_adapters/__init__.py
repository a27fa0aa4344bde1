"""Each model's knowledge: how to load, shard and run it. One folder per model; importing this imports no torch.

A model is a folder beside this file, or a package with the same files that another distribution announces:

    [project.entry-points."model_adapters.models"]
    mymodel = "my_package.mymodel"
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from quant_core.errors import ConfigurationError, suggestion

if TYPE_CHECKING:
    from model_adapters.adapter import ModelAdapter

_ENTRY_POINTS = "model_adapters.models"


def adapter_names() -> list[str]:
    """Return the names of all models, in alphabetical order, without importing any."""
    return sorted(_packages())


def load_options(name: str) -> ModuleType:
    """Import a model's `options` module, which has OPTIONS and DEFAULTS and imports no torch.

    Raises ConfigurationError naming the nearest model for an unknown name.
    """
    return import_module(f"{_package(name)}.options")


def load_adapter(name: str) -> ModelAdapter:
    """Import a model's adapter, which imports torch and diffusers.

    Raises ConfigurationError naming the nearest model for an unknown name.
    """
    return import_module(f"{_package(name)}.adapter").ADAPTER


def config_files(name: str) -> list[Path]:
    """Return the configurations of a job that come with a model, in the folder `configs` of its package.

    Raises ConfigurationError naming the nearest model for an unknown name.
    """
    package = import_module(_package(name))
    return sorted(path for place in package.__path__ for path in Path(place).glob("configs/*.yaml"))


@cache
def _packages() -> dict[str, str]:
    """Return each model's package by name; a folder here wins over a stranger's package of the same name."""
    announced = {point.name: point.value for point in entry_points(group=_ENTRY_POINTS)}
    folders = [found.parent.name for found in Path(__file__).parent.glob("*/adapter.py")]
    return announced | {name: f"{__name__}.{name}" for name in folders}


def _package(name: str) -> str:
    packages = _packages()
    if name in packages:
        return packages[name]
    raise ConfigurationError(
        f"no model is called '{name}'",
        where="model",
        why=f"the models are {', '.join(sorted(packages))}",
        advice=suggestion(name, sorted(packages)),
    )
