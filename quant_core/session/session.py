"""What all steps of one quantization share: the model, what is asked of it, and this rank's place among others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from quant_core.arithmetic.numerics import NUMERICS, Numerics
from quant_core.attention.head_scales import AttentionObserver
from quant_core.attention.rotated_values import Rotations, find_rotations, levelled
from quant_core.attention.session import attention_observers
from quant_core.calibration.measured import Measured
from quant_core.calibration.records import Record, as_records
from quant_core.calibration.replay import Progress
from quant_core.parallel.groups import Parallel, reduce_over
from quant_core.ranges import ESTIMATORS, EstimatorKind
from quant_core.schemes import SCHEMES
from quant_core.schemes.scheme import Scheme, SchemeConfig
from quant_core.session.config import SessionConfig
from quant_core.session.targets import layer_plan
from quant_core.structure import ModelStructure


@dataclass(frozen=True)
class Session:
    """Hold one quantization; everything else about it follows from these."""

    model: nn.Module
    config: SessionConfig
    structure: ModelStructure | None
    parallel: Parallel
    progress: Progress

    @cached_property
    def numerics(self) -> Numerics:
        """The arithmetic of scales and codes."""
        return NUMERICS[self.config.numerics]

    @cached_property
    def plan(self) -> dict[str, SchemeConfig]:
        """The linear layers to quantize, in model order, and how each."""
        return layer_plan(self.model, self.config)

    @property
    def targets(self) -> list[str]:
        """The linear layers to quantize, in model order."""
        return list(self.plan)

    def scheme_of(self, layer: str) -> Scheme:
        """Return the scheme of one of the targets."""
        return SCHEMES[self.plan[layer].key]

    def estimator_of(self, layer: str) -> EstimatorKind:
        """Return what estimates the input range of one of the targets."""
        return ESTIMATORS[self.numerics.name][self.plan[layer].cfg.act_method]

    @cached_property
    def schemes(self) -> list[Scheme]:
        """The schemes that layers have, each once."""
        return [SCHEMES[key] for key in dict.fromkeys(config.key for config in self.plan.values())]

    @property
    def quant_type(self) -> str:
        """The type that the checkpoint is called after."""
        return SCHEMES[self.config.scheme.key].quant_type

    @property
    def per_step(self) -> bool:
        """Whether any layer keeps a range for each denoising step."""
        return any(scheme.per_step for scheme in self.schemes)

    @cached_property
    def records(self) -> list[Record]:
        """The calibration records in the order of the replay.

        Only the reference numerics depends on the order: its steps descend, each with its records as they came.
        """
        records = [] if self.measured else as_records(self.config.calib_data)
        if not (self.per_step and self.numerics.is_reference):
            return records
        return sorted(records, key=lambda record: -1 if record.step is None else record.step, reverse=True)

    @property
    def measured(self) -> Measured | None:
        """What was measured in the float model's forwards, if that is the calibration data."""
        return self.config.calib_data if isinstance(self.config.calib_data, Measured) else None

    @cached_property
    def rotations(self) -> Rotations:
        """How the values of attention are rotated, if they are; asked for while the model is whole in floats."""
        if not self.config.rotate_values:
            return Rotations()
        found = find_rotations(self.model, self.structure, targets=self.targets, parallel=self.parallel)
        read = self.model.get_parameter
        return levelled(self.model, found, read, parallel=self.parallel, progress=self.progress)

    @cached_property
    def attentions(self) -> dict[str, AttentionObserver]:
        """The observers of quantized attention, by module; none without FA3."""
        observers = attention_observers(self.model, self.structure, self.numerics) if self.config.fa3 else {}
        if self.measured:
            for name, observer in observers.items():
                observer.restore(self.measured.of_attention(name))
        return observers

    @property
    def observes(self) -> bool:
        """Whether the result depends on ranges of activations."""
        return any(scheme.observes_input for scheme in self.schemes) or bool(self.attentions)

    @property
    def replays(self) -> bool:
        """Whether the session replays the records through the quantized layers."""
        return self.observes and self.measured is None

    def steps_of(self, scheme: Scheme) -> Sequence[int | None]:
        """Return the denoising steps that a layer of this scheme has ranges of; [None] for one range."""
        return self.steps if scheme.per_step else [None]

    @cached_property
    def steps(self) -> Sequence[int]:
        """The denoising steps that any rank has records or ranges of, from 0 on without a gap."""
        last = max((record.step for record in self.records if record.step is not None), default=-1)
        last = self.measured.last_step if self.measured else last
        return list(range(int(reduce_over(self.parallel.dp_group, "max", torch.tensor(last))) + 1))
