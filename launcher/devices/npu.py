"""Everything that is special about Ascend NPUs: importing torch_npu, HCCL's settings, and what its codes mean.

Importable anywhere; only `load` needs torch_npu and CANN. The meaning of each code is taken from Huawei's public
error code references; codes we found no public meaning for are left out.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quant_core.errors import DistributedError, EnvironmentFailure, ExplainedError, MemoryExhausted

# Left alone, survivors wait 31 minutes (collectives) to 61 minutes (events) for a rank that died.
_CONNECT_TIMEOUT_S = 300
_EXEC_TIMEOUT_S = 600
_EVENT_MARGIN_S = 30  # torch_npu demands HCCL_EVENT_TIMEOUT > HCCL_EXEC_TIMEOUT
_GROUP_MARGIN_S = 30  # so that HCCL, which names the rank, speaks before torch's watchdog

# Each communicator takes two buffers of this size from the card; HCCL's default is 200. The largest message of FLUX
# at 1024 x 1024 is 4608 tokens x 6144 local features x 2 bytes = 57 MB.
_BUFFER_MB = 64


def load() -> None:
    """Import torch_npu and turn just-in-time compilation of operators off.

    Raises:
        EnvironmentFailure: torch_npu or CANN is not installed, not set up in this shell, or of another version.
    """
    _check_pair()
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise _import_failure(error) from error
    torch: Any = importlib.import_module("torch")
    # Compiling every new shape takes minutes and buys nothing: the prebuilt kernels are used instead.
    torch.npu.set_compile_mode(jit_compile=False)


def hide() -> None:
    """Make torch_npu look not installed, for a command that computes elsewhere; call it before diffusers is imported.

    diffusers imports torch_npu wherever it is installed, and without CANN that raises: `--device cpu` would not run on
    a login node. None is how Python marks a module that must not be imported.
    """
    sys.modules.setdefault("torch_npu", None)  # pyright: ignore[reportArgumentType]


def set_environment_defaults(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Bound HCCL's waits where the user has not, and return what was set.

    Must run before the process group is made: HCCL reads the variables then.

    Raises:
        EnvironmentFailure: HCCL_EXEC_TIMEOUT is no number of seconds.
    """
    exec_s = _seconds(environ, "HCCL_EXEC_TIMEOUT", _EXEC_TIMEOUT_S)
    defaults = {
        "HCCL_CONNECT_TIMEOUT": _CONNECT_TIMEOUT_S,
        "HCCL_EXEC_TIMEOUT": exec_s,
        # 0 is never, for both: whoever wants no bound on the one has none on the other.
        "HCCL_EVENT_TIMEOUT": exec_s + _EVENT_MARGIN_S if exec_s else 0,
    }
    chosen = {name: str(value) for name, value in defaults.items() if name not in environ}
    environ.update(chosen)
    return chosen


def group_timeout_s(timeout_s: int, environ: Mapping[str, str]) -> int:
    """Return the process group's timeout: the one asked for, but above every wait inside HCCL.

    Raises:
        EnvironmentFailure: one of HCCL's variables is no number of seconds.
    """
    names = ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT")
    return max(timeout_s, *(_seconds(environ, name, 0) + _GROUP_MARGIN_S for name in names))


def group_options(environ: Mapping[str, str]) -> Any:
    """Return ProcessGroupHCCL options with a small buffer, or None where HCCL_BUFFSIZE says another size."""
    if "HCCL_BUFFSIZE" in environ:
        return None
    torch_npu: Any = importlib.import_module("torch_npu")
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": _BUFFER_MB}
    return options


def explain(text: str) -> ExplainedError | None:
    """Return the error that the codes in a message of torch_npu, CANN or HCCL stand for; None if there is none known.

    A message may carry several codes: the one of the library that noticed first (`EI0002`) says more than the
    runtime's (`507048`) that followed from it.
    """
    fault = next((FAULTS[code] for code in _codes_in(text) if code in FAULTS), None)
    if fault is None:
        return None
    return fault.kind(f"{fault.what} ({fault.code})", where=_first_line(text), why=fault.why, advice=fault.advice)


