"""What an earlier run left is used again if it is this job's, byte for byte, and otherwise made anew or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import launcher.run
from launcher.config.resolve import job_config
from launcher.files.fingerprint import SCHEMA, Fingerprint
from launcher.files.run_folder import MANIFEST
from launcher.run import run
from launcher.stages.job import Job, Results
from quant_core.calibration.records import load_dump, save_dump
from quant_core.errors import ConfigurationError, InputError
from scripts.make_tiny_pipeline import write_prompts
from tests.support.consumer import check_manifest
from tests.support.tiny_job import run_job

# Sections of a job that makes images of the float model and nothing else.
ONLY_IMAGES = {"quantization": {"do_quant": False}, "output": {"quant_weight_save_folder": None}}


class Place:
    """Folders of jobs on one tiny pipeline, in one process."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.prompts = root / "prompts.txt"
        self.prompts.write_text("a red bus\na cat\n")
        self.prompts.chmod(0o640)

    def run(self, *, weights: str = "weights", images: str = "images", **sections: dict[str, Any]) -> None:
        """Run a job whose files go below the root."""
        pipeline = {"path": str(self.model), "prompt_path": str(self.prompts), "width": 64, "height": 64}
        pipeline |= {"infer_steps": 2, "info_file_save_path": str(self.root / "info.json")}
        output = {"quant_weight_save_folder": self.root / weights, "quant_dump_calib_folder": self.root / "dumps"}
        output |= {"save_path": self.root / images, "do_save_img": True}
        tree = {
            "pipeline": pipeline | sections.get("pipeline", {}),
            "quantization": {"do_quant": True, **sections.get("quantization", {})},
            "ranks": {"device": "cpu"},
            "output": output | sections.get("output", {}),
            "evaluation": sections.get("evaluation", {}),
        }
        run(job_config("flux", tree))

    def images(self, kind: str, folder: str = "images") -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.root / folder / kind).glob("*.png")}

    def published(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.root / "weights").glob("quant_model_*")}

    @property
    def dump(self) -> Path:
        return self.root / "dumps" / "calib_data.pth"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_flux_folder: Path) -> Place:
    """A finished job: per-step scales, images of both models."""
    place = Place(tmp_path_factory.mktemp("first"), tiny_flux_folder)
    place.run()
    return place


@pytest.fixture
def place(first: Place, tmp_path: Path) -> Place:
    """A copy of the finished job's files, times and all."""
    root = Path(shutil.copytree(first.root, tmp_path / "copy"))
    return Place(root, first.model)


def flip(path: Path, place: int = -1) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def some_tensor(dump: Path) -> bytes:
    """Return the bytes of a tensor of a dump."""
    tensor = load_dump(dump, mmap=False)["records"][0]["kwargs"]["hidden_states"]
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def times(folder: Path) -> dict[Path, int]:
    """Return when each file was written; the logs and the status are written anew by every run."""
    names = ("quant_*", "*.pth", "*.png", "*.png.json")
    return {path: path.stat().st_mtime_ns for name in names for path in folder.rglob(name)}


def test_the_same_job_again_changes_no_file(place: Place):
    before = times(place.root)
    place.run()
    assert times(place.root) == before


def test_the_same_job_again_with_leave_to_overwrite_changes_no_file(place: Place):
    before = times(place.root)
    place.run(output={"overwrite": True})
    assert times(place.root) == before


def test_a_job_that_resumes_nothing_makes_its_own_files_anew_even_from_a_damaged_dump(place: Place):
    before, expected, dump = times(place.root), place.published(), place.dump.read_bytes()
    flip(place.dump, dump.index(some_tensor(place.dump)))
    place.run(output={"resume": "never"})
    assert (place.published(), place.dump.read_bytes()) == (expected, dump)
    after = times(place.root)
    assert all(after[path] != before[path] for path in before if path.suffix in (".pth", ".safetensors"))


def test_a_job_that_resumes_nothing_replaces_no_other_jobs_checkpoint_or_calibration_data(place: Place):
    before = times(place.root)
    for what, other in (
        ("checkpoint of another job", {"quantization": {"quant_type": "w8a8_dynamic"}}),
        ("calibration data was made by another job", {"weights": "other", "pipeline": {"seed": 99}}),
    ):
        with pytest.raises(InputError, match=what):
            place.run(**other, output={"resume": "never"})
    assert times(place.root) == before


