"""What a rank of a job imports, to be imported once for many ranks; importing it starts no thread."""

import os

_before = dict(os.environ)

import launcher.run  # noqa: I001 - as everywhere, before torch
import launcher.inspection.verify
import model_adapters.flux.adapter
import model_adapters.sd3.adapter
from diffusers import FluxPipeline, StableDiffusion3Pipeline

# Environment variables that these modules set.
VARIABLES_SET = {name: value for name, value in os.environ.items() if _before.get(name) != value}
