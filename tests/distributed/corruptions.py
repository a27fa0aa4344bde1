"""Ways to damage a published checkpoint, as a table: what is done to which job's files, and what has to be found.

Where the content is meant, sizes and digests in the manifest are written anew afterwards, so that they hide nothing;
where the digests are meant, they are left alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.files.fingerprint import Fingerprint
from launcher.files.run_folder import MANIFEST
from launcher.files.shard_note import FileDigest
from quant_core.arithmetic.numerics import NUMERICS

NAN, INF = float("nan"), float("inf")


@dataclass
class Folder:
    """A copy of a published checkpoint that may be changed."""

    path: Path
    scheme: str

    def weights(self, rank: int) -> Path:
        return self.path / f"quant_model_weight_{self.scheme}_{rank}.safetensors"

    def description(self, rank: int) -> Path:
        return self.path / f"quant_model_description_{self.scheme}_{rank}.json"

    def rewrite(self, rank: int, change: Callable[[dict[str, Tensor], dict[str, Any], dict[str, str]], object]) -> None:
        """Change a rank's tensors, its description and the strings of its header, in place."""
        path, described = self.weights(rank), self.description(rank)
        with safe_open(path, "pt") as file:
            header = dict(file.metadata())
        tensors, description = load_file(path), json.loads(described.read_text())
        change(tensors, description, header)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)
        described.write_text(json.dumps(description))
        path.chmod(0o640)

    def rewrite_manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.path / MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    def redo_digests(self) -> None:
        """Let the manifest vouch for the files as they are now."""

        def change(manifest: dict[str, Any]) -> None:
            there = [file["name"] for file in manifest["files"] if (self.path / file["name"]).is_file()]
            manifest["files"] = [FileDigest.of(self.path / name).model_dump() for name in there]

        self.rewrite_manifest(change)

    def swap(self, one: Path, other: Path) -> None:
        beside = one.with_name("beside")
        one.rename(beside)
        other.rename(one)
        beside.rename(other)


Damage = Callable[[Folder], object]


def put(name: str, value: float, *, rank: int = 0, place: int = 0) -> Damage:
    """Put a value into a tensor."""

    def change(tensors: dict[str, Tensor], *_: object) -> None:
        tensors[name].view(-1)[place] = value

    return lambda folder: folder.rewrite(rank, change)


def alter(name: str, change: Callable[[Tensor], Tensor], *, ranks: Sequence[int] = (0,)) -> Damage:
    """Replace a tensor by another one."""

    def changed(tensors: dict[str, Tensor], *_: object) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return lambda folder: [folder.rewrite(rank, changed) for rank in ranks]


def retype(name: str, kind: object, rank: int = 0) -> Damage:
    return lambda folder: folder.rewrite(rank, lambda _, description, __: description.update({name: kind}))


def drop(name: str, *, tensor: bool = True, entry: bool = True, ranks: Sequence[int] = (0,)) -> Damage:
    def change(tensors: dict[str, Tensor], description: dict[str, Any], _: object) -> None:
        if tensor:
            del tensors[name]
        if entry:
            del description[name]

    return lambda folder: [folder.rewrite(rank, change) for rank in ranks]


def header(rank: int = 0, **strings: str) -> Damage:
    return lambda folder: folder.rewrite(rank, lambda _, __, found: found.update(strings))


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: folder.rewrite_manifest(change)


def one_more_ulp(tensor: Tensor) -> Tensor:
    found = tensor.clone()
    bits = found.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).view(-1)
    bits[-1] += 1
    return found


def add_to(name: str, number: int) -> Damage:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] += number if tensor.view(-1)[0] < 127 else -number
        return tensor

    return alter(name, change)


def a_bias_beyond_int32(folder: Folder) -> None:
    """Give a row a bias that saturates, with everything that follows from it."""

    def change(tensors: dict[str, Tensor], *_: object) -> None:
        tensors[f"{COL}.bias"][0] = 1e30
        deq, codes, offset = (tensors[f"{COL}.{name}"] for name in ("deq_scale", "weight", "input_offset"))
        tensors[f"{COL}.quant_bias"] = NUMERICS["float32"].quant_bias(tensors[f"{COL}.bias"], deq, codes, offset)

    folder.rewrite(0, change)


