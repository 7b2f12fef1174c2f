"""The serving manifest: fields as KubeRay declares them, and a configuration that Serve and this application take.

rayservice-fields.json says where its fields come from. With KUBERAY_CRDS set to a folder that holds KubeRay's own
`ray.io_rayservices.yaml` the manifest is held against that as well.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray.serve.schema import ServeDeploySchema

from serve.deploying import IMPORT_PATH
from serve.settings import AppSettings

ROOT = Path(__file__).resolve().parents[2]
CRDS = os.environ.get("KUBERAY_CRDS")


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "kuberay" / "rayservice.yaml").read_text())


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "rayservice-fields.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def settings(manifest: dict[str, Any]) -> AppSettings:
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    return AppSettings.model_validate(application["args"])


def groups(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for pod in pods for container in pod["template"]["spec"]["containers"]]


def test_fields_and_types_are_those_that_kuberay_knows(manifest: dict[str, Any], validator: Any) -> None:
    validator.validate(manifest)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "serveConfig"), {}),
        (("spec", "serveConfigV2"), {"applications": []}),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 1, "minReplica"), 1),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_what_kuberay_would_refuse_is_found(
    place: tuple[Any, ...], value: Any, manifest: dict[str, Any], validator: Any
) -> None:
    wrong = copy.deepcopy(manifest)
    node = wrong
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(ValidationError):
        validator.validate(wrong)


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS names no folder with KubeRay's own CRD files")
def test_it_is_valid_by_the_published_schema(manifest: dict[str, Any]) -> None:
    assert CRDS is not None
    definition = yaml.safe_load((Path(CRDS) / "ray.io_rayservices.yaml").read_text())
    version = next(entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
    Draft202012Validator(version["schema"]["openAPIV3Schema"]).validate(manifest)


def test_serve_and_the_application_take_the_configuration(manifest: dict[str, Any], settings: AppSettings) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == IMPORT_PATH
    assert config.http_options.host == "0.0.0.0"
    assert config.http_options.request_timeout_s > settings.limits.deadline_s


def test_samplers_and_rewards_are_on_nodes_of_their_own(manifest: dict[str, Any], settings: AppSettings) -> None:
    by_name = groups(manifest)
    limits = {
        name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in by_name.items()
    }
    assert settings.sampler.ray_actor_options["num_gpus"] == int(limits["samplers"]["nvidia.com/gpu"]) == 1
    assert "nvidia.com/gpu" not in limits["rewards"]
    offered = json.loads(json.loads(by_name["rewards"]["rayStartParams"]["resources"].strip("'")))
    apart = [settings.ingress, *(reward for reward in settings.rewards or [] if reward.placement == "deployment")]
    for part in apart:
        assert "num_gpus" not in part.ray_actor_options
        assert set(part.ray_actor_options["resources"]) == set(offered)
    selectors = [group["template"]["spec"]["nodeSelector"] for group in by_name.values()]
    assert selectors[0] != selectors[1]
    assert manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_pods_can_hold_the_replicas_at_their_most(manifest: dict[str, Any], settings: AppSettings) -> None:
    assert settings.sampler.autoscaling_config is not None
    most = settings.sampler.autoscaling_config["max_replicas"]
    assert groups(manifest)["samplers"]["maxReplicas"] >= most
    rewards = [reward for reward in settings.rewards or [] if reward.placement == "deployment"]
    needed = sum(
        part.ray_actor_options["num_cpus"] * (part.autoscaling_config or {}).get("max_replicas", part.num_replicas or 1)
        for part in (settings.ingress, *rewards)
    )
    group = groups(manifest)["rewards"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert group["maxReplicas"] * cpus >= needed


def test_every_container_has_the_keys_from_a_secret_and_shaped_errors(manifest: dict[str, Any]) -> None:
    for container in containers(manifest):
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["MFM_RAY_API_KEYS"]["valueFrom"]["secretKeyRef"]["name"] == "mfm-ray-keys"
        assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]["value"] == "serve.edge:middlewares"
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_image_is_of_the_tested_ray_and_holds_what_is_there(manifest: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "deploy" / "Containerfile").read_text(), flags=re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    assert {"mfm_ray", "serve", "jobs", "pyproject.toml", "constraints.txt"} <= sources
    assert [name for name in sources if not (ROOT / name).exists()] == []
