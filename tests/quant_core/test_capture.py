"""A dumper records what a model is called with, each call in its denoising step, and changes nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quant_core import DumperManager, TimestepManager, quant_model
from quant_core.calibration.records import as_records, load_dump
from quant_core.calibration.replay import replay
from quant_core.errors import ConfigurationError, InputError


class Model(nn.Module):
    """Takes a tensor, an optional second, and an option; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.last = nn.Linear(3, 3)
        self.seen: list[tuple[Tensor, Any, Any, int | None]] = []

    def forward(self, x: Tensor, extra: Any = None, *, scale: float = 1.0) -> Tensor:
        self.seen.append((x.clone(), extra, scale, TimestepManager.get_timestep_idx()))
        return self.last(self.linear(x)) * scale


@pytest.fixture(autouse=True)
def _no_step() -> Iterator[None]:
    TimestepManager.set_timestep_idx(None)
    yield
    TimestepManager.set_timestep_idx(None)


def test_positional_arguments_keyword_arguments_and_defaults_are_captured_in_the_order_of_the_signature():
    model = Model()
    dumper = DumperManager(model)
    x = torch.ones(1, 3)
    model(x)
    model(extra=[x, {"a": None}], x=x)
    first, second = dumper.records
    assert torch.equal(first[0], x)
    assert first[1:] == [None]  # `scale` has no position, and its default comes by itself
    assert second[1][1] == {"a": None}


def test_an_argument_without_a_position_is_refused_where_positions_are_kept():
    model = Model()
    DumperManager(model)
    with pytest.raises(ConfigurationError, match="argument 'scale' of the model has no position"):
        model(torch.ones(1, 3), scale=2.0)


