"""What each layer's quantization costs at the model's output: the noise that a treatment makes, times what it does.

    error at the output = noise of the weight's codes * gain for such noise + other noise * gain for the input's noise

per layer, treatment and denoising step. *Noise* is measured for every treatment: what the layer, deployed, makes of the
float model's own input, against the float layer. A *gain* is the layer's, whatever the treatment: the energy that
appears at the output for noise of known energy on the layer's output. There are two, because a weight's error makes
nearly the same error for all tokens, of which an attention may see nothing, and an input's error another for each. All
layers' gains are measured together: the real noise of a quantized weight, or of an input quantized token by token, is
added in all layers at once, each with a random sign, P times with other signs. The mean of sign times output change
keeps one layer's share and cancels the others (spec: choosing schemes by measurement).

With fewer layers than MOST_PROBES the signs are columns of a Hadamard matrix and the separation is exact. Otherwise
they are random, and of the energy that leaks over from all other layers, a P-th of it, the expected value is taken off.

Cost: each sampled record is run once for the noise, and 2 P times for the gains. Nothing needs a gradient, so that
collectives of tensor parallelism, offloading and block-by-block execution work as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.arithmetic.scales import fake_quantize_tokens
from quant_core.arithmetic.weight_codec import INT8_ROWS
from quant_core.calibration.records import Record
from quant_core.calibration.replay import Progress, replay, silent
from quant_core.calibration.timestep import TimestepManager
from quant_core.layers.deployed import DeployedLayer
from quant_core.naming import linear_at
from quant_core.parallel.groups import Parallel, reduce_over
from quant_core.quality.ratio import Ratio, StepRatios, compare_each
from quant_core.quality.replayed import float_output, kept_outputs
from quant_core.quality.treatments import Layers
from quant_core.schemes.treatment import Treatment

# Forwards of a sampled record for the gains of all layers. FLUX.1-dev has 466 layers to tell apart.
MOST_PROBES = 64
_SEED = 0

Steps = Sequence["int | None"]
# What an error of a layer is: of the linear and its input (..., I), the error of its output (..., O).
LayerError = Callable[[nn.Linear, Tensor], Tensor]


@torch.no_grad()
def layer_noise(
    model: nn.Module,
    layers: Layers,
    records: Sequence[Record],
    steps: Steps,
    parallel: Parallel,
    *,
    progress: Progress = silent,
) -> dict[str, dict[Treatment, StepRatios]]:
    """Return for each layer and treatment the ratio of its output to the noise it makes, by step, over all ranks.

    steps: those of all ranks' records.
    """
    found = {name: {treatment: StepRatios() for treatment in of_layer} for name, of_layer in layers.items()}
    with ExitStack() as stack:
        for name, ratios in found.items():
            hook = linear_at(model, name).register_forward_hook(_comparing(layers[name], ratios), prepend=True)
            stack.callback(hook.remove)
        replay(model, records, stage="noise of layers", measured=found, progress=progress)
    flat = [ratios for of_layer in found.values() for ratios in of_layer.values()]
    add_up(flat, steps, parallel)
    return found


def _comparing(deployed: Mapping[Treatment, Any], ratios: Mapping[Treatment, StepRatios]) -> Callable:
    def hook(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, step = inputs[0].float(), TimestepManager.get_timestep_idx()
        found = compare_each(float_output(linear, x), (_on(layer, x.device)(x, step) for layer in deployed.values()))
        for treatment, ratio in zip(deployed, found):
            ratios[treatment].add(step, ratio)

    return hook


def in_place_of(layer: DeployedLayer) -> Callable:
    """Return a forward hook that puts a deployed layer's output in the place of the float layer's."""

    def hook(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _on(layer, inputs[0].device)(inputs[0], TimestepManager.get_timestep_idx())

    return hook


def _on(layer: DeployedLayer, device: torch.device) -> DeployedLayer:
    return replace(layer, tensors={key: tensor.to(device) for key, tensor in layer.tensors.items()})


@torch.no_grad()
def output_gains(
    model: nn.Module,
    names: Sequence[str],
    records: Sequence[Record],
    steps: Steps,
    error: LayerError,
    parallel: Parallel,
    *,
    progress: Progress = silent,
) -> dict[str, dict[int | None, float]]:
    """Return by layer and step what one unit of such noise in the layer is at the output, as a share of its energy.

    error: the noise, `of_weight` or `of_tokens`. The model computes in its own dtype; only differences of its outputs
    are looked at.
    """
    signs_PL = probe_signs(len(names))
    exact_orthogonal = len(names) < len(signs_PL)
    added, shares = ({name: StepRatios() for name in names} for _ in range(2))
    for done, record in enumerate(records, start=1):
        energies: dict[str, Tensor] = {}
        with kept_outputs(model) as outputs:
            replay(model, [record], stage="")
            for signs_L in signs_PL:
                with _noise_in(model, error, dict(zip(names, signs_L.tolist())), energies):
                    replay(model, [record], stage="")
        for name, energy in zip(energies, torch.stack(list(energies.values())).tolist()):
            added[name].add(record.step, Ratio(energy))
        exact = outputs[0].float()
        changes_PD = torch.stack([(output.float() - exact).flatten() for output in outputs[1:]])
        share_L = _energies(signs_PL, changes_PD, exact_orthogonal)
        signal = exact.square().sum().item()
        for name, energy in zip(names, share_L.tolist()):
            shares[name].add(record.step, Ratio(signal, energy))
        progress("gains of layers", done, len(records))
    add_up([*shares.values(), *added.values()], steps, replace(parallel, tp_group=None))
    add_up(list(added.values()), steps, replace(parallel, dp_group=None))
    return {name: _gain(shares[name], added[name], len(signs_PL)) for name in names}


def probe_signs(layers: int) -> Tensor:
    """Return the sign of each layer's noise in each probe, (P, L): orthogonal where there are few layers."""
    if layers < MOST_PROBES:
        signs = torch.ones(1, 1)
        while len(signs) <= layers:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return signs[:, 1 : layers + 1]
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, 2, (MOST_PROBES, layers), generator=generator).float() * 2 - 1


