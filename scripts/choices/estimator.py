"""How static ranges are estimated: one estimator for all layers, against the one that is foretold best for each layer.

Foretold as `--quant_type auto` foretells: the noise of the layer's input, on records that its range does not come from,
times what such noise becomes at the output. Ranges are those of the float model's inputs, as with `--calibrate online`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import fsum
from statistics import mean

from torch import nn

from quant_core import SessionConfig, W8A8ProcessorConfig, W8A8QuantConfig
from quant_core.calibration.records import Record, as_records
from quant_core.layers.deployed import DeployedLayer, DeployedLinear
from quant_core.parallel.groups import Parallel
from quant_core.quality.output_error import layer_noise, of_tokens, output_gains
from quant_core.quality.replayed import sampled
from quant_core.schemes.treatment import Treatment
from scripts.choices.asked import Asked
from scripts.compare_online import online
from scripts.study.grid import Method
from scripts.study.subject import COMPARED_STEPS, Subject

_SCHEME, _CHOSEN = "w8a8", "by layer"
_NAMES = ("minmax", "histogram", "percentile", "mse")
# The default and the best of the others, each on all layers; the study has all of them.
_ALONE = ("minmax", "mse")


def rows(asked: Asked) -> Iterator[Sequence[str]]:
    """Yield the table: the output's ratio and, in brackets, the pictures', means over seeds; what was chosen."""
    yield ("model", *_ALONE, _CHOSEN, "chosen")
    yield ("---",) * (len(_ALONE) + 3)
    for model in asked.models:
        cells: dict[str, list[tuple[float, float]]] = {name: [] for name in (*_ALONE, _CHOSEN)}
        counts = Counter[str]()
        for seed in asked.seeds:
            subject = asked.subject(model, seed)
            chosen = best_by_layer(subject)
            counts.update(chosen.values())
            for name, config in _sessions(subject, chosen).items():
                deployed, said = subject.quantized(online(subject, config)), str(chosen) if name == _CHOSEN else name
                cells[name].append((subject.output(deployed).overall.decibels, mean(subject.psnrs(deployed, said))))
        means = ([mean(each) for each in zip(*found)] for found in cells.values())
        said = ", ".join(f"{counts[name]} {name}" for name in _NAMES)
        yield (model, *(f"{output:.1f} ({psnr:.1f})" for output, psnr in means), said)


def _sessions(subject: Subject, chosen: Mapping[str, str]) -> dict[str, SessionConfig]:
    found = {name: subject.session(Method(_SCHEME, estimator=name)) for name in _ALONE}
    schemes = {
        layer: W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method=name))  # pyright: ignore[reportArgumentType]
        for layer, name in chosen.items()
    }
    return {**found, _CHOSEN: found["minmax"].model_copy(update={"layer_schemes": schemes})}


def best_by_layer(subject: Subject) -> dict[str, str]:
    """Return for each layer the estimator whose noise is foretold to be least at the output, in the mean of steps."""
    records = as_records(subject.calibration)
    fitted, held_out = records[: len(records) // 2], sampled(records[len(records) // 2 :], COMPARED_STEPS)
    deployed = {name: subject.quantized(_on(subject, name, fitted)) for name in _NAMES}
    layers = {
        layer: {Treatment(name): _layer(model.get_submodule(layer)) for name, model in deployed.items()}
        for layer, module in deployed["minmax"].named_modules()
        if isinstance(module, DeployedLinear)
    }
    steps = sorted({record.step for record in held_out if record.step is not None})
    noise = layer_noise(subject.transformer, layers, held_out, steps, Parallel())
    probed = list({record.step: record for record in held_out}.values())
    gains = output_gains(subject.transformer, list(layers), probed, steps, of_tokens, Parallel())
    return {
        layer: min(
            _NAMES,
            key=lambda name: fsum(noise[layer][Treatment(name)].by_step[s].noise * gains[layer][s] for s in steps),
        )
        for layer in layers
    }


def _on(subject: Subject, estimator: str, records: Sequence[Record]) -> SessionConfig:
    config = subject.session(Method(_SCHEME, estimator=estimator))
    return online(subject, config.model_copy(update={"calib_data": records}))


def _layer(linear: nn.Module) -> DeployedLayer:
    assert isinstance(linear, DeployedLinear)
    return DeployedLayer(linear.arithmetic, {**dict(linear.named_parameters()), **dict(linear.named_buffers())})
