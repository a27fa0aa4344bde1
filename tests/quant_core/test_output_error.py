"""What a treatment of one layer costs at the output: foretold for all layers together, checked one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from quant_core import M4ProcessorConfig, SessionConfig, quant_model
from quant_core.calibration.records import as_records
from quant_core.calibration.replay import replay
from quant_core.quality.decide import LayerErrors, measure_layers
from quant_core.quality.output_error import MOST_PROBES, _energies, probe_signs
from quant_core.quality.replayed import compare_outputs, kept_outputs
from quant_core.schemes.treatment import FLOAT, Treatment
from quant_core.structure import ModelStructure
from tests.support.small_model import SCHEMES, STEPS, SmallModel, records

STRUCTURE = ModelStructure(model_class="SmallModel")
LAYERS = ("first", "second")


def session(rules: Mapping[str, Any] | None = None, per_step: int = 2) -> SessionConfig:
    """Ask for static layers with m4 on each of them."""
    processors = {"w8a8": SCHEMES["w8a8"](), "m4": M4ProcessorConfig(smoothing_groups="every")}
    data = records(per_step=per_step)
    return SessionConfig(processor_cfg_map=processors, layer_schemes=dict(rules or {}), calib_data=data)


@pytest.fixture(scope="module")
def errors() -> dict[str, LayerErrors]:
    return measure_layers(SmallModel(), session(), structure=STRUCTURE)


def measured(layer: str, treatment: Treatment) -> float:
    """Quantize one layer alone and return the error at the output as a share, the mean of the steps."""
    other = next(name for name in LAYERS if name != layer)
    options = {"timestep_sep": 0} if SCHEMES[treatment.scheme].__name__.startswith("W8A8TimeStep") else {}
    scheme = SCHEMES[treatment.scheme](smoothed=treatment.smoothed, **options)
    config = session({other: "float", layer: scheme})
    model, data = SmallModel(), as_records(config.calib_data)
    with kept_outputs(model) as exact:
        replay(model, data, stage="")
    quant_model(model, config, structure=STRUCTURE)
    steps = compare_outputs(model, data, exact).steps().values()
    return sum(ratio.noise / ratio.signal for ratio in steps) / STEPS


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("text", ["w8a8", "w8a8:plain", "w8a8_timestep", "w8a8_dynamic:plain", "w8a16:plain"])
def test_the_foretold_error_is_the_one_that_quantizing_the_layer_alone_makes(
    layer: str, text: str, errors: dict[str, LayerErrors]
):
    """Within 2.5 dB: a layer of 8 channels is few random numbers."""
    found = errors[layer].errors[Treatment.of(text)]
    foretold = sum(found.values()) / len(found)
    assert sorted(step for step in found if step is not None) == list(range(STEPS))
    assert 0.56 < foretold / measured(layer, Treatment.of(text)) < 1.8


def test_a_layer_that_stays_float_costs_nothing_but_bytes(errors: dict[str, LayerErrors]):
    first = errors["first"]
    assert set(first.errors[Treatment(FLOAT)].values()) == {0.0}
    assert first.bytes[Treatment(FLOAT)] > 2 * first.bytes[Treatment("w8a8_dynamic")]


def test_a_layer_whose_runtime_multiplies_nothing_has_no_smoothed_treatment(errors: dict[str, LayerErrors]):
    assert Treatment("w8a16") in errors["first"].errors
    assert Treatment("w8a16", smoothed=True) not in errors["first"].errors


def test_work_counts_the_multiplications_of_all_records(errors: dict[str, LayerErrors]):
    assert errors["first"].work == STEPS * 5 * 8 * 16  # of the half that ranges come from


def test_the_model_is_left_float_and_records_without_steps_have_no_timestep_treatment():
    model = SmallModel()
    before = model.first.weight.clone()
    data = [{"args": record["args"]} for record in records()]
    config = SessionConfig(processor_cfg_map={"w8a8": SCHEMES["w8a8"]()}, calib_data=data)
    found = measure_layers(model, config, structure=STRUCTURE)
    assert torch.equal(model.first.weight, before)
    assert {treatment.scheme for treatment in found["first"].errors} == {"w8a8", "w8a8_dynamic", "w8a16", "float"}


@pytest.mark.parametrize("layers", [5, 63, 200])
def test_the_shares_of_many_layers_are_told_apart(layers: int):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, layers + 1).float()
    own_LD = torch.randn(layers, 8000, generator=generator) * sizes.sqrt().unsqueeze(1)
    signs_PL = probe_signs(layers)
    assert len(signs_PL) <= MOST_PROBES
    found_L = _energies(signs_PL, signs_PL @ own_LD, orthogonal=layers < len(signs_PL))
    exact_L = own_LD.double().square().sum(1)
    # With more layers than probes a large one is found within a part, and the sum of all closely.
    assert (found_L / exact_L - 1)[-1].abs() < (1e-3 if layers < MOST_PROBES else 0.6)
    assert abs(float(found_L.sum() / exact_L.sum()) - 1) < 0.1
