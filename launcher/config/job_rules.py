"""Say which options of a job do not fit each other, and what to change.

Each rule looks at the whole configuration and yields a problem for every combination it refuses; a rule that has
nothing to object to yields nothing. A new rule is a function and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launcher.config.job_config import AUTO, JobConfig, Quantization
from model_adapters.quality.gate import OF_PICTURES, Thresholds
from quant_core.errors import ConfigurationError
from quant_core.schemes.option_rules import OptionNames, estimator_problems, schemes_that, smoothing_problems
from quant_core.schemes.scheme import separator
from quant_core.schemes.treatment import PLAIN

_FLAGS = OptionNames("--quant_type", "--act_method", "--numerics", "--anti_fused", "--anti_method", "--layer_schemes")

Rule = Callable[[JobConfig], Iterator[ConfigurationError]]


def has_something_to_do(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse a run that would load the model and produce nothing."""
    if not job.quantization.do_quant and not job.output.do_save_img:
        yield ConfigurationError(
            "this run would produce nothing",
            where="--do_quant, --do_save_img",
            why="without --do_quant nothing is quantized, and without --do_save_img no image is saved",
            advice="add --do_quant to quantize, --do_save_img to make images, or both",
        )


def quantizing_has_its_folders(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse to quantize without a place for the calibration data and the weights."""
    if not job.quantization.do_quant:
        return
    examples = {
        "quant_weight_save_folder": "./results/quant/safetensors",
        "quant_dump_calib_folder": "./results/quant/cache",
    }
    for name, example in examples.items():
        if getattr(job.output, name) is None:
            yield ConfigurationError(
                f"--{name} is missing",
                where=f"--{name}",
                why=f"--do_quant needs it: {type(job.output).model_fields[name].description}",
                advice=f"add --{name} {example}",
            )


def files_have_names_that_are_text(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse names of bytes that are no UTF-8: the job's own description of itself could not be written at its end."""
    for name, value in (*job.output, *job.evaluation):
        if isinstance(value, Path) and not _is_text(str(value)):
            yield ConfigurationError(
                f"--{name} is no text",
                where=f"--{name} {value}",
                why="its name holds bytes that are no UTF-8, and what a job publishes tells of its options in UTF-8",
                advice="rename the folder, or give another one",
            )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def timestep_sep_is_a_step_of_a_timestep_scheme(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse a boundary between steps where nothing depends on the step, or beyond the last one."""
    boundary, quant_type, steps = job.quantization.timestep_sep, job.quantization.quant_type, job.pipeline.infer_steps
    if boundary is None:
        return
    if not any(scheme.per_step for scheme in job.quantization.schemes):
        those = schemes_that(lambda scheme: scheme.per_step)
        yield ConfigurationError(
            f"--timestep_sep {boundary} has no meaning for {quant_type}",
            where="--timestep_sep, --quant_type",
            why=f"only {those} treats steps differently",
            advice=f"drop --timestep_sep, or use --quant_type {those}",
        )
    elif boundary != AUTO and boundary > steps:
        yield ConfigurationError(
            f"--timestep_sep {boundary} lies beyond the last of {steps} steps",
            where="--timestep_sep, --infer_steps",
            why="steps below it run dynamic and the others static, so it is at most the number of steps",
            advice=f"--timestep_sep {separator(None, steps)} (half the steps), or leave it out",
        )


def smoothing_options_belong_to_their_method(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse a smoothing option that the chosen method would not read."""
    every_method = ("m3", "m4", "m6")
    readers = {
        "anti_alpha": ("m4", "m6"),
        "anti_beta": ("m6",),
        "anti_groups": every_method,
        "anti_fused": every_method,
    }
    method, options = job.quantization.smoothing_method, type(job.quantization).model_fields
    for name, methods in readers.items():
        value = getattr(job.quantization, name)
        if value != options[name].default and method not in methods:
            given = f"--{name}" if isinstance(value, bool) else f"--{name} {value}"
            yield ConfigurationError(
                f"{given} has no meaning {f'for {method}' if method else 'without --anti_method'}",
                where=f"--{name}, --anti_method",
                why=f"it is read by {' and '.join(methods)} only",
                advice=f"drop --{name}, or use --anti_method {' or '.join(methods)}",
            )


def options_fit_the_scheme(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse what the scheme, or the numerics, has no use for: an estimator, or a smoothing that it would not undo."""
    options = job.quantization
    yield from estimator_problems(
        options.quant_type,
        options.schemes,
        act_method=options.act_method,
        numerics=options.numerics,
        called=_FLAGS,
    )
    yield from smoothing_problems(
        options.quant_type,
        options.schemes,
        multiplies_input=options.anti_method is not None and not options.anti_fused,
        fused_with_plain=options.anti_fused and any(value.endswith(PLAIN) for value in options.layer_schemes.values()),
        called=_FLAGS,
    )


def auto_measures_what_it_chooses_from(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse options that `auto` does not measure, whether it chooses schemes or the first static step."""
    options, unmeasured = job.quantization, ("anti_fused", "act_method", "numerics")
    if options.is_auto:
        names = unmeasured if options.anti_groups == "every" else (*unmeasured, "anti_groups")
        why = "its measurements are of true ranges, and of unfused factors of every layer"
        yield from _without_meaning(
            options, names, "for auto", "--quant_type", why, "drop it, or choose one --quant_type"
        )
    elif options.timestep_sep == AUTO:
        why = "its measurements are of true ranges, and of unfused factors"
        advice = "drop it, or give --timestep_sep a number"
        yield from _without_meaning(options, unmeasured, "for --timestep_sep auto", "--timestep_sep", why, advice)


def only_auto_spends_a_budget(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse the options of `auto` without it."""
    if not job.quantization.is_auto:
        names, advice = ("budget", "scheme_costs"), "--quant_type auto, or drop it"
        when, why = "without --quant_type auto", "only auto spends a budget"
        yield from _without_meaning(job.quantization, names, when, "--quant_type", why, advice)


def _without_meaning(
    options: Quantization, names: Iterable[str], when: str, beside: str, why: str, advice: str
) -> Iterator[ConfigurationError]:
    """Refuse each of the options that somebody gave. when: where it has no meaning; beside: the option that decides."""
    for name in names:
        if getattr(options, name) != type(options).model_fields[name].get_default(call_default_factory=True):
            yield ConfigurationError(
                f"--{name} has no meaning {when}", where=f"--{name}, {beside}", why=why, advice=advice
            )


def device_id_counts_cards(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse to pick one of several processors: there is only `cpu`."""
    if job.ranks.device == "cpu" and job.ranks.device_id:
        yield ConfigurationError(
            f"--device_id {job.ranks.device_id} has no meaning for cpu",
            where="--device_id, --device",
            why="it picks one of several cards",
            advice="drop --device_id",
        )


def what_is_asked_for_is_measured(job: JobConfig) -> Iterator[ConfigurationError]:
    """Refuse a threshold on what nobody measures, and to measure what nobody makes."""
    options = job.evaluation
    asked = [name for name in Thresholds.model_fields if getattr(options, name) is not None]
    prompts = ["evaluate_prompts"] if options.evaluate_prompts else []
    if options.evaluate is None:
        if given := [*asked, *prompts]:
            yield ConfigurationError(
                f"--{given[0]} has no meaning without --evaluate",
                where=f"--{given[0]}, --evaluate",
                why="nothing is measured of the checkpoint",
                advice="add --evaluate 4 (four pictures), or --evaluate 0 for layers and outputs only",
            )
    elif not job.quantization.do_quant:
        yield ConfigurationError(
            f"--evaluate {options.evaluate} has no meaning without --do_quant",
            where="--evaluate, --do_quant",
            why="only a published checkpoint is evaluated",
            advice="add --do_quant, or drop --evaluate",
        )
    elif options.evaluate == 0 and (options.needs_pictures or options.evaluate_prompts):
        given = [*(name for name in asked if name in OF_PICTURES), *prompts]
        yield ConfigurationError(
            "--evaluate 0 makes no pictures",
            where=f"--evaluate, {', '.join(f'--{name}' for name in given)}",
            why="PSNR, SSIM and FLIP are measured on pictures, and only they need prompts",
            advice="--evaluate 4, or --min_output_sqnr and --min_layer_sqnr only",
        )


RULES: tuple[Rule, ...] = (
    has_something_to_do,
    quantizing_has_its_folders,
    files_have_names_that_are_text,
    timestep_sep_is_a_step_of_a_timestep_scheme,
    smoothing_options_belong_to_their_method,
    options_fit_the_scheme,
    auto_measures_what_it_chooses_from,
    only_auto_spends_a_budget,
    device_id_counts_cards,
    what_is_asked_for_is_measured,
)
