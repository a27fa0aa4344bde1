"""Read a golden case, and quantize it the way the reference tool was asked to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant_core import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    W8A8DynamicProcessorConfig,
    W8A8ProcessorConfig,
    W8A8TimeStepProcessorConfig,
    quant_model,
    safe_torch_load,
)

# The reference ran on a processor with AVX-512; without it, torch adds up products of bfloat16 in another order.
HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
needs_avx512 = pytest.mark.skipif(
    not HAS_AVX512, reason=f"needs AVX-512; this is {torch.backends.cpu.get_cpu_capability()}"
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
_CLASSES = {"flux": diffusers.FluxTransformer2DModel, "sd3": diffusers.SD3Transformer2DModel}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SCHEMES = {
    "w8a8": W8A8ProcessorConfig,
    "w8a8_timestep": W8A8TimeStepProcessorConfig,
    "w8a8_dynamic": W8A8DynamicProcessorConfig,
}
_SMOOTHING = {
    None: lambda: {},
    "m3": lambda: {"m3": M3ProcessorConfig()},
    "m4": lambda: {"m4": M4ProcessorConfig()},
    "m6": lambda: {"m6": M6ProcessorConfig(cfg=M6Config(alpha=0.8, beta=0.2))},
}


@dataclass(frozen=True)
class Written:
    """What a session wrote: the tensors, and the description in its order."""

    tensors: dict[str, Tensor]
    description: list[tuple[str, str]]

    @classmethod
    def read(cls, folder: Path, scheme: str, suffix: str = "") -> Written:
        """Read the two files of a folder; suffix: what a rank's files have in front of the extension."""
        description = json.loads((folder / f"quant_model_description_{scheme}{suffix}.json").read_text())
        return cls(load_file(folder / f"quant_model_weight_{scheme}{suffix}.safetensors"), list(description.items()))


@dataclass(frozen=True)
class GoldenCase:
    """One folder of `tests/data/golden`."""

    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN / self.name

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def scheme(self) -> str:
        return self.config["quant"]

    @property
    def records(self) -> Any:
        return safe_torch_load(self.folder / "calib.pth")

    @property
    def golden(self) -> Written:
        """What the reference tool wrote."""
        return Written.read(self.folder, self.scheme)

    def model(self) -> Any:
        """Build the float model."""
        model: Any = _CLASSES[self.config["kind"]](**self.config["model_config"])
        missing = model.load_state_dict(load_file(self.folder / "float.safetensors"), strict=False)
        assert not missing.unexpected_keys
        return model.to(_DTYPES[self.config["dtype"]]).eval()

    def session(self, output: Path | None, **options: Any) -> SessionConfig:
        """Ask for what the reference tool was asked for."""
        config = self.config
        scheme: dict[str, Any] = {"disable_names": config["disable_names"]}
        if config["timestep_sep"] is not None:
            scheme["timestep_sep"] = config["timestep_sep"]
        save = {} if output is None else {"save": SaveProcessorConfig(output_path=str(output))}
        fa3 = {"fa3": FA3ProcessorConfig()} if config["fa3"] else {}
        processors = {
            config["quant"]: _SCHEMES[config["quant"]](**scheme),
            **_SMOOTHING[config["anti"]](),
            **fa3,
            **save,
        }
        return SessionConfig(processor_cfg_map=processors, calib_data=self.records, **options)

    def quantize(self, output: Path, numerics: str = "reference") -> Written:
        """Quantize the float model and read what was written."""
        quant_model(self.model(), self.session(output, numerics=numerics))
        return Written.read(output, self.scheme)


def differing(ours: dict[str, Tensor], golden: dict[str, Tensor]) -> list[str]:
    """Name the tensors that are absent on one side or differ in dtype, shape or any bit."""
    return [name for name in sorted({*ours, *golden}) if not same(ours.get(name), golden.get(name))]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Tell whether two tensors are there and equal in dtype, shape and every bit."""
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
