"""See what an attention multiplies, without changing the model or anything that other models share.

Each attention module gets two forward hooks that say which one is running, and a torch function mode, active only
inside the block, sees every call of `scaled_dot_product_attention`. No processor, class or module of the model's
library is exchanged, so there is nothing to put back: the hooks go and the mode ends, also after an error.

Given up against exchanging processors: only attention that goes through torch's function is seen. A fused kernel of
another library leaves no call, and then the session says which attention it missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from quant_core.attention.head_scales import AttentionObserver

_ARGUMENTS = ("query", "key", "value")


@contextmanager
def watch_attentions(model: nn.Module, observers: Mapping[str, AttentionObserver]) -> Iterator[None]:
    """Show each attention's calls to its observer inside the block; observers by module name."""
    if not observers:
        yield
        return
    with ExitStack() as stack:
        calls = stack.enter_context(_AttentionCalls())
        for name, observer in observers.items():
            module = model.get_submodule(name)
            enter = module.register_forward_pre_hook(calls.entering(observer))
            stack.callback(enter.remove)
            leave = module.register_forward_hook(calls.leaving, always_call=True)
            stack.callback(leave.remove)
        yield


class _AttentionCalls(TorchFunctionMode):
    """Show the tensors of each attention call to the observer of the attention that is running."""

    def __init__(self) -> None:
        super().__init__()
        self._running: AttentionObserver | None = None

    def entering(self, observer: AttentionObserver) -> Callable[..., None]:
        """Return a forward pre-hook that says that this observer's attention begins."""

        def enter(module: nn.Module, args: Any) -> None:
            self._running = observer

        return enter

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the attention that is running, as a forward hook."""
        self._running = None

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and self._running is not None:
            self._running.observe(**dict(zip(_ARGUMENTS, args)), **{k: kwargs[k] for k in _ARGUMENTS if k in kwargs})
        return func(*args, **kwargs)
