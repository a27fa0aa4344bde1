"""Two jobs share a dump or a checkpoint only if everything that it depends on is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.config.resolve import job_config, job_config_class
from launcher.devices.launch import Launch
from launcher.files.fingerprint import Fingerprint
from launcher.files.identity import (
    OUTSIDE_IDENTITY,
    calibration_fingerprint,
    common_options,
    image_fingerprint,
    model_fields,
    quantization_fingerprint,
)
from launcher.ranks.mesh import Mesh
from model_adapters import load_adapter
from model_adapters.pipeline.prompts import read_batches
from quant_core.values import VALUES_VERSION

# Every option that tells jobs apart by its value. A new option belongs here, or into OUTSIDE_IDENTITY with a reason.
_OF_PIPELINE = {
    *("num_images_per_prompt", "infer_steps", "seed", "batch_size", "data_split_num", "data_split_id"),
    *("width", "height", "guidance_scale", "variant"),
}
COUNTS = {
    "pipeline": _OF_PIPELINE,
    "quantization": {
        *("quant_type", "anti_method", "anti_alpha", "anti_beta", "anti_groups", "anti_fused"),
        *("act_method", "numerics", "timestep_sep", "scale_sync", "layer_schemes"),
        *("budget", "scheme_costs", "rotate_values"),
    },
    "ranks": {"device"},
    "output": set[str](),
    "evaluation": set[str](),
}


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_every_option_is_named_on_one_side(model: str):
    options = job_config_class(model)
    sections: dict[str, Any] = {name: field.annotation for name, field in options.model_fields.items()}
    del sections["model"]
    assert set(sections) == set(COUNTS)
    for name, section in sections.items():
        outside = section.OUTSIDE_IDENTITY if name == "pipeline" else OUTSIDE_IDENTITY[name]
        assert not outside & COUNTS[name], name
        assert set(section.model_fields) == outside | COUNTS[name], name


class Asked:
    """A job on a copy of a pipeline, and its fingerprints."""

    def __init__(self, root: Path, pipeline: Path) -> None:
        self.root = root
        self.folder = Path(shutil.copytree(pipeline, root / "model"))
        self.prompts = root / "prompts.txt"
        self.prompts.write_text("a red bus\na cat\n")
        self.prompts.chmod(0o640)

    def fingerprints(
        self, *, tp_size: int = 1, online: bool = False, **sections: dict[str, Any]
    ) -> dict[str, Fingerprint]:
        output = {"quant_weight_save_folder": "w", "quant_dump_calib_folder": "d", **sections.get("output", {})}
        tree = {
            "pipeline": {"path": str(self.folder), "prompt_path": str(self.prompts), **sections.get("pipeline", {})},
            "quantization": {"do_quant": True, "quant_type": "w8a8", **sections.get("quantization", {})},
            "ranks": {"device": "cpu", **sections.get("ranks", {})},
            "output": output,
        }
        config, adapter = job_config("flux", tree), load_adapter("flux")
        batches = read_batches(config.pipeline)
        calibration = calibration_fingerprint(
            config, adapter, Mesh(Launch(world=2), tp_size), model_fields(config), batches
        )
        chosen = config.quantization.disable_names
        disabled = adapter.disabled_layers[config.quantization.quant_type] if chosen is None else chosen
        quantization = quantization_fingerprint(calibration, config, disabled, online=online)
        images = image_fingerprint(quantization, config)
        return {"calibration": calibration, "quantization": quantization, "images": images}


@pytest.fixture
def asked(tmp_path: Path, tiny_flux_folder: Path) -> Asked:
    return Asked(tmp_path, tiny_flux_folder)


def changed(before: dict[str, Fingerprint], after: dict[str, Fingerprint]) -> set[str]:
    return {name for name in before if before[name].digest != after[name].digest}


ALL = {"calibration", "quantization", "images"}
OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "the seed": ({"pipeline": {"seed": 7}}, ALL),
    "the size": ({"pipeline": {"width": 512}}, ALL),
    "guidance": ({"pipeline": {"guidance_scale": 2.0}}, ALL),
    "the dtype": ({"pipeline": {"dtype": "float32"}}, ALL),
    "the layout": ({"ranks": {"layout": "megatron"}}, ALL),
    "ranks that share a copy": ({"tp_size": 2}, ALL),
    "fewer prompts": ({"pipeline": {"max_num_prompt": 1}}, ALL),
    "the scheme": ({"quantization": {"quant_type": "w8a8_dynamic"}}, {"quantization", "images"}),
    "the scheme of some layers": ({"quantization": {"layer_schemes": {"*": "w8a16"}}}, {"quantization", "images"}),
    "ranges of the float model": ({"online": True}, {"quantization", "images"}),
    "smoothing": ({"quantization": {"anti_method": "m4"}}, {"quantization", "images"}),
    "rotated values": ({"quantization": {"rotate_values": True}}, {"quantization", "images"}),
    "layers kept float": ({"quantization": {"disable_names": ()}}, {"quantization", "images"}),
    "approximated steps": ({"pipeline": {"use_cache": True}}, {"images"}),
    "the dtype that is the default": ({"pipeline": {"dtype": "bfloat16"}}, set()),
    "the layout that is the default": ({"ranks": {"layout": "mindie"}}, set()),
    "the recipe said outright": ({"quantization": {"disable_names": ["*net.2*"]}}, set()),
    "time-outs": ({"ranks": {"timeout_s": 60, "hang_timeout": 7}}, set()),
    "a dump or none": ({"output": {"no_dump": True}}, set()),
    "folders": ({"output": {"save_path": "elsewhere", "do_save_img": True}}, set()),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_separates_exactly_what_depends_on_it(name: str, asked: Asked):
    options, expected = OPTIONS[name]
    assert changed(asked.fingerprints(), asked.fingerprints(**options)) == expected


def test_a_release_that_computes_other_values_makes_other_jobs_of_the_same_calibration_data(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
):
    before = asked.fingerprints()
    monkeypatch.setattr("launcher.files.identity.VALUES_VERSION", VALUES_VERSION + 1)
    assert changed(before, asked.fingerprints()) == {"quantization", "images"}


def test_the_package_of_a_device_separates_the_jobs_on_it_and_no_others(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    metadata = tmp_path / "site" / "torch_npu-2.13.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = []
    for version in ("2.13.0", "2.13.0.post1"):
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
        found.append([asked.fingerprints(ranks={"device": device}) for device in ("cpu", "npu")])
    (cpu, npu), (cpu_after, npu_after) = found
    assert not changed(cpu, cpu_after)
    assert changed(npu, npu_after) == ALL
    assert npu["calibration"].differences(npu_after["calibration"].fields) == [
        "versions.torch_npu: 2.13.0.post1 -> 2.13.0"
    ]


def scale_weights(path: Path) -> None:
    """Multiply a tensor in place: the file keeps its size."""
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and bool(tensor.any()))
    tensors[name] = (tensors[name].to(torch.float32) * 1.7).to(tensors[name].dtype)
    size = path.stat().st_size
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == size


def rewrite(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def write(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{}")


FILES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "weights of the transformer": (lambda f: scale_weights(next((f / "transformer").glob("*.safetensors"))), True),
    "weights of a text encoder": (lambda f: scale_weights(next((f / "text_encoder_2").glob("*.safetensors"))), True),
    "weights of the decoder": (lambda f: scale_weights(next((f / "vae").glob("*.safetensors"))), True),
    "the scheduler's settings": (lambda f: rewrite(f / "scheduler" / "scheduler_config.json", shift=1.5), True),
    "a tokenizer's settings": (lambda f: rewrite(f / "tokenizer" / "tokenizer_config.json", model_max_length=9), True),
    "a part left out": (lambda f: rewrite(f / "model_index.json", text_encoder=[None, None]), True),
    "a file that no part owns": (lambda f: (f / "README.md").write_text("A model."), False),
    "a hidden file in a part's folder": (lambda f: (f / "vae" / ".DS_Store").write_bytes(b"x"), False),
    "a file in a hidden folder of a part": (lambda f: write(f / "vae" / ".cache" / "etag.json"), False),
    "weights in one file for other programs": (lambda f: (f / "flux1-dev.safetensors").write_bytes(b"x"), False),
    "the library that saved it": (lambda f: rewrite(f / "model_index.json", _diffusers_version="0.1"), False),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_separates_jobs_if_the_pipeline_reads_it(name: str, asked: Asked):
    change, counts = FILES[name]
    before = asked.fingerprints()
    change(asked.folder)
    assert changed(before, asked.fingerprints()) == (ALL if counts else set())


def test_files_that_are_brought_separate_jobs_by_content_and_scale_and_not_by_name(asked: Asked, tmp_path: Path):
    for name, value in (("a", 1.0), ("b", 2.0), ("copy of a", 1.0)):
        save_file({"w": torch.tensor(value)}, tmp_path / f"{name}.safetensors")
    a, b, copy = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "copy of a"))
    for flag, given, others, same in (
        ("transformer", a, [None, b], copy),
        ("lora", [a], [[], [b], [f"{a}:0.5"], [a, a], [b, a]], [f"{copy}:1"]),
    ):
        before = asked.fingerprints(pipeline={flag: given})
        assert not changed(before, asked.fingerprints(pipeline={flag: same}))
        for other in others:
            assert changed(before, asked.fingerprints(pipeline={flag: other})) == ALL


def test_where_a_host_has_its_files_separates_no_ranks():
    def of_a_host(folder: str) -> dict[str, Any]:
        tree = {
            "pipeline": {
                "path": f"{folder}/model", "prompt_path": f"{folder}/p.txt", "info_file_save_path": f"{folder}/info",
                "transformer": f"{folder}/t.safetensors", "lora": [f"{folder}/l.safetensors"],
            },
            "quantization": {"do_quant": True},
            "output": {name: f"{folder}/{name}" for name in ("quant_weight_save_folder", "quant_dump_calib_folder")},
            "evaluation": {"evaluate": 1, "evaluate_prompts": f"{folder}/q.txt"},
        }  # fmt: skip
        return common_options(job_config("flux", tree))

    assert of_a_host("/disk1") == of_a_host("/disk2")


def test_weights_in_whose_place_a_file_is_brought_do_not_count(asked: Asked, tmp_path: Path):
    save_file({"w": torch.zeros(1)}, tmp_path / "mine.safetensors")
    brought = {"transformer": str(tmp_path / "mine.safetensors")}
    before = asked.fingerprints(pipeline=brought)
    for weights in (asked.folder / "transformer").glob("*.safetensors*"):
        weights.unlink()
    assert not changed(before, asked.fingerprints(pipeline=brought))


def test_a_folder_with_nothing_but_a_transformer_has_a_fingerprint(asked: Asked):
    for part in asked.folder.iterdir():
        if part.name != "transformer":
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    assert all(name.startswith("files.transformer/") for name in asked.fingerprints()["images"].fields if "/" in name)


@pytest.mark.parametrize("world", [2, 3, 40])
def test_the_ranks_shares_of_the_models_files_are_the_whole_and_none_twice(asked: Asked, world: int):
    tree = {
        "pipeline": {"path": str(asked.folder), "prompt_path": str(asked.prompts)},
        "quantization": {"do_quant": True},
        "output": {"quant_weight_save_folder": "w", "quant_dump_calib_folder": "d"},
    }
    config = job_config("flux", tree)
    shares = [model_fields(config, rank, world) for rank in range(world)]
    assert sum(len(share) for share in shares) == len(model_fields(config))
    assert {name: value for share in shares for name, value in share.items()} == model_fields(config)
    assert all(shares[:2]), "two ranks share the work"
