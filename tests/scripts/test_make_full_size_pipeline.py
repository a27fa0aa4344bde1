"""A pipeline of a real model's dimensions, one block deep and narrow, runs in the real pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quant_core.errors import InputError
from scripts.make_full_size_pipeline import FLUX, INDEX_NAME, SD3, make_full_size

# The real shapes with fewer heads and blocks and narrower text: proportions stay (two CLIPs as 3 to 5).
NARROW = {
    "flux": FLUX | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 64},
    "sd3": SD3
    | {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 256, "pooled_projection_dim": 128}
    | {"caption_projection_dim": 128, "pos_embed_max_size": 16, "sample_size": 16},
}


@pytest.fixture(scope="module", params=["flux", "sd3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    return request.param, make_full_size(folder, NARROW[request.param], kind=request.param)


def test_the_real_pipeline_loads_the_folder_and_makes_latents_of_finite_numbers(made):
    from diffusers import DiffusionPipeline

    _, folder = made
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a lighthouse", width=64, height=64, num_inference_steps=2, output_type="latent").images
    assert latents.isfinite().all()
    assert latents.numel() == 16 * 8 * 8  # 16 channels of an eighth of the image's size


def test_weights_are_of_the_dtype_and_names_of_the_published_ones(made):
    kind, folder = made
    files = list((folder / "transformer").glob("*.safetensors"))
    assert [file.name for file in files] == ["diffusion_pytorch_model.safetensors"]
    with safe_open(files[0], "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"BF16" if kind == "flux" else "F16"}


def test_a_model_larger_than_a_file_is_several_with_an_index(tmp_path):
    folder = make_full_size(tmp_path / "pipeline", NARROW["flux"], file_size=2**21) / "transformer"
    home = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    assert len(set(home.values())) > 1
    for name in set(home.values()):
        with safe_open(folder / name, "pt") as file:
            assert set(file.keys()) == {tensor for tensor, file_name in home.items() if file_name == name}


def test_it_appears_whole_or_not_at_all_and_never_over_another(tmp_path):
    folder = tmp_path / "pipeline"
    with pytest.raises(InputError, match="another model"):  # the other parts are written by then
        make_full_size(folder, NARROW["flux"] | {"_class_name": "SD3Transformer2DModel"})
    assert not any(tmp_path.iterdir())
    make_full_size(folder, NARROW["flux"])
    with pytest.raises(InputError, match="already holds something"):
        make_full_size(folder, NARROW["flux"])
