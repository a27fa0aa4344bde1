"""How a run that cannot go on ends: who lives, who failed first, and the one way out.

What other rooms use most: `Monitor` (one a process, while a job runs), `run_together` (a phase that all ranks fail as
one), `Failure` (what went wrong, as data), and `leave` (the way out).
"""
