"""Say what a job would do before it starts: from its options, the model's configuration and the headers of its files.

Nothing is allocated (the model is on the meta device), no process is started, and no digest is taken. Every step is
tried by itself, so that all problems are found and not the first; what a broken step would have told is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import nn

from launcher.config.job_config import AUTO, JobConfig, Quantization
from launcher.devices.launch import Launch
from launcher.inspection.last_run import LastRun, last_run_in
from launcher.inspection.other_job import what_lies_there
from launcher.inspection.room import by_disk, require_room, still_needed
from launcher.inspection.scopes import Scope, scopes_of
from launcher.ranks.mesh import Mesh
from launcher.ranks.process_group import lay_out
from launcher.stages.evaluate import check_evaluation
from launcher.stages.online import (
    check_online,
    needs_prompts,
    reason_to_replay,
    runs_pipeline,
    takes_ranges,
    writes_dump,
)
from launcher.stages.places import check_save_path, place_of
from launcher.stages.processors import disabled_layers_of, processors, session_of
from model_adapters import load_adapter
from model_adapters.adapter import ModelAdapter
from model_adapters.memory.memory_model import MemoryModel, estimate_memory
from model_adapters.pipeline.noise_levels import steps_of
from model_adapters.pipeline.prompts import Batch, read_batches, share_of_copy
from model_adapters.weights.brought import Brought
from model_adapters.weights.model_folder import cached_folder, check_tokenizers, is_hub_id, pipeline_folder
from model_adapters.weights.transformer_folders import pipeline_files, used_folders
from model_adapters.weights.transformer_part import TransformerPart, build_empty, describe_transformer
from quant_core.attention.rotated_values import Rotations, find_rotations
from quant_core.errors import ExplainedError, InputError
from quant_core.naming import linear_names, select
from quant_core.schemes import QUANT_TYPES, SCHEMES
from quant_core.schemes.treatment import FLOAT
from quant_core.session.checks import check_outputs
from quant_core.session.config import SessionConfig
from quant_core.session.streaming import reads_activations
from quant_core.session.targets import layer_plan
from quant_core.smoothing.groups import ResolvedGroups
from quant_core.smoothing.smooth import groups_to_smooth

T = TypeVar("T")
# Tensor-parallel sizes that are tried.
_SIZES = range(1, 17)


@dataclass
class Plan:
    """What a job would do; what could not be found out is empty, and a problem says why.

    quant_type: empty for a job of images alone. batches: of this rank. What it does: calibrates, keeping the calls
    (dumps), then quantizes by replaying them (replays), from ranges taken meanwhile (is_online) or layer by layer from
    disk (streams), after measuring what to choose (measures); paints images; keeps the weights on the host (offloads);
    evaluates on so many batches of this rank, 0: on the calibration data, None: not. last: what was measured in the
    output folder.
    """

    model: str
    quant_type: str
    mesh: Mesh | None = None
    mesh_reason: str = ""
    scopes: list[Scope] = field(default_factory=list)
    smoothing: ResolvedGroups | None = None
    rotations: Rotations | None = None
    tp_sizes: list[int] = field(default_factory=list)
    layout: str = ""
    memory: MemoryModel | None = None
    calibrates: bool = False
    dumps: bool = False
    is_online: bool = False
    measures: bool = False
    replays: bool = False
    streams: bool = False
    paints: bool = False
    offloads: bool = False
    evaluates: int | None = None
    batches: int = 0
    steps: int = 0
    last: LastRun | None = None
    remarks: list[str] = field(default_factory=list)
    problems: list[ExplainedError] = field(default_factory=list)

    @property
    def linears(self) -> int:
        """Return how many linear layers the model has."""
        return sum(scope.count for scope in self.scopes)

    @property
    def quantized(self) -> int:
        """Return how many of them are quantized."""
        return sum(scope.count for scope in self.scopes if not scope.reason)

    def attempt(self, look: Callable[[], T]) -> T | None:
        """Return what `look` finds; None, and a problem more, where it raises an explained error that is new."""
        try:
            return look()
        except ExplainedError as error:
            known = {str(problem) for problem in self.problems}
            self.problems += [each for each in getattr(error, "problems", [error]) if str(each) not in known]
            return None

    def require_startable(self) -> None:
        """Raise an error of the kind that the job would end with; what is wrong stands in the plan, line by line."""
        if self.problems:
            count = len(self.problems)
            raise type(self.problems[0])(
                "the job would not start",
                where=f"plan of {self.model}: {count} problem{'s' * (count > 1)}",
                why="; ".join(problem.what for problem in self.problems),
                advice="what the plan says below each line that begins with !!",
            )


def make_plan(config: JobConfig, world: int | None = None) -> Plan:
    """Return what the job would do with that many ranks; left out: as many as one copy of the model asks for."""
    options, pipeline = config.quantization, config.pipeline
    plan = Plan(config.model, options.quant_type if options.do_quant else "", steps=pipeline.infer_steps)
    plan.paints = config.output.do_save_img
    plan.measures = options.do_quant and AUTO in (options.quant_type, options.timestep_sep)
    adapter = load_adapter(config.model)
    hardware = pipeline.hardware
    plan.offloads = hardware is not None and hardware.cpu_offload
    launch = Launch(world=world or config.ranks.tp_size or (hardware.tp_size if hardware else 1))
    if found := plan.attempt(lambda: lay_out(config, launch)):
        plan.mesh, plan.mesh_reason = found
    part = session = None
    if folder := _local_folder(plan, pipeline.path, pipeline.variant):
        pipeline = pipeline.model_copy(update={"path": str(folder)})
        part, session = _look_at_model(plan, config.model_copy(update={"pipeline": pipeline}), adapter, folder)
    reads = not plan.streams if session else _may_read_activations(options)
    runs = runs_pipeline(config, reads_activations=reads)
    if folder and runs:
        plan.attempt(lambda: check_tokenizers(folder))
        plan.steps = plan.attempt(lambda: steps_of(adapter, pipeline)) or plan.steps
    batches = _look_at_prompts(plan, config, adapter, reads_activations=reads)
    if part is not None and (session is not None or not options.do_quant):
        sizes = {"batches": max(1, plan.batches), "evaluates": plan.evaluates is not None, "encodes": runs}
        stepping = pipeline.model_copy(update={"infer_steps": plan.steps})
        plan.memory = plan.attempt(lambda: estimate_memory(adapter, part, stepping, session, **sizes))
    plan.attempt(lambda: check_save_path(config))
    if options.do_quant:
        _look_at_disk(plan, config)
        lies = plan.attempt(
            lambda: what_lies_there(
                config,
                adapter,
                plan.mesh,
                batches if session else None,
                online=plan.is_online,
                ranks_are_said=world is not None,
            )
        )
        plan.remarks += [lies] if lies else []
        if weights := config.output.quant_weight_save_folder:
            plan.last = last_run_in(weights, config)
    return plan


def _local_folder(plan: Plan, path: str, variant: str | None) -> Path | None:
    """Return the model's folder; of one on the hub what was fetched before, as nothing is fetched for a plan."""
    if not is_hub_id(path):
        return plan.attempt(lambda: pipeline_folder(path))
    folder = cached_folder(path)
    with suppress(InputError):
        if folder and pipeline_files(folder, Brought(variant=variant)):
            return folder
    plan.remarks.append(f"{path} is not on this machine: the job fetches it; what follows from its files is left out")
    return None


