"""Loading reads a rank's slices and nothing else, gives what diffusers gives, and explains a damaged folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_adapters import load_adapter
from model_adapters.adapter import ModelAdapter
from model_adapters.weights.loading import LoadedTransformer, load_part, load_transformer
from model_adapters.weights.model_folder import INDEX_NAME, WEIGHTS_NAME, pipeline_folder
from model_adapters.weights.stored_tensor import JoinedTensor, Reading, stored_tensors
from model_adapters.weights.transformer_part import TransformerPart, describe_transformer
from quant_core.errors import ConfigurationError, InputError
from quant_core.parallel.sharding import Slice, cut, join
from quant_core.reused_memory import ReusedMemory
from tests.support.tiny_models import HEADS, KINDS, build, save

ADAPTERS = {name: load_adapter(name) for name in ("flux", "sd3")}


def load(kind: str, folder: Path | str, **arguments: object) -> LoadedTransformer:
    """Load a tiny transformer on one CPU rank unless told otherwise."""
    defaults: dict = {"dtype": torch.float32, "device": "cpu"}
    return load_transformer(ADAPTERS[KINDS[kind][0]], str(folder), **(defaults | arguments))


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A folder with a tiny FLUX in one file, small enough to be damaged in many ways."""
    return save("flux", tmp_path / "flux", num_layers=1, num_single_layers=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["10GB", "500KB"])
def test_a_whole_model_has_the_tensors_and_dtypes_that_diffusers_loads(kind, dtype, max_shard_size, tmp_path):
    folder = save(kind, tmp_path, max_shard_size=max_shard_size)
    assert (folder / "transformer" / INDEX_NAME).exists() is (max_shard_size == "500KB")
    theirs = KINDS[kind][1].from_pretrained(folder, subfolder="transformer", torch_dtype=dtype).state_dict()
    ours = load(kind, folder, dtype=dtype)
    assert list(ours.model.state_dict()) == list(theirs)
    for name, tensor in ours.model.state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
        assert ours.full_shapes[name] == tuple(tensor.shape)


@pytest.mark.parametrize(("kind", "layout"), [("flux", "mindie"), ("flux", "megatron"), ("sd35", "megatron")])
@pytest.mark.parametrize("tp_size", [2, 3])
def test_the_shards_of_all_ranks_join_to_the_whole_model(kind, layout, tp_size, tmp_path):
    folder = save(kind, tmp_path)
    ranks = [load(kind, folder, tp_rank=rank, tp_size=tp_size, layout=layout) for rank in range(tp_size)]
    states = [rank.model.state_dict() for rank in ranks]
    for name, whole in build(kind).state_dict().items():
        layer = name.rpartition(".")[0]
        parts = [state.get(name) for state in states]
        shard = ranks[0].shards.get(layer)
        joined = parts[0] if shard is None else join(name, parts, shard)
        assert joined is not None
        assert torch.equal(joined, whole), name


def test_a_loaded_model_is_frozen_contiguous_local_and_owns_its_memory(flux):
    loaded = load("flux", flux, tp_rank=1, tp_size=2)
    assert not loaded.model.training
    for name, tensor in loaded.model.state_dict(keep_vars=True).items():
        assert not tensor.requires_grad
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
    block = loaded.model.get_submodule("single_transformer_blocks.0")
    assert (block.proj_out.out_features, block.proj_out.in_features) == (48, 480)  # width 96 / 2, 96 + 4 * 96
    assert block.proj_out.weight.shape == (48, 480)
    assert block.attn.heads == HEADS // 2


def test_a_row_split_layer_has_its_bias_on_the_first_rank_only(flux):
    name = "transformer_blocks.0.ff.net.2"
    biases = [load("flux", flux, tp_rank=rank, tp_size=2).model.get_submodule(name).bias for rank in range(2)]
    assert biases[0] is not None
    assert biases[1] is None


