"""Say what a job takes on each rank before anything is read: from the configuration and the shapes alone.

Every number is a sum over tensors on the meta device, or the high-water mark of a computation that was followed there
(`live_bytes`). It is what tensors take; the process itself (Python, torch, diffusers) has some 0.4 GiB before it
begins, and a card's allocator rounds up.

Worked example, FLUX.1-dev in bfloat16 over two ranks, 1024 x 1024, 50 steps, `w8a8_timestep`: each rank has 14.2 GiB
of weights and 0.4 GiB of activations on its card; while it quantizes, the int8 codes take 6.4 GiB on the host. A prompt
adds 29 MB to the dump: 50 latents of 0.5 MB and 4 MB of text. The shard has 8.5 GiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from model_adapters.adapter import ModelAdapter
from model_adapters.inputs import size
from model_adapters.memory.live_bytes import peak_bytes
from model_adapters.options import PipelineOptions
from model_adapters.pipeline.arithmetic import other_arithmetic
from model_adapters.pipeline.offload import blocks_of
from model_adapters.weights.model_folder import PARTS_NAME, open_weights, pipeline_folder, read_parts
from model_adapters.weights.transformer_part import TransformerPart
from quant_core.arithmetic.numerics import NUMERICS, Numerics
from quant_core.naming import linear_at
from quant_core.quality.replayed import HELD_BYTES
from quant_core.schemes import SCHEMES
from quant_core.schemes.scheme import Scheme
from quant_core.session.config import SessionConfig
from quant_core.session.read_ahead import AHEAD_BYTES, PIECE_BYTES
from quant_core.session.streaming import reads_activations
from quant_core.session.targets import layer_plan


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of one rank.

    weights: this rank's float part; visiting: the most of it that is on a card which runs it block by block;
    activations: the most that one forward holds beside them; record: what one batch adds to the dump; dump: all of it;
    codes: int8 weights beside the float ones; workspace: the most that quantizing one layer or one input takes; widest:
    the largest tensor; piece: what is read of one at once; widest_codes: of the largest layer; widest_kept: the largest
    that stays float; quantized: what is published; comparing: what activations are while an evaluation compares layers,
    or computes the noise floor; encoding: text encoders, which come and go before the weights.
    """

    weights: int
    visiting: int
    activations: int
    record: int
    dump: int
    codes: int
    workspace: int
    widest: int
    piece: int
    widest_codes: int
    widest_kept: int
    quantized: int
    comparing: int
    encoding: int

    @property
    def loading(self) -> int:
        """Peak while the weights are read: one tensor is in the dtype of the file and on its place."""
        return self.weights + self.widest

    @property
    def running(self) -> int:
        """Peak while the float model makes pictures; their decoder comes on top."""
        return max(self.loading, self.weights + self.activations)

    @property
    def calibrating(self) -> int:
        """Peak of a calibration, of which `record` is on the host."""
        return max(self.loading, self.weights + self.activations + self.record)

    @property
    def quantizing(self) -> int:
        """Peak of quantizing by replay, of which `codes` and `dump` are on the host."""
        replaying = self.weights + self.codes + self.dump + self.activations
        return max(self.loading, replaying + self.workspace)

    @property
    def kept(self) -> int:
        """What an evaluation keeps on the host: held codes, and whatever was read of the published file."""
        return min(self.codes, HELD_BYTES) + self.quantized

    @property
    def evaluating(self) -> int:
        """Peak of an evaluation, of which `kept` is on the host; the decoder of its pictures comes on top."""
        return max(self.loading, self.weights + self.kept + self.comparing)

    @property
    def streaming(self) -> int:
        """Peak of quantizing from disk, layer by layer: it does not grow with the model's depth.

        Some pieces are read ahead, one is computed, and the codes of two layers wait to be written. Later it is two
        float tensors that wait, while one is taken and the next one is read; the memory of the pieces stays.
        """
        pieces = min(AHEAD_BYTES, self.weights) + 2 * self.piece
        return pieces + max(self.workspace + 2 * self.widest_codes, 4 * self.widest_kept)


