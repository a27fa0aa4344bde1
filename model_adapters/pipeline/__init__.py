"""Run a float pipeline: prompts, their encoding, one batch of images, the current step."""
