"""Compare a quantized model with its float model on the same inputs: records, replayed through both.

A layer's ratio is that of the layer alone: what its deployed arithmetic makes of the float model's own input, against
the float layer. The output's ratio is that of the whole: all quantized layers one behind the other. The first finds
a culprit, the second predicts the picture (spec: evaluation).

Nothing but one layer's input is held at a time: layers are compared in forward hooks while the float model runs, and
each is asked for when its turn comes, so that a caller decides how many it holds. Of a record's output, which is as
large as the latents, a copy stays on the host until the quantized model has run.

Under tensor parallelism a layer is compared as the whole model sees it, behind its collective (`combines`). Each rank
then measures its own columns, or, after a sum or a gather, the same numbers as the others: adding up the ranks' ratios
is right in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.calibration.records import Record
from quant_core.calibration.replay import Progress, replay, silent
from quant_core.calibration.timestep import TimestepManager
from quant_core.quality.ratio import StepRatios, compare

# Codes of so many layers are held on the host while all records are replayed: 11 GiB of FLUX.1-dev take six replays.
HELD_BYTES = 2 * 2**30
# What one layer computes: input (..., I) and denoising step to output (..., O), on the input's device.
LayerOutput = Callable[[Tensor, "int | None"], Tensor]
# A forward hook: module, its inputs and its local output to the output that the rest of the model sees.
Combine = Callable[[nn.Module, Any, Tensor], Tensor]


@torch.no_grad()
def compare_layers(
    model: nn.Module,
    layers: Iterable[str],
    deployed: Callable[[str], LayerOutput],
    records: Sequence[Record],
    *,
    combines: Mapping[str, Combine] | None = None,
    progress: Progress = silent,
) -> dict[str, StepRatios]:
    """Replay the records through the float model and compare each named linear layer with its deployed arithmetic.

    deployed: returns a layer by name, anew for each record. Both are computed in float32 from the model's own input,
    so that rounding a result to a narrow dtype does not hide what quantization did. Raises InputError for inputs that
    are not finite.
    """
    found = {name: StepRatios() for name in layers}
    with ExitStack() as stack:
        for name, ratios in found.items():
            hook = _comparing(name, deployed, ratios, (combines or {}).get(name, _as_it_is))
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        replay(model, records, stage="compare layers", measured=found, progress=progress)
    return found


@contextmanager
def kept_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the model's outputs inside the block, on the host, in the order of the calls."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).detach().to("cpu", copy=True))

    hook = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()


def compare_outputs(
    model: nn.Module, records: Sequence[Record], exact: Sequence[Tensor], *, progress: Progress = silent
) -> StepRatios:
    """Replay the records through a model and compare its outputs with what the float model said of the same records."""
    with kept_outputs(model) as outputs:
        replay(model, records, stage="compare outputs", progress=progress)
    ratios = StepRatios()
    for record, wanted, found in zip(records, exact, outputs, strict=True):
        ratios.add(record.step, compare(wanted, found))
    return ratios


def sampled(records: Sequence[Record], most_steps: int) -> list[Record]:
    """Return the records of at most so many denoising steps, evenly spaced, the first and the last among them.

    Steps are chosen, not records, so that ranks which share the records choose alike. Records of unknown steps stay.
    """
    steps = sorted({record.step for record in records if record.step is not None})
    chosen = evenly_spaced(steps, most_steps)
    return [record for record in records if record.step is None or record.step in chosen]


def evenly_spaced(steps: Sequence[int], most: int) -> set[int]:
    """Return at most `most` of the sorted steps, evenly spaced, the last and (from two on) the first among them."""
    if len(steps) <= most:
        return set(steps)
    if most == 1:
        return {steps[-1]}
    return {steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)}


def held_together(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Return the names in groups, in their order, each of at most so many bytes (or of one name)."""
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def float_output(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return what a float layer makes of a float32 input (..., I), in float32."""
    return F.linear(x, linear.weight.float(), None if linear.bias is None else linear.bias.float())


def _comparing(name: str, deployed: Callable[[str], LayerOutput], ratios: StepRatios, combine: Combine) -> Any:
    """Return a forward hook that compares a float linear with its deployed self, in float32."""

    def hook(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, step = inputs[0].float(), TimestepManager.get_timestep_idx()
        exact = combine(linear, inputs, float_output(linear, x))
        ratios.add(step, compare(exact, combine(linear, inputs, deployed(name)(x, step))))

    return hook


def _as_it_is(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output
