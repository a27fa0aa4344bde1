"""Attention scales are those of the tensors that diffusers' own attention multiplies, whatever the records' sizes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_flux
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from model_adapters import load_adapter
from quant_core import (
    FA3ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    quant_model,
)
from quant_core.attention.head_scales import HeadRange
from quant_core.attention.window import shortest_window
from quant_core.errors import ConfigurationError, InputError
from quant_core.structure import ModelStructure
from tests.support.tiny_models import CHANNELS, HEADS, KINDS, POOLED, TEXT, build

# (image side in patches, text tokens, samples) of each record: nothing is the same twice
MIXED = [(4, 5, 1), (6, 3, 2), (3, 7, 1)]
# kind -> its attentions: FLUX has 2 double and 2 single blocks, SD3 3 blocks, SD3.5 two more attentions in two of them
ATTENTIONS = {
    "flux": [f"{kind}.{i}.attn" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(2)],
    "sd3": [f"transformer_blocks.{i}.attn" for i in range(3)],
    "sd35": [
        *(f"transformer_blocks.{i}.{attention}" for i in range(2) for attention in ("attn", "attn2")),
        "transformer_blocks.2.attn",
    ],
}


def record(kind: str, side: int, text: int, samples: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Make the arguments of one forward with an image of side x side patches."""
    torch.manual_seed(side)
    kwargs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(samples, text, TEXT, dtype=dtype),
        "pooled_projections": torch.randn(samples, POOLED, dtype=dtype),
        "return_dict": False,
    }
    if kind == "flux":
        kwargs |= {
            "hidden_states": torch.randn(samples, side * side, CHANNELS, dtype=dtype),
            "timestep": torch.full((samples,), 0.5, dtype=dtype),
            "guidance": torch.full((samples,), 3.5),
            "txt_ids": torch.zeros(text, 3),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side))),
        }
    else:
        kwargs |= {
            "hidden_states": torch.randn(samples, CHANNELS, 2 * side, 2 * side, dtype=dtype),
            "timestep": torch.full((samples,), 500.0, dtype=dtype),
        }
    return {"args": [], "kwargs": kwargs}


