"""Merging checks every shard against every other, publishes whole or not at all, and says what does not fit.

The shards are real files of a three-layer model on two ranks: `up` column-split, `down` row-split with a bias, `norm`
replicated.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.files.folder_lock import hold
from launcher.files.manifest import TimestepPolicy
from launcher.files.run_folder import (
    CONFIG,
    DECISIONS,
    MANIFEST,
    QUALITY,
    REPORT,
    SMOOTHED,
    STAGING,
    note_file,
    shard_files,
)
from launcher.files.shard_note import FileDigest, LayerShard, ShardNote, layer_of, read_note
from launcher.stages.merge import merge_files, publish_shards, say_published
from model_adapters.quality.results import CARD, SHEET
from model_adapters.quality.store import FLOAT, QUANTIZED
from quant_core.errors import FolderInUse, InputError, VerificationError
from quant_core.parallel.sharding import Shard, Style

FULL = {"up.weight": (8, 4), "up.bias": (8,), "down.weight": (4, 8), "down.bias": (4,), "norm.weight": (4,)}
STYLES = {"up": Style.COL, "down": Style.ROW}
SCHEME = "w8a8_dynamic"


def stage(folder: Path, rank: int, scheme: str = SCHEME) -> None:
    """Write one rank's shard as the quantize stage would."""
    (folder / STAGING).mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in FULL.items():
        layer, _, kind = name.rpartition(".")
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        part = Shard(STYLES.get(layer, Style.REPLICATED), rank, 2).take(kind, whole)
        if part is not None:
            tensors[name] = part
    quantize(tensors)
    files = shard_files(folder / STAGING, scheme, f"_{rank}")
    save_file(tensors, files.weights)
    files.description.write_text(json.dumps(describe(tensors, scheme)))
    write_note(folder, rank, scheme, equal={"norm.weight": "digest"})


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    """Store `up` as a scheme without static inputs does."""
    tensors["up.weight"] = tensors["up.weight"].to(torch.int8)
    tensors["up.weight_scale"] = torch.ones(4, 1)
    tensors["up.weight_offset"] = torch.zeros(4, 1)


def describe(tensors: dict[str, torch.Tensor], scheme: str) -> dict[str, str]:
    """Return the description of a shard: `up` is quantized."""
    quantized = ("up.weight", "up.weight_scale", "up.weight_offset")
    types = {name: scheme.upper() if name in quantized else "FLOAT" for name in tensors}
    return {"model_quant_type": scheme.upper(), **types}


def write_note(folder: Path, rank: int, scheme: str = SCHEME, **changed: object) -> None:
    """Note what is staged now, with some fields changed."""
    files = shard_files(folder / STAGING, scheme, f"_{rank}")
    fields = {
        "fingerprint": "f" * 64, "fields": {}, "quant_type": scheme.upper(), "tp_rank": rank, "tp_size": 2,
        "dp_size": 1, "layout": "mindie",
        "weights": FileDigest.of(files.weights), "description": FileDigest.of(files.description),
        "layers": {name: LayerShard(style=style) for name, style in STYLES.items()}, "full_shapes": FULL, "equal": {},
    }  # fmt: skip
    note = ShardNote.model_validate({**fields, **changed})
    note_file(folder / STAGING, scheme, f"_{rank}").write_text(note.model_dump_json())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in (0, 1):
        stage(tmp_path, rank)
    return tmp_path


def notes(folder: Path, scheme: str = SCHEME) -> list[Path]:
    return [note_file(folder / STAGING, scheme, f"_{rank}") for rank in (0, 1)]


def rewrite(folder: Path, rank: int, change: Callable[[dict], object], **note: object) -> None:
    """Change a staged shard's tensors, description and note so that each file is whole by itself."""
    files = shard_files(folder / STAGING, SCHEME, f"_{rank}")
    loaded, described = load_file(files.weights), json.loads(files.description.read_text())
    tensors = {name: loaded[name] for name in described if name in loaded}  # in the description's order
    change(tensors)
    save_file(tensors, files.weights)
    files.description.write_text(json.dumps(describe(tensors, SCHEME)))
    write_note(folder, rank, **{"equal": {"norm.weight": "digest"}, **note})