class Open(nn.Module):
    """Takes any arguments, of some of which the result is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen: list[Any] = []

    def forward(self, x: Tensor, /, *more: Tensor, factor: float = 1.0, **options: float) -> Tensor:
        self.seen.append((len(more), factor, options))
        return self.linear(x) * factor


def test_arguments_of_any_kind_are_replayed_as_they_were_given():
    model = Open()
    dumper = DumperManager(model, "timestep", step_source=lambda: 0)
    x = torch.ones(1, 3)
    calls = [lambda: model(x), lambda: model(x, x, x, factor=2.0), lambda: model(x, bias=3.0)]
    for call in calls:
        call()
    dumper.close()
    called, model.seen = model.seen, []
    replay(model, as_records(dumper.records), stage="again")
    assert model.seen == called == [(0, 1.0, {}), (2, 2.0, {}), (0, 1.0, {"bias": 3.0})]


def test_what_is_replayed_is_what_was_called(tmp_path: Path):
    model = Model()
    dumper = DumperManager(model, "timestep")
    for step in range(3):
        TimestepManager.set_timestep_idx(step)
        model(torch.full((1, 3), float(step)), scale=step + 0.5)
    records = as_records(load_dump(dumper.save(tmp_path / "calib.pth")))
    called, model.seen = model.seen, []
    TimestepManager.set_timestep_idx(7)
    replay(model, records, stage="observe")
    assert [(x.tolist(), *rest) for x, *rest in model.seen] == [(x.tolist(), *rest) for x, *rest in called]
    assert TimestepManager.get_timestep_idx() == 7  # as it was before


def test_guidance_in_two_calls_is_one_step_and_the_scheduler_is_asked_first():
    model, steps = Model(), iter([0, 0, 1, 1])
    TimestepManager.set_timestep_idx(9)
    dumper = DumperManager(model, "timestep", step_source=lambda: next(steps))
    for _ in range(4):
        model(torch.ones(1, 3))
    assert [record["timestep_idx"] for record in dumper.records] == [0, 0, 1, 1]


def test_a_record_says_which_forward_it_is():
    model = Model()
    dumper = DumperManager(model, "timestep", step_source=lambda: 4)
    model(torch.ones(1, 3))
    (record,) = dumper.records
    assert set(record) == {"tag", "timestep_idx", "module_name", "args", "kwargs"}
    assert (record["module_name"], record["args"], list(record["kwargs"])) == (
        "Model.forward",
        [],
        ["x", "extra", "scale"],
    )


def test_an_unknown_step_is_an_error_with_the_remedy():
    model = Model()
    DumperManager(model, "timestep")
    with pytest.raises(ConfigurationError) as caught:
        model(torch.ones(1, 3))
    assert "TimestepManager.set_timestep_idx" in str(caught.value)


def test_calls_inside_paused_are_left_out_also_after_an_error():
    model = Model()
    dumper = DumperManager(model)
    with dumper.paused():
        model(torch.ones(1, 3))
        with dumper.paused():
            model(torch.ones(1, 3))
        model(torch.ones(1, 3))
    with pytest.raises(ZeroDivisionError), dumper.paused():
        raise ZeroDivisionError
    model(torch.zeros(1, 3))
    assert len(dumper.records) == 1


def test_later_changes_of_a_tensor_do_not_change_the_record():
    model = Model()
    dumper = DumperManager(model)
    x = torch.ones(1, 3)
    model(x)
    x.zero_()
    model(x)
    assert [record[0].tolist() for record in dumper.records] == [[[1, 1, 1]], [[0, 0, 0]]]


def test_equal_tensors_are_kept_once_and_unequal_ones_apart():
    model = Model()
    dumper = DumperManager(model)
    for x in (torch.ones(1, 3), torch.ones(1, 3), torch.ones(3).expand(1, 3), torch.ones(3, 1).T):
        model(x)
    model(torch.ones(3))  # another shape
    model(torch.ones(1, 3).requires_grad_())
    first = dumper.records[0][0]
    assert [record[0] is first for record in dumper.records] == [True, True, True, True, False, True]
    assert not dumper.records[-1][0].requires_grad


def test_equal_bytes_of_two_dtypes_are_two_tensors():
    model = Model()
    dumper = DumperManager(model)
    model(torch.zeros(1, 3), extra=torch.zeros(1, 3, dtype=torch.int32))
    x, extra = dumper.records[0]
    assert (x.dtype, extra.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor(2.0), torch.ones(1, 3, dtype=torch.bfloat16)])
def test_empty_scalar_and_half_precision_tensors_are_captured(x: Tensor):
    model = Model()
    dumper = DumperManager(model)
    model(torch.ones(1, 3), extra=x)
    assert torch.equal(dumper.records[0][1], x)


@pytest.mark.parametrize("value", [object(), lambda: None, np.ones(2), {1, 2}, torch.float32])
def test_an_argument_that_a_safe_file_cannot_hold_is_refused_by_name(value: Any):
    model = Model()
    DumperManager(model)
    with pytest.raises(InputError) as caught:
        model(torch.ones(1, 3), extra={"inner": [value]})
    assert "argument 'extra.inner'" in str(caught.value)
    assert type(value).__name__ in str(caught.value)


def test_nothing_captured_is_nothing_written(tmp_path: Path):
    dumper = DumperManager(Model())
    with pytest.raises(InputError, match="nothing was captured"):
        dumper.save(tmp_path / "calib.pth")
    assert not (tmp_path / "calib.pth").exists()


def test_saving_ends_the_capture_and_leaves_no_hook(tmp_path: Path):
    model = Model()
    dumper = DumperManager(model)
    model(torch.ones(1, 3))
    dumper.save(tmp_path / "calib.pth")
    model(torch.ones(1, 3))
    assert len(dumper.records) == 1
    assert not model._forward_pre_hooks
    dumper.close()  # twice is once


def test_two_dumpers_share_nothing():
    one, two = Model(), Model()
    first, second = DumperManager(one), DumperManager(two)
    one(torch.ones(1, 3))
    assert (len(first.records), len(second.records)) == (1, 0)


def test_one_number_expanded_to_a_batch_of_one_is_captured():
    model = Model()
    dumper = DumperManager(model)
    step = torch.tensor(5.0).expand(1)  # as pipelines hand the time of a step to the transformer; its stride is 0
    model(torch.ones(1, 3), step)
    assert torch.equal(dumper.records[0][1], step)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigurationError, match="no capture mode 'step'"):
        DumperManager(Model(), "step")  # type: ignore[arg-type]


def test_a_dump_calibrates_a_fresh_model(tmp_path: Path):
    from quant_core import SessionConfig
    from tests.support.small_model import SCHEMES

    model = Model()
    dumper = DumperManager(model, "timestep")
    for step in range(2):
        TimestepManager.set_timestep_idx(step)
        model(torch.randn(4, 3))
    dump = load_dump(dumper.save(tmp_path / "calib.pth"))
    config = SessionConfig(processor_cfg_map={"w8a8_timestep": SCHEMES["w8a8_timestep"]()}, calib_data=dump)
    result = quant_model(Model(), config)
    assert (list(result.layers), result.timesteps) == (["linear"], 2)
