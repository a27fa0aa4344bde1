"""What is particular about each kind of device, one record a kind; everything else treats all kinds alike.

Importable without torch. A new kind is a record here, and its name in the option `--device`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from launcher.devices import npu, npu_faults
from quant_core.errors import DistributedError, ExplainedError


@dataclass(frozen=True)
class DeviceKind:
    """Say how one kind of device is loaded, hidden, listed, set up for groups, and what its errors mean."""

    name: str
    noun: str
    # The variable that hides cards from a process, and the command that lists those of the host; "" without cards.
    visible: str = ""
    listing: str = ""
    # Distributions beside torch whose version may move a number that is computed on it.
    packages: tuple[str, ...] = ()
    # Several ranks may use one card (over gloo).
    is_shareable: bool = False
    # Its backend connects at once when it is told the device; with torch_npu that makes every later gloo group fail.
    connects_early: bool = False
    load: Callable[[], object] = lambda: None
    # Keep other libraries from importing what the kind needs, in a run that does not compute on it.
    hide: Callable[[], object] = lambda: None
    # Bound the waits of its backend, where the user has not; before the groups are made.
    set_environment: Callable[[MutableMapping[str, str]], object] = lambda environ: None
    # Seconds that a group waits, given those asked for; and the options of its backend.
    group_timeout_s: Callable[[int, Mapping[str, str]], int] = lambda timeout_s, environ: timeout_s
    group_options: Callable[[Mapping[str, str]], Any] = lambda environ: None
    explain: Callable[[str], ExplainedError | None] = lambda text: None

    @property
    def has_cards(self) -> bool:
        """Whether there are several of it, of which each rank takes one."""
        return bool(self.visible)


KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind("cpu", "processor"),
        DeviceKind(
            "cuda", "GPU", "CUDA_VISIBLE_DEVICES", "nvidia-smi", is_shareable=True, connects_early=True
        ),
        DeviceKind(
            "npu",
            "NPU",
            "ASCEND_RT_VISIBLE_DEVICES",
            "npu-smi info",
            packages=("torch_npu",),
            load=npu.load,
            hide=npu.hide,
            set_environment=npu.set_environment_defaults,
            group_timeout_s=npu.group_timeout_s,
            group_options=npu.group_options,
            explain=npu_faults.explain,
        ),
    )
}  # fmt: skip


def use_only(name: str) -> None:
    """Load one kind and hide the others, before anything imports diffusers.

    Raises:
        EnvironmentFailure: what the kind needs is not installed, or not set up in this shell.
    """
    for kind in KINDS.values():
        (kind.load if kind.name == name else kind.hide)()


def explain(error: BaseException) -> ExplainedError | None:
    """Return what a device's own codes in an error's message stand for; None if there is none known."""
    if not isinstance(error, RuntimeError):
        return None
    return next((told for kind in KINDS.values() if (told := kind.explain(str(error)))), None)


def is_about_to_abort(error: BaseException) -> bool:
    """Tell whether this process has no time left to look for another cause: the device's own library lost a peer.

    Its watchdog sees the same within a second and aborts the process, so what has to be said is said at once.
    """
    return isinstance(explain(error), DistributedError)
