"""`launcher plan` tells scope, shards, bytes and every problem of the true models from configurations and headers."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.command_line import parse
from launcher.config.job_config import JobConfig
from launcher.config.yaml_text import commented_yaml
from launcher.devices.launch import Launch
from launcher.files.identity import calibration_fingerprint, quantization_fingerprint
from launcher.files.manifest import Manifest
from launcher.files.run_folder import MANIFEST
from launcher.inspection.plan import Plan, make_plan
from launcher.inspection.plan_text import told
from launcher.inspection.room import require_room
from launcher.ranks.mesh import Mesh
from model_adapters import load_adapter
from model_adapters.pipeline.prompts import read_batches
from model_adapters.weights.model_folder import WEIGHTS_NAME
from model_adapters.weights.transformer_part import build_empty
from quant_core.errors import ConfigurationError, EnvironmentFailure, InputError
from scripts.make_full_size_pipeline import FLUX, SD3
from scripts.make_tiny_pipeline import write_prompts
from tests.support.torchrun import ROOT

# The published configurations of FLUX.1-dev and SD3-medium, and the dtype of their files.
MODELS: dict[str, tuple[dict[str, Any], str, int]] = {"flux": (FLUX, "BF16", 2), "sd3": (SD3, "F16", 2)}


def pipeline(name: str, folder: Path, **changes: object) -> Path:
    """Make a pipeline folder whose weights are a header over a hole of the real size: nothing is on the disk."""
    config, dtype, width = MODELS[name]
    config = config | changes
    transformer = folder / name / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps(config))
    shapes = {key: tuple(v.shape) for key, v in build_empty(load_adapter(name), transformer).state_dict().items()}
    write_hole(transformer / WEIGHTS_NAME, shapes, dtype, width)
    return folder / name


def write_hole(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, width: int) -> None:
    """Write the header of tensors over a hole of their size."""
    header, end = {}, 0
    for tensor, shape in shapes.items():
        size = prod(shape) * width
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("real sizes")
    write_prompts(made / "prompts.txt")
    for name in MODELS:
        pipeline(name, made)
    return made


def words(folder: Path, model: str, *more: str, path: str | None = None) -> list[str]:
    files = ["--quant_weight_save_folder", str(folder / "w"), "--quant_dump_calib_folder", str(folder / "c")]
    named = ["--sd3_model_path" if model == "sd3" else "--path", path or str(folder / model)]
    return ["plan", model, *named, "--prompt_path", str(folder / "prompts.txt"), "--do_quant", *files, *more]


def with_scheduler(folder: Path, copy: Path, name: str) -> Path:
    """Make a pipeline folder that has another one's transformer, and a scheduler."""
    (copy / "transformer").symlink_to(folder / "transformer")
    (copy / "scheduler").mkdir()
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, "shift": 3.0}))
    return copy


def planned(folder: Path, model: str, *more: str, world: int | None = None) -> Plan:
    options = parse(words(folder, model, *more)).options
    assert isinstance(options, JobConfig)
    return make_plan(options, world)


DUAL = ("--device_type", "A2-32g-dual")


@pytest.mark.parametrize(
    ("model", "flags", "linears", "quantized"),
    [
        ("flux", DUAL, 504, 465),
        ("flux", (*DUAL, "--quant_type", "w8a8_dynamic"), 504, 465),
        ("flux", (*DUAL, "--quant_type", "w8a8_dynamic_fa3"), 504, 503),
        ("sd3", (), 340, 338),
    ],
)
def test_the_true_models_have_the_scope_of_their_recipes(folder: Path, model, flags, linears: int, quantized: int):
    plan = planned(folder, model, *flags)
    assert plan.problems == []
    assert (plan.linears, plan.quantized) == (linears, quantized)


