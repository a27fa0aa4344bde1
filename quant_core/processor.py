"""One step of a session as validated data: what the configurations of all processors have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

# The unit interval: what an exponent of a smoothing formula may be.
Exponent = Annotated[float, Field(ge=0.0, le=1.0)]


class StrictModel(BaseModel):
    """Refuse unknown keys, at any time."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ProcessorConfig(StrictModel):
    """Configure one step of a session; `key` is its name in the map and `kind` what there may be only one of."""

    key: ClassVar[str]
    kind: ClassVar[str]
