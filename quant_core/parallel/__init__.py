"""Ranks as the quantizer sees them: slices of a layer, and groups to agree with."""