def test_a_checkpoint_whose_fields_meant_something_else_is_another_jobs(place: Place, monkeypatch: pytest.MonkeyPatch):
    before = times(place.root / "weights")
    monkeypatch.setattr("launcher.files.fingerprint.SCHEMA", SCHEMA + 1)
    with pytest.raises(InputError, match="checkpoint of another job") as refused:
        place.run()
    assert "another version" in refused.value.why
    assert times(place.root / "weights") == before
    place.run(output={"overwrite": True})
    manifest = check_manifest(place.root / "weights")
    assert manifest["fingerprint"] == Fingerprint(manifest["fields"]).digest


def test_what_killed_runs_left_is_swept_from_all_folders_of_a_job_and_what_is_a_users_stays(place: Place):
    kept, swept = [], []
    for below in (
        *(
            "weights",
            "weights/.shards",
            "weights/quality",
            "weights/quality/float",
            "dumps",
            "dumps/.calib_parts/calib_data",
        ),
        *("images", "images/calib_fp", "images/calib_fp/.records", "images/calib_quant", "images/calib_quant/.records"),
    ):
        (place.root / below).mkdir(parents=True, exist_ok=True)
        kept.append(place.root / below / ".mine.tmp")
        swept.append(place.root / below / ".calib_data.pth.1.tmp")
    for path in (*kept, *swept):
        path.touch()
    place.run()
    assert [path for path in swept if path.exists()] == []
    assert all(path.exists() for path in kept)


def test_images_of_another_scheme_are_not_shown_as_this_ones(place: Place):
    before = place.images("calib_quant"), times(place.root / "images" / "calib_fp")
    other = {"quant_type": "w8a8_dynamic", "anti_method": "m4"}
    place.run(weights="other", quantization=other)
    place.run(weights="other", images="fresh", quantization=other)
    assert place.images("calib_quant") != before[0]
    assert place.images("calib_quant") == place.images("calib_quant", "fresh")
    assert times(place.root / "images" / "calib_fp") == before[1], "the float model's are the same job's"


def test_images_of_another_seed_are_all_made_again(place: Place):
    before = place.images("calib_fp"), place.images("calib_quant")
    place.run(pipeline={"seed": 99}, output={"overwrite": True})
    for kind, old in zip(("calib_fp", "calib_quant"), before):
        new = place.images(kind)
        assert new.keys() == old.keys()
        assert all(new[name] != old[name] for name in new)


@pytest.mark.parametrize("kind", ["calib_fp", "calib_quant"])
def test_an_image_that_was_changed_is_made_again_and_no_other(kind: str, place: Place):
    changed, kept = sorted((place.root / "images" / kind).glob("*.png"))
    expected, before = changed.read_bytes(), kept.stat().st_mtime_ns
    flip(changed)
    place.run()
    assert changed.read_bytes() == expected
    assert kept.stat().st_mtime_ns == before


def test_a_changed_byte_in_a_published_file_is_noticed_and_the_file_made_again(place: Place, capsys):
    expected = place.published()
    weights = next((place.root / "weights").glob("*.safetensors"))
    flip(weights)
    place.run()
    assert f"as it was changed since: {weights.name}" in capsys.readouterr().out
    assert place.published() == expected


def test_a_changed_byte_in_a_dump_is_refused(place: Place):
    flip(place.dump, place.dump.read_bytes().index(some_tensor(place.dump)))
    with pytest.raises(InputError, match="changed after it was saved"):
        place.run(weights="other", quantization={"quant_type": "w8a8"})
    assert not list((place.root / "other").glob("*.safetensors"))


