"""Write a C file with a stand-in for every symbol that the torch_npu wheel needs and nothing else defines.

The list is read from the wheel itself with nm, so another version of the wheel needs no other list. Most of the
functions only have to succeed (0 is success everywhere in CANN). Those that would compute or communicate refuse: a
tensor that nobody wrote must not look like a result.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

# Looked up by name while the program runs (dlsym), so that nm does not see that the wheel needs them.
_LOOKED_UP = """
    aclFinalize aclInit aclrtCtxSetSysParamOpt aclrtDestroyEvent aclrtDestroyStream aclrtDestroyStreamForce
    aclrtDeviceEnablePeerAccess aclrtGetLastError aclrtPeekAtLastError aclrtRecordEvent aclrtResetDevice aclrtResetEvent
    aclrtSetCurrentContext aclrtSetDeviceSatMode aclrtSetOpExecuteTimeOut aclrtSetOpWaitTimeout
    aclrtSetStreamFailureMode aclrtSetStreamOverflowSwitch aclrtSetSysParamOpt aclrtStreamWaitEvent
    aclrtSynchronizeDevice aclrtSynchronizeDeviceWithTimeout aclrtSynchronizeEvent aclrtSynchronizeStream
    aclrtSynchronizeStreamWithTimeout
""".split()  # noqa: SIM905

_REFUSING = re.compile(r"Hccl(All|Batch|Broadcast|Recv|Reduce|Scatter|Send)|aclnn|aclmdlExecute|aclopExecute")
# Symbols that the toolchain or Python provides, in libraries that nm is not asked about.
_ELSEWHERE = ("Py", "_Py", "_ITM", "__gmon", "__cxa_finalize")

_SUCCEEDS = "long {name}(void) {{ return 0; }}\n"
_REFUSES = 'long {name}(void) {{ return refuse("{name}"); }}\n'
_HEAD = """#include <stdio.h>
static long refuse(const char *name) {
    fprintf(stderr, "npu-sim: %s is not simulated\\n", name);
    return 5; /* HCCL_E_NOT_SUPPORT */
}
"""


def write_stubs(path: Path, wheel: Iterable[Path], provided: Iterable[Path]) -> int:
    """Write the C file; returns how many stand-ins it holds.

    wheel: the wheel's libraries; provided: libraries and objects whose symbols need no stand-in.
    """
    wheel = list(wheel)
    needed = set(_LOOKED_UP).union(*(_symbols(file, "undefined") for file in wheel))
    defined = set().union(*(_symbols(file, "defined") for file in [*wheel, *provided]))
    missing = sorted(name for name in needed - defined if not name.startswith(_ELSEWHERE))
    path.write_text(_HEAD + "".join((_REFUSES if _REFUSING.match(n) else _SUCCEEDS).format(name=n) for n in missing))
    return len(missing)


def _symbols(file: Path, kind: str) -> set[str]:
    """List the undefined or defined symbols of a library or an object file."""
    words = ["nm", f"--{kind}-only", *(["-D"] if ".so" in file.name or not file.suffix else []), str(file)]
    listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if line.split()}
