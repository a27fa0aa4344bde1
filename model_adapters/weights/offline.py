"""Keep a job off the network unless its model is named by a hub id."""

from __future__ import annotations

import os

from model_adapters.weights.model_folder import is_hub_id


def stay_offline(model_path: str) -> bool:
    """Forbid huggingface_hub to connect when the model is a folder; returns whether it was forbidden.

    Must run before huggingface_hub is imported: it reads the variable then.
    """
    if is_hub_id(model_path):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    return True
