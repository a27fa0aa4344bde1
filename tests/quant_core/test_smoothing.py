"""Smoothing changes nothing in float, needs one replay, keeps few activations, and says why when it cannot be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model_adapters import load_adapter
from quant_core import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    W8A8TimeStepProcessorConfig,
    quant_model,
)
from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.weight_codec import INT8_ROWS, Int8Rows
from quant_core.errors import ConfigurationError, InputError
from quant_core.layers.rescaling import Rescaling
from quant_core.processor import ProcessorConfig
from quant_core.session.quantize import QuantizedModel
from quant_core.session.targets import target_layers
from quant_core.smoothing import METHODS
from quant_core.smoothing.fusion import modulate
from quant_core.smoothing.m6 import exponents
from quant_core.smoothing.measured_group import MeasuredGroup, SharedInput
from quant_core.smoothing.method import SmoothingConfig
from quant_core.smoothing.smooth import groups_to_smooth
from quant_core.smoothing.statistics import SAMPLE_SIZE, AllCalls, InputStatistics, NoTokens, TokenSample
from quant_core.structure import ModelStructure, Modulation
from tests.support.smoothed_models import (
    apply_in_float,
    outlier_model,
    outputs,
    records,
    relative_error,
    smoothed,
    structure_of,
)
from tests.support.tiny_models import HEADS, SD3, build

WIDTH = HEADS * 8
KINDS = ("flux", "sd3", "sd35")
SMOOTHINGS: dict[str, Any] = {
    "m3": lambda **options: M3ProcessorConfig(**options),
    "m4": lambda **options: M4ProcessorConfig(**options),
    "m6": lambda **options: M6ProcessorConfig(cfg=M6Config(alpha=0.8, beta=0.2), **options),
    "m6_searched": lambda **options: M6ProcessorConfig(**options),
}
# The spec's bound. These models differ by 8e-7 at most from themselves in float64, and by 1.4e-6 smoothed.
SAME_IN_FLOAT = 1e-5


def quantize(
    kind: str, *processors: ProcessorConfig, count: int = 2, steps: int = 1, model: Any = None
) -> QuantizedModel:
    """Quantize a tiny model in a session of these processors, in their order."""
    session = SessionConfig(
        processor_cfg_map={processor.key: processor for processor in processors},
        calib_data=[
            {"args": r.args, "kwargs": r.kwargs, "timestep_idx": r.step} for r in records(kind, count, steps=steps)
        ],
    )
    return quant_model(build(kind) if model is None else model, session, structure=structure_of(kind))


# --- it changes nothing in float --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["at run time", "fused"])
@pytest.mark.parametrize("method", SMOOTHINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_preserves_the_float_output(kind: str, method: str, fused: bool):
    model, of = outlier_model(kind), records(kind, 2)
    exact = outputs(model, of)
    # SD3's usual group is its text input, which nothing can absorb.
    disable = ("context_embedder",) if fused and kind != "flux" else ()
    config = SMOOTHINGS[method](smoothing_groups="all", fused=fused)
    smoothing = smoothed(kind, model, config, of, disable)
    apply_in_float(model, smoothing)
    assert relative_error(outputs(model, of), exact) < SAME_IN_FLOAT
    assert all((change.mul_scale_I is None) == fused for change in smoothing.rescalings.values())
    factors = [c.columns_I for c in smoothing.rescalings.values() if c.columns_I is not None]
    assert max((f.max() / f.min()).item() for f in factors) > 1.5  # there was something to smooth


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_that_is_not_absorbed_shows(kind: str):
    model, of = outlier_model(kind), records(kind, 1)
    exact = outputs(model, of)
    config = M4ProcessorConfig(smoothing_groups="all", fused=True)
    smoothing = smoothed(kind, model, config, of, () if kind == "flux" else ("context_embedder",))
    del smoothing.rescalings["transformer_blocks.0.norm1.linear"]  # type: ignore[attr-defined]
    apply_in_float(model, smoothing)
    assert relative_error(outputs(model, of), exact) > 100 * SAME_IN_FLOAT


def test_what_one_stream_absorbs_for_both_outputs_is_one_factor():
    """A joint softmax mixes both streams' values, so both outputs divide by the same."""
    model = outlier_model("flux")
    changes = smoothed("flux", model, M4ProcessorConfig(fused=True), records("flux", 1)).rescalings
    attention = "transformer_blocks.0.attn"
    factor = changes[f"{attention}.to_out.0"].columns_I
    assert factor is not None
    assert changes[f"{attention}.to_add_out"].columns_I is factor
    for value in ("to_v", "add_v_proj"):
        assert torch.equal(changes[f"{attention}.{value}"].rows_O, 1 / factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [False, True], ids=["at run time", "fused"])