def _may_read_activations(options: Quantization) -> bool:
    """Tell of a model that is not here whether quantizing it may need calibration data."""
    if options.smoothing_method is not None or QUANT_TYPES[options.main_type].with_attention:
        return True
    return any(scheme.observes_input for scheme in options.schemes)


def _look_at_prompts(
    plan: Plan, config: JobConfig, adapter: ModelAdapter, *, reads_activations: bool
) -> list[Batch] | None:
    """Find out how much the pipeline runs, if at all, and return the batches of all copies."""
    needed = needs_prompts(config, reads_activations=reads_activations)
    batches = plan.attempt(lambda: read_batches(config.pipeline, are_needed=needed))
    copies = plan.mesh.dp_size if plan.mesh else 1
    if batches and (share := plan.attempt(lambda: share_of_copy(batches, copies, 0, where=f"{copies} copies"))):
        plan.batches = len(share)
    pictures = plan.attempt(lambda: check_evaluation(config, adapter))
    if config.evaluation.evaluate is not None and pictures is not None:
        plan.evaluates = len(pictures[::copies])
    return batches


def _look_at_model(
    plan: Plan, config: JobConfig, adapter: ModelAdapter, folder: Path
) -> tuple[TransformerPart | None, SessionConfig | None]:
    """Find out what the model's configuration and headers tell: scope, shards, smoothing.

    Returns a rank's part of the model and the quantizer's session, as far as there are any.
    """
    tp_size = plan.mesh.tp_size if plan.mesh else 1
    shard_plan = plan.attempt(lambda: adapter.shard_plan(config.ranks.layout))
    whole = plan.attempt(lambda: build_empty(adapter, used_folders(folder)[0]))
    if shard_plan is None or whole is None:
        return None, None
    plan.layout = shard_plan.name
    plan.tp_sizes = shard_plan.sizes_that_divide(whole, _SIZES)
    names = linear_names(whole)
    part = plan.attempt(lambda: _describe(config, adapter, tp_size, empty=whole))
    if part is None and tp_size in plan.tp_sizes:
        part = plan.attempt(lambda: _describe(config, adapter, tp_size, with_files=False))
        if part is not None:
            plan.remarks.append("shards and bytes are told by config.json alone: the weights were not looked at")
    if not config.quantization.do_quant:
        return part, None
    return part, _look_at_layers(plan, config, adapter, part, part.model if part else whole, names)


