"""What the toy transformer is called with, as shapes."""

from __future__ import annotations

from typing import Any

import torch

from model_adapters.inputs import TransformerInputs
from tests.support.toy_model.options import ToyOptions
from tests.support.toy_model.pipeline import TOKENS


def transformer_inputs(config: Any, options: ToyOptions, dtype: torch.dtype) -> TransformerInputs:
    """Return the inputs of one forward on the meta device; config: the transformer's."""
    empty = torch.empty(0, dtype=dtype, device="meta")
    batch = options.batch_size
    return TransformerInputs(
        of_step={
            "hidden_states": empty.new_empty(batch, options.length, config.channels),
            "timestep": empty.new_empty(batch),
        },
        of_prompt={"encoder_hidden_states": empty.new_empty(batch, TOKENS, config.text_dim)},
        of_run={},
    )
