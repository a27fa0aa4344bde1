"""Each model's knowledge: how to load, shard and run it. One folder per model; importing this imports no torch.

A model is a folder beside this file, or a package with the same files that another distribution announces:

    [project.entry-points."model_adapters.models"]
    mymodel = "my_package.mymodel"
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
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


def announced_version(name: str) -> dict[str, str]:
    """Return the version of the distribution that announces a model, by its name; nothing for a model that is here."""
    point = _announced().get(name)
    return {point.dist.name: point.dist.version} if point and point.dist else {}


@cache
def _announced() -> dict[str, EntryPoint]:
    """Return what other distributions announce, by the model's name; a folder here wins over a stranger's package."""
    return {point.name: point for point in entry_points(group=_ENTRY_POINTS) if point.name not in _folders()}


@cache
def _folders() -> frozenset[str]:
    return frozenset(found.parent.name for found in Path(__file__).parent.glob("*/adapter.py"))


def _packages() -> dict[str, str]:
    """Return each model's package by name."""
    announced = {name: point.value for name, point in _announced().items()}
    return announced | {name: f"{__name__}.{name}" for name in _folders()}


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
