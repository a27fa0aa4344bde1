"""Compute on simulated NPUs: run every operator on `npu` tensors with the CPU's kernel, on the very same memory.

A simulated device's memory is host memory, so a CPU tensor can be laid over an `npu` tensor without a copy. Inside
`CpuKernels` an operator is taken from the dispatcher below autograd, after torch_npu's own Python and C++ has decided
what to call; its `npu` arguments are exchanged for such tensors, the CPU computes, and new results are copied into new
`npu` tensors. Collectives, views and allocations go to the real torch_npu.

An operator that only NPUs have is computed by the plain arithmetic it stands for, or refused: nothing ever returns
memory that nobody wrote.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
# Collectives, and what only reads or makes metadata and memory: real torch_npu code runs for these.
_NATIVE_NAMESPACES = {"c10d", "_c10d_functional", "prim"}
_NATIVE = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten._local_scalar_dense.default,
}


class CpuKernels(TorchDispatchMode):
    """Compute on `npu` tensors with CPU kernels while the mode is entered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator where it belongs."""
        kwargs = dict(kwargs or {})
        if func.namespace in _NATIVE_NAMESPACES or func in _NATIVE or func.is_view:
            return func(*args, **kwargs)
        if not any(map(_is_on_npu, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func.namespace == "npu":
            named = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
            return _npu_operator(func)(func, **named, **kwargs)
        return _on_host(func, args, kwargs)


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of an `npu` tensor, with the same sizes and strides."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def to_npu(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a new `npu` tensor with the values and strides of a CPU tensor."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    on_host(made).copy_(tensor)
    return made


def _is_on_npu(value: object) -> bool:
    return isinstance(value, (Tensor, torch.device)) and getattr(value, "device", value).type == "npu"


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute with the CPU's kernel; what was an argument (in place, `out=`) comes back as that argument."""
    originals: dict[int, Tensor] = {}

    def lend(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        lent = on_host(value) if value.device.type == "npu" else value
        originals[id(lent)] = value
        return lent

    def give_back(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in originals:
            return originals.get(id(value), value)
        return to_npu(value, target) if target.type == "npu" else value

    target = _device_of_result(args, kwargs)
    return tree_map(give_back, func(*tree_map(lend, args), **tree_map(lend, kwargs)))


def _device_of_result(args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Return where new results live: where the caller asks, else with the arguments, on this process's NPU."""
    asked = kwargs.get("device")
    if asked is not None and (asked.type != "npu" or asked.index is not None):
        return asked
    return torch.device("npu", torch.npu.current_device())  # pyright: ignore[reportAttributeAccessIssue]


def _npu_operator(func: Any) -> Callable[..., Any]:
    name = func.__name__.partition(".")[0]
    if name not in _NPU_OPERATORS:
        raise NotImplementedError(f"npu-sim has no kernel for {func}")
    return _NPU_OPERATORS[name]


def _fusion_attention(
    func: Any, *, query: Tensor, key: Tensor, value: Tensor, input_layout: str, **options: Any
) -> Any:
    """Attend as npu_fusion_attention does, (batch, heads, tokens, features): a mask is True where *not* to look."""
    mask = options.get("atten_mask")
    unknown = [name for name in ("pse", "padding_mask", "prefix", "actual_seq_qlen") if options.get(name) is not None]
    if input_layout != "BNSD" or unknown or options.get("keep_prob", 1.0) != 1.0:
        raise NotImplementedError(f"npu-sim has no npu_fusion_attention with {input_layout} {unknown}")
    causal = options.get("sparse_mode", 0) == 2  # a compressed mask, aligned to the upper left corner
    with sdpa_kernel(SDPBackend.MATH):
        result = scaled_dot_product_attention(
            *map(on_host, (query, key, value)),
            attn_mask=None if mask is None or causal else ~on_host(mask),
            scale=options.get("scale", 1.0),
            is_causal=causal,
        )
    # What remains are statistics for the backward pass, which nobody asks for, and numbers.
    nothing = to_npu(torch.zeros(()), query.device)
    others = [nothing if str(returned.type) == "Tensor" else 0 for returned in func._schema.returns[1:]]
    return (to_npu(result, query.device), *others)


def _rms_norm(func: Any, *, self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalize the last dimension in float32, multiply by gamma; also returns the reciprocal of the norm."""
    x = on_host(self).float()
    reciprocal = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    result = (x * reciprocal).to(self.dtype) * on_host(gamma)
    return to_npu(result.to(self.dtype), self.device), to_npu(reciprocal, self.device)


_NPU_OPERATORS: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": _fusion_attention,
    "npu_fusion_attention_v2": _fusion_attention,
    "npu_fusion_attention_v3": _fusion_attention,
    "npu_rms_norm": _rms_norm,
}
