"""The launcher's own torchrun: start the ranks of this host, and end with a status that says what happened."""
