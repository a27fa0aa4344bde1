"""The arithmetic of world = dp × tp."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.devices.launch import Launch
from launcher.ranks.mesh import Mesh, choose_tp_size
from quant_core.errors import ConfigurationError

# 8 copies × 8 ranks are more than any node has cards; the arithmetic has no larger case that differs.
SIZES = st.integers(min_value=1, max_value=8)


@given(dp_size=SIZES, tp_size=SIZES)
def test_every_rank_is_in_one_tp_group_and_one_dp_group_which_meet_only_in_it(dp_size: int, tp_size: int) -> None:
    world = dp_size * tp_size
    meshes = [Mesh(Launch(rank, world), tp_size) for rank in range(world)]
    for mesh in meshes:
        assert set(mesh.tp_ranks) & set(mesh.dp_groups[mesh.tp_rank]) == {mesh.rank}
        assert mesh.tp_ranks[mesh.tp_rank] == mesh.rank
        assert mesh.dp_groups[mesh.tp_rank][mesh.dp_rank] == mesh.rank
        assert (mesh.dp_size, mesh.tp_size) == (dp_size, tp_size)
    for groups in (meshes[0].tp_groups, meshes[0].dp_groups):
        assert sorted(rank for group in groups for rank in group) == list(range(world))


@given(dp_size=SIZES, tp_size=SIZES)
def test_a_tensor_parallel_group_is_made_of_neighbours(dp_size: int, tp_size: int) -> None:
    for group in Mesh(Launch(0, dp_size * tp_size), tp_size).tp_groups:
        assert group == list(range(group[0], group[0] + tp_size))


def test_the_worked_example_of_the_module_holds() -> None:
    meshes = [Mesh(Launch(rank, 6), 2) for rank in range(6)]
    assert [mesh.tp_rank for mesh in meshes] == [0, 1, 0, 1, 0, 1]
    assert [mesh.dp_rank for mesh in meshes] == [0, 0, 1, 1, 2, 2]
    assert meshes[0].tp_groups == [[0, 1], [2, 3], [4, 5]]
    assert meshes[0].dp_groups == [[0, 2, 4], [1, 3, 5]]
    assert str(meshes[0]) == "world 6 = dp 3 × tp 2"


@pytest.mark.parametrize(
    ("world", "wish", "tp_size", "said"),
    [
        (4, {}, 4, "over all ranks"),
        (1, {}, 1, "over all ranks"),
        (4, {"device_type": "A2-32g-dual", "device_type_tp": 2}, 2, "A2-32g-dual"),
        (4, {"device_type": "A2-64g", "device_type_tp": 1}, 1, "A2-64g"),
        (4, {"requested": 4, "device_type": "A2-32g-dual", "device_type_tp": 2}, 4, "overrides A2-32g-dual"),
        (4, {"requested": 2}, 2, "--tp_size 2"),
    ],
)
def test_the_tensor_parallel_size_is_chosen_with_its_reason(world: int, wish: dict, tp_size: int, said: str) -> None:
    chosen, reason = choose_tp_size(world, **wish)
    assert chosen == tp_size
    assert said in reason


@pytest.mark.parametrize(
    ("world", "wish", "advice"),
    [
        (1, {"device_type": "A2-32g-dual", "device_type_tp": 2}, "torchrun --nproc_per_node 2, or --tp_size 1"),
        (3, {"device_type": "A2-32g-dual", "device_type_tp": 2}, "torchrun --nproc_per_node 4, or --tp_size 1 or 3"),
        (6, {"requested": 4}, "torchrun --nproc_per_node 8, or --tp_size 1 or 2 or 3 or 6"),
    ],
)
def test_a_world_that_cannot_be_divided_is_refused_with_what_fits(world: int, wish: dict, advice: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        choose_tp_size(world, **wish)
    assert caught.value.advice == advice
    assert str(world) in caught.value.what


def test_a_whole_model_on_each_of_several_ranks_is_warned_of_unless_the_size_was_asked_for() -> None:
    one_card = {"device_type": "A2-64g", "device_type_tp": 1}
    _, reason = choose_tp_size(2, **one_card, one_copy="A2-32g-dual")
    warning = "warning: 2 whole copies of the model, one per rank; for one copy over 2 cards: --device_type A2-32g-dual"
    assert reason.splitlines() == ["tp 1: --device_type A2-64g", warning]
    _, reason = choose_tp_size(8, **one_card)
    assert "8 whole copies" in reason
    assert "--tp_size 8" in reason
    for world, wish in ((1, one_card), (2, {"device_type_tp": 2}), (2, {"requested": 1})):
        assert "warning" not in choose_tp_size(world, **wish)[1]
