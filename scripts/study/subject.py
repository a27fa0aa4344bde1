"""A model to quantize in many ways: what it paints in float, what its noise floor is, what calibrates it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from model_adapters import load_adapter, load_options
from model_adapters.adapter import Embeddings
from model_adapters.pipeline.prompt_encoding import encode_prompts
from model_adapters.pipeline.prompts import Batch, ImageRequest
from model_adapters.quality.metrics import psnr, similarity
from model_adapters.quality.painting import Painting, paint
from model_adapters.quality.store import FLOAT, FLOOR, QUANTIZED, PictureStore
from model_adapters.weights.loading import load_pipeline, load_transformer
from quant_core import DumperManager, SessionConfig, quant_model
from quant_core.calibration.records import Record
from quant_core.calibration.replay import replay
from quant_core.quality.ratio import StepRatios
from quant_core.quality.replayed import compare_outputs, kept_outputs, sampled
from scripts.add_outlier_channels import add_outlier_channels
from scripts.sqnr import measure
from scripts.study.grid import Method
from scripts.tiny_training.checking import look
from scripts.tiny_training.drawing import SCENE_OF_CAPTION

MODELS = Path(__file__).resolve().parents[1] / "tiny_models"
VARIANTS = ("flux", "flux, outliers", "sd3", "sd3, outliers")
SIDE, STEPS, AT_ONCE = 64, 8, 8
# Each seed calibrates on prompts of its own, and paints with noise of its own.
CALIBRATED = 8
# So many prompts are there to paint.
PAINTED = 16
# Layers and outputs are compared in so many steps.
COMPARED_STEPS = 4
OPTIONS: Mapping[str, dict[str, Any]] = {"flux": {}, "sd3": {"guidance_scale": 3.0}}

Figures = dict[str, float]


def quiet_libraries() -> None:
    """Have diffusers and transformers show no bars, and errors only."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def model_folder(variant: str, work: Path) -> Path:
    """Return the folder of one of the VARIANTS; one with outlier channels is made in `work` where it is not there."""
    kind, _, outliers = variant.partition(", ")
    path = work / f"{kind}_with_outliers" if outliers else MODELS / kind
    return path if path.exists() else add_outlier_channels(MODELS / kind, path)


