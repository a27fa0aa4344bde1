"""Patterns choose layers, and a pattern that chooses nothing is an error that helps."""

from __future__ import annotations

import pytest
from torch import nn

from quant_core.errors import ConfigurationError
from quant_core.naming import get_disable_layer_names, linear_names, matches, select


class Block(nn.Module):
    """Two feed-forward linears under diffusers' names, and a convolution that is no candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 2)])
        self.conv = nn.Conv2d(1, 1, 1)


class Model(nn.Module):
    """Two blocks between an embedder and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.context_embedder = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(2, 2)


NAMES = ["context_embedder", "blocks.0.net.0", "blocks.0.net.2", "blocks.1.net.0", "blocks.1.net.2", "proj_out"]


def test_only_linear_layers_are_candidates_in_module_order():
    assert linear_names(Model()) == NAMES


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("blocks.0.net.2", "*net.2*", True),
        ("blocks.0.net.2", "net.2", False),  # a pattern is for the whole name, not for a part of it
        ("single_transformer_blocks.0.attn", "transformer_blocks.*.attn", False),
        ("blocks.0.to_q", "blocks.?.to_[qkv]", True),
        ("blocks.0.TO_Q", "blocks.?.to_[qkv]", False),  # case counts, on every system
        ("a", [], False),
        ("b", ["a", "b"], True),
    ],
)
def test_a_pattern_matches_the_whole_name(name, patterns, expected):
    assert matches(name, patterns) is expected


def test_select_keeps_model_order_and_names_each_layer_once():
    assert select(NAMES, ["proj_out", "*net.2", "blocks.1.*"], where="here") == [
        "blocks.0.net.2",
        "blocks.1.net.0",
        "blocks.1.net.2",
        "proj_out",
    ]


def test_select_of_no_patterns_selects_nothing():
    assert select(NAMES, [], where="here") == []


def test_a_string_is_one_pattern_and_not_its_characters():
    assert select(NAMES, "proj_out", where="here") == ["proj_out"]


def test_a_pattern_that_matches_nothing_names_the_nearest_layer():
    with pytest.raises(ConfigurationError) as caught:
        select(NAMES, ["conext_embedder"], where="--disable_names, model M")
    assert str(caught.value).splitlines() == [
        "error: no layer matches 'conext_embedder'",
        "  where  --disable_names, model M (6 layers)",
        "  why    a pattern must match at least one layer, so that a typo cannot change what is quantized",
        "  try    context_embedder (nearest name), or drop the pattern",
    ]


def test_a_wildcard_pattern_that_matches_nothing_names_the_nearest_tail():
    with pytest.raises(ConfigurationError, match=r"nett\.2") as caught:
        select(NAMES, ["*nett.2"], where="here")
    assert caught.value.advice.startswith("net.2 (nearest name)")


def test_a_pattern_like_no_layer_at_all_suggests_none():
    with pytest.raises(ConfigurationError) as caught:
        select(NAMES, ["zzzzzz"], where="here")
    assert caught.value.advice == "look at the names, or drop the pattern"


def test_including_all_but_the_second_feed_forward_disables_exactly_those():
    assert get_disable_layer_names(Model(), "*", "*net.2*") == ["blocks.0.net.2", "blocks.1.net.2"]


def test_a_layer_that_is_not_included_is_disabled_too():
    disabled = get_disable_layer_names(Model(), ["blocks.*"], ["*net.2", "blocks.1.*"])
    assert disabled == [name for name in NAMES if name != "blocks.0.net.0"]


def test_excluding_nothing_disables_nothing():
    assert get_disable_layer_names(Model(), "*", []) == []


def test_a_typo_in_an_exclusion_is_an_error():
    with pytest.raises(ConfigurationError, match=r"net\.3"):
        get_disable_layer_names(Model(), "*", "*net.3*")
