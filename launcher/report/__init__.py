"""Tell of a published checkpoint what a person wants to know after a job: one file that needs nothing else."""
