"""CHOOSE: measure what each scheme costs in each layer and step, and choose what the job left to measurement.

`--quant_type auto` leaves the scheme of each layer, `--timestep_sep auto` the first static step. All ranks measure
together and take the first rank's choice; it is published beside the checkpoint, in a file that `--layer_schemes
@FILE` accepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from launcher.config.budget import budget_of
from launcher.config.job_config import AUTO, Quantization
from launcher.ranks.agreement import gather_objects
from launcher.stages.job import Job
from model_adapters.weights.loading import LoadedTransformer
from quant_core.calibration.replay import Progress
from quant_core.parallel.groups import Parallel
from quant_core.quality.budget import COSTS
from quant_core.quality.choice import Choice, decibels
from quant_core.quality.decide import LayerErrors, choose_layers, measure_layers, step_errors
from quant_core.quality.separator import advised_separator
from quant_core.schemes import SCHEMES
from quant_core.schemes.treatment import Treatment
from quant_core.session.config import SessionConfig
from quant_core.session.targets import layer_plan

_HEADER = """\
# What was chosen by measurement, and why.{again}
# error_db: the output's signal over the error that the layer alone would cause, by treatment. work: its share.
"""
_AGAIN = """ To use it again, edited or not:
#   --quant_type TYPE --layer_schemes @THIS_FILE --anti_method {method} --anti_groups every"""


def choose(
    job: Job,
    loaded: LoadedTransformer,
    session: SessionConfig,
    parallel: Parallel,
    progress: Progress,
) -> tuple[Quantization, str]:
    """Return the options with what was chosen in place of `auto`, and the text that says why.

    What a person said of a layer stays.
    """
    options = job.config.quantization
    job.watch.enter("choose")
    with job.model.computing():
        measurement = measure_layers(
            loaded.model, session, structure=job.model.adapter.structure, parallel=parallel, progress=progress
        )
        choice = None
        if options.is_auto:
            choice = choose_layers(measurement, budget_of(options.budget), {**COSTS, **options.scheme_costs})
    found, table, said = measurement.layers, {}, options.layer_schemes
    plan = layer_plan(loaded.model, session)
    chosen = {name: _planned(found[name], Treatment(scheme.key, scheme.smoothed)) for name, scheme in plan.items()}
    if choice is not None:
        table = decisions(choice, list(options.budget))
        chosen = {layer.name: layer.chosen.treatment for layer in choice.layers}
    if options.timestep_sep == AUTO:
        table |= _steps(found, chosen, job.config.pipeline.infer_steps)
    # The first rank's word counts, so that a last bit cannot part the ranks.
    table = gather_objects(job.ranks, table, what="what was chosen")[0]
    _say(job, table)
    rules = said | {name: scheme for name, scheme in table.get("layer_schemes", {}).items() if name not in said}
    separator = table.get("timestep_sep", options.timestep_sep)
    return options.model_copy(update={"layer_schemes": rules, "timestep_sep": separator}), _text(options, table)


def _planned(errors: LayerErrors, treatment: Treatment) -> Treatment:
    """Return the treatment that a layer has in the session: nothing is smoothed where there is nothing to smooth."""
    return treatment if treatment in errors.errors else Treatment(treatment.scheme)


def _steps(found: Mapping[str, LayerErrors], chosen: Mapping[str, Treatment], timesteps: int) -> dict[str, Any]:
    if not any(t.scheme in SCHEMES and SCHEMES[t.scheme].per_step for t in chosen.values()):
        return {"timestep_sep": None}
    static, dynamic = step_errors(found, chosen, timesteps)
    return {
        "timestep_sep": advised_separator(static, dynamic),
        "steps": [
            {"step": step, "static_db": round(decibels(s), 1), "dynamic_db": round(decibels(d), 1)}
            for step, (s, d) in enumerate(zip(static, dynamic))
        ],
    }


def _say(job: Job, table: Mapping[str, Any]) -> None:
    if "layer_schemes" in table:
        counts, expected = Counter(table["layer_schemes"].values()), table["expected"]
        job.console.say(
            f"choose: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}; "
            f"{expected['static_share']:.0%} of the work static, {expected['measured_db']:.1f} dB at the output"
        )
    if "timestep_sep" in table:
        job.console.say(f"choose: --timestep_sep {table['timestep_sep']}")


def _text(options: Quantization, table: Mapping[str, Any]) -> str:
    import yaml

    again = _AGAIN.format(method=options.anti_method or "m4") if "layer_schemes" in table else ""
    text = yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=True, width=200)
    return _HEADER.format(again=again) + text


def decisions(choice: Choice, budget: list[str]) -> dict[str, Any]:
    """Return the table as plain data."""
    total = sum(layer.work for layer in choice.layers)
    return {
        "budget": budget,
        "expected": {
            "sqnr_db": round(choice.sqnr, 2),
            "measured_db": None if choice.measured is None else round(choice.measured, 2),
            "static_share": round(choice.static_share, 4),
            "mean_cost": round(choice.cost, 4),
            "bytes": int(choice.bytes),
        },
        "layer_schemes": choice.layer_schemes,
        "decisions": [
            {
                "layer": layer.name,
                "chosen": layer.written,
                "work": round(layer.work / total, 6),
                "error_db": {str(each.treatment): round(each.sqnr, 1) for each in layer.candidates if each.error},
                "reason": layer.reason,
            }
            for layer in choice.layers
        ],
    }
