"""What a process holds is asked of the card that it uses, whichever that is."""

from __future__ import annotations

import psutil
import pytest
import torch

from launcher.devices.memory_use import held_memory

CARD = 1 << 50  # more than any host has


def with_cards(monkeypatch: pytest.MonkeyPatch, *allocated: int) -> None:
    """Let torch see as many cards, of which this process has allocated so many bytes each."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(allocated))
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda index: allocated[index], raising=False)


@pytest.mark.parametrize("allocated", [(CARD,), (0, 0, CARD), (CARD, 0)])
def test_the_card_that_a_process_uses_is_measured_also_where_it_was_chosen_by_hand(
    monkeypatch: pytest.MonkeyPatch, allocated: tuple[int, ...]
) -> None:
    with_cards(monkeypatch, *allocated)
    assert held_memory() == CARD


@pytest.mark.parametrize("allocated", [(), (0, 1)])
def test_a_process_that_uses_no_card_holds_what_it_has_on_the_host(
    monkeypatch: pytest.MonkeyPatch, allocated: tuple[int, ...]
) -> None:
    with_cards(monkeypatch, *allocated)
    assert held_memory() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
