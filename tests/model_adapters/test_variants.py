"""Weights of a variant are read where they are asked for, or alone; as diffusers does, part by part."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from model_adapters import load_adapter
from model_adapters.weights.brought import NOTHING, Brought
from model_adapters.weights.loading import LoadedTransformer, load_pipeline, load_text_encoders, load_transformer
from model_adapters.weights.model_folder import INDEX_NAME, WEIGHTS_NAME
from quant_core.errors import InputError
from tests.support.tiny_models import build, save


def load(folder: Path, *, brought: Brought = NOTHING) -> LoadedTransformer:
    return load_transformer(load_adapter("flux"), str(folder), dtype=torch.float32, device="cpu", brought=brought)


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A folder with a tiny FLUX in one file, small enough to be damaged in many ways."""
    return save("flux", tmp_path / "flux", num_layers=1, num_single_layers=1)


def _use_variants(folder: Path, *variants: str) -> None:
    weights = folder / "transformer" / WEIGHTS_NAME
    content = weights.read_bytes()
    weights.unlink()
    for variant in variants:
        weights.with_name(f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(content)


@pytest.mark.parametrize("max_shard_size", ["10GB", "500KB"])
def test_a_folder_that_holds_one_variant_only_is_read(max_shard_size, tmp_path):
    build("flux").save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size, variant="fp16")
    assert not any((tmp_path / "transformer" / name).exists() for name in (WEIGHTS_NAME, INDEX_NAME))
    expected, read = build("flux").state_dict(), load(tmp_path).model.state_dict()
    assert list(read) == list(expected)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("max_shard_size", ["10GB", "500KB"])
def test_the_variant_that_is_asked_for_is_read_where_the_usual_weights_are_too(max_shard_size, tmp_path):
    folder, other = save("flux", tmp_path), build("flux")
    for parameter in other.parameters():
        parameter.data += 1
    other.save_pretrained(folder / "transformer", max_shard_size=max_shard_size, variant="fp16")
    for variant, expected in (("fp16", other), (None, build("flux"))):
        read = load(folder, brought=Brought(variant=variant)).model.state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in expected.state_dict().items())
    with pytest.raises(InputError, match="transformer/ has no weights of the variant bf16"):
        load(folder, brought=Brought(variant="bf16"))


def test_the_usual_weights_are_read_where_only_other_parts_have_the_variant(flux):
    """As diffusers does; a variant that no part has is a mistake."""
    expected = load(flux).model.state_dict()
    (flux / "text_encoder").mkdir()
    (flux / "text_encoder" / "model.fp16.safetensors").touch()
    read = load(flux, brought=Brought(variant="fp16")).model.state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InputError, match="transformer/ has no weights of the variant bf16"):
        load(flux, brought=Brought(variant="bf16"))


def test_one_of_several_variants_is_read_when_it_is_asked_for(flux):
    expected = load(flux).model.state_dict()
    _use_variants(flux, "bf16", "fp16")
    read = load(flux, brought=Brought(variant="bf16")).model.state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_several_variants_are_explained(flux):
    _use_variants(flux, "bf16", "fp16")
    with pytest.raises(InputError, match="has weights in several variants: bf16, fp16") as caught:
        load(flux)
    assert all((caught.value.where, caught.value.why, caught.value.advice))


def test_a_part_that_has_one_variant_only_chooses_for_no_other(tiny_flux_folder, tmp_path):
    folder, adapter = Path(shutil.copytree(tiny_flux_folder, tmp_path / "copy")), load_adapter("flux")
    alone, both, vae = (folder / name for name in ("text_encoder_2", "text_encoder", "vae"))
    (alone / "model.safetensors").rename(alone / "model.fp16.safetensors")
    shutil.copy(both / "model.safetensors", both / "model.fp16.safetensors")
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_text("never read")
    options = adapter.options(path=str(folder))
    assert load_pipeline(adapter, options, build("flux"), "cpu", torch.float32).vae, "only text encoders have one alone"
    with pytest.raises(InputError, match="text_encoder/ has weights in two forms, the usual one and fp16") as caught:
        load_text_encoders(adapter, options, "cpu", torch.float32)
    assert "--variant fp16" in caught.value.advice
    asked = adapter.options(path=str(folder), variant="fp16")
    assert load_text_encoders(adapter, asked, "cpu", torch.float32).text_encoder
    (both / "model.fp16.safetensors").unlink()
    assert load_text_encoders(adapter, options, "cpu", torch.float32).text_encoder
