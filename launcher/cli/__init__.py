"""The command line: what the words of a command mean."""
