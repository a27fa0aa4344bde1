"""See a tree of pydantic options as a flat list of flags, the way the command line and its errors name them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

_METAVARS = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Positional:
    """Mark a field, `Annotated[Path, POSITIONAL]`, whose value may be typed without its flag: `merge FOLDER`."""


POSITIONAL = Positional()


@dataclass(frozen=True)
class Flag:
    """Join a field of the options with its place in the tree and its name on the command line.

    `path` leads from the root of the tree to the field: `("quantization", "quant_type")` is `--quant_type`.
    """

    name: str
    path: tuple[str, ...]
    field: FieldInfo

    @property
    def option(self) -> str:
        """What is typed: `--quant_type`."""
        return f"--{self.name}"

    @property
    def kinds(self) -> list[object]:
        """The types that a value may have, without None."""
        return [kind for kind in _alternatives(self.field.annotation) if kind is not type(None)]

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands alone, without a value."""
        return self.kinds == [bool]

    @property
    def is_positional(self) -> bool:
        """Whether the value may also stand alone, without the flag."""
        return POSITIONAL in self.field.metadata

    @property
    def word(self) -> str:
        """What stands in the help for the value of a positional one: `FOLDER`."""
        return self.path[-1].upper()

    @property
    def usage(self) -> str:
        """How its value is typed: `--width N`, or `FOLDER, or --folder PATH`."""
        typed = f"{self.option} {self.metavar}"
        return f"{self.word}, or {typed}" if self.is_positional else typed

    @property
    def is_list(self) -> bool:
        """Whether the flag takes any number of values."""
        return any(get_origin(kind) in (list, tuple, dict) for kind in self.kinds)

    @property
    def choices(self) -> list[str]:
        """The values it accepts, when they can be counted."""
        literals = [kind for kind in self.kinds if get_origin(kind) is Literal]
        return [str(choice) for kind in literals for choice in get_args(kind)] if literals == self.kinds else []

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if get_origin(self.kinds[0]) is dict:
            return "NAME=X" if get_args(self.kinds[0])[1] is float else "PATTERN=SCHEME"
        kind = get_args(self.kinds[0])[0] if self.is_list else self.kinds[0]
        return next((text for type_, text in _METAVARS.items() if kind is type_), "PATH")

    @property
    def default(self) -> Any:
        """The value that it has when it is left out; None, where it is required, too."""
        return None if self.field.is_required() else self.field.get_default(call_default_factory=True)

    @property
    def help(self) -> str:
        """What the flag does, and its default."""
        if self.field.is_required():
            remark = " (required)"
        elif self.default in (None, (), {}) or self.is_switch:
            remark = ""
        else:
            remark = f" (default: {_words(self.default)})"
        return f"{self.field.description or self.name}{remark}"


def _words(value: object) -> str:
    """Write a value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flags_of(options: type[BaseModel]) -> list[Flag]:
    """List the flags of an options class and of the sections in it, in the order of declaration.

    A field without a description is no flag: nobody could know what to give it.
    """
    return list(_walk(options, ()))


def _walk(options: type[BaseModel], path: tuple[str, ...]) -> Iterator[Flag]:
    for name, field in options.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, (*path, name))
        elif field.description:
            yield Flag(_flag_name(name, field), (*path, name), field)


def _flag_name(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias
    first = alias.choices[0] if isinstance(alias, AliasChoices) else alias
    return first if isinstance(first, str) else name


def _alternatives(annotation: Any) -> list[object]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [annotation]
