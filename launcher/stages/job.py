"""What the stages of one job share, and where a job that quantizes leaves its results."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.job_config import JobConfig
from launcher.failure.monitor import Monitor
from launcher.files.fingerprint import Fingerprint
from launcher.files.run_folder import RunFolder
from launcher.journal.console import Console
from launcher.ranks.process_group import Ranks
from launcher.stages.model_session import ModelSession
from model_adapters.pipeline.prompts import Batch


@dataclass(frozen=True)
class Job:
    """Hold the configuration, the ranks, the model and the batches of this rank's copy of the model.

    `asked` is the configuration as it was given: the hub id of a model, where `config` has its folder on this host.
    """

    asked: JobConfig
    config: JobConfig
    ranks: Ranks
    model: ModelSession
    watch: Monitor
    batches: list[Batch]

    @property
    def console(self) -> Console:
        """Where rank 0 speaks."""
        return self.watch.console


@dataclass(frozen=True)
class Results:
    """Name the files of a job that quantizes, and what its dumps and its shards depend on."""

    folder: RunFolder
    calibration: Fingerprint
    quantization: Fingerprint
