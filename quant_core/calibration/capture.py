"""Capture what a model is called with, without touching the pipeline that calls it.

A hook in front of the model's forward copies the arguments to the host. The denoising step comes from `step_source`
(an adapter asks the scheduler) or else from `TimestepManager`: never from counting calls, because guidance may call
the model twice in a step, a pipeline may warm up, and a step cache may skip.

Worked example: 2 steps with guidance in two calls. The scheduler says 0, 0, 1, 1; the dump has four records with
steps 0, 0, 1, 1. Counting calls would have said 0, 1, 2, 3 and put the ranges of half the run into the wrong rows.

Each distinct tensor is kept once: arguments are interned by their bytes.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quant_core.calibration.finite import check_captured
from quant_core.calibration.records import save_dump
from quant_core.calibration.timestep import TimestepManager
from quant_core.errors import ConfigurationError, InputError
from quant_core.tensor_bytes import raw_bytes


class DumperManager:
    """Record every forward of `model` until `save` or `close`.

    capture_mode: `args` keeps positional argument lists, `timestep` records with the denoising step.
    step_source: returns the index of the current denoising step; `TimestepManager` is asked when left out.
    """

    def __init__(
        self,
        model: nn.Module,
        capture_mode: Literal["args", "timestep"] = "args",
        *,
        step_source: Callable[[], int | None] | None = None,
    ) -> None:
        if capture_mode not in ("args", "timestep"):
            raise ConfigurationError(
                f"no capture mode '{capture_mode}'", where="DumperManager", advice="'args' or 'timestep'"
            )
        self.records: list[Any] = []
        self._signature = inspect.signature(type(model).forward)
        self._model, self._mode = model, capture_mode
        self._step_source = step_source or TimestepManager.get_timestep_idx
        self._interned: dict[tuple[Any, ...], Tensor] = {}
        self._paused = False
        self._hook = model.register_forward_pre_hook(self._capture, with_kwargs=True, prepend=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the model is called with inside the block: a warm-up, a preview."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def save(self, path: str | Path, header: Mapping[str, Any] | None = None) -> Path:
        """Stop capturing and publish the dump under `path`. Raises InputError when nothing was captured."""
        self.close()
        if not self.records:
            raise InputError(
                "nothing was captured",
                where=f"{type(self._model).__name__}, dump {path}",
                why="the model was not called between creating the dumper and saving",
                advice="run the pipeline on at least one prompt first",
            )
        return save_dump(Path(path), self.records, header or {})

    def take(self) -> list[Any]:
        """Return what was captured since the last call, and forget it; capturing goes on."""
        taken, self.records = self.records, []
        self._interned.clear()
        return taken

    def close(self) -> None:
        """Stop capturing; the records stay."""
        self._hook.remove()

    def _capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        bound = self._signature.bind(model, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        names = list(bound.arguments)[1:]
        bound.arguments |= {name: self._keep(name, bound.arguments[name]) for name in names}
        by_position, by_name = list(bound.args[1:]), bound.kwargs
        if self._mode == "args":
            self._require_positions([n for n in by_name if n in given or n not in names])
            self.records.append(by_position)
        elif self._all_have_names(names):
            self.records.append(self._record([], dict(zip(names, by_position)) | by_name))
        else:
            self.records.append(self._record(by_position, by_name))

    def _all_have_names(self, names: Sequence[str]) -> bool:
        kinds = {self._signature.parameters[name].kind for name in names}
        return kinds.isdisjoint((Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL))

    def _require_positions(self, by_name: Sequence[str]) -> None:
        if by_name:
            raise ConfigurationError(
                f"argument '{by_name[0]}' of the model has no position",
                where=f"capturing {type(self._model).__name__}",
                why="capture_mode='args' keeps arguments by their positions",
                advice="capture with capture_mode='timestep'",
            )

    def _record(self, by_position: list[Any], by_name: dict[str, Any]) -> dict[str, Any]:
        step = self._step_source()
        if step is None:
            raise ConfigurationError(
                "the denoising step of a forward is unknown",
                where=f"capturing {type(self._model).__name__}",
                why="no step_source was given and nobody called TimestepManager.set_timestep_idx",
                advice="set the index at the start of each step of the loop, or capture with capture_mode='args'",
            )
        name = f"{type(self._model).__name__}.forward"
        return {"tag": "", "timestep_idx": int(step), "module_name": name, "args": by_position, "kwargs": by_name}

    def _keep(self, name: str, value: Any) -> Any:
        """Copy plain data and tensors to the host, interning the tensors; refuse what a dump cannot hold."""
        if isinstance(value, Tensor):
            check_captured(name, value, f"{type(self._model).__name__}.forward, call {len(self.records)}")
            return self._intern(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [self._keep(name, item) for item in value]
        if isinstance(value, Mapping):
            return {str(key): self._keep(f"{name}.{key}", item) for key, item in value.items()}
        raise InputError(
            f"argument '{name}' of the model cannot be dumped",
            where=f"{type(self._model).__name__}.forward",
            why=f"it is a {type(value).__name__}; a dump holds tensors and plain data, so that loading it is safe",
            advice="run the pipeline without that option while calibrating",
        )

    def _intern(self, tensor: Tensor) -> Tensor:
        # Said outright: one element that stands for many (a step of batch 1) counts as contiguous, and has no stride.
        host = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        digest = hashlib.sha256(raw_bytes(host)).digest()
        return self._interned.setdefault((host.dtype, tuple(host.shape), digest), host)
