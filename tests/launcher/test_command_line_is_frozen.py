"""The command line is a promise: every command, flag, default and choice stands in tests/data/command_line.yaml.

A change that is meant is one more file in the same commit, written by

    python -m tests.launcher.test_command_line_is_frozen
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launcher.cli.commands import Command, commands
from launcher.cli.flag_parser import CONFIG, WRITE_CONFIG
from launcher.config.option_flags import Flag, flags_of

FROZEN = Path(__file__).resolve().parents[1] / "data" / "command_line.yaml"
REGENERATE = "python -m tests.launcher.test_command_line_is_frozen"
HEADER = f"# Every command with its flags, as they are promised. Written by {REGENERATE}\n"


def described(flag: Flag) -> dict[str, Any]:
    """Return what a user may rely on of a flag; what is not said is not so."""
    takes = "nothing" if flag.is_switch else " | ".join(flag.choices) or flag.metavar
    facts = {
        "takes": takes,
        "several": flag.is_list,
        "also": flag.word if flag.is_positional else None,
        "required": flag.field.is_required(),
        "default": flag.default,
        "section": ".".join(flag.path[:-1]),
        "help": "" if flag.field.description else "missing",
    }
    said = {name: value for name, value in facts.items() if value is not None and value is not False and value != ""}
    return {name: plain(value) for name, value in said.items()}


def plain(value: object) -> object:
    return value if isinstance(value, (bool, int, float)) else str(value)


def flags(command: Command) -> dict[str, Any]:
    config = {f"--{CONFIG}": {"takes": "FILE"}, f"--{WRITE_CONFIG}": {"takes": "FILE"}} if command.takes_config else {}
    return {flag.option: described(flag) for flag in flags_of(command.options())} | config


def command_line() -> dict[str, Any]:
    """Return the command line of this version."""
    return {
        name: {"summary": command.summary, "runs on": "ranks" if command.on_ranks else "files", "flags": flags(command)}
        for name, command in commands().items()
    }


def facts(tree: dict[str, Any]) -> dict[str, object]:
    """Return the tree as one line for each thing that can change."""
    told: dict[str, object] = {}
    for name, command in tree.items():
        told[f"command {name}"] = f"{command['summary']} On {command['runs on']}."
        told |= {f"flag {name} {flag}": description for flag, description in command["flags"].items()}
    return told


def test_the_command_line_is_the_promised_one() -> None:
    promised, present = facts(yaml.safe_load(FROZEN.read_text())), facts(command_line())
    changes = [
        f"{what}: {promised.get(what, 'not there')} -> {present.get(what, 'gone')}"
        for what in {**promised, **present}
        if promised.get(what) != present.get(what)
    ]
    assert not changes, "\n".join(["the command line changed:", *changes, f"if meant, regenerate with {REGENERATE}"])


def test_the_flags_of_a_command_stand_in_the_promised_order() -> None:
    """The help lists them in this order."""
    for name, command in yaml.safe_load(FROZEN.read_text()).items():
        assert list(command["flags"]) == list(flags(commands()[name])), f"if meant, regenerate with {REGENERATE}"


def write() -> None:
    """Freeze the command line of this version."""
    text = yaml.safe_dump(command_line(), sort_keys=False, default_flow_style=None, width=1000)
    FROZEN.write_text(HEADER + text)


if __name__ == "__main__":
    write()
