"""Read which layers get another scheme: words of a command line, a map in YAML, or a file that holds one.

    --layer_schemes 'transformer_blocks.0.*=w8a8_dynamic' '*.norm*.linear=w8a16' '*net.2*=float'
    --layer_schemes @quant_decisions.yaml

A value is a scheme's name or `float`; `:plain` behind a scheme keeps outlier suppression away from the layer. The order
counts: the first pattern that matches a layer decides. A layer that a file names is left out behind words that match
it, so that they win over a table of what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

from launcher.config.yaml_text import parse_yaml
from quant_core.errors import ConfigurationError, suggestion
from quant_core.schemes import SCHEMES
from quant_core.schemes.treatment import FLOAT, PLAIN, Treatment

FLAG = "--layer_schemes"
# In a file that holds more than the map, its key, and that of the options with which the map was found good.
KEY = "layer_schemes"
HOLDS_WITH = "holds_with"


def read_layer_schemes(given: Any) -> Any:
    """Return the map in the order given; raises ConfigurationError for what is none, naming the word or the file."""
    if isinstance(given, Mapping):
        return dict(_checked(given.items(), FLAG))
    if not isinstance(given, (list, tuple)):
        return given
    found: dict[str, str] = {}
    for word in map(str, given):
        in_front = list(found) if word.startswith("@") else []
        for pattern, value in _rules(word):
            if not (in_front and _is_layer_of(pattern, in_front)):
                found.setdefault(pattern, value)
    return found


LayerSchemes = Annotated[dict[str, str], BeforeValidator(read_layer_schemes)]


def require_options_of_files(given: Any, options: BaseModel) -> None:
    """Refuse a file that says which options its schemes were chosen with, where the job has others.

    A scheme may be good only with the smoothing that it was measured with. A file written by hand says nothing.
    """
    for word in map(str, given if isinstance(given, (list, tuple)) else ()):
        held = _read(_path(word)).get(HOLDS_WITH) if word.startswith("@") else None
        wanted = {str(name): value for name, value in held.items()} if isinstance(held, Mapping) else {}
        other = {name: value for name, value in wanted.items() if getattr(options, name, None) != value}
        if other:
            differences = [f"{name} is {value}, and the job's {_said(options, name)}" for name, value in other.items()]
            raise ConfigurationError(
                f"the schemes in '{_path(word)}' were chosen with other options",
                where=", ".join(f"--{name}" for name in other),
                why="; ".join(differences),
                advice=f"add {' '.join(words_of(other))}, or take {HOLDS_WITH} out of the file",
            )


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Return options as they are typed; one without a value is a switch."""
    return [word for name, value in options.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]


def _is_layer_of(name: str, patterns: list[str]) -> bool:
    from quant_core.naming import is_name, matches  # with torch, which a command line without such a file does not need

    return is_name(name) and matches(name, patterns)


def _said(options: BaseModel, name: str) -> str:
    value = getattr(options, name, None)
    return "is left out" if value is None else f"is {value}"


def _rules(word: str) -> Iterable[tuple[str, str]]:
    if word.startswith("@"):
        return _of_file(_path(word))
    pattern, equals, value = word.rpartition("=")
    if not (pattern and equals):
        raise ConfigurationError(
            f"'{word}' names no scheme",
            where=FLAG,
            why="a word is PATTERN=SCHEME, or @FILE",
            advice=f"'{word.strip('=') or '*'}=w8a8_dynamic'",
        )
    return _checked([(pattern, value)], FLAG)


def _path(word: str) -> Path:
    return Path(word[1:]).expanduser()


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), where=f"{FLAG} @{path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read '{path}'", where=FLAG, why=str(error), advice="give an existing YAML or JSON file"
        ) from None


def _of_file(path: Path) -> Iterable[tuple[str, str]]:
    where, tree = f"{FLAG} @{path}", _read(path)
    rules = tree.get(KEY, tree)
    if not isinstance(rules, Mapping):
        raise ConfigurationError(
            f"'{path}' holds no map of patterns to schemes",
            where=where,
            why=f"its {KEY} is a {type(rules).__name__}",
            advice="one line for each pattern: PATTERN: SCHEME",
        )
    return _checked(rules.items(), where)


def _checked(rules: Iterable[tuple[Any, Any]], where: str) -> Iterable[tuple[str, str]]:
    names = (*SCHEMES, FLOAT)
    for pattern, value in rules:
        if Treatment.of(str(value)).scheme not in names or str(value) == FLOAT + PLAIN:
            raise ConfigurationError(
                f"no scheme is called '{value}'",
                where=f"{where}, {pattern}",
                why=f"a layer can be {', '.join(names)}; {PLAIN} behind a scheme leaves it without outlier suppression",
                advice=suggestion(str(value), names),
            )
        yield str(pattern), str(value)
