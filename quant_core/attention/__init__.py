"""Quantized attention (FA3): one symmetric scale per head for the q, k and v that an attention really multiplies.

`watch` sees them where they are final: in the call of `scaled_dot_product_attention`, behind norms, the joining of
text and image, and rotary embedding. `window` turns one call into ranges, `head_scales` keeps them over calls and
makes the checkpoint's entries.
"""
