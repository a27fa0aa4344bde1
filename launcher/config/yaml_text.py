"""Options as YAML: read as a tree, written with what each option is for as a comment.

The library is imported where it is used: `--help` needs none and must be quick.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from quant_core.errors import ConfigurationError


def parse_yaml(text: str, *, where: str = "--config") -> dict[str, Any]:
    """Read YAML text as a tree of options; the empty text is the empty tree, and an empty section is left out.

    Raises:
        ConfigurationError: it is not YAML, or no mapping, or gives a key twice.
    """
    import yaml

    try:
        tree = yaml.load(text, _loader(where))
    except yaml.YAMLError as error:
        raise ConfigurationError(
            "the configuration is not YAML", where=where, why=" ".join(str(error).split()), advice="correct that line"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigurationError(
            f"the configuration is a {type(tree).__name__}, not a mapping",
            where=where,
            why="it holds the sections model, pipeline, quantization, ranks, output, evaluation",
            advice="start from the configuration that a run stores beside its output",
        )
    return {str(key): value for key, value in tree.items() if value is not None}


def _loader(where: str) -> Any:
    """Return YAML's safe loader, which takes the last of two values for one key without a word, without that."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """Read a mapping; raises ConfigurationError where it gives a key twice."""
            lines: dict[str, int] = {}
            for key, _ in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    raise ConfigurationError(
                        f"'{name}' is given twice",
                        where=f"{where}, lines {lines[name]} and {line}",
                        why="only one of the two values would count",
                        advice="take one of them out",
                    )
                lines[name] = line
            return super().construct_mapping(node, deep)

    return Loader


def commented_yaml(options: BaseModel) -> str:
    """Return options as YAML text that `parse_yaml` reads back."""
    return "".join(_yaml_lines(options, indent=""))


def _yaml_lines(section: BaseModel, indent: str) -> Iterator[str]:
    import yaml

    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        if field.exclude:
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:\n"
            yield from _yaml_lines(value, f"{indent}  ")
            continue
        if field.description:
            yield f"{indent}# {field.description}\n"
        yield textwrap.indent(yaml.safe_dump({name: plain[name]}, allow_unicode=True, sort_keys=False), indent)
