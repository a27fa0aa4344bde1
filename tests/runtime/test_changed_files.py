"""What the real MindIE-SD makes of files that are not as the product publishes them, or loaded in another way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.runtime.cases import Answer, Case, described_classes, run_cases
from tests.runtime.files import Change, changed_copy, mixed
from tests.runtime.product import SCHEMES, STEPS, files_in, publish, registration_line, variants_of

DTYPES = ("bfloat16", "float16")
LAYER = "transformer_blocks.0.attn.to_q"
LINE = registration_line(STEPS)


def three_percent(name: str, index: int) -> Change:
    """Change one number of one tensor of the layer; the steps of a bfloat16 are 0.4 to 0.8 % wide."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{name}"].view(-1)[index] *= 1.03

    return change


def one_channel(tensors: dict[str, Tensor]) -> None:
    """Change one of 96 factors: a few percent of what the layer adds up."""
    tensors[f"{LAYER}.div.mul_scale"][3] *= 1.5


# Which published files are changed, and how.
CHANGES: dict[str, tuple[str, str, Change]] = {
    "weight_scale of a dynamic layer": ("W8A8_DYNAMIC", "plain", three_percent("weight_scale", 7)),
    "input_scale of a static layer": ("W8A8", "plain", three_percent("input_scale", 0)),
    "deq_scale of a static layer": ("W8A8", "plain", three_percent("deq_scale", 7)),
    "deq_scale of the last step": ("W8A8_TIMESTEP", "plain", three_percent("deq_scale", -5)),
    "mul_scale of a smoothed layer": ("W8A8_DYNAMIC", "m4", one_channel),
}
# What a mixed file is made of: smoothed and other layers beside each other.
MIXED = {"W8A8": "m4", "W8A8_TIMESTEP": "m4", "W8A8_DYNAMIC": "plain", "W8A16": "plain"}
# The product's own mix, in a smoothed session: a scheme for each kind of layer.
LAYER_SCHEMES = {
    "*.to_[qk]": "w8a8_dynamic",
    "*.norm*.linear": "w8a16",
    "*.to_add_out": "w8a16",
    "single_*": "w8a8_timestep",
    "*.net.2": "float",
}


