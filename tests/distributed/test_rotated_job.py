"""A job on two ranks with rotated values: streamed from disk, published, verified, compared with the float model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.files.manifest import read_manifest
from launcher.files.run_folder import MANIFEST
from launcher.inspection.verify import verify
from model_adapters.quality.card import read_card
from model_adapters.quality.results import CARD
from quant_core.arithmetic.rotation import Rotation
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import open_checkpoint
from tests.distributed.conftest import PublishedJob

pytestmark = pytest.mark.distributed

# In the single blocks the layer behind the attention sees the heads of both ranks, and in the double blocks its own.
WIDTH, HEAD = 64, 16
COLUMNS = {
    "transformer_blocks.0.attn.to_v": None,
    "transformer_blocks.0.attn.to_out.0": WIDTH // 2,
    "single_transformer_blocks.0.proj_out": WIDTH,
}


@pytest.fixture(scope="module")
def rotated_job(tiny_flux_folder: Path, job_on_two_ranks) -> PublishedJob:
    flags = ("--device_type", "A2-32g-dual", "--quant_type", "w8a8_dynamic", "--rotate_values", "--evaluate", "0")
    return job_on_two_ranks("rotated_job", "flux", tiny_flux_folder, *flags)


def test_each_rank_rotates_its_heads_and_says_so(rotated_job: PublishedJob):
    weights = rotated_job.folder / "weights"
    manifest = read_manifest(weights / MANIFEST)
    assert manifest is not None
    assert manifest.fields["quantization.rotate_values"] is True
    assert "rotate_values: true" in (weights / "quant_job.yaml").read_text()
    names = [file.name for file in manifest.files]
    for tensors, description in zip(names[::2], names[1::2]):
        rotations = open_checkpoint(CheckpointFiles(weights / tensors, weights / description)).rotations
        for name, columns in COLUMNS.items():
            said = rotations[name]
            assert replace(said, levels=()) == Rotation(HEAD, columns=columns)
            assert len(said.levels) == (columns or WIDTH // 2)


def test_verify_knows_that_the_weights_are_the_models_rotated(rotated_job: PublishedJob, tiny_flux_folder: Path):
    found = verify(rotated_job.folder / "weights", str(tiny_flux_folder))
    assert found.findings == []
    assert all(30 < ratio.decibels < 60 for ratio in found.layers.values())


def test_layers_are_compared_in_the_channels_of_the_float_model(rotated_job: PublishedJob):
    card = read_card(next(rotated_job.folder.rglob(CARD)))
    layers = {layer.name: layer.sqnr for layer in card.layers}
    around = [sqnr for name, sqnr in layers.items() if name.endswith(("to_v", "add_v_proj", "to_out.0", "proj_out"))]
    assert len(around) > 8
    # The random model's outliers cost up to 30 dB; against unrotated channels it would be -3 dB, whatever the inputs.
    assert min(around) > 5
