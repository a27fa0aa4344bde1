"""The manifests are what Kubernetes, Volcano and Kubeflow Trainer accept, and say what a job on cards needs."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.failure.exit_codes import ExitCode
from tests.support.job_templates import SCRIPTS

FOLDER = SCRIPTS / "kubernetes"
CUSTOM_RESOURCES = Path(__file__).resolve().parents[1] / "data" / "custom_resources.yaml"
# The oldest release in which podFailurePolicy is stable, and so the oldest that the manifests promise.
KUBERNETES = "1.31"
SHORT = {"metadata": {"name": "x"}}
# What a second start meets again.
FINAL = {ExitCode.CONFIGURATION, ExitCode.ENVIRONMENT, ExitCode.INPUT, ExitCode.VERIFICATION}


def documents() -> list[dict[str, Any]]:
    """Return every object in the manifests."""
    return [found for file in sorted(FOLDER.glob("*.yaml")) for found in yaml.safe_load_all(file.read_text())]


def identity(document: dict[str, Any]) -> str:
    return f"{document['apiVersion']} {document['kind']}"


def job_specs(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is a batch/v1 job inside an object, as Kubernetes will see it."""
    spec = document["spec"]
    if document["kind"] == "ClusterTrainingRuntime":
        return [job["template"]["spec"] for job in spec["template"]["spec"]["replicatedJobs"]]
    if "tasks" in spec:
        return [{"template": task["template"]} for task in spec["tasks"]]
    return [spec] if "template" in spec else []


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [job["template"]["spec"] for job in job_specs(document)]


