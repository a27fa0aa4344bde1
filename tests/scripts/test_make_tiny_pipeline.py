"""The tiny pipelines are complete, loadable, repeatable, and as hard to quantize as a trained model."""

from __future__ import annotations

import json
import stat
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_core.errors import ConfigurationError, InputError
from scripts.make_tiny_pipeline import DTYPES, RECIPES, main, make_tiny_pipeline, write_prompts
from scripts.tiny_outliers import OUTLIER_GAINS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_tiny_pipeline.py"
FLUX_FOLDERS = {"scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"}
SD3_FOLDERS = FLUX_FOLDERS | {"text_encoder_3", "tokenizer_3"}
SIDE, STEPS = 64, 2  # 16 latent patches, and the fewest steps that show two timesteps
WITH_OUTLIERS = ("attn", "ff", "proj_mlp", "proj_out", "context_embedder")


@pytest.fixture(scope="session")
def folders(tiny_flux_folder: Path, tiny_sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of every kind."""
    sd3_5 = make_tiny_pipeline("sd3.5", tmp_path_factory.mktemp("pipelines") / "tiny-sd3.5")
    return {"flux": tiny_flux_folder, "sd3": tiny_sd3_folder, "sd3.5": sd3_5}


def load(folder: Path, dtype: str) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, prompt: str = "a cat", steps: int = STEPS) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt, width=SIDE, height=SIDE, num_inference_steps=steps, generator=generator, output_type="np"
    ).images[0]


def linear_inputs(pipeline: Any, prompt: str = "a cat") -> dict[str, Tensor]:
    """Return what each linear of the transformer reads during a run: name -> (tokens of all calls, channels)."""
    seen: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Any:
        return lambda _module, args: seen.setdefault(name, []).append(args[0].detach().float().flatten(0, -2))

    linears = [(name, module) for name, module in pipeline.transformer.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(listen(name)) for name, module in linears]
    paint(pipeline, prompt)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def has_outliers(name: str) -> bool:
    return name.split(".")[0] in WITH_OUTLIERS or any(f".{part}" in name for part in WITH_OUTLIERS)


@pytest.mark.parametrize(
    ("kind", "pipeline_class"),
    [("flux", FluxPipeline), ("sd3", StableDiffusion3Pipeline), ("sd3.5", StableDiffusion3Pipeline)],
)
def test_the_stock_pipeline_loads_the_folder_and_paints(
    folders: dict[str, Path], kind: str, pipeline_class: type
) -> None:
    pipeline = load(folders[kind], RECIPES[kind].dtype)
    image = paint(pipeline)
    assert type(pipeline) is pipeline_class
    assert image.shape == (SIDE, SIDE, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.05  # of a range of 1: neither flat nor saturated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", RECIPES)
def test_nothing_overflows_in_any_dtype(folders: dict[str, Path], kind: str, dtype: str) -> None:
    inputs = linear_inputs(load(folders[kind], dtype))
    assert all(tensor.isfinite().all() for tensor in inputs.values())
    # a factor 60 below the largest float16 (65504), so that longer prompts and more steps stay safe
    assert max(tensor.abs().max().item() for tensor in inputs.values()) < 1000


@pytest.mark.parametrize(("kind", "names"), [("flux", FLUX_FOLDERS), ("sd3", SD3_FOLDERS), ("sd3.5", SD3_FOLDERS)])
def test_the_layout_is_that_of_the_real_repository(folders: dict[str, Path], kind: str, names: set[str]) -> None:
    folder = folders[kind]
    assert {entry.name for entry in folder.iterdir()} == names | {"model_index.json"}
    index = json.loads((folder / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == names
    assert index["text_encoder"][1] == ("CLIPTextModel" if kind == "flux" else "CLIPTextModelWithProjection")
    for model, stem in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        assert {entry.name for entry in (folder / model).iterdir()} == {"config.json", f"{stem}.safetensors"}
    assert (folder / "text_encoder" / "model.safetensors").is_file()
    assert {"vocab.json", "merges.txt"} < {entry.name for entry in (folder / "tokenizer").iterdir()}


def test_schedulers_shift_as_the_real_ones(folders: dict[str, Path]) -> None:
    flux, sd3 = (
        json.loads((folders[kind] / "scheduler" / "scheduler_config.json").read_text()) for kind in ("flux", "sd3")
    )
    assert (flux["use_dynamic_shifting"], flux["base_shift"], flux["max_shift"]) == (True, 0.5, 1.15)
    assert (sd3.get("use_dynamic_shifting", False), sd3["shift"]) == (False, 3.0)


@pytest.mark.parametrize("kind", RECIPES)
def test_heads_and_feed_forward_divide_by_four(folders: dict[str, Path], kind: str) -> None:
    transformer = load(folders[kind], "float32").transformer
    assert transformer.config.num_attention_heads % 4 == 0  # tp = 2 and tp = 4
    widths = [m.out_features for name, m in transformer.named_modules() if name.endswith(("net.0.proj", "proj_mlp"))]
    assert widths
    assert all(width % 4 == 0 for width in widths)


def test_flux_has_guidance_and_two_blocks_of_each_sort(folders: dict[str, Path]) -> None:
    transformer = load(folders["flux"], "bfloat16").transformer
    assert transformer.config.guidance_embeds
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (2, 2)


def test_the_last_sd3_block_has_no_text_output(folders: dict[str, Path]) -> None:
    blocks = load(folders["sd3"], "float16").transformer.transformer_blocks
    assert [block.context_pre_only for block in blocks] == [False, False, True]


def test_sd3_5_has_normed_queries_and_a_second_attention(folders: dict[str, Path]) -> None:
    blocks = load(folders["sd3.5"], "float16").transformer.transformer_blocks
    assert [block.attn2 is not None for block in blocks] == [True, True, False]
    assert all(block.attn.norm_q is not None for block in blocks)


@pytest.mark.parametrize("kind", RECIPES)
def test_every_quantized_linear_reads_outlier_channels(folders: dict[str, Path], kind: str) -> None:
    amplitudes = {
        name: tensor.abs().amax(0)
        for name, tensor in linear_inputs(load(folders[kind], RECIPES[kind].dtype)).items()
        if has_outliers(name)
    }
    expected = {start + channel for start in (0, 64) for channel in OUTLIER_GAINS}  # 64: after the heads, in proj_out
    assert len(amplitudes) > 20  # the blocks' linears, not a name that happens to match
    for name, amplitude in amplitudes.items():
        # gains are 20 to 50; the amplitude of a channel without gain varies by about 2 around the median
        assert amplitude.max() / amplitude.median() > 15, name
        assert int(amplitude.argmax()) in expected, name
        assert (amplitude > 8 * amplitude.median()).sum() <= 2 * len(OUTLIER_GAINS), name  # few (two packed inputs)


def int8_noise(x: Tensor, scale: Tensor) -> float:
    """Return the noise of rounding `x` to int8 with `scale`, in dB below the signal of the channels without gain."""
    rounded = (x / scale).round().clamp(-127, 127) * scale
    plain = [channel for channel in range(x.shape[1]) if channel not in OUTLIER_GAINS]
    return 10 * torch.log10(x[:, plain].square().sum() / (rounded - x)[:, plain].square().sum()).item()


def test_one_scale_for_all_channels_is_visibly_worse_than_one_a_channel(folders: dict[str, Path]) -> None:
    x = linear_inputs(load(folders["flux"], "float32"))["transformer_blocks.0.attn.to_q"]
    per_tensor = int8_noise(x, x.abs().amax() / 127)
    per_channel = int8_noise(x, x.abs().amax(0) / 127)
    # a step up to 50 times coarser is up to 34 dB; 15 is "visible" with room for the seed
    assert per_channel - per_tensor > 15


@pytest.mark.parametrize("kind", RECIPES)
def test_the_image_depends_on_the_prompt(folders: dict[str, Path], kind: str) -> None:
    pipeline = load(folders[kind], RECIPES[kind].dtype)
    difference = np.abs(paint(pipeline, "a cat") - paint(pipeline, "An old lighthouse, oil painting"))
    assert difference.mean() > 0.01  # of a range of 1: far above what rounding in bfloat16 does


@pytest.mark.parametrize("kind", RECIPES)
def test_the_blocks_see_the_timestep(folders: dict[str, Path], kind: str) -> None:
    conditioning = linear_inputs(load(folders[kind], "float32"))["transformer_blocks.0.norm1.linear"]
    first, last = conditioning[0], conditioning[-1]
    assert (first - last).abs().max() > 0.05  # two steps; the values are of the order of 0.3


@pytest.mark.parametrize("kind", RECIPES)
def test_the_same_seed_gives_the_same_bytes(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)  # whatever the caller's random state is
    again = make_tiny_pipeline(kind, tmp_path / "again")
    files = sorted(file.relative_to(again) for file in again.rglob("*") if file.is_file())
    assert sum(file.suffix == ".safetensors" for file in files) >= 4  # two encoders, transformer, VAE
    for file in files:
        assert (again / file).read_bytes() == (folders[kind] / file).read_bytes(), file


def test_making_a_pipeline_leaves_the_callers_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make_tiny_pipeline("sd3", tmp_path / "sd3")
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_gives_other_weights_and_the_same_shapes(folders: dict[str, Path], tmp_path: Path) -> None:
    file = Path("transformer", "diffusion_pytorch_model.safetensors")
    other = load_file(make_tiny_pipeline("flux", tmp_path / "other", seed=1) / file)
    first = load_file(folders["flux"] / file)
    assert {name: tensor.shape for name, tensor in first.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("kind", RECIPES)
def test_a_sharded_transformer_has_an_index_and_the_same_tensors(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    transformer = make_tiny_pipeline(kind, tmp_path / "sharded", sharded=True) / "transformer"
    index = json.loads((transformer / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2  # more files than ranks of tp = 2
    whole = load_file(folders[kind] / "transformer" / "diffusion_pytorch_model.safetensors")
    parts = {name: tensor for file in files for name, tensor in load_file(transformer / file).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_stored_in_the_dtype_asked_for(dtype: str, tmp_path: Path) -> None:
    folder = make_tiny_pipeline("flux", tmp_path / "flux", dtype=dtype)
    for file in folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {DTYPES[dtype]}, file


@pytest.mark.parametrize("kind", RECIPES)
def test_tokenizers_encode_any_printable_ascii(folders: dict[str, Path], kind: str) -> None:
    pipeline = load(folders[kind], RECIPES[kind].dtype)
    text = " ".join(string.printable.strip())
    pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    for tokenizer_name, encoder_name in pairs if kind == "flux" else [*pairs, ("tokenizer_3", "text_encoder_3")]:
        tokenizer, encoder = getattr(pipeline, tokenizer_name), getattr(pipeline, encoder_name)
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[:-1]  # CLIP's unknown token is its end of text, rightly the last
        assert max(ids) < encoder.config.vocab_size
        assert len(tokenizer) == encoder.config.vocab_size
        # special tokens stay: "!" is the padding of SD3's second tokenizer
        assert text.lower().replace(" ", "") in tokenizer.decode(ids).lower().replace(" ", "")


def test_clip_pads_as_the_real_repositories_do(folders: dict[str, Path]) -> None:
    sd3 = load(folders["sd3"], "float16")
    assert (sd3.tokenizer.pad_token, sd3.tokenizer_2.pad_token) == ("<|endoftext|>", "!")


@pytest.mark.parametrize("kind", RECIPES)
def test_a_folder_is_a_few_megabytes(folders: dict[str, Path], kind: str) -> None:
    assert sum(file.stat().st_size for file in folders[kind].rglob("*")) < 5e6  # "a few MB"


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="already holds something"):
        make_tiny_pipeline("flux", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled_and_no_temporary_one_remains(tmp_path: Path) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    make_tiny_pipeline("flux", target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in target.rglob("*") if file.is_file()} == {0o640}


@pytest.mark.parametrize(("kind", "dtype", "advice"), [("fluxx", None, "flux"), ("flux", "bfloat61", "bfloat16")])
def test_an_unknown_name_is_answered_with_the_nearest(
    kind: str, dtype: str | None, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"try    {advice}"):
        make_tiny_pipeline(kind, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_the_prompt_file_has_four_prompts_and_mode_0640(prompt_file: Path) -> None:
    lines = prompt_file.read_text().splitlines()
    assert len(lines) == 4
    assert all(lines)
    assert stat.S_IMODE(prompt_file.stat().st_mode) == 0o640  # the widest that the consumer accepts


def test_prompts_of_the_user_are_not_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "calib_prompts.txt"
    mine.write_text("my prompt\n")
    with pytest.raises(InputError, match="holds something else"):
        write_prompts(mine)
    assert mine.read_text() == "my prompt\n"


def test_writing_the_same_prompts_twice_is_no_mistake(prompt_file: Path) -> None:
    assert write_prompts(prompt_file) == prompt_file


def test_the_command_line_makes_pipeline_and_prompts_from_any_working_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "sd3", "out", "--sharded", "--dtype", "float32", "--prompts", "prompts.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert (tmp_path / "prompts.txt").is_file()


def test_the_command_line_explains_a_folder_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["flux", str(tmp_path)]) == 4  # the exit code of a bad input
    assert "already holds something" in capsys.readouterr().err


def test_a_folder_below_a_file_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["flux", str(tmp_path / "file" / "x")]) == 4
    assert "cannot be made" in capsys.readouterr().err
