"""Resolve the configuration of a job: what was given, over the defaults of its model, checked by the rules.

A model changes defaults but never the shape of the tree: `job_config_class(model)` is `JobConfig` with the adapter's
pipeline options in place and the adapter's `DEFAULTS` as the defaults of the fields they name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import Field, create_model, model_validator

from launcher.config.config_errors import Origin, together, validated
from launcher.config.job_config import Evaluation, JobConfig, Output, Quantization, RankOptions, Section
from launcher.config.job_rules import RULES
from launcher.config.stored_job import with_its_paths
from launcher.config.yaml_text import parse_yaml
from model_adapters import load_options

_SECTIONS: Mapping[str, type[Section]] = {
    "quantization": Quantization,
    "ranks": RankOptions,
    "output": Output,
    "evaluation": Evaluation,
}


def job_config(model: str, tree: Mapping[str, Any], origin: Origin | None = None) -> JobConfig:
    """Build the configuration of a job of `model` from a tree of options, filling in the defaults.

    Raises:
        ConfigurationError: naming every wrong option, `origin` saying where each came from.
    """
    return validated(job_config_class(model), {**tree, "model": model}, origin)


def job_from_yaml(text: str) -> JobConfig:
    """Build a configuration from YAML text that names its model, such as the one beside a checkpoint.

    Raises:
        ConfigurationError: the text is no YAML mapping, or its options are wrong.
    """
    tree = with_its_paths(parse_yaml(text))
    return job_config(str(tree.get("model", "")), tree)


@cache
def job_config_class(model: str) -> type[JobConfig]:
    """Return `JobConfig` with the pipeline options and defaults of one adapter, which the rules check.

    Raises:
        ConfigurationError: no adapter has that name.
    """
    adapter = load_options(model)
    # Nothing given of the pipeline is the empty section, so that what it lacks is named.
    empty = Field(default_factory=dict, validate_default=True)
    fields: dict[str, Any] = {"model": (str, model), "pipeline": (adapter.OPTIONS, empty)}
    for name, section in _SECTIONS.items():
        of_model = _with_defaults(section, adapter.DEFAULTS)
        fields[name] = (of_model, Field(default_factory=of_model))
    return create_model("JobConfig", __base__=_CheckedJob, **fields)


class _CheckedJob(JobConfig):
    """Refuse options that do not fit each other."""

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> _CheckedJob:
        if problems := [problem for rule in RULES for problem in rule(self)]:
            raise together(problems)
        return self


def _with_defaults(section: type[Section], defaults: Mapping[str, object]) -> type[Section]:
    changed: dict[str, Any] = {
        name: (field.rebuild_annotation(), Field(defaults[name], validate_default=True, description=field.description))
        for name, field in section.model_fields.items()
        if name in defaults
    }
    return create_model(section.__name__, __base__=section, __doc__=section.__doc__, **changed)
