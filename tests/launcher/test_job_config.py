"""One tree of options: its defaults, its rules, its way to YAML and back."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from launcher.config.config_errors import ConfigurationErrors
from launcher.config.job_config import JobConfig, Output, Quantization, RankOptions
from launcher.config.option_flags import flags_of
from launcher.config.resolve import job_config, job_config_class, job_from_yaml
from model_adapters import adapter_names, load_options
from quant_core.errors import ConfigurationError

FOLDERS = {"quant_weight_save_folder": "weights", "quant_dump_calib_folder": "cache"}


def a_job(model: str = "flux", **sections: dict[str, Any]) -> JobConfig:
    tree = {"pipeline": {"path": "model"}, "quantization": {"do_quant": True}, "output": dict(FOLDERS)}
    for section, options in sections.items():
        tree[section] = {**tree.get(section, {}), **options}
    return job_config(model, tree)


def problems_of(**sections: dict[str, Any]) -> list[ConfigurationError]:
    with pytest.raises(ConfigurationError) as caught:
        a_job(**sections)
    return list(getattr(caught.value, "problems", [caught.value]))


# The parameter tables of the two user guides: every flag with its default, for the model it is listed under.
SHARED = {
    "prompt_path": "./calib_prompts.txt",
    "width": 1024,
    "height": 1024,
    "seed": 42,
    "device": "npu",
    "do_quant": False,
    "do_save_img": False,
    "quant_weight_save_folder": None,
    "quant_dump_calib_folder": None,
}
TABLES = {
    "sd3": {**SHARED, "infer_steps": 28, "save_path": Path("results"), "quant_type": "w8a8"},
    "flux": {
        **SHARED,
        "save_path": Path("res"),
        "device_id": 0,
        "prompt_type": "plain",
        "num_images_per_prompt": 1,
        "max_num_prompt": 0,
        "info_file_save_path": "./image_info.json",
        "infer_steps": 50,
        "use_cache": False,
        "batch_size": 1,
        "device_type": "A2-64g",
        "quant_type": "w8a8_timestep",
        "anti_method": None,
        "data_split_num": 1,
        "data_split_id": 0,
    },
}


@pytest.mark.parametrize(("model", "name"), [(model, name) for model, table in TABLES.items() for name in table])
def test_every_flag_of_the_parameter_tables_exists_with_its_default(model: str, name: str) -> None:
    tree = {"pipeline": {"path": "model"}, "output": {"do_save_img": True}}  # the least that is something to do
    job, flag = job_config(model, tree), next(f for f in flags_of(job_config_class(model)) if f.name == name)
    section, field = flag.path
    if name != "do_save_img":
        assert getattr(getattr(job, section), field) == TABLES[model][name]
    else:
        assert flag.field.default is False


@pytest.mark.parametrize("model", adapter_names())
def test_no_two_options_of_a_model_share_a_flag(model: str) -> None:
    names = [flag.name for flag in flags_of(job_config_class(model))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("model", adapter_names())
def test_every_default_of_an_adapter_names_an_option(model: str) -> None:
    names = {name for section in (Quantization, RankOptions, Output) for name in section.model_fields}
    assert set(load_options(model).DEFAULTS) <= names


@pytest.mark.parametrize("model", adapter_names())
def test_every_option_says_what_it_is_for(model: str) -> None:
    options = job_config_class(model)
    sections = [options.model_fields[name].annotation for name in ("pipeline", "quantization", "ranks", "output")]
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description, name


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_yaml_brings_the_same_configuration_back(model: str) -> None:
    job = a_job(model, quantization={"disable_names": ["a.*", "b"], "quant_type": "w8a8"}, ranks={"tp_size": 2})
    again = job_from_yaml(job.to_yaml())
    assert again == job
    assert again.to_yaml() == job.to_yaml()


def test_yaml_carries_the_description_of_each_option_as_a_comment() -> None:
    text = a_job().to_yaml()
    assert "  # denoising steps per image\n  infer_steps: 50\n" in text
    assert yaml.safe_load(text)["model"] == "flux"


def test_a_configuration_cannot_be_changed() -> None:
    job = a_job()
    with pytest.raises(ValidationError, match="frozen"):
        job.ranks.device = "cpu"  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="no model is called 'fluxx'") as caught:
        job_config("fluxx", {})
    assert "flux" in caught.value.advice


@pytest.mark.parametrize(
    ("sections", "where", "advice"),
    [
        ({"quantization": {"do_quant": False}}, "--do_quant, --do_save_img", "--do_save_img"),
        (
            {"output": {"quant_weight_save_folder": None}},
            "--quant_weight_save_folder",
            "add --quant_weight_save_folder",
        ),
        ({"output": {"quant_dump_calib_folder": None}}, "--quant_dump_calib_folder", "add --quant_dump_calib_folder"),
        (
            {"quantization": {"quant_type": "w8a8", "timestep_sep": 5}},
            "--timestep_sep, --quant_type",
            "--quant_type w8a8_timestep",
        ),
        ({"quantization": {"timestep_sep": 51}}, "--timestep_sep, --infer_steps", "--timestep_sep 25"),  # 50 steps
        ({"quantization": {"anti_alpha": 0.5}}, "--anti_alpha, --anti_method", "--anti_method m4 or m6"),
        ({"quantization": {"anti_fused": True}}, "--anti_fused, --anti_method", "drop --anti_fused"),
        ({"quantization": {"anti_groups": "all"}}, "--anti_groups, --anti_method", "--anti_method m3 or m4 or m6"),
        (
            {"quantization": {"anti_method": "m4", "anti_beta": 0.5}},
            "--anti_beta, --anti_method",
            "--anti_method m6",
        ),
        ({"pipeline": {"data_split_num": 2, "data_split_id": 2}}, "--data_split_num, --data_split_id", "change one"),
        ({"pipeline": {"width": 100}}, "--width", "1024"),
        ({"quantization": {"quant_type": "w8a8_dynamik"}}, "--quant_type", "w8a8_dynamic"),
        ({"quantization": {"anti_alpha": 2, "anti_method": "m6"}}, "--anti_alpha", "exponent"),
        ({"ranks": {"device": "cpu", "device_id": 1}}, "--device_id, --device", "drop --device_id"),
        ({"ranks": {"device": "gpu"}}, "--device", "npu"),
        ({"ranks": {"devise": "npu"}}, "ranks.devise", "device"),
        ({"pipeline": {"device": "npu"}}, "pipeline.device", "ranks"),
        ({"rank": {"device": "npu"}}, "rank", "ranks"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_do(sections: dict, where: str, advice: str) -> None:
    (problem,) = problems_of(**sections)
    assert problem.where == where
    assert advice in problem.advice
    assert problem.what
    assert problem.why
    assert len(str(problem).splitlines()) == 4


@pytest.mark.parametrize("boundary", [0, 50])
def test_the_boundary_between_dynamic_and_static_steps_may_be_either_end(boundary: int) -> None:
    assert a_job(quantization={"timestep_sep": boundary}).quantization.timestep_sep == boundary


def test_all_problems_are_told_and_not_only_the_first() -> None:
    problems = problems_of(pipeline={"width": "wide", "infer_steps": 0}, ranks={"tp_size": 0})
    assert [problem.where for problem in problems] == ["--infer_steps", "--width", "--tp_size"]
    rules = problems_of(output={"quant_weight_save_folder": None, "quant_dump_calib_folder": None})
    assert len(rules) == 2


def test_a_value_that_fits_neither_kind_of_an_option_is_one_problem() -> None:
    [problem] = problems_of(quantization={"timestep_sep": "foo"})
    assert problem.what == "--timestep_sep cannot be 'foo'"
    assert problem.why.endswith(", or it must be 'auto'")


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_threshold_that_nothing_can_miss_or_reach_is_refused(value: str) -> None:
    [problem] = problems_of(evaluation={"evaluate": 0, "min_layer_sqnr": value})
    assert "finite number" in problem.why


def test_several_problems_survive_pickling() -> None:
    error = ConfigurationErrors([ConfigurationError("one", advice="a"), ConfigurationError("two", where="b")])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_text_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="the configuration is"):
        job_from_yaml(text)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("model: flux\noutput: {}\n\noutput: {}\n", "output", "lines 2 and 4"),
        ("quantization:\n  quant_type: w8a8\n  do_quant: true\n  quant_type: w8a16\n", "quant_type", "lines 2 and 4"),
        ("output: {no_dump: true, no_dump: false}", "no_dump", "lines 1 and 1"),
        ("quantization:\n  layer_schemes:\n    a*: w8a8\n    'a*': float\n", "a*", "lines 3 and 4"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(text: str, key: str, lines: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{re.escape(key)}' is given twice") as caught:
        job_from_yaml(text)
    assert lines in caught.value.where


def test_yaml_cannot_run_code() -> None:
    with pytest.raises(ConfigurationError, match="not YAML"):
        job_from_yaml("model: !!python/object/apply:os.getcwd []")
