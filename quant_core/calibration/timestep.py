"""Which denoising step the model is in."""

from __future__ import annotations


class TimestepManager:
    """Hold the index of the current denoising step for whoever quantizes by step.

    A pipeline's loop, a capture hook or a replay sets it; layers read it. One index for the process, because a process
    runs one denoising loop at a time and the layers in it have no other way to learn where they are.
    """

    _index: int | None = None

    @classmethod
    def set_timestep_idx(cls, index: int | None) -> None:
        """Set the index of the step that begins now, counted from 0; None outside any loop."""
        cls._index = index

    @classmethod
    def get_timestep_idx(cls) -> int | None:
        """Return the index of the current step, or None when no loop has set one."""
        return cls._index
