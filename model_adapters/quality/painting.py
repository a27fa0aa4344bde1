"""Paint the pictures that are compared: one pass over all prompts for each of the three ways to compute.

In every pass latents, scheduler and VAE compute in float32 and each picture starts from the same noise; only the
transformer's arithmetic differs (`pipeline.arithmetic`). One model at a time is in memory: what a later pass needs
of the float model, its latents after each step, lies on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_adapters.adapter import Embeddings, ModelAdapter
from model_adapters.options import PipelineOptions
from model_adapters.pipeline.arithmetic import other_arithmetic, own_arithmetic
from model_adapters.pipeline.latents import watched_latents
from model_adapters.pipeline.prompts import Batch
from model_adapters.quality.store import FLOAT, FLOOR, PictureStore
from quant_core.calibration.capture import DumperManager
from quant_core.calibration.timestep import TimestepManager
from quant_core.quality.ratio import Ratio, compare
from quant_core.quality.replayed import evenly_spaced

# Of a picture's denoising steps so many are kept as records, evenly spaced.
RECORDED_STEPS = 8


@dataclass(frozen=True)
class Painting:
    """Say what to paint, with what, and who wants to know.

    batches: this copy's pictures; embeddings: those of a batch, on the transformer's device. dtype: the model's.
    saves: whether this rank keeps pictures; the others of a tensor-parallel group compute the same ones. agree: makes
    one answer of all ranks of the copy (yes only if all say so), so that all skip alike. after_batch: told the pass,
    batches done and batches in all; the place to show progress, and to stop.
    """

    adapter: ModelAdapter
    options: PipelineOptions
    dtype: torch.dtype
    batches: Sequence[Batch]
    embeddings: Callable[[Batch], Embeddings]
    store: PictureStore
    saves: bool = True
    agree: Callable[[bool], bool] = bool
    after_batch: Callable[[str, int, int], object] = lambda kind, done, total: None


@torch.no_grad()
def paint(painting: Painting, kind: str, pipeline: Any) -> None:
    """Paint all pictures of one kind that are not there yet; the pipeline is float32 but for its transformer.

    The float pass also leaves its latents and records; the other two need it done.
    """
    with ExitStack() as stack:
        transformer = pipeline.transformer
        recorder = stack.enter_context(_recording(painting, pipeline)) if kind == FLOAT else None
        stack.enter_context(own_arithmetic(transformer, painting.dtype))
        if kind == FLOOR:
            stack.enter_context(other_arithmetic(transformer, painting.dtype))
        stack.enter_context(telling_steps(painting.adapter, pipeline))
        for done, batch in enumerate(painting.batches, start=1):
            if not painting.agree(painting.store.has(kind, batch)):
                _paint_batch(painting, kind, pipeline, batch, recorder)
            painting.after_batch(kind, done, len(painting.batches))


@contextmanager
def telling_steps(adapter: ModelAdapter, pipeline: Any) -> Iterator[None]:
    """Set the denoising step before each call of the transformer, as the runtime's loop does, inside the block."""
    before = TimestepManager.get_timestep_idx()

    def tell(module: nn.Module, args: Any) -> None:
        TimestepManager.set_timestep_idx(adapter.step_index(pipeline))

    hook = pipeline.transformer.register_forward_pre_hook(tell)
    try:
        yield
    finally:
        hook.remove()
        TimestepManager.set_timestep_idx(before)


def _paint_batch(painting: Painting, kind: str, pipeline: Any, batch: Batch, recorder: DumperManager | None) -> None:
    """Paint one batch, and keep its pictures with what was compared or, of the float model, recorded on the way."""
    latents: dict[int, Tensor] = {}
    ratios: list[dict[int, Ratio]] = [{} for _ in batch]

    def see(step: int, found: Tensor) -> None:
        """Keep the float model's latents of a step, or compare those of another model with them."""
        if not painting.saves:
            return
        if kind == FLOAT:
            latents[step] = found.to("cpu", torch.float32, copy=True)
        else:
            exact = painting.store.latents(batch, step)
            for ratio, one, other in zip(ratios, exact, found.cpu(), strict=True):
                ratio[step] = compare(one, other)

    with watched_latents(pipeline, painting.adapter.step_index, see):
        images = painting.adapter.generate(
            pipeline,
            _in_float32(painting.embeddings(batch)),
            painting.options,
            [torch.Generator("cpu").manual_seed(painting.store.seed + request.number) for request in batch],
        )
    records = recorder.take() if recorder else []
    if painting.saves:
        if kind == FLOAT:
            painting.store.keep_work(batch, latents, _sampled(records))
        painting.store.keep(kind, batch, images, ratios)


def _in_float32(embeddings: Embeddings) -> Embeddings:
    """Return embeddings for which a pipeline makes float32 latents."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in embeddings.items()}


@contextmanager
def _recording(painting: Painting, pipeline: Any) -> Iterator[DumperManager]:
    recorder = DumperManager(
        pipeline.transformer, capture_mode="timestep", step_source=lambda: painting.adapter.step_index(pipeline)
    )
    try:
        yield recorder
    finally:
        recorder.close()


def _sampled(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    chosen = evenly_spaced(sorted({record["timestep_idx"] for record in records}), RECORDED_STEPS)
    return [record for record in records if record["timestep_idx"] in chosen]
