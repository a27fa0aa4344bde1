"""Every command and every block of code in the READMEs and in the reference tool's documents is known to work.

What needs neither hardware nor network runs. Of the rest the words go through the parser that would read them; `PARSED`
and `NOT_OURS` say why. A command or a block that no row knows fails.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from diffusers import FluxPipeline
from torch.distributed.run import get_args_parser

from launcher.cli.command_line import parse
from launcher.start.supervisor_flags import job_on_ranks, split_at_command
from quant_core import TimestepManager
from tests.support.reference_names import published
from tests.support.torchrun import ROOT

REFERENCE = ROOT / "tests" / "data" / "reference_documents"
DOCUMENTS = (ROOT / "README.md", ROOT / "README.zh.md", REFERENCE / "flux.md", REFERENCE / "sd3.md")
STARTS = ("python ", "torchrun ", "sh ", "pip ", "sbatch ", "kubectl ", "source ", "make ", "srun ")

_MODEL, _FOLDERS = "they load a model of a person's own", "they read the folders of a person's own jobs"
_HOURS = "they take minutes to hours; their tests run what they are made of"
# Read by their own parser and not run: the first words of a command, and why.
PARSED = {
    "python -m launcher doctor": "it would end with what this machine lacks",
    "python -m launcher recipes": "tests/launcher/test_recipes.py runs it",
    **dict.fromkeys(("python -m launcher plan", "torchrun", "python -m launcher --nproc_per_node"), _MODEL),
    **dict.fromkeys(("python -m launcher flux", "python /the/absolute/path", "--quant_type"), _MODEL),
    **dict.fromkeys((f"python -m launcher {name}" for name in ("trace", "verify", "evaluate", "report")), _FOLDERS),
    **dict.fromkeys((f"python -m launcher {name}" for name in ("diff", "restep", "merge")), _FOLDERS),
    **dict.fromkeys((f"python scripts/{name}" for name in ("bench", "study", "choices", "fault_matrix.py")), _HOURS),
    **dict.fromkeys((f"python scripts/{name}.py" for name in ("compare_estimators", "compare_online")), _HOURS),
    "python scripts/rotation_table.py": _HOURS,
    "sh scripts/demo.sh": "it installs, from the network; its command is read",
    "sh scripts/run_tests.sh": "it installs, and runs this test",
}
# Read by nothing of ours: a block of text or a foreign program, by its first words.
NOT_OURS = {
    "<quant_dump_calib_folder>": "names of files; tests of jobs look for them",
    "launcher/": "the folders of the product; lint-imports holds the code to them",
    "source set_env.sh": "CANN's own",
    "pip install -e": "the network; tests/launcher/test_npu.py compares the extras",
    "python -m pytest tests/cuda": "a card",
    "kubectl create": "a cluster; tests/scripts/test_kubernetes.py reads the files",
}
# What a person puts in place of a name, and what a command needs beside what the document says.
PLACES = {"OUT": "out", "A": "a", "B": "b", "MODEL": "model", "N": "2", "${model_path}": "model"}
JOB = "--path m --do_quant --quant_weight_save_folder w --quant_dump_calib_folder c"
NEEDED = {"flux": JOB, "plan flux": JOB, "restep": "--infer_steps 8"}


def blocks(text: str, *, fenced: bool) -> list[str]:
    """Return the blocks of code that are fenced, with their language in front, or else indented."""
    if fenced:
        return re.findall(r"^```(\w+\n.*?)^```$", text, re.M | re.S)
    outside = re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.M | re.S)
    found = re.findall(r"(?<=\n)\n((?:    .*\n|\n(?=    ))+)", outside)
    return [re.sub(r"^    ", "", block, flags=re.M).strip() for block in found]


def commands(text: str) -> Iterator[str]:
    """Yield each command, its comment and the line breaks left out; of a block that holds none, the first line."""
    shell = [block.partition("\n")[2] for block in blocks(text, fenced=True) if block.startswith("shell")]
    for block in [*shell, *blocks(text, fenced=False)]:
        lines = re.sub(r"\\\n *", "", block).splitlines()
        found = [re.split(r" {4,}| +#", line)[0] for line in lines if line.startswith((*STARTS, "--"))]
        yield from found or [lines[0].split()[0]]
    for code in re.findall(r"`([^`\n]+)`", text):
        if code.startswith(STARTS):
            yield code


ALL = sorted({command for document in DOCUMENTS for command in commands(document.read_text(encoding="utf-8"))})


def row(command: str, table: dict[str, str]) -> str | None:
    """Return the words in front of a command that a table knows, the longest."""
    return max((known for known in table if command.startswith(known)), key=len, default=None)


@pytest.mark.parametrize("command", ALL)
def test_a_command_of_a_document_is_read_by_what_would_run_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if row(command, NOT_OURS):
        return
    assert row(command, PARSED), "a command without a row: let it run, or say in a table why it does not"
    words = [PLACES.get(word, word) for word in shlex.split(command)]
    if words[0] == "sh":
        assert subprocess.run(["sh", "-n", ROOT / words[1]], check=False).returncode == 0
        script = (ROOT / words[1]).read_text().replace("\\\n", " ")
        for line in re.findall(r"torchrun .*-m launcher .*", script):
            read(shlex.split(line), monkeypatch)
    else:
        read(words, monkeypatch)


def read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the words of a command through its parser; an error of it is this test's."""
    program, *words = words
    if program == "torchrun":
        asked = get_args_parser().parse_args(words)
        assert (asked.module, asked.training_script) == (True, "launcher")
        read(["python", "-m", "launcher", *asked.training_script_args], monkeypatch)
    elif program.startswith("--"):
        parse(["flux", *JOB.split(), program, *words])
    elif words[:2] == ["-m", "launcher"]:
        before, rest = split_at_command(words[2:])
        if "--help" in rest:
            with pytest.raises(SystemExit, match="0"):
                parse(rest)
            return
        if rest[-1] == "…":
            needed = next(flags for name, flags in NEEDED.items() if " ".join(rest).startswith(name))
            rest = [*rest[:-1], *needed.split()]
        (job_on_ranks if before else parse)(rest)
    else:
        script = Path(words[0])
        if script.is_absolute():  # the reference tool's; ours has its name
            script = Path("scripts", script.name)
        read_by_argparse(ROOT / script, words[1:], monkeypatch)


