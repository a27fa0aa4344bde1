"""Look at a machine before a job does: one row a check, each finding with what to do about it."""