def move_bias(name: str, *, keep: bool = False) -> Damage:
    """Put the bias of a row-split layer from rank 0 to rank 1."""

    def damage(folder: Folder) -> None:
        bias, kind = load_file(folder.weights(0))[name], json.loads(folder.description(0).read_text())[name]
        if not keep:
            drop(name)(folder)

        def add(tensors: dict[str, Tensor], description: dict[str, Any], _: object) -> None:
            tensors[name] = bias
            rest = dict(description)
            description.clear()
            for key, value in rest.items():
                description[key] = value
                if key == name.replace(".bias", ".weight"):
                    description[name] = kind

        folder.rewrite(1, add)

    return damage


def fewer_steps(folder: Folder) -> None:
    def change(tensors: dict[str, Tensor], *_: object) -> None:
        for name in tensors:
            if name.endswith(("input_scale", "input_offset", "quant_bias", "deq_scale")):
                tensors[name] = tensors[name][:-1].clone()

    folder.rewrite(1, change)


def narrower(folder: Folder) -> None:
    """Take an output from a layer of rank 1: all its tensors fit each other."""

    def change(tensors: dict[str, Tensor], *_: object) -> None:
        for name in ("weight", "bias", "weight_scale", "weight_offset"):
            tensors[f"{SMOOTHED}.linear.{name}"] = tensors[f"{SMOOTHED}.linear.{name}"][:-1].clone()

    folder.rewrite(1, change)


def float_on_one_rank(folder: Folder) -> None:
    def change(tensors: dict[str, Tensor], description: dict[str, Any], _: object) -> None:
        for name in ("weight_scale", "weight_offset"):
            del tensors[f"{REPLICATED}.{name}"], description[f"{REPLICATED}.{name}"]
        tensors[f"{REPLICATED}.weight"] = tensors[f"{REPLICATED}.weight"].to(torch.bfloat16)
        description[f"{REPLICATED}.weight"] = "FLOAT"

    folder.rewrite(1, change)


def without_container(folder: Folder) -> None:
    """Take a layer's factor away and call the layer as if it had never been smoothed, on both ranks."""

    def change(tensors: dict[str, Tensor], description: dict[str, Any], _: object) -> None:
        del tensors[f"{SMOOTHED}.div.mul_scale"], description[f"{SMOOTHED}.div.mul_scale"]
        for held in (tensors, description):
            for name in [name for name in held if name.startswith(f"{SMOOTHED}.linear.")]:
                held[name.replace(".linear.", ".")] = held.pop(name)  # type: ignore[assignment]

    for rank in (0, 1):
        folder.rewrite(rank, change)


def a_factor_nobody_asked_for(folder: Folder) -> None:
    """Smooth a layer by ones: everything fits, but no job asked for it."""

    def change(tensors: dict[str, Tensor], description: dict[str, Any], _: object) -> None:
        for held in (tensors, description):
            for name in [name for name in held if name.startswith(f"{COL}.")]:
                held[name.replace(COL, f"{COL}.linear")] = held.pop(name)  # type: ignore[assignment]
        width = tensors[f"{COL}.linear.weight"].shape[1]
        tensors[f"{COL}.div.mul_scale"] = torch.ones(width, dtype=torch.bfloat16)
        description[f"{COL}.div.mul_scale"] = "FLOAT"

    for rank in (0, 1):
        folder.rewrite(rank, change)


def swap_files(*, headers: bool) -> Damage:
    def damage(folder: Folder) -> None:
        folder.swap(folder.weights(0), folder.weights(1))
        folder.swap(folder.description(0), folder.description(1))
        for rank in (0, 1) if headers else ():
            header(rank, tp_rank=str(rank))(folder)

    return damage


