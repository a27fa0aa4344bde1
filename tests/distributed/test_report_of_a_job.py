"""The report of a real job knows its layers, stages, options and command, with and without a quality card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.files.manifest import read_manifest
from launcher.files.run_folder import MANIFEST, QUALITY, SMOOTHED
from launcher.report.content import gather
from launcher.report.pages import page
from model_adapters.quality.card import LayerQuality, Origin, QualityCard
from model_adapters.quality.results import CARD
from tests.distributed.conftest import PublishedJob

pytestmark = pytest.mark.distributed


def test_it_tells_of_a_job_what_the_job_left(dual_timestep_job: PublishedJob):
    report = gather(dual_timestep_job.folder / "weights")
    assert (report.model, report.quant_type, report.tp_size) == ("flux", "W8A8_TIMESTEP", 2)
    float_layers = {row.pattern: row.why_float for row in report.scope if row.scheme == "FLOAT"}
    assert float_layers["transformer_blocks.*.ff.net.2"] == "kept float by *net.2*"
    assert float_layers["proj_out"] == "the last linear stays float"
    assert sum(row.count for row in report.scope) == len(report.layers) == 50
    assert "policy.register(range(2, 4)" in report.registration["3.1"]
    assert {(row.rank, row.stage) for row in report.stages} >= {
        (rank, stage) for rank in (0, 1) for stage in ("prepare", "load", "calibrate", "quantize", "merge")
    }
    assert all(row.memory > 2**20 for row in report.stages)
    layer = next(layer for layer in report.layers if layer.name == "transformer_blocks.0.attn.to_q")
    assert list(layer.ranges) == [0, 1, 2, 3]
    assert max(layer.ranges.values()) == 1
    assert not any(layer.ranges for layer in report.layers if layer.scheme == "FLOAT")
    origins = {row.flag: (row.value, row.origin) for row in report.options}
    assert origins["--infer_steps"] == ("4", "command line")
    assert origins["--seed"] == ("42", "default")
    assert report.command.startswith("torchrun --nproc_per_node 2 -m launcher flux --path ")


def test_channels_before_and_after_are_those_of_the_inputs_that_the_job_divided(
    dual_smoothed_job: PublishedJob, dual_timestep_job: PublishedJob, tmp_path: Path
):
    folder = dual_smoothed_job.folder / "weights"
    report = gather(folder)
    divided = {layer.name for layer in report.layers if layer.is_smoothed}
    assert divided
    assert {name for each in report.smoothed_inputs for name in each.layers} == divided
    assert "inputs the channel in the middle gained" in page(report, "report.html", folder, folder)
    assert gather(dual_timestep_job.folder / "weights").smoothed_inputs == []
    # An earlier version left no such file.
    older = Path(shutil.copytree(folder, tmp_path / "weights"))
    (older / SMOOTHED).unlink()
    shown = page(gather(older), "report.html", older, older)
    assert "What multiplies the inputs of 20 layers" in shown
    assert "the channel in the middle" not in shown


def test_a_card_counts_only_if_it_is_of_this_checkpoint(dual_timestep_job: PublishedJob, tmp_path: Path):
    folder = Path(shutil.copytree(dual_timestep_job.folder / "weights", tmp_path / "weights"))
    manifest = read_manifest(folder / MANIFEST)
    assert manifest is not None
    name = "transformer_blocks.0.attn.to_q"
    for fingerprint, measured in ((manifest.fingerprint, 31.5), ("0" * 64, None)):
        origin = Origin(
            model="flux", quant_type="w8a8_timestep", fingerprint=fingerprint, dtype="bfloat16", floor_dtype="float32"
        )
        found = LayerQuality(name=name, scheme="W8A8_TIMESTEP", sqnr=31.5, steps={0: 30.0, 2: 33.0})
        QualityCard(origin=origin, layers=(found,)).write(folder / QUALITY / CARD)
        report = gather(folder)
        assert next(layer.sqnr for layer in report.layers if layer.name == name) == measured
        assert ("Error of each layer" in page(report, "report.html", folder, folder)) is (measured is not None)
