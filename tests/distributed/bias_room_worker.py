"""One rank of the proof that ranks agree on the scales that leave room for a bias which one of them alone has.

Usage of each rank: bias_room_worker.py RESULTS_FOLDER. Rank r writes <r>.safetensors there: the tensors of its columns
of a row-split layer whose scales are shared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from quant_core.arithmetic.numerics import NUMERICS
from quant_core.calibration.observers import InputObserver
from quant_core.parallel.groups import Group, reduce_over
from quant_core.parallel.sharding import Shard, Style
from quant_core.ranges import ESTIMATORS
from quant_core.schemes import SCHEMES
from quant_core.schemes.quantized_layer import QuantizedLayer
from quant_core.schemes.scheme import Derivation

RANKS = 2


def shard(rank: int) -> Shard:
    """Return a rank's part of the layer."""
    return Shard(Style.ROW, rank, RANKS)


def layer_tensors(part: Shard | None, group: Group | None) -> dict[str, Tensor]:
    """Quantize the layer or a rank's part of it; its first row has tiny weights and a bias of 1."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 8, generator=generator), torch.randn(4, generator=generator)
    weight[0], bias[0] = torch.linspace(-1e-5, 1e-5, 8), 1.0
    x = torch.rand(5, 8, generator=generator) / 10
    mine = weight if part is None else part.take_weight(weight)
    its_bias = bias if part is None else part.take_bias(bias)
    scheme, numerics = SCHEMES["w8a8"], NUMERICS["float32"]
    amax_O1 = reduce_over(group, "max", scheme.codec.row_maxima(mine))
    codes_OI, scale_O1 = scheme.codec.encode(mine, amax_O1, torch.float32, numerics)
    fresh = ESTIMATORS["float32"]["minmax"].fresh
    observer = InputObserver(numerics, lambda: fresh(None), per_step=False)
    observer.observe(x)
    layer = QuantizedLayer("layer", scheme, codes_OI, scale_O1, its_bias, observer=observer)
    return scheme.layer_tensors(layer, Derivation([None], numerics, group))


def main() -> None:
    """Join the gloo group and write this rank's tensors."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = layer_tensors(shard(rank), dist.group.WORLD)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, Path(sys.argv[1]) / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
