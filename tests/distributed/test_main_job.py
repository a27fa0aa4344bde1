"""The whole job on two ranks: from the command line to files that the runtime loads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from launcher.config.resolve import job_config, job_from_yaml
from launcher.files.digests import digest_of_file
from launcher.journal.trace import last_run, trace_events
from launcher.run import run
from model_adapters import load_adapter
from model_adapters.weights.transformer_part import build_empty
from quant_core.calibration.records import load_dump
from quant_core.calibration.safe_load import safe_torch_load
from quant_core.parallel.sharding import join
from tests.distributed.conftest import PublishedJob
from tests.support import consumer
from tests.support.tiny_job import STEPS, run_job

pytestmark = pytest.mark.distributed

PROMPTS = 4  # of the prompt_file fixture


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scripts.make_tiny_pipeline import write_prompts

    return write_prompts(tmp_path_factory.mktemp("prompts") / "calib_prompts.txt")


def test_two_ranks_publish_timestep_shards_that_the_runtime_loads(dual_timestep_job: PublishedJob):
    out = dual_timestep_job.folder
    for rank in (0, 1):
        loaded = consumer.load(out / "weights", rank, "w8a8_timestep")
        consumer.check(loaded, torch.bfloat16, timesteps=STEPS)
        assert len(loaded.quantized_layers) == 45  # 50 linears of the tiny FLUX less 4 net.2 and the last
    manifest = consumer.check_manifest(out / "weights")
    assert manifest["timestep_policy"]["registration"] == {
        "3.0": 'policy.register(range(2, 4), "static")',
        "3.1": 'policy.register(range(2, 4), "static", target="w8a8_static_linear")',
    }
    assert 'policy.register(range(2, 4), "static")' in dual_timestep_job.stdout


def test_each_rank_dumps_its_own_complete_self_describing_calibration_data(dual_timestep_job: PublishedJob):
    out = dual_timestep_job.folder
    for rank in (0, 1):
        dump = load_dump(out / "dumps" / f"calib_data_rank{rank}.pth")
        assert dump["header"]["rank"] == rank
        assert dump["header"]["fields"]["prompts.count"] == PROMPTS
        assert [record["timestep_idx"] for record in dump["records"]] == list(range(STEPS)) * PROMPTS
        embeddings = [record["kwargs"]["encoder_hidden_states"] for record in dump["records"]]
        # One storage for each prompt's embeddings, however many steps use them.
        assert len({tensor.untyped_storage().data_ptr() for tensor in embeddings}) == PROMPTS
        assert safe_torch_load(out / "dumps" / f"calib_data_rank{rank}.pth")["complete"] is True


def test_a_second_run_finds_everything_published_and_changes_nothing(dual_timestep_job: PublishedJob, tiny_flux_folder):
    out = dual_timestep_job.folder
    before = {path: path.stat().st_mtime_ns for path in (out / "weights").glob("quant_*")}
    again = run_job(2, "flux", tiny_flux_folder, dual_timestep_job.prompts, out, *dual_timestep_job.flags)
    assert "published already" in again.stdout
    unchanged = {path: path.stat().st_mtime_ns for path in before}
    assert unchanged == before


def test_another_job_does_not_silently_use_the_dumps_and_every_rank_ends(
    dual_timestep_job: PublishedJob, tiny_flux_folder, tmp_path
):
    out = dual_timestep_job.folder
    flags = (*dual_timestep_job.flags, "--seed", "7", "--quant_weight_save_folder", tmp_path)
    refused = run_job(2, "flux", tiny_flux_folder, dual_timestep_job.prompts, out, *flags, check=False)
    assert refused.returncode == 4
    assert "error: the calibration data was made by another job" in refused.stderr
    assert "pipeline.seed: 42 -> 7" in refused.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_joined_global_shards_are_the_tensors_of_the_undivided_model(tiny_flux_folder, prompts, tmp_path):
    scheme, rules = "w8a8_dynamic", {"transformer_blocks.0.*": "w8a16"}  # both kinds that are streamed, in one job
    flags = ("--quant_type", scheme, "--disable_names")  # no value: the row-split net.2 is quantized too
    flags += ("--layer_schemes", *(f"{pattern}={name}" for pattern, name in rules.items()))
    run_job(
        2, "flux", tiny_flux_folder, prompts, tmp_path / "tp2", *flags, "--device_type", "A2-32g-dual",
        "--scale_sync", "global",
    )  # fmt: skip
    quantize_alone(
        "flux", tiny_flux_folder, prompts, tmp_path / "tp1", quant_type=scheme, disable_names=(), layer_schemes=rules
    )
    whole = consumer.load(tmp_path / "tp1" / "weights", None, scheme)
    parts = [consumer.load(tmp_path / "tp2" / "weights", rank, scheme) for rank in (0, 1)]
    consumer.check(whole, torch.bfloat16)
    adapter = load_adapter("flux")
    shards = adapter.shard_plan("mindie").resolve(build_empty(adapter, tiny_flux_folder / "transformer"), 0, 2)
    for name, tensor in whole.tensors.items():
        shard = shards.get(name.rpartition(".")[0])
        pieces = [part.tensors.get(name) for part in parts]
        joined = pieces[0] if shard is None else join(name, pieces, shard)
        assert joined is not None, name
        assert joined.dtype == tensor.dtype
        assert torch.equal(joined, tensor), name


def test_sd3_on_two_ranks_spreads_one_copy_over_both(dual_sd3_job: PublishedJob):
    assert "world 2 = dp 1 × tp 2" in dual_sd3_job.stdout
    for rank in (0, 1):
        loaded = consumer.load(dual_sd3_job.folder / "weights", rank, "w8a8")
        consumer.check(loaded, torch.float16)
        assert loaded.description["pos_embed.pos_embed"] == "FLOAT"
        bias = "transformer_blocks.0.attn.to_out.0.bias"
        assert (bias in loaded.tensors) == (rank == 0), "a row-split bias lives on the first rank only"
        assert "transformer_blocks.0.attn.to_out.0.quant_bias" in loaded.tensors


def test_sd3_of_the_hub_alone_writes_files_without_a_rank_and_a_job_for_any_host(
    tiny_sd3_folder, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: str(tiny_sd3_folder))
    monkeypatch.setattr("launcher.files.digests._GRAIN_S", 0)  # a real shard takes longer to write
    quantize_alone("sd3", "owner/sd3", prompts, tmp_path)
    assert job_from_yaml((tmp_path / "weights" / "quant_job.yaml").read_text()).pipeline.path == "owner/sd3"
    consumer.check(consumer.load(tmp_path / "weights", None, "w8a8"), torch.float16)
    assert (tmp_path / "dumps" / "calib_data.pth").is_file()
    manifest = consumer.check_manifest(tmp_path / "weights")
    assert [file["name"] for file in manifest["files"]] == [
        "quant_model_weight_w8a8.safetensors",
        "quant_model_description_w8a8.json",
    ]
    monkeypatch.setattr("launcher.files.digests._read", lambda path: pytest.fail(f"{path} is read again"))
    assert digest_of_file(tmp_path / "weights" / manifest["files"][0]["name"]) == manifest["files"][0]["sha256"]


def quantize_alone(model: str, folder: Path | str, prompts: Path, out: Path, **quantization: object) -> None:
    """Run the job in this very process, as one rank."""
    pipeline = {"path": str(folder), "prompt_path": str(prompts), "width": 64, "height": 64, "infer_steps": STEPS}
    folders = {"quant_weight_save_folder": out / "weights", "quant_dump_calib_folder": out / "dumps"}
    tree = {
        "pipeline": pipeline,
        "quantization": {"do_quant": True, **quantization},
        "ranks": {"device": "cpu"},
        "output": folders,
    }
    run(job_config(model, tree))


def test_the_logs_of_all_ranks_become_a_trace_that_shows_who_waited(dual_timestep_job: PublishedJob) -> None:
    ranks = last_run(dual_timestep_job.folder / "weights", "quantize")
    assert list(ranks) == [0, 1]
    spans = [event for event in trace_events(ranks) if event["ph"] == "X"]
    for rank in ranks:
        names = {event["name"] for event in spans if event["pid"] == rank}
        assert {"prepare", "load", "calibrate", "quantize", "merge", "waits: whether to calibrate"} <= names
        stages = sorted((e["ts"], e["dur"]) for e in spans if e["pid"] == rank and not e["name"].startswith("waits"))
        assert all(end + 2e3 >= begin + length for (begin, length), (end, _) in pairwise(stages))
