"""Ranks that share the scales of a row-split layer agree on the room for a bias that only the first of them has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant_core.parallel.sharding import join
from tests.distributed.bias_room_worker import RANKS, layer_tensors, shard
from tests.support.forked_ranks import run_forked

WORKER = Path(__file__).with_name("bias_room_worker.py")


@pytest.mark.distributed
def test_joined_parts_of_a_layer_with_a_large_bias_are_the_whole_layer(tmp_path: Path):
    done = run_forked(RANKS, WORKER, str(tmp_path), timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(RANKS)]
    whole = layer_tensors(None, None)
    assert whole["weight_scale"][0] > 2 * 2.0**-23  # the row had to be given a larger scale than the least there is
    for name, tensor in whole.items():
        joined = join(f"layer.{name}", [part.get(name) for part in parts], shard(0))
        assert joined is not None, name
        assert torch.equal(joined, tensor), name
