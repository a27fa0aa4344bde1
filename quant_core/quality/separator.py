"""From which denoising step on rows of static ranges are as good as measuring each token: the first static step.

A runtime that knows the step runs those below a separator dynamic and the others static. What a separator costs follows
from the error at the output of every step, all static against all dynamic, because a step is one or the other.

Worked example, four steps, static errors 9, 4, 1.1, 1 and dynamic ones 1, 1, 1, 1 (in 1e-4): separators 0 to 4 give
sums of 15.1, 7.1, 4.1, 4.0 and 4.0. The last ones are the best, and the least within 0.2 dB (4.7 %) of them is 2.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

# Decibels below the best separator that fewer dynamic steps may cost: less than pictures show.
TOLERANCE_DB = 0.2


def advised_separator(static: Sequence[float], dynamic: Sequence[float], tolerance_db: float = TOLERANCE_DB) -> int:
    """Return the least separator whose error is within the tolerance of the best; errors by step, from 0."""
    sums = [math.fsum([*dynamic[:first], *static[first:]]) for first in range(len(static) + 1)]
    allowed = min(sums) * 10 ** (tolerance_db / 10)
    return next(first for first, error in enumerate(sums) if error <= allowed)


def every_step(sampled: Mapping[int, float], steps: int) -> list[float]:
    """Return the error of each step from 0, with those between two sampled steps in a straight line of decibels."""
    known = sorted(sampled)
    found = []
    for step in range(steps):
        after = min(bisect.bisect_left(known, step), len(known) - 1)
        high, low = known[after], known[max(after - 1, 0)] if known[after] != step else known[after]
        part = 0.0 if high == low else min(max((step - low) / (high - low), 0.0), 1.0)
        logs = [math.log(max(sampled[each], 1e-30)) for each in (low, high)]
        found.append(math.exp(logs[0] + part * (logs[1] - logs[0])))
    return found
