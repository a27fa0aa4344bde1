"""LoRA files are fused into the weights a rank reads: by PEFT's formula, in every format, whole or divided alike."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model_adapters import load_adapter
from model_adapters.weights.brought import Brought, LoraFile
from model_adapters.weights.loading import load_text_encoders, load_transformer
from model_adapters.weights.transformer_folders import WHOLE
from model_adapters.weights.transformer_part import describe_transformer
from quant_core.errors import InputError
from quant_core.parallel.sharding import Shard
from scripts.split_transformer import split
from tests.support.tiny_models import KINDS, build, save

RANK = 3
SCALE = 0.7


def factors(model: nn.Module, seed: int = 3, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random (up, down) for every linear layer in the model's blocks."""
    torch.manual_seed(seed)
    return {
        name: (torch.randn(layer.out_features, rank) / 9, torch.randn(rank, layer.in_features) / 9)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "transformer_blocks" in name
    }


def write(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], part: str = "transformer", **metadata: str) -> Path:
    """Write factors under the names that diffusers saves them by."""
    tensors = {}
    for name, (up, down) in pairs.items():
        tensors |= {f"{part}.{name}.lora_B.weight": up, f"{part}.{name}.lora_A.weight": down}
    save_file(tensors, path, metadata=metadata)
    return path


def load(kind: str, folder: Path, *loras: LoraFile, dtype: torch.dtype = torch.float32, **where: Any) -> nn.Module:
    adapter = load_adapter(KINDS[kind][0])
    return load_transformer(
        adapter, str(folder), dtype=dtype, device="cpu", brought=Brought(loras=loras), **where
    ).model


def largest_error(model: nn.Module, expected: Mapping[str, Tensor]) -> float:
    state = model.state_dict()
    return max(float((state[name] - tensor).abs().max()) for name, tensor in expected.items())


def by_formula(model: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    state = model.state_dict()
    changed = {f"{name}.weight": state[f"{name}.weight"] + scale * (up @ down) for name, (up, down) in pairs.items()}
    return state | changed


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_gets_the_product_of_its_factors_times_the_scale(kind: str, tmp_path: Path):
    folder, model = save(kind, tmp_path / "model"), build(kind)
    pairs = factors(model)
    fused = load(kind, folder, LoraFile(write(tmp_path / "lora.safetensors", pairs), SCALE))
    assert largest_error(fused, by_formula(model, pairs, SCALE)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_peft_merges(kind: str, tmp_path: Path):
    pytest.importorskip("peft", reason="peft is not installed")
    folder, merged = save(kind, tmp_path / "model"), build(kind)
    file = write(tmp_path / "lora.safetensors", factors(merged))
    merged.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="transformer", use_safetensors=True)
    merged.fuse_lora(lora_scale=SCALE)
    merged.unload_lora()
    assert largest_error(load(kind, folder, LoraFile(file, SCALE)), merged.state_dict()) < 1e-6


def test_several_files_add_up(tmp_path: Path):
    folder, model = save("flux", tmp_path / "model"), build("flux")
    one, two = factors(model, seed=3), factors(model, seed=4, rank=5)
    files = LoraFile(write(tmp_path / "1.safetensors", one), 0.5), LoraFile(write(tmp_path / "2.safetensors", two), -1)
    first = by_formula(model, one, 0.5)
    model.load_state_dict(first)
    assert largest_error(load("flux", folder, *files), by_formula(model, two, -1)) < 1e-6


def shards_of(kind: str, layout: str, tp_rank: int, tp_size: int) -> dict[str, Shard]:
    return load_adapter(KINDS[kind][0]).shard_plan(layout).resolve(build(kind), tp_rank, tp_size)


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", torch.float32), ("float32", torch.float16)])
def test_a_change_below_the_steps_of_the_files_dtype_is_not_lost(stored: str, dtype: torch.dtype, tmp_path: Path):
    """A LoRA of usual strength changes a weight by a hundredth; bfloat16 has eight bits. diffusers is the measure."""
    pytest.importorskip("peft", reason="peft is not installed")
    model = build("flux").to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "model" / "transformer")
    merged = type(model).from_pretrained(tmp_path / "model", subfolder="transformer", torch_dtype=dtype)
    exact = model.double().state_dict()
    pairs = {
        name: (0.01 * up * exact[f"{name}.weight"].std().float() / (up @ down).std(), down)
        for name, (up, down) in factors(model).items()
    }
    file = write(tmp_path / "lora.safetensors", pairs)
    merged.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="transformer", use_safetensors=True)
    merged.fuse_lora()
    merged.unload_lora()
    ours, theirs = load("flux", tmp_path / "model", LoraFile(file), dtype=dtype).state_dict(), merged.state_dict()
    for name, (up, down) in pairs.items():
        change = up.double() @ down.double()
        error, their_error = (
            (state[f"{name}.weight"] - exact[f"{name}.weight"] - change).norm() / change.norm()
            for state in (ours, theirs)
        )
        assert error <= 1.01 * their_error, name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "layout"), [("flux", "mindie"), ("flux", "megatron"), ("sd35", "megatron")])
