"""A plan as lines for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from launcher.inspection.plan import Plan
from model_adapters.memory.memory_model import MemoryModel

_GIB = 2**30
# What a process takes before it holds a tensor: Python, torch, diffusers.
_PROCESS = 0.4


def told(plan: Plan, device: str) -> Iterator[str]:
    """Yield the lines; device: the kind that the job computes on."""
    yield f"plan of {plan.model}, {plan.quant_type}"
    if plan.mesh is not None:
        yield f"ranks: {plan.mesh}"
        yield from (f"  {line}" for line in plan.mesh_reason.splitlines())
    if plan.scopes:
        yield from _scope(plan)
    if plan.smoothing is not None:
        yield from _smoothing(plan)
    if plan.memory is not None:
        yield from _bytes(plan, plan.memory, device)
    yield from _calls(plan)
    yield from (f"-- {remark}" for remark in plan.remarks)
    for problem in plan.problems:
        yield f"!! {problem.what}"
        yield from (f"   {line.strip()}" for line in str(problem).splitlines()[1:])
    count = len(plan.problems)
    yield f"!! {count} problem{'s' * (count > 1)}: the job would not start" if count else "ok: the job would start"


def _scope(plan: Plan) -> Iterator[str]:
    kept = plan.linears - plan.quantized
    yield f"layers: {plan.linears} linears, {plan.quantized} quantized, {kept} float; layout {plan.layout}"
    width = max(len(scope.pattern) for scope in plan.scopes)
    for scope in plan.scopes:
        size = f"{scope.style} {scope.local[0]} x {scope.local[1]}"
        yield f"  {scope.count:4} {scope.pattern:<{width}}  {scope.scheme:<14} {size:<24} {scope.reason}".rstrip()
    sizes = ", ".join(map(str, plan.tp_sizes))
    yield f"  tensor-parallel sizes that divide it (of 1 to 16): {sizes}"


def _smoothing(plan: Plan) -> Iterator[str]:
    assert plan.smoothing is not None, "the caller looked"
    groups = Counter(_pattern(" + ".join(group.linears)) for group in plan.smoothing.smoothed)
    yield f"smoothing: {len(plan.smoothing.smoothed)} groups of linears with one input"
    yield from (f"  {count:4} {pattern}" for pattern, count in groups.items())
    left_out = Counter(_pattern(f"{name}: {reason}") for name, reason in plan.smoothing.skipped.items())
    yield from (f"  {count:4} left out: {text}" for text, count in left_out.items())


def _pattern(text: str) -> str:
    return re.sub(r"blocks\.\d+\.", "blocks.*.", text)


def _bytes(plan: Plan, memory: MemoryModel, device: str) -> Iterator[str]:
    def gib(size: float) -> str:
        return f"{size / _GIB:.2f} GiB"

    yield f"each rank: {gib(memory.weights)} of float weights, {gib(memory.activations)} in a forward (forecast)"
    if plan.streams:
        yield f"  host, at most: {gib(memory.streaming + _PROCESS * _GIB)}: layer by layer from disk, nothing is run"
    elif device == "cpu":
        yield f"  host, at most: {gib(max(memory.calibrating, memory.quantizing) + _PROCESS * _GIB)}"
    else:
        on_card = max(memory.loading, memory.weights + memory.activations + memory.workspace)
        yield f"  {device}, at most: {gib(on_card)}"
        yield f"  host, at most: {gib(max(memory.record, memory.codes + memory.dump) + _PROCESS * _GIB)}"
    dump = 0 if plan.streams else memory.dump
    yield f"  disk: {gib(memory.quantized)} published for each shard, {gib(dump)} of calibration data for each rank"


def _calls(plan: Plan) -> Iterator[str]:
    if not plan.batches:
        return
    if plan.streams:
        yield "calls of the transformer: none"
        return
    calls, times = plan.batches * plan.steps, 2 if plan.smoothing else 1
    yield (
        f"calls of the transformer on each rank: {calls} to calibrate ({plan.batches} batches of {plan.steps} steps), "
        f"then each record replayed {'twice' if times == 2 else 'once'} to quantize, where the scheme reads activations"
    )
