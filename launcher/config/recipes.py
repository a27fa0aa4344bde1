"""Recipes: configurations of a job that come with a model, each a YAML file whose first line says what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model_adapters import adapter_names, config_files
from quant_core.errors import ConfigurationError, suggestion


@dataclass(frozen=True)
class Recipe:
    """A configuration that comes with a model; what it leaves out (the model's folder, the prompts) is the user's."""

    model: str
    path: Path

    @property
    def name(self) -> str:
        """What `--config` takes."""
        return self.path.stem

    @property
    def text(self) -> str:
        """The options, as YAML."""
        return self.path.read_text(encoding="utf-8")

    @property
    def summary(self) -> str:
        """What it is for."""
        return self.text.partition("\n")[0].lstrip("# ")


def recipes(model: str | None = None) -> Iterator[Recipe]:
    """Return the recipes of a model, or of all models, by name."""
    for each in adapter_names() if model is None else [model]:
        yield from (Recipe(each, path) for path in config_files(each))


def config_path(model: str, given: str) -> Path:
    """Return the file that `--config` means: one of that path, else the recipe of that name.

    Raises:
        ConfigurationError: there is neither.
    """
    known = {recipe.name: recipe.path for recipe in recipes(model)}
    path = Path(given).expanduser()
    if path.is_file() or (path.exists() and given not in known):
        return path
    if given in known:
        return known[given]
    raise ConfigurationError(
        f"there is no file and no recipe '{given}'",
        where=f"--config {given}",
        why=f"the recipes of {model} are {', '.join(known) or 'none'}",
        advice=suggestion(given, known, "give an existing YAML file"),
    )
