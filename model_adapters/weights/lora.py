"""Fuse LoRA files into float weights while these are read: W + scale · alpha/rank · B A.

The formats that LoRA files have (diffusers, PEFT, kohya, XLabs, ...) are told apart and converted by the loader that
diffusers has for the pipeline. The factors of a divided layer are cut like its weight, of which the rows are those of
B and the columns those of A, so each rank computes only its own part. The product is added in float64 and rounded
once, to the dtype of the run: the file's may be too coarse to hold a change of a few thousandths. A rank's part has the
bits of the same part of the whole weight, fused before it was cut.

Worked example: rank 1, alpha 2, scale 0.5, A = [[1, 2]], B = [[3], [4]]. The weight gets 0.5 · 2/1 · [[3, 6], [4, 8]],
and a rank that holds its second row adds [4, 8].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model_adapters.weights.brought import LoraFile
from model_adapters.weights.model_folder import open_weights
from quant_core.errors import InputError, suggestion
from quant_core.parallel.sharding import Shard, cut

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Parts of other methods that share the file format; diffusers would drop or refuse them one by one.
_OTHER_METHODS = ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_", "lora_B.bias")
# Numbers of a weight that are computed at once, in float64.
_BLOCK_NUMEL = 2**22


@dataclass(frozen=True)
class LowRank:
    """Hold one layer's change: `scale` · up (O, R) @ down (R, I)."""

    up_OR: Tensor
    down_RI: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight that it changes."""
        return len(self.up_OR), self.down_RI.shape[1]

    def of_shard(self, shard: Shard | None) -> LowRank:
        """Return the change of one rank's part of the weight."""
        parts = () if shard is None else shard.weight_slices(self.shape)
        if not parts:
            return self
        if parts[0].dim == 0:
            return replace(self, up_OR=cut(self.up_OR, parts))
        return replace(self, down_RI=cut(self.down_RI, parts))

    def of_rows(self, rows: slice) -> LowRank:
        """Return the change of some rows of the weight."""
        return replace(self, up_OR=self.up_OR[rows])


# layer -> what the LoRA files change of it, in their order
Changes = Mapping[str, Sequence[LowRank]]


