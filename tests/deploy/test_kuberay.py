"""The training manifests of deploy/kuberay: fields and types as KubeRay declares them, and what a pod must have.

kuberay-fields.json says where its fields come from. With KUBERAY_CRDS set to a folder that holds KubeRay's own
`ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml` the manifests are held against those as well.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from mfm_ray.config import load_config
from mfm_ray.training.launch import check_config

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = [ROOT / "deploy" / "kuberay" / name for name in ("raycluster.yaml", "rayjob-train.yaml")]
CRDS = os.environ.get("KUBERAY_CRDS")


def documents(name: str) -> dict[str, Any]:
    """The objects of a manifest by kind."""
    parts = yaml.safe_load_all((ROOT / "deploy" / "kuberay" / name).read_text())
    return {part["kind"]: part for part in parts}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "kuberay-fields.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_manifests_have_fields_and_types_that_kuberay_knows(path: Path, validator: Draft202012Validator) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        validator.validate(document)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "workerGroupSpecs", 0, "replica"), 2),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "2"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMounts", 0, "path"), "/shared"),
    ],
)
def test_what_kuberay_would_refuse_is_found(
    place: tuple[Any, ...], value: Any, validator: Draft202012Validator
) -> None:
    wrong = copy.deepcopy(documents("raycluster.yaml")["RayCluster"])
    node = wrong
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(ValidationError):
        validator.validate(wrong)


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS names no folder with KubeRay's own CRD files")
def test_the_manifests_are_valid_by_the_published_schema() -> None:
    assert CRDS is not None
    for name in ("rayclusters", "rayjobs"):
        definition = yaml.safe_load((Path(CRDS) / f"ray.io_{name}.yaml").read_text())
        version = next(entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
        published = Draft202012Validator(version["schema"]["openAPIV3Schema"])
        for path in MANIFESTS:
            for document in yaml.safe_load_all(path.read_text()):
                if document["kind"] == definition["spec"]["names"]["kind"]:
                    published.validate(document)


def test_the_job_s_cluster_is_the_cluster_s() -> None:
    cluster, job = documents("raycluster.yaml"), documents("rayjob-train.yaml")
    assert job["RayJob"]["spec"]["rayClusterSpec"] == cluster["RayCluster"]["spec"]
    assert job["PersistentVolumeClaim"] == cluster["PersistentVolumeClaim"]


def test_pods_have_gpus_shared_storage_shared_memory_and_a_network() -> None:
    spec = documents("raycluster.yaml")["RayCluster"]["spec"]
    workers = spec["workerGroupSpecs"][0]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == workers["rayStartParams"]["num-gpus"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts == {"runs": "/shared", "shm": "/dev/shm"}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= {entry["name"] for entry in container["env"]}
    head = spec["headGroupSpec"]["template"]["spec"]
    assert head["volumes"][0] == volumes["runs"]
    claim = documents("raycluster.yaml")["PersistentVolumeClaim"]
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_entrypoint_is_a_training_that_this_project_accepts_and_the_cluster_holds() -> None:
    job = documents("rayjob-train.yaml")["RayJob"]["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    config: Any = load_config("train", words[3:])
    check_config(config)
    workers = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert config.scaling.num_workers <= workers["replicas"] * int(workers["rayStartParams"]["num-gpus"])
    assert config.storage.startswith("/shared/")