def test_a_rank_of_the_dual_layout_holds_14_15_gib_of_weights(folder: Path):
    plan = planned(folder, "flux", *DUAL)
    assert plan.memory is not None
    assert f"{plan.memory.weights / 2**30:.2f}" == "14.15"
    said = "\n".join(told(plan, "npu"))
    assert "ranks: world 2 = dp 1 × tp 2" in said
    assert "layers: 504 linears, 465 quantized, 39 float" in said
    assert "layout mindie: tensor-parallel sizes that divide the model" in said
    assert "14.15 GiB of float weights" in said
    assert "--disable_names *net.2*" in said
    assert "200 to calibrate (4 batches of 50 steps)" in said
    assert said.endswith("ok: the job would start")


ONLINE = ("--quant_type", "w8a8_timestep", "--calibrate", "online")


def test_online_ranges_cost_no_second_forward_and_leave_no_calibration_data(folder: Path):
    plan = planned(folder, "flux", *ONLINE, "--no_dump")
    said = "\n".join(told(plan, "npu"))
    assert "200 to calibrate (4 batches of 50 steps); none to quantize, as ranges are taken while calibrating" in said
    assert "replayed" not in said
    assert "no calibration data" in said
    assert "no calibration data" not in "\n".join(told(planned(folder, "flux", *ONLINE), "npu"))
    assert plan.problems == []


def test_a_search_is_told_to_replay_all_the_same_and_cannot_do_without_a_dump(folder: Path):
    searched = (*ONLINE, "--anti_method", "m3")
    said = "\n".join(told(planned(folder, "flux", *searched), "npu"))
    assert "each record replayed twice to quantize" in said
    assert "online replays all the same: m3 searches its factors among the inputs themselves" in said
    [problem] = planned(folder, "flux", *searched, "--no_dump").problems
    assert isinstance(problem, ConfigurationError)
    assert "--no_dump" in problem.what


def test_attention_behind_fused_smoothing_is_told_to_replay_all_the_same(folder: Path):
    fused = ("--quant_type", "w8a8_dynamic_fa3", "--calibrate", "online", "--anti_method", "m4", "--anti_fused")
    said = "\n".join(told(planned(folder, "flux", *fused, "--disable_names"), "npu"))
    assert "online replays all the same: with fused smoothing the layers in front divide" in said


# Peaks that one NVIDIA H100 measured on jobs of FLUX.1-dev's size, in GiB: 1024 x 1024, 2 prompts, 4 steps, bfloat16. A
# stage notes what the card held, or the host where that held more.
@pytest.mark.parametrize(
    ("flags", "place", "gib"),
    [
        (("--quant_type", "w8a8_dynamic"), "cuda", 22.52),
        (("--quant_type", "w8a8_timestep", "--anti_method", "m4"), "cuda", 22.72),
        (("--quant_type", "w8a8_timestep", "--anti_method", "m4"), "host", 12.55),
        (("--quant_type", "w8a8_dynamic_fa3", "--device_type", "A2-32g-single"), "host", 35.30),
    ],
)
def test_the_forecast_of_a_card_and_its_host_is_what_a_card_measured(folder: Path, flags, place: str, gib: float):
    plan = planned(folder, "flux", "--max_num_prompt", "2", "--infer_steps", "4", *flags)
    [said] = [line for line in told(plan, "cuda") if line.startswith(f"  {place}, at most: ")]
    assert float(said.split()[-2]) == pytest.approx(gib, rel=0.15)


def test_a_card_that_offloads_holds_a_block_and_not_the_model_where_the_transformer_runs_alone(folder: Path):
    words = ("--quant_type", "w8a8_dynamic_fa3", "--device_type")
    kept, away = (planned(folder, "flux", *words, name).memory for name in ("A2-64g", "A2-32g-single"))
    assert kept is not None
    assert kept == away
    assert kept.visiting < kept.weights / 20


