"""What a session can learn of activations in the float model's own forwards: whether that is enough, and what is kept.

Whoever measures there and whoever takes what was measured ask the same, so what was measured for another session is
refused instead of misread.
"""

from __future__ import annotations

from typing import NamedTuple

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.errors import ConfigurationError
from quant_core.schemes import SCHEMES
from quant_core.session.config import SessionConfig
from quant_core.session.session import Session
from quant_core.smoothing import METHODS
from quant_core.smoothing.smooth import groups_to_smooth
from quant_core.smoothing.statistics import NoTokens


class Kept(NamedTuple):
    """Say what is kept of a layer's input: extremes of each channel, or what its estimator keeps; by step, or not."""

    by_channel: bool
    act_method: str
    per_step: bool

    @property
    def text(self) -> str:
        """Return it as plain data that can be compared."""
        kept = "extremes of channels" if self.by_channel else self.act_method
        return f"{kept} of each step" if self.per_step else kept


def second_look(config: SessionConfig) -> str | None:
    """Return why a session has to see the activations again after a float forward, None if it does not."""
    smoothing, observing = config.smoothing, [c for c in config.schemes if SCHEMES[c.key].observes_input]
    if config.numerics == "reference":
        return "the reference tool's ranges are means of inputs behind quantized layers"
    if config.rotate_values:
        return "rotated values are other inputs than the float model's"
    if smoothing is None:
        return None
    if not isinstance(METHODS[smoothing.key].tokens(smoothing, NUMERICS[config.numerics], 1), NoTokens):
        return f"{smoothing.key} searches its factors among the inputs themselves"
    if smoothing.fused and (observing or config.fa3):
        return "with fused smoothing the layers in front divide the inputs and values that ranges are of"
    if others := sorted({c.cfg.act_method for c in observing} - {"minmax"}):
        return f"what {others[0]} counts is not known behind a factor before the factor is"
    return None


def require_second_look_is_needless(config: SessionConfig) -> None:
    """Raise ConfigurationError for a session that has to see the activations again."""
    if reason := second_look(config):
        raise ConfigurationError(
            "this session cannot be calibrated in the float model's forwards",
            where="processor_cfg_map, numerics",
            why=reason,
            advice="capture records with DumperManager, and quantize by replaying them",
        )


def what_is_kept(session: Session) -> dict[str, Kept]:
    """Return what is kept of each layer that is watched; session: on a model that is float still."""
    by_channel, leading = _smoothed(session)
    return {
        name: Kept(name in by_channel, session.plan[name].cfg.act_method, session.scheme_of(name).per_step)
        for name in session.targets
        if session.scheme_of(name).observes_input or name in leading
    }


def _smoothed(session: Session) -> tuple[set[str], set[str]]:
    """Return the layers of the groups to smooth, and the first of each shared input."""
    if session.config.smoothing is None:
        return set(), set()
    groups = groups_to_smooth(
        session.model, session.config.smoothing, structure=session.structure, targets=session.targets
    ).smoothed
    return {n for group in groups for n in group.linears}, {shared[0] for group in groups for shared in group.inputs}