def double(*, headers: bool, biases: bool = False) -> Damage:
    """Copy rank 0's files over rank 1's."""

    def damage(folder: Folder) -> None:
        shutil.copy(folder.weights(0), folder.weights(1))
        shutil.copy(folder.description(0), folder.description(1))
        if headers:
            header(1, tp_rank="1")(folder)
        for name in [name for name in load_file(folder.weights(1)) if biases and is_row(name)]:
            drop(name, ranks=[1])(folder)

    return damage


def is_row(name: str) -> bool:
    return name.endswith(".bias") and any(part in name for part in ("to_out.0", "to_add_out", "net.2"))


def one_rank_more(folder: Folder) -> None:
    shutil.copy(folder.weights(1), folder.weights(2))
    shutil.copy(folder.description(1), folder.description(2))
    header(2, tp_rank="2")(folder)


def one_rank_less(folder: Folder) -> None:
    folder.weights(1).unlink()
    folder.description(1).unlink()


def a_file_without_rank(folder: Folder) -> None:
    for path in (folder.weights(0), folder.description(0)):
        shutil.copy(path, path.with_name(path.name.replace("_0.", ".")))


def of_another_scheme(folder: Folder) -> None:
    shutil.copy(folder.weights(0), folder.path / "quant_model_weight_w8a16_0.safetensors")


def reorder(folder: Folder) -> None:
    def change(_: object, description: dict[str, Any], __: object) -> None:
        description[f"{COL}.weight"] = description.pop(f"{COL}.weight")

    folder.rewrite(0, change)


def type_last(folder: Folder) -> None:
    def change(_: object, description: dict[str, Any], __: object) -> None:
        description["model_quant_type"] = description.pop("model_quant_type")

    folder.rewrite(0, change)


def twice(folder: Folder) -> None:
    path = folder.description(0)
    path.write_text(path.read_text().replace("{", f'{{"{COL}.weight": "FLOAT",', 1))


def cut(path: Callable[[Folder], Path], count: int) -> Damage:
    return lambda folder: path(folder).write_bytes(path(folder).read_bytes()[:-count])


def flip_last(folder: Folder) -> None:
    content = bytearray(folder.weights(1).read_bytes())
    content[-1] ^= 1
    folder.weights(1).write_bytes(content)


def link(folder: Folder) -> None:
    path = folder.weights(0)
    path.rename(folder.path / "elsewhere")
    os.symlink("elsewhere", path)


def parts(folder: Folder) -> None:
    path = folder.weights(0)
    name = path.name.replace(".safetensors", "-00001-of-00001.safetensors")
    names = list(load_file(path))
    path.rename(folder.path / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))


def other_fields(**changed: object) -> Damage:
    """Let the whole folder be of a job with other options, consistently."""

    def damage(folder: Folder) -> None:
        def change(found: dict[str, Any]) -> None:
            found["fields"] |= changed
            found["fingerprint"] = Fingerprint(found["fields"]).digest

        folder.rewrite_manifest(change)
        told = json.loads((folder.path / MANIFEST).read_text())["fingerprint"]
        for rank in (0, 1):
            header(rank, fingerprint=told)(folder)

    return damage


# Layers of the tiny FLUX and the tiny SD3: column-split, row-split, whole on each rank, smoothed, kept float.
COL, ROW, REPLICATED = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "norm_out.linear"
SMOOTHED, FLOAT_ROW = "transformer_blocks.0.attn.to_k", "transformer_blocks.0.ff.net.2"
ATTENTION, NORM = "transformer_blocks.0.attn", "transformer_blocks.0.attn.norm_q.weight"
HALF = 2**40


class Corruption(NamedTuple):
    """What is done to the files of which job, and which rule has to name which file and tensor.

    file: what the file's name ends in. digests: whether the manifest vouches for the result.
    """

    job: str
    damage: Damage
    rule: str
    file: str
    tensor: str = ""
    digests: bool = True


