import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import (
    AdaptiveWeighting,
    ConditioningTimes,
    DiagonalTerm,
    IntervalTimes,
    Objective,
    SemigroupTerm,
    VarianceWeighting,
    build_objective,
    semigroup,
    target_variance,
)


@dataclass(frozen=True)
class Batch:
    data: Tensor
    label: Tensor | None = None


def mixture() -> GaussianMixture:
    return isotropic_mixture(torch.tensor([[-3.0, -3], [0, 0], [3, 3]]), variance=0.5)


def examples(rows: int) -> Batch:
    return Batch(mixture().sample(rows, generator=torch.Generator().manual_seed(0)))


def network(num_classes: int = 0, *, trained: bool = False) -> ResidualMLPFlowMap:
    torch.manual_seed(0)
    space = DataSpace(kind="coordinates", event_shape=(2,))
    flow_map = ResidualMLPFlowMap(space=space, width=32, num_blocks=2, num_classes=num_classes)
    if trained:
        torch.nn.init.normal_(flow_map.network.project.weight, std=0.3)
    return flow_map


class Shifted(FlowMap):
    """The exact map plus a constant in its average velocity, the one parameter."""

    def __init__(self, exact: FlowMap) -> None:
        super().__init__(exact.space)
        self.exact = exact
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def velocity(self, x_s, s, u, **condition):
        return self.exact.velocity(x_s, s, u, **condition) + self.shift

    def posterior_spread(self, t):
        return self.exact.posterior_spread(t)

    def config(self):
        return {}


def test_the_semigroup_residual_of_the_exact_map_is_zero():
    flow_map = GaussianMixtureFlowMap(mixture())
    noise = KeyedNoise.for_rows(0, torch.arange(512)).fold_in(1)
    objective = Objective([(SemigroupTerm(), VarianceWeighting())])
    errors = objective(flow_map, examples(512), noise=noise).squared_errors["semigroup"]
    assert errors.sqrt().median() < 1e-4
    assert errors.sqrt().max() < 0.05  # t up to 0.999, where the oracle's own steps are felt


def test_the_semigroup_residual_of_another_map_is_not():
    noise = KeyedNoise.for_rows(0, torch.arange(512)).fold_in(1)
    objective = Objective([(SemigroupTerm(), VarianceWeighting())])
    assert objective(network(trained=True), examples(512), noise=noise).squared_errors["semigroup"].mean() > 1e-3


def test_the_diagonal_objective_is_stationary_at_the_exact_map_and_least_there():
    """Gradient zero within 4 standard errors; a shift of c adds |c|^2 on average."""
    rows = 20_000
    noise = KeyedNoise.for_rows(0, torch.arange(rows)).fold_in(1)
    objective = Objective([(DiagonalTerm(), VarianceWeighting())], times=ConditioningTimes(max_time=0.9))
    flow_map, batch = Shifted(GaussianMixtureFlowMap(mixture())), examples(rows)
    losses = objective(flow_map, batch, noise=noise)
    (gradient,) = torch.autograd.grad(losses.total.mean(), flow_map.shift)
    residual, s = DiagonalTerm().residual(flow_map, objective.sample_states(flow_map, batch, noise), noise)
    states = objective.sample_states(flow_map, batch, noise)
    per_sample = 2 * residual.detach() / target_variance(flow_map, s, states.t)[:, None]
    assert (gradient.abs() < 4 * per_sample.std(0) / math.sqrt(rows)).all()
    torch.testing.assert_close(gradient, per_sample.mean(0), rtol=1e-3, atol=1e-4)
    for shift in (torch.tensor([0.5, 0.0]), torch.tensor([0.0, -0.5])):
        with torch.no_grad():
            flow_map.shift.copy_(shift)
        assert objective(flow_map, batch, noise=noise).total.mean() > losses.total.mean()


def test_the_diagonal_targets_variance_is_what_the_weighting_divides_by_when_data_are_gaussian():
    data = isotropic_mixture(torch.tensor([[1.0, -1.0]]), variance=2.0)
    flow_map = GaussianMixtureFlowMap(data)
    rows = 40_000
    batch = Batch(data.sample(rows, generator=torch.Generator().manual_seed(0)))
    noise = KeyedNoise.for_rows(0, torch.arange(rows))
    total = Objective([(DiagonalTerm(), VarianceWeighting())])(flow_map, batch, noise=noise).total
    assert abs(total.mean() - 1) < 4 * total.std() / math.sqrt(rows)


