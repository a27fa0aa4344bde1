"""What a person may choose about FLUX beyond the shared options, and FLUX's own defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from model_adapters.options import DeviceType, PipelineOptions

DEVICE_TYPES: dict[str, DeviceType] = {
    "A2-64g": DeviceType(tp_size=1),
    "A2-32g-single": DeviceType(tp_size=1, cpu_offload=True),
    "A2-32g-dual": DeviceType(tp_size=2),
}

DEFAULTS: dict[str, object] = {"quant_type": "w8a8_timestep", "save_path": "./res"}


class FluxOptions(PipelineOptions):
    """Choose a FLUX pipeline, its prompts and its images."""

    use_cache: bool = Field(
        default=False,
        description="approximate some steps from earlier ones when generating images (never to calibrate)",
    )
    device_type: Literal["A2-64g", "A2-32g-single", "A2-32g-dual"] = Field(
        default="A2-64g", description="cards of one copy: one of 64 GB, one of 32 GB with CPU offload, two of 32 GB"
    )


OPTIONS = FluxOptions
