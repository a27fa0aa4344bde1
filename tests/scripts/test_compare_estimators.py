"""The tables of estimators and numerics hold every combination that a session takes, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quant_core.schemes import SCHEMES
from scripts.compare_estimators import SMOOTHINGS, golden
from scripts.study.grid import Method


@pytest.mark.parametrize("case", ["sd3_w8a8_fp32", "flux_w8a8_timestep_fp32"])
def test_each_method_of_the_table_of_numerics_makes_a_session(case: str):
    subject = golden(case)
    methods = list(subject.methods)
    for method in methods:
        for numerics in ("reference", "float32"):
            replace(method, numerics=numerics).session(list(subject.records), (), SMOOTHINGS)
    multiplying = [name for name, scheme in SCHEMES.items() if scheme.multiplies_input]
    if "timestep" not in case:
        multiplying.remove("w8a8_timestep")
    assert set(methods) == {Method(scheme, name) for scheme in multiplying for name in SMOOTHINGS} | {Method("w8a16")}
