"""One of two ranks on simulated NPUs: checks the simulation itself, before anything is concluded from it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # pyright: ignore[reportMissingImports]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.npu_sim.cpu_kernels import CpuKernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
# Of float32, in multiples of 512 bytes: torch_npu gathers others with a kernel (PadV3) that is not simulated. The
# second is more than one slot of the stand-in's shared memory (8 MB) holds, and no multiple of it.
COUNTS = (128, 3_000_064)


def check_collectives(rank: int, device: torch.device) -> None:
    """Compare every collective that the product uses, and those beside them, with values computed by hand."""
    for dtype in DTYPES:
        mine = (torch.arange(6) + rank).to(dtype).to(device)
        for op, expected in ((dist.ReduceOp.SUM, 2 * torch.arange(6) + 1), (dist.ReduceOp.MAX, torch.arange(6) + 1)):
            result = mine.clone()
            dist.all_reduce(result, op=op)
            assert torch.equal(result.cpu(), expected.to(dtype)), (dtype, op, result.cpu())
    for count in COUNTS:
        mine = torch.full((count,), rank + 0.5).to(device)
        parts = [torch.empty(count, device=device) for _ in range(2)]
        dist.all_gather(parts, mine)
        assert [part.cpu().unique().tolist() for part in parts] == [[0.5], [1.5]]
        dist.all_reduce(mine)
        assert mine.cpu().unique().tolist() == [2.0]
    told = torch.arange(6.0).to(device) * (rank == 1)
    dist.broadcast(told, src=1)
    assert torch.equal(told.cpu(), torch.arange(6.0))
    dist.barrier()


def check_attention(device: torch.device) -> None:
    """Compare attention through torch_npu's own choice of operators with the CPU's, for every kind of mask."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 8, 16, dtype=torch.bfloat16)
    keep = torch.rand(2, 1, 8, 8) > 0.3
    keep[..., 0] = True  # a row that may look nowhere has no defined result
    cases: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"attn_mask": keep},
        {"attn_mask": torch.randn(2, 1, 8, 8).bfloat16()},
    ]
    for case in cases:
        there = {
            name: option.to(device) if isinstance(option, torch.Tensor) else option for name, option in case.items()
        }
        with sdpa_kernel(SDPBackend.MATH):
            expected = scaled_dot_product_attention(query, key, value, **case)
        result = scaled_dot_product_attention(query.to(device), key.to(device), value.to(device), **there)
        assert torch.equal(result.cpu(), expected), case


def check_operators(device: torch.device) -> None:
    """Check in-place results, views, `out=`, new tensors and the moves between host and device."""
    x = torch.arange(12.0).reshape(3, 4)
    y = x.to(device)
    view = y[1:, ::2]
    assert view.add_(1) is view
    assert torch.equal(y.cpu(), x.index_put((torch.tensor([[1], [2]]), torch.tensor([0, 2])), x[1:, ::2] + 1))
    out = torch.empty(3, 4, device=device)
    assert torch.mul(y, 2, out=out) is out
    assert torch.equal(out.cpu(), y.cpu() * 2)
    assert torch.arange(3, device=device).device == torch.ones(2, device="npu").device == device
    x.copy_(y)
    assert torch.equal(x, y.cpu())
    try:
        torch_npu.npu_fast_gelu(y)
    except NotImplementedError:
        return
    raise AssertionError("an operator without a kernel must be refused")


def main() -> None:
    """Check everything on this rank and say so."""
    device = torch.device("npu", int(os.environ["LOCAL_RANK"]))
    torch.accelerator.set_device_index(device.index)
    native = dist.get_default_backend_for_device(device)
    dist.init_process_group(f"cpu:gloo,npu:{native}", timeout=timedelta(seconds=100))
    backend = dist.distributed_c10d._get_default_group()._get_backend(device)
    assert type(backend).__name__ == "ProcessGroupHCCL"
    with torch.no_grad(), CpuKernels():
        check_operators(device)
        check_attention(device)
        check_collectives(dist.get_rank(), device)
    print(f"rank {dist.get_rank()} is right\n", end="", flush=True)  # one write: both ranks share a pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
