"""Choose the kernels the reference tool ran with, then quantize golden cases; a program, since kernels are chosen once.

The reference ran on an Intel processor with AVX-512. torch takes its matrix products and its `exp` from MKL, which has
other kernels for processors of other makers, and those round some results the other way: two of the 128 frequencies of
the timestep embedding for instance. MKL asks one exported function who made the processor; answering "Intel" there
gives any processor with AVX-512 the kernels of the reference, and all nine cases come out equal to the last bit.

    python -m tests.support.reference_kernels FOLDER CASE...

writes each case to FOLDER/CASE. Exit code 3: this machine cannot run those kernels; the reason is on stderr.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from pathlib import Path

import torch

from tests.support.golden_cases import GoldenCase

UNAVAILABLE = 3
_ALWAYS_TRUE = bytes.fromhex("b801000000c3")  # mov eax, 1; ret
_READ, _WRITE, _EXECUTE = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC


def why_unavailable() -> str | None:
    """Say why this machine cannot run the reference tool's kernels, or None."""
    if platform.machine() != "x86_64" or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return f"they need AVX-512; this is {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.backends.mkl.is_available():
        return "they are MKL's; this torch was built without it"
    return None


def take_intels_kernels() -> None:
    """Let MKL hold the processor for one of Intel's; before its first use, which fixes its kernels.

    Raises:
        OSError: the function is not exported, or the system does not let a program change its own code.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    asked = getattr(ctypes.CDLL(str(library)), "mkl_serv_intel_cpu_true", None)
    if asked is None:
        raise OSError(f"{library} does not export mkl_serv_intel_cpu_true")
    address = ctypes.cast(asked, ctypes.c_void_p).value or 0
    page = address & -mmap.PAGESIZE
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    if mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), _READ | _WRITE | _EXECUTE):
        raise OSError(ctypes.get_errno(), "mprotect of MKL's code")
    ctypes.memmove(address, _ALWAYS_TRUE, len(_ALWAYS_TRUE))
    mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), _READ | _EXECUTE)


def main(folder: str, *names: str) -> int:
    """Write the cases; return the exit code."""
    if reason := why_unavailable():
        print(reason, file=sys.stderr)
        return UNAVAILABLE
    take_intels_kernels()
    torch.set_num_threads(1)
    for name in names:
        case = GoldenCase(name)
        # The attention case was made without oneDNN, the others with it.
        with torch.backends.mkldnn.flags(enabled=not case.config["fa3"]):
            case.quantize(Path(folder) / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
