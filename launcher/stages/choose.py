"""CHOOSE: measure what each scheme costs in each layer and step, and choose what the job left to measurement.

`--quant_type auto` leaves the scheme of each layer, `--timestep_sep auto` the first static step. All ranks measure
together and take the first rank's choice; it is published beside the checkpoint, in a file that `--layer_schemes
@FILE` accepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from launcher.config.budget import budget_of
from launcher.config.job_config import AUTO, Quantization
from launcher.config.layer_schemes import HOLDS_WITH, words_of
from launcher.ranks.agreement import gather_objects
from launcher.stages.job import Job
from launcher.stages.processors import ROWS_IN_EVERY_STEP
from model_adapters.weights.loading import LoadedTransformer
from quant_core.calibration.replay import Progress
from quant_core.naming import matches
from quant_core.parallel.groups import Parallel
from quant_core.quality.budget import COSTS
from quant_core.quality.choice import Choice, decibels
from quant_core.quality.decide import LayerErrors, Measurement, choose_layers, measure_layers, step_errors
from quant_core.quality.separator import advised_separator
from quant_core.schemes import SCHEMES
from quant_core.schemes.treatment import Treatment
from quant_core.session.config import SessionConfig
from quant_core.session.targets import layer_plan

_HEADER = """\
# What was chosen by measurement, and why.{again}
# error_db: the output's signal over the error that the layer alone would cause, by treatment. work: its share.
"""
_AGAIN = """ To use it again, edited or not, with the job's other options:
#   {flags}"""


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
            loaded.model,
            session,
            given=given_layers(loaded.model, session, options),
            structure=job.model.adapter.structure,
            parallel=parallel,
            progress=progress,
        )
        table = table_of(measurement, options, job.config.pipeline.infer_steps)
    # The first rank's word counts, so that a last bit cannot part the ranks.
    table = gather_objects(job.ranks, table, what="what was chosen")[0]
    _say(job, table)
    return with_choice(options, table), _text(options, table)


def with_choice(options: Quantization, table: Mapping[str, Any]) -> Quantization:
    """Return the options with what the table says in place of `auto`."""
    return options.model_copy(update={key: table[key] for key in ("layer_schemes", "timestep_sep") if key in table})


def given_layers(model: nn.Module, session: SessionConfig, options: Quantization) -> list[str]:
    """Return the layers whose scheme is not measurement's to choose: all without `auto`, else those of a person."""
    plan = layer_plan(model, session)
    return [name for name in plan if not options.is_auto or matches(name, options.layer_schemes)]


def table_of(found: Measurement, options: Quantization, timesteps: int) -> dict[str, Any]:
    """Return what is chosen, and why, as plain data: a scheme for each layer, the first static step, or both."""
    table: dict[str, Any] = {}
    chosen = {name: layer.given for name, layer in found.layers.items() if layer.given is not None}
    if options.is_auto:
        choice = choose_layers(found, budget_of(options.budget), {**COSTS, **options.scheme_costs})
        table = decisions(choice, options)
        chosen = {layer.name: layer.chosen.treatment for layer in choice.layers}
    if options.timestep_sep == AUTO:
        table |= _steps(found.layers, chosen, timesteps)
    return table


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
        counts, expected = Counter(row["chosen"] for row in table["decisions"]), table["expected"]
        wanted = expected.get("not_reached_db")
        job.console.say(
            f"choose: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}; "
            f"{expected['static_share']:.0%} of the work static, {expected['measured_db']:.1f} dB at the output"
            + ("" if wanted is None else f", not the {wanted:g} of --budget: nothing more helps that it allows")
        )
    if table.get("timestep_sep") is not None:
        job.console.say(f"choose: --timestep_sep {table['timestep_sep']}")


def _text(options: Quantization, table: Mapping[str, Any]) -> str:
    import yaml

    again, content = "", dict(table)
    if "decisions" in table:
        options_again = holding(options, table)
        flags = words_of({"layer_schemes": "@THIS_FILE", **options_again})
        again, content = _AGAIN.format(flags=" ".join(flags)), {HOLDS_WITH: options_again, **content}
    return _HEADER.format(again=again) + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=200)


def holding(options: Quantization, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that quantize as `auto` did, with the table as a file."""
    schemes = (Treatment.of(value).scheme for value in table["layer_schemes"].values())
    separator = table.get("timestep_sep", options.timestep_sep or ROWS_IN_EVERY_STEP)
    found = {
        "quant_type": options.main_type,
        "timestep_sep": separator if any(name in SCHEMES and SCHEMES[name].per_step for name in schemes) else None,
        "anti_method": options.smoothing_method,
        "anti_groups": "every",
        "anti_alpha": options.anti_alpha,
        "anti_beta": options.anti_beta,
        "rotate_values": options.rotate_values or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def decisions(choice: Choice, options: Quantization) -> dict[str, Any]:
    """Return the table as plain data; its map begins with a person's rules, which win."""
    total, wanted = sum(layer.work for layer in choice.layers), budget_of(options.budget).sqnr
    reached = choice.sqnr if choice.measured is None else choice.measured
    chosen = {n: scheme for n, scheme in choice.layer_schemes.items() if not matches(n, options.layer_schemes)}
    return {
        "budget": list(options.budget),
        "expected": {
            "sqnr_db": round(choice.sqnr, 2),
            "measured_db": None if choice.measured is None else round(choice.measured, 2),
            "static_share": round(choice.static_share, 4),
            "mean_cost": round(choice.cost, 4),
            "bytes": int(choice.bytes),
            **({"not_reached_db": wanted} if wanted is not None and reached < wanted else {}),
        },
        "layer_schemes": {**options.layer_schemes, **chosen},
        "decisions": [
            {
                "layer": layer.name,
                "chosen": str(layer.chosen.treatment),
                "work": round(layer.work / total, 6),
                "error_db": {str(each.treatment): round(each.sqnr, 1) for each in layer.candidates if each.error},
                "reason": layer.reason,
            }
            for layer in choice.layers
        ],
    }