def is_about_to_abort(error: BaseException) -> bool:
    """Tell whether this process has no time left to look for another cause: HCCL itself reported the error.

    torch_npu's watchdog sees the same within a second and aborts the process, so what has to be said is said at once.
    """
    return isinstance(error, RuntimeError) and isinstance(explain(str(error)), DistributedError)


@dataclass(frozen=True)
class Fault:
    """Say what a code means for the person who runs the job."""

    code: str
    kind: type[ExplainedError]
    what: str
    why: str
    advice: str


_FREE_MEMORY = "use more ranks for one copy of the model (--tp_size), --device_type A2-32g-single, or a smaller image"
_DEVICE_LOG = (
    "npu-smi info shows the card's health; details are in ~/ascend/log; another card tells hardware from software"
)
_OTHER_RANKS = "read the other ranks' logs first: the rank with an earlier or no error is the cause"

# fmt: off
FAULTS: dict[str, Fault] = {fault.code: fault for fault in (
    Fault("EI0001", EnvironmentFailure, "HCCL refuses an environment variable",
          "a value is outside its range, for example HCCL_CONNECT_TIMEOUT outside 120 to 7200",
          "correct or unset the variable that the message names"),
    Fault("EI0002", DistributedError, "a collective on the NPUs timed out",
          "a rank died, hangs, or was slower than HCCL_EXEC_TIMEOUT, or the link between the cards loses packets",
          f"{_OTHER_RANKS}; if all were merely slow, raise HCCL_EXEC_TIMEOUT"),
    Fault("EI0004", EnvironmentFailure, "HCCL refuses the rank table",
          "the file does not fit the cards of this host",
          "unset RANK_TABLE_FILE: torchrun needs none"),
    Fault("EI0005", DistributedError, "ranks called a collective with different arguments",
          "shapes, types or the order of collectives differ between ranks",
          "check that all ranks run the same version with the same options, then report it as a bug"),
    Fault("EI0006", DistributedError, "a rank did not answer when the NPUs connected",
          "a rank died or started later than HCCL_CONNECT_TIMEOUT, or the cards cannot reach each other",
          f"{_OTHER_RANKS}; hccn_tool -i 0 -tls -g must say the same on all cards"),
    Fault("EI0007", MemoryExhausted, "HCCL ran out of memory or notify registers",
          "the card or the host has too little left for communication",
          _FREE_MEMORY),
    Fault("EI0008", EnvironmentFailure, "the hosts have different versions of CANN",
          "HCCL connects equal versions only",
          "install the same CANN on all hosts"),
    Fault("EI0009", DistributedError, "the link between two NPUs could not be set up",
          "a port is down or has no address, or the other rank has failed",
          f"{_OTHER_RANKS}; hccn_tool -i 0 -ip -g shows whether the card has an address"),
    Fault("EI0011", MemoryExhausted, "the NPU has too little memory for HCCL",
          "communication buffers are allocated beside the model",
          _FREE_MEMORY),
    Fault("EI0013", DistributedError, "the network between two NPUs failed",
          "the other rank has exited, or the link is interrupted",
          f"{_OTHER_RANKS}; then check switches and cables"),
    Fault("EI0015", DistributedError, "ranks on different hosts do not find each other",
          "HCCL_SOCKET_IFNAME names an interface that cannot be reached, or a rank has failed",
          f"{_OTHER_RANKS}; set HCCL_SOCKET_IFNAME to the interface that connects the hosts"),
    Fault("EI0019", EnvironmentFailure, "HCCL cannot bind a port",
          "another process holds it: a second job on this host, or a rank left over from the last",
          "end what is left over, or export HCCL_HOST_SOCKET_PORT_RANGE=auto"),
    Fault("EI0020", EnvironmentFailure, "HCCL cannot listen on the card's port",
          "several processes use one card",
          "one rank a card, or set HCCL_NPU_SOCKET_PORT_RANGE"),
    Fault("EJ0001", EnvironmentFailure, "the card's communication process cannot start",
          "an earlier job's process is probably still running on it",
          "end that process (npu-smi info lists it), wait ten seconds, and start again"),
    Fault("EJ0003", EnvironmentFailure, "HCCL cannot bind a port",
          "another process holds it: a second job on this host, or a rank left over from the last",
          "end what is left over, or export HCCL_HOST_SOCKET_PORT_RANGE=auto"),
    Fault("107001", EnvironmentFailure, "the NPU's number does not exist",
          "this process sees fewer cards than the number it asked for",
          "compare ASCEND_RT_VISIBLE_DEVICES with the number of ranks on this host"),
    Fault("107002", ExplainedError, "the NPU was used before a device was set",
          "the runtime has no context in this thread",
          "this is a bug: report it with this message"),
    Fault("200000", MemoryExhausted, "the NPU ran out of memory", "an allocation failed", _FREE_MEMORY),
    Fault("207001", MemoryExhausted, "the NPU ran out of memory", "an allocation failed", _FREE_MEMORY),
    Fault("207018", MemoryExhausted, "the NPU ran out of memory", "the memory on the card is exhausted", _FREE_MEMORY),
    Fault("207004", EnvironmentFailure, "the NPU is not available", "the device is not running properly", _DEVICE_LOG),
    Fault("207006", EnvironmentFailure, "this user may not use the NPU",
          "the driver refuses the operation for lack of permission",
          "add the user to the driver's group, or mount the device into the container"),
    Fault("507010", EnvironmentFailure, "the NPU lost its task scheduler's heartbeat", "the card stopped answering",
          _DEVICE_LOG),
    Fault("507014", EnvironmentFailure, "an operator timed out on the NPU's AI Core", "the kernel did not end in time",
          _DEVICE_LOG),
    Fault("507015", EnvironmentFailure, "an operator failed on the NPU's AI Core", "the kernel raised an exception",
          _DEVICE_LOG),
    Fault("507017", EnvironmentFailure, "an operator timed out on the NPU's AI CPU", "the kernel did not end in time",
          _DEVICE_LOG),
    Fault("507018", EnvironmentFailure, "an operator failed on the NPU's AI CPU", "the kernel raised an exception",
          _DEVICE_LOG),
    Fault("507033", EnvironmentFailure, "the NPU could not be started", "the driver failed to open the device",
          _DEVICE_LOG),
    Fault("507034", EnvironmentFailure, "an operator timed out on the NPU's vector core",
          "the kernel did not end in time", _DEVICE_LOG),
    Fault("507035", EnvironmentFailure, "an operator failed on the NPU's vector core",
          "the kernel raised an exception", _DEVICE_LOG),
    Fault("507048", DistributedError, "a task on the NPU timed out",
          "most often a collective that another rank never joined", _OTHER_RANKS),
    Fault("507899", EnvironmentFailure, "the NPU's driver failed", "the driver reported an internal error",
          _DEVICE_LOG),
    Fault("507901", EnvironmentFailure, "the host lost the connection to the NPU", "the driver's session was closed",
          _DEVICE_LOG),
    Fault("HCCL 9", DistributedError, "a collective on the NPUs timed out",
          "a rank died, hangs, or was slower than HCCL_EXEC_TIMEOUT", _OTHER_RANKS),
    Fault("HCCL 24", MemoryExhausted, "the NPU has too little memory for HCCL",
          "communication buffers are allocated beside the model", _FREE_MEMORY),
    Fault("NPU out of memory", MemoryExhausted, "the NPU ran out of memory",
          "torch_npu could not allocate a tensor", _FREE_MEMORY),
)}
# fmt: on


