"""Environment variables that change how ranks meet, wait and load, and those among them that do harm."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.devices.launch import read_launch
from launcher.doctor.finding import Finding
from quant_core.errors import EnvironmentFailure

_SHOWN = re.compile(
    r"(HCCL|NCCL|GLOO|HF|TORCH|TORCHELASTIC|ASCEND|CUDA_VISIBLE|OMP|MASTER|SLURM_JOB|MINDIE|TRANSFORMERS|DIFFUSERS)"
    r"_\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|RANK_TABLE_FILE|CPU_AFFINITY_CONF|TASK_QUEUE_ENABLE|XDG_CACHE_HOME"
)
# Their values are nobody's business: people paste this into an issue.
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")


@dataclass(frozen=True)
class Harm:
    """Say which settings do harm, why, and what to do."""

    variable: str
    is_harmful: Callable[[Mapping[str, str]], bool]
    why: str
    fix: str


def _is_set(name: str) -> Callable[[Mapping[str, str]], bool]:
    return lambda environ: environ.get(name, "") not in ("", "0")


def _outlives(environ: Mapping[str, str]) -> bool:
    event, execution = (environ.get(f"HCCL_{name}_TIMEOUT", "") for name in ("EVENT", "EXEC"))
    return event.isdecimal() and execution.isdecimal() and 0 < int(event) <= int(execution)


HARMS = (
    Harm(
        "HCCL_IF_IP",
        lambda environ: {"HCCL_IF_IP", "HCCL_SOCKET_IFNAME"} <= environ.keys(),
        "beats HCCL_SOCKET_IFNAME, which is set too",
        "unset one of the two",
    ),
    Harm("RANK_TABLE_FILE", _is_set("RANK_TABLE_FILE"), "replaces the ranks that torchrun lays out", "unset it"),
    Harm("HCCL_WHITELIST_DISABLE", _is_set("HCCL_WHITELIST_DISABLE"), "lets any host join the ranks", "unset it"),
    Harm(
        "TORCH_HCCL_BLOCKING_WAIT",
        _is_set("TORCH_HCCL_BLOCKING_WAIT"),
        "blocks the thread that would notice a lost rank",
        "unset it",
    ),
    Harm("HCCL_EVENT_TIMEOUT", _outlives, "torch_npu wants more than HCCL_EXEC_TIMEOUT", "unset it"),
    Harm(
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        lambda environ: environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "0") != "0",
        "plain torchrun dies at `import torch` where torch_npu finds no CANN",
        "export TORCH_DEVICE_BACKEND_AUTOLOAD=0",
    ),
)


def variables(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Show what is set and matters, and say which of it does harm."""
    harms = {harm.variable: harm for harm in HARMS if harm.is_harmful(environ)}
    for name in sorted(name for name in environ if _SHOWN.fullmatch(name)):
        value = "(set)" if _SECRET.search(name) else environ[name]
        harm = harms.get(name)
        yield Finding("!!", name, f"{value}: {harm.why}", harm.fix) if harm else Finding("ok", name, value)
    try:
        read_launch(environ)
    except EnvironmentFailure as error:
        yield Finding("!!", "variables of a rank", error.what, error.advice or "")
