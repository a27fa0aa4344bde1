"""Many processes as one job: their layout, their groups, their agreements."""
