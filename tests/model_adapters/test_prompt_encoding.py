"""Encoding prompts first and alone changes nothing: the transformer is called with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model_adapters import load_adapter
from model_adapters.pipeline.prompt_encoding import encode_prompts
from model_adapters.weights.loading import load_pipeline, load_text_encoders, load_transformer
from quant_core.calibration.capture import DumperManager

PROMPTS = ("a cat", "a dog on a red car")
STEPS = 2


@pytest.fixture(params=["flux", "sd3"])
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, torch.dtype]:
    adapter = load_adapter(request.param)
    folder: Path = request.getfixturevalue(f"tiny_{request.param}_folder")
    options = adapter.options(path=str(folder), width=64, height=32, infer_steps=STEPS)
    return adapter, options, adapter.dtype(options)


def captured(pipeline: Any, run: Any) -> list[Any]:
    dumper = DumperManager(pipeline.transformer)
    run(torch.Generator().manual_seed(3))
    dumper.close()
    return dumper.records


def test_the_transformer_is_called_with_what_the_pipeline_itself_would_have_encoded(case):
    adapter, options, dtype = case
    whole = adapter.pipeline_type().from_pretrained(options.path, torch_dtype=dtype)
    size = {"width": options.width, "height": options.height, "num_inference_steps": STEPS, "output_type": "latent"}
    expected = captured(whole, lambda generator: whole(list(PROMPTS), generator=generator, **size))

    embeddings = encode_prompts(adapter, options, [PROMPTS], "cpu", dtype)[PROMPTS]
    loaded = load_transformer(adapter, options.path, dtype=dtype, device="cpu")
    lean = load_pipeline(adapter, options, loaded.model, "cpu", dtype)
    run = lambda generator: adapter.generate(lean, embeddings, options, generator, decodes=False)  # noqa: E731
    records = captured(lean, run)

    assert len(records) == len(expected) == STEPS
    for ours, theirs in zip(records, expected):
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b


def test_the_pipeline_that_runs_has_no_text_encoder_and_the_one_that_encodes_has_nothing_else(case):
    adapter, options, dtype = case
    loaded = load_transformer(adapter, options.path, dtype=dtype, device="cpu")
    lean = load_pipeline(adapter, options, loaded.model, "cpu", dtype)
    assert {name for name, part in lean.components.items() if isinstance(part, nn.Module)} == {"transformer", "vae"}
    text = load_text_encoders(adapter, options, "cpu", dtype)
    weighty = [name for name, part in text.components.items() if isinstance(part, nn.Module) and name != "transformer"]
    assert all(name.startswith("text_encoder") for name in weighty)
    assert all(parameter.is_meta for parameter in text.transformer.parameters())


def test_the_same_batch_is_encoded_once(case):
    adapter, options, dtype = case
    encoded = encode_prompts(adapter, options, [PROMPTS, ("a cat",), PROMPTS], "cpu", dtype)
    assert list(encoded) == [PROMPTS, ("a cat",)]
    assert all(len(tensor) == 1 for tensor in encoded["a cat",].values())


def test_what_all_batches_have_in_common_is_held_once(tiny_sd3_folder: Path):
    adapter = load_adapter("sd3")
    options = adapter.options(path=str(tiny_sd3_folder))
    batches = [("a cat",), ("a dog",), ("a cat", "a dog"), ("a bird", "a fish")]
    encoded = encode_prompts(adapter, options, batches, "cpu", torch.float32)
    for name, places in (("negative_prompt_embeds", 2), ("negative_pooled_prompt_embeds", 2), ("prompt_embeds", 4)):
        assert len({each[name].untyped_storage().data_ptr() for each in encoded.values()}) == places


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_a_negative_prompt_is_encoded_where_the_pipeline_reads_one(tiny_sd3_folder: Path, scale: float):
    adapter = load_adapter("sd3")
    options = adapter.options(path=str(tiny_sd3_folder), width=64, height=32, infer_steps=STEPS, guidance_scale=scale)
    embeddings = encode_prompts(adapter, options, [PROMPTS], "cpu", torch.float32)[PROMPTS]
    assert ("negative_prompt_embeds" in embeddings) is (scale > 1)
    whole = adapter.pipeline_type().from_pretrained(options.path, torch_dtype=torch.float32)
    size = {"width": options.width, "height": options.height, "num_inference_steps": STEPS, "output_type": "latent"}
    drawn = torch.Generator().manual_seed(3)
    expected = whole(list(PROMPTS), generator=drawn, guidance_scale=scale, **size).images
    found = adapter.generate(whole, embeddings, options, torch.Generator().manual_seed(3), decodes=False)
    assert torch.equal(found, expected)
