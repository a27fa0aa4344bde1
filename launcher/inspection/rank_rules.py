"""How the files of all ranks have to agree: what no rank's own files can show.

Which layers are divided, and how, is known by their names from the shard plan of the model that the manifest names.
Where there is no manifest, only what holds under every plan is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from launcher.files.shard_note import held_alike
from launcher.inspection.published import Published, RankCheckpoint
from quant_core.checkpoint.findings import Broken, Rule
from quant_core.parallel.sharding import Shard


def tensor_names(rank: RankCheckpoint) -> Iterator[tuple[str, str, str]]:
    """Yield each tensor as (layer, tensor, full name), layers by their names in the float model."""
    for name, group in rank.inventory.layers.items():
        yield from ((name, key, member) for key, member in group.members.items())
    for name in rank.inventory.floats:
        layer, _, tensor = name.rpartition(".")
        yield layer, tensor, name


def _complete(published: Published) -> Iterator[Broken]:
    """Object to ranks that are missing or too many, and to files with and without a rank beside each other."""
    first, names = published.ranks[0], [rank.tp_rank for rank in published.ranks]
    tp_size = published.manifest.tp_size if published.manifest else int(_told(first, "tp_size", str(len(names))))
    wanted: list[int | None] = [None] if tp_size == 1 else [*range(tp_size)]
    for rank in published.ranks:
        if rank.tp_rank not in wanted:
            yield Broken("", f"{rank.files.weights.name} belongs to none of {tp_size} ranks", rank.files.weights)
    for missing in [each for each in wanted if each not in names]:
        yield Broken("", f"the files of rank {missing} of {tp_size} are missing or cannot be read", published.folder)


def _headers(published: Published) -> Iterator[Broken]:
    """Object to a file that says of itself what its name, or another rank's file, does not."""
    for rank in published.ranks:
        file = rank.files.weights
        expected = {"tp_rank": str(rank.rank), "tp_size": str(len(published.ranks))}
        expected |= {key: _told(published.ranks[0], key) for key in ("layout", "fingerprint", "timestep_sep")}
        for key, value in expected.items():
            told = _told(rank, key)
            if told != value and (told or _told(published.ranks[0], key)):
                yield Broken("", f"the header of {file.name} says {key} {told or '(nothing)'}, not {value}", file)


def _told(rank: RankCheckpoint, key: str, default: str = "") -> str:
    return rank.metadata.get(key, default)


def _others(published: Published) -> Iterator[tuple[RankCheckpoint, RankCheckpoint]]:
    """Yield the first rank with each other one."""
    yield from ((published.ranks[0], rank) for rank in published.ranks[1:])


def _same_layers(published: Published) -> Iterator[Broken]:
    for first, rank in _others(published):
        ours, theirs = _types(first), _types(rank)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                what = f"'{name}' is {theirs.get(name, 'not there')}, and {ours.get(name, 'not there')} on rank 0"
                yield Broken(name, f"rank {rank.rank}: {what}", rank.files.description)


def _types(rank: RankCheckpoint) -> Mapping[str, str]:
    """Return what each tensor is; biases, which may live on the first rank only, are asked for by their own rule."""
    quantized = {full: rank.inventory.layers[layer].type for layer, _, full in _quantized(rank)}
    floats = dict.fromkeys(rank.inventory.floats, "FLOAT")
    scales = {full: each.type for each in rank.inventory.attentions.values() for full in each.members.values()}
    return {name: kind for name, kind in (quantized | floats | scales).items() if not name.endswith(".bias")}


def _quantized(rank: RankCheckpoint) -> Iterator[tuple[str, str, str]]:
    return (names for names in tensor_names(rank) if names[0] in rank.inventory.layers)


def _same_form(published: Published) -> Iterator[Broken]:
    """Object to tensors of another shape or dtype: the parts of all ranks are equally large."""
    for first, rank in _others(published):
        common = {full for _, _, full in tensor_names(first)} & {full for _, _, full in tensor_names(rank)}
        for name in sorted(common):
            ours, theirs = first.checkpoint.info(name), rank.checkpoint.info(name)
            if ours != theirs:
                what = f"'{name}' is {theirs.dtype} {theirs.shape}, and {ours.dtype} {ours.shape} on rank 0"
                yield Broken(name, f"rank {rank.rank}: {what}", rank.files.weights)


def _same_steps(published: Published) -> Iterator[Broken]:
    for first, rank in _others(published):
        if first.inventory.timesteps != rank.inventory.timesteps:
            what = f"{rank.inventory.timesteps} steps, and {first.inventory.timesteps} on rank 0"
            yield Broken("", f"rank {rank.rank} has {what}", rank.files.weights)


def _biases(published: Published) -> Iterator[Broken]:
    """Object to a bias that is not where the layer's division puts it."""
    holders: dict[str, dict[int, tuple[str, RankCheckpoint]]] = {}
    for rank in published.ranks:
        for layer, tensor, full in tensor_names(rank):
            if tensor == "bias":
                holders.setdefault(layer, {})[rank.rank] = full, rank
    for layer, held in holders.items():
        full, _ = next(iter(held.values()))
        shard = published.shard(layer, 0)
        is_row = shard is not None and shard.split_dim == 1
        all_ranks = [rank.rank for rank in published.ranks]
        allowed = [[0]] if is_row else [all_ranks, *([] if shard else [[0]])]
        if sorted(held) not in allowed:
            extra = next((each for rank, each in held.items() if rank not in allowed[0]), None)
            lacking = [rank for rank in published.ranks if rank.rank not in held]
            where = extra[1] if extra else (lacking or published.ranks)[0]
            told = f"'{full}' is on the ranks {sorted(held)}, not on {allowed[0]}"
            yield Broken(full, told, where.files.weights)


def _equal(published: Published) -> Iterator[Broken]:
    """Object to tensors that every rank holds whole, and that differ."""
    scales_are_global = published.option("quantization.scale_sync") == "global"
    for first, rank in _others(published):
        theirs = {full for _, _, full in tensor_names(rank)}
        for layer, tensor, full in tensor_names(first):
            shard = published.shard(layer, 0)
            if shard is None or full not in theirs or first.checkpoint.info(full) != rank.checkpoint.info(full):
                continue
            if _is_whole(shard, tensor, first.checkpoint.info(full).shape, scales_are_global):
                ours, other = first.checkpoint.read_raw(full), rank.checkpoint.read_raw(full)
                if not _same_bits(ours, other):
                    what = f"'{full}' differs between rank 0 and rank {rank.rank}"
                    yield Broken(full, what, rank.files.weights)


def _is_whole(shard: Shard, tensor: str, shape: tuple[int, ...], scales_are_global: bool) -> bool:
    return shard.split_dim is None or held_alike(shard, tensor, shape, scales_are_global)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _doubled(published: Published) -> Iterator[Broken]:
    """Object to two ranks that hold the same codes in each divided layer: one of them is a copy of the other."""
    for one, other in combinations(published.ranks, 2):
        layers = [name for name in one.inventory.layers if name in other.inventory.layers]
        divided = [name for name in layers if (shard := published.shard(name, 0)) and shard.split_dim is not None]
        if divided and all(_same_codes(one, other, name) for name in divided):
            what = f"ranks {one.rank} and {other.rank} hold the same codes in all {len(divided)} divided layers"
            yield Broken(f"{divided[0]}.weight", what, other.files.weights)


def _same_codes(one: RankCheckpoint, other: RankCheckpoint, layer: str) -> bool:
    ours, theirs = (each.checkpoint.read_raw(each.inventory.layers[layer].members["weight"]) for each in (one, other))
    return torch.equal(ours, theirs)


RANK_RULES: tuple[Rule[Published], ...] = (
    Rule("all ranks", "each rank loads the two files of its own number, a single process those without", _complete),
    Rule("headers", "a file says which part of which job it holds; shapes do not tell", _headers),
    Rule("same layers", "all ranks run one model, each its part of every layer", _same_layers),
    Rule("same form", "ranks hold equal parts, and whole tensors alike", _same_form),
    Rule("same steps", "a step has its row on all ranks or on none", _same_steps),
    Rule("biases", "the bias of a row-split layer lives on rank 0, any other on every rank", _biases),
    Rule("equal tensors", "what is not divided is the same on all ranks, to the last bit", _equal),
    Rule("doubled files", "each rank holds another part of a divided layer", _doubled),
)
