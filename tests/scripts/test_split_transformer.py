"""A transformer divided on disk in the runtime's way is the one that is divided while it is read, both ways round."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.config.resolve import job_config
from launcher.files.identity import model_fields
from model_adapters import load_adapter
from model_adapters.weights.loading import load_transformer
from quant_core.errors import ConfigurationError, InputError
from quant_core.parallel.sharding import Shard, Style, join
from scripts.make_tiny_pipeline import make_tiny_pipeline
from scripts.split_transformer import main, split

ADAPTER = load_adapter("flux")


@pytest.fixture(scope="module", params=["one file", "many files"])
def divided(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole pipeline folder, and one that has only the divided transformers."""
    folder = tmp_path_factory.mktemp("pipelines")
    whole = make_tiny_pipeline("flux", folder / "whole", sharded=request.param == "many files")
    other = Path(shutil.copytree(whole, folder / "divided"))
    split(other)
    shutil.rmtree(other / "transformer")
    return whole, other


def load(folder: Path, tp_rank: int, tp_size: int = 2, layout: str | None = None) -> Any:
    place: dict[str, Any] = {"tp_rank": tp_rank, "tp_size": tp_size, "layout": layout}
    return load_transformer(ADAPTER, str(folder), **place, dtype=torch.bfloat16, device="cpu")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_reading_the_divided_folders_is_cutting_the_whole_one(divided, tp_rank):
    whole, other = divided
    ours, theirs = load(other, tp_rank), load(whole, tp_rank)
    assert ours.shards == theirs.shards
    assert ours.full_shapes == theirs.full_shapes
    assert ours.bytes_read == theirs.bytes_read
    ours, theirs = ours.model.state_dict(), theirs.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_joining_the_divided_folders_gives_the_original_file(divided):
    whole, other = divided
    parts, shards = [stored(other / f"transformer_{rank}") for rank in (0, 1)], load(whole, 0).shards
    for name, original in stored(whole / "transformer").items():
        shard = shards.get(name.rpartition(".")[0], Shard(Style.REPLICATED, 0, 2))
        pieces = [part.get(name) for part in parts]
        joined = pieces[0] if shard.style is Style.REPLICATED else join(name, pieces, shard)
        assert joined is not None
        assert joined.dtype == original.dtype
        assert torch.equal(joined, original), name


def test_files_keep_their_names_and_are_closed_to_others(divided):
    whole, other = divided
    for rank in (0, 1):
        folder = other / f"transformer_{rank}"
        names = {path.name for path in (whole / "transformer").iterdir()}
        assert {path.name for path in folder.iterdir()} == names
        assert folder.stat().st_mode & 0o777 == 0o750
        assert all(path.stat().st_mode & 0o777 == 0o640 for path in folder.iterdir())
        assert (folder / "config.json").read_text() == (whole / "transformer" / "config.json").read_text()


def test_a_folder_without_an_index_is_read_as_the_runtimes_own_program_leaves_it(divided, tmp_path):
    whole, other = divided
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    for index in copy.glob("transformer_*/*.index.json"):
        index.unlink()
    assert torch.equal(load(copy, 1).model.proj_out.weight, load(whole, 1).model.proj_out.weight)


@pytest.mark.parametrize(("tp_size", "layout"), [(1, None), (4, None), (2, "megatron")])
def test_another_division_is_refused(divided, tp_size, layout):
    with pytest.raises(ConfigurationError, match="divided already") as caught:
        load(divided[1], 0, tp_size, layout)
    assert "--tp_size 2" in caught.value.advice


def test_a_missing_slice_is_named(divided, tmp_path):
    copy = Path(shutil.copytree(divided[1], tmp_path / "copy"))
    shutil.copytree(copy / "transformer_1", copy / "transformer_0", dirs_exist_ok=True)
    with pytest.raises(InputError, match="do not fit the model"):
        load(copy, 0)  # rank 1's files lack the biases that live on rank 0


def test_the_job_is_known_by_what_it_reads(divided, tmp_path):
    def fields(folder: Path) -> dict[str, Any]:
        tree = {"pipeline": {"path": str(folder)}, "output": {"do_save_img": True}}
        return model_fields(job_config("flux", tree))

    whole, other = divided
    beside = Path(shutil.copytree(whole, tmp_path / "beside"))
    before = fields(beside)
    split(beside)
    assert fields(beside) == before, "divided folders beside the whole one are not read"
    read = {Path(name).parts[0] for name in fields(other)}
    assert {name for name in read if "transformer" in name} == {"transformer_0", "transformer_1"}


def test_a_folder_without_a_whole_transformer_cannot_be_divided(divided, capsys):
    assert main([str(divided[1])]) == 4  # the code of wrong input
    assert "no whole transformer" in capsys.readouterr().err


def test_nothing_is_written_where_an_older_division_lies(divided, tmp_path):
    copy = Path(shutil.copytree(divided[0], tmp_path / "copy"))
    (copy / "transformer_1").mkdir()
    older = copy / "transformer_1" / "diffusion_pytorch_model.safetensors.index.json"
    older.write_text("{}")
    with pytest.raises(InputError, match="transformer_1 already holds something"):
        split(copy)
    assert [path.name for path in sorted(copy.glob("*transformer_*"))] == ["transformer_1"]
    older.unlink()
    assert len(split(copy)) == 2
