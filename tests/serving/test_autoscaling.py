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


def test_calls_are_counted_where_the_operator_set_a_target_of_calls():
    reported = {"rows": {"a": 900.0}, "calls": {"a": 3.0, "b": 6.0}}
    context = SimpleNamespace(aggregated_metrics=reported, total_queued_requests=0.0, target_num_replicas=1)
    assert LoadPolicy(target=4, of="calls")(context)[0] == 3


def test_the_policy_goes_where_there_is_autoscaling_without_one():
    assert with_policy({"num_replicas": 2}, 100) == {"num_replicas": 2}
    scaled = with_policy({"autoscaling_config": {"max_replicas": 4}}, 100)["autoscaling_config"]
    assert scaled["policy"]["policy_kwargs"] == {"target": 100, "of": "rows"}
    calls = with_policy({"autoscaling_config": {"target_ongoing_requests": 4}}, 100)["autoscaling_config"]
    assert calls["policy"]["policy_kwargs"] == {"target": 4, "of": "calls"}
    own = {"autoscaling_config": {"policy": {"policy_function": "mine:policy"}}}
    assert with_policy(own, 100) == own
