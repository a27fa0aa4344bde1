"""The launcher with simulated kernels: `torchrun ... run_launcher.py flux ...` for `torchrun ... -m launcher flux ...`.

On `--device npu` the CPU computes in the place of NPU kernels. Attention is torch's plain arithmetic on both devices,
instead of kernels whose order of summation differs, so that results can be compared bit by bit.
"""

from __future__ import annotations

import sys

from launcher.__main__ import main

if __name__ == "__main__":
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from tests.npu_sim.cpu_kernels import CpuKernels

    with sdpa_kernel(SDPBackend.MATH), CpuKernels():
        main(sys.argv[1:])