def test_a_plan_holds_no_weights_and_leaves_out_what_it_can_do_without(folder: Path):
    code = """
import sys
from scripts.bench.usage import resident
from launcher.cli.command_line import parse
parse(sys.argv[1:]).run(None)
assert sys.modules["transformers"] is None, "imported, which takes longer than all that a plan does"
assert "torch._dynamo.convert_frame" not in sys.modules
print(resident(mark="peak"))
"""
    program = [sys.executable, "-c", code, *words(folder, "flux", *DUAL)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2**30, "bytes, of a model whose weights take 14 GiB on each rank"


def test_a_plan_is_made_also_where_another_library_builds_on_those_left_out(folder: Path):
    code = """
import sys
from launcher.cli.commands import plan
from launcher.cli.command_line import parse
slow = plan._slow()
del slow["peft"]  # which is installed for the tests, and imports transformers
plan._slow = lambda: slow
parse(sys.argv[1:]).run(None)
assert sys.modules["transformers"] is not None and sys.modules["peft"] is not None
assert slow["torch._dynamo"] not in sys.modules.values()
"""
    done = subprocess.run([sys.executable, "-c", code, *words(folder, "flux", *DUAL)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ok: the job would start" in done.stdout


def test_divisibility_is_told_for_other_numbers_of_ranks(folder: Path):
    assert planned(folder, "flux", *DUAL).tp_sizes == [1, 2, 3, 4, 6, 8, 12]
    assert planned(folder, "sd3").tp_sizes == [1, 2, 3, 4, 6, 8, 12]
    [problem] = planned(folder, "sd3", world=5).problems
    assert problem.what == "SD3Transformer2DModel cannot be divided over 5 tensor-parallel ranks"


def test_smoothing_groups_are_counted_by_their_pattern(folder: Path):
    plan = planned(folder, "flux", *DUAL, "--anti_method", "m4")
    assert plan.smoothing is not None
    assert len(plan.smoothing.smoothed) == 6 * 19
    said = "\n".join(told(plan, "npu"))
    assert "19 transformer_blocks.*.attn.to_q + transformer_blocks.*.attn.to_k + transformer_blocks.*.attn.to_v" in said
    nothing = planned(
        folder, "sd3", "--anti_method", "m4", "--disable_names", "transformer_blocks.*", "context_embedder"
    )
    assert [problem.what for problem in nothing.problems] == [
        "no group of linears of SD3Transformer2DModel is left to smooth"
    ]


def test_rotated_attentions_are_counted_and_those_left_alone_say_why(folder: Path):
    flags = ("--rotate_values", "--disable_names", "transformer_blocks.1.attn.to_out.0")
    plan = planned(folder, "flux", *DUAL, *flags)
    assert plan.rotations is not None
    assert len(plan.rotations.attentions) == 18 + 38
    said = "\n".join(told(plan, "npu"))
    assert "rotation: the values of 56 attentions" in said
    assert "left out: transformer_blocks.*.attn: transformer_blocks.*.attn.to_out.0 stays float" in said
    nothing = planned(folder, "sd3", "--rotate_values", "--disable_names", "*.attn.to_v")
    assert [problem.what for problem in nothing.problems] == ["no attention of SD3Transformer2DModel can be rotated"]


def test_every_problem_is_found_and_not_the_first(folder: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    flags = ("--disable_names", "*net.9*", "to_z", "--prompt_path", str(tmp_path / "none"), "--layout", "mindie")
    flags += ("--do_save_img", "--save_path", str(tmp_path / "file"))
    found = [problem.what for problem in planned(folder, "flux", *DUAL, *flags, world=3).problems]
    assert len(found) == 5
    for text in ("3 ranks cannot form groups of 2", "*net.9*", "to_z", "prompt file", "is a file"):
        assert any(text in what for what in found), (text, found)


@pytest.mark.parametrize(
    ("flag", "place", "what"),
    [
        ("--save_path", "file", "is a file"),
        ("--save_path", "file/images", "is a file"),
        ("--info_file_save_path", ".", "is a folder"),
        ("--info_file_save_path", "file/list.json", "is a file"),
        ("--info_file_save_path", "new/folder/list.json", None),
    ],
)
def test_a_place_for_images_or_their_list_that_can_hold_none_is_found_before_any_is_painted(
    folder: Path, tmp_path: Path, flag: str, place: str, what: str | None
):
    (tmp_path / "file").touch()
    flags = ("--do_save_img", "--save_path", str(tmp_path / "images"), "--info_file_save_path", str(tmp_path / "list"))
    found = planned(folder, "flux", *DUAL, *flags, *[flag, str(tmp_path / place)]).problems
    assert [(problem.where, what in problem.what) for problem in found] == ([(flag, True)] if what else [])


def publish(config: JobConfig, name: str) -> None:
    """Leave the manifest that a job on one rank leaves."""
    adapter, mesh = load_adapter(name), Mesh(Launch(), 1)
    batches = read_batches(config.pipeline, are_needed=True)
    calibration = calibration_fingerprint(config, adapter, mesh, {"transformer/config.json": "0" * 64}, batches)
    disabled = adapter.disabled_layers[config.quantization.main_type]
    fields = dict(quantization_fingerprint(calibration, config, disabled).fields)
    names = {"quant_type": "W8A8", "fingerprint": "0" * 64, "layout": "mindie"}
    folder = config.output.quant_weight_save_folder
    assert folder is not None
    Manifest(**names, fields=fields, tp_size=1, dp_size=1, files=[]).write(folder / MANIFEST)


def test_a_checkpoint_of_another_job_keeps_the_job_from_starting_and_its_own_does_not(folder: Path, tmp_path: Path):
    mine = ("--device", "cpu", "--quant_weight_save_folder", str(tmp_path / "w"))
    config = parse(words(folder, "flux", *mine)).options
    assert isinstance(config, JobConfig)
    publish(config, "flux")
    same = planned(folder, "flux", *mine)
    assert same.problems == []
    on_cards = planned(folder, "flux", *mine, "--device", "npu").problems
    assert [problem.why for problem in on_cards] == ["ranks.device: cpu -> npu"]
    assert "mesh.world: 1 -> 2" in planned(folder, "flux", *mine, world=2).problems[0].why
    [problem] = planned(folder, "flux", *mine, "--seed", "7", "--disable_names", "proj_out").problems
    assert isinstance(problem, InputError)
    assert "pipeline.seed: 42 -> 7; quantization.disable_names: " in problem.why
    assert planned(folder, "flux", *mine, "--seed", "7", "--resume", "never").problems
    assert planned(folder, "flux", *mine, "--seed", "7", "--overwrite").problems == []


def test_a_disk_that_is_too_small_is_told_with_what_it_takes(tmp_path: Path):
    require_room({tmp_path: 1})
    with pytest.raises(EnvironmentFailure, match=r"it takes 1073741824\.0 GiB, and \d+\.\d GiB are free"):
        require_room({tmp_path: 2**60})


def test_without_weight_files_the_configuration_tells_the_rest_and_the_plan_says_so(folder: Path, tmp_path: Path):
    bare = tmp_path / "bare" / "transformer"
    bare.mkdir(parents=True)
    (bare / "config.json").write_text(json.dumps(FLUX))
    plan = make_plan(parse(words(folder, "flux", *DUAL, path=str(bare.parent))).options)
    assert [type(problem) for problem in plan.problems] == [InputError]
    assert plan.memory is not None
    assert f"{plan.memory.weights / 2**30:.2f}" == "14.15"
    assert "config.json alone" in plan.remarks[0]


def test_a_model_that_streams_takes_no_calls_and_little_memory(folder: Path):
    plan = planned(folder, "flux", *DUAL, "--quant_type", "w8a8_dynamic", "--calibrate", "needed")
    said = "\n".join(told(plan, "npu"))
    assert plan.streams
    assert "calls of the transformer: none" in said
    assert "layer by layer from disk" in said


def test_prompts_are_needed_where_the_pipeline_runs_and_only_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    given = words(folder, "flux", "--config", "quality")
    del given[(place := given.index("--prompt_path")) : place + 2]
    for more, needs in (
        ((), False),
        (("--path", "some-owner/some-model"), False),
        (("--calibrate", "always"), True),
        (("--quant_type", "w8a8"), True),
        (("--quant_type", "w8a8", "--path", "some-owner/some-model"), True),
        (("--anti_method", "m4"), True),
        (("--do_save_img",), True),
        (("--evaluate", "2"), True),
        (("--evaluate", "2", "--evaluate_prompts", str(folder / "prompts.txt")), False),
    ):
        problems = make_plan(parse([*given, *more]).options).problems
        assert ["no such prompt file" in problem.what for problem in problems] == [True] * needs, more


def test_a_problem_of_the_fallback_is_one_problem_and_not_an_end(folder: Path, tmp_path: Path):
    for rank in range(2):
        divided = tmp_path / f"transformer_{rank}"
        divided.mkdir()
        (divided / "config.json").write_text(json.dumps(FLUX))
    plan = planned(folder, "flux", "--device_type", "A2-64g", "--path", str(tmp_path))
    assert [problem.what.partition(",")[0] for problem in plan.problems] == ["the transformer is divided already"]
    assert plan.memory is None


def test_the_fallback_goes_without_a_lora_that_cannot_be_read(folder: Path, tmp_path: Path):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"no header")
    plan = planned(folder, "flux", *DUAL, "--lora", str(lora))
    assert len(plan.problems) == 1
    assert plan.memory is not None


def test_a_model_on_the_hub_is_not_fetched_for_a_plan(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    unknown = planned(folder, "flux", *DUAL, "--path", "some-owner/some-model")
    assert (unknown.problems, unknown.memory) == ([], None)
    assert "some-owner/some-model is not on this machine" in unknown.remarks[0]
    cached = tmp_path / "models--some-owner--some-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    begun = planned(folder, "flux", *DUAL, "--path", "some-owner/some-model")
    assert (begun.problems, begun.remarks) == ([], unknown.remarks)
    (snapshot / "transformer").symlink_to(folder / "flux" / "transformer")
    whole = planned(folder, "flux", *DUAL, "--path", "some-owner/some-model")
    assert (whole.problems, whole.remarks) == ([], [])
    assert whole.linears == 504


def test_prompts_of_an_evaluation_are_looked_at(folder: Path, tmp_path: Path):
    [problem] = planned(folder, "flux", *DUAL, "--evaluate", "2", "--evaluate_prompts", str(tmp_path / "no")).problems
    assert str(tmp_path / "no") in problem.where


def test_a_job_of_images_is_told_without_layers_and_disk(folder: Path):
    asked = [word for word in words(folder, "flux", *DUAL, "--do_save_img") if word != "--do_quant"]
    plan = make_plan(parse([*asked, "--disable_names", "to_z"]).options)
    said = "\n".join(told(plan, "npu"))
    assert said.startswith("plan of flux, images of the float model\n")
    assert "200 for images" in said
    assert not any(word in said for word in ("calibrat", "quantiz", "disk"))
    assert said.endswith("ok: the job would start")


def test_images_and_an_evaluation_are_counted_beside_the_calibration(folder: Path):
    plan = planned(folder, "flux", *DUAL, "--do_save_img", "--evaluate", "3")
    said = "\n".join(told(plan, "npu"))
    assert (
        "200 to calibrate (4 batches of 50 steps); each record replayed once to quantize; 200 for images; 450" in said
    )
    assert (memory := plan.memory) is not None
    assert f"npu, at most: {(memory.weights + memory.comparing) / 2**30:.2f} GiB" in said


def test_a_model_without_guidance_is_planned_and_takes_no_scale(folder: Path, tmp_path: Path):
    schnell = str(pipeline("flux", tmp_path, guidance_embeds=False))
    plan = planned(folder, "flux", *DUAL, "--path", schnell, "--infer_steps", "4")
    assert plan.problems == []
    assert plan.memory is not None
    [problem] = planned(folder, "flux", *DUAL, "--path", schnell, "--guidance_scale", "3.5").problems
    assert problem.what == "--guidance_scale 3.5 has no meaning for this transformer"


def test_a_tokenizer_that_was_not_copied_is_a_problem_where_prompts_are_encoded(folder: Path, tmp_path: Path):
    model = with_scheduler(folder / "flux", tmp_path, "FlowMatchEulerDiscreteScheduler")
    (model / "model_index.json").write_text(json.dumps({"tokenizer_2": ["transformers", "T5TokenizerFast"]}))
    asked = ("--path", str(model), "--quant_type", "w8a8_dynamic")
    [problem] = planned(folder, "flux", *asked).problems
    assert problem.what == "tokenizer_2/ has no vocabulary"
    assert planned(folder, "flux", *asked, "--calibrate", "needed").problems == []


def test_text_encoders_larger_than_the_transformer_are_the_most_that_a_job_holds(folder: Path, tmp_path: Path):
    """SD3-medium has 4 GiB, its T5 more than twice that."""
    model = with_scheduler(folder / "sd3", tmp_path, "FlowMatchEulerDiscreteScheduler")
    (model / "model_index.json").write_text(json.dumps({"text_encoder_3": ["transformers", "T5EncoderModel"]}))
    (model / "text_encoder_3").mkdir()
    write_hole(model / "text_encoder_3" / "model.safetensors", {"shared.weight": (4762310656,)}, "F16", 2)
    asked = ("--sd3_model_path", str(model))
    said = "\n".join(told(planned(folder, "sd3", *asked), "cuda"))
    assert "cuda, at most: 8.87 GiB" in said
    assert "host, at most: 10.97 GiB" in said
    streamed = planned(folder, "sd3", *asked, "--quant_type", "w8a8_dynamic", "--calibrate", "needed")
    assert streamed.memory is not None
    assert streamed.memory.encoding == 0


def test_an_image_larger_than_the_table_of_positions_is_a_problem(folder: Path):
    [problem] = planned(folder, "sd3", "--width", "3088").problems
    assert problem.what == "an image of 3088 x 1024 pixels is too large for this transformer"
    assert problem.advice == "ask for at most 3072 pixels a side"
    assert planned(folder, "sd3", "--width", "3072").problems == []


def test_steps_that_the_scheduler_computes_twice_are_counted_twice(folder: Path, tmp_path: Path):
    twice = with_scheduler(folder / "sd3", tmp_path, "FlowMatchHeunDiscreteScheduler")
    once, plan = planned(folder, "sd3"), planned(folder, "sd3", "--sd3_model_path", str(twice))
    assert plan.problems == []
    assert "220 to calibrate (4 batches of 55 steps)" in "\n".join(told(plan, "cpu"))
    assert plan.memory is not None
    assert once.memory is not None
    assert plan.memory.dump > 1.7 * once.memory.dump


def test_a_scheduler_that_the_pipeline_cannot_use_is_a_problem(folder: Path, tmp_path: Path):
    other = with_scheduler(folder / "flux", tmp_path, "FlowMatchHeunDiscreteScheduler")
    [problem] = planned(folder, "flux", "--path", str(other)).problems
    assert "cannot use the scheduler FlowMatchHeunDiscreteScheduler" in problem.what
    runs_nothing = ("--quant_type", "w8a8_dynamic", "--calibrate", "needed")
    assert planned(folder, "flux", "--path", str(other), *runs_nothing).problems == []


def test_a_job_that_chooses_schemes_says_which_bytes_are_told(folder: Path):
    plan = planned(folder, "sd3", "--quant_type", "auto")
    assert plan.problems == []
    assert "bytes are those of w8a8 in all of them" in plan.remarks[0]
    assert "some records replayed to choose; each record replayed twice" in "\n".join(told(plan, "cpu"))


def test_a_job_that_quantizes_nothing_by_its_own_scheme_is_planned_if_it_quantizes_something(folder: Path):
    mixed = planned(folder, "sd3", "--disable_names", "*", "--layer_schemes", "*.attn.to_q=w8a8_dynamic")
    assert (mixed.problems, mixed.streams) == ([], True)
    assert mixed.quantized > 0
    [nothing] = planned(folder, "sd3", "--disable_names", "*").problems
    assert nothing.what == "no layer of SD3Transformer2DModel is left to quantize"


def test_folders_on_one_disk_need_room_together_but_for_what_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = planned(folder, "flux", *DUAL).memory
    assert memory is not None
    weights, dumps = 2 * memory.quantized, 2 * memory.dump
    usage = shutil.disk_usage(tmp_path)._replace(free=max(weights, dumps) + 1)  # enough for either
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    places = ("--quant_weight_save_folder", str(tmp_path / "w"), "--quant_dump_calib_folder", str(tmp_path / "d" / "c"))
    (tmp_path / "w" / ".shards").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    [problem] = planned(folder, "flux", *DUAL, *places).problems
    assert problem.what == "the disk is too small for what the job writes"
    assert problem.where == f"{tmp_path / 'w'}, {tmp_path / 'd'}"
    staged = tmp_path / "w" / ".shards" / "quant_model_weight_w8a8_timestep_0.safetensors"
    staged.touch()
    os.truncate(staged, weights)
    assert planned(folder, "flux", *DUAL, *places).problems == []
    assert planned(folder, "flux", *DUAL, *places, "--resume", "never").problems != []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "kept if it is this job's, and refused if not"),
        (("--overwrite",), "kept if it is this job's, and replaced (--overwrite) if not"),
        (("--resume", "never"), "made anew (--resume never) if it is this job's, and refused if not"),
    ],
)
def test_a_plan_says_what_becomes_of_a_published_checkpoint(
    flags: tuple[str, ...], said: str, folder: Path, tmp_path: Path
):
    mine = ("--device", "cpu", "--quant_weight_save_folder", str(tmp_path), *flags)
    publish(parse(words(folder, "flux", *mine)).options, "flux")
    remarks = planned(folder, "flux", *mine).remarks
    assert f"{tmp_path} holds a published checkpoint: {said}" in remarks


def test_the_options_that_a_plan_writes_are_those_of_the_job(folder: Path, tmp_path: Path):
    file = tmp_path / "job.yaml"
    with pytest.raises(SystemExit):
        parse(words(folder, "flux", *DUAL, "--world_size", "4", "--write_config", str(file)))
    assert commented_yaml(parse(["flux", "--config", str(file)]).options) == file.read_text()


def test_the_command_and_a_dry_run_of_the_job_print_the_same_plan(folder: Path, capsys: pytest.CaptureFixture[str]):
    asked = words(folder, "sd3")
    parse(asked).run(None)
    plan = capsys.readouterr().out
    parse([*asked[1:], "--dry_run"]).run(None)
    assert capsys.readouterr().out == plan
    assert not (folder / "w").exists()
    assert not (folder / "c").exists()


def test_a_plan_with_problems_ends_with_their_kind(folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigurationError) as ended:
        parse(words(folder, "sd3", "--disable_names", "to_z")).run(None)
    said = capsys.readouterr().out
    assert "!! no layer matches 'to_z'\n   where  --disable_names" in said
    assert said.endswith("!! 1 problem: the job would not start\n")
    # Nothing is explained twice on one terminal.
    assert ended.value.what == "the job would not start"
    assert ended.value.why == "no layer matches 'to_z'"