def quantize(kind: str, model: nn.Module, records: Sequence[Any], output: Path, **session: Any) -> dict[str, Tensor]:
    """Run an FA3 session and return the tensors it wrote."""
    config = SessionConfig(
        processor_cfg_map={
            "w8a8_dynamic": W8A8DynamicProcessorConfig(),
            "fa3": FA3ProcessorConfig(),
            "save": SaveProcessorConfig(output_path=str(output)),
        },
        calib_data=records,
    )
    quant_model(model, config, **{"structure": load_adapter(KINDS[kind][0]).structure} | session)
    return load_file(output / "quant_model_weight_w8a8_dynamic.safetensors")


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch, spy: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Show q, k, v (B, H, S, D) to the spy by exchanging the functions that diffusers' processors call."""

    def flux(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        spy(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return dispatch(query, key, value, *args, **kwargs)

    class Functional:
        """torch.nn.functional as attention_processor sees it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(F, name)

        def scaled_dot_product_attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            spy(query, key, value)
            return F.scaled_dot_product_attention(query, key, value, **kwargs)

    dispatch = transformer_flux.dispatch_attention_fn
    with monkeypatch.context() as patch:
        patch.setattr(transformer_flux, "dispatch_attention_fn", flux)
        patch.setattr(attention_processor, "F", Functional())
        yield


def expected_scale(seen: list[Tensor], head: int, share: float) -> float:
    """Compute a head's scale from everything seen, by sorting: another way than the product's."""
    low, high = np.inf, -np.inf
    for x_BHSD in seen:
        values = np.sort(x_BHSD[:, head].double().numpy(), axis=None)
        width = int(len(values) * share)
        spans = values[width - 1 :] - values[: len(values) - width + 1]
        start = int(np.argmin(spans))
        low, high = min(low, values[start]), max(high, values[start + width - 1])
    return max(-low, high) / 127


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_those_of_each_head_over_records_of_any_size(kind, monkeypatch, tmp_path):
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    with spied(monkeypatch, lambda *qkv: calls.append(tuple(x.clone() for x in qkv))):
        written = quantize(kind, build(kind), [record(kind, *size) for size in MIXED], tmp_path)
    order = ATTENTIONS[kind]
    assert len(calls) == len(order) * len(MIXED)
    for index, name in enumerate(order):
        for part, (tensor, share) in enumerate((("q", 0.9999), ("k", 0.9999), ("v", 1.0))):
            seen = [call[part] for call in calls[index :: len(order)]]
            scale = written[f"{name}.fa_{tensor}.scale"]
            assert scale.shape == (HEADS, 1)
            expected = torch.tensor([[expected_scale(seen, head, share)] for head in range(HEADS)])
            torch.testing.assert_close(scale, expected.float(), rtol=1e-6, atol=0)  # float32 rounds at 6e-8
            assert torch.equal(written[f"{name}.fa_{tensor}.offset"], torch.zeros(HEADS, 1, dtype=torch.int8))


def test_scales_have_the_models_dtype(tmp_path):
    model = build("flux").to(torch.bfloat16)
    written = quantize("flux", model, [record("flux", *MIXED[0], dtype=torch.bfloat16)], tmp_path)
    assert {written[f"{name}.fa_v.scale"].dtype for name in ATTENTIONS["flux"]} == {torch.bfloat16}


def test_the_order_of_the_records_does_not_matter(tmp_path):
    records = [record("sd3", *size) for size in MIXED]
    forward = quantize("sd3", build("sd3"), records, tmp_path / "forward")
    backward = quantize("sd3", build("sd3"), records[::-1], tmp_path / "backward")
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_no_tensor_of_a_record_outlives_it(monkeypatch, tmp_path):
    alive: list[weakref.ref[Tensor]] = []
    survivors: list[int] = []

    def count(stage: str, done: int, total: int) -> None:
        if stage == "observe":
            survivors.append(sum(ref() is not None for ref in alive))

    with spied(monkeypatch, lambda *qkv: alive.extend(weakref.ref(x) for x in qkv)):
        quantize("flux", build("flux"), [record("flux", *size) for size in MIXED], tmp_path, progress=count)
    assert survivors == [0] * len(MIXED)
    assert len(alive) == 3 * len(MIXED) * len(ATTENTIONS["flux"])


def test_each_record_is_replayed_once(tmp_path):
    model, forwards = build("sd3"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    quantize("sd3", model, [record("sd3", *size) for size in MIXED], tmp_path)
    assert len(forwards) == len(MIXED)


def traces(model: nn.Module) -> list[Any]:
    """List everything a watcher could have left behind: hooks, processors, functions, the stack of modes."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    functions = [F.scaled_dot_product_attention, torch._C._len_torch_function_stack()]
    classes = [dict(vars(type(p))) for p in processors]
    return [hooks, processors, functions, classes]


@pytest.mark.parametrize("broken", [False, True], ids=["after success", "after an error"])
def test_nothing_is_left_patched(broken, tmp_path):
    model = build("flux")
    before = traces(model)
    records = [record("flux", *MIXED[0])]
    if broken:
        # Too few positions for the image: rotary embedding fails, inside the attention that is watched.
        records[0]["kwargs"]["img_ids"] = records[0]["kwargs"]["img_ids"][:-1]
        with pytest.raises(RuntimeError):
            quantize("flux", model, records, tmp_path)
    else:
        quantize("flux", model, records, tmp_path)
    assert traces(model) == before


def test_an_attention_that_never_multiplies_is_named(tmp_path):
    model = build("sd3")

    class Skipping(attention_processor.JointAttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
            return hidden_states, encoder_hidden_states

    model.transformer_blocks[1].attn.set_processor(Skipping())
    with pytest.raises(InputError, match=r"never saw attention 'transformer_blocks\.1\.attn'"):
        quantize("sd3", model, [record("sd3", *MIXED[0])], tmp_path)


def test_a_model_without_known_attentions_is_refused_before_it_is_changed(tmp_path):
    model = build("sd3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match="no attentions") as caught:
        quantize("sd3", model, [record("sd3", *MIXED[0])], tmp_path, structure=ModelStructure(model_class="none"))
    assert all(line in str(caught.value) for line in ("error: ", "\n  where ", "\n  why ", "\n  try "))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_no_adapter_describes_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match="fa3 finds no attention"):
        quantize("sd3", model, [[torch.zeros(1, 4)]], tmp_path, structure=None)


def test_fa3_needs_calibration_data(tmp_path):
    with pytest.raises(InputError, match="needs calibration data"):
        quantize("sd3", build("sd3"), [], tmp_path)


def test_fa3_with_a_static_scheme_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="fa3 goes with w8a8_dynamic only") as caught:
        SessionConfig(processor_cfg_map={"w8a8": W8A8ProcessorConfig(), "fa3": FA3ProcessorConfig()})
    assert "try    replace the scheme by w8a8_dynamic" in str(caught.value)


def test_reference_layout_says_that_it_cannot_mix_sizes(tmp_path):
    config = SessionConfig(
        processor_cfg_map={"w8a8_dynamic": W8A8DynamicProcessorConfig(), "fa3": FA3ProcessorConfig()},
        calib_data=[record("flux", *size) for size in MIXED],
        numerics="reference",
    )
    with pytest.raises(InputError, match="had 21 rows of scales and now has 39"):  # 4*4 + 5 tokens, then 6*6 + 3
        quant_model(build("flux"), config, structure=load_adapter("flux").structure)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60),
    share=st.sampled_from([0.5, 0.9, 0.99, 0.9999, 1.0]),
)
def test_no_shorter_window_holds_the_share(values, share):
    low, high = shortest_window(torch.tensor([values]), share)
    ordered = np.sort(np.float32(values)).astype(float)
    width = max(int(len(values) * share), 1)
    spans = ordered[width - 1 :] - ordered[: len(ordered) - width + 1]
    assert float(high) - float(low) == spans.min()
    assert sum(low.item() <= value <= high.item() for value in ordered) >= width


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_an_attention_that_multiplies_no_numbers_is_named(tmp_path, broken):
    model = build("flux")
    with torch.no_grad():
        model.transformer_blocks[1].attn.norm_k.weight[0] = broken
    with pytest.raises(
        InputError, match=r"'transformer_blocks\.1\.attn' multiplied NaN or infinity|got NaN or infinity"
    ):
        quantize("flux", model, [record("flux", *MIXED[0])], tmp_path)


def test_infinity_and_nan_survive_the_widening_of_a_range():
    for broken in (float("inf"), float("-inf"), float("nan")):
        found = HeadRange(torch.float32)
        found.widen(torch.tensor([-1.0]), torch.tensor([2.0]))
        assert found.is_finite
        found.widen(torch.tensor([min(broken, 0.0)]), torch.tensor([broken]))
        found.widen(torch.tensor([-1.0]), torch.tensor([2.0]))
        assert not found.is_finite
