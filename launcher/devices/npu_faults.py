"""What the codes of torch_npu, CANN and HCCL mean for the person who runs the job.

The meaning of each code is taken from Huawei's public error code references; codes we found no public meaning for are
left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quant_core.errors import DistributedError, EnvironmentFailure, ExplainedError, MemoryExhausted


def explain(text: str) -> ExplainedError | None:
    """Return the error that the codes in a message of torch_npu, CANN or HCCL stand for; None if there is none known.

    A message may carry several codes: the one of the library that noticed first (`EI0002`) says more than the
    runtime's (`507048`) that followed from it.
    """
    fault = next((FAULTS[code] for code in _codes_in(text) if code in FAULTS), None)
    if fault is None:
        return None
    return fault.kind(f"{fault.what} ({fault.code})", where=first_line(text), why=fault.why, advice=fault.advice)


@dataclass(frozen=True)
class Fault:
    """Say what a code means for the person who runs the job."""

    code: str
    kind: type[ExplainedError]
    what: str
    why: str
    advice: str


_FREE_MEMORY = (
    "use more ranks for one copy of the model (--tp_size), CPU offload if the model has it, or a smaller image; plan "
    "foretells what a job holds"
)
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


def _codes_in(text: str) -> list[str]:
    """List the codes of a message, those of CANN's libraries first."""
    library = re.findall(r"\bE[A-Z]\d{4}\b", text)
    runtime = re.findall(r"error code is (\d{6})\b", text)
    hccl = [f"HCCL {code}" for code in re.findall(r"(?i)hccl.*?error code is (\d{1,2})\b", text)]
    return [*library, *runtime, *hccl, *(["NPU out of memory"] if "NPU out of memory" in text else [])]


def first_line(text: str) -> str:
    """Return the first line that is not empty, cut to what a terminal shows."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 200 else f"{line[:200]}..."
