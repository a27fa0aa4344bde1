"""CHOOSE: for `--quant_type auto`, measure what each scheme costs in each layer, and choose within the budget.

All ranks measure together and take the first rank's choice; it is written beside the checkpoint, in a file that
`--layer_schemes @FILE` accepts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from launcher.config.budget import budget_of
from launcher.failure.phases import run_together
from launcher.ranks.agreement import gather_objects
from launcher.stages.job import Job, Results
from model_adapters.weights.loading import LoadedTransformer
from quant_core.atomic_file import write_text_atomically
from quant_core.calibration.replay import Progress
from quant_core.parallel.groups import Parallel
from quant_core.quality.budget import COSTS
from quant_core.quality.choice import Choice
from quant_core.quality.decide import choose_layers, measure_layers
from quant_core.session.config import SessionConfig

_HEADER = """\
# What was chosen for each layer, and why. To use it again, edited or not:
#   --quant_type TYPE --layer_schemes @THIS_FILE{smoothing}
# error_db: the output's signal over the error that the layer alone would cause, by treatment. work: its share.
"""


def choose(
    job: Job,
    results: Results,
    loaded: LoadedTransformer,
    session: SessionConfig,
    parallel: Parallel,
    progress: Progress,
) -> dict[str, str]:
    """Return the scheme of each layer, as `--layer_schemes` has them."""
    options = job.config.quantization
    job.watch.enter("choose")
    with job.model.computing():
        found = measure_layers(
            loaded.model, session, structure=job.model.adapter.structure, parallel=parallel, progress=progress
        )
    mine = choose_layers(found, budget_of(options.budget), {**COSTS, **options.scheme_costs})
    choice = gather_objects(job.ranks, mine, what="which scheme each layer gets")[0]
    run_together(job.ranks, "noting the choice", lambda: _write(job, results, choice))
    counts = Counter(layer.written for layer in choice.layers)
    job.console.say(
        f"choose: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}; "
        f"{choice.static_share:.0%} of the work static, {choice.sqnr:.1f} dB expected at the output"
    )
    return choice.layer_schemes


def _write(job: Job, results: Results, choice: Choice) -> None:
    import yaml

    if job.ranks.rank != 0:
        return
    options = job.config.quantization
    smoothing = f" --anti_method {options.anti_method or 'm4'} --anti_groups every"
    text = yaml.safe_dump(decisions(choice, list(options.budget)), sort_keys=False, allow_unicode=True, width=200)
    write_text_atomically(results.folder.decisions, _HEADER.format(smoothing=smoothing) + text)


def decisions(choice: Choice, budget: list[str]) -> dict[str, Any]:
    """Return the table as plain data."""
    total = sum(layer.work for layer in choice.layers)
    return {
        "budget": budget,
        "expected": {
            "sqnr_db": round(choice.sqnr, 2),
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
