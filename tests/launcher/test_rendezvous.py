"""Where ranks meet, they find those of their own job alone, and compare what they were asked for."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from launcher.devices.launch import Launch
from launcher.ranks.agreement import require_alike_in_store
from launcher.ranks.rendezvous import meet
from quant_core.errors import ConfigurationError
from tests.support.torchrun import free_port


def test_a_rank_that_comes_to_the_port_of_another_step_is_not_among_its_ranks() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    own, stranger = (meet(Launch(rank, 2, init_method=f"{address}/7.{rank}"), timeout_s=20) for rank in (0, 1))
    own.notes.set("failure", "none of yours")
    assert own.notes.check(["failure"])
    assert not stranger.notes.check(["failure"])


def compare(*options: dict[str, object]) -> list[BaseException | None]:
    """Let a rank for each of the options compare them with the others', and return what each of them met."""
    store = dist.HashStore()

    def of_rank(rank: int) -> None:
        require_alike_in_store(store, Launch(rank, len(options)), options[rank], what="the options")

    with ThreadPoolExecutor(len(options)) as ranks:
        return [rank.exception() for rank in [ranks.submit(of_rank, rank) for rank in range(len(options))]]


def test_ranks_with_the_same_options_go_on() -> None:
    assert compare({"tp_size": 2}, {"tp_size": 2}) == [None, None]


def test_a_rank_with_another_option_is_named_on_all_ranks() -> None:
    for error in compare({"tp_size": 2}, {"tp_size": 2}, {"tp_size": 1, "layout": "mindie"}):
        assert isinstance(error, ConfigurationError)
        assert error.what == "rank 0 and rank 2 differ in the options"
        assert error.why == "layout: (absent), mindie; tp_size: 2, 1"


def test_a_second_job_of_the_same_process_is_compared_anew() -> None:
    store, told = dist.HashStore(), []
    for size in (1, 2):
        require_alike_in_store(store, Launch(0, 1), {"tp_size": size}, what="the options")
        told.append(json.loads(store.get(f"the options/0/{size}")))
    assert told == [{"tp_size": 1}, {"tp_size": 2}]
