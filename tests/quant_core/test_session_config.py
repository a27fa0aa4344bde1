"""A session that would ignore something or contradict itself is refused before a model is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from quant_core import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8DynamicQuantConfig,
    W8A8ProcessorConfig,
    W8A8QuantConfig,
    W8A8TimeStepProcessorConfig,
    W8A8TimeStepQuantConfig,
    quant_model,
)
from quant_core.errors import ConfigurationError
from tests.support.small_model import STEPS, SmallModel, records, session

DYNAMIC = W8A8DynamicProcessorConfig()


def refusal(make: Any) -> str:
    """What the validation says."""
    with pytest.raises(ValidationError) as caught:
        make()
    return str(caught.value)


def configured(**processors: Any) -> SessionConfig:
    return SessionConfig(processor_cfg_map=processors)


@pytest.mark.parametrize(
    ("processors", "says"),
    [
        (
            {"w8a8": W8A8ProcessorConfig(), "w8a8_dynamic": DYNAMIC},
            "w8a8 and w8a8_dynamic are each a quantization scheme",
        ),
        ({"w8a8_dynamic": DYNAMIC, "m3": M3ProcessorConfig(), "m4": M4ProcessorConfig()}, "m3 and m4 are each an"),
        ({"w8a8_dynamic": DYNAMIC, "m4": M4ProcessorConfig(), "m6": M6ProcessorConfig()}, "m4 and m6 are each an"),
        (
            {"w8a8": W8A8ProcessorConfig(), "fa3": FA3ProcessorConfig()},
            "fa3 goes with w8a8_dynamic only, not with w8a8",
        ),
        ({"w8a8_timestep": W8A8TimeStepProcessorConfig(), "fa3": FA3ProcessorConfig()}, "not with w8a8_timestep"),
        ({"fa3": FA3ProcessorConfig()}, "no quantization scheme"),
        ({"save": SaveProcessorConfig(output_path="x")}, "no quantization scheme"),
        ({}, "no quantization scheme"),
        ({"w8a8_dynamc": DYNAMIC}, "no processor is called 'w8a8_dynamc': try w8a8_dynamic (nearest name)"),
        ({"w8a8": DYNAMIC}, "'w8a8' holds a W8A8DynamicProcessorConfig, which belongs under 'w8a8_dynamic'"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused_with_the_fix(processors: dict[str, Any], says: str):
    message = refusal(lambda: configured(**processors))
    assert says.replace("each an", "each a") in message.replace("each an", "each a")


@pytest.mark.parametrize(
    "make",
    [
        lambda: W8A8QuantConfig(act_methd="minmax"),  # type: ignore[call-arg]
        lambda: W8A8ProcessorConfig(disabled_names=["x"]),  # type: ignore[call-arg]
        lambda: W8A8DynamicProcessorConfig(timestep_sep=3),  # type: ignore[call-arg]
        lambda: W8A8TimeStepProcessorConfig(timestep_seperator=3),  # type: ignore[call-arg]
        lambda: M6Config(gamma=0.1),  # type: ignore[call-arg]
        lambda: M4ProcessorConfig(beta=0.1),  # type: ignore[call-arg]
        lambda: SaveProcessorConfig(output_path="x", safetensor_name="y"),  # type: ignore[call-arg]
        lambda: SessionConfig(processor_cfg_map={"w8a8_dynamic": DYNAMIC}, calib_dta=[]),  # type: ignore[call-arg]
    ],
)
def test_an_unknown_key_is_refused_everywhere(make: Any):
    assert "Extra inputs are not permitted" in refusal(make)


@pytest.mark.parametrize("config", [W8A8QuantConfig, W8A8TimeStepQuantConfig, W8A8DynamicQuantConfig])
@pytest.mark.parametrize("method", ["minmx", "MINMAX", 0, 4, None, "", 1.5, [1]])
def test_an_unknown_act_method_is_refused(config: Any, method: Any):
    assert "act_method" in refusal(lambda: config(act_method=method))


def test_the_first_act_method_has_a_name_and_a_number():
    assert W8A8QuantConfig(act_method=1).act_method == "minmax"  # type: ignore[arg-type]
    assert W8A8QuantConfig().act_method == "minmax"


@pytest.mark.parametrize("save_type", ["safe_tensor", ["safetensor"], ["safe_tensor", "numpy"], ["numpy"], []])
def test_a_misspelt_or_unsupported_save_type_is_refused(save_type: Any):
    assert "save_type" in refusal(lambda: SaveProcessorConfig(output_path="x", save_type=save_type))


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), "large"])
def test_a_part_file_size_is_a_positive_number_of_gigabytes(size: Any):
    assert "part_file_size" in refusal(lambda: SaveProcessorConfig(output_path="x", part_file_size=size))


@pytest.mark.parametrize("size", [None, 4, 0.5])
def test_one_file_or_parts_of_any_positive_size_are_accepted(size: Any):
    assert SaveProcessorConfig(output_path="x", part_file_size=size).part_file_size == size


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_exponent_lies_between_0_and_1(value: float):
    assert "alpha" in refusal(lambda: M4ProcessorConfig(alpha=value))
    assert "beta" in refusal(lambda: M6Config(beta=value))


def test_a_negative_separator_is_refused_at_once():
    assert "timestep_sep" in refusal(lambda: W8A8TimeStepProcessorConfig(timestep_sep=-1))


@pytest.mark.parametrize("timestep_sep", [STEPS + 1, 25])
def test_a_separator_beyond_the_steps_is_said_when_the_records_are_known(timestep_sep: int):
    """The seeds' own program asks for 25 of 20 steps: it has to run, and its author has to learn what it does."""
    with pytest.warns(UserWarning, match=f"timestep_sep {timestep_sep} lies beyond .* 2 would be half the steps"):
        result = quant_model(SmallModel(), session("w8a8_timestep", timestep_sep=timestep_sep))
    assert result.timestep_sep == STEPS  # no step is static


