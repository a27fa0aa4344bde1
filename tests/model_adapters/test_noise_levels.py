"""The noise level of each step is what the pipeline's scheduler steps through, or is not told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from model_adapters import load_adapter
from model_adapters.pipeline.noise_levels import noise_levels, shift, steps_of
from quant_core.errors import InputError

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
HEUN = {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
UNIPC = {"_class_name": "UniPCMultistepScheduler", **FLOW}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_image_seq_len": 4096}


def levels(model: str, settings: dict[str, object], steps: int = 3) -> list[float] | None:
    adapter = load_adapter(model)
    return noise_levels(adapter, settings, adapter.options(path="-", width=64, height=64), steps)


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_each_step_of_euler_has_a_level_below_the_one_before(model: str):
    found = levels(model, EULER)
    assert found is not None
    assert len(found) == 3
    assert found[0] == 1.0
    assert found == sorted(set(found), reverse=True)


def test_a_scheduler_that_stays_at_a_level_tells_none():
    """Heun computes all steps but the first twice, so its five rows have three levels."""
    assert levels("sd3", HEUN) is None


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("flux", EULER | DYNAMIC),
        ("flux", UNIPC),
        ("flux", FLOW | DYNAMIC | {"_class_name": "DPMSolverMultistepScheduler"}),
        ("sd3", EULER | DYNAMIC),
        ("sd3", UNIPC),
    ],
)
def test_the_levels_are_those_that_the_real_pipeline_steps_through(model: str, settings, request, tmp_path: Path):
    folder = with_scheduler(request.getfixturevalue(f"tiny_{model}_folder"), settings, tmp_path / "model")
    adapter = load_adapter(model)
    pipeline = adapter.pipeline_type().from_pretrained(folder, torch_dtype=torch.float32)
    pipeline("a cat", width=64, height=32, num_inference_steps=3, output_type="latent")
    options = adapter.options(path=str(folder), width=64, height=32, infer_steps=3)
    assert noise_levels(adapter, settings, options, 3) == pipeline.scheduler.sigmas[:3].tolist()


def test_the_shift_is_the_one_of_diffusers():
    class Scheduler:
        config = {"base_shift": 0.3, "max_image_seq_len": 1000}  # noqa: RUF012

    for tokens in (16, 256, 4096):
        assert shift(Scheduler, tokens, max_shift=1.16) == calculate_shift(tokens, 256, 1000, 0.3, 1.16)


def test_a_scheduler_that_computes_steps_twice_steps_more_often_than_asked(tiny_sd3_folder: Path, tmp_path: Path):
    adapter = load_adapter("sd3")
    options = adapter.options(path=str(tiny_sd3_folder), infer_steps=3)
    assert steps_of(adapter, options) == 3
    folder = with_scheduler(tiny_sd3_folder, HEUN, tmp_path / "model")
    assert steps_of(adapter, options.model_copy(update={"path": str(folder)})) == 5


@pytest.mark.parametrize("settings", [HEUN, {"_class_name": "NoScheduler"}, {}])
def test_a_scheduler_that_the_pipeline_cannot_use_is_explained(settings, tiny_flux_folder: Path, tmp_path: Path):
    """FLUX gives sigmas, which Heun takes none of."""
    folder = with_scheduler(tiny_flux_folder, settings, tmp_path / "model")
    adapter = load_adapter("flux")
    with pytest.raises(InputError, match="FluxPipeline cannot use the scheduler"):
        steps_of(adapter, adapter.options(path=str(folder)))


def with_scheduler(folder: Path, settings: dict[str, object], copy: Path) -> Path:
    """Return a copy of a pipeline that has another scheduler."""
    shutil.copytree(folder, copy)
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    parts = json.loads((copy / "model_index.json").read_text())
    parts["scheduler"] = ["diffusers", settings.get("_class_name")]
    (copy / "model_index.json").write_text(json.dumps(parts))
    return copy
