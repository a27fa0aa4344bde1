"""What README says about loading a checkpoint in MindIE-SD is run, on what a job published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.make_tiny_pipeline import write_prompts
from tests.runtime.cases import described_classes
from tests.support.tiny_job import STEPS, run_job
from tests.support.torchrun import ROOT

pytestmark = pytest.mark.distributed

_BEGIN = """
import sys
from pathlib import Path
from launcher.runtime.importing import import_quantization
from launcher.runtime.npu_operators import install

install()
import_quantization(Path(sys.argv[1]))
"""
_END = """
import json
import numpy as np
from launcher.runtime.agreement import replaced
told = {name: type(layer).__name__ for name, layer in replaced(pipeline.transformer).items()}
print(json.dumps({"layers": told, "size": image.size, "spread": float(np.asarray(image).std())}))
"""


def block() -> str:
    """Return the program of the section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Loading it in MindIE-SD")[2]
    return section.partition("```python\n")[2].partition("```")[0]


def test_the_program_that_loads_a_checkpoint_runs_and_paints(packages: Path, tiny_flux_folder: Path, tmp_path: Path):
    flags = ("--quant_type", "w8a8_timestep")
    said = run_job(1, "flux", tiny_flux_folder, write_prompts(tmp_path / "prompts.txt"), tmp_path, *flags).stdout
    source = block()
    changes = {
        "FLUX.1-dev": str(tiny_flux_folder),
        "results/safetensors": str(tmp_path / "weights"),
        "range(25, 50)": f"range({STEPS // 2}, {STEPS})",
        "num_inference_steps=50": f"num_inference_steps={STEPS}, width=64, height=64",
    }
    for pattern, ours in changes.items():
        assert pattern in source
        source = source.replace(pattern, ours)
    [line] = [line for line in source.splitlines() if line.startswith("policy.register")]
    assert line in said  # it is what the job printed
    ran = subprocess.run(
        [sys.executable, "-c", _BEGIN + source + _END, packages],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["layers"] == described_classes(tmp_path / "weights" / "quant_model_description_w8a8_timestep.json")
    assert told["size"] == [64, 64]
    assert told["spread"] > 0
