"""Outlier suppression, one method a file; adding one is a file and a row in this table."""

from __future__ import annotations

from quant_core.smoothing import m3, m4, m6
from quant_core.smoothing.method import SmoothingMethod

METHODS: dict[str, SmoothingMethod] = {method.config.key: method for method in (m3.METHOD, m4.METHOD, m6.METHOD)}
