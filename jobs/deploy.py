"""Serves a model and its rewards over HTTP (docs/serving.md); the application stays up after the job.

ray job submit --working-dir . -- python -m jobs.deploy model=/shared/runs/digits/model storage=/shared/runs
python -m jobs.deploy model=runs/digits/model rewards=[symmetry,brightness] port=8001

On a cluster that is running the job ends as soon as the endpoint answers, and `serve shutdown -y` ends the application.
Where there is no cluster it has to hold its own: it prints RESULT as soon as the endpoint answers, and serves on until
Ctrl-C, its ordinary end.
"""

import threading
import time
from typing import Any

from jobs.cluster import joins_a_cluster, ray_cluster
from jobs.contract import JobRun, Outcome, run_job
from mfm_ray.config import DeployConfig


def deployment_of(config: DeployConfig) -> Any:
    from serve.deploying import read_deployment

    taken = ("model", "rewards", "presets", "autoencoder", "keys_file")
    args = {key: getattr(config, key) for key in taken if getattr(config, key) is not None}
    return read_deployment(config.config, args=args, port=config.port)


def check(config: DeployConfig) -> None:
    """The models load as far as their descriptions go, the rewards are theirs, and the keys can be read."""
    from serve.app import build_app
    from serve.deploying import require_free_port

    deployment = deployment_of(config)
    build_app(deployment.settings)
    if not joins_a_cluster():
        require_free_port(deployment)


def body(run: JobRun) -> Outcome:
    from serve.deploying import bring_up, notice, shape_errors_of_serve

    config: DeployConfig = run.config
    deployment, stays = deployment_of(config), joins_a_cluster()
    began = time.monotonic()
    shape_errors_of_serve()
    with ray_cluster(run.log):
        endpoint = bring_up(deployment, timeout_s=config.start_timeout_s)
        outcome = Outcome(metrics={"seconds_to_ready": time.monotonic() - began}, artifacts={"endpoint": endpoint})
        run.log(f"serving at {endpoint}; {notice(deployment)}")
        if not stays:
            run.log("this job holds the cluster: Ctrl-C ends it")
            run.publish(outcome)
            threading.Event().wait()
    return outcome


if __name__ == "__main__":
    run_job("deploy", body, check=check)
