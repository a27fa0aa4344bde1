"""One device, one backend, a share of the cores: each chosen with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from launcher.config.job_config import RankOptions
from launcher.devices.choice import (
    Cards,
    available_cores,
    choose_backend,
    choose_device_index,
    choose_threads,
    find_cards,
)
from launcher.devices.kinds import KINDS
from launcher.devices.launch import Launch
from quant_core.errors import ConfigurationError, EnvironmentFailure

ALONE = Launch()
SECOND_OF_TWO = Launch(1, 2, 1, 2, "torchrun", "env://")
NPUS = Cards(KINDS["npu"], 2, "ASCEND_RT_VISIBLE_DEVICES=4,5")
NO_NPU = Cards(KINDS["npu"], 0, "ASCEND_RT_VISIBLE_DEVICES=(unset)")
ONE_GPU = Cards(KINDS["cuda"], 1, "CUDA_VISIBLE_DEVICES=0")


@pytest.mark.parametrize(
    ("cards", "device_id", "launch", "index", "said"),
    [
        (Cards(KINDS["cpu"], 1), 0, SECOND_OF_TWO, 0, "--device cpu"),
        (NPUS, 0, SECOND_OF_TWO, 1, "local rank 1 of 2 visible"),
        (NPUS, 1, ALONE, 1, "--device_id 1 of 2 visible"),
        (ONE_GPU, 0, SECOND_OF_TWO, 0, "2 ranks share 1 GPU"),
        # 5 of 6 ranks on 4 cards: round and round, 5 modulo 4 is 1.
        (Cards(KINDS["cuda"], 4), 0, Launch(5, 6, 5, 6, "torchrun", "env://"), 1, "6 ranks share 4 GPUs"),
    ],
)
def test_the_device_is_picked_by_local_rank_or_by_hand(
    cards: Cards, device_id: int, launch: Launch, index: int, said: str
) -> None:
    chosen, reason = choose_device_index(cards, device_id, launch)
    assert chosen == index
    assert said in reason


@pytest.mark.parametrize(
    ("cards", "device_id", "launch", "where"),
    [
        (NO_NPU, 0, ALONE, "ASCEND_RT_VISIBLE_DEVICES=(unset)"),
        (NPUS, 2, ALONE, "--device_id 2, ASCEND_RT_VISIBLE_DEVICES=4,5"),
        (
            Cards(KINDS["npu"], 1, "ASCEND_RT_VISIBLE_DEVICES=4"),
            0,
            SECOND_OF_TWO,
            "local rank 1, ASCEND_RT",
        ),
        (Cards(KINDS["cuda"], 0, "CUDA_VISIBLE_DEVICES="), 0, SECOND_OF_TWO, "CUDA_VISIBLE_DEVICES="),
    ],
)
def test_a_device_that_does_not_exist_is_refused_with_what_hides_devices(
    cards: Cards, device_id: int, launch: Launch, where: str
) -> None:
    with pytest.raises(EnvironmentFailure) as caught:
        choose_device_index(cards, device_id, launch)
    assert where in caught.value.where
    assert "--device cpu" in caught.value.advice


@pytest.mark.parametrize("source", ["torchrun", "srun"])
def test_ranks_that_may_have_cards_of_their_own_are_told_how_to_see_all_of_them(source: str) -> None:
    """Under torchrun they have one environment; srun may give each task another card, which each calls 0."""
    launch, is_srun = replace(SECOND_OF_TWO, source=source), source == "srun"
    index, reason = choose_device_index(ONE_GPU, 0, launch)
    assert (index, "2 ranks share 1 GPU" in reason, "--gpu-bind=none" in reason) == (0, True, is_srun)
    with pytest.raises(EnvironmentFailure) as caught:
        choose_device_index(Cards(KINDS["npu"], 1, "ASCEND_RT_VISIBLE_DEVICES=4"), 0, launch)
    assert ("--gpu-bind=none" in caught.value.advice, "start fewer ranks" in caught.value.advice) == (is_srun, True)
    with pytest.raises(EnvironmentFailure) as caught:
        choose_device_index(NO_NPU, 0, launch)
    assert "--gpu-bind=none" not in caught.value.advice


def test_a_device_number_by_hand_is_refused_when_torchrun_places_the_ranks() -> None:
    with pytest.raises(ConfigurationError, match="cannot be given to 2 ranks") as caught:
        choose_device_index(NPUS, 1, SECOND_OF_TWO)
    assert "ASCEND_RT_VISIBLE_DEVICES" in caught.value.advice


def test_an_npu_job_without_torch_npu_says_what_to_install() -> None:
    with pytest.raises(EnvironmentFailure) as caught:
        find_cards("npu", {})
    assert "torch_npu" in caught.value.what
    assert "--device cpu" in caught.value.advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_cuda_job_without_a_gpu_finds_no_card() -> None:
    assert find_cards("cuda", {"CUDA_VISIBLE_DEVICES": "3"}) == Cards(KINDS["cuda"], 0, "CUDA_VISIBLE_DEVICES=3")


def test_the_option_offers_exactly_the_kinds_of_the_table() -> None:
    assert set(get_args(RankOptions.model_fields["device"].annotation)) == set(KINDS)


@pytest.mark.parametrize(
    ("device", "shared", "backend", "said"),
    [
        ("cpu", False, "gloo", "host memory"),
        ("cuda:0", False, "cpu:gloo,cuda:nccl", "nccl"),
        ("cuda:0", True, "cpu:gloo,cuda:gloo", "NCCL refuses"),
    ],
)
def test_the_backend_follows_the_device(device: str, shared: bool, backend: str, said: str) -> None:
    chosen, reason = choose_backend(torch.device(device), shared=shared)
    assert chosen == backend
    assert said in reason


@pytest.mark.parametrize(
    ("cores", "ranks", "omp", "default", "threads", "said"),
    [
        (192, 8, "1", True, 24, "192 cores, 8 ranks on this host; OMP_NUM_THREADS=1 is torchrun's own"),
        (192, 8, "1", False, 1, "OMP_NUM_THREADS=1"),
        (2, 8, None, False, 1, "2 cores"),
        (192, 8, "4", False, 4, "OMP_NUM_THREADS=4"),
        (16, 1, None, False, 16, "1 rank on this host"),
        (16, 1, "0", False, 16, "16 cores"),
    ],
)
def test_the_ranks_of_a_host_share_its_cores_unless_the_user_says_otherwise(
    cores: int, ranks: int, omp: str | None, default: bool, threads: int, said: str
) -> None:
    chosen, reason = choose_threads(cores, ranks, omp, is_default=default)
    assert chosen == threads
    assert said in reason


def test_a_containers_quota_counts_as_fewer_cores(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")  # one core's worth of time in every period
    assert available_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert available_cores(quota) == available_cores(tmp_path / "none")
