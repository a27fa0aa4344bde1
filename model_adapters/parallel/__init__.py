"""Divide a model over tensor-parallel ranks: plans as data, and what applying one does to a model."""
