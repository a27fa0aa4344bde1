"""Tell whether a command line asks for several ranks: torchrun's own flags in front of the command."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.cli.command_line import FILE_COMMANDS
from model_adapters import adapter_names

_COUNT = ("--nproc_per_node", "--nproc-per-node")


def split_at_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words in front of the first command, and the rest."""
    commands = {*adapter_names(), *FILE_COMMANDS}
    index = next((i for i, word in enumerate(words) if word in commands), len(words))
    return list(words[:index]), list(words[index:])


def asks_for_ranks(words: Sequence[str]) -> bool:
    """Tell whether the number of processes stands in front of the command."""
    return any(word.split("=", 1)[0] in _COUNT for word in split_at_command(words)[0])
