"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, Field

from launcher.config.option_flags import POSITIONAL
from model_adapters.options import UserPath

# A folder that a job published in, or staged in, by the job's own flag or by itself.
WeightsFolder = Annotated[
    UserPath,
    POSITIONAL,
    Field(
        description="folder of the quantized weights",
        validation_alias=AliasChoices("quant_weight_save_folder", "folder"),
    ),
]
AsJson = Annotated[
    bool, Field(description="print JSON, for programs", validation_alias=AliasChoices("json", "as_json"))
]
