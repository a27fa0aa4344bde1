"""What smoothing measures of an input, call by call, without keeping the calls.

Inputs come as tokens, (N, I). Statistics declare how data-parallel ranks combine them, as range estimators do; a fresh
one is the neutral element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quant_core.parallel.groups import Reduction

# Tokens for which a search compares outputs. 512 tokens of width 3072 are 3 MB in half precision, 350 MB for the 114
# groups of a FLUX, on the host; a channel's outliers stay in the same channel from token to token.
SAMPLE_SIZE = 512
# Thinning by three: image rows are powers of two wide, so thinning by two would end with one column of the image.
_THINNING = 3


class Tokens(Protocol):
    """Keep some tokens for a search, and answer with the mean magnitude of each channel."""

    reductions: ClassVar[Mapping[str, Reduction]]

    def update(self, x_NI: Tensor) -> None:
        """Take in one call."""
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

    def update(self, x_NI: Tensor) -> None:
        """Forget the call."""

    def rows(self) -> list[Tensor]:
        """Return nothing."""
        return []

    def mean_abs(self) -> Tensor:
        """Raise: nothing was kept."""
        raise AssertionError("this method has no use for a mean")


class TokenSample:
    """Keep an evenly spaced sample of all tokens of all calls, bounded, and the mean over all of them.

    Tokens are counted through all calls, and every k-th is kept; when too many are, k triples. So the sample never
    depends on the number of calls beforehand, and every call has its share.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"total_I": "sum", "count": "sum"}

    def __init__(self, channels: int) -> None:
        self.total_I = torch.zeros(channels)
        self.count = torch.zeros(1)
        self._kept: list[Tensor] = []
        self._seen, self._stride = 0, 1

    def update(self, x_NI: Tensor) -> None:
        """Add one call to the mean, and its share to the sample."""
        self.total_I = self.total_I.to(x_NI.device) + x_NI.abs().sum(0, dtype=torch.float32)
        self.count += len(x_NI)
        while sum(map(len, self._kept)) + len(self._share(x_NI)) > SAMPLE_SIZE:
            self._stride *= _THINNING
            self._kept = [torch.cat(self._kept)[::_THINNING].clone()] if self._kept else []
        self._kept.append(self._share(x_NI).cpu().clone())
        self._seen += len(x_NI)

    def _share(self, x_NI: Tensor) -> Tensor:
        return x_NI[-self._seen % self._stride :: self._stride]

    def rows(self) -> list[Tensor]:
        """Return the sample."""
        return [torch.cat(self._kept)] if self._kept else []

    def mean_abs(self) -> Tensor:
        """Return the mean over all tokens of all calls, float32."""
        return self.total_I / self.count.to(self.total_I)


class FirstCall:
    """Keep the first call whole, as the reference tool's m3 does."""

    reductions: ClassVar[Mapping[str, Reduction]] = {}

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def update(self, x_NI: Tensor) -> None:
        """Keep the call if it is the first."""
        if not self._kept:
            self._kept.append(x_NI.clone())

    def rows(self) -> list[Tensor]:
        """Return the first call."""
        return self._kept

    def mean_abs(self) -> Tensor:
        """Return the mean over the kept tokens, in their dtype."""
        return torch.cat(self._kept).abs().mean(0)


class AllCalls(FirstCall):
    """Keep every call whole, as the reference tool's m6 search does; memory grows with the calibration data."""

    def update(self, x_NI: Tensor) -> None:
        """Keep the call."""
        self._kept.append(x_NI.clone())


class InputStatistics:
    """Gather what is known of one input: the channels' maxima over all calls, and what `tokens` keeps."""

    def __init__(self, channels: int, dtype: torch.dtype, tokens: Tokens) -> None:
        self.amax_I = torch.zeros(channels, dtype=dtype)
        self.calls = 0
        self.tokens = tokens

    def update(self, x: Tensor) -> None:
        """Take in one call; x: (..., I)."""
        x_NI = x.detach().reshape(-1, x.shape[-1])
        self.calls += 1
        self.amax_I = torch.maximum(self.amax_I.to(x_NI.device), x_NI.abs().amax(0).to(self.amax_I.dtype))
        self.tokens.update(x_NI)

    def state(self) -> Iterator[tuple[Reduction, Tensor, Callable[[Tensor], None]]]:
        """Yield each state tensor with its reduction over data-parallel ranks and where the reduced one goes."""
        yield "max", self.amax_I, partial(setattr, self, "amax_I")
        for name, op in self.tokens.reductions.items():
            yield op, getattr(self.tokens, name), partial(setattr, self.tokens, name)
