"""A study of what quantization does to pictures of the small trained models."""
