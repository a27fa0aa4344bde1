"""Options have the names, defaults and limits of the published tables, and cost no import of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from model_adapters import adapter_names, load_adapter, load_options
from model_adapters.flux.options import FluxOptions
from model_adapters.options import DeviceType
from model_adapters.sd3.options import SD3Options
from quant_core.errors import ConfigurationError

_SHARED = {
    "transformer": None,
    "lora": (),
    "variant": None,
    "prompt_path": "./calib_prompts.txt",
    "width": 1024,
    "height": 1024,
    "seed": 42,
    "prompt_type": "plain",
    "num_images_per_prompt": 1,
    "max_num_prompt": 0,
    "info_file_save_path": "./image_info.json",
    "batch_size": 1,
    "data_split_num": 1,
    "data_split_id": 0,
    "guidance_scale": None,
    "dtype": None,
}
_FLUX_ONLY = {"infer_steps": 50, "use_cache": False, "device_type": "A2-64g"}


@pytest.mark.parametrize(
    ("options", "expected"), [(FluxOptions, _SHARED | _FLUX_ONLY), (SD3Options, _SHARED | {"infer_steps": 28})]
)
def test_defaults_are_those_of_the_published_tables(options, expected):
    assert options(path="m").model_dump(exclude={"path"}) == expected


@pytest.mark.parametrize("options", [FluxOptions, SD3Options])
def test_every_field_explains_itself(options):
    assert all(field.description for field in options.model_fields.values())


def test_the_path_of_sd3_has_the_name_of_its_table_and_the_common_one():
    assert SD3Options.model_validate({"sd3_model_path": "m"}).path == "m"
    assert SD3Options.model_validate({"path": "m"}).path == "m"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 1000}, "multiple of 16"),
        ({"height": 0}, "greater than 0"),
        ({"infer_steps": 0}, "greater than or equal to 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"num_images_per_prompt": 0}, "greater than or equal to 1"),
        ({"max_num_prompt": -1}, "greater than or equal to 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"data_split_num": 2, "data_split_id": 2}, "must be below data_split_num 2: use 0 to 1"),
        ({"device_type": "A2-16g"}, "A2-32g-dual"),
        ({"guidance_scale": "inf"}, "finite number"),
        ({"prompt_type": "csv"}, "hpsv2"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"path": ""}, "it is empty"),
        ({"witdh": 64}, "Extra inputs are not permitted"),
    ],
)
def test_values_outside_their_range_are_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        FluxOptions.model_validate({"path": "m"} | changes)


def test_the_path_is_required():
    with pytest.raises(ValidationError, match="path"):
        FluxOptions.model_validate({})


@pytest.mark.parametrize(
    ("device_type", "tp_size", "cpu_offload"),
    [("A2-64g", 1, False), ("A2-32g-single", 1, True), ("A2-32g-dual", 2, False)],
)
def test_device_types_name_cards_and_offload(device_type, tp_size, cpu_offload):
    options = FluxOptions.model_validate({"path": "m", "device_type": device_type})
    assert options.hardware == DeviceType(name=device_type, tp_size=tp_size, cpu_offload=cpu_offload)
    assert SD3Options(path="m").hardware is None


def test_model_specific_defaults_are_those_of_the_published_tables():
    assert load_options("flux").DEFAULTS == {"quant_type": "w8a8_timestep", "save_path": "./res"}
    assert load_options("sd3").DEFAULTS == {"quant_type": "w8a8", "save_path": "./results"}


def test_models_are_found_by_their_folders():
    assert adapter_names() == ["flux", "sd3"]
    for name in adapter_names():
        assert load_adapter(name).name == name
        assert load_adapter(name).options is load_options(name).OPTIONS


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ConfigurationError, match="'fluxx'") as caught:
        load_options("fluxx")
    assert caught.value.advice == "flux (nearest name)"


def test_reading_options_imports_neither_torch_nor_diffusers():
    program = (
        "import sys, model_adapters as m; [m.load_options(n) for n in m.adapter_names()]; "
        "sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