@pytest.mark.parametrize(("given", "used"), [(None, 2), (0, 0), (1, 1), (STEPS, STEPS)])
def test_the_separator_is_part_of_the_result(given: int | None, used: int):
    result = quant_model(SmallModel(), session("w8a8_timestep", timestep_sep=given))
    assert (result.timesteps, result.timestep_sep) == (STEPS, used)


def test_other_schemes_have_neither_steps_nor_a_separator():
    result = quant_model(SmallModel(), session("w8a8"))
    assert (result.timesteps, result.timestep_sep) == (None, None)


def test_numerics_are_one_of_two():
    message = refusal(lambda: SessionConfig(processor_cfg_map={"w8a8_dynamic": DYNAMIC}, numerics="exact"))  # type: ignore[arg-type]
    assert "numerics" in message


def test_the_order_of_the_map_does_not_matter(tmp_path):
    found = []
    for order in (("w8a8", "save"), ("save", "w8a8")):
        folder = tmp_path / order[0]
        by_key = {"w8a8": W8A8ProcessorConfig(), "save": SaveProcessorConfig(output_path=str(folder))}
        config = SessionConfig(processor_cfg_map={key: by_key[key] for key in order}, calib_data=records())
        files = quant_model(SmallModel(), config).files
        assert files is not None
        found.append((files.weights.read_bytes(), files.description.read_bytes()))
    assert found[0] == found[1]


def test_a_session_says_what_its_map_holds():
    config = configured(fa3=FA3ProcessorConfig(), m4=M4ProcessorConfig(), w8a8_dynamic=DYNAMIC)
    assert config.scheme is DYNAMIC
    assert isinstance(config.smoothing, M4ProcessorConfig)
    assert isinstance(config.fa3, FA3ProcessorConfig)
    assert config.save is None


def test_a_field_is_checked_when_it_is_assigned_too():
    save = SaveProcessorConfig(output_path="x")
    assert "part_file_size" in refusal(lambda: setattr(save, "part_file_size", -1))


def test_a_static_scheme_without_records_is_refused():
    config = SessionConfig(processor_cfg_map={"w8a8": W8A8ProcessorConfig()})
    with pytest.raises(Exception, match="W8A8 needs calibration data and got none"):
        quant_model(SmallModel(), config)