def test_a_dump_that_another_job_put_in_the_place_of_this_ones_is_not_quantized(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    """As on a file system without locks."""
    calibrate = launcher.run.calibrate

    def calibrate_and_lose(job: Job, results: Results) -> Any:
        dump = calibrate(job, results)
        theirs = load_dump(place.dump, mmap=False)
        save_dump(place.dump, theirs["records"], {**theirs["header"], "fingerprint": "another"})
        return dump

    monkeypatch.setattr("launcher.run.calibrate", calibrate_and_lose)
    with pytest.raises(InputError, match="is another job's"):
        place.run(weights="other", quantization={"quant_type": "w8a8"})
    assert not list((place.root / "other").glob("*.safetensors"))


def test_another_scheme_in_place_of_the_first_leaves_none_of_its_files(place: Place):
    place.run(quantization={"quant_type": "w8a8_dynamic"}, output={"overwrite": True})
    named = {file["name"] for file in check_manifest(place.root / "weights")["files"]}
    assert {path.name for path in (place.root / "weights").glob("quant_model_*")} == named


def test_float_images_of_another_job_are_neither_kept_nor_listed_as_a_published_ones(place: Place):
    old, other = place.images("calib_fp"), {"weights": "other", "pipeline": {"seed": 99}}
    place.run(**other, output={"do_save_img": False, "overwrite": True})
    place.run(**other)
    new = place.images("calib_fp")
    assert new.keys() == old.keys()
    assert all(new[name] != old[name] for name in new)
    listed = [Path(image) for entry in json.loads((place.root / "info.json").read_text()) for image in entry["images"]]
    assert {image.name for image in listed if image.parent.name == "calib_fp"} == new.keys()


@pytest.fixture
def gallery(tiny_flux_folder: Path, tmp_path: Path) -> Place:
    """A finished job that makes images of the float model and nothing else."""
    place = Place(tmp_path, tiny_flux_folder)
    place.run(**ONLY_IMAGES)
    return place


def test_images_of_a_job_that_quantizes_nothing_are_found_again_and_only_lacking_ones_made(gallery: Place):
    lost, kept = sorted((gallery.root / "images").glob("*.png"))
    expected, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    gallery.run(**ONLY_IMAGES)
    assert lost.read_bytes() == expected
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("pipeline", [{"seed": 99}, {"use_cache": True}], ids=lambda changed: next(iter(changed)))
def test_images_of_a_job_that_quantizes_nothing_are_made_again_for_another(pipeline: dict[str, Any], gallery: Place):
    before = times(gallery.root / "images")
    gallery.run(pipeline=pipeline, **ONLY_IMAGES)
    after = times(gallery.root / "images")
    assert after.keys() == before.keys()
    assert all(after[path] != before[path] for path in before)


ONLINE = {"calibrate": "online", "no_dump": True}


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory, tiny_flux_folder: Path) -> Place:
    """A finished job whose ranges were taken while it calibrated; it kept nothing else."""
    place = Place(tmp_path_factory.mktemp("online"), tiny_flux_folder)
    place.run(quantization={"quant_type": "w8a8"}, output=ONLINE | {"do_save_img": False})
    return place


def run_online(place: Place, weights: str = "weights", quantization: Any = None, **output: Any) -> dict[str, Any]:
    """Run a job with online ranges and return the tensors that it published."""
    place.run(
        weights=weights,
        quantization=quantization or {"quant_type": "w8a8"},
        output=ONLINE | {"do_save_img": False, **output},
    )
    return load_file(next((place.root / weights).glob("*.safetensors")))


def copy_of(online: Place, root: Path) -> Place:
    return Place(Path(shutil.copytree(online.root, root / "copy")), online.model)


def ranges_of(place: Place) -> Path:
    return place.root / "dumps" / "calib_ranges.pth"


def test_online_ranges_rest_on_every_forward_and_no_calibration_data_is_left(online: Place):
    assert load_dump(ranges_of(online))["records"][0]["forwards"] == 2 * 2, "two prompts of two steps"
    assert [path.name for path in (online.root / "dumps").rglob("*.pth")] == ["calib_ranges.pth"]


def test_online_and_replayed_checkpoints_are_different_jobs(online: Place, tmp_path: Path):
    place = copy_of(online, tmp_path)
    with pytest.raises(InputError, match="another job") as refused:
        place.run(quantization={"quant_type": "w8a8"}, output={"do_save_img": False})
    assert "ranges" in str(refused.value)


def test_the_dump_beside_online_ranges_is_the_dump_without_them(first: Place, online: Place, tmp_path: Path):
    place = copy_of(online, tmp_path)
    shutil.rmtree(place.root / "weights")
    place.run(quantization={"quant_type": "w8a8"}, output=ONLINE | {"do_save_img": False, "no_dump": False})
    here, there = load_dump(place.dump), load_dump(first.dump)
    assert here["header"]["sha256"] == there["header"]["sha256"]
    assert place.published() == online.published(), "its ranges were there already, and are the same"


