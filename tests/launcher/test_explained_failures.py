"""Any exception gets the four parts of an error for people."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from launcher.config.option_flags import flags_of
from launcher.config.resolve import job_config_class
from launcher.devices import npu_faults
from launcher.failure.explain import explained
from launcher.failure.phases import combine
from launcher.failure.record import Failure
from model_adapters import adapter_names
from quant_core.errors import (
    ConfigurationError,
    DistributedError,
    EnvironmentFailure,
    ExplainedError,
    InputError,
    MemoryExhausted,
)
from tests.support.torchrun import ROOT


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryExhausted),
        (MemoryError(), MemoryExhausted),
        (RuntimeError("NPU out of memory. Tried to allocate 3 GiB"), MemoryExhausted),
        (OSError(errno.ENOSPC, "No space left on device", "w.safetensors"), EnvironmentFailure),
        (PermissionError(errno.EACCES, "Permission denied", "/results"), EnvironmentFailure),
        (OSError(errno.EROFS, "Read-only file system", "/results"), EnvironmentFailure),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/results/weights"), EnvironmentFailure),
        (OSError(errno.EIO, "Input/output error", "/results/quant_job.yaml"), EnvironmentFailure),
        (OSError(errno.EIO, "Input/output error"), ExplainedError),
        (RuntimeError("[transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:17683"), DistributedError),
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), DistributedError),
        (torch.distributed.DistNetworkError("The client socket has timed out after 60s"), DistributedError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ExplainedError),
        (KeyError("x"), ExplainedError),
    ],
)
def test_an_exception_becomes_an_error_of_its_kind(error: Exception, kind: type) -> None:
    told = explained(error)
    assert type(told) is kind
    assert told.what
    assert told.why
    assert told.advice


def test_who_runs_out_of_memory_is_advised_options_that_every_model_has() -> None:
    advised = {explained(MemoryError()).advice}
    advised |= {fault.advice for fault in npu_faults.FAULTS.values() if fault.kind is MemoryExhausted}
    flags = set(re.findall(r"--\w+", " ".join(advised)))
    assert flags
    for model in adapter_names():
        assert flags <= {flag.option for flag in flags_of(job_config_class(model))}


def test_an_explained_error_stays_itself() -> None:
    error = InputError("no")
    assert explained(error) is error


def test_a_place_that_cannot_be_used_is_named() -> None:
    told = explained(PermissionError(errno.EACCES, "Permission denied", "/results"))
    assert (told.where, told.why) == ("/results", "Permission denied")


def test_a_bug_says_where_it_happened() -> None:
    with pytest.raises(IndexError) as caught:
        [][0]
    assert "test_explained_failures.py" in explained(caught.value).where


def failure(rank: int, kind: type[ExplainedError], what: str, at: float) -> Failure:
    return Failure(rank, kind.__name__, what, "", "because", "do this", at, stage="quantize")


def test_an_error_about_other_ranks_is_never_the_first_cause() -> None:
    lost = failure(0, DistributedError, "another rank is gone", at=1.0)
    cause = failure(3, InputError, "weights are truncated", at=2.0)
    error = combine([lost, cause]).error()
    assert isinstance(error, InputError)
    assert error.where == "rank 3, quantize"
    assert error.why == "because; then rank 0: another rank is gone"


def test_the_same_error_on_several_ranks_is_told_once() -> None:
    failures = [failure(rank, ConfigurationError, "no such layout", at=float(rank)) for rank in (2, 0, 1)]
    error = combine(failures).error()
    assert error.where == "ranks 0, 1, 2, quantize"
    assert error.why == "because"


def test_of_two_causes_the_earlier_speaks() -> None:
    late, early = failure(0, InputError, "late", at=2.0), failure(1, MemoryExhausted, "early", at=1.0)
    error = combine([late, early]).error()
    assert isinstance(error, MemoryExhausted)
    assert error.what == "early"
    assert "rank 0: late" in error.why


def failed(error: Exception, rank: int) -> Failure:
    """Return the failure of an error that was raised on that rank."""
    with pytest.raises(type(error)) as caught:
        raise error
    return Failure.of(caught.value, rank, stage="quantize")


def test_whichever_rank_tells_of_a_bug_shows_where_it_happened() -> None:
    """All ranks raise the one error, and the first to leave speaks: it knows the traceback by what was sent."""
    sent = json.dumps(asdict(failed(IndexError("no such head"), 2)))
    raised = combine([Failure.from_fields(json.loads(sent))]).error()
    command = "import json, sys; leave(Failure.from_fields(json.loads(sys.argv[1])))"
    imports = "from launcher.failure.record import Failure; from launcher.failure.way_out import leave"
    left = subprocess.run(
        [sys.executable, "-c", f"{imports}; {command}", json.dumps(asdict(Failure.of(raised, 0)))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert left.returncode == 1
    assert left.stderr.startswith("Traceback (most recent call last):\n")
    assert "in failed\n    raise error\n" in left.stderr
    assert "error: IndexError: no such head\n  where  rank 2, quantize" in left.stderr


def test_a_traceback_with_a_message_without_end_is_cut_to_what_a_note_can_hold() -> None:
    told = failed(KeyError("x" * 10**6), 0).traceback
    assert "in failed\n" in told
    assert len(told) <= 20_000


def test_what_a_person_can_mend_has_no_traceback() -> None:
    assert failed(InputError("weights are truncated"), 0).traceback == ""
