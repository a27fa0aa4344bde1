"""Imports once what every rank of a job would import; that starts no thread, so this process may be forked."""

from __future__ import annotations

import gc
import os
from importlib import import_module

gc.disable()  # nothing of what is imported is garbage
_before = dict(os.environ)

# `launcher` before torch, as everywhere; the pipelines bring the text encoders of transformers.
for _name in (
    "launcher.run",
    "launcher.inspection.verify",
    "model_adapters.flux.adapter",
    "model_adapters.sd3.adapter",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
):
    import_module(_name)

# Environment variables that these modules set.
VARIABLES_SET = {name: value for name, value in os.environ.items() if _before.get(name) != value}

# A job collects garbage: so it neither looks through all that was imported nor, being forked, copies it.
gc.freeze()
gc.enable()