def test_online_ranges_of_another_quantization_are_taken_anew(online: Place, tmp_path: Path):
    place, other = copy_of(online, tmp_path), {"quant_type": "w8a8", "act_method": "percentile"}
    found = run_online(place, "other", other)
    fresh = Place(tmp_path / "copy", online.model)
    shutil.rmtree(place.root / "dumps")
    expected = run_online(fresh, "fresh", other)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    of_minmax = load_file(next((online.root / "weights").glob("*.safetensors")))
    assert not all(found[name].equal(of_minmax[name]) for name in of_minmax)


def test_online_ranges_of_other_prompts_are_refused(online: Place, tmp_path: Path):
    place = copy_of(online, tmp_path)
    place.prompts.write_text("another\nprompt\n")
    with pytest.raises(InputError, match="made by another job"):
        run_online(place, "other")


def test_a_changed_number_in_online_ranges_is_refused(online: Place, tmp_path: Path):
    place = copy_of(online, tmp_path)
    changed = load_dump(ranges_of(place), mmap=False)
    next(iter(changed["records"][0]["layers"].values()))["low"].mul_(2)
    save_dump(ranges_of(place), changed["records"], changed["header"])
    shutil.rmtree(place.root / "weights")
    with pytest.raises(InputError, match="changed after it was saved"):
        run_online(place)


