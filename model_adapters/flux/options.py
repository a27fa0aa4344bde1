"""What a person may choose about FLUX beyond the shared options, and FLUX's own defaults."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from model_adapters.options import DeviceType, ImageOptions

DEFAULTS: dict[str, object] = {"quant_type": "w8a8_timestep", "save_path": "./res"}


class FluxOptions(ImageOptions):
    """Choose a FLUX pipeline, its prompts and its images."""

    # Never in a calibration; a hardware set-up is known by the number of ranks it leads to.
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = ImageOptions.OUTSIDE_IDENTITY | {"use_cache", "device_type"}
    DEVICE_TYPES: ClassVar[tuple[DeviceType, ...]] = (
        DeviceType(name="A2-64g", tp_size=1),
        DeviceType(name="A2-32g-single", tp_size=1, cpu_offload=True),
        DeviceType(name="A2-32g-dual", tp_size=2),
    )

    use_cache: bool = Field(
        default=False,
        description="approximate some steps from earlier ones when generating images (never to calibrate)",
    )
    device_type: Literal["A2-64g", "A2-32g-single", "A2-32g-dual"] = Field(
        default="A2-64g", description="cards of one copy: one of 64 GB, one of 32 GB with CPU offload, two of 32 GB"
    )

    @property
    def hardware(self) -> DeviceType:
        """Return what the device type means."""
        return next(found for found in self.DEVICE_TYPES if found.name == self.device_type)

    @property
    def approximation(self) -> str | None:
        """Return the name of the option that skips blocks, if it is set."""
        return "use_cache" if self.use_cache else None


OPTIONS = FluxOptions
