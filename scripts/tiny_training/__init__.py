"""Train the small FLUX and SD3 pipelines of scripts/tiny_models on pictures that this package draws."""
