"""What a treatment of one layer costs at the output: foretold for all layers together, checked one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core import M4ProcessorConfig, SessionConfig, TimestepManager, quant_model
from quant_core.calibration.records import as_records
from quant_core.calibration.replay import replay
from quant_core.errors import ConfigurationError, InputError
from quant_core.quality.budget import BUDGETS, Budget
from quant_core.quality.decide import LayerErrors, choose_layers, measure_layers
from quant_core.quality.output_error import MOST_PROBES, _energies, probe_signs
from quant_core.quality.replayed import compare_outputs, kept_outputs
from quant_core.schemes.treatment import FLOAT, Treatment
from tests.support.mixer import PER_STEP, STEPS, STRUCTURE, TOKENS, WIDTH, Mixer, records
from tests.support.small_model import SCHEMES

LAYERS = ("first", "second")


def session(rules: Mapping[str, Any] | None = None) -> SessionConfig:
    """Ask for static layers with m4 on each of them."""
    processors = {"w8a8": SCHEMES["w8a8"](), "m4": M4ProcessorConfig(smoothing_groups="every")}
    return SessionConfig(processor_cfg_map=processors, layer_schemes=dict(rules or {}), calib_data=records())


@pytest.fixture(scope="module")
def errors() -> dict[str, LayerErrors]:
    return measure_layers(Mixer(), session(), structure=STRUCTURE).layers


def measured(layer: str, treatment: Treatment) -> float:
    """Quantize one layer alone and return the error at the output as a share, the mean of the steps."""
    other = next(name for name in LAYERS if name != layer)
    options = {"timestep_sep": 0} if SCHEMES[treatment.scheme].__name__.startswith("W8A8TimeStep") else {}
    scheme = SCHEMES[treatment.scheme](smoothed=treatment.smoothed, **options)
    config = session({other: "float", layer: scheme})
    model, data = Mixer(), as_records(config.calib_data)
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
    """Within 2.5 dB: a rounded input that is mostly zeros makes an error with a mean, which the probes have not."""
    found = errors[layer].errors[Treatment.of(text)]
    foretold = sum(found.values()) / len(found)
    assert sorted(step for step in found if step is not None) == list(range(STEPS))
    assert 0.56 < foretold / measured(layer, Treatment.of(text)) < 1.8


def test_a_layer_that_stays_float_costs_nothing_but_bytes(errors: dict[str, LayerErrors]):
    first = errors["first"]
    assert set(first.errors[Treatment(FLOAT)].values()) == {0.0}
    assert first.bytes[Treatment(FLOAT)] > 1.5 * first.bytes[Treatment("w8a8_dynamic")]


def test_a_layer_whose_runtime_multiplies_nothing_has_no_smoothed_treatment(errors: dict[str, LayerErrors]):
    assert Treatment("w8a16") in errors["first"].errors
    assert Treatment("w8a16", smoothed=True) not in errors["first"].errors


def test_no_static_treatment_is_offered_whose_range_would_rest_on_few_tokens():
    data = [{"args": [record["args"][0][:, :1]], "timestep_idx": record["timestep_idx"]} for record in records()]
    config = SessionConfig(processor_cfg_map={"w8a8": SCHEMES["w8a8"]()}, calib_data=data)
    found = measure_layers(Mixer(), config, structure=STRUCTURE).layers
    assert {treatment.scheme for treatment in found["first"].errors} == {"w8a8_dynamic", "w8a16", "float"}


def test_no_treatment_is_offered_that_the_runtime_cannot_compute_for_one_output():
    model = Mixer()
    model.second, model.last = nn.Linear(2 * WIDTH, 1), nn.Linear(WIDTH, WIDTH)
    found = measure_layers(model.requires_grad_(False), session(), structure=STRUCTURE).layers
    assert {treatment.scheme for treatment in found["second"].errors} == {"w8a8", "w8a16", "float"}


def test_a_layer_that_no_record_of_a_step_runs_is_named():
    class Lazy(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            runs = TimestepManager.get_timestep_idx() != 1
            return super().forward(x) if runs else self.last(torch.relu(self.first(x))[..., :WIDTH])

    with pytest.raises(InputError, match="never ran layer 'second' in step 1"):
        measure_layers(Lazy(), session(), structure=STRUCTURE)


def test_fused_smoothing_is_not_measured_because_no_layer_has_it_alone():
    fused = M4ProcessorConfig(smoothing_groups="every", fused=True)
    config = SessionConfig(processor_cfg_map={"w8a8": SCHEMES["w8a8"](), "m4": fused}, calib_data=records())
    with pytest.raises(ConfigurationError, match="layers cannot be measured with fused smoothing"):
        measure_layers(Mixer(), config, structure=STRUCTURE)


def test_a_given_layer_has_its_treatment_and_the_float_model_runs_once_for_all_choices():
    told: Counter[str] = Counter()
    config = session({"first": "w8a16"})
    found = measure_layers(
        Mixer(), config, given=["first"], structure=STRUCTURE, progress=lambda stage, *_: told.update([stage])
    )
    choice = choose_layers(found, BUDGETS["quality"])
    assert choice.layers[0].chosen.treatment.scheme == "w8a16"
    assert len(choice.layers[1].candidates) > 3
    assert choice.static_share < 1
    assert told["float outputs"] == STEPS


def test_work_counts_the_multiplications_of_all_records(errors: dict[str, LayerErrors]):
    assert errors["first"].work == STEPS * PER_STEP // 2 * TOKENS * 2 * WIDTH**2  # of the half that ranges come from


def test_the_model_is_left_float_and_records_without_steps_have_no_timestep_treatment():
    model = Mixer()
    before = model.first.weight.clone()
    data = [{"args": record["args"]} for record in records()]
    config = SessionConfig(processor_cfg_map={"w8a8": SCHEMES["w8a8"]()}, calib_data=data)
    found = measure_layers(model, config, structure=STRUCTURE).layers
    assert torch.equal(model.first.weight, before)
    assert {treatment.scheme for treatment in found["first"].errors} == {"w8a8", "w8a8_dynamic", "w8a16", "float"}


def test_the_choice_was_tried_on_the_whole_model_which_is_left_as_it_was():
    model = Mixer()
    found = measure_layers(model, session(), structure=STRUCTURE)
    choice = choose_layers(found, BUDGETS["quality"])
    assert choice.measured is not None
    assert choice.measured == pytest.approx(choice.sqnr, abs=2.5)
    assert not model.first._forward_hooks
    assert choose_layers(found, Budget(dynamic=0)).measured < choice.measured


def test_a_choice_that_the_whole_model_shows_to_be_worse_than_one_without_smoothing_is_not_taken():
    """Layers say that smoothing is free of error; the model, whose factors are wrong here, does not."""
    found = measure_layers(Mixer(), session(), structure=STRUCTURE)
    wrong = {
        name: replace(change, columns_I=torch.ones(change.columns_I.shape))
        for name, change in found.smoothing.rescalings.items()
    }
    lying = {
        name: replace(layer, errors={t: dict.fromkeys(e, 1e-9) if t.smoothed else e for t, e in layer.errors.items()})
        for name, layer in found.layers.items()
    }
    misled = replace(found, layers=lying, smoothing=replace(found.smoothing, rescalings=wrong))
    choice = choose_layers(misled, BUDGETS["speed"])
    assert not any(layer.chosen.treatment.smoothed for layer in choice.layers)
    assert choice.measured > 20
    # The job still has outlier suppression: the table has to keep it away from each layer.
    assert {Treatment.of(text).smoothed for text in choice.layer_schemes.values()} == {False}


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