@pytest.mark.parametrize("method", SMOOTHINGS)
def test_the_channels_of_each_input_are_told_before_it_is_divided_and_after(method: str, fused: bool):
    model, of = outlier_model("flux"), records("flux", 2)
    smoothing = smoothed("flux", model, SMOOTHINGS[method](smoothing_groups="all", fused=fused), of)
    assert {name for each in smoothing.inputs for name in each.layers} == {
        name for name, change in smoothing.rescalings.items() if change.columns_I is not None
    }
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            amax_I = args[0].abs().flatten(0, -2).amax(0)
            seen[name] = torch.maximum(seen.get(name, amax_I), amax_I)

        return hook

    for name in smoothing.rescalings:
        model.get_submodule(name).register_forward_pre_hook(look(name))
    outputs(model, of)
    for each in smoothing.inputs:
        amax_I = torch.stack([seen[name] for name in each.layers]).amax(0)
        factor_I = smoothing.rescalings[each.layers[0]].columns_I
        assert factor_I is not None
        for told, found_I in ((each.before, amax_I), (each.after, amax_I / factor_I)):
            assert told.largest == pytest.approx(found_I.max().item(), rel=1e-5)
            assert told.middle == pytest.approx(found_I.median().item(), rel=1e-5)
    assert max(e.before.largest / e.before.middle * e.after.middle / e.after.largest for e in smoothing.inputs) > 2


def test_a_layer_that_is_left_plain_has_no_part_in_what_is_told_of_its_input():
    keys = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    model, scheme = outlier_model("flux"), W8A8DynamicProcessorConfig()
    of = [{"args": r.args, "kwargs": r.kwargs, "timestep_idx": r.step} for r in records("flux", 1)]
    config = SessionConfig(
        processor_cfg_map={"w8a8_dynamic": scheme, "m4": M4ProcessorConfig(smoothing_groups="every")},
        layer_schemes={keys[1]: scheme.model_copy(update={"smoothed": False})},
        calib_data=of,
    )
    told = quant_model(model, config, structure=structure_of("flux")).smoothed_inputs
    assert (keys[0], keys[2]) in [each.layers for each in told]
    assert (
        quant_model(
            outlier_model("flux"),
            SessionConfig(processor_cfg_map={"w8a8_dynamic": scheme}),
            structure=structure_of("flux"),
        ).smoothed_inputs
        == ()
    )


factors = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.exp(3 * torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
)


@settings(max_examples=50)
@given(factor=factors, seed=st.integers(0, 1000), chunks=st.sampled_from([(6, 0, 1), (6, 3, 4), (9, 6, 7), (2, 1, 0)]))
def test_a_modulation_absorbs_any_factor(factor: Tensor, seed: int, chunks: tuple[int, int, int]):
    count, shift, scale = chunks
    torch.manual_seed(seed)
    w, b, x, normed = (
        torch.randn(shape, dtype=torch.float64) for shape in ((12 * count, 5), (12 * count,), (5,), (12,))
    )
    change = modulate(Modulation(linear="norm", chunks={count: (shift, scale)}), len(b), factor)

    def modulated(w: Tensor, b: Tensor) -> Tensor:
        parts = F.linear(x, w, b).chunk(count)
        return normed * (1 + parts[scale]) + parts[shift]

    ours = modulated(change.weight(w, slice(None)), change.bias(b.to(torch.float32)).to(torch.float64))
    exact = modulated(w, b) / factor
    # 1 / factor and the bias are float32.
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5 * (1 + (normed.abs() * 10 / factor).max().item()))


