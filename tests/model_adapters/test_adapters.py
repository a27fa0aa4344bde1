"""Each adapter runs its real pipeline: arguments, steps, recipes, structure, and a divided transformer inside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import nn

from model_adapters import adapter_names, load_adapter
from model_adapters.pipeline.prompt_encoding import encode_prompts
from model_adapters.weights.loading import load_pipeline, load_text_encoders, load_transformer
from quant_core.errors import InputError
from quant_core.naming import linear_names, matches, select
from quant_core.schemes import QUANT_TYPES
from quant_core.structure import SmoothingGroup
from tests.support.tiny_models import KINDS, build, example_inputs

FOLDERS = {"flux": "tiny_flux_folder", "sd3": "tiny_sd3_folder"}
WIDTH, HEIGHT, STEPS = 64, 32, 3  # unequal sides, so that swapping them shows


@pytest.fixture(params=sorted(FOLDERS))
def running(request: pytest.FixtureRequest) -> Any:
    """An adapter, its options for a tiny image, and its pipeline on the CPU in float32."""
    adapter = load_adapter(request.param)
    folder = str(request.getfixturevalue(FOLDERS[request.param]))
    options = adapter.options(path=folder, width=WIDTH, height=HEIGHT, infer_steps=STEPS)
    loaded = load_transformer(adapter, folder, dtype=torch.float32, device="cpu")
    return adapter, options, load_pipeline(adapter, options, loaded.model, "cpu", torch.float32)


def encoded(adapter: Any, options: Any, *prompts: str) -> Any:
    """The prompts as the pipeline takes them."""
    return encode_prompts(adapter, options, [prompts], "cpu", torch.float32)[prompts]


def generator() -> torch.Generator:
    """The same noise every time."""
    return torch.Generator().manual_seed(42)


def test_one_image_for_each_prompt_in_the_size_that_was_asked_for(running):
    adapter, options, pipeline = running
    images = adapter.generate(pipeline, encoded(adapter, options, "a cat", "a dog"), options, generator())
    assert [image.size for image in images] == [(WIDTH, HEIGHT)] * 2


def test_generation_is_that_of_diffusers_own_pipeline(running):
    adapter, options, pipeline = running
    ours = adapter.generate(pipeline, encoded(adapter, options, "a cat"), options, generator(), decodes=False)
    theirs = adapter.pipeline_type().from_pretrained(options.path, torch_dtype=torch.float32)
    size = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": STEPS}
    expected = theirs("a cat", **size, generator=generator(), output_type="latent").images
    assert torch.equal(ours, expected)


def test_a_chosen_guidance_scale_reaches_the_model(running):
    adapter, options, pipeline = running
    default = adapter.generate(pipeline, encoded(adapter, options, "a cat"), options, generator(), decodes=False)
    stronger = options.model_copy(update={"guidance_scale": 9.0})
    assert not torch.equal(
        default,
        adapter.generate(pipeline, encoded(adapter, options, "a cat"), stronger, generator(), decodes=False),
    )


def test_every_transformer_call_knows_its_step_and_a_second_image_begins_at_zero(running):
    adapter, options, pipeline = running
    steps: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *_: steps.append(adapter.step_index(pipeline)))
    for _ in range(2):
        adapter.generate(pipeline, encoded(adapter, options, "a cat"), options, generator(), decodes=False)
    hook.remove()
    assert steps == [*range(STEPS), *range(STEPS)]


def test_guidance_that_calls_the_transformer_twice_a_step_is_one_step(tiny_flux_folder):
    adapter = load_adapter("flux")
    options = adapter.options(path=str(tiny_flux_folder))
    pipeline = adapter.pipeline_type().from_pretrained(options.path, torch_dtype=torch.float32)
    steps: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: steps.append(adapter.step_index(pipeline)))
    size = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": STEPS}
    pipeline("a cat", negative_prompt="a dog", true_cfg_scale=2.0, **size, output_type="latent")
    assert steps == [0, 0, 1, 1, 2, 2]


def test_a_run_that_begins_later_counts_from_there(running):
    adapter, _, pipeline = running
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3], mu=0.5)
    pipeline.scheduler.set_begin_index(1)
    assert adapter.step_index(pipeline) == 1


def test_the_pipeline_is_frozen_and_holds_the_given_transformer(running):
    adapter, options, pipeline = running
    both = (pipeline, load_text_encoders(adapter, options, "cpu", torch.float32))
    parts = [part for each in both for part in each.components.values() if isinstance(part, nn.Module)]
    assert len(parts) >= 4  # transformer, vae and at least two text encoders
    assert not any(part.training for part in parts)
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())


def test_sd3_without_t5_in_fp16_files_only_makes_images(tiny_sd3_folder, tmp_path):
    """As diffusers saves a pipeline that was loaded with `text_encoder_3=None, tokenizer_3=None`."""
    adapter = load_adapter("sd3")
    whole = adapter.pipeline_type().from_pretrained(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    whole.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "text_encoder_3").exists()
    assert not (tmp_path / "text_encoder" / "model.safetensors").exists()
    options = adapter.options(path=str(tmp_path), width=WIDTH, height=HEIGHT, infer_steps=STEPS)
    embeddings = adapter.encode(load_text_encoders(adapter, options, "cpu", torch.float32), ["a cat"], options)
    transformer = load_transformer(adapter, str(tmp_path), dtype=torch.float32, device="cpu").model
    pipeline = load_pipeline(adapter, options, transformer, "cpu", torch.float32)
    assert len(adapter.generate(pipeline, embeddings, options, generator())) == 1


def test_text_encoders_are_those_of_the_variant_that_is_asked_for(tiny_sd3_folder, tmp_path):
    shutil.copytree(tiny_sd3_folder, tmp_path, dirs_exist_ok=True)
    adapter = load_adapter("sd3")
    other = adapter.pipeline_type().from_pretrained(tiny_sd3_folder).text_encoder
    for parameter in other.parameters():
        parameter.data += 1
    other.save_pretrained(tmp_path / "text_encoder", variant="fp16")  # the other parts have their usual weights only

    def weights(variant: str | None) -> dict[str, torch.Tensor]:
        options = adapter.options(path=str(tmp_path), variant=variant)
        return load_text_encoders(adapter, options, "cpu", torch.float16).text_encoder.state_dict()

    usual, asked = weights(None), weights("fp16")
    assert all(torch.equal(asked[name], tensor) for name, tensor in other.state_dict().items())
    assert not any(torch.equal(asked[name], tensor) for name, tensor in usual.items())


def test_a_part_that_is_plainly_null_is_explained(tiny_sd3_folder, tmp_path):
    index = json.loads((tiny_sd3_folder / "model_index.json").read_text()) | {"text_encoder_3": None}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    adapter = load_adapter("sd3")
    with pytest.raises(InputError, match=r'"text_encoder_3": \[null, null\]'):
        load_pipeline(adapter, adapter.options(path=str(tmp_path)), build("sd3"), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("damage", "told"),
    [("model_index.json", "model_index.json is missing"), ("vae/config.json", "cannot be loaded")],
)
def test_a_pipeline_folder_that_is_not_whole_is_explained(tiny_sd3_folder, tmp_path, damage, told):
    folder = tmp_path / "copy"
    folder.mkdir()
    for part in Path(tiny_sd3_folder).iterdir():
        (folder / part.name).symlink_to(part)
    broken = folder / damage
    if broken.parent != folder:
        broken.parent.unlink()
        broken.parent.mkdir()
    else:
        broken.unlink()
    adapter = load_adapter("sd3")
    with pytest.raises(InputError, match=told) as caught:
        load_pipeline(adapter, adapter.options(path=str(folder)), build("sd3"), "cpu", torch.float32)
    assert len(str(caught.value).splitlines()) == 4


def test_a_pipeline_of_another_model_is_refused(tiny_sd3_folder):
    adapter = load_adapter("flux")
    with pytest.raises(InputError, match="StableDiffusion3Pipeline, not a FluxPipeline"):
        load_pipeline(adapter, adapter.options(path=str(tiny_sd3_folder)), build("flux"), "cpu", torch.float32)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pattern_of_every_recipe_matches_a_layer(kind, quant_type):
    adapter = load_adapter(KINDS[kind][0])
    patterns = adapter.disabled_layers[quant_type]
    disabled = select(linear_names(build(kind)), patterns, where="recipe")
    if adapter.name == "sd3":
        assert disabled == ["context_embedder"]
    else:
        second = ["transformer_blocks.0.ff.net.2", "transformer_blocks.0.ff_context.net.2"]
        assert disabled[:2] == ([] if quant_type == "w8a8_dynamic_fa3" else second)


@pytest.mark.parametrize("name", adapter_names())
def test_the_structure_names_the_adapters_own_transformer(name):
    adapter = load_adapter(name)
    assert adapter.structure.model_class == adapter.transformer_class == adapter.transformer_type().__name__


def group_inputs(kind: str, groups: Sequence[SmoothingGroup]) -> dict[str, list[torch.Tensor]]:
    """Run one forward and return, for each group in each block, what its linears were given."""
    model, seen = build(kind), {}
    for name in linear_names(model):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(**example_inputs(kind))
    blocks = {"": model} | dict(model.named_modules())
    found: dict[str, list[torch.Tensor]] = {}
    for group in groups:
        for block in (name for name in blocks if name == group.block or matches(name, group.block)):
            names = [f"{block}.{linear}".lstrip(".") for linear in group.linears]
            if all(name in seen for name in names):
                found[names[0]] = [seen[name] for name in names]
    return found


@pytest.mark.parametrize(
    ("kind", "optional", "count"),
    [
        ("flux", False, 12),  # 6 groups in each of 2 double blocks
        ("sd3", False, 1),  # context_embedder
        ("sd3", True, 17),  # 1 + 6 in each of 2 blocks + 4 in the last, which has no text output
        ("sd35", True, 21),  # the same + 2 of the second attention in each of 2 blocks
    ],
)
def test_the_linears_of_a_smoothing_group_really_share_one_input(kind, optional, count):
    structure = load_adapter(KINDS[kind][0]).structure
    groups = structure.smoothing_groups + (structure.optional_smoothing_groups if optional else ())
    found = group_inputs(kind, groups)
    assert len(found) == count
    for inputs in found.values():
        assert all(other is inputs[0] for other in inputs)


@pytest.mark.parametrize(("kind", "count"), [("flux", 4), ("sd3", 3), ("sd35", 5)])
def test_attentions_are_the_modules_that_count_heads(kind, count):
    model, structure = build(kind), load_adapter(KINDS[kind][0]).structure
    named = [name for name, module in model.named_modules() if matches(name, structure.attentions) and module]
    assert named == [name for name, module in model.named_modules() if hasattr(module, "heads")]
    assert len(named) == count


@pytest.mark.parametrize("drawing", [FlowMatchLCMScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_that_draws_noise_draws_it_from_each_prompts_own_generator(running, drawing):
    adapter, options, pipeline = running
    pipeline.scheduler = drawing.from_config(pipeline.scheduler.config, stochastic_sampling=True)

    def latents(*prompts: str) -> torch.Tensor:
        torch.seed()  # another rank's process
        own = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        return adapter.generate(pipeline, encoded(adapter, options, *prompts), options, own, decodes=False)

    alone = latents("a cat")
    assert torch.equal(alone, latents("a cat"))
    torch.testing.assert_close(latents("a cat", "a whole dog")[:1], alone, rtol=1e-3, atol=1e-3)


def test_the_inputs_that_are_forecast_are_those_of_a_model_without_guidance(tmp_path: Path):
    model, adapter = build("flux", guidance_embeds=False), load_adapter("flux")
    options = adapter.options(path=str(tmp_path), width=64, height=32, batch_size=2)
    forecast = adapter.transformer_inputs(model.config, options, torch.float32).arguments()
    assert "guidance" not in forecast
    assert model.to("meta")(**forecast, return_dict=False)[0].shape == forecast["hidden_states"].shape
