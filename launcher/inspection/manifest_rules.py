"""Whether the files are those that the manifest vouches for, and what the job that it describes was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from launcher.config.job_config import AUTO
from launcher.files.digests import digest_of_file
from launcher.files.fingerprint import Fingerprint
from launcher.files.manifest import Manifest, TimestepPolicy
from launcher.files.run_folder import MANIFEST
from launcher.inspection.published import Published
from quant_core.checkpoint.findings import Broken, Rule
from quant_core.checkpoint.resampling import SIGMAS_KEY
from quant_core.naming import inside, matches
from quant_core.schemes import QUANT_TYPES
from quant_core.structure import SmoothingGroup


def _is_there(published: Published) -> Iterator[Broken]:
    made_by_a_job = [rank for rank in published.ranks if "fingerprint" in rank.metadata]
    if published.manifest is None and made_by_a_job and not (published.folder / MANIFEST).exists():
        yield Broken("", "the manifest is missing", published.folder / MANIFEST)


def _digests(published: Published) -> Iterator[Broken]:
    for file in published.manifest.files if published.manifest else ():
        path = published.folder / file.name
        if not path.is_file():
            yield Broken("", f"{file.name}, which the manifest names, is missing", path)
        elif path.stat().st_size != file.bytes:
            yield Broken("", f"{file.name} has {path.stat().st_size} bytes, and {file.bytes} by the manifest", path)
        elif digest_of_file(path, fresh=True) != file.sha256:
            yield Broken("", f"{file.name} was changed after it was published", path)


def _names(published: Published) -> Iterator[Broken]:
    if published.manifest is None:
        return
    listed = {file.name for file in published.manifest.files}
    for name in published.names:
        if name not in listed:
            yield Broken("", f"{name} is not in the manifest", published.folder / name)
    for path in published.paths:
        if path.exists() and path.name not in (*listed, *published.names):
            yield Broken("", f"{path.name} is not in the manifest", path)


def _fingerprints(published: Published) -> Iterator[Broken]:
    manifest = published.manifest
    if manifest is None:
        return
    if Fingerprint(manifest.fields).digest != manifest.fingerprint:
        yield Broken("", "the manifest's fields do not have its fingerprint", published.folder / MANIFEST)
    for rank in published.ranks:
        told = rank.metadata.get("fingerprint")
        if told != manifest.fingerprint:
            what = f"{rank.files.weights.name} is of another job: fingerprint {(told or '(none)')[:12]}"
            yield Broken("", f"{what}, and {manifest.fingerprint[:12]} in the manifest", rank.files.weights)


def _describes_the_files(published: Published) -> Iterator[Broken]:
    """Compare what the manifest says of the checkpoint with what the files are."""
    manifest = published.manifest
    if manifest is None:
        return
    for rank in published.ranks:
        inventory, policy = rank.inventory, manifest.timestep_policy
        for name, told, found in (
            ("quant_type", manifest.quant_type, inventory.quant_type),
            ("layout", manifest.layout, rank.metadata.get("layout")),
            ("tp_size", str(manifest.tp_size), rank.metadata.get("tp_size")),
            ("timesteps", policy and policy.timesteps, inventory.timesteps),
            ("timestep_sep", policy and policy.timestep_sep, rank.checkpoint.timestep_sep),
        ):
            if told != found:
                yield Broken("", f"{name} is {told} in the manifest, and {found} in the files", rank.files.weights)


def _registration(published: Published) -> Iterator[Broken]:
    policy = published.manifest.timestep_policy if published.manifest else None
    if policy and policy != TimestepPolicy.of(policy.timesteps, policy.timestep_sep):
        yield Broken("", "the registration lines are not those of the steps", published.folder / MANIFEST)


def _options(published: Published) -> Iterator[Broken]:
    """Compare what the job was asked for with what the first rank's files are."""
    manifest = published.manifest
    if manifest is None:
        return
    first = published.ranks[0]
    for option, found in _consequences(published):
        asked = manifest.fields.get(option)
        if asked not in (None, AUTO, found):
            yield Broken("", f"{option} was {asked}, and the files say {found}", first.files.weights)


