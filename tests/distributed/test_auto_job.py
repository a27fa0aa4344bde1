"""A job that chooses a scheme for each layer, on two ranks: one choice, mixed shards, and a table that can be used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.cli.command_line import parse
from launcher.config.layer_schemes import read_layer_schemes
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.reader import Checkpoint, open_checkpoint
from quant_core.errors import ConfigurationError
from scripts.make_tiny_pipeline import FLUX, write_components, write_prompts
from tests.support.tiny_job import STEPS, run_job

pytestmark = pytest.mark.distributed
RANKS = (0, 1)
CHOOSES = ("--quant_type", "auto", "--budget", "balanced", "dynamic=0.5", "--timestep_sep", "auto")
FLAGS = ("--device_type", "A2-32g-dual", *CHOOSES)


def make_pipeline(folder: Path) -> Path:
    """Make a FLUX with one block of each sort: how often `auto` runs the model grows with the number of its layers."""
    folder.mkdir()
    fewest = replace(FLUX, transformer={**FLUX.transformer, "num_layers": 1, "num_single_layers": 1})
    write_components(fewest, folder, 0, torch.bfloat16, "10GB")
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the job, with the images of both models, and return its folder and what it said."""
    out = tmp_path_factory.mktemp("auto")
    info = ("--info_file_save_path", out / "image_info.json", "--max_num_prompt", "1")
    images = ("--do_save_img", "--save_path", out / "images", *info)
    finished = run_job(
        2, "flux", make_pipeline(out / "model"), write_prompts(out / "prompts.txt"), out, *FLAGS, *images
    )
    return out, finished.stdout


def table(job: tuple[Path, str]) -> dict[str, Any]:
    return yaml.safe_load((job[0] / "weights" / "quant_decisions.yaml").read_text())


def opened(job: tuple[Path, str], rank: int) -> Checkpoint:
    """Open a published shard with our reader and read every tensor."""
    folder = job[0] / "weights"
    names = (f"quant_model_weight_w8a8_{rank}.safetensors", f"quant_model_description_w8a8_{rank}.json")
    checkpoint = open_checkpoint(CheckpointFiles(*(folder / name for name in names)))
    checkpoint.verify()
    return checkpoint


def types(job: tuple[Path, str], rank: int) -> dict[str, str]:
    checkpoint = opened(job, rank)
    return {name: group.type.lower() for name, group in checkpoint.inventory.layers.items()}


def test_all_ranks_quantize_each_layer_as_the_one_table_says(job: tuple[Path, str]):
    chosen = {name: scheme.removesuffix(":plain") for name, scheme in table(job)["layer_schemes"].items()}
    quantized = {name: scheme for name, scheme in chosen.items() if scheme != "float"}
    assert [types(job, rank) for rank in RANKS] == [quantized, quantized]
    assert len(set(quantized.values())) > 1
    assert "choose: " in job[1]


def test_the_table_has_a_reason_and_the_error_of_each_candidate_for_every_layer(job: tuple[Path, str]):
    found = table(job)
    assert [row["layer"] for row in found["decisions"]] == list(found["layer_schemes"])
    for row in found["decisions"]:
        assert {"w8a8_dynamic:plain", "w8a16:plain"} <= set(row["error_db"])
        assert row["reason"]
    assert sum(row["work"] for row in found["decisions"]) == pytest.approx(1, abs=1e-3)
    assert any("w8a8_timestep:plain" in row["error_db"] for row in found["decisions"])
    assert found["expected"]["static_share"] >= 0.5


def test_the_bytes_are_those_of_the_layers_on_both_ranks(job: tuple[Path, str]):
    names = table(job)["layer_schemes"]
    assert table(job)["expected"]["bytes"] == sum(_bytes(opened(job, rank), names) for rank in RANKS)


def _bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """Return the bytes of the tensors of those layers in one shard."""
    found, wanted = checkpoint.inventory, set(names)
    stored = [name for name in found.floats if name.rpartition(".")[0] in wanted]
    stored += [member for name in wanted & set(found.layers) for member in found.layers[name].members.values()]
    infos = [checkpoint.info(name) for name in stored]
    return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)


def test_the_first_static_step_is_the_advised_one_on_every_rank(job: tuple[Path, str]):
    found = table(job)
    assert "w8a8_timestep" in types(job, 0).values()
    assert [opened(job, rank).timestep_sep for rank in RANKS] == [found["timestep_sep"]] * 2
    assert [row["step"] for row in found["steps"]] == list(range(STEPS))
    assert f"--timestep_sep {found['timestep_sep']}" in job[1]


def test_the_table_is_a_file_of_layer_schemes(job: tuple[Path, str]):
    path = job[0] / "weights" / "quant_decisions.yaml"
    assert read_layer_schemes([f"@{path}"]) == table(job)["layer_schemes"]


def test_the_table_alone_is_refused_and_with_the_flags_in_its_first_lines_it_is_taken(job: tuple[Path, str]):
    path = job[0] / "weights" / "quant_decisions.yaml"
    again = next(line for line in path.read_text().splitlines() if "--layer_schemes" in line).lstrip("# ").split()
    pipeline = {"path": str(job[0] / "model"), "infer_steps": STEPS}
    flags = [f"--{name}={value}" for name, value in (pipeline | {"quant_weight_save_folder": "w"}).items()]
    flags += ["--do_quant", "--quant_dump_calib_folder", "c"]
    with pytest.raises(ConfigurationError, match="were chosen with other options"):
        parse(["flux", *flags, "--layer_schemes", f"@{path}"])
    found = parse(["flux", *flags, *[word.replace("@THIS_FILE", f"@{path}") for word in again]]).options
    assert found.quantization.layer_schemes == table(job)["layer_schemes"]


def test_the_images_of_the_mix_are_made_from_the_published_shards(job: tuple[Path, str]):
    assert len(list((job[0] / "images" / "calib_quant").glob("*.png"))) == 1


def test_the_manifest_names_the_files_after_one_type_and_the_job_after_auto(job: tuple[Path, str]):
    manifest = json.loads((job[0] / "weights" / "quant_manifest.json").read_text())
    assert manifest["quant_type"] == "W8A8"
    assert manifest["fields"]["quantization.quant_type"] == "auto"