class Accepted(Exception):
    """Raised where a script has read its words and would begin."""


def read_by_argparse(script: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script, up to where its own parser has read the words."""
    if script.name in ("inference_flux.py", "sd3_inference.py"):  # their parser is the launcher's
        parse(["flux" if "flux" in script.name else "sd3", *words])
        return
    original = argparse.ArgumentParser.parse_args

    def and_stop(self: argparse.ArgumentParser, *args: Any) -> NoReturn:
        original(self, *args)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", and_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    with pytest.raises(Accepted):
        runpy.run_path(str(script), run_name="__main__")


def test_every_row_is_about_a_command_that_a_document_has() -> None:
    used = {row(command, table) for command in ALL for table in (PARSED, NOT_OURS)}
    assert {*PARSED, *NOT_OURS} - used == set()


def test_both_languages_show_the_same_commands_and_code() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in DOCUMENTS[:2])
    assert set(commands(english)) == set(commands(chinese))
    assert blocks(english, fenced=True) == blocks(chinese, fenced=True)


# What a document's program has that is not here: the modules of the reference tool, the device, the pipeline and its
# call, which the documents abridge. SD3's calls a name that is not there.
CHANGES = (
    (r"from [\w.]+ import (?=quant_model|safe|get_|W8A8|FA3|M3|Timestep)", "from quant_core import "),
    (r"f'npu:[^']*'|'npu'", "'cpu'"),
    (r"(def load_pipeline\(\):\n    )pass", r"\1return given"),
    (r"load_pipeline\(\.\.\.\)", "load_pipeline()"),
    (r"\"/path/to/[\w-]+\"", "folder"),
    (r"num_inference_steps=(\d+)", "num_inference_steps=2, width=64, height=64, callback_on_step_end=next_step"),
    (r"    pipe\(\n        prompts", "    pipeline(\n        prompt"),
    (r"negative_prompts", "negative_prompt"),
    (r"(?<=,\n)        \.\.\.\n", ""),
    (r"results/quant/cache'", "cache'"),
)
PROGRAMS = {
    f"{path.stem}, block {index}": block.partition("\n")[2]
    for path in (DOCUMENTS[0], *DOCUMENTS[2:])
    for index, block in enumerate(blocks(path.read_text(encoding="utf-8"), fenced=True))
    if block.startswith("python") and "mindiesd" not in block  # tests/runtime/test_readme.py runs that
}
# What each makes: the name of the checkpoint and whether it has scales of attention; None: a part of a loop.
MAKES = {
    "README, block 0": ("safetensors", "w8a8"),
    "flux, block 0": None,
    "flux, block 1": None,
    "flux, block 3": ("results/quant/safe_tensor", "w8a8_timestep"),
    "flux, block 5": ("results/quant/safe_tensor", "w8a8_dynamic"),
    "flux, block 7": ("results/quant/safe_tensor", "w8a8_dynamic"),
    "sd3, block 1": ("results/quant/safe_tensor", "w8a8"),
}


def next_step(pipeline: object, step: int, time: object, tensors: dict[str, Any]) -> dict[str, Any]:
    """Say which step comes, as the documents have a pipeline's loop say it."""
    TimestepManager.set_timestep_idx(step + 1)
    return tensors


@pytest.fixture
def no_step() -> Iterator[None]:
    """Leave the process as it was: a program's loop ends in its last step."""
    TimestepManager.set_timestep_idx(0)
    yield
    TimestepManager.set_timestep_idx(None)


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_a_document_runs(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    makes, source = MAKES[name], PROGRAMS[name]
    for pattern, by in CHANGES:
        source = re.sub(pattern, by, source)
    folder = request.getfixturevalue(f"tiny_{'sd3' if name.startswith('sd3') else 'flux'}_folder")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"folder": folder, "next_step": next_step}
    names["args"] = SimpleNamespace(width=64, height=64, infer_steps=2)
    if makes is None:
        loop = SimpleNamespace(progress_bar=lambda total: nullcontext(), interrupt=False)
        names |= {"self": loop, "timesteps": torch.arange(3), "num_inference_steps": 3, "latents": torch.zeros(1)}
        exec(source, names | {"pipeline": lambda _: None})
        assert TimestepManager.get_timestep_idx() == 2
        return
    if name.startswith("README") or "given" in source:
        names["given"] = names["pipeline"] = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    exec(source, names)
    first = published(tmp_path / makes[0], makes[1])
    assert first.inventory.layers
    assert bool(first.inventory.attentions) == ("FA3ProcessorConfig()" in source)
    if name.startswith("README"):
        return
    before = first.files.weights.read_bytes()
    monkeypatch.setattr("quant_core.DumperManager", None)  # now the dump is there and the pipeline does not run
    if "given" in names:
        names["given"] = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    exec(source, names)
    assert first.files.weights.read_bytes() == before
