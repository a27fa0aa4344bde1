"""Tell whether a command line asks for several ranks: torchrun's own flags in front of the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.cli.command_line import parse
from launcher.cli.commands import commands
from quant_core.errors import ConfigurationError

if TYPE_CHECKING:  # the help of all commands needs the options of none
    from launcher.config.job_config import JobConfig

_COUNT = "nproc_per_node"
# What the names of torchrun's flags begin with that say where several hosts meet.
RENDEZVOUS = ("nnodes", "rdzv", "master", "node_rank", "standalone")


def split_at_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words in front of the first command, and the rest."""
    known = {name.split()[0] for name in commands()}
    index = next((i for i, word in enumerate(words) if word in known), len(words))
    return list(words[:index]), list(words[index:])


def asks_for_ranks(words: Sequence[str]) -> bool:
    """Tell whether the number of processes stands in front of the command.

    Raises ConfigurationError where only other flags of torchrun stand there.
    """
    front, command = split_at_command(words)
    names = flag_names(front)
    if _COUNT in names:
        return True
    if command and (others := [name for name in names if name.startswith(RENDEZVOUS)]):
        raise ConfigurationError(
            f"--{_COUNT} is missing",
            where=f"the flags in front of {command[0]}",
            why=f"--{others[0]} is of use to several ranks, and this says how many start on this host",
            advice=f"--{_COUNT} 2 {' '.join([*front, command[0]])} ...",
        )
    return False


def flag_names(words: Sequence[str]) -> list[str]:
    """Return the names of the flags among words, as both spellings mean them: `--log-dir=x` is log_dir."""
    return [word.split("=", 1)[0].lstrip("-").replace("-", "_") for word in words if word.startswith("-")]


def job_on_ranks(command_words: Sequence[str]) -> JobConfig:
    """Return what the ranks are to run.

    Raises:
        ConfigurationError: the command makes no sense, or it is one that works on files.
    """
    asked = parse(command_words)
    if not asked.command.on_ranks:
        raise ConfigurationError(
            f"{asked.command.name} does not run on several ranks",
            where="--nproc_per_node",
            why="it works on files, in one process",
            advice=f"leave out what stands in front of {asked.command.name}",
        )
    return asked.command.job(asked.options)
