"""What is special about Ascend NPUs: importing torch_npu, and HCCL's settings.

Importable anywhere; only `load` and `group_options` need torch_npu and CANN.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from launcher.devices.npu_faults import first_line
from quant_core.errors import EnvironmentFailure

# Left alone, survivors wait 31 minutes (collectives) to 61 minutes (events) for a rank that died.
_CONNECT_TIMEOUT_S = 300
_EXEC_TIMEOUT_S = 600
_EVENT_MARGIN_S = 30  # torch_npu demands HCCL_EVENT_TIMEOUT > HCCL_EXEC_TIMEOUT
_GROUP_MARGIN_S = 30  # so that HCCL, which names the rank, speaks before torch's watchdog

# Each communicator takes two buffers of this size from the card; HCCL's default is 200. The largest message of a model
# of 12 billion parameters at 1024 x 1024 is 4608 tokens x 6144 local features x 2 bytes = 57 MB.
_BUFFER_MB = 64


def load() -> None:
    """Import torch_npu and turn just-in-time compilation of operators off.

    Raises:
        EnvironmentFailure: torch_npu or CANN is not installed, not set up in this shell, or of another version.
    """
    check_pair()
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


def check_pair() -> None:
    """Refuse a torch_npu that is not of torch's version, before importing it fails in a way that nobody understands.

    Raises:
        EnvironmentFailure: naming both versions.
    """
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
        why=": ".join(filter(None, [first_line(said), cause.why])),
        advice=cause.advice,
    )