@dataclass
class Counter:
    """How many bytes were read from places in files."""

    bytes: int = 0


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Count everything that is asked of the system from here on."""
    counter, preadv = Counter(), os.preadv

    def counted(file: int, memory: Any, place: int) -> int:
        count = preadv(file, memory, place)
        counter.bytes += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return counter


def own_bytes(folder: Path, loaded: LoadedTransformer) -> int:
    """Return the bytes of a rank's tensors in the dtypes of the file."""
    stored = load_file(folder / "transformer" / WEIGHTS_NAME)
    return sum(stored[name].element_size() * t.numel() for name, t in loaded.model.state_dict().items())


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_rank_reads_the_bytes_of_its_own_shard_from_the_files(flux, counter, tp_size):
    for rank in range(tp_size):
        counter.bytes = 0
        loaded = load("flux", flux, tp_rank=rank, tp_size=tp_size, dtype=torch.bfloat16)
        assert counter.bytes == own_bytes(flux, loaded)
        assert loaded.bytes_read == counter.bytes


class ReadsWholeTensors(TransformerPart):
    """A reader that must not pass: it takes the whole tensor and cuts it in memory."""

    def read(self, name: str) -> torch.Tensor:
        layer, _, tensor = name.rpartition(".")
        whole, shard = self.stored[name].read(), self.shards.get(layer)
        return whole if shard is None else cut(whole, shard.slices(tensor, whole.shape))


def test_a_reader_of_whole_tensors_would_be_found_out(flux, counter):
    part = describe_transformer(ADAPTERS["flux"], str(flux), tp_rank=1, tp_size=2, dtype=torch.bfloat16)
    loaded = load_part(ReadsWholeTensors(**vars(part)), "cpu")
    assert loaded.bytes_read == own_bytes(flux, loaded), "what it returns is right"
    assert counter.bytes > 1.4 * own_bytes(flux, loaded)  # half of most layers is another rank's


def test_a_large_tensor_is_read_into_memory_that_is_lent_again(tmp_path):
    weight = torch.randn(1024, 768)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    stored, memory, places = stored_tensors(tmp_path / "w.safetensors")["w"], ReusedMemory(), set()
    for parts in ((), (Slice(0, 512, 1024),), (Slice(1, 0, 256), Slice(1, 512, 768))):
        expected = (
            torch.cat([weight.narrow(s.dim, s.start, s.stop - s.start) for s in parts], dim=parts[0].dim)
            if parts
            else weight
        )
        read = stored.read(parts, how=Reading(memory.empty))
        assert torch.equal(read, expected)
        places.add(read.data_ptr())
        del read
    assert len(places) == 1


PARTS = {
    "whole": (),
    "rows": (Slice(0, 6, 12),),
    "packed rows": (Slice(0, 1, 4), Slice(0, 7, 10)),
    "columns": (Slice(1, 2, 5),),
    "packed columns": (Slice(1, 0, 2), Slice(1, 4, 6)),
}


@pytest.mark.parametrize("is_joined", [False, True], ids=["in one place", "in three places"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_some_rows_of_a_part_are_those_of_the_whole_part(tmp_path, parts, is_joined):
    weight = torch.randn(12, 6)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    stored = stored_tensors(tmp_path / "w.safetensors")["w"]
    if is_joined:
        stored = JoinedTensor((stored.rows(0, 3), stored.rows(3, 8), stored.rows(8, 12)))
    whole = stored.read(parts)
    assert torch.equal(whole, cut(weight, parts))
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            assert torch.equal(stored.read(parts, slice(start, stop)), whole[start:stop])


def test_a_size_that_does_not_divide_is_refused_before_any_weight_is_looked_for(flux):
    (flux / "transformer" / WEIGHTS_NAME).unlink()
    with pytest.raises(ConfigurationError, match="12 heads"):
        load("flux", flux, tp_rank=0, tp_size=5)


def _rewrite_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "transformer" / WEIGHTS_NAME
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def _rewrite_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return damage


def _index(content: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "transformer" / INDEX_NAME).write_text(json.dumps(content))


def _truncate(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1000])


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "transformer" / name).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no transformer folder": (lambda f: (f / "transformer").rename(f / "unet"), "transformer/config.json is missing"),
    "no config": (lambda f: (f / "transformer" / "config.json").unlink(), "transformer/config.json is missing"),
    "config is no JSON": (_write("config.json", b"{"), "config.json cannot be read"),
    "config is no text": (_write("config.json", b"\xff\xfe\x00"), "config.json cannot be read"),
    "config is nested too deep": (_write("config.json", b"[" * 100_000), "config.json cannot be read"),
    "config is a list": (_write("config.json", b"[]"), "it holds a list, not an object"),
    "another model": (_rewrite_config(lambda c: c.update(_class_name="UNet2DModel")), "is a UNet2DModel, not a Flux"),
    "impossible config": (_rewrite_config(lambda c: c.update(num_layers="two")), "can be built from config.json"),
    "negative width": (_rewrite_config(lambda c: c.update(attention_head_dim=-8)), "can be built from config.json"),
    "more layers than weights": (_rewrite_config(lambda c: c.update(num_layers=2)), "32 missing"),
    "no weights": (lambda f: (f / "transformer" / WEIGHTS_NAME).unlink(), "transformer/ has no weights"),
    "weights are cut off": (_truncate, "it is truncated or damaged: copy or download it again"),
    "weights are empty": (_write(WEIGHTS_NAME, b""), "cannot be read"),
    "weights are no safetensors": (_write(WEIGHTS_NAME, b"PK\x03\x04" * 1000), "cannot be read"),
    "a tensor is missing": (_rewrite_weights(lambda t: t.pop("proj_out.bias")), r"1 missing \(proj_out.bias\)"),
    "a tensor too many": (_rewrite_weights(lambda t: t.update(lora=torch.ones(1))), r"1 unexpected \(lora\)"),
    "a wrong shape": (_rewrite_weights(lambda t: t.update({"proj_out.bias": torch.ones(3)})), "1 of another shape"),
    "index without files": (_index({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors is missing"),
    "index out of the folder": (_index({"weight_map": {"a": "../../etc/passwd"}}), "lies in '../../etc/passwd'"),
    "index without a map": (_index({}), "it has no weight_map"),
    "index with a list": (_index({"weight_map": ["a"]}), "it has no weight_map"),
    "index with numbers": (_index({"weight_map": {"a": 1}}), "lies in 1"),
}


def test_weights_of_eight_bits_are_no_damaged_file(flux):
    _rewrite_weights(lambda t: t.update({"proj_out.bias": t["proj_out.bias"].to(torch.float8_e4m3fn)}))(flux)
    with pytest.raises(InputError, match="F8_E4M3") as caught:
        load("flux", flux)
    assert "damaged" not in str(caught.value)
    assert "bfloat16 or float16" in caught.value.advice


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_explained(flux, damage):
    apply, told = DAMAGES[damage]
    apply(flux)
    with pytest.raises(InputError, match=told) as caught:
        load("flux", flux)
    assert all((caught.value.what, caught.value.where, caught.value.why, caught.value.advice))
    assert len(str(caught.value).splitlines()) == 4


def test_a_model_of_another_kind_is_refused(flux):
    with pytest.raises(InputError, match="is a FluxTransformer2DModel, not a SD3Transformer2DModel"):
        load("sd3", flux)


@pytest.mark.parametrize(
    ("path", "told"), [("/no/such/folder", "there is no model folder"), ("nowhere", "there is no model folder")]
)
def test_a_path_that_does_not_exist_is_refused_without_a_network(path, told):
    with pytest.raises(InputError, match=told):
        pipeline_folder(path)


def test_a_missing_folder_beside_existing_ones_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no model folder 'models/flux'"):
        pipeline_folder("models/flux")


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(InputError, match="is a file, not a model folder"):
        pipeline_folder(str(tmp_path / "model.ckpt"))


def test_a_hub_id_that_cannot_be_fetched_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="neither a folder here nor a model the hub gives out") as caught:
        pipeline_folder("no-such-owner/no-such-model")
    assert len(str(caught.value).splitlines()) == 4


def test_the_default_dtype_is_the_models_own_and_an_option_overrides_it():
    adapter: ModelAdapter = ADAPTERS["sd3"]
    assert adapter.dtype(adapter.options(path="m")) == torch.float16
    assert adapter.dtype(adapter.options(path="m", dtype="float32")) == torch.float32
    assert ADAPTERS["flux"].dtype(ADAPTERS["flux"].options(path="m")) == torch.bfloat16
