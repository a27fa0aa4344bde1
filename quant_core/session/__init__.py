"""One quantization from its configuration to its files: the tables of contents."""
