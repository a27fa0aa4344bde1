"""A step cache skips blocks while images are made, and nothing of it is left when a calibration runs."""

from __future__ import annotations

import torch

from model_adapters import load_adapter
from model_adapters.pipeline.prompt_encoding import encode_prompts
from model_adapters.pipeline.step_cache import step_cache
from model_adapters.weights.loading import load_pipeline, load_transformer
from quant_core.calibration.capture import DumperManager

STEPS = 4


def test_blocks_are_skipped_inside_and_run_every_step_outside(tiny_flux_folder):
    adapter = load_adapter("flux")
    options = adapter.options(path=str(tiny_flux_folder), width=64, height=64, infer_steps=STEPS)
    loaded = load_transformer(adapter, options.path, dtype=torch.float32, device="cpu")
    pipeline = load_pipeline(adapter, options, loaded.model, "cpu", torch.float32)
    prompts = ("a cat",)
    embeddings = encode_prompts(adapter, options, [prompts], "cpu", torch.float32)[prompts]
    calls: list[int] = []
    linear = pipeline.transformer.single_transformer_blocks[-1].proj_mlp
    linear.register_forward_pre_hook(lambda *_: calls.append(adapter.step_index(pipeline)))

    def latents() -> torch.Tensor:
        calls.clear()
        return adapter.generate(pipeline, embeddings, options, torch.Generator().manual_seed(0), decodes=False)

    whole = latents()
    assert calls == list(range(STEPS))
    # So high that every step after the first counts as unchanged.
    with step_cache(pipeline, threshold=1e6):
        cached = latents()
        assert calls == [0]
        latents()
        assert calls == [0], "a second image begins with a computed step"
    assert not torch.equal(cached, whole)
    assert torch.equal(latents(), whole)
    assert calls == list(range(STEPS))
    dumper = DumperManager(pipeline.transformer)
    assert torch.equal(latents(), whole)
    assert len(dumper.records) == STEPS