@settings(max_examples=50)
@given(seed=st.integers(0, 1000))
def test_two_changes_after_each_other_are_one_change(seed: int):
    torch.manual_seed(seed)
    w, b = torch.randn(4, 3), torch.randn(4)
    first = Rescaling(torch.rand(3) + 0.5, torch.rand(3), torch.rand(4) + 0.5, torch.randn(4))
    second = Rescaling(torch.rand(3) + 0.5, None, torch.rand(4) + 0.5, torch.randn(4))
    for a, z in ((first, second), (second, first), (first, Rescaling()), (Rescaling(), first)):
        torch.testing.assert_close(a.then(z).weight(w, slice(None)), z.weight(a.weight(w, slice(None)), slice(None)))
        torch.testing.assert_close(a.then(z).bias(b), z.bias(a.bias(b)))


@given(factor=factors, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_weight_is_folded_with_the_very_factor_that_is_stored(factor: Tensor, dtype: torch.dtype):
    columns, mul_scale = NUMERICS["float32"].split_factor(factor, dtype)
    assert mul_scale.dtype == dtype
    torch.testing.assert_close(columns * mul_scale.float(), torch.ones(12), rtol=2e-7, atol=0)


@pytest.mark.parametrize("factor", [1e-5, 1e8])
def test_a_stored_factor_is_finite_and_not_zero_in_half_precision(factor: float):
    columns, mul_scale = NUMERICS["float32"].split_factor(torch.tensor([factor]), torch.float16)
    assert mul_scale.isfinite().all()
    assert columns.isfinite().all()
    assert mul_scale.item() > 0


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SMOOTHINGS)
@pytest.mark.parametrize(("scheme", "replays"), [(W8A8DynamicProcessorConfig, 1), (W8A8ProcessorConfig, 2)])
def test_smoothing_replays_each_record_once(scheme: Any, replays: int, method: str):
    model, forwards = build("flux"), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    quantize("flux", scheme(), SMOOTHINGS[method](), count=3, model=model)
    assert len(forwards) == replays * 3


@pytest.mark.parametrize("suppression", [[], [M4ProcessorConfig()]], ids=["none", "m4"])
@pytest.mark.parametrize("scheme", [W8A8DynamicProcessorConfig, W8A8ProcessorConfig])
def test_each_weight_is_quantized_once_however_many_records_there_are(scheme: Any, suppression: list[Any], monkeypatch):
    original, seen = Int8Rows.encode, []
    monkeypatch.setattr(Int8Rows, "encode", lambda *args, **how: (seen.append(1), original(*args, **how))[1])
    result = quantize("flux", scheme(), *suppression, count=3, model=build("flux"))
    assert len(seen) == len(result.layers)


