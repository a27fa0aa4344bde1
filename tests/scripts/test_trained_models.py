"""The shipped trained pipelines are complete and small, paint what their prompts say, and can be made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_core.errors import InputError
from scripts import add_outlier_channels, train_tiny_model
from scripts.tiny_outliers import EQUAL_GAINS, OUTLIER_PATHS
from scripts.tiny_training.checking import held_out_scenes, look, paint
from scripts.tiny_training.drawing import SCENE_OF_CAPTION, SCENES, Scene, draw, random_placements, split_scenes
from scripts.tiny_training.steps import Budget
from scripts.tiny_training.text import token_ids
from scripts.train_tiny_model import RECIPES, Budgets

MODELS = Path(__file__).resolve().parents[2] / "scripts" / "tiny_models"
KINDS = ("flux", "sd3")
STEPS = 8  # of the sampler
WIDTH = 128  # channels of a transformer: 4 heads x 32
LEAST_RIGHT = {"flux": 7, "sd3": 7}  # of 8 pictures; all 8 were right, and another processor may round one away
STRAIGHT = torch.tensor([[0.0, 0.0, 1.0, 0.0]])  # no shift, usual size, no turn


@cache
def load(folder: Path) -> Any:
    """Load a pipeline in float32, so that rounding is that of the stored weights only."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts(name: str) -> list[str]:
    return (MODELS / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines()


def picture_of(scene: Scene) -> Tensor:
    return draw([scene], STRAIGHT)[0]


@pytest.mark.parametrize(("kind", "pipeline_class"), [("flux", FluxPipeline), ("sd3", StableDiffusion3Pipeline)])
def test_the_stock_pipeline_loads_the_shipped_folder(kind: str, pipeline_class: type) -> None:
    assert type(load(MODELS / kind)) is pipeline_class
    index = json.loads((MODELS / kind / "model_index.json").read_text(encoding="utf-8"))
    assert {name for name in index if not name.startswith("_")} == set(RECIPES[kind].components)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shipped_folder_is_at_most_5_mb_in_the_dtype_of_the_real_one(kind: str) -> None:
    files = [file for file in (MODELS / kind).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 5e6
    for file in files:
        if file.suffix == ".safetensors":
            assert {tensor.dtype for tensor in load_file(file).values()} == {RECIPES[kind].dtype}, file


@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_divides_by_two_and_four_ranks_and_its_heads_can_be_rotated(kind: str) -> None:
    transformer = load(MODELS / kind).transformer
    head_dim = transformer.config.attention_head_dim
    assert transformer.config.num_attention_heads % 4 == 0
    assert head_dim & (head_dim - 1) == 0  # a Hadamard matrix of this size exists
    widths = [m.out_features for name, m in transformer.named_modules() if name.endswith(("net.0.proj", "proj_mlp"))]
    assert widths
    assert all(width % 4 == 0 for width in widths)


def test_the_text_encoder_of_flux_has_the_tensor_names_of_the_real_repository() -> None:
    names = load_file(MODELS / "flux" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_prompts_for_calibration_and_evaluation_share_nothing() -> None:
    trained, held_out = ({scene.caption for scene in scenes} for scenes in split_scenes())
    assert len(set(prompts("calibration"))) == 24
    assert len(set(prompts("evaluation"))) == 16
    assert set(prompts("calibration")) <= trained
    assert set(prompts("evaluation")) <= held_out  # so the pictures were not learned by heart


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_show_what_prompts_that_were_never_trained_on_say(kind: str) -> None:
    scenes = [SCENE_OF_CAPTION[prompt] for prompt in prompts("evaluation")[::2]]
    pictures = paint(load(MODELS / kind), scenes, STEPS, RECIPES[kind].guidance)
    sights = [look(picture) for picture in pictures]
    right = sum(sight is not None and sight.shows(scene) for sight, scene in zip(sights, scenes))
    assert len(scenes) == 8
    assert right >= LEAST_RIGHT[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_few_text_tokens_is_what_the_pipeline_computes_on_all(kind: str) -> None:
    pipeline, recipe = load(MODELS / kind), RECIPES[kind]
    models = nn.ModuleDict(
        {
            name: getattr(pipeline, name)
            for name in recipe.components
            if name.startswith(("text_encoder", "transformer"))
        }
    )
    captions = ["a red star on a blue ground", ""]
    names = [name for name in recipe.components if name.startswith("tokenizer")]
    ids = {name: token_ids(MODELS / kind / name, captions) for name in names}
    generator = torch.Generator().manual_seed(0)
    noisy, share = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.3, 0.8])
    processors = pipeline.transformer.attn_processors
    with torch.no_grad():
        short = recipe.velocity(models, ids, noisy, share)
        pipeline.transformer.set_attn_processor(processors)
        full = whole_velocity(pipeline, captions, noisy, share)
    # float32 sums over 333 and 528 keys instead of 36 and 26; the velocities are of the order of 1
    torch.testing.assert_close(short, full, atol=1e-4, rtol=0)


def whole_velocity(pipeline: Any, captions: list[str], noisy: Tensor, share: Tensor) -> Tensor:
    """Run the transformer as the pipeline does, on the text that the pipeline encodes."""
    if isinstance(pipeline, StableDiffusion3Pipeline):
        text, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
        return pipeline.transformer(noisy, text, pooled, share * 1000).sample
    text, pooled, text_ids = pipeline.encode_prompt(captions, None)
    packed = pipeline._pack_latents(noisy, len(noisy), 16, 8, 8)
    image_ids = pipeline._prepare_latent_image_ids(len(noisy), 4, 4, "cpu", torch.float32)
    guidance = torch.full((len(noisy),), 3.5)
    tokens = pipeline.transformer(packed, text, pooled, share, image_ids, text_ids, guidance).sample
    return pipeline._unpack_latents(tokens, 64, 64, 8)


@pytest.fixture(scope="module", params=KINDS)
def kind_and_copy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return a kind and its copy with outlier channels, made by the command."""
    copy = tmp_path_factory.mktemp("outliers") / request.param
    assert add_outlier_channels.main([str(MODELS / request.param), str(copy)]) == 0
    return request.param, copy


def test_outlier_channels_do_not_change_the_pictures(kind_and_copy: tuple[str, Path]) -> None:
    kind, copy = kind_and_copy
    scenes = [SCENE_OF_CAPTION[prompt] for prompt in prompts("evaluation")[:4]]
    guidance = RECIPES[kind].guidance
    plain, with_outliers = (paint(load(folder), scenes, STEPS, guidance) for folder in (MODELS / kind, copy))
    psnr = -10 * (plain - with_outliers).square().mean().log10()
    assert psnr > 50


def test_outlier_channels_are_twenty_times_the_median(kind_and_copy: tuple[str, Path]) -> None:
    kind, copy = kind_and_copy
    readers = {name for path in OUTLIER_PATHS if not path.activated for name in path.readers}
    pipeline, amplitudes = load(copy), {}

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            seen = inputs[0].flatten(0, -2).abs().amax(0)[:WIDTH]  # of proj_out's packed input, the heads
            amplitudes[name] = torch.maximum(amplitudes.get(name, seen), seen)

        return hook

    handles = [
        module.register_forward_pre_hook(listen(name))
        for name, module in pipeline.transformer.named_modules()
        if name == "proj_out" or name.split(".", 2)[-1] in readers
    ]
    paint(pipeline, held_out_scenes(4), steps=4, guidance=RECIPES[kind].guidance)
    for handle in handles:
        handle.remove()
    assert len(amplitudes) > 15  # the blocks' linears, not a name that happens to match
    for name, amplitude in amplitudes.items():
        assert amplitude.max() / amplitude.median() >= 20, (kind, name)
        assert int(amplitude.argmax()) in EQUAL_GAINS, (kind, name)


def test_a_transformer_without_room_for_outlier_channels_is_refused(tiny_flux_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no transformer to give outlier channels to"):  # its width is 64
        add_outlier_channels.add_outlier_channels(tiny_flux_folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_checker_names_every_drawn_scene() -> None:
    scenes = SCENES[::3]  # every shape in every colour; all 448 take three times as long
    placements = random_placements(len(scenes), torch.Generator().manual_seed(5))
    sights = [look(picture) for picture in draw(scenes, placements)]
    right = sum(sight is not None and sight.shows(scene) for sight, scene in zip(sights, scenes))
    assert right >= 0.99 * len(scenes)


def test_the_checker_sees_nothing_in_a_flat_picture_and_no_circle_in_a_blob() -> None:
    scene = Scene("circle", "red", "white")
    flat, picture = torch.full((3, 64, 64), 0.5), picture_of(scene)
    axis = torch.linspace(-2, 2, 64)
    blob = torch.exp(-(axis[:, None].square() + 5 * axis[None].square()))
    red, white = picture[:, 32, 32, None, None], picture[:, 0, 0, None, None]
    sight, blurred = look(picture), look(blob * red + (1 - blob) * white)
    assert look(flat) is None
    assert sight is not None
    assert sight.shows(scene)
    assert blurred is not None
    assert not blurred.shows(scene)


@pytest.mark.parametrize(
    "asked", [Scene("circle", "red", "white"), Scene("square", "blue", "white"), Scene("square", "red", "black")]
)
def test_a_picture_of_another_shape_colour_or_ground_is_wrong(asked: Scene) -> None:
    sight = look(picture_of(Scene("square", "red", "white")))
    assert sight is not None
    assert not sight.shows(asked)


TINY = Budgets(
    scenes=SCENES[::100],
    vae=Budget(steps=2, batch=2, rate=1e-3, warm_up=1, checkpoint_every=1, report_every=1),
    transformer=Budget(steps=4, batch=2, rate=1e-3, warm_up=1, checkpoint_every=2, report_every=1),
    placements=1,
)


def interrupt_at(stop: str) -> Callable[[str], None]:
    """Return a report that ends the training at the line that starts with `stop`."""

    def report(line: str) -> None:
        if line.startswith(stop):
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_ends_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    whole = train_tiny_model.train_tiny_model(kind, tmp_path / "whole", tmp_path / "work", budgets=TINY)

    for stop in ("vae step 1/", f"{kind} step 3/"):  # the second between two checkpoints
        with pytest.raises(KeyboardInterrupt):
            train_tiny_model.train_tiny_model(
                kind, tmp_path / "again", tmp_path / "work2", budgets=TINY, report=interrupt_at(stop)
            )
        assert not (tmp_path / "again").exists()
    again = train_tiny_model.train_tiny_model(kind, tmp_path / "again", tmp_path / "work2", budgets=TINY)
    files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    assert sum(file.suffix == ".safetensors" for file in files) == len(RECIPES[kind].clip_padding) + 3
    for file in files:
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file


def test_another_seed_trains_another_autoencoder_and_refuses_this_ones_checkpoint(tmp_path: Path) -> None:
    train_tiny_model.train_tiny_model("flux", tmp_path / "first", tmp_path / "work", budgets=TINY)
    with pytest.raises(InputError, match="belongs to another training"):
        train_tiny_model.train_tiny_model("flux", tmp_path / "second", tmp_path / "work", seed=1, budgets=TINY)


def test_a_folder_in_the_way_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert train_tiny_model.main(["flux", str(tmp_path / "out")]) == 4  # the exit code of a bad input
    assert "already holds something" in capsys.readouterr().err
    assert not (tmp_path / "tiny_training").exists()


def test_checking_something_else_than_a_pipeline_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tiny_model.main(["check", str(tmp_path)]) == 4
    assert "is no pipeline" in capsys.readouterr().err


def test_the_check_counts_right_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid.png"
    assert train_tiny_model.main(["check", str(MODELS / "flux"), "--pictures", "2", "--grid", str(grid)]) == 0
    assert " of 2 (" in capsys.readouterr().out
    assert grid.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_a_caption_is_one_token(kind: str) -> None:
    captions = [scene.caption for scene in SCENES]
    pipeline = load(MODELS / kind)
    for name in RECIPES[kind].components:
        if name.startswith("tokenizer"):
            tokenizer = getattr(pipeline, name)
            ends = 1 if "T5" in type(tokenizer).__name__ else 2  # CLIP also marks the begin
            assert {len(ids) for ids in tokenizer(captions).input_ids} == {7 + ends}
