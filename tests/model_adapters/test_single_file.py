"""A transformer in one file, as diffusers saves it or as it was published, is read slice by slice like a folder's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_adapters import load_adapter
from model_adapters.weights.brought import Brought
from model_adapters.weights.loading import LoadedTransformer, load_transformer
from model_adapters.weights.model_folder import WEIGHTS_NAME
from model_adapters.weights.single_file import converted_tensors
from quant_core.errors import InputError
from quant_core.parallel.sharding import Slice
from tests.support.tiny_models import KINDS, build, save

# The published names of SD3's tensors: those in front, by those of diffusers without their blocks.
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_QKV = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}
_SD3_REST = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def published_sd3(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of an SD3 transformer as they were published: q, k and v in one, shift before scale."""
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    last = f"transformer_blocks.{blocks - 1}.norm1_context.linear"
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        names = dict(_SD3_REST)
        for block in range(blocks):
            ours, theirs = f"transformer_blocks.{block}", f"joint_blocks.{block}"
            names |= {f"{ours}.{name}": f"{theirs}.{other}" for name, other in _SD3_BLOCK.items()}
            for parts, other in _SD3_QKV.items():
                if f"{ours}.{parts[0]}.{kind}" in state:
                    joined = torch.cat([state[f"{ours}.{part}.{kind}"] for part in parts])
                    found[f"{theirs}.{other}.{kind}"] = joined
        for name, other in names.items():
            if (tensor := state.get(f"{name}.{kind}")) is not None:
                swapped = name in (last, "norm_out.linear")
                found[f"{other}.{kind}"] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in found.items()}


def load(kind: str, folder: Path, file: Path | None, **where: int) -> LoadedTransformer:
    adapter = load_adapter(KINDS[kind][0])
    brought = Brought(transformer=file)
    return load_transformer(adapter, str(folder), dtype=torch.float32, device="cpu", brought=brought, **where)


def assert_same(ours: LoadedTransformer, theirs: LoadedTransformer) -> None:
    expected = theirs.model.state_dict()
    assert list(ours.model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.model.state_dict().items())
    assert ours.bytes_read == theirs.bytes_read


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_a_published_file_gives_each_rank_what_the_folder_gives(kind: str, prefix: str, tmp_path: Path):
    folder = save(kind, tmp_path / "model")
    tensors = published_sd3(build(kind).state_dict(), prefix)
    if prefix:
        tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(2, 2)  # a checkpoint of the whole pipeline
    save_file(tensors, tmp_path / "published.safetensors")
    for where in ({}, {"tp_rank": 0, "tp_size": 2}, {"tp_rank": 1, "tp_size": 2}):
        expected = load(kind, folder, None, **where)
        assert_same(load(kind, folder, tmp_path / "published.safetensors", **where), expected)


def test_small_floats_of_other_models_in_the_file_are_no_reason_to_refuse_it(tmp_path: Path):
    folder, file = save("sd3", tmp_path / "model"), tmp_path / "published.safetensors"
    tensors = published_sd3(build("sd3").state_dict(), "model.diffusion_model.")
    small = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    save_file(tensors | {"text_encoders.t5xxl.transformer.shared.weight": small}, file)
    assert_same(load("sd3", folder, file), load("sd3", folder, None))
    own = "model.diffusion_model.context_embedder.weight"
    save_file(tensors | {own: tensors[own].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(InputError, match="floats of less than 16 bits, F8_E4M3") as caught:
        load("sd3", folder, file)
    assert own in caught.value.why


def test_a_file_that_diffusers_saved_is_read_in_place_of_the_folders(tmp_path: Path):
    folder, other = save("flux", tmp_path / "model"), save("flux", tmp_path / "other", seed=5)
    file = shutil.move(other / "transformer" / WEIGHTS_NAME, tmp_path / "mine.safetensors")
    shutil.copytree(tmp_path / "model", tmp_path / "same")
    shutil.copy(file, tmp_path / "same" / "transformer" / WEIGHTS_NAME)
    where = {"tp_rank": 1, "tp_size": 2}
    assert_same(load("flux", folder, Path(file), **where), load("flux", tmp_path / "same", None, **where))


def published_flux(width: int = 3072) -> dict[str, Tensor]:
    """Return a FLUX of one block of each kind as it was published, with two columns in place of each weight's own.

    diffusers knows the width of FLUX.1 by heart, so there is no smaller one; it converts rows, never columns.
    """
    rows = {
        f"{name}.{layer}_layer": width for name in ("time_in", "vector_in", "guidance_in") for layer in ("in", "out")
    }
    rows |= {"txt_in": width, "img_in": width, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * width}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        rows |= {f"{block}_mod.lin": 6 * width, f"{block}_attn.qkv": 3 * width, f"{block}_attn.proj": width}
        rows |= {f"{block}_mlp.0": 4 * width, f"{block}_mlp.2": width}
    rows |= {"single_blocks.0.linear1": 7 * width, "single_blocks.0.linear2": width}
    rows |= {"single_blocks.0.modulation.lin": 3 * width}
    norms = [f"double_blocks.0.{stream}_attn" for stream in ("img", "txt")] + ["single_blocks.0"]
    tensors = {f"{name}.weight": torch.randn(count, 2) for name, count in rows.items()}
    tensors |= {f"{name}.bias": torch.randn(count) for name, count in rows.items()}
    return tensors | {f"{name}.norm.{kind}_norm.scale": torch.randn(128) for name in norms for kind in ("query", "key")}


def test_every_slice_of_a_published_flux_is_the_slice_of_its_conversion(tmp_path: Path):
    path = tmp_path / "flux1-dev.safetensors"
    save_file(published_flux(), path)
    converted = convert_flux_transformer_checkpoint_to_diffusers(load_file(path))
    stored = converted_tensors(path, "FluxTransformer2DModel", {})
    assert sorted(stored) == sorted(converted)
    for name, tensor in converted.items():
        assert stored[name].shape == tuple(tensor.shape)
        half = len(tensor) // 2
        assert torch.equal(stored[name].read(), tensor), name
        assert torch.equal(stored[name].read([Slice(0, half - 1, half + 1)]), tensor[half - 1 : half + 1]), name
        if tensor.ndim == 2:
            assert torch.equal(stored[name].read([Slice(1, 1, 2)]), tensor[:, 1:2]), name


@pytest.mark.parametrize("lost", ["final_layer.linear.weight", "joint_blocks.0.x_block.mlp.fc1.bias"])
def test_a_file_in_no_known_format_is_refused(lost: str, tmp_path: Path):
    tensors = published_sd3(build("sd3").state_dict(), "")
    del tensors[lost]
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(InputError) as caught:
        load("sd3", save("sd3", tmp_path / "model"), tmp_path / "damaged.safetensors")
    assert lost in caught.value.why
    assert "--transformer" in caught.value.where


def test_a_file_of_another_size_than_the_folders_configuration_is_refused(tmp_path: Path):
    build("flux", num_layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="missing"):
        load("flux", save("flux", tmp_path / "model"), tmp_path / "other" / WEIGHTS_NAME)