def test_online_ranges_that_another_job_put_in_the_place_of_this_ones_are_not_quantized(
    online: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place, calibrate = copy_of(online, tmp_path), launcher.run.calibrate

    def calibrate_and_lose(job: Job, results: Results) -> Any:
        found, theirs = calibrate(job, results), load_dump(ranges_of(place), mmap=False)
        save_dump(ranges_of(place), theirs["records"], {**theirs["header"], "fingerprint": "another"})
        return found

    monkeypatch.setattr("launcher.run.calibrate", calibrate_and_lose)
    shutil.rmtree(place.root / "weights")
    with pytest.raises(InputError, match="is another job's"):
        run_online(place)


@pytest.mark.parametrize("no_dump", [True, False])
def test_an_interrupted_online_calibration_goes_on_after_its_last_batch(
    no_dump: bool, online: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    place = copy_of(online, tmp_path)
    shutil.rmtree(place.root / "weights")
    shutil.rmtree(place.root / "dumps")

    def end(self: Any, where: str) -> None:
        if where.startswith("batch 2"):
            raise InputError("ended", where=where)

    with monkeypatch.context() as patched:
        patched.setattr("launcher.stages.calibrate.SameNumbers.check", end)
        with pytest.raises(InputError, match="ended"):
            run_online(place, no_dump=no_dump)
    run_online(place, no_dump=no_dump)
    assert "1 of 2 batches were finished by an earlier run" in capsys.readouterr().out
    assert place.published() == online.published()
    assert ranges_of(place).read_bytes() == ranges_of(online).read_bytes()


def test_attention_ranges_and_factors_are_taken_online_and_factors_are_those_of_a_replay(online: Place, tmp_path: Path):
    place, quantization = copy_of(online, tmp_path), {"quant_type": "w8a8_dynamic_fa3", "anti_method": "m4"}
    found = run_online(place, "here", quantization)
    place.run(weights="there", quantization=quantization, output={"do_save_img": False})
    expected = load_file(next((place.root / "there").glob("*.safetensors")))
    assert found.keys() == expected.keys()
    in_floats = [name for name in expected if ".fa_" not in name]
    assert len(in_floats) < len(expected)
    assert any(name.endswith("mul_scale") for name in in_floats)
    assert all(found[name].equal(expected[name]) for name in in_floats)


def test_a_search_replays_all_the_same_says_so_and_is_the_job_that_it_would_be_without(
    online: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place, quantization = copy_of(online, tmp_path), {"quant_type": "w8a8", "anti_method": "m3"}
    run_online(place, "searched", quantization, no_dump=False)
    assert "--calibrate online replays the calibration data here: m3 searches its factors" in capsys.readouterr().out
    place.run(weights="searched", quantization=quantization, output={"do_save_img": False})
    assert "published already" in capsys.readouterr().out


REPLAYED_LATER = {
    "m3": ({"quantization": {"anti_method": "m3"}}, "searches its factors"),
    "m6": ({"quantization": {"anti_method": "m6"}}, "searches its factors"),
    "auto": ({"quantization": {"quant_type": "auto"}}, "auto measures"),
    "layers compared": ({"evaluation": {"evaluate": 0}}, "--evaluate 0"),
    "replayed": ({"output": {"calibrate": "always"}}, "finds ranges by replaying"),
}


@pytest.mark.parametrize("case", REPLAYED_LATER)
def test_no_dump_is_refused_where_something_replays_later(case: str, tiny_flux_folder: Path, tmp_path: Path):
    sections, why = REPLAYED_LATER[case]
    tree: dict[str, Any] = {"quantization": {"quant_type": "w8a8"}, "output": ONLINE | {"do_save_img": False}}
    for name, options in sections.items():
        tree[name] = {**tree.get(name, {}), **options}
    with pytest.raises(ConfigurationError, match=why):
        Place(tmp_path, tiny_flux_folder).run(**tree)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.distributed
def test_online_ranges_of_two_copies_are_those_of_one_and_slices_have_about_the_same(
    tiny_flux_folder: Path, tmp_path: Path
):
    prompts = write_prompts(tmp_path / "prompts.txt")
    flags = ("--quant_type", "w8a8_timestep", "--calibrate", "online", "--no_dump", "--max_num_prompt", "4")
    published: list[list[dict[str, torch.Tensor]]] = []
    for ranks, tp_size in ((1, 1), (2, 1), (2, 2)):
        out = tmp_path / f"{ranks}_{tp_size}"
        run_job(ranks, "flux", tiny_flux_folder, prompts, out, "--tp_size", str(tp_size), *flags)
        published.append([load_file(path) for path in sorted((out / "weights").glob("*.safetensors"))])
    ([one], [two_copies], slices) = published
    assert one.keys() == two_copies.keys()
    assert all(one[name].equal(two_copies[name]) for name in one)
    assert len(slices) == 2
    for name in (name for name in one if name.endswith("attn.to_q.input_scale")):
        first, second = (part[name] for part in slices)
        assert first.equal(second), "both read the whole input"
        assert torch.allclose(first.float(), one[name].float(), rtol=0.05)


@pytest.mark.distributed
def test_a_finished_copy_keeps_its_dump_while_another_calibrates(tiny_flux_folder: Path, tmp_path: Path):
    prompts = write_prompts(tmp_path / "prompts.txt")
    words = (2, "flux", tiny_flux_folder, prompts, tmp_path, "--tp_size", "1", "--quant_type", "w8a8")
    run_job(*words)
    dumps = [tmp_path / "dumps" / f"calib_data_rank{rank}.pth" for rank in (0, 1)]
    contents = [dump.read_bytes() for dump in dumps]
    kept = dumps[0].stat().st_mtime_ns
    expected = {path.name: path.read_bytes() for path in (tmp_path / "weights").glob("quant_model_*")}
    # The second copy was ended before it had a dump.
    dumps[1].unlink()
    (tmp_path / "weights" / MANIFEST).unlink()
    run_job(*words)
    assert dumps[0].stat().st_mtime_ns == kept
    assert [dump.read_bytes() for dump in dumps] == contents
    assert {path.name: path.read_bytes() for path in (tmp_path / "weights").glob("quant_model_*")} == expected


@pytest.mark.distributed
def test_parts_of_ranks_that_are_no_more_go_when_the_calibration_data_is_whole(tiny_flux_folder: Path, tmp_path: Path):
    parts = tmp_path / "dumps" / ".calib_parts"
    for rank in (2, 11):
        (parts / f"calib_data_rank{rank}").mkdir(parents=True)
        (parts / f"calib_data_rank{rank}" / "batch_00000.pth").touch()
    (parts / "calib_data").mkdir()
    (parts / "calib_ranges_rank1").mkdir()  # a rank of this job, whose ranges are another job's
    run_job(2, "flux", tiny_flux_folder, write_prompts(tmp_path / "prompts.txt"), tmp_path, "--max_num_prompt", "2")
    assert [path.name for path in parts.iterdir()] == ["calib_ranges_rank1"]
