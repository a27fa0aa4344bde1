"""What a calibration keeps of every batch, and the file that it becomes: the transformer's calls, or ranges of them.

Both are kept batch by batch, so that an interrupted job goes on, and both are used again only by the very same job:
calls by what the float model depends on, ranges by all that the shards depend on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from launcher.files.calibration_parts import DIGEST, CalibrationParts, load_sound_dump
from launcher.files.digests import digest_of_records
from launcher.stages.job import Job, Results
from launcher.stages.processors import processors, session_of
from launcher.stages.quantize import parallel_of
from quant_core.calibration.capture import DumperManager
from quant_core.calibration.measured import Measured
from quant_core.calibration.records import load_dump, save_dump
from quant_core.errors import InputError, few
from quant_core.session.online import OnlineCalibration


class Left(NamedTuple):
    """What an earlier run left on a rank: the whole file, or states after so many batches, 0 always among them."""

    is_there: bool
    counts: frozenset[int]


@dataclass(frozen=True, eq=False)
class Captured(ABC):
    """One file that calibrating makes on this rank."""

    job: Job
    results: Results

    @property
    @abstractmethod
    def path(self) -> Path:
        """Where the file goes."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The digest of what the file depends on."""

    @abstractmethod
    def counts(self) -> frozenset[int]:
        """Return after how many batches an earlier run can be gone on from."""

    @abstractmethod
    def capturing(self, finished: int) -> AbstractContextManager[Callable[[int], object]]:
        """Return a context that watches the pipeline from that batch on, and yields what keeps the batch just run."""

    @abstractmethod
    def publish(self) -> str:
        """Publish the file from what was kept of all batches; return what it holds, in words."""

    @cached_property
    def parts(self) -> CalibrationParts:
        """What is kept of each batch."""
        return CalibrationParts.beside(self.path, self.fingerprint)

    def left(self) -> Left:
        """Find out what an earlier run left. Raises InputError when another job's file is there, or a damaged one."""
        is_own = self._is_own()
        if self.job.config.output.resume == "never":
            self.parts.discard()
            return Left(is_there=False, counts=frozenset({0}))
        if is_own:
            load_sound_dump(self.path)
        return Left(is_own, self.counts())

    def header(self) -> dict[str, object]:
        """Say of the file whose it is."""
        mesh = self.job.ranks.mesh
        return {
            "fingerprint": self.fingerprint,
            "fields": dict(self.results.calibration.fields),
            "rank": mesh.rank,
            "tp_rank": mesh.tp_rank,
            "dp_rank": mesh.dp_rank,
            "images": [request.number for batch in self.job.batches for request in batch],
        }

    def _is_own(self) -> bool:
        """Tell whether this job's file is there; raises InputError for another job's that may not be replaced."""
        if not self.path.exists():
            return False
        header, rank = load_dump(self.path)["header"], self.job.ranks.rank
        differences = self.results.calibration.differences(header.get("fields", {}))
        if not differences and header.get("rank") == rank:
            # The same calibration for another quantization: its ranges are of other layers, or found otherwise.
            return header.get("fingerprint") == self.fingerprint
        if self.job.config.output.overwrite:
            return False
        raise InputError(
            "the calibration data was made by another job",
            where=str(self.path),
            why=few(differences, shown=5) or f"rank: {header.get('rank')} -> {rank}",
            advice="use another --quant_dump_calib_folder, or --overwrite to replace it",
        )


class CapturedCalls(Captured):
    """The dump: what the transformer was called with."""

    @property
    def path(self) -> Path:
        """Where the file goes."""
        return self.results.folder.dump()

    @property
    def fingerprint(self) -> str:
        """The digest of what the float model's calls depend on."""
        return self.results.calibration.digest

    def counts(self) -> frozenset[int]:
        """Return every number of batches up to the first that is missing."""
        return frozenset(range(self.parts.finished() + 1))

    @contextmanager
    def capturing(self, finished: int) -> Iterator[Callable[[int], object]]:
        """Record the calls; each batch is a part of its own."""
        job = self.job
        dumper = DumperManager(
            job.model.transformer.model, capture_mode="timestep", step_source=lambda: current_step(job)
        )
        with closing(dumper):
            yield lambda batch: self.parts.save(batch, dumper.take())

    def publish(self) -> str:
        """Publish the dump from its parts."""
        return f"{self.parts.assemble(self.path, len(self.job.batches), self.header())} records"


class CapturedRanges(Captured):
    """What the scheme needs of activations, measured in the pipeline's own forwards.

    A part holds everything up to its batch, so the last one is the whole; one before it stays, for ranks that lost the
    last one.
    """

    @property
    def path(self) -> Path:
        """Where the file goes."""
        return self.results.folder.ranges()

    @property
    def fingerprint(self) -> str:
        """The digest of what the shards depend on: which layers are watched, and how ranges are found."""
        return self.results.quantization.digest

    def counts(self) -> frozenset[int]:
        """Return the numbers of batches that parts hold."""
        return frozenset({0, *(batch + 1 for batch in self.parts.whole())})

    @contextmanager
    def capturing(self, finished: int) -> Iterator[Callable[[int], object]]:
        """Measure the inputs of the layers, going on from the batches that are finished."""
        job, options = self.job, self.job.config.quantization
        loaded = job.model.transformer
        online = OnlineCalibration(
            loaded.model,
            session_of(processors(options, job.model.disabled_layers), options, []),
            structure=job.model.adapter.structure,
            parallel=parallel_of(job, loaded.shards),
            step_source=lambda: current_step(job),
        )
        if finished:
            online.restore(Measured(**self.parts.read(finished - 1)[0]))

        def keep(batch: int) -> None:
            self.parts.save(batch, [vars(online.measured())])
            self.parts.forget(batch - 2)

        with online.watching():
            yield keep

    def publish(self) -> str:
        """Publish the last part as the whole. Raises InputError when the transformer was never called."""
        state = self.parts.read(len(self.job.batches) - 1)
        forwards = Measured(**state[0]).forwards
        if not forwards:
            raise InputError(
                "nothing was measured",
                where=str(self.path),
                why="the pipeline ran without calling the transformer",
                advice="run it on at least one prompt and one step",
            )
        save_dump(self.path, state, {**self.header(), DIGEST: digest_of_records(state)})
        self.parts.discard()
        return f"ranges of {forwards} forwards"


def current_step(job: Job) -> int:
    """Return the denoising step that the transformer is called for, and show it."""
    step = job.model.adapter.step_index(job.model.pipeline)
    job.watch.step("calibrate", step, job.config.pipeline.infer_steps)
    return step
