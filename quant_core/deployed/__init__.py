"""What the hardware computes, computed here: integer products of stored codes."""
