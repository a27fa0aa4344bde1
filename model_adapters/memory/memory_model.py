"""Say what a job takes on each rank before anything is read: from the configuration and the shapes alone.

Every number is a sum over tensors on the meta device, or the high-water mark of a computation that was followed there
(`live_bytes`). It is what tensors take; the process itself (Python, torch, diffusers) has some 0.4 GiB before it
begins, and a card's allocator rounds up.

Worked example, FLUX.1-dev in bfloat16 over two ranks, 1024 x 1024, 50 steps, `w8a8_timestep`: each rank has 14.2 GiB
of weights and 0.4 GiB of activations on its card; while it quantizes, the int8 codes take 6.4 GiB on the host. A prompt
adds 29 MB to the dump: 50 latents of 0.5 MB and 4 MB of text. The shard has 8.5 GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from model_adapters.adapter import ModelAdapter
from model_adapters.inputs import size
from model_adapters.memory.live_bytes import peak_bytes
from model_adapters.options import PipelineOptions
from model_adapters.weights.transformer_part import TransformerPart
from quant_core.arithmetic.numerics import NUMERICS, Numerics
from quant_core.naming import linear_at
from quant_core.schemes import QUANT_TYPES
from quant_core.schemes.scheme import Scheme
from quant_core.session.targets import target_layers


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of one rank.

    weights: this rank's float part; activations: the most that one forward holds beside them; record: what one batch
    adds to the dump; dump: all of it; codes: int8 weights beside the float ones; workspace: the most that quantizing
    one layer or one input takes; widest: the largest tensor; widest_codes: of the largest layer; quantized: what is
    published.
    """

    weights: int
    activations: int
    record: int
    dump: int
    codes: int
    workspace: int
    widest: int
    widest_codes: int
    quantized: int

    @property
    def loading(self) -> int:
        """Peak while the weights are read: one tensor is in the dtype of the file and on its place."""
        return self.weights + self.widest

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
    def streaming(self) -> int:
        """Peak of quantizing from disk, layer by layer: it does not grow with the model's depth.

        One layer is computed and one read ahead; the codes of three others wait to be written.
        """
        return 2 * self.widest + self.workspace + 3 * self.widest_codes


def estimate_memory(
    adapter: ModelAdapter,
    part: TransformerPart,
    options: PipelineOptions,
    *,
    quant_type: str,
    disabled: tuple[str, ...],
    batches: int,
) -> MemoryModel:
    """Return what a rank's part of a model takes; the description is used up.

    quant_type: of the command line; disabled: patterns of layers kept float; batches: calls of the pipeline on this
    rank.
    """
    model, dtype = part.model, adapter.dtype(options)
    scheme, with_attention = QUANT_TYPES[quant_type]
    targets = target_layers(model, disabled)
    weights = [model.get_parameter(f"{name}.weight") for name in targets]
    inputs = adapter.transformer_inputs(getattr(model, "config"), options, dtype)  # noqa: B009, a Module has no config
    arguments = inputs.arguments()
    activations, largest_input = _follow_forward(model, targets, arguments)
    streams = not (scheme.observes_input or with_attention)
    return MemoryModel(
        weights=size(model.state_dict()),
        activations=activations + size(arguments),
        record=inputs.dump_bytes(1, options.infer_steps),
        dump=inputs.dump_bytes(batches, options.infer_steps),
        codes=sum(weight.numel() for weight in weights),
        workspace=_workspace(weights, largest_input, scheme, NUMERICS["float32"], streams),
        widest=max(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        widest_codes=max(weight.numel() for weight in weights),
        quantized=_quantized_bytes(model, targets, scheme, options.infer_steps),
    )


def _follow_forward(model: nn.Module, targets: list[str], arguments: dict[str, Tensor]) -> tuple[int, Tensor]:
    """Return the most bytes alive in one forward, and the largest input of a layer that will be quantized."""
    seen: list[torch.Size] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        for name in targets
    ]
    peak = peak_bytes(lambda: model(**arguments, return_dict=False))
    for hook in hooks:
        hook.remove()
    largest = max(seen, key=lambda shape: shape.numel())
    return peak, torch.empty(largest, dtype=next(model.parameters()).dtype, device="meta")


def _workspace(
    weights: Sequence[Tensor], largest_input: Tensor, scheme: Scheme, numerics: Numerics, streams: bool
) -> int:
    """Return the most that quantizing one weight or, unless streaming, one input holds."""
    weight = max(weights, key=lambda weight: weight.numel())
    of_weight = peak_bytes(lambda: _encode(weight, scheme, numerics))
    if streams:
        return of_weight
    low_high = largest_input.new_empty(1)
    of_input = peak_bytes(lambda: numerics.fake_quantize_input(largest_input, low_high, low_high))
    # The codes stay, and are counted.
    return max(of_weight - weight.numel(), of_input)


def _encode(weight: Tensor, scheme: Scheme, numerics: Numerics) -> object:
    return scheme.codec.encode(weight, scheme.codec.row_maxima(weight), weight.dtype, numerics)


def _quantized_bytes(model: nn.Module, targets: list[str], scheme: Scheme, steps: int) -> int:
    """Return the bytes of all tensors of the shard, without the file's header and smoothing's factors."""
    quantized = {f"{name}.{own}" for name in targets for own in ("weight", "bias")}
    total = size({name: tensor for name, tensor in model.state_dict().items() if name not in quantized})
    for name in targets:
        linear = linear_at(model, name)
        sizes = {"O": linear.out_features, "I": linear.in_features, "T": steps, "1": 1}
        for tensor, rule in scheme.rules.items():
            if tensor != "bias" or linear.bias is not None:
                total += prod(sizes[axis] for axis in rule.axes) * rule.dtype_in(linear.weight.dtype).itemsize
    return total
