"""What a run tells: the terminal, the logs of its ranks, and `status.json`."""