def test_fused_and_then_divided_has_the_bits_of_divided_and_then_fused(
    kind: str, layout: str, dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
):
    folder = tmp_path / "model"
    build(kind).to(stored).save_pretrained(folder / "transformer")
    loras = LoraFile(write(tmp_path / "1.safetensors", factors(build(kind))), SCALE)
    whole = load(kind, folder, loras, dtype=dtype).state_dict()
    for tp_rank in range(2):
        local = load(kind, folder, loras, dtype=dtype, tp_rank=tp_rank, tp_size=2, layout=layout).state_dict()
        shards = shards_of(kind, layout, tp_rank, 2)
        for name, tensor in local.items():
            layer, _, kind_of = name.rpartition(".")
            expected = shards[layer].take(kind_of, whole[name]) if layer in shards else whole[name]
            assert expected is not None
            assert torch.equal(tensor, expected), name


def test_some_rows_are_fused_like_the_whole(tmp_path: Path):
    folder, model = save("flux", tmp_path / "model"), build("flux").bfloat16()
    lora = LoraFile(write(tmp_path / "1.safetensors", factors(model)), SCALE)
    for tp_size in (1, 2):
        adapter, brought = load_adapter("flux"), Brought(loras=(lora,))
        part = describe_transformer(
            adapter, str(folder), tp_rank=tp_size - 1, tp_size=tp_size, dtype=torch.bfloat16, brought=brought
        )
        for layer in part.changes:
            whole = part.read(f"{layer}.weight")
            for rows in (slice(0, 1), slice(3, 17), slice(len(whole) - 2, len(whole))):
                assert torch.equal(part.read(f"{layer}.weight", rows), whole[rows]), layer


def test_a_folder_that_is_divided_already_is_fused_like_the_whole(tmp_path: Path):
    folder, model = save("flux", tmp_path / "model"), build("flux")
    lora = LoraFile(write(tmp_path / "1.safetensors", factors(model)))
    from_whole = load("flux", folder, lora, tp_rank=1, tp_size=2).state_dict()
    split(folder, 2)
    shutil.rmtree(folder / WHOLE)
    from_parts = load("flux", folder, lora, tp_rank=1, tp_size=2).state_dict()
    assert all(torch.equal(tensor, from_parts[name]) for name, tensor in from_whole.items())


def kohya(pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """Return factors of one double block's feed-forward as kohya's scripts name them."""
    names = {"transformer_blocks.0.ff.net.0.proj": "img_mlp_0", "transformer_blocks.0.ff.net.2": "img_mlp_2"}
    tensors = {}
    for name, theirs in names.items():
        up, down = pairs[name]
        key = f"lora_unet_double_blocks_0_{theirs}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def with_alphas(pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for name, (up, down) in pairs.items():
        key = f"transformer.{name}"
        tensors |= {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def test_kohyas_names_and_alphas_are_understood(tmp_path: Path):
    folder, model = save("flux", tmp_path / "model"), build("flux")
    pairs = {name: pair for name, pair in factors(model).items() if name.startswith("transformer_blocks.0.ff.net")}
    for alpha, tensors in ((6.0, kohya(pairs, 6.0)), (1.5, with_alphas(pairs, 1.5))):
        save_file(tensors, tmp_path / "lora.safetensors")
        fused = load("flux", folder, LoraFile(tmp_path / "lora.safetensors"))
        assert largest_error(fused, by_formula(model, pairs, alpha / RANK)) < 1e-6


def dropped() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield "kohya's T5", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight", (64, RANK)
    yield "ComfyUI's T5", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.q.lora_up.weight", (64, RANK)
    yield "a bias", "lora_unet_double_blocks_0_img_mlp_0.diff_b", (64,)
    yield "an unknown part", "lora_prior_unet_img_in.lora_up.weight", (64, RANK)


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for _, name, shape in dropped()])
def test_what_diffusers_would_leave_out_of_a_file_is_refused_unless_it_changes_nothing(
    name: str, shape: tuple[int, ...], tmp_path: Path
):
    folder, file = save("flux", tmp_path / "model"), tmp_path / "lora.safetensors"
    known = kohya(factors(build("flux")), 6.0)
    save_file(known | {name: torch.zeros(shape)}, file)
    assert load("flux", folder, LoraFile(file))
    save_file(known | {name: torch.ones(shape)}, file)
    with pytest.raises(InputError, match=re.escape(name)):
        load("flux", folder, LoraFile(file))


