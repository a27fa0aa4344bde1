"""The commands. Each is a row here and a file beside this one; everything else reads the table.

A command's file has these functions and imports no torch, so that `--help` is quick:

    options(name)           the pydantic class whose fields are the flags (`launcher.config.option_flags`)
    run(options, launch)    does the work as the rank that `launch` says; what it needs is imported inside
    job(options)            of a command that runs on ranks: the configuration of what they do
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from launcher.devices.launch import Launch
from model_adapters import adapter_names

if TYPE_CHECKING:  # the help of all commands needs the options of none
    from launcher.config.job_config import JobConfig


@dataclass(frozen=True)
class Command:
    """What a person types, one word or two, what it is for, and the module that does it, imported when asked for.

    `on_ranks`: it is one program on many ranks; otherwise it works on files, in one process.
    `takes_config`: its options are those of a job, and may come from a YAML file. `example`: of a command that a first
    day needs, what to type.
    """

    name: str
    summary: str
    module: str
    on_ranks: bool = False
    takes_config: bool = False
    example: str = ""

    def options(self) -> type[BaseModel]:
        """Return the class of what may follow the command's name."""
        return import_module(self.module).options(self.name)

    def job(self, options: Any) -> JobConfig:
        """Return what a command that runs on ranks has them do."""
        return import_module(self.module).job(options)

    def run(self, options: Any, launch: Launch | None) -> None:
        """Run the command with an instance of its options; `launch` is None where the rank's variables contradict."""
        import_module(self.module).run(options, launch)


# The job of the examples: what a person has is the model's folder.
_FIRST_JOB = "--config quality --path FOLDER --tp_size 2"
# In the order of the help: what is of use before a job, and what works on its files.
_BEFORE = (
    Command(
        "doctor",
        "Look at this machine: what would stand in a job's way.",
        "launcher.cli.commands.doctor",
        example="python -m launcher doctor --ranks 2",
    ),
    Command(
        "recipes",
        "List the configurations that come with the models, or print one.",
        "launcher.cli.commands.recipes",
        example="python -m launcher recipes",
    ),
)
_AFTER = (
    Command(
        "evaluate",
        "Measure a published checkpoint against its float model.",
        "launcher.cli.commands.evaluate",
        on_ranks=True,
    ),
    Command("merge", "Publish the shards that an earlier run left unmerged.", "launcher.cli.commands.merge"),
    Command("verify", "Check a published checkpoint by every rule.", "launcher.cli.commands.verify"),
    Command(
        "report",
        "Tell of a published checkpoint what a person wants to know, in one page.",
        "launcher.cli.commands.report",
        example="python -m launcher report results/safetensors",
    ),
    Command("diff", "Compare two published checkpoints.", "launcher.cli.commands.diff"),
    Command("restep", "Copy a checkpoint for another number of steps.", "launcher.cli.commands.restep"),
    Command("trace", "Show what each rank of a job did when.", "launcher.cli.commands.trace"),
)


def commands() -> dict[str, Command]:
    """Return all commands by name, in the order of the help."""
    jobs = (
        Command(
            model,
            f"Calibrate, quantize and publish {model}, or make images with it.",
            "launcher.cli.commands.job",
            on_ranks=True,
            takes_config=True,
            example=f"torchrun --nproc_per_node 2 -m launcher {model} {_FIRST_JOB}" if index == 0 else "",
        )
        for index, model in enumerate(adapter_names())
    )
    plans = (
        Command(
            f"plan {model}",
            f"Say what a job of {model} would do, and all that keeps it from starting.",
            "launcher.cli.commands.plan",
            takes_config=True,
            example=f"python -m launcher plan {model} {_FIRST_JOB}" if index == 0 else "",
        )
        for index, model in enumerate(adapter_names())
    )
    return {command.name: command for command in (*_BEFORE, *plans, *jobs, *_AFTER)}
