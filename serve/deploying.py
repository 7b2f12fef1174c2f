"""Bringing the application up on the cluster that this process is connected to, for `make serve` and jobs.deploy."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from mfm_ray.errors import InputError

from .app import build_app
from .keys import OPEN, Keys
from .settings import AppSettings

_POLL_S = 0.5
LOOPBACK = "127.0.0.1"
IMPORT_PATH = "serve.app:build_app"
_BEYOND_DEADLINE_S = 30.0
"""After which Serve's proxy gives up on an endpoint that has not answered at the longest deadline of a request."""


@dataclass(frozen=True)
class Deployment:
    """What a `serve/config.yaml` says, with what was given beside it. host None: loopback unless there are keys."""

    settings: AppSettings
    app: str = "mfm"
    host: str | None = None
    port: int = 8000

    def address(self) -> tuple[str, int]:
        """Host and port to bind. Without keys that is this machine alone, whatever the configuration says."""
        if not Keys.load(self.settings.keys_file):
            return LOOPBACK, self.port
        return self.host or "0.0.0.0", self.port


def read_deployment(config: str | None, *, args: Mapping[str, Any], port: int | None = None) -> Deployment:
    """The one application of a file in Ray Serve's own schema (none: defaults), with further arguments of `build_app`.

    InputError for a file that is none, and for arguments that `build_app` does not take.
    """
    described = {} if config is None else _read(config)
    applications = described.get("applications") or [{}]
    if len(applications) != 1 or applications[0].get("import_path", IMPORT_PATH) != IMPORT_PATH:
        raise InputError(f"config={config}: expected one application with import_path {IMPORT_PATH}")
    if applications[0].get("deployments"):
        raise InputError(f"config={config}: deployments: only `serve deploy` reads them; here replicas are set in args")
    http = described.get("http_options") or {}
    given = {**(applications[0].get("args") or {}), **args}
    try:
        settings = AppSettings.model_validate(given)
    except ValidationError as error:
        raise InputError(_first_line(error)) from error
    app = str(applications[0].get("name", Deployment.app))
    chosen = port or int(http.get("port", Deployment.port))
    return Deployment(settings, app=app, host=http.get("host"), port=chosen)


def bring_up(deployment: Deployment, *, timeout_s: float = 300.0) -> str:
    """Starts Serve where it is not running, and the application on it; returns once that is ready, with its URL.

    RuntimeError naming the deployments that did not start within the time.
    """
    host, port = deployment.address()
    app = build_app(deployment.settings)
    patience_s = deployment.settings.limits.deadline_s + _BEYOND_DEADLINE_S
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": patience_s})
    serve.run_many([serve.RunTarget(app, name=deployment.app, route_prefix="/")], wait_for_applications_running=False)
    _wait_until_running(deployment.app, timeout_s)
    return endpoint()


def shape_errors_of_serve() -> None:
    """Lets a local Ray that this process starts answer by `edge` what its proxies refuse themselves. On a cluster that
    is running the operator sets the variable where its head is started (docs/serving.md)."""
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.edge:middlewares")


def _wait_until_running(app: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while True:
        found = serve.status().applications[app]
        if found.status == ApplicationStatus.RUNNING:
            return
        failed = found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
        if failed or time.monotonic() > end:
            late = {name: part for name, part in found.deployments.items() if part.status != DeploymentStatus.HEALTHY}
            why = next((part.message.splitlines()[0] for part in late.values() if part.message), "no reason was given")
            after = "failed" if failed else f"not ready after {timeout_s:g} s"
            raise RuntimeError(f"{', '.join(late) or app}: {after}: {why} (serve status has more)")
        time.sleep(_POLL_S)


def require_free_port(deployment: Deployment) -> None:
    """InputError where another program listens already; Serve itself would share the port with it, and say nothing."""
    host, port = deployment.address()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"port={port}: {error.strerror}; choose another port") from error


def endpoint() -> str:
    """URL of the Serve that is running: one that ran before keeps its own host and port."""
    client = _get_global_client()
    assert client is not None, "Serve is running"
    options = client.http_config
    everywhere = options.host in ("0.0.0.0", "::")
    return f"http://{ray.util.get_node_ip_address() if everywhere else options.host}:{options.port}"


def notice(deployment: Deployment) -> str:
    """Who is answered, in one line."""
    keys = Keys.load(deployment.settings.keys_file)
    return f"{len(keys.digests)} keys are accepted" if keys else OPEN


def _read(config: str) -> dict[str, Any]:
    try:
        described = yaml.safe_load(Path(config).read_text())
    except OSError as error:
        raise InputError(f"config={config}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config={config}: no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(described, dict):
        raise InputError(f"config={config}: expected a configuration of Ray Serve")
    return described


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place or 'args'}: {first['msg']}"
