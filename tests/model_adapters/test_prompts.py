"""Prompt files of three formats, shared out into batches that never contain padding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model_adapters.options import PipelineOptions
from model_adapters.pipeline.prompts import even_share, read_batches, read_prompts, share_of_copy
from quant_core.errors import ConfigurationError, InputError


def write(path: Path, text: str, mode: int = 0o640) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def options(path: Path, **chosen: object) -> PipelineOptions:
    return PipelineOptions.model_validate({"path": "model", "prompt_path": str(path), **chosen})


def test_plain_has_a_prompt_a_line_and_blank_lines_are_none(tmp_path):
    path = write(tmp_path / "p.txt", "a cat\n\n  a dog  \n")
    assert read_prompts(path, "plain") == [("a cat", "not_specified"), ("a dog", "not_specified")]


@pytest.mark.parametrize("inner", ["\u2028", "\x0c", "\x85"])
def test_only_the_end_of_a_line_ends_a_prompt(tmp_path, inner):
    text = f"a cat{inner}by night"
    assert read_prompts(write(tmp_path / "p.txt", f"{text}\r\nb\n"), "plain") == [
        (text, "not_specified"),
        ("b", "not_specified"),
    ]
    table = write(tmp_path / "p.tsv", f"Prompt\tCategory\n{text}\tAnimals\n")
    assert read_prompts(table, "parti") == [(text, "Animals")]


def test_parti_skips_the_header_and_reads_prompt_and_category(tmp_path):
    path = write(tmp_path / "p.tsv", 'Prompt\tCategory\tChallenge\na "red" cat\tAnimals\tSimple\nbread\tFood\tx\n')
    assert read_prompts(path, "parti") == [('a "red" cat', "Animals"), ("bread", "Food")]


def test_hpsv2_reads_styles_and_a_plain_list(tmp_path):
    path = write(tmp_path / "p.json", '{"anime": ["a", "b"], "photo": ["c"]}')
    assert read_prompts(path, "hpsv2") == [("a", "anime"), ("b", "anime"), ("c", "photo")]
    assert read_prompts(write(tmp_path / "l.json", '["x"]'), "hpsv2") == [("x", "not_specified")]


@pytest.mark.parametrize(
    ("kind", "text"), [("parti", "header\nonly one column\n"), ("hpsv2", "not json"), ("hpsv2", '{"a": "text"}')]
)
def test_a_file_of_another_format_is_an_error_that_names_the_format(tmp_path, kind, text):
    with pytest.raises(InputError, match=f"not a {kind} prompt file"):
        read_prompts(write(tmp_path / "p", text), kind)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o750, 0o642])
def test_a_mode_wider_than_0640_is_refused_with_the_command_that_mends_it(tmp_path, mode):
    path = write(tmp_path / "p.txt", "a cat", mode)
    with pytest.raises(InputError) as raised:
        read_prompts(path, "plain")
    assert f"{mode:04o}" in raised.value.why
    assert raised.value.advice == f"chmod 640 {path}"


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o440, 0o400])
def test_narrower_modes_are_fine(tmp_path, mode):
    assert read_prompts(write(tmp_path / "p.txt", "a cat", mode), "plain")


def test_links_folders_empty_missing_and_binary_files_are_refused(tmp_path):
    real = write(tmp_path / "real.txt", "a cat")
    link = tmp_path / "link.txt"
    link.symlink_to(real)
    empty = write(tmp_path / "empty.txt", "\n \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(os.urandom(64) + b"\xff\xfe")
    binary.chmod(0o640)
    for path in (link, tmp_path, empty, tmp_path / "missing.txt", binary):
        with pytest.raises(InputError) as raised:
            read_prompts(path, "plain")
        assert str(path) in raised.value.where


def test_images_are_numbered_over_the_whole_file_whatever_part_is_asked_for(tmp_path):
    path = write(tmp_path / "p.txt", "a\nb\nc\nd\n")
    whole = [r for batch in read_batches(options(path, num_images_per_prompt=2)) for r in batch]
    parts = [
        r
        for index in range(3)
        for batch in read_batches(options(path, num_images_per_prompt=2, data_split_num=3, data_split_id=index))
        for r in batch
    ]
    assert parts == whole
    assert [r.number for r in whole] == list(range(8))
    assert [r.file_stem for r in whole][:4] == ["0_0", "0_1", "1_0", "1_1"]


def test_a_short_last_batch_stays_short(tmp_path):
    path = write(tmp_path / "p.txt", "a\nb\nc\n")
    batches = read_batches(options(path, batch_size=2))
    assert [[r.prompt for r in batch] for batch in batches] == [["a", "b"], ["c"]]


def test_max_num_prompt_zero_means_all(tmp_path):
    path = write(tmp_path / "p.txt", "a\nb\nc\n")
    assert sum(map(len, read_batches(options(path, max_num_prompt=0)))) == 3
    assert sum(map(len, read_batches(options(path, max_num_prompt=2)))) == 2


@pytest.mark.parametrize(("count", "parts"), [(5, 1), (5, 2), (5, 5), (8, 3)])
def test_shares_are_consecutive_complete_and_differ_by_one_at_most(count, parts):
    shares = [even_share(range(count), parts, index, where="test") for index in range(parts)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_parts_than_prompts_is_an_error_because_a_part_would_calibrate_nothing():
    with pytest.raises(ConfigurationError, match="2 cannot be shared out over 3"):
        even_share([1, 2], 3, 0, where="test")


def test_too_few_batches_are_more_when_they_are_smaller(tmp_path):
    file = write(tmp_path / "p.txt", "a\nb\nc\nd\n")
    with pytest.raises(ConfigurationError, match="batches: 1 cannot be shared out over 2") as caught:
        share_of_copy(read_batches(options(file, batch_size=4)), 2, 0, where="test")
    assert "a smaller --batch_size" in caught.value.advice
    assert len(share_of_copy(read_batches(options(file, batch_size=2)), 2, 0, where="test")) == 1
    with pytest.raises(ConfigurationError, match="images: 4 cannot be shared out over 5") as caught:
        read_batches(options(file, batch_size=4, data_split_num=5))
    assert "--batch_size" not in caught.value.advice


def test_a_job_without_a_use_for_prompts_does_without_the_file_of_the_default_name_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = PipelineOptions(path="model")
    assert read_batches(default, are_needed=False) == []
    for asked, needed in ((default, True), (options(tmp_path / "typo.txt"), False)):
        with pytest.raises(InputError, match="no such prompt file"):
            read_batches(asked, are_needed=needed)
    write(tmp_path / "calib_prompts.txt", "a cat")
    assert len(read_batches(default, are_needed=False)) == 1
