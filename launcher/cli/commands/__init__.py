"""The commands. Each is a row here and a file beside this one; everything else reads the table.

A command's file has two functions and imports no torch, so that `--help` is quick:

    options(name)           the pydantic class whose fields are the flags (`launcher.config.option_flags`)
    run(options, launch)    does the work as the rank that `launch` says; what it needs is imported inside
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from launcher.devices.launch import Launch
from model_adapters import adapter_names


@dataclass(frozen=True)
class Command:
    """What a person types, what it is for, and the module that does it, imported when it is asked for.

    `on_ranks`: it is one program on many ranks; otherwise it works on files, in one process.
    `takes_config`: its options are those of a job, and may come from a YAML file.
    """

    name: str
    summary: str
    module: str
    on_ranks: bool = False
    takes_config: bool = False

    def options(self) -> type[BaseModel]:
        """Return the class of what may follow the command's name."""
        return import_module(self.module).options(self.name)

    def run(self, options: Any, launch: Launch | None) -> None:
        """Run the command with an instance of its options; `launch` is None where the rank's variables contradict."""
        import_module(self.module).run(options, launch)


def commands() -> dict[str, Command]:
    """Return all commands by name, in the order of the help: a job for each model, then what works on its files."""
    jobs = (
        Command(
            model,
            f"Calibrate, quantize and publish {model}, or make images with it.",
            "launcher.cli.commands.job",
            on_ranks=True,
            takes_config=True,
        )
        for model in adapter_names()
    )
    merge = Command("merge", "Publish the shards that an earlier run left unmerged.", "launcher.cli.commands.merge")
    restep = Command("restep", "Copy a checkpoint for another number of steps.", "launcher.cli.commands.restep")
    return {command.name: command for command in (*jobs, merge, restep)}
