"""A model quantized layer by layer from disk gives the same files as one quantized in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import (
    M4ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    quant_model,
)
from quant_core.arithmetic import blocks
from quant_core.session import read_ahead
from quant_core.session.streaming import quantize_streaming, reads_activations
from tests.support.golden_cases import GoldenCase, Written, differing
from tests.support.tiny_models import build

GOLDEN_DYNAMIC = GoldenCase("flux_w8a8_dynamic_bf16")


def session(output: Path | None, numerics: str = "float32", **changes: Any) -> SessionConfig:
    save = {} if output is None else {"save": SaveProcessorConfig(output_path=str(output), metadata={"format": "pt"})}
    scheme = {"w8a8_dynamic": W8A8DynamicProcessorConfig(disable_names=["*net.2*"])}
    return SessionConfig(processor_cfg_map={**scheme, **save, **changes}, numerics=numerics)


def stream(model: Any, config: SessionConfig) -> Any:
    """Quantize from the model's state, of which the quantizer sees one tensor at a time."""
    state = model.state_dict()

    def read(name: str, rows: slice = slice(None)) -> torch.Tensor:
        return state[name][rows]

    return quantize_streaming(type(model)(**model.config).to(model.dtype).to("meta"), read, config)


def test_the_golden_case_is_written_bit_for_bit_without_holding_the_model(tmp_path: Path):
    config = GOLDEN_DYNAMIC.session(tmp_path, numerics="reference")
    result = stream(GOLDEN_DYNAMIC.model(), config)
    written, golden = Written.read(tmp_path, "w8a8_dynamic"), GOLDEN_DYNAMIC.golden
    assert differing(written.tensors, golden.tensors) == []
    assert written.description == golden.description
    assert result.files.weights.stat().st_mode & 0o777 == 0o640


# Blocks of 200 numbers: two rows of the 96 wide layers, so that every layer is cut many times and not evenly; and in
# pieces of seven rows of these, in bfloat16.
@pytest.mark.parametrize(("block", "piece"), [(200, 1400), (2**22, 2**24)], ids=["small blocks", "large blocks"])
@pytest.mark.parametrize("numerics", ["float32", "reference"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("flux", torch.bfloat16), ("sd3", torch.float16), ("sd35", torch.float32)], ids=str
)
def test_both_paths_write_the_same_bytes(tmp_path: Path, monkeypatch, kind: str, dtype, numerics: str, block, piece):
    monkeypatch.setattr(blocks, "BLOCK_NUMEL", block)
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", piece)
    streamed = stream(build(kind).to(dtype), session(tmp_path / "streamed", numerics))
    held = quant_model(build(kind).to(dtype), session(tmp_path / "held", numerics))
    assert streamed.files is not None
    assert held.files is not None
    assert streamed.files.weights.read_bytes() == held.files.weights.read_bytes()
    assert streamed.files.description.read_text() == held.files.description.read_text()
    assert list(streamed.layers) == list(held.layers)


def test_a_file_that_failed_half_way_does_not_appear(tmp_path: Path):
    model = build("flux")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("single")}
    with pytest.raises(KeyError):
        quantize_streaming(type(model)(**model.config).to("meta"), state.__getitem__, session(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_saves_nothing_reads_nothing():
    model = type(build("flux"))(**build("flux").config).to("meta")
    assert quantize_streaming(model, {}.__getitem__, session(None)).files is None


def test_only_a_dynamic_session_without_smoothing_and_attention_scales_streams():
    model = build("flux")
    assert not reads_activations(model, session(None))
    assert reads_activations(model, session(None, m4=M4ProcessorConfig()))
    assert reads_activations(model, SessionConfig(processor_cfg_map={"w8a8": W8A8ProcessorConfig()}))
    assert reads_activations(model, GoldenCase("flux_w8a8_dynamic_fa3_bf16").session(None))


def test_the_threads_of_a_streaming_session_compute_alone_and_later_as_before(tmp_path: Path):
    model, seen = build("flux"), set()
    state = model.state_dict()

    def read(name: str, rows: slice = slice(None)) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return state[name][rows]

    torch.set_num_threads(3)
    quantize_streaming(type(model)(**model.config).to("meta"), read, session(tmp_path))
    assert seen == {1}
    assert torch.get_num_threads() == 3
