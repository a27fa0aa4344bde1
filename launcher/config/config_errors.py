"""Turn what pydantic says of a configuration into errors for people: all of them, each naming its flag."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from launcher.config.option_flags import Flag, flags_of
from quant_core.errors import ConfigurationError, suggestion

Options = TypeVar("Options", bound=BaseModel)


class ConfigurationErrors(ConfigurationError):
    """Carry several problems of one configuration; prints them all, four lines each."""

    def __init__(self, problems: Sequence[ConfigurationError]) -> None:
        first = problems[0]
        super().__init__(first.what, where=first.where, why=first.why, advice=first.advice)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)


def together(problems: Iterable[ConfigurationError]) -> ConfigurationError:
    """Return one error for one or more problems, flattening those that already hold several."""
    flat = [part for problem in problems for part in getattr(problem, "problems", (problem,))]
    return flat[0] if len(flat) == 1 else ConfigurationErrors(flat)


@dataclass(frozen=True)
class Origin:
    """Remember which options were typed as flags; the others come from the file `config`, if there is one."""

    typed: frozenset[tuple[str, ...]] = field(default_factory=frozenset)
    config: Path | None = None

    def where(self, path: tuple[str, ...], option: str) -> str:
        """Say where a value came from, with the flag that sets it."""
        if path in self.typed or self.config is None:
            return option
        return f"{option}, or {'.'.join(path)} in {self.config}"


def validated(options: type[Options], tree: Mapping[str, Any], origin: Origin | None = None) -> Options:
    """Return the tree as an instance of `options`.

    Raises:
        ConfigurationError: naming every wrong option, `origin` saying where each came from.
    """
    try:
        return options.model_validate(tree)
    except ValidationError as error:
        reader = _Reader(options, flags_of(options), origin or Origin())
        raise together(_once(reader.read(entry) for entry in error.errors(include_url=False))) from None


def _once(problems: Iterable[ConfigurationError]) -> list[ConfigurationError]:
    """Return one problem for a value that fits none of the kinds an option takes, and not one for each kind."""
    found: dict[tuple[str, str], ConfigurationError] = {}
    for problem in problems:
        place = problem.what, problem.where
        if known := found.get(place):
            problem.why = f"{known.why}, or {problem.why}"
        found[place] = problem
    return list(found.values())


@dataclass(frozen=True)
class _Reader:
    options: type[BaseModel]
    flags: list[Flag]
    origin: Origin

    def read(self, entry: Any) -> ConfigurationError:
        """Return one of pydantic's problems as an explained error."""
        told = entry.get("ctx", {}).get("error")
        if isinstance(told, ConfigurationError):
            return told
        location = tuple(str(part) for part in entry["loc"])
        flag = self._flag_at(location)
        if entry["type"] == "extra_forbidden":
            return self._unknown_key(location)
        if entry["type"] == "model_type":
            return self._no_section(location, entry["input"])
        if flag is None:
            return self._misfit(location, entry["msg"])
        if entry["type"] == "missing":
            return self._missing(flag)
        return self._bad_value(flag, entry["input"], entry["msg"])

    def _flag_at(self, location: tuple[str, ...]) -> Flag | None:
        """Find the flag by its path or alias; deeper parts of a location (an index, a union's branch) are dropped."""
        for length in range(len(location), 0, -1):
            head = location[:length]
            for flag in self.flags:
                if head in (flag.path, (*flag.path[:-1], flag.name)):
                    return flag
        return None

    def _missing(self, flag: Flag) -> ConfigurationError:
        return ConfigurationError(
            f"{flag.option} is missing",
            where=self.origin.where(flag.path, flag.option),
            why=f"it has no default: {flag.field.description}",
            advice=f"add {flag.usage}",
        )

    def _unknown_key(self, location: tuple[str, ...]) -> ConfigurationError:
        *section, key = location
        siblings = _keys_of(self.options, section)
        home = next((flag for flag in self.flags if key in (flag.path[-1], flag.name)), None)
        if home is not None and len(home.path) > 1:
            advice = f"move it into the section {home.path[0]}:"
        else:
            advice = suggestion(key, siblings)
        return ConfigurationError(
            f"no option is called '{key}'",
            where=f"{'.'.join(location)}{f' in {self.origin.config}' if self.origin.config else ''}",
            why="an unknown key is refused, so that a typo cannot silently change the job",
            advice=advice,
        )

    def _bad_value(self, flag: Flag, value: object, message: str) -> ConfigurationError:
        return ConfigurationError(
            f"{flag.option} cannot be {value!r}",
            where=self.origin.where(flag.path, flag.option),
            why=_plain(message),
            advice=_advice(flag, value),
        )

    def _no_section(self, location: tuple[str, ...], value: object) -> ConfigurationError:
        section = ".".join(location)
        return ConfigurationError(
            f"the section {section} cannot be {value!r}",
            where=f"{section} in {self.origin.config or 'the options'}",
            why="a section maps the names of options to their values",
            advice=f"options of this section: {', '.join(_keys_of(self.options, location))}",
        )

    def _misfit(self, location: tuple[str, ...], message: str) -> ConfigurationError:
        """Explain options of one section that an adapter's own rule refuses together."""
        text = _plain(message)
        named = [flag.option for flag in self.flags if flag.path[-1] in re.findall(r"\w+", text)]
        return ConfigurationError(
            text,
            where=", ".join(named) or ".".join(location),
            why="options of one section must fit each other",
            advice="change one of them",
        )


def _keys_of(options: type[BaseModel], section: Sequence[str]) -> list[str]:
    for name in section:
        inner = options.model_fields[name].annotation if name in options.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        options = inner
    return list(options.model_fields)


def _plain(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text.replace("Input should be", "it must be")


def _advice(flag: Flag, value: object) -> str:
    if flag.choices:
        return suggestion(str(value), flag.choices)
    if flag.field.is_required():
        return f"{flag.usage}: {flag.field.description}"
    what = flag.field.description
    return f"{what}; leave the flag out for the default, {flag.default}" if flag.default is not None else f"{what}"
