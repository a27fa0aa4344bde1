"""The files of a run: their names, whose they are, whether they fit together."""
