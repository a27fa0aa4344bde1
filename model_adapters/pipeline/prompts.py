"""Read a prompt file, and share its prompts out into batches.

Three formats: `plain` has a prompt a line, `parti` is the tab-separated table of PartiPrompts (a header line, then
prompt and category), `hpsv2` a JSON object from category to a list of prompts (or a plain list).

Every image has a number, counted over the whole file before anything is divided, and its noise comes from the job's
seed plus that number: which rank makes an image, or after which interruption, changes nothing about it.
"""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_adapters.options import PipelineOptions
from quant_core.errors import ConfigurationError, InputError

# Bit by bit the widest mode that is accepted: a prompt file that others may write decides what a job computes.
WIDEST_MODE = 0o640


@dataclass(frozen=True)
class ImageRequest:
    """Ask for one image: its prompt and category, its number in the whole job, the prompt's number, which copy."""

    prompt: str
    category: str
    number: int
    prompt_number: int
    copy: int

    @property
    def file_stem(self) -> str:
        """Return the name of the image's file without its extension."""
        return f"{self.prompt_number}_{self.copy}"


Batch = tuple[ImageRequest, ...]


def read_batches(options: PipelineOptions, *, are_needed: bool = True) -> list[Batch]:
    """Return all images to make, in batches of at most `batch_size`, for this part of the divided prompts.

    A short last batch stays short: the reference pads it with empty prompts, which a calibration must never see.
    are_needed: of a job that has no use for prompts the file of the default name may be missing: then there are none.
    Raises InputError for a file that is missing, unsafe, empty or malformed.
    """
    if not are_needed and has_no_prompts(options):
        return []
    prompts = read_prompts(Path(options.prompt_path), options.prompt_type)
    if options.max_num_prompt:
        prompts = prompts[: options.max_num_prompt]
    requests = [
        ImageRequest(prompt, category, index * options.num_images_per_prompt + copy, index, copy)
        for index, (prompt, category) in enumerate(prompts)
        for copy in range(options.num_images_per_prompt)
    ]
    part = even_share(requests, options.data_split_num, options.data_split_id, where="--data_split_num")
    return [tuple(part[start : start + options.batch_size]) for start in range(0, len(part), options.batch_size)]


def has_no_prompts(options: PipelineOptions) -> bool:
    """Tell whether nobody named a prompt file, and none of the default name is there."""
    default = type(options).model_fields["prompt_path"].default
    return options.prompt_path == default and not Path(default).exists()


def share_of_copy(batches: Sequence[Batch], copies: int, index: int, *, where: str) -> list[Batch]:
    """Return one copy's batches: consecutive ones, so that the dumps of all copies, in order, are those of one.

    Raises ConfigurationError when a copy would have none.
    """
    return even_share(batches, copies, index, where=where, what="batches", more="prompts or a smaller --batch_size")


def even_share(
    items: Sequence, parts: int, index: int, *, where: str, what: str = "images", more: str = "prompts"
) -> list:
    """Return the part of that index when the items are cut, in order, into parts that differ by one at most.

    what: the items in a word. more: what to give so that there are more. Raises ConfigurationError when a part would be
    empty.
    """
    if len(items) < parts:
        raise ConfigurationError(
            f"{what}: {len(items)} cannot be shared out over {parts}",
            where=where,
            why="a part without any would calibrate nothing",
            advice=f"give more {more}, or use fewer parts or ranks",
        )
    size, rest = divmod(len(items), parts)
    start = index * size + min(index, rest)
    return list(items[start : start + size + (index < rest)])


def read_prompts(path: Path, prompt_type: str) -> list[tuple[str, str]]:
    """Return (prompt, category) pairs in the order of the file; raises InputError."""
    text = _read_safely(path)
    try:
        prompts = list(_PARSERS[prompt_type](text))
    except (ValueError, IndexError, csv.Error, RecursionError) as error:
        raise InputError(
            f"'{path}' is not a {prompt_type} prompt file",
            where=f"--prompt_path {path}, --prompt_type {prompt_type}",
            why=str(error) or "a line has too few columns",
            advice=f"choose the format that the file has: {', '.join(_PARSERS)}",
        ) from None
    if not prompts:
        raise InputError(
            "the prompt file holds no prompt",
            where=f"--prompt_path {path}",
            why="calibration runs the pipeline on prompts, and there is none",
            advice="write one prompt a line",
        )
    return prompts


def _read_safely(path: Path) -> str:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise _unsafe(path, "it is a link, folder or device, which could lead anywhere", "give the file itself")
        if status.st_mode & 0o777 & ~WIDEST_MODE:
            mode = status.st_mode & 0o777
            raise _unsafe(path, f"its mode is {mode:04o}, wider than {WIDEST_MODE:04o}", f"chmod 640 {path}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            "there is no such prompt file",
            where=f"--prompt_path {path}",
            why="the path does not exist",
            advice="give a text file with one prompt a line, mode 0640",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the prompt file cannot be read",
            where=f"--prompt_path {path}",
            why=str(error),
            advice="save it as UTF-8 text that this user may read",
        ) from None


def _unsafe(path: Path, why: str, advice: str) -> InputError:
    return InputError("the prompt file is refused", where=f"--prompt_path {path}", why=why, advice=advice)


def _lines(text: str) -> list[str]:
    """Return the lines; `splitlines` also breaks at form feeds and separators of Unicode, which prompts may hold."""
    return text.split("\n")


def _plain(text: str) -> Iterator[tuple[str, str]]:
    yield from ((line.strip(), "not_specified") for line in _lines(text) if line.strip())


def _parti(text: str) -> Iterator[tuple[str, str]]:
    rows = csv.reader(_lines(text), delimiter="\t")
    next(rows, None)
    yield from ((row[0].strip(), row[1].strip()) for row in rows if row)


def _hpsv2(text: str) -> Iterator[tuple[str, str]]:
    content = json.loads(text)
    styles = content.items() if isinstance(content, dict) else [("not_specified", content)]
    for style, prompts in styles:
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"'{style}' does not hold a list of texts")
        yield from ((prompt, style) for prompt in prompts)


_PARSERS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {"plain": _plain, "parti": _parti, "hpsv2": _hpsv2}
