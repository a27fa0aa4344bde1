"""Recipes: configurations of a job that come with a model, each a YAML file whose first line says what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from launcher.config.yaml_text import parse_yaml
from model_adapters import adapter_names, config_files
from quant_core.errors import ConfigurationError, suggestion

# A recipe's figures, which are no option: a copy of a recipe is a configuration all the same.
MEASURED = "measured"


class Measured(BaseModel):
    """What a recipe cost on a small trained model, in dB: signal over error, and PSNR of pictures.

    command: makes the figures; floor: PSNR of the float model's pictures, computed in another dtype; note: what they
    leave out, in a few words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str
    model: str
    worst_layer: float
    output: float
    pictures: float
    floor: float
    note: str = ""

    def __str__(self) -> str:
        figures = (
            f"output {self.output}, worst layer {self.worst_layer}, pictures {self.pictures} of at most {self.floor}"
        )
        note = f", {self.note}" if self.note else ""
        return f"{figures} dB{note} ({self.model}, {self.command})"


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

    @property
    def measured(self) -> Measured | None:
        """Its figures; None where nobody measured it."""
        figures = parse_yaml(self.text, where=str(self.path)).get(MEASURED)
        return Measured.model_validate(figures) if figures else None


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
