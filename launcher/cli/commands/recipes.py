"""`recipes`: list the configurations that come with the models, or print one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from launcher.config.job_config import Section
from launcher.config.option_flags import POSITIONAL
from launcher.config.recipes import recipes
from launcher.devices.launch import Launch
from quant_core.errors import ConfigurationError, suggestion


class RecipesOptions(Section):
    """List the configurations that come with the models, for `--config NAME`, or print one."""

    name: Annotated[str | None, POSITIONAL] = Field(
        default=None, description="recipe to print, with its model (MODEL/NAME) where several have it"
    )


def options(name: str) -> type[RecipesOptions]:
    """Return the options of the command."""
    return RecipesOptions


def run(options: RecipesOptions, launch: Launch | None) -> None:
    """Print the list, or the recipes of the name that was given."""
    known = {f"{recipe.model}/{recipe.name}": recipe for recipe in recipes()}
    if options.name is None:
        width = max(map(len, known))
        for name, recipe in known.items():
            print(f"{name:<{width}}  {recipe.summary}")
            print(f"{'':<{width}}  {recipe.measured or 'not measured'}")
        return
    chosen = [recipe for name, recipe in known.items() if options.name in (name, recipe.name)]
    if not chosen:
        raise ConfigurationError(
            f"no recipe is called '{options.name}'",
            where="recipes",
            why=f"there are {', '.join(known)}",
            advice=suggestion(options.name, known),
        )
    print(*(recipe.text for recipe in chosen), sep="---\n", end="")