def _describe(
    config: JobConfig, adapter: ModelAdapter, tp_size: int, *, with_files: bool = True, empty: nn.Module | None = None
) -> TransformerPart:
    part = describe_transformer(
        adapter,
        config.pipeline.path,
        tp_size=tp_size,
        layout=config.ranks.layout,
        dtype=adapter.dtype(config.pipeline),
        brought=Brought.of(config.pipeline),
        with_files=with_files,
        empty=empty,
    )
    adapter.check_options(getattr(part.model, "config"), config.pipeline)  # noqa: B009, a Module has none
    return part


def _look_at_layers(
    plan: Plan,
    config: JobConfig,
    adapter: ModelAdapter,
    part: TransformerPart | None,
    model: nn.Module,
    names: Sequence[str],
) -> SessionConfig | None:
    """Find out which layer gets which scheme, and what the quantizer would refuse; return its session."""
    options = config.quantization
    asked = disabled_layers_of(options, adapter)
    disabled = [p for p in asked if plan.attempt(lambda p=p: select(names, p, where="--disable_names"))]
    session = plan.attempt(lambda: session_of(processors(options, disabled), options, []))
    layers = session and plan.attempt(lambda: layer_plan(model, session))
    if session is None or layers is None:
        return None
    schemes = {name: SCHEMES[chosen.key] for name, chosen in layers.items()}
    types = {name: options.quant_type if options.is_auto else scheme.quant_type for name, scheme in schemes.items()}
    rules = {p: f"--layer_schemes {p}=float" for p, chosen in session.layer_schemes.items() if chosen == FLOAT}
    plan.scopes = scopes_of(model, types, rules | {p: f"--disable_names {p}" for p in disabled if p not in rules}, part)
    plan.attempt(lambda: check_outputs(model, schemes))
    reads = reads_activations(model, session)
    plan.attempt(lambda: check_online(config, session, reads_activations=reads))
    plan.is_online = takes_ranges(config, session, reads_activations=reads)
    plan.replays, plan.streams = reads and not plan.is_online, not reads
    plan.dumps = writes_dump(config, reads_activations=reads)
    plan.calibrates = plan.dumps or plan.is_online
    if config.output.calibrate == "online" and plan.replays:
        plan.remarks.append(f"--calibrate online replays all the same: {reason_to_replay(config, session)}")
    if options.is_auto:
        plan.remarks.append(f"layers are chosen by measurement: bytes are those of {options.main_type} in all of them")
    if (smoothing := session.smoothing) is not None:
        plan.smoothing = plan.attempt(
            lambda: groups_to_smooth(model, smoothing, structure=adapter.structure, targets=layers)
        )
    if session.rotate_values:
        plan.rotations = plan.attempt(lambda: find_rotations(model, adapter.structure, targets=layers))
    return session


def _look_at_disk(plan: Plan, config: JobConfig) -> None:
    """Compare what the files will take with what is free."""
    output, memory = config.output, plan.memory
    sizes: dict[str, int] = {"quant_weight_save_folder": 0, "quant_dump_calib_folder": 0}
    if memory is not None and plan.mesh is not None:
        sizes["quant_weight_save_folder"] = memory.quantized * plan.mesh.tp_size
        sizes["quant_dump_calib_folder"] = memory.dump * plan.mesh.world if plan.dumps else 0
    needed: list[tuple[Path, int]] = []
    for name, size in sizes.items():
        folder = getattr(output, name)
        if place := plan.attempt(lambda folder=folder, name=name: place_of(folder, f"--{name}")):
            needed.append((place, size if output.resume == "never" else still_needed(folder, size)))
    for disk in by_disk(needed):
        plan.attempt(lambda disk=disk: require_room(disk))
