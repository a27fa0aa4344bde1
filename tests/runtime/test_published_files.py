"""What the product publishes, loaded by the real MindIE-SD: every layer computes what the product says it will."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.runtime.cases import Answer, Case, described_classes, run_cases
from tests.runtime.product import SCHEMES, STEPS, files_in, publish, registration_line, variants_of

# kind, dtype, type, variant. Nothing in an SD3 can absorb the factor of its text input: no fused form.
MATRIX = [
    (kind, dtype, quant_type, variant)
    for kind, variants in {"flux": ("plain", "m4", "m4_fused"), "sd3": ("plain", "m4")}.items()
    for dtype in ("bfloat16", "float16")
    for quant_type in SCHEMES
    for variant in variants_of(quant_type, *variants)
] + [("flux", "bfloat16", "W8A8_DYNAMIC", "fa3")]
NAMES = ["-".join(row) for row in MATRIX]
# Relative error of the whole model's output against the product's own. Measured: at most 0.0012, but 0.019 where
# float16 outputs are scaled by 19 bits, which the product's arithmetic does not imitate, and 0.007 where all layers are
# W8A16: their sums are rounded in another order, and one such rounding goes through the whole model.
OUTPUT_ERROR, OUTPUT_ERROR_19_BITS, OUTPUT_ERROR_SUMS = 0.005, 0.03, 0.015


@pytest.fixture(scope="module")
def published(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Publish a tiny transformer in every way, with the registration line that goes with it."""
    folder, cases = tmp_path_factory.mktemp("published"), {}
    for name, (kind, dtype, quant_type, variant) in zip(NAMES, MATRIX):
        made = publish(kind, quant_type, getattr(torch, dtype), folder / name, variant)
        line = registration_line(STEPS) if quant_type == "W8A8_TIMESTEP" else None
        description = files_in(made, quant_type).description
        cases[name] = Case(str(description), dtype, kind, {quant_type: str(made)}, registration=line)
    return cases


@pytest.fixture(scope="module")
def answers(published: dict[str, Case], packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return run_cases(published, packages, tmp_path_factory.mktemp("answers"))[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_the_description_is_replaced_and_no_other(
    name: str, published: dict[str, Case], answers: dict[str, Answer]
) -> None:
    assert answers[name].error == ""
    expected = described_classes(Path(published[name].description))
    assert len(expected) > 20  # nothing was left out: 29 layers of the tiny FLUX, 31 of the SD3
    assert answers[name].classes == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_computes_what_the_product_says(name: str, answers: dict[str, Answer]) -> None:
    assert answers[name].disagreeing == []
    assert len(answers[name].layers) == len(answers[name].classes)
    # Both sides divide in IEEE float32 here, so no input has another code.
    assert answers[name].total.moved == 0


@pytest.mark.parametrize("name", [name for name in NAMES if "bfloat16" in name])
def test_outputs_in_bfloat16_are_equal_but_for_single_roundings(name: str, answers: dict[str, Answer]) -> None:
    """A static layer's are equal to the last bit; a dynamic one multiplies in another order, and W8A16 sums in one."""
    assert answers[name].total.unequal <= (0 if "-W8A8-" in name else 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_model_computes_what_the_product_says(name: str, answers: dict[str, Answer]) -> None:
    """The runtime keeps the float tensors that its model has, and the product takes them from the file: no matter."""
    is_cut, are_sums = "-float16-" in name and "DYNAMIC" not in name, "W8A16" in name
    error = answers[name].output_error
    assert error is not None
    assert error < (OUTPUT_ERROR_SUMS if are_sums else OUTPUT_ERROR_19_BITS if is_cut else OUTPUT_ERROR)


@pytest.mark.parametrize("name", [name for name in NAMES if "TIMESTEP" in name])
def test_the_published_line_makes_the_steps_from_the_separator_on_static(name: str, answers: dict[str, Answer]) -> None:
    assert answers[name].strategies == ["dynamic", "static", "static"]


def test_scales_of_attention_are_passed_over(published: dict[str, Case], answers: dict[str, Answer]) -> None:
    """They have no reader in this version: it takes them for a type that it does not know, without a word."""
    with_scales, without = ("flux-bfloat16-W8A8_DYNAMIC-" + variant for variant in ("fa3", "plain"))
    types = json.loads(Path(published[with_scales].description).read_text())
    assert "FAQuant" in types.values()
    assert answers[with_scales].classes == answers[without].classes
