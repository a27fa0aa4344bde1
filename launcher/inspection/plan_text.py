"""A plan as lines for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from launcher.inspection.last_run import LastRun
from launcher.inspection.plan import Plan
from launcher.journal.console import format_seconds
from launcher.ranks.mesh import Mesh
from model_adapters.memory.memory_model import MemoryModel

_ALIKE = "  that job had the same options, as far as they matter to time and memory"
_MIB, _GIB = 2**20, 2**30
# What a process takes on the host before it holds a tensor: Python, torch, diffusers; with a card its driver's
# libraries too, as measured with CUDA 13 on an H100.
_PROCESS, _PROCESS_WITH_CARD = round(0.4 * _GIB), round(2.1 * _GIB)


def told(plan: Plan, device: str) -> Iterator[str]:
    """Yield the lines; device: the kind that the job computes on."""
    yield f"plan of {plan.model}, {plan.quant_type or 'images of the float model'}"
    if plan.mesh is not None:
        yield f"ranks: {plan.mesh}"
        yield from (f"  {line}" for line in plan.mesh_reason.splitlines())
    if plan.scopes:
        yield from _scope(plan)
    if plan.layout:
        sizes = ", ".join(map(str, plan.tp_sizes))
        yield f"layout {plan.layout}: tensor-parallel sizes that divide the model (of 1 to 16): {sizes}"
    if plan.rotations is not None:
        yield f"rotation: the values of {len(plan.rotations.attentions)} attentions"
        yield from _left_out(plan.rotations.skipped)
    if plan.smoothing is not None:
        yield from _smoothing(plan)
    if plan.memory is not None:
        yield from _bytes(plan, plan.memory, device)
    yield from _calls(plan)
    if plan.last is not None:
        yield from _measured(plan.last, plan.mesh)
    yield from (f"-- {remark}" for remark in plan.remarks)
    for problem in plan.problems:
        yield f"!! {problem.what}"
        yield from (f"   {line.strip()}" for line in str(problem).splitlines()[1:])
    count = len(plan.problems)
    yield f"!! {count} problem{'s' * (count > 1)}: the job would not start" if count else "ok: the job would start"


def _scope(plan: Plan) -> Iterator[str]:
    kept = plan.linears - plan.quantized
    yield f"layers: {plan.linears} linears, {plan.quantized} quantized, {kept} float"
    width = max(len(scope.pattern) for scope in plan.scopes)
    for scope in plan.scopes:
        size = f"{scope.style} {scope.local[0]} x {scope.local[1]}"
        yield f"  {scope.count:4} {scope.pattern:<{width}}  {scope.scheme:<14} {size:<24} {scope.reason}".rstrip()


def _smoothing(plan: Plan) -> Iterator[str]:
    assert plan.smoothing is not None, "the caller looked"
    groups = Counter(_pattern(" + ".join(group.linears)) for group in plan.smoothing.smoothed)
    yield f"smoothing: {len(plan.smoothing.smoothed)} groups of linears with one input"
    yield from (f"  {count:4} {pattern}" for pattern, count in groups.items())
    yield from _left_out(plan.smoothing.skipped)


def _left_out(skipped: Mapping[str, str]) -> Iterator[str]:
    reasons = Counter(_pattern(f"{name}: {reason}") for name, reason in skipped.items())
    yield from (f"  {count:4} left out: {text}" for text, count in reasons.items())


def _pattern(text: str) -> str:
    return re.sub(r"blocks\.\d+\.", "blocks.*.", text)


def _bytes(plan: Plan, memory: MemoryModel, device: str) -> Iterator[str]:
    yield f"each rank: {_size(memory.weights)} of float weights, {_size(memory.activations)} in a forward (forecast)"
    if plan.streams:
        yield "  quantized layer by layer from disk, without holding the model"
    stages = _peaks(plan, memory)
    if device == "cpu" and stages:
        yield f"  host, at most: {_size(max(alone for alone, _, _ in stages) + _PROCESS)}"
    elif stages:
        yield f"  {device}, at most: {_size(max(card for _, card, _ in stages))}"
        yield f"  host, at most: {_size(max(host for _, _, host in stages) + _PROCESS_WITH_CARD)}"
    if plan.paints or plan.evaluates:
        yield "  the decoder of pictures comes on top"
    if plan.quant_type:
        dump = f"{_size(memory.dump)} of calibration data for each rank" if plan.dumps else "no calibration data"
        yield f"  disk: {_size(memory.quantized)} published for each shard, {dump}"


def _measured(last: LastRun, mesh: Mesh | None) -> Iterator[str]:
    """Yield what the last job in the folder took, and in which options the planned one differs from it."""
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in last.seconds.items() if seconds >= 1)
    took = f"{format_seconds(sum(last.seconds.values()))}{f' ({stages} s)' if stages else ''}"
    yield f"measured in this folder on {last.day:%Y-%m-%d}: {took}, at most {_size(last.memory)} on a rank"
    if last.changed is None:
        yield "  the options of that job are not known"
        return
    changed = [*([f"{last.ranks} ranks, now {mesh.world}"] if mesh and mesh.world != last.ranks else []), *last.changed]
    yield f"  that job had {'; '.join(changed)}" if changed else _ALIKE


def _size(count: float) -> str:
    """Return bytes in a unit that shows them: a small model's are hundredths of a GiB."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / _MIB:.1f} MiB"


