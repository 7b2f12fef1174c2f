"""Dashboards and rules name metrics and labels that exist, outcomes that can be, and pages that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.metrics import Histogram

from serve.errors import ApiError, deadline_passed, internal, too_busy, wrong_value
from serve.metrics import SamplerMetrics, requests_total, reward_seconds

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "observability"
RULES = yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
OF_PROMETHEUS = {"le"}


def all_rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in all_rules())
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"label_values\((\w+), (\w+)\)", r"sum by (\2) (\1)", variable["query"]["query"])


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels by the name that Ray exports."""
    metrics = [reward_seconds(), requests_total(), *vars(SamplerMetrics()).values()]
    found: dict[str, set[str]] = {}
    for metric in metrics:
        name, labels = f"ray_{metric.info['name']}", set(metric.info["tag_keys"])
        if isinstance(metric, Histogram):
            found |= {f"{name}_bucket": labels | OF_PROMETHEUS, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_metrics_and_labels_exist(expression: str, exported: dict[str, set[str]]) -> None:
    recorded = {rule["record"] for rule in all_rules() if "record" in rule}
    named = set(re.findall(r"\b(?:ray_\w+|mfm:[\w:]+)", expression))
    assert named
    assert named <= set(exported) | recorded
    selected = re.findall(r"(ray_\w+)\{(.*?)\}", expression)
    for name, selectors in selected:
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selectors)) <= exported[name]
    for labels in re.findall(r"by \((.*?)\)", expression):
        everywhere = set.intersection(*(exported[name] for name in named if name in exported))
        assert {label.strip() for label in labels.split(",")} <= everywhere


def test_outcomes_that_are_selected_can_be() -> None:
    possible = {"ok", "cancelled", "internal"}
    errors: list[ApiError] = [wrong_value("", ""), too_busy(""), deadline_passed(1), internal()]
    possible |= {str(error.code) for error in errors}
    for expression in expressions():
        for outcomes in re.findall(r'outcome(?:=~|!~|!=|=)"(.*?)"', expression):
            assert set(outcomes.split("|")) <= possible


def test_every_alert_has_its_paragraph() -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations.md").read_text(), flags=re.MULTILINE)
    alerts = [rule for rule in all_rules() if "alert" in rule]
    assert [rule["alert"] for rule in alerts] == headings
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(p["x"] + i, p["y"] + j) for p in places for i in range(p["w"]) for j in range(p["h"])]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
