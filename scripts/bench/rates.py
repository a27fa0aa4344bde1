"""Measure the rate of maxima and codes beside that of a copy: of the floor's kernel, and of the product's codec.

The weight does not fit a processor's cache, nor a card's, so what is measured is memory. A processor is timed by the
seconds of one thread, a card by its own clock.

Worked example: a copy reads two bytes of a bfloat16 weight and writes two. Taking codes reads two and writes one, so
at the copy's rate of weights it moves 3/4 of the copy's bytes: 75 % of its bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import thread_time
from typing import NamedTuple

import torch
from torch import Tensor

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.arithmetic.weight_codec import INT8_ROWS
from scripts.bench.kernel import QMAX, Workspace, quantize_rows, row_codes, row_maxima

SHAPE, DTYPE = (18432, 3072), torch.bfloat16
# The bytes of a weight that have to be read and written, by what is done.
_COPY, _MAXIMA, _CODES = 4, 2, 3


class Rate(NamedTuple):
    """A way to do something: its rate in weights a second, and the bandwidth it achieves as a share of the copy's."""

    way: str
    weights: float
    of_copy: float


def measure_rates(device: str, shape: tuple[int, int] = SHAPE, repeat: int = 5) -> list[Rate]:
    """Return the rates on a device, in one thread where it is the processor; the copy's first."""
    w_OI = (torch.randn(shape, device=device) * shape[1] ** -0.5).to(DTYPE)
    seconds = _of_thread if device == "cpu" else _of_card
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        took = {way: (moved, median(seconds(do) for _ in range(repeat))) for way, moved, do in _ways(w_OI)}
    finally:
        torch.set_num_threads(threads)
    _, copy = next(iter(took.values()))
    return [Rate(way, w_OI.numel() / s, moved / s / (_COPY / copy)) for way, (moved, s) in took.items()]


def _ways(w_OI: Tensor) -> list[tuple[str, int, Callable[[], object]]]:
    """Return what is measured, the bytes of a weight that it cannot but move, and how it is done."""
    work = Workspace.of(w_OI.shape[1], w_OI.numel(), w_OI.device)
    copy_OI, codes_OI = torch.empty_like(w_OI), torch.empty_like(w_OI, dtype=torch.int8)
    amax_O1 = torch.empty(len(w_OI), 1, device=w_OI.device)
    exact_O1 = quantize_rows(w_OI, codes_OI, work).to(torch.float32)
    known_O1 = INT8_ROWS.row_maxima(w_OI)

    def encode() -> object:
        return INT8_ROWS.encode(w_OI, known_O1, DTYPE, NUMERICS["float32"], codes_OI=codes_OI)

    return [
        ("copy of the weight", _COPY, lambda: copy_OI.copy_(w_OI)),
        ("floor: row maxima", _MAXIMA, lambda: row_maxima(w_OI, amax_O1, work)),
        ("floor: codes", _CODES, lambda: row_codes(w_OI, exact_O1, codes_OI, work)),
        ("floor: both in one pass", _CODES, lambda: quantize_rows(w_OI, codes_OI, work)),
        ("product: row maxima", _MAXIMA, lambda: INT8_ROWS.row_maxima(w_OI)),
        ("product: codes", _CODES, encode),
        ("codes, whole tensor", _CODES, lambda: (w_OI.float() / exact_O1).round().clamp(-QMAX, QMAX).to(torch.int8)),
    ]


def _of_thread(work: Callable[[], object]) -> float:
    start = thread_time()
    work()
    return thread_time() - start


def _of_card(work: Callable[[], object]) -> float:
    """Return the seconds of one call among several, so that the card never waits for the next."""
    calls = 20
    work()
    begin, end = torch.Event(enable_timing=True), torch.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls
