"""Say as data how a model is divided over tensor-parallel ranks, and resolve it for one rank.

A plan is a table from patterns of layer names to styles. It is apart from the model, because the layout of a
checkpoint belongs to its consumer: the same FLUX is divided in two ways, for two runtimes. Resolving a plan needs
only shapes, so a model on the meta device is enough and nothing has been read from disk when a wrong number of
ranks is refused.

Worked example, one single-stream block of a tiny FLUX (width 8, 2 heads of 4, feed-forward width 32) on 2 ranks:

    layer      full (O, I)   mindie             local (O, I)   megatron            local (O, I)
    attn.to_q  (8, 8)        col                (4, 8)         col                 (4, 8)
    proj_mlp   (32, 8)       col                (16, 8)        col                 (16, 8)
    proj_out   (8, 40)       col_gather         (4, 40)        row_packed (8, 32)  (8, 20)

In `mindie` the attention output (4 of 8 wide on a rank) and the activated feed-forward (16 of 32) are gathered before
the layer that joins them, and that layer's output afterwards: three gathers. In `megatron` rank 1 keeps the
columns 4..8 of the attention block and 24..40 of the feed-forward block, and one sum follows. Each rank then
attends with 1 of the 2 heads, so a plan also names the modules that count heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from quant_core.errors import ConfigurationError
from quant_core.naming import matches
from quant_core.parallel.sharding import Shard, Style


class Rule(NamedTuple):
    """Give the linear layers that match a pattern a style.

    `packed_from` names, relative to the layer's parent, the linears whose outputs make up a packed input, in order.
    """

    pattern: str
    style: Style
    packed_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardPlan:
    """Divide a model over tensor-parallel ranks; a linear layer that no rule matches is replicated.

    `gather_outputs`: patterns of modules, other than the layers with a style, whose output is gathered on its last
    dimension. `local_heads`: patterns of attention modules that reshape by a head count and so count local heads.
    `has_rank_folders`: its consumer keeps a folder of slices for each rank, which may be read in place of the whole.
    `version` changes with any change of what a rank holds, so that shards of two versions are never mixed.
    """

    name: str
    version: int
    linears: tuple[Rule, ...]
    gather_outputs: tuple[str, ...] = ()
    local_heads: tuple[str, ...] = ()
    has_rank_folders: bool = False

    def rule_for(self, name: str) -> Rule | None:
        """Return the first rule whose pattern matches the name of a linear layer, if any."""
        return next((rule for rule in self.linears if matches(name, rule.pattern)), None)

    def resolve(self, model: nn.Module, tp_rank: int, tp_size: int) -> dict[str, Shard]:
        """Return the shard of every divided linear layer of an undivided model (real or on meta), by name.

        Raises ConfigurationError listing everything that `tp_size` does not divide.
        """
        self.check_divisible(model, tp_size)
        return {
            name: Shard(rule.style, tp_rank, tp_size, self._blocks(model, name, rule))
            for name, rule in self._divided(model)
        }

    def check_divisible(self, model: nn.Module, tp_size: int) -> None:
        """Raise ConfigurationError listing the heads, widths and packed blocks that `tp_size` does not divide."""
        counts = list(self._counts(model))
        if problems := dict.fromkeys(count.text for count in counts if count.number % tp_size):
            fitting = _common_divisors(counts, range(1, tp_size))
            raise ConfigurationError(
                f"{type(model).__name__} cannot be divided over {tp_size} tensor-parallel ranks",
                where=f"tp_size {tp_size}, layout {self.name}",
                why=f"{tp_size} does not divide: " + "; ".join(problems),
                advice=f"a tensor-parallel size of {' or '.join(map(str, fitting))}",
            )

    def sizes_that_divide(self, model: nn.Module, sizes: Iterable[int]) -> list[int]:
        """Return those of some tensor-parallel sizes that divide an undivided model (real or on meta)."""
        return _common_divisors(list(self._counts(model)), sizes)

    def _divided(self, model: nn.Module) -> Iterable[tuple[str, Rule]]:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (rule := self.rule_for(name)):
                yield name, rule

    def _blocks(self, model: nn.Module, name: str, rule: Rule) -> tuple[int, ...]:
        parent = name.rpartition(".")[0]
        return tuple(_linear(model, f"{parent}.{sibling}").out_features for sibling in rule.packed_from)

    def _counts(self, model: nn.Module) -> Iterable[_Count]:
        for name, module in model.named_modules():
            if matches(name, self.local_heads):
                yield _Count(name, "heads", head_count(module))
        for name, rule in self._divided(model):
            linear = _linear(model, name)
            for block in self._blocks(model, name, rule):
                yield _Count(name, "inputs in one block", block)
            is_row = rule.style in (Style.ROW, Style.ROW_PACKED)
            yield _Count(name, "inputs" if is_row else "outputs", linear.in_features if is_row else linear.out_features)


def head_count(attention: nn.Module) -> int:
    """Return how many heads an attention module counts; raises TypeError if it counts none."""
    heads = getattr(attention, "heads", None)
    if not isinstance(heads, int):
        raise TypeError(f"a shard plan divides the heads of a {type(attention).__name__}, which counts none")
    return heads


class _Count(NamedTuple):
    """A number that the tensor-parallel size has to divide, and whose it is."""

    name: str
    kind: str
    number: int

    @property
    def text(self) -> str:
        # All blocks of one kind have the same problem: 57 times the same line would hide a second one.
        every_block = re.sub(r"\.[0-9]+\.", ".*.", self.name, count=1)
        return f"{every_block}: {self.number} {self.kind}"


def _common_divisors(counts: Sequence[_Count], sizes: Iterable[int]) -> list[int]:
    numbers = {count.number for count in counts}
    return [size for size in sizes if all(number % size == 0 for number in numbers)]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"a shard plan needs '{name}' to be a linear layer, it is {type(module).__name__}")
    return module
