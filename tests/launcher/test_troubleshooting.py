"""The READMEs' table of messages has the product's own words, and the exit code that each ends with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.failure.exit_codes import EXIT_CODES
from tests.support.torchrun import ROOT

READMES = ("README.md", "README.zh.md")
ROW = re.compile(r"^\| `([^`]+)` \| (\d+) \|", re.M)
CODES = {kind.__name__: int(code) for kind, code in EXIT_CODES.items()}


def rows(readme: str) -> dict[str, int]:
    """Return the messages of a README's table, holes as dots, and their exit codes."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    table = next(part for part in re.split(r"^## ", text, flags=re.M) if ROW.search(part))
    return {message: int(code) for message, code in ROW.findall(table)}


def template(node: ast.expr) -> str | None:
    """Return a text of the source with its holes as dots; None for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def spoken(source: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what a module says: the message of each error with its exit code, and what `say` prints, with 0."""
    for node in ast.walk(source):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        texts = [found for argument in node.args if (found := template(argument))]
        if name == "say":
            yield from ((text, 0) for text in texts)
        elif name in CODES:
            yield from ((text, CODES[name]) for text in texts[:1])
        elif name == "_lost":  # `Failure` says whose it is
            yield from ((f"rank … {text}", CODES["DistributedError"]) for text in texts[:1])


@pytest.fixture(scope="module")
def said() -> dict[str, int]:
    files = (path for room in ("launcher", "model_adapters", "quant_core") for path in Path(ROOT, room).rglob("*.py"))
    return dict(pair for path in files for pair in spoken(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("readme", READMES)
def test_each_message_of_the_table_is_the_product_s_own(readme: str, said: dict[str, int]) -> None:
    told = rows(readme)
    assert len(told) > 10
    assert told == {message: said.get(message) for message in told}


def test_both_languages_explain_the_same_messages() -> None:
    english, chinese = map(rows, READMES)
    assert list(english.items()) == list(chinese.items())