def _seconds(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdecimal():
        raise EnvironmentFailure(
            f"{name}={value} is not a number of seconds",
            where="environment",
            why="HCCL reads it when the NPUs connect",
            advice=f"export {name}=600, or unset it",
        )
    return int(value)


def _codes_in(text: str) -> list[str]:
    """List the codes of a message, those of CANN's libraries first."""
    library = re.findall(r"\bE[A-Z]\d{4}\b", text)
    runtime = re.findall(r"error code is (\d{6})\b", text)
    hccl = [f"HCCL {code}" for code in re.findall(r"(?i)hccl.*?error code is (\d{1,2})\b", text)]
    return [*library, *runtime, *hccl, *(["NPU out of memory"] if "NPU out of memory" in text else [])]


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 200 else f"{line[:200]}..."


def _check_pair() -> None:
    """Refuse a torch_npu that is not of torch's version, before importing it fails in a way that nobody understands."""
    try:
        built_for, installed = (_release(version(package)) for package in ("torch_npu", "torch"))
    except PackageNotFoundError:
        return
    if built_for != installed:
        raise EnvironmentFailure(
            f"torch_npu {version('torch_npu')} does not go with torch {version('torch')}",
            where="--device npu",
            why="each torch_npu is built for the torch of the same version",
            advice=f"pip install '.[npu-{built_for.rsplit('.', 1)[0]}]', which keeps torch_npu, as it has to fit CANN",
        )


def _release(text: str) -> str:
    """Return a version without what follows its three numbers: `2.9.0` of `2.9.0.post9` and of `2.9.0+cpu`."""
    return ".".join(re.findall(r"\d+", text)[:3])


@dataclass(frozen=True)
class ImportCause:
    """Say what a message of the dynamic linker means when it comes from torch_npu."""

    pattern: str
    why: str
    advice: str


# The first that fits counts.
IMPORT_CAUSES = (
    ImportCause(
        r"lib(ascend_hal|dcmi|drvdsmi_host)\S*: cannot open",
        "that library belongs to the NPU's driver",
        "install the driver, or mount it into the container: /usr/local/Ascend/driver",
    ),
    ImportCause(
        r"lib(torch|c10)\S*: cannot open|undefined symbol: _ZNK?(2at|3c10|5torch)",
        "it was built for another torch",
        "install the pair anew: pip install --force-reinstall '.[npu-X.Y]', with the X.Y that fits CANN (README)",
    ),
    ImportCause(
        r"lib\S+: cannot open",
        "that library belongs to CANN, which is not installed or not set up in this shell",
        "source CANN's set_env.sh (/usr/local/Ascend/ascend-toolkit/set_env.sh), or use --device cpu",
    ),
    ImportCause(
        r"undefined symbol|version `\S+' not found",
        "a library that it found, most likely CANN's, is of another release",
        "pip install '.[npu-X.Y]', with the X.Y that fits the installed CANN (README)",
    ),
    ImportCause(
        r"No module named",
        "it needs that package",
        "pip install the package that is named",
    ),
)
_UNKNOWN_CAUSE = ImportCause("", "", 'TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -c "import torch_npu" shows all of it')


def _import_failure(error: Exception) -> EnvironmentFailure:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
        return EnvironmentFailure(
            "torch_npu is not installed",
            where="--device npu",
            why="torch drives an NPU through this package, of the same version as torch",
            advice="pip install '.[npu-X.Y]', with the X.Y that fits CANN (README), or use --device cpu",
        )
    said = str(error)
    cause = next((cause for cause in IMPORT_CAUSES if re.search(cause.pattern, said)), _UNKNOWN_CAUSE)
    return EnvironmentFailure(
        "torch_npu is installed but cannot be imported",
        where="--device npu",
        why=": ".join(filter(None, [_first_line(said), cause.why])),
        advice=cause.advice,
    )
