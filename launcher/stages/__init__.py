"""The steps of a job, one a file; each is restartable and reads what the step before it wrote."""