def test_records_without_a_step_are_refused_by_the_timestep_scheme():
    config = SessionConfig(
        processor_cfg_map={"w8a8_timestep": W8A8TimeStepProcessorConfig()}, calib_data=[[torch.ones(1, 8)]]
    )
    with pytest.raises(Exception, match="do not say their denoising step"):
        quant_model(SmallModel(), config)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SessionConfig(processor_cfg_map={"w8a8_dynamic": DYNAMIC}, dev_id=7), "device is None"),
        (lambda: SessionConfig(processor_cfg_map={"w8a8_dynamic": DYNAMIC}, device="cuda:0", dev_id=0), "'cuda:0'"),
        (
            lambda: SessionConfig(
                processor_cfg_map={"w8a8": W8A8ProcessorConfig()},
                layer_schemes={"*": W8A8DynamicProcessorConfig(disable_names=["b"])},
            ),
            "layer_schemes holds disable_names",
        ),
        (
            lambda: configured(w8a8_dynamic=W8A8DynamicProcessorConfig(smoothed=False), m4=M4ProcessorConfig()),
            "m4 has no layer to smooth",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(make: Any, says: str):
    assert says in refusal(make)


def test_a_session_that_leaves_nothing_to_quantize_is_refused():
    with pytest.raises(ConfigurationError, match="no layer of SmallModel is left to quantize"):
        quant_model(SmallModel(), session("w8a8_dynamic", disable_names=["*"]))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigurationError, match="LayerNorm has no linear layer"):
        quant_model(torch.nn.LayerNorm(4), configured(w8a8_dynamic=DYNAMIC))


class Doubling(torch.nn.Linear):
    """Does something that a quantized layer would not do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_linear_that_computes_something_else_is_refused_unless_it_stays_float():
    model = SmallModel()
    model.first.__class__ = Doubling
    with pytest.raises(ConfigurationError, match="layer 'first' is a Doubling with a forward of its own"):
        quant_model(model, session("w8a8_dynamic"))
    quant_model(model, session("w8a8_dynamic", disable_names=["first"]))


def test_a_layer_that_shares_its_weight_with_a_float_one_leaves_that_as_it_was():
    model = SmallModel()
    model.last.weight = model.second.weight = torch.nn.Parameter(torch.randn(8, 8), requires_grad=False)
    model.first = torch.nn.Linear(8, 8)
    before = model.last.weight.clone()
    quant_model(model, session("w8a8"))
    assert torch.equal(model.last.weight, before)


def test_a_model_in_training_is_calibrated_as_it_will_be_used_and_trains_on():
    def dropping() -> SmallModel:
        model = SmallModel()
        model.norm = torch.nn.Sequential(model.norm, torch.nn.Dropout(0.5))  # type: ignore[assignment]
        model.second, model.last = torch.nn.Linear(16, 8), torch.nn.Linear(8, 8)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) / 4
        return model

    training, evaluating = dropping().train(), dropping().eval()
    ranges = [quant_model(m, session("w8a8")).layers["second"].tensors["input_scale"] for m in (training, evaluating)]
    assert torch.equal(*ranges)
    assert training.training
    assert not evaluating.norm.training


def test_what_a_layer_observed_does_not_stay_when_its_tensors_are_there():
    assert all(layer.observer is None for layer in quant_model(SmallModel(), session("w8a8")).layers.values())


def test_a_misspelt_scheme_of_a_rule_is_told_with_the_nearest_one():
    message = refusal(
        lambda: SessionConfig(processor_cfg_map={"w8a8": W8A8ProcessorConfig()}, layer_schemes={"x": "w8a61"})  # type: ignore[dict-item]
    )
    assert "'x': no scheme is called 'w8a61': try w8a16 (nearest name)" in message


@pytest.mark.parametrize("where", ["processor_cfg_map", "layer_schemes"])
def test_a_mapping_in_the_place_of_a_configuration_is_refused_by_its_field(where: str):
    given: dict[str, Any] = {"processor_cfg_map": {"w8a8": W8A8ProcessorConfig()}, where: {"w8a8": {}}}
    message = refusal(lambda: SessionConfig(**given))
    assert f"{where}.w8a8" in message
    assert "instance of" in message


def test_attention_beside_a_scheme_of_a_rule_is_refused_where_the_rule_stands():
    processors = {"w8a8_dynamic": DYNAMIC, "fa3": FA3ProcessorConfig()}
    message = refusal(lambda: SessionConfig(processor_cfg_map=processors, layer_schemes={"x": "w8a16"}))  # type: ignore[arg-type]
    assert "not with w8a16" in message
    assert "where  layer_schemes" in message
