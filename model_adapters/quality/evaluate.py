"""Evaluate a published checkpoint against its float model: the whole of it on one screen.

    paint with the float model → paint the noise floor → compare layers and outputs on records → deploy the published
    files in the float model's place → compare outputs → paint with the quantized model → compare pictures

Each rank evaluates its share of the pictures and returns what it measured; `measured.card_of` makes the card of all.
Without pictures (`evaluate_layers` alone) records of the calibration will do, and no VAE is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model_adapters.parallel.tensor_parallel import collectives
from model_adapters.pipeline.arithmetic import other_arithmetic
from model_adapters.quality.measured import Measured
from model_adapters.quality.painting import RECORDED_STEPS, Painting, paint
from model_adapters.quality.store import FLOAT, FLOOR, QUANTIZED
from quant_core.calibration.records import Record
from quant_core.calibration.replay import Progress, replay, silent
from quant_core.checkpoint.entries import CheckpointFiles
from quant_core.checkpoint.loading import load_deployed
from quant_core.checkpoint.reader import open_checkpoint
from quant_core.quality.ratio import StepRatios
from quant_core.quality.replayed import (
    HELD_BYTES,
    LayerOutput,
    compare_layers,
    compare_outputs,
    held_together,
    kept_outputs,
    sampled,
)


@dataclass(frozen=True)
class Published:
    """Give access to a rank's published files.

    schemes: of the quantized layers, by name. layer: reads one of them. deploy: makes a float model compute from the
    files, in place.
    """

    schemes: Mapping[str, str]
    layer: Callable[[str], LayerOutput]
    deploy: Callable[[nn.Module], object]


def published(files: CheckpointFiles) -> Published:
    """Open a rank's published files; a layer is read when it is asked for, and computes where its input is.

    A rotated layer reads and makes the channels of the float model, so that the two can be compared.

    Raises InputError for damaged files, VerificationError for ones that break a rule.
    """
    checkpoint = open_checkpoint(files)

    def layer(name: str) -> LayerOutput:
        stored, rotation = checkpoint.read_layer(name), checkpoint.rotations.get(name)

        def output(x: Tensor, step: int | None) -> Tensor:
            deployed = replace(stored, tensors={key: t.to(x.device) for key, t in stored.tensors.items()})
            return deployed(x, step) if rotation is None else rotation.output(deployed(rotation.input(x), step))

        return output

    return Published(
        schemes={name: group.type for name, group in checkpoint.inventory.layers.items()},
        layer=layer,
        deploy=lambda model: load_deployed(model, files),
    )


def evaluate(painting: Painting, pipeline: Any, checkpoint: Published, *, progress: Progress = silent) -> Measured:
    """Evaluate this rank's share of the pictures; the pipeline's float transformer is left deployed.

    pipeline: float32, its transformer in the dtype that was quantized. progress: told of each replayed record.
    """
    paint(painting, FLOAT, pipeline)
    paint(painting, FLOOR, pipeline)
    # All ranks of a copy wait here for the one that writes, and then read what it wrote.
    painting.agree(True)
    records = painting.store.records(painting.batches)
    measured = evaluate_layers(pipeline.transformer, checkpoint, records, dtype=painting.dtype, progress=progress)
    paint(painting, QUANTIZED, pipeline)
    painting.agree(True)
    requests = [request for batch in painting.batches if painting.saves for request in batch]
    return replace(measured, pictures=[painting.store.measured(request) for request in requests])


def evaluate_layers(
    transformer: nn.Module,
    checkpoint: Published,
    records: Sequence[Record],
    *,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> Measured:
    """Compare layers and outputs on records, each the inputs of one forward in the model's dtype.

    The float transformer is left deployed. Records of some evenly spaced steps are used, the same on every rank.
    """
    chosen = sampled(records, RECORDED_STEPS)
    with kept_outputs(transformer) as exact:
        replay(transformer, chosen, stage="float outputs", progress=progress)
    layers = _compare_layers(transformer, checkpoint, chosen, progress)
    with other_arithmetic(transformer, dtype):
        output_floor = compare_outputs(transformer, chosen, exact, progress=progress)
    checkpoint.deploy(transformer)
    output = compare_outputs(transformer, chosen, exact, progress=progress)
    return Measured(schemes=dict(checkpoint.schemes), layers=layers, output=output, output_floor=output_floor)


def _compare_layers(
    transformer: nn.Module, checkpoint: Published, records: Sequence[Record], progress: Progress
) -> dict[str, StepRatios]:
    """Compare all layers, as many in one replay as may be held: each is read once, not once a record."""
    found: dict[str, StepRatios] = {}
    sizes = {name: _weights(transformer, name) for name in checkpoint.schemes}
    groups = held_together(sizes, HELD_BYTES)
    for index, names in enumerate(groups):
        layers = {name: checkpoint.layer(name) for name in names}

        def tell(stage: str, done: int, total: int, before: int = index * len(records)) -> None:
            progress(stage, before + done, len(groups) * total)

        combines = collectives(transformer)
        found |= compare_layers(transformer, names, layers.__getitem__, records, combines=combines, progress=tell)
    return found


def _weights(transformer: nn.Module, name: str) -> int:
    """Return the bytes of a layer's codes."""
    weight = transformer.get_submodule(name).weight
    assert isinstance(weight, Tensor), "quantized layers are linears"
    return weight.numel()
