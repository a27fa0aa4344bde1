"""Split the words behind a command's name into flags and their values, and print its help: what argparse is for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import BaseModel

from launcher.cli.commands import Command
from launcher.config.config_errors import together
from launcher.config.option_flags import Flag
from quant_core.errors import ConfigurationError, nearest

PROGRAM = "python -m launcher"
# The flags that are no options of the job: where options are read from, and where the resolved ones are written to.
CONFIG, WRITE_CONFIG = "config", "write_config"
# Flag -> what stands for its value, and its help.
_ABOUT_OPTIONS = {
    CONFIG: ("NAME|FILE", "a recipe's name, or a YAML file with options; flags override them"),
    WRITE_CONFIG: ("FILE", "write the resolved options as YAML, for --config, and do nothing else"),
}


class _Parser(argparse.ArgumentParser):
    """Raise an explained error where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            message.removeprefix("argument "),
            where=self.prog,
            why="the words typed do not fit the flags",
            advice=f"{self.prog} --help lists what each flag takes",
        )


def flag_parser(command: Command, options: type[BaseModel], flags: Sequence[Flag]) -> argparse.ArgumentParser:
    """Return a parser of a command's flags, one group of them for each section of its options."""
    parser = _Parser(f"{PROGRAM} {command.name}", description=command.summary, allow_abbrev=False)
    groups: dict[tuple[str, ...], Any] = {(): parser}
    for flag in flags:
        section = flag.path[:-1]
        if section not in groups:
            groups[section] = parser.add_argument_group(section[-1], _summary(options, section[-1]))
        groups[section].add_argument(flag.option, dest=flag.name, default=argparse.SUPPRESS, **_argument(flag))
        if flag.is_positional:
            parser.add_argument(flag.word, nargs="?", default=argparse.SUPPRESS, help=f"the same as {flag.option}")
    if command.takes_config:
        for name, (metavar, text) in _ABOUT_OPTIONS.items():
            parser.add_argument(f"--{name}", metavar=metavar, help=text)
    return parser


def typed_values(parser: argparse.ArgumentParser, words: Sequence[str], flags: Sequence[Flag]) -> dict[str, Any]:
    """Return the values that were typed, as text, by the names of their flags; a switch is True.

    Raises:
        ConfigurationError: a flag without its value, an unknown word, a value given with its flag and without it. Of a
            flag given twice the last one counts, as users of argparse expect.
    """
    # Intermixed: a word may stand behind the flags as well as in front of them.
    known, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        raise together(_unknown_word(word, parser.prog, flags) for word in _guilty(unknown))
    values = {name: value for name, value in vars(known).items() if value is not None}
    for flag in flags:
        if flag.is_positional and flag.word in values:
            if flag.name in values:
                parser.error(f"{flag.word} and {flag.option} are two names of one option")
            values[flag.name] = values.pop(flag.word)
    return values


def _argument(flag: Flag) -> dict[str, Any]:
    help_text = flag.help.replace("%", "%%")
    if flag.is_switch:
        return {"action": "store_true", "help": help_text}
    if flag.is_list:
        return {"action": "extend", "nargs": "*", "metavar": flag.metavar, "help": help_text}
    return {"metavar": flag.metavar, "help": help_text}


def _guilty(unknown: Sequence[str]) -> list[str]:
    """Leave out the words that are merely the values of an unknown flag before them."""
    flags = [word for word in unknown if word.startswith("-")]
    return flags or list(unknown)


def _unknown_word(word: str, program: str, flags: Sequence[Flag]) -> ConfigurationError:
    typed = word.split("=", 1)[0]
    names = {name: f"--{name}" for name in _ABOUT_OPTIONS} | {
        name: flag.option for flag in flags for name in (flag.path[-1], flag.name)
    }
    close = nearest(typed.lstrip("-"), names)
    return ConfigurationError(
        f"no flag is called '{typed}'" if word.startswith("-") else f"'{word}' belongs to no flag",
        where=program,
        why="an unknown word is refused, so that a typo cannot silently change the job",
        advice=f"{names[close]} (nearest name)" if close else f"{program} --help",
    )


def _summary(options: type[BaseModel], section: str) -> str:
    documented = options.model_fields[section].annotation
    return (documented.__doc__ or "").strip().split("\n", 1)[0]
