"""The checkpoint that the runtime loads: its entries, its files, the rules it obeys, and reading it back."""
