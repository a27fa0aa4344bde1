"""Draw a contact sheet: a row for each prompt with the float picture, the quantized one and their difference.

Cells have one size whatever the pictures': small ones are enlarged pixel by pixel, large ones reduced. The difference
is amplified by one factor for the whole sheet, which its heading says: the largest power of two that does not drown
the largest differences in white, so that two sheets with the same factor can be compared by eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from quant_core.atomic_file import write_atomically
from quant_core.errors import InputError

# In pixels: a picture's cell, the column of text, space around everything, the size of letters.
_CELL, _TEXT, _GAP, _LETTER = 256, 224, 12, 15
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 24, 24), (110, 110, 110)
_AMPLIFICATIONS = (1, 2, 4, 8, 16, 32, 64)
# More rows than this make a sheet that nobody looks through; the pictures themselves lie beside it.
MOST_ROWS = 12


@dataclass(frozen=True)
class Row:
    """One prompt: the text to show, and the files of the float model's picture and the quantized one's."""

    prompt: str
    figures: str
    reference: Path
    quantized: Path


def write_sheet(path: Path, rows: Sequence[Row], *, title: str) -> Path:
    """Publish the sheet of at most MOST_ROWS rows as PNG: the same bytes for the same pictures and words."""
    sheet = draw_sheet(rows[:MOST_ROWS], title=title + _left_out(rows))
    return write_atomically(path, partial(_save, sheet))


def draw_sheet(rows: Sequence[Row], *, title: str) -> Image.Image:
    """Return the sheet. Raises InputError for a picture that cannot be read."""
    pictures = [(_open(row.reference), _open(row.quantized)) for row in rows]
    factor = amplification([_difference(*pair) for pair in pictures])
    heading = _wrapped(title, _width() - 2 * _GAP, _font(_LETTER + 3))
    top = 2 * _GAP + len(heading) * _line(_LETTER + 3) + _line(_LETTER)
    sheet = Image.new("RGB", (_width(), top + len(rows) * (_CELL + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (_GAP, _GAP), heading, _LETTER + 3, _INK)
    for column, name in enumerate(("float", "quantized", f"difference x {factor}")):
        _write(draw, (_left(column), top - _line(_LETTER)), [name], _LETTER, _FAINT)
    for index, (row, (reference, quantized)) in enumerate(zip(rows, pictures)):
        y = top + index * (_CELL + _GAP)
        _write_row(draw, y, row)
        shown = _difference(reference, quantized).astype(np.int64) * factor
        amplified = Image.fromarray(shown.clip(0, 255).astype(np.uint8))
        for column, picture in enumerate((reference, quantized, amplified)):
            sheet.paste(_fitted(picture), (_left(column), y))
    return sheet


def amplification(differences: Sequence[np.ndarray]) -> int:
    """Return the largest factor that keeps all but one in a hundred differences (0 to 255) within white."""
    if not differences:
        return 1
    largest = max(float(np.quantile(difference, 0.99)) for difference in differences)
    return max(factor for factor in _AMPLIFICATIONS if factor == 1 or factor * largest <= 255)


def _difference(reference: Image.Image, quantized: Image.Image) -> np.ndarray:
    if reference.size != quantized.size:
        raise InputError(
            f"pictures of {reference.size} and {quantized.size} pixels have no difference",
            where="drawing the contact sheet",
            why="both must have one size",
            advice="evaluate again",
        )
    return np.abs(np.asarray(reference, dtype=np.int16) - np.asarray(quantized, dtype=np.int16))


def _write_row(draw: ImageDraw.ImageDraw, y: int, row: Row) -> None:
    """Write prompt and figures beside the pictures; a prompt that is too long for its cell ends in dots."""
    figures = _wrapped(row.figures, _TEXT, _font(_LETTER))
    room = _CELL // _line(_LETTER) - len(figures) - 1
    prompt = _wrapped(row.prompt, _TEXT, _font(_LETTER))
    if len(prompt) > room:
        prompt = [*prompt[: room - 1], "..."]
    _write(draw, (_GAP, y), prompt, _LETTER, _INK)
    _write(draw, (_GAP, y + (len(prompt) + 1) * _line(_LETTER)), figures, _LETTER, _FAINT)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Return the text in lines of at most so many pixels; a word that is longer is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], size: int, ink: Any) -> None:
    for index, line in enumerate(lines):
        draw.text((place[0], place[1] + index * _line(size)), line, font=_font(size), fill=ink)


def _fitted(picture: Image.Image) -> Image.Image:
    """Return the picture in the middle of a cell: enlarged by a whole number, or reduced."""
    largest = max(picture.size)
    if largest <= _CELL:
        factor = _CELL // largest
        scaled = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        size = [max(1, round(side * _CELL / largest)) for side in picture.size]
        scaled = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (_CELL, _CELL), _PAPER)
    cell.paste(scaled, ((_CELL - scaled.width) // 2, (_CELL - scaled.height) // 2))
    return cell


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(
            "a picture for the contact sheet cannot be read",
            where=str(path),
            why=str(error),
            advice="remove it and evaluate again",
        ) from None


def _left_out(rows: Sequence[Row]) -> str:
    return f" (the first {MOST_ROWS} of {len(rows)} pictures)" if len(rows) > MOST_ROWS else ""


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _line(size: int) -> int:
    return size + 4


def _left(column: int) -> int:
    return 2 * _GAP + _TEXT + column * (_CELL + _GAP)


def _width() -> int:
    return _left(3)


def _save(sheet: Image.Image, path: Path) -> None:
    sheet.save(path, format="PNG", optimize=False, compress_level=6)