def fuse(weight_OI: Tensor, terms: Sequence[LowRank], dtype: torch.dtype) -> Tensor:
    """Return a weight with the terms added, in a dtype; in place if it has that, and a block of rows at a time."""
    downs = [term.down_RI.double() for term in terms]
    fused_OI = weight_OI if weight_OI.dtype == dtype else torch.empty_like(weight_OI, dtype=dtype)
    rows = max(1, _BLOCK_NUMEL // weight_OI.shape[1])
    for first in range(0, len(weight_OI), rows):
        exact = weight_OI[first : first + rows].double()
        for term, down in zip(terms, downs):
            exact.addmm_(term.up_OR[first : first + rows].double(), down, alpha=term.scale)
        fused_OI[first : first + rows].copy_(exact)
    return fused_OI


def fuse_module(module: nn.Module, changes: Changes) -> None:
    """Add the changes to the linear layers of a loaded module."""
    for layer, terms in changes.items():
        weight = module.get_submodule(layer).weight
        assert isinstance(weight, Tensor), "the changes are of linears"
        fuse(weight.data, terms, weight.dtype)


def read_changes(
    pipeline_type: Any, files: Sequence[LoraFile], part: str, shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[LowRank]]:
    """Read what LoRA files change of one part of a pipeline, by the names of its layers.

    part: as the pipeline calls it, `transformer`. shapes: of the part's tensors, by name.
    Raises InputError for a file that cannot be read, is of another method, or names a layer that is not there.
    """
    changes: dict[str, list[LowRank]] = {}
    for file in files:
        for name, term in _read(pipeline_type, file).items():
            owner, _, layer = name.partition(".")
            if owner == part:
                changes.setdefault(_known(layer, term, shapes, file), []).append(term)
            elif owner not in pipeline_type._lora_loadable_modules:
                raise _no_layer(name, file, shapes)
    return changes


def _known(layer: str, term: LowRank, shapes: Mapping[str, Sequence[int]], file: LoraFile) -> str:
    """Return the layer's name in the model; newer transformers leave `text_model.` out of some encoders' names."""
    found = next((each for each in (layer, layer.removeprefix("text_model.")) if f"{each}.weight" in shapes), None)
    if found is None:
        raise _no_layer(layer, file, shapes)
    expected = tuple(shapes[f"{found}.weight"])
    if expected != term.shape:
        raise InputError(
            f"the LoRA does not fit the layer {found}",
            where=str(file.path),
            why=f"it changes a weight of shape {term.shape}, the layer's is {expected}",
            advice="take a LoRA that was trained on this model",
        )
    return found


def _no_layer(layer: str, file: LoraFile, shapes: Mapping[str, object]) -> InputError:
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    return InputError(
        f"the LoRA changes a layer that the model has not: {layer}",
        where=str(file.path),
        why="a LoRA that is applied in part makes another model than the one that was meant",
        advice=suggestion(layer, layers, "take a LoRA that was trained on this model"),
    )


def _read(pipeline_type: Any, file: LoraFile) -> dict[str, LowRank]:
    """Return the changes in a file by part and layer: `transformer.proj_out`."""
    with open_weights(file.path) as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        if strange := [key for key in shapes if any(word in key for word in _OTHER_METHODS)]:
            raise _unreadable(file, f"{strange[0]} is no factor of a plain LoRA")
        if lost := [key for key in _left_out(pipeline_type, file, shapes) if opened.get_tensor(key).double().any()]:
            raise _unreadable(file, f"diffusers leaves {lost[0]} out, which would change the model too")
    state, *about = _convert(
        pipeline_type,
        file,
        str(file.path.parent),
        weight_name=file.path.name,
        use_safetensors=True,
        local_files_only=True,
    )
    alphas, metadata = (about[0] if len(about) > 1 else None) or {}, about[-1] or {}
    state = _peft_names(state)
    pairs = dict.fromkeys(key[: -len(end)] for key in state for end in (_UP, _DOWN) if key.endswith(end))
    left = {*state} ^ {f"{name}{end}" for name in pairs for end in (_UP, _DOWN)}
    if left or not pairs:
        raise _unreadable(file, f"{min(left)} has no partner" if left else "it holds no factors")
    if odd := [key for key, alpha in alphas.items() if torch.as_tensor(alpha).numel() != 1]:
        raise _unreadable(file, f"{odd[0]} is no number")
    if odd := [name for name in pairs if not _multiply(state[name + _UP], state[name + _DOWN])]:
        raise _unreadable(file, f"the factors of {odd[0]} are no matrices that can be multiplied")
    return {
        name: LowRank(up := state[name + _UP], state[name + _DOWN], file.scale * _scale(name, up, alphas, metadata))
        for name in pairs
    }


def _convert(pipeline_type: Any, file: LoraFile, source: Any, **where: Any) -> Any:
    """Have diffusers rename, cut and scale tensors; with them come alphas and metadata that it leaves to others."""
    try:
        return pipeline_type.lora_state_dict(source, return_alphas=True, return_lora_metadata=True, **where)
    except Exception as error:  # whatever a converter meets in a file of another format
        raise _unreadable(file, f"{type(error).__name__}: {error}") from error


def _left_out(pipeline_type: Any, file: LoraFile, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the tensors of a file that nothing depends on after conversion, which diffusers does not tell.

    The conversion runs on ones, which autograd follows from the names in the file to what comes out. Alphas do not
    count: they are taken as numbers, and change nothing without their factors.
    """
    with torch.enable_grad():
        marks = {key: torch.ones((), dtype=torch.bfloat16, requires_grad=True) for key in shapes}
        marked = {key: mark.expand(shapes[key]).clone() for key, mark in marks.items()}
        state = _convert(pipeline_type, file, marked)[0]
        ends = [tensor.sum() for tensor in state.values() if tensor.requires_grad]
        found = torch.autograd.grad(ends, [*marks.values()], allow_unused=True) if ends else [None] * len(marks)
    return [key for key, used in zip(marks, found) if used is None and not key.endswith(".alpha")]


def _multiply(up: Tensor, down: Tensor) -> bool:
    return up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0] > 0


def _peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors under PEFT's names, which a file may have for one part and older ones for another."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    texts = {key: tensor for key, tensor in state.items() if key.startswith("text_encoder")}
    others = {key: tensor for key, tensor in state.items() if key not in texts}
    for age in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        texts = convert_state_dict_to_peft(texts, original_type=age)
    return {**convert_unet_state_dict_to_peft(others), **texts}


def _scale(name: str, up_OR: Tensor, alphas: Mapping[str, Any], metadata: Mapping[str, Any]) -> float:
    """Return alpha / rank, from where the file says it; a file that says nothing means 1."""
    part, _, layer = name.partition(".")
    rank = up_OR.shape[1]
    if f"{name}.alpha" in alphas:
        return float(alphas[f"{name}.alpha"]) / rank
    if f"{part}.lora_alpha" not in metadata:
        return 1.0
    patterns: Mapping[str, float] = metadata.get(f"{part}.alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = float(next(own, metadata[f"{part}.lora_alpha"]))
    return alpha / (math.sqrt(rank) if metadata.get(f"{part}.use_rslora") else rank)


def _unreadable(file: LoraFile, why: str) -> InputError:
    return InputError(
        "this is no LoRA file that can be fused",
        where=str(file.path),
        why=why.strip().partition("\n")[0],
        advice="plain LoRA files that diffusers reads for this model can; fuse others into the model before",
    )
