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
from launcher.cli.flag_parser import CONFIG, PROGRAM, WRITE_CONFIG, flag_parser, typed_values
from launcher.config.config_errors import Origin, validated
from launcher.config.option_flags import Flag, flags_of
from launcher.config.recipes import MEASURED, config_path
from launcher.config.stored_job import STARTED_IN
from launcher.config.yaml_text import commented_yaml, parse_yaml
from launcher.devices.launch import Launch
from quant_core.atomic_file import write_text_atomically
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
        raise _unknown_command(name, words)
    options = command.options()
    flags = flags_of(options)
    given = typed_values(flag_parser(command, options, flags), words, flags)
    config = config_path(name.split()[-1], given.pop(CONFIG)) if CONFIG in given else None
    written = given.pop(WRITE_CONFIG, None)
    tree = _read_config(config, name, options) if config else {}
    typed = [flag for flag in flags if flag.name in given]
    for flag in typed:
        _put(tree, flag, given[flag.name])
    resolved = validated(options, tree, Origin(frozenset(flag.path for flag in typed), config))
    if written is not None:
        _write_config_and_exit(Path(written).expanduser(), resolved)
    return Invocation(command, resolved)


def _unknown_command(name: str, words: Sequence[str]) -> ConfigurationError:
    known = list(commands())
    if models := [each.removeprefix(f"{name} ") for each in known if each.startswith(f"{name} ")]:
        return _unknown_model(name, next((word for word in words if not word.startswith("-")), ""), models)
    missing = not name or name.startswith("-")
    return ConfigurationError(
        "the command is missing" if missing else f"no command is called '{name}'",
        where=f"{PROGRAM} {name}".strip(),
        why=f"the first word is one of {', '.join(known)}",
        advice=suggestion(name, () if missing else known, f"{PROGRAM} --help"),
    )


def _unknown_model(command: str, given: str, models: Sequence[str]) -> ConfigurationError:
    """Explain a command of two words, without its second one or with a wrong one."""
    return ConfigurationError(
        f"no model is called '{given}'" if given else f"'{command}' of which model?",
        where=f"{PROGRAM} {command} {given}".strip(),
        why=f"the word behind {command} is one of {', '.join(models)}",
        advice=suggestion(given, models, f"{PROGRAM} {command} {models[0]} --help"),
    )


def _read_config(path: Path, command: str, options: type[BaseModel]) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), where=f"--config {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read '{path}'", where="--config", why=str(error), advice="give an existing YAML file"
        ) from None
    for no_option in (MEASURED, STARTED_IN):
        tree.pop(no_option, None)
    model = options.model_fields["model"].default
    named = tree.get("model", model)
    if named != model:
        raise ConfigurationError(
            f"'{path}' configures {named}, not {model}",
            where=f"--config {path}, model",
            why="options of one model do not fit another",
            advice=f"{PROGRAM} {' '.join([*command.split()[:-1], str(named)])} --config {path}",
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


def _write_config_and_exit(path: Path, resolved: BaseModel) -> NoReturn:
    try:
        write_text_atomically(path, commented_yaml(resolved))
    except OSError as error:
        raise ConfigurationError(
            f"cannot write '{path}'", where="--write_config", why=str(error), advice="choose another file"
        ) from None
    print(f"{path}: the options of this job, for --config")
    raise SystemExit(0)


def _print_help_and_exit() -> NoReturn:
    width = max(map(len, commands()))
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in commands().values()]
    print(f"usage: {PROGRAM} COMMAND [flags]\n\ncommands:", *lines, sep="\n")
    print("\na first day:", *(f"  {command.example}" for command in commands().values() if command.example), sep="\n")
    print(f"\n{PROGRAM} COMMAND --help lists the flags of a command.")
    raise SystemExit(0)
