"""How static ranges are estimated: one estimator for all layers, against the one that is foretold best for each layer.

Foretold as `--quant_type auto` foretells: the noise of the layer's input, on records that its range does not come from,
times what such noise becomes at the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import fsum
from statistics import mean

from torch import nn

from quant_core import SessionConfig, W8A8ProcessorConfig, W8A8QuantConfig
from quant_core.calibration.records import Record, as_records
from quant_core.layers.deployed import DeployedLayer, DeployedLinear
from quant_core.parallel.groups import Parallel
from quant_core.quality.output_error import layer_noise, of_tokens, output_gains
from quant_core.schemes.treatment import Treatment
from scripts.choices.asked import Asked
from scripts.study.grid import Method
from scripts.study.subject import Subject

_SCHEME, _CHOSEN = "w8a8", "by layer"
_NAMES = ("minmax", "histogram", "percentile", "mse")


def rows(asked: Asked) -> Iterator[Sequence[str]]:
    """Yield the table: the output's ratio and, in brackets, the pictures', means over seeds; what was chosen."""
    yield ("model", *_NAMES, _CHOSEN, "chosen")
    yield ("---",) * (len(_NAMES) + 3)
    for model in asked.models:
        cells: dict[str, list[tuple[float, float]]] = {name: [] for name in (*_NAMES, _CHOSEN)}
        counts = dict.fromkeys(_NAMES, 0)
        for seed in asked.seeds:
            subject = asked.subject(model, seed)
            chosen = best_by_layer(subject)
            for name in chosen.values():
                counts[name] += 1
            sessions = {name: subject.session(Method(_SCHEME, estimator=name)) for name in _NAMES}
            sessions[_CHOSEN] = _by_layer(sessions["minmax"], chosen)
            said = {name: name for name in _NAMES} | {_CHOSEN: str(chosen)}
            for name, config in sessions.items():
                deployed = subject.quantized(config)
                cells[name].append(
                    (subject.output(deployed).overall.decibels, mean(subject.psnrs(deployed, said[name])))
                )
        texts = (" ".join(f"{mean(each):.1f}" for each in zip(*found)) for found in cells.values())
        yield (model, *(f"{output} ({psnr})" for output, psnr in map(str.split, texts)), _said(counts))


def best_by_layer(subject: Subject) -> dict[str, str]:
    """Return for each layer the estimator whose noise is foretold to be least at the output, in the mean of steps."""
    records = subject.calibration
    fitted, held_out = records[: len(records) // 2], as_records(records[len(records) // 2 :])
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
    return config.model_copy(update={"calib_data": records})


def _layer(linear: nn.Module) -> DeployedLayer:
    assert isinstance(linear, DeployedLinear)
    return DeployedLayer(linear.arithmetic, {**dict(linear.named_parameters()), **dict(linear.named_buffers())})


def _by_layer(config: SessionConfig, chosen: Mapping[str, str]) -> SessionConfig:
    schemes = {
        layer: W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method=name))  # pyright: ignore[reportArgumentType]
        for layer, name in chosen.items()
    }
    return config.model_copy(update={"layer_schemes": schemes})


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