def test_whole_shards_are_published_with_the_manifest_last(folder):
    manifest = publish_shards(folder, notes(folder))
    assert [file.name for file in manifest.files] == [
        f"quant_model_{kind}_w8a8_dynamic_{rank}.{ending}"
        for rank in (0, 1)
        for kind, ending in (("weight", "safetensors"), ("description", "json"))
    ]
    assert manifest.changed_files(folder) == []
    assert (folder / MANIFEST).is_file()
    assert not (folder / STAGING).exists()


def test_the_merge_command_publishes_what_a_run_left_staged(folder, capsys):
    merge_files(folder)
    assert "4 files and quant_manifest.json" in capsys.readouterr().out
    with pytest.raises(InputError, match="no staged shards"):
        merge_files(folder)


@pytest.mark.parametrize(("first_static", "says"), [(1, "register steps 1 to 1 as static"), (2, "nothing to register")])
def test_what_the_runtime_must_be_told_is_said(folder, first_static, says):
    told: list[str] = []
    policy = TimestepPolicy.of(2, first_static)
    say_published(
        folder, publish_shards(folder, notes(folder)).model_copy(update={"timestep_policy": policy}), told.append
    )
    assert says in told[1]
    assert len(told) == 2 + len(policy.registration)


def test_an_interrupted_publication_is_finished_by_the_next(folder):
    """The first file has its final name, the rest does not, and there is no manifest: as after a power cut."""
    files = shard_files(folder / STAGING, SCHEME, "_0")
    files.weights.rename(folder / files.weights.name)
    assert publish_shards(folder, notes(folder)).changed_files(folder) == []