def _consequences(published: Published) -> Iterator[tuple[str, object]]:
    first = published.ranks[0].inventory
    types = [name for name, kind in QUANT_TYPES.items() if kind.scheme.quant_type == first.quant_type]
    with_attention = [name for name in types if QUANT_TYPES[name].with_attention == bool(first.attentions)]
    yield "quantization.quant_type", next(iter(with_attention), None)
    yield "quantization.rotate_values", bool(published.ranks[0].checkpoint.rotations)
    yield "dtype", str(first.dtype)
    yield "mesh.tp_size", len(published.ranks)
    checkpoint = published.ranks[0].checkpoint
    if SIGMAS_KEY in checkpoint.metadata:  # else its scheduler may compute a step twice, and each time has a row
        yield "pipeline.infer_steps", first.timesteps
    if first.timesteps is not None:
        yield "quantization.timestep_sep", checkpoint.timestep_sep


def _smoothing(published: Published) -> Iterator[Broken]:
    """Object to linears that share an input and not its factor, and to factors that are gone or nobody asked for."""
    if published.adapter is None:
        return
    method = published.option("quantization.anti_method")
    structure, multiplies = published.adapter.structure, not published.option("quantization.anti_fused")
    # Where each layer has a treatment of its own, some of a group are smoothed and others are not.
    is_auto = published.option("quantization.quant_type") == AUTO
    is_mixed = is_auto or bool(published.option("quantization.layer_schemes"))
    declared = structure.smoothing_groups
    if published.option("quantization.anti_groups") == "all":
        declared += structure.optional_smoothing_groups
    for rank in published.ranks:
        layers = rank.inventory.layers
        # A factor that is gone leaves the layer under the name of the linear inside its container.
        linears = {name.removesuffix(".linear"): name for name in layers} | {name: name for name in layers}
        for members in _groups(declared, list(linears)) if method and multiplies else ():
            for name in members:
                group = layers[linears[name]]
                if "mul_scale" not in group.members and not is_mixed:
                    what = f"'{name}.div.mul_scale' is gone: the layer was smoothed by {method}"
                    yield Broken(f"{name}.div.mul_scale", what, rank.files.weights)
            factors = {
                name: rank.checkpoint.read_raw(full)
                for name in members
                if (full := layers[linears[name]].members.get("mul_scale"))
            }
            for name, factor in factors.items():
                if not torch.equal(factor, next(iter(factors.values()))):
                    what = f"'{name}.div.mul_scale' is not that of '{members[0]}', which has the same input"
                    yield Broken(f"{name}.div.mul_scale", what, rank.files.weights)
        unasked = not method and not is_auto
        for name in [name for name, group in layers.items() if unasked and "mul_scale" in group.members]:
            yield Broken(f"{name}.div.mul_scale", f"'{name}' is smoothed, and no job asked for it", rank.files.weights)


def _groups(declared: Sequence[SmoothingGroup], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the groups all of whose members are among these layers, which are quantized."""
    for group in declared:
        first = group.linears[0]
        for name in names:
            block = name.removesuffix(first).removesuffix(".")
            members = tuple(inside(block, linear) for linear in group.linears)
            if members[0] == name and matches(block, group.block) and set(members) <= set(names):
                yield members


MANIFEST_RULES: tuple[Rule[Published], ...] = (
    Rule("manifest", "a job writes it last: without it nobody knows whether the rest is whole", _is_there),
    Rule("digests", "the manifest holds the size and sha256 of every file as it was published", _digests),
    Rule("files of the manifest", "it names every file of the checkpoint, and no other belongs there", _names),
    Rule("fingerprints", "the files and the manifest are of one job", _fingerprints),
    Rule("manifest and files", "the manifest describes these files", _describes_the_files),
    Rule("registration", "the lines register the steps from the separator on as static", _registration),
    Rule("options", "the files are what the job was asked for", _options),
    Rule("smoothing", "linears with one input are smoothed by one factor, which the runtime multiplies", _smoothing),
)


def is_fused(manifest: Manifest | None) -> bool:
    """Tell whether smoothing was folded into weights, which are then other ones than the float model's."""
    return bool(manifest and manifest.fields.get("quantization.anti_fused"))
