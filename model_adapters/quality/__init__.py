"""Whether a quantized model still paints: pictures compared, a quality card, its verdict, its gate, a contact sheet."""
