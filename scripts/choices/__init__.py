"""Measurements behind what the quantizer chooses by itself, on the small trained models."""
