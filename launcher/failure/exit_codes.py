"""Tell by the exit status what kind of end a run came to, so that a scheduler can decide what to do next."""

from __future__ import annotations

from enum import IntEnum

from launcher.failure.signals import Interrupted, Preempted
from quant_core.errors import (
    ConfigurationError,
    DistributedError,
    EnvironmentFailure,
    FolderInUse,
    InputError,
    MemoryExhausted,
    VerificationError,
)


class ExitCode(IntEnum):
    """Name every exit status of the launcher (torchrun itself turns any failure of a rank into 1)."""

    PUBLISHED = 0
    BUG = 1
    CONFIGURATION = 2
    ENVIRONMENT = 3
    INPUT = 4
    MEMORY = 5
    DISTRIBUTED = 6
    VERIFICATION = 7
    PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it

    @property
    def state(self) -> str:
        """How `status.json` calls a job that ended so: published, preempted, interrupted, or failed."""
        return self.name.lower() if self in (self.PUBLISHED, self.PREEMPTED, self.INTERRUPTED) else "failed"


EXIT_CODES: dict[type[BaseException], ExitCode] = {
    ConfigurationError: ExitCode.CONFIGURATION,
    EnvironmentFailure: ExitCode.ENVIRONMENT,
    InputError: ExitCode.INPUT,
    MemoryExhausted: ExitCode.MEMORY,
    MemoryError: ExitCode.MEMORY,
    FolderInUse: ExitCode.DISTRIBUTED,
    DistributedError: ExitCode.DISTRIBUTED,
    VerificationError: ExitCode.VERIFICATION,
    Preempted: ExitCode.PREEMPTED,
    Interrupted: ExitCode.INTERRUPTED,
    KeyboardInterrupt: ExitCode.INTERRUPTED,
}


def exit_code(error: BaseException | None) -> ExitCode:
    """Return the exit status of a run that ended with `error` (None: it published); an unknown kind is a bug."""
    if error is None:
        return ExitCode.PUBLISHED
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), ExitCode.BUG)
