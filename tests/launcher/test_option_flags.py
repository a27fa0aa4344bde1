"""Fields become flags, and a marked field a word that may stand alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from launcher.cli.commands import Command, commands
from launcher.cli.flag_parser import flag_parser, typed_values
from launcher.config.option_flags import POSITIONAL, flags_of
from quant_core.errors import ConfigurationError

# Options that are paths and kept as text.
PATHS_AS_TEXT = {"path", "transformer", "prompt_path", "info_file_save_path"}


class Comparison(BaseModel):
    """What a command that compares two folders might take."""

    first: Annotated[Path, POSITIONAL] = Field(description="one folder")
    second: Annotated[Path | None, POSITIONAL] = Field(default=None, description="the other folder")
    json_lines: bool = Field(default=False, description="print JSON")
    names: tuple[str, ...] = Field(default=(), description="layers to compare")
    words: tuple[str, ...] = Field(default=("one", "two"), description="words")
    table: dict[str, float] = Field(default_factory=dict, description="a table")
    made: float = Field(default_factory=lambda: 0.5, description="a number")


def typed(*words: str) -> dict[str, object]:
    flags = flags_of(Comparison)
    parser = flag_parser(Command("compare", "Compare.", "nowhere"), Comparison, flags)
    return typed_values(parser, words, flags)


@pytest.mark.parametrize(
    "words",
    [
        ("a", "b", "--json_lines"),
        ("--json_lines", "a", "b"),
        ("a", "--json_lines", "b"),
        ("--second", "b", "--json_lines", "a"),
        ("--json_lines", "--second=b", "--first", "a"),
    ],
)
def test_words_are_given_to_the_positional_fields_in_order_wherever_they_stand(words: tuple[str, ...]) -> None:
    assert typed(*words) == {"first": "a", "second": "b", "json_lines": True}


def test_the_help_tells_defaults_as_they_are_typed_and_none_that_are_empty() -> None:
    told = {flag.name: flag.help for flag in flags_of(Comparison)}
    assert told["words"] == "words (default: one two)"
    assert told["made"] == "a number (default: 0.5)"
    assert (told["table"], told["names"], told["second"]) == ("a table", "layers to compare", "the other folder")


def test_what_is_not_typed_has_no_value() -> None:
    assert typed() == {}
    assert typed("a") == {"first": "a"}


def test_a_value_cannot_be_typed_with_its_flag_and_without() -> None:
    with pytest.raises(ConfigurationError, match="FIRST and --first are two names of one option"):
        typed("a", "--first", "b")


def test_a_word_too_many_belongs_to_nothing() -> None:
    with pytest.raises(ConfigurationError, match="'c' belongs to no flag"):
        typed("a", "b", "c")


@pytest.mark.parametrize("command", commands())
def test_every_path_refuses_the_empty_text_and_knows_the_users_folder(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for flag in flags_of(commands()[command].options()):
        if Path in flag.kinds or flag.path[-1] in PATHS_AS_TEXT:
            path = TypeAdapter(flag.field.rebuild_annotation())
            assert str(path.validate_python("~/a/./b")).startswith("/home/somebody/a"), flag.option
            assert str(path.validate_python("a~/~b")) == "a~/~b"
            for wrong, why in (("", "it is empty"), (" ", "it is empty"), ("~nobody-here/a", "no user is called")):
                with pytest.raises(ValidationError, match=why):
                    path.validate_python(wrong)
