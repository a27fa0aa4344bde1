"""What smoothing measures of an input, call by call, without keeping the calls.

Inputs come as tokens, (N, I). Statistics declare how data-parallel ranks combine them, as range estimators do; a fresh
one is the neutral element. Ranks hold consecutive records, and what they know together is what one rank with all the
records would know, to the last bit: a factor does not depend on the number of copies of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quant_core.parallel.groups import Group, Reduction, gather_rows, reduce_over

# Tokens for which a search compares outputs. 512 tokens of width 3072 are 3 MB in half precision, 350 MB for the 114
# groups of a FLUX, on the host; a channel's outliers stay in the same channel from token to token.
SAMPLE_SIZE = 512
# Thinning by three: image rows are powers of two wide, so thinning by two would end with one column of the image.
_THINNING = 3
# Sums of |x| are rounded to multiples of this, so that they add up to the same float64 in any order (below 2^37).
_SUM_UNIT = 2.0**-16


class Tokens(Protocol):
    """Keep some tokens for a search, and answer with the mean magnitude of each channel."""

    reductions: ClassVar[Mapping[str, Reduction]]

    def update(self, x_NI: Tensor, record: int) -> None:
        """Take in one call; record: the index of its record among those of all ranks."""
        ...

    def gather(self, group: Group | None) -> None:
        """Take over the kept tokens of the ranks that saw other records."""
        ...

    def rows(self) -> list[Tensor]:
        """Return the kept tokens as a few (N, I) tensors; none when nothing was seen."""
        ...

    def mean_abs(self) -> Tensor:
        """Return the mean of |x| for each channel, (I,)."""
        ...


class NoTokens:
    """Keep nothing: for methods that need only the maxima."""

    reductions: ClassVar[Mapping[str, Reduction]] = {}

    def update(self, x_NI: Tensor, record: int) -> None:
        """Forget the call."""

    def gather(self, group: Group | None) -> None:
        """Do nothing."""

    def rows(self) -> list[Tensor]:
        """Return nothing."""
        return []

    def mean_abs(self) -> Tensor:
        """Raise: nothing was kept."""
        raise AssertionError("this method has no use for a mean")


class TokenSample:
    """Keep an evenly spaced sample of all tokens of all calls, bounded, and the mean over all of them.

    Token n of a call with N tokens in record r has the place r * N + n, so tokens are counted through all records when
    these are equally long. Kept are the tokens whose place is a multiple of k; when they are too many, k triples. So
    the sample depends neither on the number of calls beforehand nor on which rank has which record.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"total_I": "sum", "count": "sum"}

    def __init__(self, channels: int) -> None:
        self.total_I = torch.zeros(channels, dtype=torch.float64)
        self.count = torch.zeros(1, dtype=torch.float64)
        self._kept_NI = torch.zeros(0, channels)
        self._places_N = torch.zeros(0, dtype=torch.int64)
        self._stride = 1

    def update(self, x_NI: Tensor, record: int) -> None:
        """Add one call to the mean, and its share to the sample."""
        sums_I = x_NI.abs().sum(0, dtype=torch.float32).cpu().double()
        self.total_I += (sums_I / _SUM_UNIT).round() * _SUM_UNIT
        self.count += len(x_NI)
        begin = record * len(x_NI)
        share = self._share(begin, len(x_NI))
        while len(self._places_N) + len(share) > SAMPLE_SIZE:
            self._thin(self._stride * _THINNING)
            share = self._share(begin, len(x_NI))
        self._kept_NI = torch.cat([self._kept_NI.to(x_NI.dtype), x_NI[share.start :: share.step].cpu()])
        self._places_N = torch.cat([self._places_N, begin + torch.tensor(share, dtype=torch.int64)])

    def _share(self, begin: int, tokens: int) -> range:
        """Return which of a call's tokens have a place in the sample; begin: the place of its first."""
        return range(-begin % self._stride, tokens, self._stride)

    def _thin(self, stride: int) -> None:
        self._stride = stride
        stays_N = self._places_N % stride == 0
        self._kept_NI, self._places_N = self._kept_NI[stays_N], self._places_N[stays_N]

    def gather(self, group: Group | None) -> None:
        """Take over the samples of the other ranks, as thin as one sample of everything is."""
        # In float32, which holds every narrower dtype exactly and which a rank without a record has too.
        self._kept_NI = gather_rows(group, self._kept_NI.float()).to(self._kept_NI.dtype)
        self._places_N = gather_rows(group, self._places_N)
        self._thin(int(reduce_over(group, "max", torch.tensor(self._stride))))
        while len(self._places_N) > SAMPLE_SIZE:
            self._thin(self._stride * _THINNING)

    def rows(self) -> list[Tensor]:
        """Return the sample, in the order of the records."""
        return [self._kept_NI] if len(self._kept_NI) else []

    def mean_abs(self) -> Tensor:
        """Return the mean over all tokens of all calls, float32."""
        return (self.total_I / self.count).float()


class FirstCall:
    """Keep the first call whole, as the reference tool's m3 does."""

    reductions: ClassVar[Mapping[str, Reduction]] = {}

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def update(self, x_NI: Tensor, record: int) -> None:
        """Keep the call if it is the first."""
        if not self._kept:
            self._kept.append(x_NI.clone())

    def gather(self, group: Group | None) -> None:
        """Do nothing: whoever compares with the reference tool has one sequence of records on one rank."""

    def rows(self) -> list[Tensor]:
        """Return the first call."""
        return self._kept

    def mean_abs(self) -> Tensor:
        """Return the mean over the kept tokens, in their dtype."""
        return torch.cat(self._kept).abs().mean(0)


class AllCalls(FirstCall):
    """Keep every call whole, as the reference tool's m6 search does; memory grows with the calibration data."""

    def update(self, x_NI: Tensor, record: int) -> None:
        """Keep the call."""
        self._kept.append(x_NI.clone())


class InputStatistics:
    """Gather what is known of one input: the channels' maxima over all calls, and what `tokens` keeps.

    record: the index of the record that is running, among those of all ranks.
    """

    def __init__(self, channels: int, dtype: torch.dtype, tokens: Tokens) -> None:
        self.amax_I = torch.zeros(channels, dtype=dtype)
        self.calls = 0
        self.record = 0
        self.tokens = tokens

    def update(self, x: Tensor) -> None:
        """Take in one call; x: (..., I)."""
        x_NI = x.detach().reshape(-1, x.shape[-1])
        self.calls += 1
        self.amax_I = torch.maximum(self.amax_I.to(x_NI.device), x_NI.abs().amax(0).to(self.amax_I.dtype))
        self.tokens.update(x_NI, self.record)

    def state(self) -> Iterator[tuple[Reduction, Tensor, Callable[[Tensor], None]]]:
        """Yield each state tensor with its reduction over data-parallel ranks and where the reduced one goes."""
        yield "max", self.amax_I, partial(setattr, self, "amax_I")
        for name, op in self.tokens.reductions.items():
            yield op, getattr(self.tokens, name), partial(setattr, self.tokens, name)
