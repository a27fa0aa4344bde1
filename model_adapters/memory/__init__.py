"""What a job takes on each rank, known before anything is read."""
