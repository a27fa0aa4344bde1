"""Devices and the variables of a rank: what this process has, chosen with a reason."""