@pytest.fixture(scope="module")
def folder(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every published checkpoint that the cases start from, each in a folder of its own."""
    made = tmp_path_factory.mktemp("published")
    for dtype in DTYPES:
        for quant_type in SCHEMES:
            for variant in variants_of(quant_type, "plain", "m4"):
                publish("flux", quant_type, getattr(torch, dtype), made / dtype / quant_type / variant, variant)
    return made


def changed_cases(folder: Path) -> dict[str, Case]:
    cases = {}
    for name, (quant_type, variant, change) in CHANGES.items():
        published = folder / "bfloat16" / quant_type / variant
        description = changed_copy(files_in(published, quant_type), folder / name, change)
        cases[name] = Case(str(description), "bfloat16", "flux", {quant_type: str(published)}, registration=LINE)
    static, other = folder / "bfloat16" / "W8A8" / "plain", folder / "another float"
    # Here the product reads the copy too, and takes the changed tensor from it.
    description = changed_copy(files_in(static, "W8A8"), other, lambda tensors: tensors["proj_out.weight"].mul_(1.1))
    cases["a float tensor"] = Case(str(description), "bfloat16", "flux", {"W8A8": str(other)})
    return cases


def mixed_cases(folder: Path) -> dict[str, Case]:
    cases = {}
    for dtype in DTYPES:
        published = {quant_type: folder / dtype / quant_type / variant for quant_type, variant in MIXED.items()}
        files = {quant_type: files_in(source, quant_type) for quant_type, source in published.items()}
        description = mixed(files, folder / dtype / "mixed")
        sources = {quant_type: str(source) for quant_type, source in published.items()}
        cases[f"mixed {dtype}"] = Case(str(description), dtype, "flux", sources, registration=LINE)
    return cases


def product_cases(folder: Path) -> dict[str, Case]:
    cases = {}
    for dtype in DTYPES:
        made = publish("flux", "W8A8", getattr(torch, dtype), folder / dtype / "layer schemes", "m4", LAYER_SCHEMES)
        description = str(files_in(made, "W8A8").description)
        cases[f"layer schemes {dtype}"] = Case(description, dtype, "flux", {"W8A8": str(made)}, registration=LINE)
    return cases


def other_cases(folder: Path) -> dict[str, Case]:
    """Load published files, as they are, in ways that the product does not ask for."""

    def case(made_in: str, quant_type: str, dtype: str, *, use_nz: bool = False) -> Case:
        published = folder / made_in / quant_type / "plain"
        description = files_in(published, quant_type).description
        return Case(str(description), dtype, "flux", {quant_type: str(published)}, use_nz=use_nz)

    return {
        "nothing registered": case("bfloat16", "W8A8_TIMESTEP", "bfloat16"),
        "use_nz": case("bfloat16", "W8A8_DYNAMIC", "bfloat16", use_nz=True),
        "float16 files in a bfloat16 run": case("float16", "W8A8", "bfloat16"),
        "bfloat16 files in a float16 run": case("bfloat16", "W8A8", "float16"),
    }


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Case]:
    return changed_cases(folder) | mixed_cases(folder) | product_cases(folder) | other_cases(folder)


@pytest.fixture(scope="module")
def answers(cases: dict[str, Case], packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return run_cases(cases, packages, tmp_path_factory.mktemp("answers"))[0]


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_scale_is_found_in_its_layer_and_no_other(name: str, answers: dict[str, Answer]) -> None:
    assert answers[name].error == ""
    assert answers[name].disagreeing == [LAYER]


def test_a_changed_float_tensor_shows_in_the_whole_output_only(answers: dict[str, Answer]) -> None:
    """The runtime never loads it, so its model computes with the old one."""
    assert answers["a float tensor"].disagreeing == []
    error = answers["a float tensor"].output_error
    assert error is not None
    assert error > 0.05  # the last layer's weight was made larger by a tenth


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_every_type_stand_in_one_file_and_compute_as_if_alone(
    dtype: str, cases: dict[str, Case], answers: dict[str, Answer]
) -> None:
    answer = answers[f"mixed {dtype}"]
    assert answer.error == ""
    assert answer.classes == described_classes(Path(cases[f"mixed {dtype}"].description))
    assert set(answer.classes.values()) == {"W8A8QuantLinear", "W8A8TimeStepQuantLinear", "WeightQuantLinear"}
    assert answer.disagreeing == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_own_mix_is_loaded_layer_by_layer_and_computes_what_it_says(
    dtype: str, cases: dict[str, Case], answers: dict[str, Answer]
) -> None:
    answer = answers[f"layer schemes {dtype}"]
    assert answer.error == ""
    assert answer.classes == described_classes(Path(cases[f"layer schemes {dtype}"].description))
    # All linear layers of the tiny FLUX but the two net.2 and the last one, which stay float.
    assert Counter(answer.classes.values()) == {
        "W8A8QuantLinear": 20,
        "W8A8TimeStepQuantLinear": 3,
        "WeightQuantLinear": 4,
    }
    assert answer.disagreeing == []
    assert answer.output_error is not None
    assert answer.output_error < (0.005 if dtype == "bfloat16" else 0.03)  # as for one scheme alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_with_weights_alone_computes_the_formula(dtype: str, answers: dict[str, Answer]) -> None:
    answer = answers[f"mixed {dtype}"]
    layers = [name for name, found in answer.classes.items() if found == "WeightQuantLinear"]
    assert len(layers) > 3
    assert set(layers) <= set(answer.biases)
    assert all(step.excess <= 1 for name in layers for step in answer.layers[name])


def test_without_the_line_every_step_runs_dynamic_and_the_static_ones_disagree(answers: dict[str, Answer]) -> None:
    answer = answers["nothing registered"]
    assert answer.strategies == ["dynamic"] * STEPS
    excess = [[step.excess > 1 for step in steps] for steps in answer.layers.values()]
    assert excess == [[False, True, True]] * len(answer.layers)


def test_the_layout_of_the_npu_changes_no_number(answers: dict[str, Answer]) -> None:
    assert answers["use_nz"].error == ""
    assert answers["use_nz"].disagreeing == []


def test_static_files_of_a_float16_model_load_and_cannot_run_in_bfloat16(answers: dict[str, Answer]) -> None:
    error = answers["float16 files in a bfloat16 run"].error
    assert "no kernel for output torch.bfloat16, scale torch.int64" in error


def test_static_files_of_a_bfloat16_model_run_in_float16_too(answers: dict[str, Answer]) -> None:
    """Their scale is converted, and loses the same bits as one that was stored for float16."""
    assert answers["bfloat16 files in a float16 run"].error == ""
    assert answers["bfloat16 files in a float16 run"].disagreeing == []