def estimate_memory(
    adapter: ModelAdapter,
    part: TransformerPart,
    options: PipelineOptions,
    session: SessionConfig | None,
    *,
    batches: int,
    evaluates: bool = True,
    encodes: bool = True,
) -> MemoryModel:
    """Return what a rank's part of a model takes; the description is used up.

    session: what is quantized, and how; None: nothing. batches: calls of the pipeline on this rank. evaluates: whether
    `comparing` is wanted, which takes as long as all the rest; 0 otherwise. encodes: likewise of `encoding`.
    """
    model, dtype = part.model, adapter.dtype(options)
    schemes = {n: SCHEMES[config.key] for n, config in layer_plan(model, session).items()} if session else {}
    state, weights = model.state_dict(), [model.get_parameter(f"{name}.weight") for name in schemes]
    inputs = adapter.transformer_inputs(getattr(model, "config"), options, dtype)  # noqa: B009, a Module has no config
    arguments = inputs.arguments()
    activations, largest_input = _follow_forward(model, schemes, arguments)
    replays = session is not None and reads_activations(model, session)
    widest = max(tensor.nbytes for tensor in state.values())
    return MemoryModel(
        weights=size(state),
        visiting=_visiting_bytes(model),
        activations=activations + size(arguments),
        record=inputs.dump_bytes(1, options.infer_steps),
        dump=inputs.dump_bytes(batches, options.infer_steps),
        codes=sum(weight.numel() for weight in weights),
        workspace=_workspace(weights, largest_input if replays else None, schemes.values(), NUMERICS["float32"]),
        widest=widest,
        # Rows of a weight that is rotated mix.
        piece=widest if session and session.rotate_values else min(widest, PIECE_BYTES),
        widest_codes=max((weight.numel() for weight in weights), default=0),
        widest_kept=max((kept.nbytes for name, kept in state.items() if name.removesuffix(".weight") not in schemes)),
        quantized=_quantized_bytes(model, schemes, options.infer_steps),
        comparing=_follow_evaluation(model, schemes, arguments, dtype) + size(arguments) if evaluates else 0,
        encoding=_text_encoder_bytes(options, dtype) if encodes else 0,
    )


def _text_encoder_bytes(options: PipelineOptions, dtype: torch.dtype) -> int:
    """Return the bytes of the pipeline's text encoders, from the headers of their files; a variant has the same names.

    A folder that holds nothing but a transformer has no index of parts.
    """
    root = pipeline_folder(options.path)
    parts = read_parts(root) if (root / PARTS_NAME).exists() else {}
    encoders = {name: kind for name, (_, kind) in parts.items() if name.startswith("text_encoder") and kind}
    return sum(_encoder_bytes(root / name, kind, dtype) for name, kind in encoders.items())


def _encoder_bytes(folder: Path, kind: str, dtype: torch.dtype) -> int:
    exact, sizes = _modules_in_float32(kind, dtype), {}
    for path in folder.glob("*.safetensors"):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                stored, is_exact = file.get_slice(name), not exact.isdisjoint(name.split("."))
                # One that is widened is there in both forms until the last one is loaded.
                narrow = 0 if is_exact and stored.get_dtype() == "F32" else dtype.itemsize
                sizes[name] = prod(stored.get_shape()) * (narrow + (torch.float32.itemsize if is_exact else 0))
    return sum(sizes.values())


def _modules_in_float32(kind: str, dtype: torch.dtype) -> frozenset[str]:
    """Return the names of modules that transformers keeps in float32 in a run of that dtype: T5 overflows float16."""
    if dtype != torch.float16:
        return frozenset()
    import transformers

    return frozenset(getattr(getattr(transformers, kind, None), "_keep_in_fp32_modules", None) or ())


def _visiting_bytes(model: nn.Module) -> int:
    blocks = [size(block.state_dict()) for block in blocks_of(model)]
    return size(model.state_dict()) - sum(blocks) + max(blocks, default=0)


