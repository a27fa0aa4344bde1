"""FLUX.1: two streams of blocks, guidance as an input, 504 linear layers in FLUX.1-dev."""
