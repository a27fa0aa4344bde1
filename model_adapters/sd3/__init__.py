"""Stable Diffusion 3 and 3.5: joint attention blocks, classifier-free guidance."""
