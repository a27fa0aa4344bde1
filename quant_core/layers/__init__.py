"""Linear layers while they are calibrated, and once they compute as the hardware does."""