def _follow_forward(model: nn.Module, targets: Iterable[str], arguments: dict[str, Tensor]) -> tuple[int, Tensor]:
    """Return the most bytes alive in one forward, and the largest input of a layer that will be quantized."""
    seen: list[torch.Size] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        for name in targets
    ]
    with _shortened(model):
        peak = peak_bytes(lambda: model(**arguments, return_dict=False))
    for hook in hooks:
        hook.remove()
    largest = max(seen, key=lambda shape: shape.numel(), default=torch.Size([0]))
    return peak, torch.empty(largest, dtype=next(model.parameters()).dtype, device="meta")


def _follow_evaluation(
    model: nn.Module, targets: Iterable[str], arguments: dict[str, Tensor], dtype: torch.dtype
) -> int:
    """Return the most bytes alive in a forward whose layers are compared, or in one of the noise floor."""

    def forward() -> object:
        return model(**arguments, return_dict=False)

    with _shortened(model), other_arithmetic(model, dtype):
        floor = peak_bytes(forward)
    hooks = [model.get_submodule(name).register_forward_hook(_compare) for name in targets]
    with _shortened(model):
        compared = peak_bytes(forward)
    for hook in hooks:
        hook.remove()
    return max(floor, compared)


def _compare(linear: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
    """Make what comparing a layer with its deployed self makes: all in float32, and integers in between."""
    x, weight = inputs[0].float(), linear.weight
    assert isinstance(weight, Tensor), "targets are linears"
    exact = nn.functional.linear(x, weight.float())
    codes = x.to(torch.int8)
    integers = torch.empty_like(exact, dtype=torch.int32)
    del codes
    (exact - integers.float()).square_()


@contextmanager
def _shortened(model: nn.Module) -> Iterator[None]:
    """Leave the model the first two and the last block of each stack: the others would hold what the second holds."""
    stacks = {name: part for name, part in model.named_children() if isinstance(part, nn.ModuleList) and len(part) > 3}
    for name, stack in stacks.items():
        setattr(model, name, nn.ModuleList([stack[0], stack[1], stack[-1]]))
    try:
        yield
    finally:
        for name, stack in stacks.items():
            setattr(model, name, stack)


def _workspace(
    weights: Sequence[Tensor], largest_input: Tensor | None, schemes: Iterable[Scheme], numerics: Numerics
) -> int:
    """Return the most that quantizing one weight or, where records are replayed, one input holds."""
    if not weights:
        return 0
    weight, scheme = max(zip(weights, schemes), key=lambda layer: layer[0].numel())
    of_weight = peak_bytes(lambda: _encode(weight, scheme, numerics))
    if largest_input is None:
        return of_weight
    low_high = largest_input.new_empty(1)
    of_input = peak_bytes(lambda: numerics.fake_quantize_input(largest_input, low_high, low_high))
    # The codes stay, and are counted.
    return max(of_weight - weight.numel(), of_input)


def _encode(weight: Tensor, scheme: Scheme, numerics: Numerics) -> object:
    return scheme.codec.encode(weight, scheme.codec.row_maxima(weight), weight.dtype, numerics)


def _quantized_bytes(model: nn.Module, schemes: Mapping[str, Scheme], steps: int) -> int:
    """Return the bytes of all tensors of the shard, without the file's header and smoothing's factors."""
    quantized = {f"{name}.{own}" for name in schemes for own in ("weight", "bias")}
    total = size({name: tensor for name, tensor in model.state_dict().items() if name not in quantized})
    for name, scheme in schemes.items():
        linear = linear_at(model, name)
        sizes = {"O": linear.out_features, "I": linear.in_features, "T": steps, "1": 1}
        for tensor, rule in scheme.rules.items():
            if tensor != "bias" or linear.bias is not None:
                total += prod(sizes[axis] for axis in rule.axes) * rule.dtype_in(linear.weight.dtype).itemsize
    return total
