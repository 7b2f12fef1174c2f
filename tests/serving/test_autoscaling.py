"""Replicas by what waits and runs."""

from types import SimpleNamespace

import pytest

from serve.autoscaling import LoadPolicy, with_policy


@pytest.mark.parametrize(
    ("rows", "queued", "replicas"),
    [({"a": 100.0, "b": 150.0}, 0.0, 3), ({"a": 0.0}, 0.0, 0), ({"a": 100.0}, 2.0, 3), ({}, 1.0, 1), ({}, 0.0, 7)],
)
def test_each_replica_is_meant_to_have_the_target(rows, queued, replicas):
    context = SimpleNamespace(
        aggregated_metrics={"rows": rows} if rows else {}, total_queued_requests=queued, target_num_replicas=7
    )
    assert LoadPolicy(target=100)(context)[0] == replicas


def test_the_policy_goes_where_there_is_autoscaling_without_one():
    assert with_policy({"num_replicas": 2}, 100) == {"num_replicas": 2}
    scaled = with_policy({"autoscaling_config": {"max_replicas": 4}}, 100)["autoscaling_config"]
    assert scaled["policy"]["policy_kwargs"] == {"target": 100, "of": "rows"}
    own = {"autoscaling_config": {"policy": {"policy_function": "mine:policy"}}}
    assert with_policy(own, 100) == own