WRONG = {
    "a shard of another job": (lambda f: write_note(f, 1, fingerprint="0" * 64), "fingerprint differs"),
    "another layout": (lambda f: write_note(f, 1, layout="megatron"), "layout differs"),
    "ranks swapped": (lambda f: write_note(f, 1, tp_rank=0), "shards are of ranks"),
    "a replicated tensor differs": (
        lambda f: write_note(f, 1, equal={"norm.weight": "other"}),
        "'norm.weight' must be the same",
    ),
    "a slice too wide": (
        lambda f: rewrite(f, 1, lambda t: t.update({"up.weight": torch.zeros(5, 4)})),
        "'up.weight' is (5, 4), its slice of (8, 4) is (4, 4)",
    ),
    "a row bias on the second rank": (
        lambda f: rewrite(f, 1, lambda t: t.update({"down.bias": torch.zeros(4)})),
        "'down.bias' must live on rank 0 only",
    ),
    "a row bias on no rank": (lambda f: rewrite(f, 0, lambda t: t.pop("down.bias")), "rank 0: 'down.bias' is missing"),
    "a tensor lost": (lambda f: rewrite(f, 1, lambda t: t.pop("norm.weight")), "rank 1: 'norm.weight' is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_shards_that_do_not_fit_are_refused_and_nothing_is_published(folder, name):
    break_it, told = WRONG[name]
    break_it(folder)
    with pytest.raises(VerificationError) as raised:
        publish_shards(folder, notes(folder))
    assert told in raised.value.why
    assert not list(folder.glob("*.safetensors"))
    assert not (folder / MANIFEST).exists()


def test_a_description_that_lists_other_tensors_is_refused(folder):
    files = shard_files(folder / STAGING, SCHEME, "_1")
    description = json.loads(files.description.read_text())
    files.description.write_text(json.dumps({**description, "ghost.weight": "FLOAT"}))
    write_note(folder, 1, equal={"norm.weight": "digest"})
    with pytest.raises(VerificationError, match="do not fit together"):
        publish_shards(folder, notes(folder))


def test_the_run_that_wrote_shards_reads_none_again_and_still_misses_what_was_cut_off(folder):
    weights = shard_files(folder / STAGING, SCHEME, "_1").weights
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="missing or damaged"):
        publish_shards(folder, notes(folder), trusted=True)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no note", "broken note"])
def test_damaged_or_unfinished_shards_are_refused_before_anything_is_touched(folder, damage):
    weights = shard_files(folder / STAGING, SCHEME, "_1").weights
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(content[:-8])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no note":
        notes(folder)[1].unlink()
    else:
        notes(folder)[1].write_text("{")
    with pytest.raises(InputError):
        publish_shards(folder, notes(folder))
    assert not list(folder.glob("*.safetensors"))


def test_what_tells_of_the_job_is_published_with_its_shards_and_not_before(folder):
    for rank in (0, 1):
        texts = {"job": "seed: 1\n", "decisions": "steps: []\n", "smoothed": "{}\n"}
        write_note(folder, rank, **texts, equal={"norm.weight": "digest"})
    merge_files(folder)
    told = (CONFIG, DECISIONS, SMOOTHED)
    assert [(folder / name).read_text() for name in told] == ["seed: 1\n", "steps: []\n", "{}\n"]
    for rank in (0, 1):
        stage(folder, rank)
        write_note(folder, rank, job="seed: 2\n", equal={"norm.weight": str(rank)})
    with pytest.raises(VerificationError):
        publish_shards(folder, notes(folder), job="seed: 3\n")
    assert [(folder / name).read_text() for name in told] == ["seed: 1\n", "steps: []\n", "{}\n"]
    write_note(folder, 1, equal={"norm.weight": "0"})
    publish_shards(folder, notes(folder), job="seed: 3\n")
    assert (folder / CONFIG).read_text() == "seed: 3\n"
    assert not (folder / DECISIONS).exists()
    assert not (folder / SMOOTHED).exists()


@pytest.mark.parametrize(("rules", "stays"), [([["up", "w8a16"], ["norm", "float"]], True), ([["up", "float"]], False)])
def test_decisions_that_a_person_edited_stay_beside_the_checkpoint_that_was_made_from_them(folder, rules, stays):
    for rank in (0, 1):
        write_note(folder, rank, decisions="layer_schemes: {up: w8a8}\n", equal={"norm.weight": "digest"})
    publish_shards(folder, notes(folder))
    edited = "layer_schemes: {up: w8a16}  # by hand\n"
    (folder / DECISIONS).write_text(edited)
    for rank in (0, 1):
        stage(folder, rank)
        write_note(
            folder, rank, fields={"quantization.layer_schemes": rules}, fingerprint="e" * 64, equal={"norm.weight": ""}
        )
    publish_shards(folder, notes(folder))
    assert (folder / DECISIONS).exists() is stays
    assert not stays or (folder / DECISIONS).read_text() == edited


def test_an_old_manifest_goes_before_the_first_file_is_replaced(folder, monkeypatch):
    publish_shards(folder, notes(folder))
    for rank in (0, 1):
        stage(folder, rank)

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("launcher.stages.merge.move", power_cut)
    with pytest.raises(OSError, match="power cut"):
        publish_shards(folder, notes(folder))
    assert not (folder / MANIFEST).exists()


def test_two_schemes_staged_in_one_folder_must_be_told_apart(folder):
    for path in (folder / STAGING).glob(f"*{SCHEME}*"):
        shutil.copy(path, path.with_name(path.name.replace(SCHEME, "w8a8")))
    for path in (folder / STAGING).glob("quant_shard_note_w8a8_[01].json"):
        note = read_note(path)
        assert note is not None
        path.write_text(note.model_copy(update={"quant_type": "W8A8"}).model_dump_json())
    with pytest.raises(InputError, match=r"shards of w8a8 \(2 ranks\) and w8a8_dynamic \(2 ranks\)"):
        merge_files(folder)


def test_shards_of_another_scheme_stay_staged(folder):
    staged = folder / STAGING / "quant_shard_note_w8a8_0.json"
    shutil.copy(notes(folder)[0], staged)
    publish_shards(folder, notes(folder))
    assert list((folder / STAGING).iterdir()) == [staged]


def test_shards_of_the_same_type_on_another_number_of_ranks_go_with_the_publication(folder):
    third, alone = shard_files(folder / STAGING, SCHEME, "_2"), shard_files(folder / STAGING, SCHEME, "")
    for path in (third.weights, third.description, note_file(folder / STAGING, SCHEME, "_2"), alone.weights):
        path.touch()
    publish_shards(folder, notes(folder))
    assert not (folder / STAGING).exists()


def test_shards_of_one_type_on_different_numbers_of_ranks_are_not_mixed(folder):
    note = read_note(notes(folder)[0])
    assert note is not None
    alone = note.model_copy(update={"tp_size": 1})
    note_file(folder / STAGING, SCHEME, "").write_text(alone.model_dump_json())
    with pytest.raises(InputError, match=r"w8a8_dynamic \(1 rank\) and w8a8_dynamic \(2 ranks\)"):
        merge_files(folder)


def test_a_folder_that_a_job_works_in_is_not_merged(folder):
    with hold(folder, "--quant_weight_save_folder", "a job"), pytest.raises(FolderInUse, match="another job works"):
        merge_files(folder)
    assert not (folder / MANIFEST).exists()


BROKEN: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "a scale that is no number": ("up.weight_scale", lambda scale: scale.fill_(float("nan"))),
    "an offset": ("up.weight_offset", lambda offset: offset + 1),
    "a code out of range": ("up.weight", lambda codes: codes.fill_(-128)),
    "another dtype": ("up.weight", lambda codes: codes.to(torch.int32)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_our_own_reader_would_refuse_is_not_published_and_the_old_checkpoint_stays(folder, name):
    publish_shards(folder, notes(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for rank in (0, 1):
        stage(folder, rank)
    tensor, damage = BROKEN[name]
    rewrite(folder, 1, lambda tensors: tensors.update({tensor: damage(tensors[tensor])}))
    with pytest.raises(VerificationError, match=tensor) as raised:
        publish_shards(folder, notes(folder))
    assert "w8a8_dynamic_1" in raised.value.where
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_what_is_published_is_not_read_again_to_be_known(folder, monkeypatch):
    time.sleep(0.2)  # twice the grain of a clock that is reckoned with
    manifest = publish_shards(folder, notes(folder))
    monkeypatch.setattr("launcher.files.digests._read", lambda path: pytest.fail(f"{path} was read"))
    assert manifest.changed_files(folder) == []


def test_a_flipped_byte_in_a_published_file_is_named(folder):
    manifest = publish_shards(folder, notes(folder))
    weights = shard_files(folder, SCHEME, "_1").weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert manifest.changed_files(folder) == [weights.name]


def test_what_replaces_a_checkpoint_of_other_shards_leaves_none_of_its_files(folder):
    publish_shards(folder, notes(folder))
    stranger = folder / "README.md"
    stranger.touch()
    for rank in (0, 1):
        stage(folder, rank, scheme="w8a16")
    manifest = publish_shards(folder, notes(folder, scheme="w8a16"))
    assert {path.name for path in folder.iterdir()} == {
        *(file.name for file in manifest.files),
        MANIFEST,
        stranger.name,
    }


@pytest.mark.parametrize("fingerprint", ["f" * 64, "0" * 64], ids=["the same job", "another job"])
def test_what_was_found_of_another_jobs_checkpoint_goes_with_it_and_pictures_of_the_float_model_stay(
    folder: Path, fingerprint: str
):
    publish_shards(folder, notes(folder))
    told = [folder / QUALITY / CARD, folder / QUALITY / SHEET, *(folder / name for name in REPORT)]
    pictures = [folder / QUALITY / kind / "0_0.png" for kind in (QUANTIZED, FLOAT)]
    for path in (*told, *pictures):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for rank in (0, 1):
        stage(folder, rank)
        write_note(folder, rank, fingerprint=fingerprint, equal={"norm.weight": "digest"})
    publish_shards(folder, notes(folder))
    left = [path for path in (*told, *pictures) if path.exists()]
    assert left == ([*told, *pictures] if fingerprint == "f" * 64 else pictures[1:])


def test_a_manifest_that_names_files_elsewhere_removes_none(folder):
    publish_shards(folder, notes(folder))
    outside = folder.with_name("outside.txt")
    outside.touch()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][0]["name"] = f"../{outside.name}"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for rank in (0, 1):
        stage(folder, rank)
    publish_shards(folder, notes(folder))
    assert outside.exists()


def test_a_layer_called_linear_is_not_taken_for_a_smoothed_one():
    shapes = {"norm1.linear.weight": 0, "to_q.weight": 0}
    assert layer_of("norm1.linear.weight", shapes) == ("norm1.linear", "weight")
    assert layer_of("norm1.linear.weight_scale", shapes) == ("norm1.linear", "weight_scale")
    assert layer_of("to_q.linear.weight_scale", shapes) == ("to_q", "weight_scale")
    assert layer_of("to_q.div.mul_scale", shapes) == ("to_q", "mul_scale")