class Subject:
    """One model and one seed. What the float model makes is made once, and its pictures stay in a folder in `work`.

    The folder is of one number of pictures: those that are painted together share a file of latents.
    """

    def __init__(
        self,
        kind: str,
        path: Path,
        seed: int,
        pictures: int,
        work: Path,
        *,
        steps: int = STEPS,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take the model in a folder. dtype: of its transformer, its own when left out."""
        self.adapter, self.work = load_adapter(kind), work / f"{pictures}_pictures"
        self.options = load_options(kind).OPTIONS(
            path=str(path), width=SIDE, height=SIDE, infer_steps=steps, seed=1000 * seed, **OPTIONS[kind]
        )
        self.dtype = dtype or self.adapter.dtype(self.options)
        shown = _prompts("calibration")[CALIBRATED * seed :][:CALIBRATED]
        self.calibrated = _batches(shown, at_once=1, first=0)
        self.painted = _batches(_prompts("evaluation")[:pictures], at_once=AT_ONCE, first=CALIBRATED)

    def float_figures(self) -> Figures:
        """Return how alike the noise floor's pictures are to the float model's, and which of the latter are right."""
        self._paint(FLOAT, self.transformer)
        self._paint(FLOOR, self.transformer)
        return {**self._likeness(FLOOR), "right": self._right(FLOAT)}

    def figures(self, method: Method) -> Figures:
        """Quantize a copy of the model and measure it: decibels, likeness, the share of pictures that are right."""
        deployed = self.quantized(self.session(method))
        quality = measure(self.transformer, deployed, self.records)
        self._paint(QUANTIZED, deployed, fingerprint=str(method))
        return {
            "median_layer": quality.median_layer,
            "worst_layer": quality.worst_layer,
            "output": quality.output,
            **self._likeness(QUANTIZED),
            "right": self._right(QUANTIZED),
        }

    def session(self, method: Method, **options: Any) -> SessionConfig:
        """Say a method of this model in the quantizer's words. options: others of the scheme."""
        return method.session(self.calibration, self.adapter.disabled_layers[method.scheme], **options)

    def quantized(self, config: SessionConfig) -> nn.Module:
        """Return a quantized copy of the model."""
        deployed = copy.deepcopy(self.transformer)
        quant_model(deployed, config, structure=self.adapter.structure)
        return deployed

    def output(self, deployed: nn.Module) -> StepRatios:
        """Return the ratio of a quantized model's output on the records, by step."""
        return compare_outputs(deployed, self.records, self._exact)

    def psnrs(self, deployed: nn.Module, fingerprint: str) -> list[float]:
        """Return how alike each picture of a quantized model is to the float model's, in decibels.

        fingerprint: says what the model is; pictures that are there of the same one are not painted again.
        """
        self._paint(FLOAT, self.transformer)
        self._paint(QUANTIZED, deployed, fingerprint)
        return [psnr(self._picture(FLOAT, each), self._picture(QUANTIZED, each)) for each in self._requests]

    @cached_property
    def transformer(self) -> nn.Module:
        return load_transformer(self.adapter, self.options.path, dtype=self.dtype, device="cpu").model

    @cached_property
    def embeddings(self) -> dict[tuple[str, ...], Embeddings]:
        prompts = [_words(batch) for batch in (*self.calibrated, *self.painted)]
        return encode_prompts(self.adapter, self.options, prompts, "cpu", self.dtype)

    @cached_property
    def calibration(self) -> list[Any]:
        """What the float pipeline calls its transformer with when it calibrates."""
        return self.captured(self.calibrated)

    def captured(self, batches: Sequence[Batch]) -> list[Any]:
        """Return what the float pipeline, all of it in the model's dtype, calls its transformer with, in all steps."""
        pipeline = load_pipeline(self.adapter, self.options, self.transformer, "cpu", self.dtype)
        dumper = DumperManager(
            self.transformer, capture_mode="timestep", step_source=lambda: self.adapter.step_index(pipeline)
        )
        for batch in batches:
            noise = [torch.Generator().manual_seed(self.options.seed + request.number) for request in batch]
            embeddings = self.embeddings[_words(batch)]
            self.adapter.generate(pipeline, embeddings, self.options, noise, decodes=False)
        dumper.close()
        return dumper.records

    @cached_property
    def records(self) -> list[Record]:
        """What the float model's transformer was called with in a few steps while it painted."""
        self._paint(FLOAT, self.transformer)
        return sampled(self._store("").records(self.painted), COMPARED_STEPS)

    @cached_property
    def _exact(self) -> list[Tensor]:
        with kept_outputs(self.transformer) as outputs:
            replay(self.transformer, self.records, stage="float outputs")
        return outputs

    def _store(self, fingerprint: str) -> PictureStore:
        return PictureStore(self.work, {FLOAT: "", FLOOR: "", QUANTIZED: fingerprint}, self.options.seed)

    def _paint(self, kind: str, transformer: nn.Module, fingerprint: str = "") -> None:
        pipeline = load_pipeline(self.adapter, self.options, transformer, "cpu", torch.float32)
        painting = Painting(
            self.adapter,
            self.options,
            self.dtype,
            self.painted,
            lambda batch: self.embeddings[_words(batch)],
            self._store(fingerprint),
        )
        paint(painting, kind, pipeline)

    def _likeness(self, kind: str) -> Figures:
        found = [similarity(self._picture(FLOAT, each), self._picture(kind, each)) for each in self._requests]
        return {name: mean(getattr(each, name) for each in found) for name in ("psnr", "ssim", "flip")}

    def _right(self, kind: str) -> float:
        """Return the share of pictures that show what their prompt says."""
        return mean(_shows(self._picture(kind, each), each.prompt) for each in self._requests)

    @property
    def _requests(self) -> list[ImageRequest]:
        return [request for batch in self.painted for request in batch]

    def _picture(self, kind: str, request: ImageRequest) -> np.ndarray:
        with Image.open(self._store("").picture(kind, request)) as image:
            return np.asarray(image.convert("RGB"))


def _prompts(name: str) -> list[str]:
    return (MODELS / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines()


def _batches(prompts: Sequence[str], at_once: int, first: int) -> list[Batch]:
    requests = [ImageRequest(prompt, "", first + place, place, 0) for place, prompt in enumerate(prompts)]
    return [tuple(requests[start : start + at_once]) for start in range(0, len(requests), at_once)]


def _words(batch: Batch) -> tuple[str, ...]:
    return tuple(request.prompt for request in batch)


def _shows(picture: np.ndarray, prompt: str) -> bool:
    """Tell whether a picture (H, W, 3) shows what the prompt says."""
    sight = look(torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1) / 255)
    return sight is not None and sight.shows(SCENE_OF_CAPTION[prompt])
