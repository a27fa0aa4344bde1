"""The exit status tells the kind of end."""

from __future__ import annotations

import pytest

from launcher.config.config_errors import ConfigurationErrors
from launcher.failure.exit_codes import exit_code
from quant_core import errors


class FromElsewhere(errors.InputError):
    """A kind that the table does not list by name."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (ZeroDivisionError(), 1),
        (errors.ExplainedError("a bug that was explained"), 1),
        (errors.ConfigurationError("no"), 2),
        (ConfigurationErrors([errors.ConfigurationError("one"), errors.ConfigurationError("two")]), 2),
        (errors.EnvironmentFailure("no"), 3),
        (errors.InputError("no"), 4),
        (FromElsewhere("no"), 4),
        (errors.MemoryExhausted("no"), 5),
        (MemoryError(), 5),
        (errors.DistributedError("no"), 6),
        (errors.VerificationError("no"), 7),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_status(error: BaseException | None, status: int) -> None:
    assert exit_code(error) == status
