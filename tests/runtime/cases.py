"""What a worker process is asked, and how it answers: several cases each, because starting one takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher.runtime.agreement import Agreement
from tests.runtime.product import run_forked

WORKER = Path(__file__).with_name("runtime_worker.py")
_TIMEOUT_S = 200
# The class that the runtime puts in the place of a linear layer, by the layer's type.
_CLASSES = {
    "W8A8": "W8A8QuantLinear",
    "W8A8_DYNAMIC": "W8A8QuantLinear",
    "W8A8_TIMESTEP": "W8A8TimeStepQuantLinear",
    "W8A16": "WeightQuantLinear",
}


@dataclass(frozen=True)
class Case:
    """Load one checkpoint with the real runtime and compare it layer by layer.

    description: the file to load. dtype: of the model and of the run, "bfloat16" or "float16". kind: the transformer,
    a tiny one, or this rank's part of the one in `pipeline`. published: for each type of layer the folder with the
    checkpoint that the product wrote, which says what layers of that type compute. registration: the line that
    declares the static steps. use_nz: keep weights in the NPU's own layout.
    """

    description: str
    dtype: str
    kind: str
    published: Mapping[str, str]
    pipeline: str | None = None
    registration: str | None = None
    use_nz: bool = False


@dataclass(frozen=True)
class Answer:
    """What one rank found in one case; `error` is what was raised, if anything was.

    classes: the class of each module that was replaced, by name. layers: by name, an agreement for each step (one,
    without steps). biases: the layers that have one. strategies: of each step, as the runtime says. output_error: of
    the whole model, relative, the largest of all steps; only where one file made the model.
    """

    error: str = ""
    classes: dict[str, str] = field(default_factory=dict)
    layers: dict[str, list[Agreement]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    output_error: float | None = None

    @property
    def disagreeing(self) -> list[str]:
        """Return the layers with an output beyond its bound, or one that is no number."""
        return [name for name, steps in self.layers.items() if not all(step.excess <= 1 for step in steps)]

    @property
    def total(self) -> Agreement:
        """Return the largest excess and the sums of the counts over all layers and steps."""
        steps = [step for steps in self.layers.values() for step in steps]
        excess, *counts = zip(*steps)
        return Agreement(max(excess), *map(sum, counts))


def described_classes(path: Path) -> dict[str, str]:
    """Return the class of each layer that a description calls quantized, by its name in the float model."""
    description = json.loads(path.read_text())
    found = {}
    for key, quant_type in description.items():
        name = key.removesuffix(".weight")
        if name != key and quant_type in _CLASSES:
            outer = name.removesuffix(".linear")
            found[outer if f"{outer}.div.mul_scale" in description else name] = _CLASSES[quant_type]
    return found


def run_cases(cases: Mapping[str, Case], packages: Path, folder: Path, *, ranks: int = 1) -> list[dict[str, Answer]]:
    """Run all cases in one process, or in each of several ranks, and return each rank's answers by name."""
    request = folder / "request.json"
    request.write_text(json.dumps({name: asdict(case) for name, case in cases.items()}))
    words = [str(WORKER), str(packages), str(request), str(folder)]
    finished = run_forked(ranks, *words, timeout_s=_TIMEOUT_S)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [_answers(folder / f"answers_{rank}.json") for rank in range(ranks)]


def _answers(path: Path) -> dict[str, Answer]:
    found = json.loads(path.read_text())
    for answer in found.values():
        answer["layers"] = {name: [Agreement(*step) for step in steps] for name, steps in answer["layers"].items()}
    return {name: Answer(**answer) for name, answer in found.items()}
