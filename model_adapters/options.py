"""What a person may choose about the model, its prompts and the images: the fields all models share.

Pure data without torch, so that a command line can be built from it at once. Field names are the flags' names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PromptType = Literal["plain", "parti", "hpsv2"]
DtypeName = Literal["float32", "float16", "bfloat16"]


def _of_user(given: Any) -> Any:
    """Return a path with the user's folder in place of `~`; raises ValueError for one that names nothing."""
    if not isinstance(given, (str, Path)):
        return given
    # A shell expands `~` only where it is typed unquoted at the beginning of a word, and YAML has no shell.
    path = os.path.expanduser(given)
    if not path.strip():
        raise ValueError("it is empty, and would mean the current folder, which is called .")
    if path.startswith("~"):
        raise ValueError(f"no user is called '{path.split(os.sep)[0][1:]}'; a name that begins with ~ is typed ./~")
    return path


# Every option that is a path: the empty text is no folder, and `~` is the user's.
UserPath = Annotated[Path, BeforeValidator(_of_user)]
# The same as text, where what is given may be no path (a hub id) or is shown as it was given.
UserPathText = Annotated[str, BeforeValidator(_of_user)]


class DeviceType(BaseModel):
    """Describe a hardware set-up by name: over how many cards one copy of the model goes, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    tp_size: int = Field(ge=1, description="ranks that hold one copy of the model")
    cpu_offload: bool = Field(default=False, description="keep on the card only the part of the pipeline that runs")


class PipelineOptions(BaseModel):
    """Choose the prompts, and how much is generated from them; each model adds what it alone has."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    # Every other option tells one calibration from another. These cannot change it, or are known by what they lead to:
    # the model and the prompts by their content, the dtype by the one that is computed in.
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {"path", "transformer", "lora", "prompt_path", "prompt_type", "max_num_prompt", "info_file_save_path", "dtype"}
    )

    # The hardware set-ups that may be chosen.
    DEVICE_TYPES: ClassVar[tuple[DeviceType, ...]] = ()

    path: UserPathText = Field(description="folder of the float pipeline (or its hub id, owner/name)")
    transformer: UserPathText | None = Field(
        default=None,
        description="safetensors file of the transformer, as published or saved by diffusers, instead of the folder's",
    )
    lora: tuple[str, ...] = Field(
        default=(), description="LoRA files to fuse into the weights before anything is measured: FILE[:scale]"
    )
    variant: str | None = Field(
        default=None,
        pattern=r"^\w+$",
        description="read the weights of this variant (fp16), also where the usual ones are there",
    )
    prompt_path: UserPathText = Field(default="./calib_prompts.txt", description="file with the prompts")
    prompt_type: PromptType = Field(default="plain", description="format of the prompt file")
    num_images_per_prompt: int = Field(default=1, ge=1, description="images to generate for each prompt")
    max_num_prompt: int = Field(default=0, ge=0, description="use at most this many prompts (0: all)")
    info_file_save_path: UserPathText = Field(
        default="./image_info.json", description="where to write which image came from which prompt"
    )
    infer_steps: int = Field(default=50, ge=1, description="denoising steps per image")
    seed: int = Field(default=42, ge=0, lt=2**63, description="seed of the initial noise")
    batch_size: int = Field(default=1, ge=1, description="prompts per call of the pipeline")
    data_split_num: int = Field(default=1, ge=1, description="into how many parts the prompts are divided")
    data_split_id: int = Field(default=0, ge=0, description="which of these parts to use, counted from 0")
    dtype: DtypeName | None = Field(default=None, description="dtype to compute in (default: the model's own)")

    @property
    def hardware(self) -> DeviceType | None:
        """Return the hardware set-up that was chosen; None for a model that names none."""
        return None

    @property
    def approximation(self) -> str | None:
        """Return the name of the option that was set to approximate steps of images (never of a calibration)."""
        return None

    @model_validator(mode="after")
    def _split_exists(self) -> PipelineOptions:
        if self.data_split_id >= self.data_split_num:
            raise ValueError(
                f"data_split_id {self.data_split_id} must be below data_split_num {self.data_split_num}: "
                f"use 0 to {self.data_split_num - 1}"
            )
        return self


class ImageOptions(PipelineOptions):
    """Choose images of some size."""

    width: int = Field(default=1024, gt=0, multiple_of=16, description="width of the images in pixels")
    height: int = Field(default=1024, gt=0, multiple_of=16, description="height of the images in pixels")
    guidance_scale: float | None = Field(default=None, ge=0, description="guidance scale (default: the pipeline's own)")