@pytest.mark.parametrize(("rslora", "rank"), [(False, RANK), (True, math.sqrt(RANK))])
def test_alphas_that_peft_writes_into_the_header_count(rslora: bool, rank: float, tmp_path: Path):
    folder, model = save("sd3", tmp_path / "model"), build("sd3")
    pairs, own = factors(model), "transformer_blocks.1.attn.to_q"
    config = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {own: 12}, "use_rslora": rslora}
    about = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    fused = load("sd3", folder, LoraFile(write(tmp_path / "l.safetensors", pairs, lora_adapter_metadata=about)))
    expected = by_formula(model, pairs, 6 / rank)
    expected[f"{own}.weight"] = by_formula(model, pairs, 12 / rank)[f"{own}.weight"]
    assert largest_error(fused, expected) < 1e-6


def test_the_part_of_a_text_encoder_goes_into_the_text_encoder(tiny_flux_folder: Path, tmp_path: Path):
    adapter = load_adapter("flux")

    def encoder(*lora: str) -> nn.Module:
        options = adapter.options(path=str(tiny_flux_folder), lora=lora)
        return load_text_encoders(adapter, options, "cpu", torch.float32).text_encoder

    before = {name: layer for name, layer in encoder().named_modules() if name.endswith("0.self_attn.q_proj")}
    [(name, layer)] = before.items()
    pair = torch.randn(layer.out_features, RANK), torch.randn(RANK, layer.in_features)
    file = write(tmp_path / "te.safetensors", {f"text_model.{name.removeprefix('text_model.')}": pair}, "text_encoder")
    after = encoder(f"{file}:0.5").get_submodule(name).weight
    assert torch.allclose(after, layer.weight + 0.5 * pair[0] @ pair[1], atol=1e-6)


def test_a_file_of_kohya_may_change_the_transformer_and_a_text_encoder(tiny_flux_folder: Path, tmp_path: Path):
    adapter = load_adapter("flux")
    options = adapter.options(path=str(tiny_flux_folder))
    encoder = load_text_encoders(adapter, options, "cpu", torch.float32).text_encoder
    known = {name: layer for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
    layers = {end: next(name for name in known if name.endswith(end)) for end in ("0.self_attn.q_proj", "0.mlp.fc1")}
    pairs, tensors = {}, kohya(factors(load("flux", tiny_flux_folder)), 6.0)
    for end, name in layers.items():
        up, down = torch.randn(known[name].out_features, RANK), torch.randn(RANK, known[name].in_features)
        key = f"lora_te1_text_model_encoder_layers_{end.replace('.', '_')}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(6.0)}
        pairs[name] = up, down
    save_file(tensors, tmp_path / "lora.safetensors")
    options = adapter.options(path=str(tiny_flux_folder), lora=(str(tmp_path / "lora.safetensors"),))
    fused = load_text_encoders(adapter, options, "cpu", torch.float32).text_encoder
    assert largest_error(fused, by_formula(encoder, pairs, 6.0 / RANK)) < 1e-5


def bad_files() -> Iterator[tuple[str, dict[str, Tensor], str]]:
    up, down = torch.zeros(96, RANK), torch.zeros(RANK, 96)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    good = {f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down}
    yield "another layer", {key.replace("to_q", "to_qq"): tensor for key, tensor in good.items()}, "to_q "
    yield "another part", {key.replace("transformer.", "unet.", 1): tensor for key, tensor in good.items()}, "unet"
    yield "another width", good | {f"{layer}.lora_A.weight": down[:, :2]}, "(96, 96)"
    yield "another rank", good | {f"{layer}.lora_A.weight": down[:2]}, "multiplied"
    yield "one factor", {key: tensor for key, tensor in good.items() if "lora_A" in key}, "no partner"
    yield "another method", {**good, "transformer.x.dora_scale": up + 1}, "dora_scale"
    yield "a model", {"transformer.proj_out.weight": up}, "no partner"


@pytest.mark.parametrize(("tensors", "told"), [(tensors, told) for _, tensors, told in bad_files()])
def test_a_file_that_does_not_fit_in_whole_is_refused(tensors: dict[str, Tensor], told: str, tmp_path: Path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError) as caught:
        load("flux", save("flux", tmp_path / "model"), LoraFile(tmp_path / "bad.safetensors"))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir:1/a.safetensors:-1", "dir:1/a.safetensors", -1.0),
        ("dir:x/a.safetensors", "dir:x/a.safetensors", 1.0),
        ("a.safetensors:nan", "a.safetensors:nan", 1.0),
    ],
)
def test_a_scale_stands_behind_the_last_colon(text: str, path: str, scale: float):
    assert LoraFile.parse(text) == LoraFile(Path(path), scale)


@pytest.mark.parametrize("name", ["missing.safetensors", "pickle.bin"])
def test_what_is_brought_must_be_a_safetensors_file_that_is_there(name: str, tmp_path: Path):
    (tmp_path / "pickle.bin").touch()
    options = load_adapter("flux").options
    for flag in ({"lora": (str(tmp_path / name),)}, {"transformer": str(tmp_path / name)}):
        with pytest.raises(InputError, match=name):
            Brought.of(options(path="m", **flag))
