"""How a run that cannot go on ends: who lives, who failed first, and the one way out."""