def _energies(signs_PL: Tensor, changes_PD: Tensor, orthogonal: bool) -> Tensor:
    """Return the energy (L,) of each layer's own change of the output."""
    probes = len(signs_PL)
    # Through the Gram matrix: (L, D) of a large model would not fit.
    gram_PP = (changes_PD @ changes_PD.T).double()
    signs = signs_PL.double()
    energy_L = torch.einsum("pl,pq,ql->l", signs, gram_PP, signs) / probes**2
    if orthogonal:
        return energy_L
    leaked = gram_PP.diagonal().mean() / probes
    return ((energy_L - leaked) / (1 - 1 / probes)).clamp(min=0)


@contextmanager
def _noise_in(
    model: nn.Module, error: LayerError, signs: Mapping[str, float], energies: dict[str, Tensor]
) -> Iterator[None]:
    """Add to each layer's output its error, with the given sign, and to `energies` what it amounts to, by layer.

    The sums stay on the device: reading one waits for it.
    """
    with ExitStack() as stack:
        for name, sign in signs.items():
            # In front of a collective, which combines what every rank added to its own part.
            hook = linear_at(model, name).register_forward_hook(_adding(name, error, sign, energies), prepend=True)
            stack.callback(hook.remove)
        yield


def of_tokens(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the error of a layer's output when its input is quantized token by token."""
    return F.linear(fake_quantize_tokens(x) - x, linear.weight)


def of_weight(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the error of a layer's output when its weight is quantized by rows."""
    w_OI = linear.weight.float()
    return F.linear(x, (INT8_ROWS.round_trip(w_OI) - w_OI).to(linear.weight.dtype))


def _adding(name: str, error: LayerError, sign: float, energies: dict[str, Tensor]) -> Callable:
    def hook(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        noise = error(linear, inputs[0])
        energy = noise.float().square().sum()
        energies[name] = energies[name] + energy if name in energies else energy
        return output + sign * noise

    return hook


def _gain(shares: StepRatios, added: StepRatios, probes: int) -> dict[int | None, float]:
    """Return the gain by step. added: the sums of the noise's energy over all probes, as signal."""
    found: dict[int | None, float] = {}
    for step, share in shares.by_step.items():
        energy = added.by_step[step].signal / probes
        found[step] = 0.0 if not (energy and share.signal) else share.noise / share.signal / energy
    return found


def add_up(ratios: Sequence[StepRatios], steps: Steps, parallel: Parallel) -> None:
    """Add up over the ranks, of which one may have no record of a step."""
    keys = [(each, step) for each in ratios for step in steps]
    parts = [each.by_step.get(step, Ratio()) for each, step in keys]
    sums = torch.tensor([(part.signal, part.noise) for part in parts])
    for group in (parallel.tp_group, parallel.dp_group):
        sums = reduce_over(group, "sum", sums)
    for (each, step), (signal, noise) in zip(keys, sums.tolist()):
        each.by_step[step] = Ratio(signal, noise)
