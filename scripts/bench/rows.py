"""What is measured: a row for each job, with what it needs, its command, and the command of its floor.

Words of commands may hold {folder}, {prompts}, {out} and {device}: the row's pipeline, the prompt file, a new folder,
the kind of device that both compute on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.bench.cost import python

Command = Sequence[str]


@dataclass(frozen=True)
class Row:
    """A job beside its floor.

    group: by which a person chooses it. pipeline: name of the folder it needs (`PIPELINES`), none for work in memory.
    prompts: how many it reads. is_static: it holds the model while it calibrates and quantizes. variant: of
    the work in memory that it is.
    """

    group: str
    name: str
    ours: Command
    floor: Command
    pipeline: str | None = None
    prompts: int = 1
    model: str = ""
    flags: Sequence[str] = ()
    is_static: bool = False
    variant: str = ""


def _tiny(folder: Path) -> None:
    from scripts.make_tiny_pipeline import make_tiny_pipeline

    make_tiny_pipeline("flux", folder)


def _full(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from scripts.make_full_size_pipeline import KINDS, make_full_size

        make_full_size(folder, KINDS[kind].config, kind=kind)

    return make


# name -> makes the pipeline in a new folder
PIPELINES: dict[str, Callable[[Path], None]] = {
    "flux-tiny": _tiny,
    "sd3-full": _full("sd3"),
    "flux-full": _full("flux"),
}

_PATH_FLAG = {"flux": "--path", "sd3": "--sd3_model_path"}
_KEPT_FLOAT = {"flux": "*net.2*", "sd3": "context_embedder*"}
_STREAMED = ("--quant_type", "w8a8_dynamic", "--calibrate", "needed")
_TWO_CARDS, _ONE_CARD = ("--device_type", "A2-32g-dual"), ("--device_type", "A2-64g")


def _launcher(ranks: int, model: str, *flags: str) -> Command:
    return [
        *python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
        *("-m", "launcher", model, _PATH_FLAG[model], "{folder}", "--prompt_path", "{prompts}", "--device", "{device}"),
        *("--do_quant", "--quant_weight_save_folder", "{out}/weights", "--quant_dump_calib_folder", "{out}/dumps"),
        *flags,
    ]


def _floor_from_disk(kind: str, model: str, *flags: str) -> Command:
    words = (kind, "{folder}", "{out}", "--keep_float", _KEPT_FLOAT[model], "--device", "{device}")
    return python("-m", "scripts.bench.from_disk", *words, *flags)


def _stream(name: str, pipeline: str, ranks: int, *flags: str) -> Row:
    model = pipeline.partition("-")[0]
    floor = _floor_from_disk("stream", model)
    return Row(model, name, _launcher(ranks, model, *_STREAMED, *flags), floor, pipeline, model=model, flags=flags)


def _calibrated(group: str, name: str, pipeline: str, prompts: int, side: int, steps: int, *flags: str) -> Row:
    """Return the row of a job on two ranks that runs the pipeline.

    In bfloat16 also where the model is float16: processors compute it, and emulate the other.
    """
    model = pipeline.partition("-")[0]
    size = ("--width", str(side), "--height", str(side), "--dtype", "bfloat16")
    flags = (*size, "--infer_steps", str(steps), *flags)
    floor = _floor_from_disk("pipeline", model, "--prompts", "{prompts}", *size, "--num_inference_steps", str(steps))
    return Row(group, name, _launcher(2, model, *flags), floor, pipeline, prompts, model, flags)


def _static(name: str, *flags: str) -> Row:
    row = _calibrated("sd3", name, "sd3-full", 1, 64, 2, "--quant_type", "w8a8", *flags)
    return replace(row, is_static=True)


def _memory(name: str, variant: str, *flags: str) -> Row:
    command = ("-m", "scripts.bench.in_memory")
    words = (variant, "{out}", "--device", "{device}", *flags)
    return Row("memory", name, python(*command, "job", *words), python(*command, "floor", *words), variant=variant)


ROWS: tuple[Row, ...] = (
    _calibrated("tiny", "tiny FLUX, dynamic, 2 ranks", "flux-tiny", 4, 64, 4, *_TWO_CARDS, *_STREAMED[:2]),
    _memory("0.42 B in memory, dynamic", "dynamic"),
    _memory("0.42 B in memory, static", "static"),
    _memory("0.42 B in memory, timestep", "timestep"),
    _memory("0.42 B in memory, dynamic + m4", "m4"),
    _memory("0.42 B in memory, dynamic + m3", "m3"),
    _memory("0.42 B in memory, dynamic + m6, searched", "m6"),
    _memory("0.42 B in memory, dynamic + FA3", "fa3"),
    _stream("SD3-medium dimensions, dynamic, 1 rank", "sd3-full", 1),
    _stream("SD3-medium dimensions, dynamic, 2 ranks", "sd3-full", 2),
    _static("SD3-medium dimensions, static, 2 ranks"),
    _static("the same, online", "--calibrate", "online"),
    _stream("FLUX.1-dev dimensions, dynamic, 1 rank", "flux-full", 1, *_ONE_CARD),
    _stream("FLUX.1-dev dimensions, dynamic, 2 ranks, first time", "flux-full", 2, *_TWO_CARDS),
    _stream("the same, model known by sizes and times", "flux-full", 2, *_TWO_CARDS, "--fingerprint", "stat"),
)
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))

# A quarter of a second of work, to see that measuring works.
SMOKE = _memory("6 M in memory, dynamic", "dynamic", "--tiny")
