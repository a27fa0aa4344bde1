"""A plan says what the last job in the output folder took, and what the planned one has otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.command_line import parse
from launcher.config.job_config import JobConfig
from launcher.devices.launch import Launch
from launcher.files.run_folder import CONFIG
from launcher.inspection.last_run import last_run_in
from launcher.inspection.plan import Plan
from launcher.inspection.plan_text import told
from launcher.journal.logs import LOGS
from launcher.ranks.mesh import Mesh

GIB = 2**30


def job(*words: str) -> JobConfig:
    files = ("--quant_weight_save_folder", "w", "--quant_dump_calib_folder", "c")
    return parse(["flux", *([] if "--path" in words else ["--path", "m"]), "--do_quant", *files, *words]).options


def ran(folder: Path, stages: dict[str, float], *, ranks: int = 2, asked: JobConfig | None = None) -> None:
    """Leave what a job of these stages leaves; the last rank takes a second longer, and holds a GiB more."""
    (folder / LOGS).mkdir(exist_ok=True)
    for rank in range(ranks):
        same: dict[str, Any] = {"rank": rank, "time": "2026-03-04T05:06:07", "level": "info", "from": "launcher"}
        lines = [
            {**same, "text": "ends", "ended": stage, "seconds": seconds + rank, "memory": (rank + 1) * GIB}
            for stage, seconds in stages.items()
        ]
        (folder / LOGS / f"rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if asked is not None:
        (folder / CONFIG).write_text(asked.to_yaml())


def said(folder: Path, planned: JobConfig, world: int = 2) -> str:
    plan = Plan("flux", "w8a8", mesh=Mesh(Launch(world=world), 2), last=last_run_in(folder, planned))
    return "\n".join(told(plan, "cpu"))


def test_it_says_the_slowest_ranks_seconds_and_the_most_bytes(tmp_path: Path):
    ran(tmp_path, {"calibrate": 60.0, "quantize": 8.0, "merge": 0.0}, asked=job())
    text = said(tmp_path, job())
    assert "measured in this folder on 2026-03-04: 71 s (calibrate 61, quantize 9, merge 1 s)" in text
    assert "at most 2.00 GiB on a rank\n  that job had the same options, as far as they matter to time" in text


def test_it_says_what_the_planned_job_has_otherwise_and_passes_over_what_cannot_matter(tmp_path: Path):
    ran(tmp_path, {"merge": 5.0}, asked=job("--infer_steps", "8", "--prompt_path", "a", "--seed", "1", "--overwrite"))
    text = said(tmp_path, job("--disable_names", "*.q"), world=4)
    assert "  that job had 2 ranks, now 4; --infer_steps 8, now 50; --disable_names (left out), now *.q" in text


def test_a_job_whose_options_are_gone_or_damaged_is_measured_all_the_same(tmp_path: Path):
    ran(tmp_path, {"merge": 5.0})
    assert "the options of that job are not known" in said(tmp_path, job())
    (tmp_path / CONFIG).write_text("pipeline: [")
    assert "the options of that job are not known" in said(tmp_path, job())


def test_where_no_job_published_nothing_was_measured(tmp_path: Path):
    assert last_run_in(tmp_path, job()) is None
    ran(tmp_path, {"calibrate": 5.0})
    assert "measured" not in said(tmp_path, job())


def test_a_path_is_the_same_relative_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    ran(tmp_path, {"merge": 5.0}, asked=job())
    assert "that job had the same options" in said(tmp_path, job())
    assert "that job had the same options" in said(tmp_path, job("--path", str(tmp_path / "m")))
