"""What a person may choose about SD3 beyond the shared options, and SD3's own defaults."""

from __future__ import annotations

from pydantic import AliasChoices, Field

from model_adapters.options import ImageOptions, UserPathText

DEFAULTS: dict[str, object] = {"quant_type": "w8a8", "save_path": "./results"}


class SD3Options(ImageOptions):
    """Choose an SD3 or SD3.5 pipeline, its prompts and its images."""

    path: UserPathText = Field(
        validation_alias=AliasChoices("sd3_model_path", "path"),
        description="folder of the float pipeline (or its hub id, owner/name)",
    )
    infer_steps: int = Field(default=28, ge=1, description="denoising steps per image")

    @property
    def is_guided(self) -> bool:
        """Tell whether the pipeline leads away from a negative prompt; its own scale does."""
        return self.guidance_scale is None or self.guidance_scale > 1


OPTIONS = SD3Options