def _peaks(plan: Plan, memory: MemoryModel) -> list[tuple[int, int, int]]:
    """Return the most bytes of each stage of the job: on a host without cards; on a card, and on the host beside it.

    With CPU offload the weights stay on the host. The pipeline still moves all of them to the card while it runs them;
    only what runs the transformer alone, to quantize it or to compare its layers, goes block by block.
    """
    home, loading, there = (
        (memory.weights, 0, memory.visiting) if plan.offloads else (0, memory.loading, memory.weights)
    )
    replaying = max(loading, there + memory.activations + memory.workspace)
    evaluating = max(memory.running if plan.evaluates else 0, loading, there + memory.comparing)
    stages = (
        # They are put together on the host and move to the card from there.
        (memory.encoding, (memory.encoding, memory.encoding, memory.encoding)),
        (plan.paints, (memory.running, memory.running, home)),
        (plan.calibrates, (memory.calibrating, memory.running, home + memory.record)),
        (plan.replays or plan.is_online, (memory.quantizing, replaying, home + memory.codes + memory.dump)),
        (plan.streams, (memory.streaming, memory.widest + memory.workspace, memory.streaming)),
        (plan.evaluates is not None, (memory.evaluating, evaluating, home + memory.kept)),
    )
    return [peaks for is_done, peaks in stages if is_done]


def _calls(plan: Plan) -> Iterator[str]:
    if plan.batches and (calls := list(_counted(plan))):
        yield f"calls of the transformer on each rank: {'; '.join(calls)}"
    elif plan.streams:
        yield "calls of the transformer: none"


def _counted(plan: Plan) -> Iterator[str]:
    calls = plan.batches * plan.steps
    if plan.calibrates:
        batches = f"{plan.batches} batch{'es' * (plan.batches > 1)}"
        yield f"{calls} to calibrate ({batches} of {plan.steps} steps)"
    if plan.measures and plan.replays:
        yield "some records replayed to choose"
    if plan.is_online:
        yield "none to quantize, as ranges are taken while calibrating"
    if plan.replays:
        yield f"each record replayed {'twice' if plan.smoothing else 'once'} to quantize"
    if plan.paints:
        # Calibrating makes the float images; a checkpoint then makes its own.
        is_float_alone = not plan.quant_type or plan.calibrates
        yield f"{calls if is_float_alone else 2 * calls} for images"
    if plan.evaluates is not None:
        # Each picture is painted in floats, in other floats, and with the checkpoint.
        pictures = f"{3 * plan.evaluates * plan.steps} for the pictures of the evaluation"
        yield pictures if plan.evaluates else "each record replayed to evaluate"