def test_targets_carry_no_graph():
    """The gradient of the semigroup loss is that of the prediction alone."""
    flow_map, batch = network(trained=True), examples(64)
    noise = KeyedNoise.for_rows(0, torch.arange(64))
    term = SemigroupTerm()
    states = Objective([(term, VarianceWeighting())]).sample_states(flow_map, batch, noise)
    residual, s = term.residual(flow_map, states, noise)
    _, u = term.times(noise)
    prediction = flow_map.velocity(states.inner_state(s), s, u, t=states.t, x_t=states.x_t)
    target = (prediction - residual).detach()
    weights = list(flow_map.network.parameters())
    of_loss = torch.autograd.grad(residual.square().sum(), weights, retain_graph=True)
    of_prediction = torch.autograd.grad((prediction - target).square().sum(), weights)
    for a, b in zip(of_loss, of_prediction, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_losses_do_not_depend_on_how_the_batch_is_split():
    flow_map, batch = network(num_classes=3, trained=True), examples(32)
    label, rows = torch.arange(32) % 3, torch.arange(32)
    objective = semigroup(label_dropout=0.3)
    whole = objective(flow_map, Batch(batch.data, label), noise=KeyedNoise.for_rows(5, rows).fold_in(9))
    parts = [
        objective(flow_map, Batch(batch.data[i], label[i]), noise=KeyedNoise.for_rows(5, rows[i]).fold_in(9))
        for i in (slice(0, 20), slice(20, 32))
    ]
    torch.testing.assert_close(whole.total, torch.cat([p.total for p in parts]), rtol=1e-5, atol=1e-5)
    for name, errors in whole.squared_errors.items():
        torch.testing.assert_close(errors, torch.cat([p.squared_errors[name] for p in parts]), rtol=1e-5, atol=1e-5)


def test_the_semigroup_objective_has_both_terms_and_sums_them():
    noise = KeyedNoise.for_rows(0, torch.arange(16))
    losses = semigroup()(network(trained=True), examples(16), noise=noise)
    assert set(losses.squared_errors) == {"diagonal", "semigroup"}
    assert losses.total.shape == (16,)
    assert losses.total.requires_grad
    assert not any(errors.requires_grad for errors in losses.squared_errors.values())
    single = [Objective([term])(network(trained=True), examples(16), noise=noise).total for term in semigroup().terms]
    torch.testing.assert_close(losses.total, single[0] + single[1])


def test_states_are_interpolants_of_the_same_clean_sample_with_independent_noise():
    rows, times = 20_000, ConditioningTimes(zero_rate=0.1)
    batch = Batch(torch.zeros(rows, 2))
    noise = KeyedNoise.for_rows(0, torch.arange(rows))
    states = Objective([], times=times).sample_states(network(), batch, noise)
    outer = states.x_t / (1 - states.t)[:, None]
    score = (outer * states.inner_noise).mean() * math.sqrt(2 * rows)
    assert abs(score) < 4
    assert abs(outer.square().mean() - 1) < 4 * math.sqrt(2 / (2 * rows))
    torch.testing.assert_close(states.inner_state(torch.full((rows,), 0.25)), 0.75 * states.inner_noise)


def test_conditioning_times_have_an_atom_at_zero_and_stay_below_the_maximum():
    noise = KeyedNoise.for_rows(0, torch.arange(50_000))
    t = ConditioningTimes(power=2.0, zero_rate=0.2, max_time=0.9)(noise)
    zero = (t == 0).double().mean()
    assert abs(zero - 0.2) < 4 * math.sqrt(0.16 / 50_000)
    positive = t[t > 0]
    assert positive.max() < 0.9
    assert abs((positive / 0.9).sqrt().mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(positive))


def test_interval_times_are_sorted_pairs_of_uniforms():
    s, u = IntervalTimes()(KeyedNoise.for_rows(0, torch.arange(50_000)))
    assert (s <= u).all()
    assert abs(s.mean() - 1 / 3) < 4 * math.sqrt(1 / 18 / 50_000)
    assert abs(u.mean() - 2 / 3) < 4 * math.sqrt(1 / 18 / 50_000)


def test_dropped_labels_become_the_null_class_at_the_stated_rate():
    rows = 20_000
    batch = Batch(torch.zeros(rows, 2), torch.full((rows,), 1))
    objective = Objective([], label_dropout=0.25)
    label = objective.sample_states(network(num_classes=3), batch, KeyedNoise.for_rows(0, torch.arange(rows))).label
    assert set(label.tolist()) == {1, 3}
    assert abs((label == 3).double().mean() - 0.25) < 4 * math.sqrt(0.1875 / rows)


def test_labels_mean_nothing_to_an_unconditional_model():
    batch = Batch(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    assert Objective([]).sample_states(network(), batch, KeyedNoise.for_images(0, 4)).label is None


def test_adaptive_weighting_of_power_one_makes_losses_one_and_keeps_gradient_directions():
    error = torch.tensor([1e-4, 1.0, 100.0], requires_grad=True)
    loss = AdaptiveWeighting(power=1.0, constant=1e-6)(error, variance=torch.ones(3))
    torch.testing.assert_close(loss, torch.ones(3), rtol=0.02, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), error)
    torch.testing.assert_close(gradient, 1 / (error.detach() + 1e-6))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConditioningTimes(power=0), "power=0: expected a number above 0"),
        (lambda: ConditioningTimes(zero_rate=1.0), r"zero_rate=1.0: expected a number in \[0, 1\)"),
        (lambda: ConditioningTimes(max_time=1.0), r"max_time=1.0: expected a number in \(0, 1\)"),
        (lambda: AdaptiveWeighting(power=1.5), r"power=1.5: expected a number in \[0, 1\]"),
        (lambda: AdaptiveWeighting(power=1.0, constant=0.0), "constant=0.0: expected a number above 0"),
        (lambda: Objective([], label_dropout=-0.1), r"label_dropout=-0.1: expected a number in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_unknown_argument_of_an_objective_is_named_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"objective\.label_dropuot: unknown key; .*did you mean label_dropout\?"):
        build_objective({"name": "semigroup", "label_dropuot": 0.1})
