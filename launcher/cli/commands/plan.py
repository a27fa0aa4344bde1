"""`plan MODEL`: say what a job with these flags would do, and all that keeps it from starting."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from pydantic import Field, create_model

from launcher.config.job_config import JobConfig
from launcher.config.resolve import job_config_class
from launcher.devices.kinds import use_only
from launcher.devices.launch import Launch


def options(name: str) -> type[JobConfig]:
    """Return the options of the job, `plan MODEL`, and the number of ranks, which a job learns from its launcher.

    It is no option of the job, so a file of the resolved options leaves it out.
    """
    about = "ranks of the job; left out: as many as hold one copy of the model"
    world = Field(default=None, ge=1, exclude=True, description=about)
    fields: dict[str, Any] = {"world_size": (int | None, world)}
    return create_model("PlanOptions", __base__=job_config_class(name.split()[-1]), **fields)


def run(options: JobConfig, launch: Launch | None) -> None:
    """Plan in this process, without a device; raises the first kind of problem that keeps the job from starting."""
    show(options, getattr(options, "world_size"))  # noqa: B009, the class is made above


def show(config: JobConfig, world: int | None) -> None:
    """Print the plan of a job, without asking the hub. Raises the problems that keep it from starting."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
    use_only("cpu")
    _import_quickly(config)
    from launcher.inspection.plan import make_plan
    from launcher.inspection.plan_text import told
    from launcher.journal.logs import quiet_libraries

    quiet_libraries()
    plan = make_plan(config, world)
    print("\n".join(told(plan, config.ranks.device)))
    plan.require_startable()


def _import_quickly(config: JobConfig) -> None:
    """Import the model's class without what a plan has no use for: text encoders' library, and torch's compiler.

    What reads a file that is brought goes through diffusers' pipelines, which do need it. This process plans, and ends.
    """
    from model_adapters import load_adapter

    adapter = load_adapter(config.model)
    if config.pipeline.lora or config.pipeline.transformer or adapter.library != "diffusers":
        return
    left_out = {name: stand_in for name, stand_in in _slow().items() if name not in sys.modules}
    sys.modules.update(left_out)  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        adapter.transformer_type()
    except (ImportError, AttributeError, RuntimeError):  # something installed builds on what is left out: with all
        for name in [*left_out, *(name for name in sys.modules if name.split(".")[0] == "diffusers")]:
            del sys.modules[name]


def _slow() -> dict[str, ModuleType | None]:
    """Return what diffusers imports beside the class of a model, for seconds, with what stands in for it.

    peft imports transformers. The compiler is asked to leave functions alone, and a plan compiles none.
    """

    def unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
        return function or unmarked

    compiler = ModuleType("torch._dynamo")
    vars(compiler).update(allow_in_graph=unmarked, disable=unmarked)
    return {"transformers": None, "peft": None, compiler.__name__: compiler}