W0, W1, D0, D1, M = "weight_{}_0.safetensors", "weight_{}_1.safetensors", "description_{}_0.json", "_1.json", MANIFEST
CORRUPTIONS: dict[str, Corruption] = {
    # Values that the tensor may not hold.
    "code -128": Corruption("steps", put(f"{COL}.weight", -128), "values", W0, f"{COL}.weight"),
    "weight scale 0": Corruption("steps", put(f"{COL}.weight_scale", 0), "values", W0, f"{COL}.weight_scale"),
    "weight scale nan": Corruption("steps", put(f"{COL}.weight_scale", NAN), "values", W0, f"{COL}.weight_scale"),
    "weight scale inf": Corruption(
        "smoothed", put(f"{REPLICATED}.weight_scale", INF), "values", W0, f"{REPLICATED}.weight_scale"
    ),
    "negative input scale": Corruption("steps", put(f"{ROW}.input_scale", -1), "values", W0, f"{ROW}.input_scale"),
    "offset with a fraction": Corruption(
        "steps", put(f"{ROW}.input_offset", 0.5), "values", W0, f"{ROW}.input_offset"
    ),
    "offset beyond 8 bits": Corruption("sd3", put(f"{ROW}.input_offset", 200), "values", W0, f"{ROW}.input_offset"),
    "deq scale nan": Corruption(
        "steps", put(f"{COL}.deq_scale", NAN, rank=1, place=-1), "values", W1, f"{COL}.deq_scale"
    ),
    "deq scale of zero bits": Corruption("sd3", put(f"{COL}.deq_scale", 0), "values", W0, f"{COL}.deq_scale"),
    "deq scale with a high half": Corruption(
        "sd3", alter(f"{COL}.deq_scale", lambda t: t + HALF), "values", W0, f"{COL}.deq_scale"
    ),
    "weight offset": Corruption("steps", put(f"{COL}.weight_offset", 1), "values", W0, f"{COL}.weight_offset"),
    "infinite bias": Corruption("smoothed", put(f"{REPLICATED}.bias", INF), "values", W0, f"{REPLICATED}.bias"),
    "nan in a norm": Corruption("steps", put(NORM, NAN, rank=1), "values", W1, NORM),
    "inf in a float weight": Corruption(
        "steps", put(f"{FLOAT_ROW}.weight", -INF), "values", W0, f"{FLOAT_ROW}.weight"
    ),
    "nan in a buffer": Corruption("sd3", put("pos_embed.pos_embed", NAN), "values", W0, "pos_embed.pos_embed"),
    "factor 0": Corruption(
        "smoothed", put(f"{SMOOTHED}.div.mul_scale", 0), "values", W0, f"{SMOOTHED}.div.mul_scale"
    ),
    "attention scale 0": Corruption(
        "smoothed", put(f"{ATTENTION}.fa_q.scale", 0), "values", W0, f"{ATTENTION}.fa_q.scale"
    ),
    "attention offset": Corruption(
        "smoothed", put(f"{ATTENTION}.fa_v.offset", 3), "values", W0, f"{ATTENTION}.fa_v.offset"
    ),
    # What follows from other tensors of the layer.
    "deq scale one unit off": Corruption(
        "steps", alter(f"{COL}.deq_scale", one_more_ulp), "deq_scale", W0, f"{COL}.deq_scale"
    ),
    "packed deq scale one bit off": Corruption(
        "sd3", alter(f"{COL}.deq_scale", one_more_ulp, ranks=[1]), "deq_scale", W1, f"{COL}.deq_scale"
    ),
    "deq scale of 19 bits": Corruption(
        "sd3", alter(f"{COL}.deq_scale", lambda t: t & 0xFFFFE000), "deq_scale", W0, f"{COL}.deq_scale"
    ),
    "deq scales of two rows": Corruption(
        "steps", alter(f"{COL}.deq_scale", lambda t: t.roll(1, 1)), "deq_scale", W0, f"{COL}.deq_scale"
    ),
    "input scale doubled": Corruption(
        "steps", alter(f"{COL}.input_scale", lambda t: t * 2), "deq_scale", W0, f"{COL}.deq_scale"
    ),
    "weight scale one unit off": Corruption(
        "sd3", alter(f"{COL}.weight_scale", one_more_ulp), "deq_scale", W0, f"{COL}.deq_scale"
    ),
    "quant bias one off": Corruption(
        "steps", alter(f"{COL}.quant_bias", one_more_ulp), "quant_bias", W0, f"{COL}.quant_bias"
    ),
    "quant bias of other steps": Corruption(
        "steps", alter(f"{COL}.quant_bias", lambda t: t.flip(0)), "quant_bias", W0, f"{COL}.quant_bias"
    ),
    "quant bias gone to 0": Corruption(
        "sd3", alter(f"{ROW}.quant_bias", torch.zeros_like, ranks=[1]), "quant_bias", W1, f"{ROW}.quant_bias"
    ),
    "one code changed": Corruption("steps", add_to(f"{COL}.weight", 1), "quant_bias", W0, f"{COL}.quant_bias"),
    "offset one off": Corruption(
        "sd3", alter(f"{COL}.input_offset", lambda t: t + 1), "quant_bias", W0, f"{COL}.quant_bias"
    ),
    "bias without its quant bias": Corruption(
        "steps", alter(f"{COL}.bias", lambda t: t + 1), "quant_bias", W0, f"{COL}.quant_bias"
    ),
    "quant bias at its end": Corruption(
        "steps", put(f"{COL}.quant_bias", 2**31 - 1), "room for the bias", W0, f"{COL}.quant_bias"
    ),
    "quant bias near its end": Corruption(
        "sd3", put(f"{COL}.quant_bias", -(2**31) + 9), "room for the bias", W0, f"{COL}.quant_bias"
    ),
    "bias that saturates": Corruption("steps", a_bias_beyond_int32, "room for the bias", W0, f"{COL}.quant_bias"),
    # Dtypes and shapes.
    "codes as float": Corruption(
        "steps", alter(f"{COL}.weight", torch.Tensor.bfloat16), "dtypes", W0, f"{COL}.weight"
    ),
    "scale of another dtype": Corruption(
        "steps", alter(f"{COL}.weight_scale", torch.Tensor.half), "dtypes", W0, f"{COL}.weight_scale"
    ),
    "deq scale packed": Corruption(
        "steps", alter(f"{COL}.deq_scale", torch.Tensor.long), "dtypes", W0, f"{COL}.deq_scale"
    ),
    "deq scale not packed": Corruption(
        "sd3", alter(f"{COL}.deq_scale", torch.Tensor.float), "dtypes", W0, f"{COL}.deq_scale"
    ),
    "quant bias of 64 bits": Corruption(
        "steps", alter(f"{COL}.quant_bias", torch.Tensor.long), "dtypes", W0, f"{COL}.quant_bias"
    ),
    "flat rows": Corruption(
        "steps", alter(f"{COL}.input_scale", torch.Tensor.flatten), "shapes", W0, f"{COL}.input_scale"
    ),
    "a row less in one layer": Corruption(
        "steps", alter(f"{ROW}.input_scale", lambda t: t[:-1]), "shapes", W0, f"{ROW}.input_scale"
    ),
    "heads as a row": Corruption(
        "smoothed", alter(f"{ATTENTION}.fa_k.scale", lambda t: t.T), "shapes", W0, f"{ATTENTION}.fa_k.scale"
    ),
    "half a factor": Corruption(
        "smoothed", alter(f"{SMOOTHED}.div.mul_scale", lambda t: t[::2]), "shapes", W0, f"{SMOOTHED}.div.mul_scale"
    ),
    # The description.
    "unknown type": Corruption("steps", retype(f"{COL}.weight", "W8A8_MIX"), "known types", D0, f"{COL}.weight"),
    "float in lower case": Corruption("steps", retype(NORM, "float", 1), "known types", D1, NORM),
    "float weight among codes": Corruption(
        "steps", retype(f"{COL}.weight", "FLOAT"), "types of a layer", D0, f"{COL}.weight"
    ),
    "quantized bias": Corruption("smoothed", retype(f"{ROW}.linear.bias", "W8A8_DYNAMIC"), "types of a layer", D0,
                                 f"{ROW}.linear.bias"),
    "entry lost": Corruption("steps", drop(NORM, tensor=False), "one to one", D0, NORM),
    "tensor lost": Corruption("steps", drop(NORM, entry=False), "one to one", D0, NORM),
    "deq scale lost": Corruption("steps", drop(f"{COL}.deq_scale"), "complete layers", D0, COL),
    "weight scale lost": Corruption("smoothed", drop(f"{REPLICATED}.weight_scale", ranks=[1]), "complete layers", D1,
                                    REPLICATED),
    "model type in lower case": Corruption("steps", retype("model_quant_type", "w8a8_timestep"), "model type", D0),
    "model type of no layer": Corruption("steps", retype("model_quant_type", "W8A8"), "manifest and files", W0),
    "attention type lost": Corruption("smoothed", lambda f: f.rewrite(0, lambda _, d, __: d.pop("fa_quant_type")),
                                      "attention type", D0),
    "attention type of none": Corruption("steps", retype("fa_quant_type", "FAQuant"), "attention type", D0),
    "type not first": Corruption("sd3", type_last, "order", D0),
    "tensors in another order": Corruption("steps", reorder, "order", D0, COL),
    "key twice": Corruption("steps", twice, "readable", D0),
    "half a description": Corruption("steps", cut(lambda f: f.description(0), 9), "readable", D0),
    # Smoothing.
    "factor gone": Corruption("smoothed", drop(f"{SMOOTHED}.div.mul_scale"), "smoothing", W0,
                              f"{SMOOTHED}.div.mul_scale"),
    "factor gone on all ranks": Corruption("smoothed", drop(f"{SMOOTHED}.div.mul_scale", ranks=[0, 1]), "smoothing",
                                           W1, f"{SMOOTHED}.div.mul_scale"),
    "factor gone without a trace": Corruption("smoothed", without_container, "smoothing", W0,
                                              f"{SMOOTHED}.div.mul_scale"),
    "factor of another layer": Corruption(
        "smoothed", alter(f"{SMOOTHED}.div.mul_scale", lambda t: t.flip(0), ranks=[0, 1]), "smoothing", W0,
        f"{SMOOTHED}.div.mul_scale"),
    "factor that nobody asked for": Corruption("steps", a_factor_nobody_asked_for, "smoothing", W0,
                                               f"{COL}.div.mul_scale"),
    # Agreement between ranks.
    "whole layer differs": Corruption("smoothed", add_to(f"{REPLICATED}.weight", 1), "equal tensors", W1,
                                      f"{REPLICATED}.weight"),
    "norm differs": Corruption("steps", put(NORM, 0.5, rank=1), "equal tensors", W1, NORM),
    "buffer differs": Corruption("sd3", put("pos_embed.pos_embed", 0.25, rank=1), "equal tensors", W1,
                                 "pos_embed.pos_embed"),
    "factor differs between ranks": Corruption(
        "smoothed", alter(f"{SMOOTHED}.div.mul_scale", one_more_ulp, ranks=[1]), "equal tensors", W1,
        f"{SMOOTHED}.div.mul_scale"),
    "row bias on the wrong rank": Corruption("smoothed", move_bias(f"{ROW}.linear.bias"), "biases", W1,
                                             f"{ROW}.linear.bias"),
    "row bias on both ranks": Corruption("smoothed", move_bias(f"{ROW}.linear.bias", keep=True), "biases", W1,
                                         f"{ROW}.linear.bias"),
    "row bias of a float layer": Corruption("steps", move_bias(f"{FLOAT_ROW}.bias", keep=True), "biases", W1,
                                            f"{FLOAT_ROW}.bias"),
    "bias lost on one rank": Corruption("smoothed", drop(f"{REPLICATED}.bias", ranks=[1]), "biases", W1,
                                        f"{REPLICATED}.bias"),
    "layer float on one rank": Corruption("smoothed", float_on_one_rank, "same layers", D1, f"{REPLICATED}.weight"),
    "fewer steps on one rank": Corruption("steps", fewer_steps, "same steps", W1),
    "narrower layer on one rank": Corruption("smoothed", narrower, "same form", W1, f"{SMOOTHED}.linear.weight"),
    "files swapped": Corruption("sd3", swap_files(headers=False), "headers", W0),
    "files swapped with their headers": Corruption("sd3", swap_files(headers=True), "biases", W1, f"{ROW}.bias"),
    "file doubled": Corruption("sd3", double(headers=False), "headers", W1),
    "file doubled with its header": Corruption("sd3", double(headers=True), "doubled files", W1, f"{COL}.weight"),
    "file doubled, header and biases": Corruption("smoothed", double(headers=True, biases=True), "doubled files", W1,
                                                  f"{COL}.weight"),
    "a rank too many": Corruption("steps", one_rank_more, "all ranks", "weight_{}_2.safetensors"),
    "a rank too few": Corruption("steps", one_rank_less, "all ranks", "weights"),
    "a file without a rank": Corruption("steps", a_file_without_rank, "all ranks", "weight_{}.safetensors"),
    # Identity.
    "flipped bit": Corruption("steps", flip_last, "digests", W1, digests=False),
    "changed description": Corruption("steps", lambda f: f.description(1).write_text(f.description(1).read_text()[:-1]),
                                      "digests", D1, digests=False),
    "file of another job": Corruption("steps", header(1, fingerprint="0" * 64), "fingerprints", W1),
    "file of no job": Corruption("steps", lambda f: f.rewrite(1, lambda _, __, h: h.pop("fingerprint")),
                                 "fingerprints", W1),
    "manifest of another job": Corruption("steps", manifest(lambda m: m.update(fingerprint="0" * 64)), "fingerprints",
                                          M),
    "a field changed": Corruption("steps", manifest(lambda m: m["fields"].update({"pipeline.seed": 7})),
                                  "fingerprints", M),
    "another layout": Corruption("steps", header(1, layout="megatron"), "manifest and files", W1),
    "another number of ranks": Corruption("sd3", manifest(lambda m: m.update(tp_size=4)), "manifest and files", W0),
    "another type in the manifest": Corruption("sd3", manifest(lambda m: m.update(quant_type="W8A16")),
                                               "manifest and files", W0),
    "another separator in a header": Corruption("steps", header(1, timestep_sep="1"), "manifest and files", W1),
    "separator beyond the steps": Corruption("steps", header(0, timestep_sep="5"), "separator", W0),
    "another separator in the manifest": Corruption(
        "steps", manifest(lambda m: m["timestep_policy"].update(timestep_sep=1)), "manifest and files", W0),
    "another registration": Corruption(
        "steps", manifest(lambda m: m["timestep_policy"]["registration"].update({"3.1": "pass"})), "registration", M),
    "job of more steps": Corruption("steps", other_fields(**{"pipeline.infer_steps": 8}), "options", W0),
    "job of another scheme": Corruption("sd3", other_fields(**{"quantization.quant_type": "w8a16"}), "options", W0),
    "job in another dtype": Corruption("sd3", other_fields(dtype="torch.bfloat16"), "options", W0),
    "no manifest": Corruption("steps", lambda f: (f.path / M).unlink(), "manifest", M, digests=False),
    "half a manifest": Corruption("steps", cut(lambda f: f.path / M, 30), "readable", M, digests=False),
    "file not in the manifest": Corruption("steps", manifest(lambda m: m["files"].pop()), "files of the manifest", D1,
                                           digests=False),
    "file of another scheme": Corruption("steps", of_another_scheme, "files of the manifest",
                                         "weight_w8a16_0.safetensors"),
    # Files.
    "readable by all": Corruption("steps", lambda f: f.weights(1).chmod(0o644), "mode", W1),
    "writable by the group": Corruption("steps", lambda f: f.description(0).chmod(0o660), "mode", D0),
    "executable": Corruption("steps", lambda f: f.weights(0).chmod(0o740), "mode", W0),
    "a link": Corruption("steps", link, "one file", W0),
    "in parts": Corruption("steps", parts, "one file", W0),
    "cut short": Corruption("steps", cut(lambda f: f.weights(0), 8), "readable", W0),
    "empty": Corruption("steps", lambda f: f.weights(0).write_bytes(b""), "readable", W0),
}  # fmt: skip
