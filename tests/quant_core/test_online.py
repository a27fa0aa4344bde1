"""Ranges that are taken in the float model's own forwards: what they are, and that nothing is replayed for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SessionConfig,
    TimestepManager,
    W8A8QuantConfig,
    quant_model,
)
from quant_core.arithmetic.numerics import NUMERICS
from quant_core.attention.session import attention_observers
from quant_core.attention.watch import watch_attentions
from quant_core.calibration.measured import Measured
from quant_core.calibration.records import Record, as_records, load_dump, save_dump
from quant_core.calibration.replay import replay
from quant_core.errors import ConfigurationError, InputError
from quant_core.ranges import ESTIMATORS
from quant_core.session.float_forwards import second_look
from quant_core.session.online import OnlineCalibration
from tests.support.small_model import SCHEMES, STEPS, SmallModel, records, session
from tests.support.smoothed_models import outlier_model, structure_of
from tests.support.smoothed_models import records as model_records

ESTIMATOR_NAMES = sorted(ESTIMATORS["float32"])


def measure(
    model: Any, config: SessionConfig, of: Iterable[Any], *, start: Measured | None = None, structure: Any = None
) -> Measured:
    """Run the float model on records as a pipeline would, watched."""
    steps: list[int | None] = []
    online = OnlineCalibration(model, config, structure=structure, step_source=lambda: steps[-1])
    if start is not None:
        online.restore(start)
    with torch.no_grad(), online.watching():
        for record in as_records(list(of)):
            steps.append(record.step)
            model(*record.args, **record.kwargs)
    return online.measured()


def inputs_of(model: Any, layer: str, of: Iterable[Any]) -> list[tuple[int | None, Tensor]]:
    """Return what a layer of the float model gets, with the step."""
    seen: list[tuple[int | None, Tensor]] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append((TimestepManager.get_timestep_idx(), args[0].clone()))
    )
    replay(model, as_records(list(of)), stage="look")
    hook.remove()
    return seen


def with_measured(config: SessionConfig, measured: Measured) -> SessionConfig:
    return config.model_copy(update={"calib_data": measured})


def test_a_static_range_is_that_of_the_float_models_inputs_and_nothing_is_replayed():
    model = SmallModel()
    measured = measure(model, session("w8a8"), records())
    seen = {name: inputs_of(model, name, records()) for name in measured.layers}
    expected = {name: torch.cat([x.flatten() for _, x in inputs]) for name, inputs in seen.items()}
    before = model.calls
    found = quant_model(model, with_measured(session("w8a8"), measured))
    assert model.calls == before
    assert list(found.layers) == ["first", "second"]
    for name, layer in found.layers.items():
        scale, offset = NUMERICS["float32"].input_scale(*expected[name].aminmax(), torch.float32)
        assert layer.tensors["input_scale"].equal(scale)
        assert layer.tensors["input_offset"].equal(offset)


def test_each_step_has_the_range_of_its_own_records():
    model = SmallModel()
    measured = measure(model, session("w8a8_timestep"), records())
    seen = inputs_of(model, "second", records())
    found = quant_model(model, with_measured(session("w8a8_timestep"), measured))
    assert found.timesteps == STEPS
    for step in range(STEPS):
        values = torch.cat([x.flatten() for at, x in seen if at == step])
        scale, _ = NUMERICS["float32"].input_scale(*values.aminmax(), torch.float32)
        assert found.layers["second"].tensors["input_scale"][step].equal(scale)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_timestep"])
@pytest.mark.parametrize("name", ESTIMATOR_NAMES)
def test_behind_no_quantized_layer_every_estimator_finds_what_replaying_finds(name: str, scheme: str):
    config = session(scheme, cfg=W8A8QuantConfig(act_method=name))  # type: ignore[arg-type]
    online, replayed = SmallModel(), SmallModel()
    measured = measure(online, config, records())
    found = quant_model(online, with_measured(config, measured)).layers["first"].tensors
    expected = quant_model(replayed, config).layers["first"].tensors
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)


@pytest.mark.parametrize("name", ESTIMATOR_NAMES)
def test_going_on_from_a_file_is_as_good_as_never_stopping(name: str, tmp_path: Path):
    config = session("w8a8_timestep", cfg=W8A8QuantConfig(act_method=name))  # type: ignore[arg-type]
    model, whole = SmallModel(), measure(SmallModel(), config, records())
    half = measure(model, config, records()[:3])
    saved = load_dump(save_dump(tmp_path / "half.pth", [vars(half)], {}))["records"][0]
    resumed = measure(model, config, records()[3:], start=Measured(**saved))
    assert resumed.forwards == whole.forwards == len(records())
    for layer, expected in whole.layers.items():
        found = resumed.layers[layer]
        assert found.keys() == expected.keys()
        assert all(torch.as_tensor(found[key]).equal(torch.as_tensor(expected[key])) for key in expected)


def in_dtype(kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


@pytest.mark.parametrize("smoothing", ["m4", "m6"])
@pytest.mark.parametrize(("kind", "scheme"), [("sd3", "w8a8"), ("flux", "w8a8_timestep"), ("flux", "w8a8_dynamic")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothing_by_maxima_needs_no_second_look(kind: str, scheme: str, smoothing: str, dtype: torch.dtype):
    """Its factors are those of a replay, and the ranges those of the float inputs behind them, to the last bit."""
    suppression = {
        "m4": M4ProcessorConfig(smoothing_groups="all"),
        "m6": M6ProcessorConfig(smoothing_groups="all", cfg=M6Config(alpha=0.8, beta=0.2)),
    }[smoothing]
    of = [Record((), in_dtype(record.kwargs, dtype), record.step) for record in model_records(kind, 4, steps=2)]
    config = SessionConfig(processor_cfg_map={scheme: SCHEMES[scheme](), smoothing: suppression}, calib_data=of)
    structure, model = structure_of(kind), outlier_model(kind).to(dtype)
    measured = measure(model, config, of, structure=structure)
    found = quant_model(outlier_model(kind).to(dtype), with_measured(config, measured), structure=structure)
    replayed = quant_model(outlier_model(kind).to(dtype), config, structure=structure)
    smoothed = [name for name, layer in replayed.layers.items() if layer.mul_scale_I is not None]
    assert smoothed
    assert found.smoothed_inputs
    assert found.smoothed_inputs == replayed.smoothed_inputs
    for name in smoothed:
        layer, factor_I = found.layers[name], replayed.layers[name].mul_scale_I
        assert factor_I is not None
        assert layer.mul_scale_I is not None
        assert layer.mul_scale_I.equal(factor_I)
        if not layer.scheme.observes_input:
            assert all(layer.tensors[key].equal(value) for key, value in replayed.layers[name].tensors.items())
            continue
        seen = inputs_of(model, name, of)
        for row, step in enumerate([0, 1] if layer.scheme.per_step else [None]):
            values = torch.cat([(x * factor_I).flatten() for at, x in seen if step in (None, at)])
            scale, _ = NUMERICS["float32"].input_scale(*values.aminmax(), dtype)
            assert layer.tensors["input_scale"][row].equal(scale[0] if step is None else scale)


def test_attention_ranges_are_those_of_the_float_model():
    structure, model, of = structure_of("flux"), outlier_model("flux"), model_records("flux", 3)
    config = SessionConfig(
        processor_cfg_map={"w8a8_dynamic": SCHEMES["w8a8_dynamic"](), "fa3": FA3ProcessorConfig()}, calib_data=of
    )
    expected = attention_observers(model, structure, NUMERICS["float32"])
    with watch_attentions(model, expected):
        replay(model, of, stage="look")
    measured = measure(model, config, of, structure=structure)
    assert measured.attentions.keys() == expected.keys()
    for name, observer in expected.items():
        for part, found in observer.ranges.items():
            assert measured.attentions[name][part]["low"].equal(found.low_R)
            assert measured.attentions[name][part]["high"].equal(found.high_R)
    quant_model(model, with_measured(config, measured), structure=structure)


def smoothed_session(smoothing: Any, scheme: str = "w8a8", *more: Any, **options: Any) -> SessionConfig:
    processors = (SCHEMES[scheme](**options), smoothing, *more)
    return SessionConfig(processor_cfg_map={processor.key: processor for processor in processors})


SECOND_LOOKS = {
    "reference": (lambda: session("w8a8", numerics="reference"), "means of inputs behind"),
    "rotated": (lambda: session("w8a8").model_copy(update={"rotate_values": True}), "rotated values"),
    "m3": (lambda: smoothed_session(M3ProcessorConfig()), "searches its factors"),
    "m6 searched": (lambda: smoothed_session(M6ProcessorConfig()), "searches its factors"),
    "m4 fused": (lambda: smoothed_session(M4ProcessorConfig(fused=True)), "fused"),
    "m4 fused around attention": (
        lambda: smoothed_session(M4ProcessorConfig(fused=True), "w8a8_dynamic", FA3ProcessorConfig()),
        "fused",
    ),
    "m4 with counts": (
        lambda: smoothed_session(M4ProcessorConfig(), cfg=W8A8QuantConfig(act_method="mse")),
        "mse counts",
    ),
}


@pytest.mark.parametrize("case", SECOND_LOOKS)
def test_what_needs_a_second_look_says_why_and_is_not_measured(case: str):
    make, why = SECOND_LOOKS[case]
    assert why in (second_look(make()) or "")
    with pytest.raises(ConfigurationError, match=why):
        OnlineCalibration(SmallModel(), make())


def test_fused_smoothing_of_layers_without_a_range_needs_no_second_look():
    assert second_look(smoothed_session(M4ProcessorConfig(fused=True), "w8a8_dynamic")) is None


def test_a_number_that_is_not_finite_ends_the_forward_that_has_it():
    broken = [torch.full((1, 5, 8), float("nan"))]
    with pytest.raises(InputError, match="'first' got NaN"):
        measure(SmallModel(), session("w8a8"), [broken])


def test_ranges_of_another_session_are_refused():
    with_fewer = measure(SmallModel(), session("w8a8", disable_names=("second",)), records())
    with pytest.raises(InputError, match="did not watch layer 'second'"):
        quant_model(SmallModel(), with_measured(session("w8a8"), with_fewer))


def test_nothing_measured_is_refused():
    nothing = measure(SmallModel(), session("w8a8_timestep"), [])
    with pytest.raises(InputError, match="needs calibration data and got none"):
        quant_model(SmallModel(), with_measured(session("w8a8_timestep"), nothing))


def test_a_forward_of_an_unknown_step_is_refused_where_steps_have_ranges():
    with pytest.raises(ConfigurationError, match="step of a forward is unknown"):
        measure(SmallModel(), session("w8a8_timestep"), [[torch.ones(1, 5, 8)]])


def test_watching_leaves_no_hook_and_no_step_behind():
    model, config = SmallModel(), session("w8a8_timestep")
    measure(model, config, records())
    assert TimestepManager.get_timestep_idx() is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("taken_for", "quantized_as"),
    [
        (session("w8a8"), session("w8a8", cfg=W8A8QuantConfig(act_method="histogram"))),
        (session("w8a8"), session("w8a8_timestep")),
        (session("w8a8_timestep"), session("w8a8")),
    ],
    ids=["another estimator", "rows for steps", "no rows"],
)
def test_what_was_measured_for_another_session_is_refused(taken_for: SessionConfig, quantized_as: SessionConfig):
    model = SmallModel()
    measured = measure(model, taken_for, records())
    with pytest.raises(InputError, match=r"of layer 'first', and .* is wanted"):
        quant_model(model, with_measured(quantized_as, measured))


def test_a_session_that_has_to_look_again_takes_no_measurements():
    model = SmallModel()
    measured = measure(model, session("w8a8"), records())
    with pytest.raises(ConfigurationError, match="cannot be calibrated in the float model's forwards"):
        quant_model(model, with_measured(session("w8a8", numerics="reference"), measured))
