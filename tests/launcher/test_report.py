"""A report is drawn whatever the folder knows, shows what matters, escapes what it quotes, and stays small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.command_line import parse
from launcher.files.run_folder import CONFIG
from launcher.files.smoothed_inputs import InputSpread, Spread
from launcher.journal.logs import LOGS
from launcher.report.content import FileRow, Report, gather
from launcher.report.drawing import SHADES_DB, SHADES_RANGE, errors, ranges, timeline
from launcher.report.layers import LayerRow, scope_rows, why_float
from launcher.report.pages import PAGES, page, write_report
from launcher.report.running import OptionRow, StageRow, command, option_rows, stage_rows
from launcher.report.spreads import spread_chart
from quant_core.errors import InputError

MB = 2**20


def layer(name: str, sqnr: float | None = 40.0, steps: int = 0, **changes: Any) -> LayerRow:
    by_step = {step: (sqnr or 0) + 7 * (step % 3) for step in range(steps)}
    return LayerRow(name=name, scheme="W8A8_TIMESTEP", shape=(3072, 3072), sqnr=sqnr, steps=by_step, **changes)


def report(**changes: Any) -> Report:
    layers = changes.pop("layers", [layer("a.0.q", 41.0, 4), layer("a.1.q", 12.0, 4), layer("b.0", None)])
    given: dict[str, Any] = {
        "model": "flux",
        "quant_type": "W8A8_TIMESTEP",
        "layout": "mindie",
        "tp_size": 2,
        "dp_size": 1,
        "fingerprint": "f" * 64,
        "verdict": ["Good pictures.", "BROKEN: one layer."],
        "scope": scope_rows(layers),
        "layers": layers,
        "timestep_sep": 2,
        "registration": {"3.1": 'policy.register(range(2, 4), "static", target="w8a8_static_linear")'},
        "stages": [
            StageRow(rank=rank, stage=stage, begin=begin, seconds=10.0, memory=rank * 2**30)
            for rank in (0, 1)
            for stage, begin in (("load", 0.0), ("quantize", 10.0))
        ],
        "options": [OptionRow(flag="--path", value="<b>&'", origin="command line")],
        "command": "torchrun --nproc_per_node 2 -m launcher flux --path '<b>'",
        "versions": {"torch": "2.13.0"},
        "files": [FileRow(name="w.safetensors", bytes=3, sha256="0" * 64)],
    }
    return Report(**(given | changes))


class Tags(HTMLParser):
    """Count tags, and refuse what is not closed."""

    VOID = frozenset({"meta", "img", "line", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def html(shown: Report, folder: Path = Path("nowhere")) -> str:
    text = page(shown, "report.html", folder, folder)
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert "script" not in tags.seen
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "it needs no other file"
    return text


def test_the_page_shows_the_verdict_the_worst_layer_first_and_the_lines_to_register():
    text = html(report())
    assert '<li class="bad">BROKEN' in text
    assert text.index(">a.1.q<") < text.index(">a.0.q<") < text.index(">b.0<")
    assert "policy.register(range(2, 4)" in text
    assert "static from here" in text


def test_what_is_quoted_is_escaped():
    text = html(report())
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;" in text


@pytest.mark.parametrize("name", PAGES)
def test_a_folder_that_knows_little_has_a_page_too(name: str):
    unknown: dict[str, Any] = {key: [] for key in ("verdict", "stages", "options", "layers", "files")}
    text = page(report(timestep_sep=None, registration={}, **unknown), name, Path("nowhere"), Path("nowhere"))
    assert "Quality was not measured" in text


def test_the_files_are_written_and_read_back(tmp_path: Path):
    html_file, markdown, data = write_report(report(), tmp_path, tmp_path / "out")
    assert Report.model_validate_json(data.read_text()) == report()
    assert "| `a.1.q` | 12.0 | W8A8_TIMESTEP | 3072 x 3072 |" in markdown.read_text()
    assert html_file.read_text().startswith("<!doctype html>")


def test_a_report_of_the_largest_model_stays_under_a_megabyte():
    layers = [
        layer(
            f"transformer_blocks.{i}.attn.to_q",
            20.0 + i % 37,
            50,
            ranges={step: 0.02 * (i * step % 50) for step in range(50)},
            factors=(0.1, 9.0),
        )
        for i in range(503)
    ]
    stages = [
        StageRow(rank=rank, stage=stage, begin=1.0, seconds=1.0, memory=1)
        for rank in range(8)
        for stage in ("prepare", "load", "calibrate", "quantize", "merge")
    ]
    assert len(html(report(layers=layers, stages=stages))) < MB


def test_every_cell_of_the_heat_map_has_the_shade_of_its_figure():
    layers = [layer("a.0", 5.0, 3), layer("a.1", 60.0, 3), layer("b", None)]
    heat = errors(layers, timestep_sep=1)
    assert heat is not None
    cells = {}
    for shade, path in enumerate(heat.paths):
        for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path):
            cells |= {(int(y), int(x) + i): shade for i in range(int(length))}
    for row, each in enumerate(layers[:2]):
        for step, decibels in each.steps.items():
            assert cells[row, step] == sum(decibels >= limit for limit in SHADES_DB)
    assert len(cells) == 6
    assert heat.separator == 1
    assert errors([layer("b")], None) is None


def test_ranges_have_a_map_with_the_separator_and_smoothed_layers_their_factors():
    layers = [layer("a.0", ranges={0: 1.0, 1: 0.5, 2: 0.05}), layer("a.1", is_smoothed=True, factors=(0.0125, 3.0))]
    heat = ranges(layers, timestep_sep=1)
    assert heat is not None
    assert [len(re.findall("M", path)) for path in heat.paths] == [1, 0, 0, 0, 0, 1, 0, 1]
    assert (heat.layers, heat.separator, heat.shades) == (["a.0"], 1, SHADES_RANGE)
    text = html(report(layers=layers))
    assert "static from here" in text
    assert "below 10%" in text
    assert '<td class="n">0.0125</td><td class="n">3.0</td>' in text
    assert "smoothed layers" not in html(report())


def spread_input(name: str, bits: float, middle: float = 0.5) -> InputSpread:
    """Return an input whose largest channel stood out by so many bits more before it was divided."""
    before = Spread(largest=middle * 2 ** (bits + 2), middle=middle)
    return InputSpread(layers=(name, f"{name}2"), before=before, after=Spread(largest=4 * middle, middle=middle))


def test_channels_are_drawn_before_and_after_where_suppression_gained_half_a_bit_the_most_first():
    shown = report(smoothed_inputs=[spread_input("a.1", 0.4), spread_input("a.0", 1.1), spread_input("b", 6.0)])
    text = html(shown)
    assert "In 2 of 3 inputs the channel in the middle gained half a bit or more against the largest." in text
    assert text.index(">b, b2<") < text.index(">a.0, a.02<")
    assert ">a.1, " not in text
    assert "gained most" not in text
    markdown = page(shown, "report.md", Path("nowhere"), Path("nowhere"))
    assert "| `b`, `b2` | 128.0 | 2.0 | 0.5 | 0.5 | 6.0 |" in markdown
    chart = spread_chart(shown.smoothed_inputs)
    assert chart is not None
    # From 0.1 to 1000: 0.5 is 0.7 of a power of ten above its left end, and 128 lies 2.4 above 0.5.
    assert [label for _, label in chart.ticks] == ["0.1", "1", "10", "100", "1000"]
    assert chart.rows[0].before.x == pytest.approx(0.699 * 86 / 4, abs=0.1)
    assert chart.rows[0].before.width == pytest.approx(2.408 * 86 / 4, abs=0.1)


def test_suppression_that_gained_nothing_says_so_and_draws_nothing():
    text = html(report(smoothed_inputs=[spread_input("a", 0.25), spread_input("b", -0.5)]))
    assert "In none of 2 inputs did the channel in the middle gain half a bit" in text
    assert "0.25 at most." in text
    assert "Channel maxima" not in text
    assert "Outlier suppression" not in html(report())


def test_of_many_inputs_as_many_are_drawn_as_a_screen_holds():
    inputs = [spread_input(f"transformer_blocks.{i}.attn.to_q", 1 + i / 100) for i in range(503)]
    shown = report(smoothed_inputs=inputs)
    text = html(shown)
    assert "In 503 of 503 inputs" in text
    assert "; these 24 gained most." in text
    assert text.count(">transformer_blocks.502.attn.to_q, ") == 1
    assert len(text) < MB


def test_channels_that_carry_nothing_are_drawn_too():
    dead = InputSpread(layers=("a",), before=Spread(largest=8, middle=0), after=Spread(largest=1, middle=0))
    live = InputSpread(layers=("b",), before=Spread(largest=8, middle=1e-9), after=Spread(largest=1, middle=1e-9))
    assert dead.bits == 0
    assert html(report(smoothed_inputs=[dead, live]))


def test_the_names_of_blocks_never_overlap_and_start_with_the_first_row():
    for count in (3, 60, 503):
        heat = errors([layer(f"block.{i // 3}.q", 20.0, 2) for i in range(count)], None)
        assert heat is not None
        rows = [row for _, row in heat.blocks]
        assert rows[0] == 0
        assert all((after - before) * heat.cell_height >= 15 for before, after in pairwise(rows))


def test_the_timeline_has_a_track_a_rank_on_one_scale():
    tracks = timeline(report().stages)
    assert tracks is not None
    assert [[(bar.x, bar.width, bar.shade) for bar in bars] for bars in tracks.tracks.values()] == [
        [(0.0, 500.0, 0), (500.0, 500.0, 1)]
    ] * 2
    assert timeline([]) is None


def test_layers_are_counted_by_what_their_names_have_in_common():
    layers = [layer("a.0.q", 30.0), layer("a.1.q", 20.0), layer("a.2.q").model_copy(update={"scheme": "FLOAT"})]
    assert [(row.pattern, row.count, row.scheme, row.worst) for row in scope_rows(layers)] == [
        ("a.*.q", 2, "W8A8_TIMESTEP", 20.0),
        ("a.*.q", 1, "FLOAT", 40.0),
    ]


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("a.0.q", {"disable_names": ["*.q"]}, "kept float by *.q"),
        ("a.0.q", {"disable_names": [], "layer_schemes": [["a.0.*", "float"]]}, "kept float by a.0.*"),
        ("a.0.q", {"quant_type": "auto", "layer_schemes": [["b.*", "float"]]}, "chosen by measurement"),
        ("a.0.q", {"quant_type": "w8a8"}, ""),
        ("out", {"disable_names": ["*.q"], "quant_type": "auto"}, "the last linear stays float"),
    ],
)
def test_why_a_layer_is_float_is_what_the_job_was_asked_for(name: str, fields: dict[str, Any], reason: str):
    given = {f"quantization.{key}": value for key, value in fields.items()}
    assert why_float(name, given, is_last=name == "out") == reason


def test_the_command_to_repeat_and_the_stages_are_of_as_many_ranks_as_the_job_had(tmp_path: Path):
    """Ranks 2 and 3 are of a larger run before it; the first rank's log of this one is there."""
    (tmp_path / LOGS).mkdir()
    for rank in range(4):
        lines = [
            {"stage": "prepare", "words": ["flux", "--path", "a b"]},
            {"stage": "merge"},
            {"ended": "merge", "seconds": 1.0, "memory": 1},
        ]
        same = {"rank": rank, "time": "2026-01-01T00:00:00+00:00", "level": "info", "from": "launcher", "text": "said"}
        written = [json.dumps({**same, **line}) for line in lines]
        (tmp_path / LOGS / f"rank{rank}.jsonl").write_text("\n".join(written))
    assert command(tmp_path, "flux", 2) == "torchrun --nproc_per_node 2 -m launcher flux --path 'a b'"
    assert {row.rank for row in stage_rows(tmp_path, 2)} == {0, 1}
    (tmp_path / LOGS).rename(tmp_path / "gone")
    assert command(tmp_path, "flux", 2) == f"torchrun --nproc_per_node 2 -m launcher flux --config {tmp_path / CONFIG}"


def test_nothing_is_told_to_repeat_where_the_configuration_is_gone(tmp_path: Path):
    rows, model = option_rows(tmp_path)
    assert (rows, command(tmp_path, model, 2)) == ([], "")
    drawn = page(report(command="", options=[]), "report.html", tmp_path, tmp_path)
    assert '<pre><span class="word"></span>' not in drawn


def test_an_option_whose_default_is_made_is_the_default_and_not_given(tmp_path: Path):
    options = parse(["flux", "--path", "m", "--prompt_path", "p", "--do_save_img"]).options
    (tmp_path / CONFIG).write_text(options.to_yaml())
    origins = {row.flag: row.origin for row in option_rows(tmp_path)[0]}
    assert {origins[flag] for flag in ("--layer_schemes", "--scheme_costs", "--budget", "--seed", "--save_path")} == {
        "default"
    }
    assert origins["--path"] == "given"


def test_a_folder_where_nothing_is_published_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no published checkpoint"):
        gather(tmp_path)
