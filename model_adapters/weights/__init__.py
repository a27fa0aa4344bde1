"""Read a pipeline's files: which there are, what they hold, one rank's part of them."""
