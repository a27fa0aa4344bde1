"""Read the command line: its flags are the fields of a command's options, its errors are sentences.

argparse splits the words and prints the help (`flag_parser`); what a value must be is said once, by pydantic. A value
is taken from the flag, else from the YAML file given by --config, else from the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from launcher.cli.commands import Command, commands
from launcher.cli.flag_parser import CONFIG, PROGRAM, flag_parser, typed_values
from launcher.config.config_errors import Origin, validated
from launcher.config.option_flags import Flag, flags_of
from launcher.config.yaml_text import parse_yaml
from launcher.devices.launch import Launch
from quant_core.errors import ConfigurationError, suggestion


@dataclass(frozen=True)
class Invocation:
    """A command with its options, ready to run."""

    command: Command
    options: Any

    def run(self, launch: Launch | None) -> None:
        """Run the command in this process, which is the rank that `launch` says."""
        self.command.run(self.options, launch)


def parse(argv: Sequence[str]) -> Invocation:
    """Return what the words of a command line ask for; `--help` prints and exits with 0.

    Raises:
        ConfigurationError: an unknown command or flag, a wrong value or combination; it names all of them.
    """
    name, *words = argv or [""]
    if words and f"{name} {words[0]}" in commands():
        name, words = f"{name} {words[0]}", words[1:]
    if name in ("-h", "--help"):
        _print_help_and_exit()
    command = commands().get(name)
    if command is None:
        raise _unknown_command(name)
    options = command.options()
    flags = flags_of(options)
    given = typed_values(flag_parser(command, options, flags), words, flags)
    config = Path(given.pop(CONFIG)) if CONFIG in given else None
    tree = _read_config(config, options) if config else {}
    typed = [flag for flag in flags if flag.name in given]
    for flag in typed:
        _put(tree, flag, given[flag.name])
    return Invocation(command, validated(options, tree, Origin(frozenset(flag.path for flag in typed), config)))


def _unknown_command(name: str) -> ConfigurationError:
    known = list(commands())
    missing = not name or name.startswith("-")
    return ConfigurationError(
        "the command is missing" if missing else f"no command is called '{name}'",
        where=f"{PROGRAM} {name}".strip(),
        why=f"the first word is one of {', '.join(known)}",
        advice=suggestion(name, () if missing else known, f"{PROGRAM} --help"),
    )


def _read_config(path: Path, options: type[BaseModel]) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), where=f"--config {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read '{path}'", where="--config", why=str(error), advice="give an existing YAML file"
        ) from None
    model = options.model_fields["model"].default
    named = tree.get("model", model)
    if named != model:
        raise ConfigurationError(
            f"'{path}' configures {named}, not {model}",
            where=f"--config {path}, model",
            why="options of one model do not fit another",
            advice=f"{PROGRAM} {named} --config {path}",
        )
    return tree


def _put(tree: dict[str, Any], flag: Flag, value: object) -> None:
    """Set a value in the tree, in place of what the file says under the flag's name or its field's."""
    *sections, name = flag.path
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return  # the configuration refuses the section itself
    tree.pop(flag.name, None)
    tree[name] = value


def _print_help_and_exit() -> NoReturn:
    lines = [f"  {command.name:<10} {command.summary}" for command in commands().values()]
    print(f"usage: {PROGRAM} COMMAND [flags]\n\ncommands:", *lines, sep="\n")
    print(f"\n{PROGRAM} COMMAND --help lists the flags of a command.")
    raise SystemExit(0)
