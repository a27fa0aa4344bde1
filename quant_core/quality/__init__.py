"""Measure what quantization costs: signal over quantization noise, of each layer and of the whole model."""