def holders_of(key: str, node: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping below `node` that has the key."""
    if isinstance(node, dict):
        if key in node:
            yield node
        for value in list(node.values()):
            yield from holders_of(key, value)
    elif isinstance(node, list):
        for value in node:
            yield from holders_of(key, value)


def shell_scripts() -> list[str]:
    return [holder["args"][0] for document in documents() for holder in holders_of("args", document)]


EVERY = pytest.mark.parametrize("document", documents(), ids=identity)
CUSTOM = pytest.mark.parametrize(
    "document", [found for found in documents() if identity(found) != "batch/v1 Job"], ids=identity
)
WITH_PODS = pytest.mark.parametrize("document", [found for found in documents() if pods(found)], ids=identity)


@WITH_PODS
def test_the_pods_fit_the_schema_of_kubernetes(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    specs = job_specs(document)
    assert specs, "whoever has pods has a specification of them"
    for spec in specs:
        job = {"apiVersion": "batch/v1", "kind": "Job", **SHORT, "spec": spec}
        validator.validate(job, KUBERNETES, strict=True)


def test_the_schema_of_kubernetes_finds_a_misspelt_field() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", **SHORT, "spec": copy.deepcopy(job_specs(documents()[0])[0])}
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(validator.ValidationError, match="terminationGracePeriod"):
        validator.validate(job, KUBERNETES, strict=True)


def check_custom_resource(document: dict[str, Any]) -> None:
    """Raise jsonschema's ValidationError unless the object fits the schema of its kind."""
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    schemas = yaml.safe_load(CUSTOM_RESOURCES.read_text())
    schema = {**schemas[identity(document)], "definitions": schemas["definitions"]}
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(document, schema)


@CUSTOM
def test_custom_resources_fit_their_schemas(document: dict[str, Any]) -> None:
    check_custom_resource(document)


@CUSTOM
def test_a_misspelt_field_anywhere_in_a_custom_resource_is_found(document: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    fields = {"replicas", "minAvailable", "event", "exitCode", "onJobFailureReasons"}
    fields |= {"numProcPerNode", "maxRestarts", "runtimeRef", "resourcesPerNode"}
    found = [field for field in sorted(fields) if list(holders_of(field, document))]
    assert found
    for field in found:
        wrong = copy.deepcopy(document)
        for holder in holders_of(field, wrong):
            holder[f"{field}s"] = holder.pop(field)
        with pytest.raises(jsonschema.ValidationError, match=f"{field}s?'"):
            check_custom_resource(wrong)


@EVERY
def test_requests_equal_limits_and_name_the_cards(document: dict[str, Any]) -> None:
    for resources in holders_of("limits", document):
        assert resources["requests"] == resources["limits"], "cards are not divisible, and a guaranteed pod stays"
        assert resources["limits"]["huawei.com/Ascend910"] >= 2


@WITH_PODS
def test_a_pod_has_shared_memory_with_a_limit_and_time_to_save(document: dict[str, Any]) -> None:
    for pod in pods(document):
        (container,) = pod["containers"]
        environ = {entry["name"]: entry["value"] for entry in container["env"]}
        assert int(environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
        assert environ["TORCHELASTIC_ERROR_FILE"] == container["terminationMessagePath"]
        (memory,) = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
        assert memory["medium"] == "Memory"
        assert memory["sizeLimit"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@EVERY
def test_ranks_of_a_pod_are_as_many_as_its_cards(document: dict[str, Any]) -> None:
    cards = {resources["limits"]["huawei.com/Ascend910"] for resources in holders_of("limits", document)}
    ranks = {holder["numProcPerNode"] for holder in holders_of("numProcPerNode", document)}
    for holder in holders_of("args", document):
        ranks |= {int(line.split()[0][6:]) for line in holder["args"][0].splitlines() if line.startswith("ranks=")}
    assert not cards or cards == ranks


def exit_codes(action: str, document: dict[str, Any]) -> set[int]:
    """Return the exit codes that a manifest answers with an action."""
    rules = [rule for job in job_specs(document) for rule in job.get("podFailurePolicy", {}).get("rules", [])]
    of_pods = {
        code for rule in rules if rule["action"] == action for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    policies = [policy for policy in document["spec"].get("policies", []) if policy["action"] == action]
    return of_pods | {policy["exitCode"] for policy in policies if "exitCode" in policy}


@WITH_PODS
def test_a_failure_that_would_come_again_ends_the_job_at_once(document: dict[str, Any]) -> None:
    assert exit_codes("FailJob", document) | exit_codes("TerminateJob", document) == FINAL
    for runtime in holders_of("failurePolicy", document):
        (rule,) = runtime["failurePolicy"]["rules"]  # else Trainer would start all again whatever the pods' policy says
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_a_pod_that_was_asked_to_stop_is_replaced_and_not_counted() -> None:
    (job,) = [document for document in documents() if identity(document) == "batch/v1 Job"]
    assert exit_codes("Ignore", job) == {ExitCode.PREEMPTED}


def test_volcano_looks_at_the_exit_code_before_the_event() -> None:
    """The first policy that fits counts, and a pod that ends with an exit code is a failed pod too."""
    (gang,) = [document for document in documents() if "tasks" in document["spec"]]
    is_code = ["exitCode" in policy for policy in gang["spec"]["policies"]]
    assert is_code == sorted(is_code, reverse=True)


def test_all_pods_of_a_gang_are_needed() -> None:
    for document in documents():
        if "tasks" in document["spec"]:
            assert document["spec"]["minAvailable"] == sum(task["replicas"] for task in document["spec"]["tasks"])


@pytest.mark.parametrize("script", shell_scripts())
def test_the_script_of_a_pod_is_sound_shell_and_hands_over_its_signals(script: str) -> None:
    commands = [line for line in script.splitlines() if not line.strip().startswith("#")]
    assert commands[0].startswith("unset RANK WORLD_SIZE")
    assert any(line.startswith("exec python -m launcher --n") for line in commands)
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    # SC1091: the environment of CANN is in the image, not here. SC2154: Volcano and Trainer set variables of their own.
    words = [program, "--shell=bash", "--exclude=SC1091,SC2154", "-"]
    done = subprocess.run(words, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
