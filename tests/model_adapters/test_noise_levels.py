"""The noise level of each step is what the pipeline's scheduler steps through, or is not told."""

from __future__ import annotations

import pytest

from model_adapters import load_adapter
from model_adapters.pipeline.noise_levels import noise_levels

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
HEUN = {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}


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
