"""The shortest window that holds a share of the values: a range that leaves out a tail without choosing which one.

Cutting a fixed share at both ends gives up good values on the side that has no outliers. Of all windows that hold the
share, the shortest gives up whatever lies farthest out, on either side.

Worked example: 10 000 values, of which 9 999 lie in [-4, 3] and one is 40. A window of 9 999 values can start at the
lowest or at the second lowest value; the first spans 7, the second 43.9. The range is [-4, 3].
"""

from __future__ import annotations

from torch import Tensor


def shortest_window(values_RN: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return low and high end of the shortest window of int(N * share) values in each row, (R,) each, on the host.

    The first of several equally short windows, counted from below, wins. With a share of 1 these are the extremes.
    """
    count = values_RN.shape[1]
    # A window starts at one of the lowest values and ends at one of the highest; nothing between needs sorting.
    starts = count - max(int(count * share), 1) + 1
    low_RK = values_RN.topk(starts, dim=1, largest=False).values.cpu()
    high_RK = values_RN.topk(starts, dim=1).values.flip(1).cpu()
    shortest_R1 = (high_RK.double() - low_RK.double()).argmin(dim=1, keepdim=True)
    return low_RK.gather(1, shortest_R1).squeeze(1), high_RK.gather(1, shortest_R1).squeeze(1)
