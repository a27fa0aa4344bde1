"""Read the command line: its flags are the fields of the configuration, its errors are sentences.

argparse splits the words and prints the help; what a value must be is said once, by pydantic. A value is taken from
the flag, else from the YAML file given by --config, else from the default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from launcher.config.config_errors import Origin, explain, together
from launcher.config.job_config import JobConfig, QuantType, Section, job_config, job_config_class, parse_yaml
from launcher.config.option_flags import Flag, flags_of
from model_adapters import adapter_names
from quant_core.errors import ConfigurationError, nearest

PROGRAM = "python -m launcher"


@dataclass(frozen=True)
class RunJob:
    """Calibrate, quantize and publish, or make images, as the configuration says."""

    config: JobConfig


class MergeFiles(Section):
    """Check the shards that all ranks wrote against each other and publish them again."""

    folder: Path = Field(
        description="folder of the quantized weights",
        validation_alias=AliasChoices("quant_weight_save_folder", "folder"),
    )
    quant_type: QuantType | None = Field(
        default=None, description="scheme of the shards; left out: the only one in the folder"
    )


Command: TypeAlias = RunJob | MergeFiles

# Commands that work on files of an earlier run; their flags are their fields. The other commands are the models.
FILE_COMMANDS: dict[str, type[MergeFiles]] = {"merge": MergeFiles}


def parse(argv: Sequence[str]) -> Command:
    """Return the command that the words of a command line ask for; `--help` prints and exits with 0.

    Raises:
        ConfigurationError: an unknown command or flag, a wrong value or combination; it names all of them.
    """
    name, *words = argv or [""]
    if name in ("-h", "--help"):
        _print_help_and_exit()
    if name in FILE_COMMANDS:
        return _parse_file_command(name, words)
    if name not in adapter_names():
        raise _unknown_command(name)
    return _parse_job(name, words)


def _parse_job(model: str, words: Sequence[str]) -> RunJob:
    options = job_config_class(model)
    flags = flags_of(options)
    parser = _parser(model, options, flags)
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with options, which flags override")
    given = _given(parser, words, flags)
    config_path = given.pop("config", None)
    tree = _read_config(config_path, model) if config_path else {}
    typed = [flag for flag in flags if flag.name in given]
    for flag in typed:
        _put(tree, flag, given[flag.name])
    return RunJob(job_config(model, tree, Origin(frozenset(flag.path for flag in typed), config_path)))


def _parse_file_command(name: str, words: Sequence[str]) -> MergeFiles:
    options = FILE_COMMANDS[name]
    flags = flags_of(options)
    given = _given(_parser(name, options, flags), words, flags)
    try:
        return options.model_validate(given)
    except ValidationError as error:
        raise explain(error, options) from None


class _Parser(argparse.ArgumentParser):
    """Raise an explained error where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            message.removeprefix("argument "),
            where=self.prog,
            why="the words typed do not fit the flags",
            advice=f"{self.prog} --help lists what each flag takes",
        )


def _parser(name: str, options: type[BaseModel], flags: Sequence[Flag]) -> _Parser:
    parser = _Parser(f"{PROGRAM} {name}", description=_summary(options), allow_abbrev=False)
    groups: dict[tuple[str, ...], Any] = {(): parser}
    for flag in flags:
        section = flag.path[:-1]
        if section not in groups:
            groups[section] = parser.add_argument_group(section[-1], _summary(_section_class(options, section[-1])))
        groups[section].add_argument(flag.option, dest=flag.name, default=argparse.SUPPRESS, **_argument(flag))
    return parser


def _argument(flag: Flag) -> dict[str, Any]:
    help_text = flag.help.replace("%", "%%")
    if flag.is_switch:
        return {"action": "store_true", "help": help_text}
    if flag.is_list:
        return {"action": "extend", "nargs": "*", "metavar": flag.metavar, "help": help_text}
    return {"metavar": flag.metavar, "help": help_text}


def _given(parser: _Parser, words: Sequence[str], flags: Sequence[Flag]) -> dict[str, Any]:
    """Return the values of the flags that were typed, as text; a switch is True."""
    known, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise together(_unknown_word(word, parser.prog, flags) for word in _guilty(unknown))
    return {name: value for name, value in vars(known).items() if value is not None}


def _guilty(unknown: Sequence[str]) -> list[str]:
    """Leave out the words that are merely the values of an unknown flag before them."""
    flags = [word for word in unknown if word.startswith("-")]
    return flags or list(unknown)


def _unknown_word(word: str, program: str, flags: Sequence[Flag]) -> ConfigurationError:
    typed = word.split("=", 1)[0]
    names = {"config": "--config"} | {name: flag.option for flag in flags for name in (flag.path[-1], flag.name)}
    close = nearest(typed.lstrip("-"), names)
    return ConfigurationError(
        f"no flag is called '{typed}'" if word.startswith("-") else f"'{word}' belongs to no flag",
        where=program,
        why="an unknown word is refused, so that a typo cannot silently change the job",
        advice=f"{names[close]} (nearest name)" if close else f"{program} --help",
    )


def _unknown_command(name: str) -> ConfigurationError:
    known = [*adapter_names(), *FILE_COMMANDS]
    close = nearest(name, known)
    missing = not name or name.startswith("-")
    return ConfigurationError(
        "the command is missing" if missing else f"no command is called '{name}'",
        where=f"{PROGRAM} {name}".strip(),
        why=f"the first word is one of {', '.join(known)}",
        advice=f"{close} (nearest name)" if close and not missing else f"{PROGRAM} --help",
    )


def _read_config(path: Path, model: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), where=f"--config {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read '{path}'", where="--config", why=str(error), advice="give an existing YAML file"
        ) from None
    named = tree.pop("model", model)
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


def _section_class(options: type[BaseModel], name: str) -> Any:
    return options.model_fields[name].annotation


def _summary(documented: Any) -> str:
    return (documented.__doc__ or "").strip().split("\n", 1)[0]


def _print_help_and_exit() -> NoReturn:
    summaries = {name: f"Quantize a {name} pipeline, or make images with it." for name in adapter_names()}
    summaries |= {name: _summary(options) for name, options in FILE_COMMANDS.items()}
    lines = [f"  {name:<8} {summary}" for name, summary in summaries.items()]
    print(f"usage: {PROGRAM} COMMAND [flags]\n\ncommands:", *lines, sep="\n")
    print(f"\n{PROGRAM} COMMAND --help lists the flags of a command.")
    raise SystemExit(0)