@settings(max_examples=30)
@given(count=st.integers(1, 12), length=st.integers(1, 700))
def test_a_sample_of_equally_long_calls_is_bounded_and_evenly_spaced(count: int, length: int):
    total = count * length
    stream = torch.arange(total, dtype=torch.float32).unsqueeze(1)
    sample = TokenSample(1)
    for record, call in enumerate(stream.split(length)):
        sample.update(call, record)
    kept = torch.cat(sample.rows()).flatten()
    assert len(kept) <= SAMPLE_SIZE
    assert len(kept) >= min(total, SAMPLE_SIZE // 3)
    assert kept[0] == 0
    assert len(set(kept.diff().tolist())) <= 1
    torch.testing.assert_close(sample.mean_abs(), stream.mean(0))


@settings(max_examples=30)
@given(calls=st.lists(st.integers(1, 700), min_size=1, max_size=12))
def test_a_sample_is_bounded_and_has_a_share_of_each_long_call(calls: list[int]):
    sample = TokenSample(1)
    for record, length in enumerate(calls):
        sample.update(torch.full((length, 1), float(record)), record)
    kept = torch.cat(sample.rows()).flatten()
    assert len(kept) <= SAMPLE_SIZE
    spacing = sum(calls) / len(kept)
    assert {float(record) for record, length in enumerate(calls) if length > 3 * spacing} <= set(kept.tolist())


def test_a_sample_of_images_has_tokens_of_every_column():
    """Rows of images are powers of two wide: a spacing of a power of two would always meet the same columns."""
    width, columns = 64, torch.arange(64.0).repeat(64).unsqueeze(1)
    sample = TokenSample(1)
    for record in range(10):
        sample.update(columns, record)
    assert len(torch.cat(sample.rows()).unique()) == width


def test_statistics_do_not_grow_with_the_records():
    kept = []
    for count in (40, 400):
        statistics = InputStatistics(8, torch.float32, TokenSample(8))
        for record in range(count):
            statistics.record = record
            statistics.update(torch.randn(1, 100, 8))
        kept.append(sum(map(len, statistics.tokens.rows())))
    assert max(kept) <= SAMPLE_SIZE


# --- what it finds ----------------------------------------------------------------------------------------------------


def measured(x_NI: Tensor, *weights: Tensor, tokens: Any = NoTokens) -> MeasuredGroup:
    """A group of linears that all read x."""
    statistics = InputStatistics(x_NI.shape[1], torch.float32, tokens())
    statistics.update(x_NI)
    return MeasuredGroup([SharedInput(weights, statistics)], NUMERICS["float32"], INT8_ROWS, alpha=0.5, floor=1e-5)


def outlier_input(channels: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, w = torch.randn(200, channels), torch.randn(24, channels)
    x[:, 3] *= 50
    return x, w


def test_m4_gives_activations_and_weights_the_same_maxima():
    x, w = outlier_input()
    factor = METHODS["m4"].factor(measured(x, w), M4ProcessorConfig(alpha=0.5))
    torch.testing.assert_close((x / factor).abs().amax(0), (w * factor).abs().amax(0))


def test_the_models_exponent_is_used_when_m4_has_none():
    x, w = outlier_input()
    group = replace(measured(x, w), alpha=0.9)
    given = METHODS["m4"].factor(group, M4ProcessorConfig(alpha=0.9))
    assert torch.equal(METHODS["m4"].factor(group, M4ProcessorConfig()), given)
    assert not torch.equal(METHODS["m4"].factor(group, M4ProcessorConfig(alpha=0.5)), given)


def test_the_reference_tools_exponent_counts_in_its_numerics_alone():
    structure = ModelStructure(model_class="Model", m4_alpha=0.6, reference_m4_alpha=0.9)
    assert structure.m4_exponent(is_reference=False) == 0.6
    assert structure.m4_exponent(is_reference=True) == 0.9
    assert ModelStructure(model_class="Model", m4_alpha=0.6).m4_exponent(is_reference=True) == 0.6


def quantized_error(x: Tensor, w: Tensor, factor: Tensor) -> float:
    """Return the relative error of the product after static quantization of x / factor and w * factor."""
    scaled_x, scaled_w = x / factor, w * factor
    x_scale, w_scale = scaled_x.abs().max() / 127, scaled_w.abs().amax(1, keepdim=True) / 127
    product = ((scaled_x / x_scale).round() * x_scale) @ ((scaled_w / w_scale).round() * w_scale).T
    return relative_error(product, x @ w.T)


@pytest.mark.parametrize("config", [M6Config(), M6Config(alpha=0.5), M6Config(beta=0.5)])
def test_m6_searches_exponents_that_quantize_better_than_none(config: M6Config):
    x, w = outlier_input()
    group = measured(x, w, tokens=lambda: TokenSample(16))
    factor = METHODS["m6"].factor(group, M6ProcessorConfig(cfg=config))
    # Without smoothing one channel takes the codes of all others: 0.021; with it 0.007 at most.
    assert quantized_error(x, w, factor) < 0.5 * quantized_error(x, w, torch.ones(16))


@pytest.mark.parametrize(
    ("config", "alpha", "beta"), [(M6Config(alpha=0.3), 0.3, None), (M6Config(beta=0.3), None, 0.3)]
)
def test_m6_keeps_the_exponent_it_is_given(config: M6Config, alpha: float | None, beta: float | None):
    x, w = outlier_input()
    found = exponents(measured(x, w, tokens=lambda: TokenSample(16)), M6ProcessorConfig(cfg=config))
    assert found.alpha == alpha or alpha is None
    assert found.beta == beta or beta is None


def test_m6_of_the_reference_searches_both_when_one_is_missing():
    x, w = outlier_input()
    statistics = InputStatistics(16, torch.float32, AllCalls())
    statistics.update(x)
    group = MeasuredGroup([SharedInput((w,), statistics)], NUMERICS["reference"], INT8_ROWS, alpha=0.5, floor=1e-5)
    given_alpha = exponents(group, M6ProcessorConfig(cfg=M6Config(alpha=0.05)))
    assert given_alpha == exponents(group, M6ProcessorConfig())
    assert given_alpha.alpha != 0.05


def test_m3_lowers_the_error_of_quantized_weights():
    x, w = outlier_input()
    w = w * torch.logspace(0, 1.5, 16)  # columns of unequal size, so that row scales are coarse for the small ones
    group = measured(x, w, tokens=lambda: TokenSample(16))
    factor = METHODS["m3"].factor(group, M3ProcessorConfig())

    def error(factor: Tensor) -> float:
        scaled = w * factor
        scale = scaled.abs().amax(1, keepdim=True) / 127
        return relative_error(x @ ((scaled / scale).round() * scale / factor).T, x @ w.T)

    assert error(factor) < 0.8 * error(torch.ones(16))
    torch.testing.assert_close(factor.max() * factor.min(), torch.tensor(1.0))


# --- with every scheme ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SMOOTHINGS)
@pytest.mark.parametrize("scheme", [W8A8ProcessorConfig, W8A8TimeStepProcessorConfig, W8A8DynamicProcessorConfig])
@pytest.mark.parametrize("kind", ["flux", "sd35"])
def test_smoothing_goes_with_every_scheme_and_prompts_of_unequal_length(kind: str, scheme: Any, method: str):
    result = quantize(kind, scheme(), SMOOTHINGS[method](smoothing_groups="all"), count=4, steps=2)
    smoothed_layers = [layer for layer in result.layers.values() if layer.mul_scale_I is not None]
    assert len(smoothed_layers) == {"flux": 20, "sd35": 37}[kind]
    for layer in smoothed_layers:
        assert layer.mul_scale_I is not None
        assert layer.mul_scale_I.shape == (layer.codes_OI.shape[1],)


def test_smoothing_goes_with_quantized_attention():
    result = quantize("flux", W8A8DynamicProcessorConfig(), FA3ProcessorConfig(), M4ProcessorConfig())
    assert result.layers["transformer_blocks.0.attn.to_q"].mul_scale_I is not None


def test_the_order_of_processors_does_not_matter():
    one = quantize("flux", M4ProcessorConfig(), W8A8ProcessorConfig(disable_names=["*net.2*"]))
    two = quantize("flux", W8A8ProcessorConfig(disable_names=["*net.2*"]), M4ProcessorConfig())
    for name, layer in one.layers.items():
        assert all(torch.equal(tensor, two.layers[name].tensors[key]) for key, tensor in layer.tensors.items())


def test_a_fused_session_multiplies_nothing_and_quantizes_the_changed_modulation():
    plain = quantize("flux", W8A8DynamicProcessorConfig())
    fused = quantize("flux", W8A8DynamicProcessorConfig(), M4ProcessorConfig(fused=True))
    assert all(layer.mul_scale_I is None for layer in fused.layers.values())
    name = "transformer_blocks.0.norm1.linear"
    before, after = plain.layers[name], fused.layers[name]
    assert not torch.equal(before.weight_scale_O1, after.weight_scale_O1)
    assert before.bias_O is not None
    assert after.bias_O is not None
    gate = slice(2 * WIDTH, 3 * WIDTH)  # a gate scales an output: nobody divides it
    assert torch.equal(before.bias_O[gate], after.bias_O[gate])
    assert not torch.equal(before.bias_O[:WIDTH], after.bias_O[:WIDTH])


# --- when it cannot be done -------------------------------------------------------------------------------------------


def test_a_group_with_a_float_member_is_left_out_whole():
    model = build("flux")
    smoothing = smoothed("flux", model, M4ProcessorConfig(), records("flux", 1), ("transformer_blocks.0.attn.to_k",))
    assert "transformer_blocks.0.attn.to_q" not in smoothing.rescalings
    assert "transformer_blocks.1.attn.to_q" in smoothing.rescalings
    assert smoothing.skipped == {"transformer_blocks.0.attn.to_q": "transformer_blocks.0.attn.to_k stays float"}


def test_a_session_says_which_groups_it_left_out():
    result = quantize("flux", W8A8DynamicProcessorConfig(disable_names=["*.to_add_out"]), M4ProcessorConfig())
    assert result.skipped_groups == {
        f"transformer_blocks.{block}.attn.to_add_out": f"transformer_blocks.{block}.attn.to_add_out stays float"
        for block in range(2)
    }


def test_optional_groups_are_smoothed_where_the_recipe_keeps_all_usual_ones_float():
    with torch.device("meta"):
        model = SD3Transformer2DModel(**SD3)
    targets = target_layers(model, load_adapter("sd3").disabled_layers["w8a8_dynamic"])
    by_default, chosen = (
        groups_to_smooth(
            model, M4ProcessorConfig(smoothing_groups=groups), structure=structure_of("sd3"), targets=targets
        )
        for groups in ("default", "all")
    )
    assert by_default == chosen
    assert "transformer_blocks.0.attn.to_q" in by_default.smoothed[0].linears


@pytest.mark.parametrize(
    ("kind", "config", "disable", "says", "advises"),
    [
        (
            "sd3",
            M4ProcessorConfig(),
            ["context_embedder", "*attn*", "*ff*"],
            "context_embedder stays float",
            "quantize",
        ),
        ("flux", M4ProcessorConfig(), ["*attn*", "*ff*"], "stays float", "disable_names"),
        ("flux", M4ProcessorConfig(fused=True), ["*.norm1.linear"], "norm1.linear (for ", "--anti_fused"),
        ("sd3", M4ProcessorConfig(fused=True), [], "nothing in the model makes the input of context_embedder", "fused"),
    ],
)
def test_a_smoothing_without_effect_or_place_is_refused(
    kind: str, config: SmoothingConfig, disable: list[str], says: str, advises: str
):
    with pytest.raises(ConfigurationError) as error:
        quantize(kind, W8A8DynamicProcessorConfig(disable_names=disable), config)
    assert says in error.value.why
    assert advises in error.value.advice


@pytest.mark.parametrize(
    ("config", "disable"), [(M4ProcessorConfig(), ("*embedder", "*_blocks*")), (M4ProcessorConfig(fused=True), ())]
)
def test_a_refusal_needs_neither_weights_nor_a_forward(config: SmoothingConfig, disable: tuple[str, ...]):
    with torch.device("meta"):
        model = SD3Transformer2DModel(**SD3)
    with pytest.raises(ConfigurationError):
        groups_to_smooth(model, config, structure=structure_of("sd3"), targets=target_layers(model, disable))


@pytest.mark.parametrize(
    ("change", "says"), [({"chunks": {4: (0, 1)}}, "makes 6 chunks, and only 4 are known"), (None, "bias")]
)
def test_a_modulation_of_another_form_is_refused(change: dict[str, Any] | None, says: str):
    model, structure = build("flux"), structure_of("flux")
    first = structure.smoothing_groups[0]
    assert first.modulation is not None
    if change is None:
        model.transformer_blocks[0].norm1.linear.bias = None
    else:
        first = first.model_copy(update={"modulation": first.modulation.model_copy(update=change)})
    structure = structure.model_copy(update={"smoothing_groups": (first,)})
    with pytest.raises(ConfigurationError) as error:
        groups_to_smooth(model, M4ProcessorConfig(fused=True), structure=structure, targets=target_layers(model, ()))
    assert says in error.value.why


def test_a_model_without_a_structure_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    session = SessionConfig(processor_cfg_map={"w8a8_dynamic": W8A8DynamicProcessorConfig(), "m4": M4ProcessorConfig()})
    with pytest.raises(ConfigurationError, match="share an input"):
        quant_model(model, session)


def test_smoothing_without_records_is_refused():
    with pytest.raises(InputError, match=r"never ran layer 'transformer_blocks\.0\.attn\.to_q'"):
        quantize("flux", W8A8DynamicProcessorConfig(), M4ProcessorConfig(), count=0)
