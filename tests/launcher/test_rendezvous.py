"""Where ranks meet, they find those of their own job alone."""

from __future__ import annotations

from launcher.devices.launch import Launch
from launcher.ranks.rendezvous import meet
from tests.support.torchrun import free_port


def test_a_rank_that_comes_to_the_port_of_another_step_is_not_among_its_ranks() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    own, stranger = (meet(Launch(rank, 2, init_method=f"{address}/7.{rank}"), timeout_s=20) for rank in (0, 1))
    own.notes.set("failure", "none of yours")
    assert own.notes.check(["failure"])
    assert not stranger.notes.check(["failure"])
