"""A model that the product does not know: it turns a text into a signal of some samples, without text encoder or VAE.

The same files as any model's folder, and `pipeline.py`, which holds what diffusers holds for the others.
"""
