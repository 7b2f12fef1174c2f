import dataclasses
import math
import re
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
    OBJECTIVES,
    AdaptiveWeighting,
    ConditioningTimes,
    DataVelocity,
    DiagonalTerm,
    IntervalTimes,
    Labels,
    LagrangianTerm,
    LearnedWeighting,
    LogWeighting,
    ModelGuidedTeacher,
    Objective,
    PlainTeacher,
    SemigroupTerm,
    UnguidedTeacher,
    VarianceWeighting,
    WeightedTerm,
    build_objective,
    named_objective,
    target_variance,
)
from mfm_ray.objectives.weighting import ErrorPoint
from mfm_ray.tangents import TangentError


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
    objective = Objective([WeightedTerm(SemigroupTerm(), VarianceWeighting())])
    errors = objective(flow_map, examples(512), noise=noise).squared_errors["semigroup"]
    assert errors.sqrt().median() < 1e-4
    assert errors.sqrt().max() < 0.05  # t up to 0.999, where the oracle's own steps are felt


def test_the_semigroup_residual_of_another_map_is_not():
    noise = KeyedNoise.for_rows(0, torch.arange(512)).fold_in(1)
    objective = Objective([WeightedTerm(SemigroupTerm(), VarianceWeighting())])
    assert objective(network(trained=True), examples(512), noise=noise).squared_errors["semigroup"].mean() > 1e-3


def test_the_diagonal_objective_is_stationary_at_the_exact_map_and_least_there():
    """Gradient zero within 4 standard errors; a shift of c adds |c|^2 on average."""
    rows = 20_000
    noise = KeyedNoise.for_rows(0, torch.arange(rows)).fold_in(1)
    objective = Objective([WeightedTerm(DiagonalTerm(), VarianceWeighting())], times=ConditioningTimes(max_time=0.9))
    flow_map, batch = Shifted(GaussianMixtureFlowMap(mixture())), examples(rows)
    losses = objective(flow_map, batch, noise=noise)
    (gradient,) = torch.autograd.grad(losses.total.mean(), flow_map.shift)
    states = objective.sample_states(flow_map, batch, noise)
    residual = DiagonalTerm().residual(flow_map, states, noise, 0)
    per_sample = 2 * residual.value.detach() / target_variance(flow_map, residual.s, states.t)[:, None]
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
    total = Objective([WeightedTerm(DiagonalTerm(), VarianceWeighting())])(flow_map, batch, noise=noise).total
    assert abs(total.mean() - 1) < 4 * total.std() / math.sqrt(rows)


def test_targets_carry_no_graph():
    """The gradient of the semigroup loss is that of the prediction alone."""
    flow_map, batch = network(trained=True), examples(64)
    noise = KeyedNoise.for_rows(0, torch.arange(64))
    term = SemigroupTerm()
    states = Objective([WeightedTerm(term, VarianceWeighting())]).sample_states(flow_map, batch, noise)
    residual = term.residual(flow_map, states, noise, 0)
    s, u = term.times(noise, 0)
    prediction = flow_map.velocity(states.inner_state(s), s, u, t=states.t, x_t=states.x_t)
    target = (prediction - residual.value).detach()
    weights = list(flow_map.network.parameters())
    of_loss = torch.autograd.grad(residual.value.square().sum(), weights, retain_graph=True)
    of_prediction = torch.autograd.grad((prediction - target).square().sum(), weights)
    for a, b in zip(of_loss, of_prediction, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_losses_do_not_depend_on_how_the_batch_is_split():
    flow_map, batch = network(num_classes=3, trained=True), examples(32)
    label, rows = torch.arange(32) % 3, torch.arange(32)
    objective = named_objective("semigroup", label_dropout=0.3)
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
    objective = named_objective("semigroup")
    losses = objective(network(trained=True), examples(16), noise=noise)
    assert set(losses.squared_errors) == {"diagonal", "semigroup"}
    assert losses.total.shape == (16,)
    assert losses.total.requires_grad
    assert not any(errors.requires_grad for errors in losses.squared_errors.values())
    single = [Objective([term])(network(trained=True), examples(16), noise=noise).total for term in objective.terms]
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
    t = ConditioningTimes(power=2.0, zero_rate=0.2, max_time=0.9)(noise, 0)
    zero = (t == 0).double().mean()
    assert abs(zero - 0.2) < 4 * math.sqrt(0.16 / 50_000)
    positive = t[t > 0]
    assert positive.max() < 0.9
    assert abs((positive / 0.9).sqrt().mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(positive))


def test_interval_times_are_sorted_pairs_of_uniforms():
    s, u = IntervalTimes()(KeyedNoise.for_rows(0, torch.arange(50_000)), 0)
    assert (s <= u).all()
    assert abs(s.mean() - 1 / 3) < 4 * math.sqrt(1 / 18 / 50_000)
    assert abs(u.mean() - 2 / 3) < 4 * math.sqrt(1 / 18 / 50_000)


def test_intervals_reach_their_ends_at_the_stated_rate():
    noise, rows = KeyedNoise.for_rows(0, torch.arange(50_000)), 50_000
    s, u = IntervalTimes(end_rate=0.25)(noise, 0)
    plain_s, plain_u = IntervalTimes()(noise, 0)
    for at_end, other in ((s == 0, u == 1), (u == 1, s == 0)):
        assert abs(at_end.double().mean() - 0.25) < 4 * math.sqrt(0.1875 / rows)
        assert abs((at_end & other).double().mean() - 0.0625) < 4 * math.sqrt(0.0586 / rows)
    torch.testing.assert_close(s[s > 0], plain_s[s > 0])
    torch.testing.assert_close(u[u < 1], plain_u[u < 1])


def test_dropped_labels_become_the_null_class_at_the_stated_rate():
    rows = 20_000
    batch = Batch(torch.zeros(rows, 2), torch.full((rows,), 1))
    objective = Objective([], labels=Labels(dropout=0.25))
    label = objective.sample_states(network(num_classes=3), batch, KeyedNoise.for_rows(0, torch.arange(rows))).label
    assert set(label.tolist()) == {1, 3}
    assert abs((label == 3).double().mean() - 0.25) < 4 * math.sqrt(0.1875 / rows)


def test_labels_mean_nothing_to_an_unconditional_model():
    batch = Batch(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    assert Objective([]).sample_states(network(), batch, KeyedNoise.for_images(0, 4)).label is None


def test_adaptive_weighting_of_power_one_makes_losses_one_and_keeps_gradient_directions():
    error = torch.tensor([1e-4, 1.0, 100.0], requires_grad=True)
    loss = AdaptiveWeighting(power=1.0, constant=1e-6)(error, ErrorPoint(*[torch.ones(3)] * 3, num_dims=2))
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
        (lambda: Labels(dropout=-0.1), r"label_dropout=-0.1: expected a number in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_unknown_argument_of_an_objective_is_named_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"objective\.label_dropuot: unknown key; .*did you mean label_dropout\?"):
        build_objective({"name": "semigroup", "label_dropuot": 0.1})


NAMES = sorted(OBJECTIVES)


def oracle_states(rows: int, **times) -> tuple[GaussianMixtureFlowMap, Batch, KeyedNoise]:
    means = torch.tensor([[-3.0, -3], [0, 0], [3, 3]], dtype=torch.float64)
    flow_map = GaussianMixtureFlowMap(isotropic_mixture(means, variance=0.5), num_inner_steps=80)
    data = flow_map.mixture.sample(rows, generator=torch.Generator().manual_seed(0))
    return flow_map, Batch(data), KeyedNoise.for_rows(0, torch.arange(rows)).fold_in(1)


def consistency_errors(name: str, flow_map: FlowMap, teacher: FlowMap, rows: int) -> Tensor:
    """Root of the squared error of the consistency term over the posterior spread, by sample."""
    _, batch, noise = oracle_states(rows)
    objective = named_objective(name, teacher=teacher, max_time=0.9)
    term = objective.terms[1].term
    states = objective.sample_states(flow_map, batch, noise)
    states = dataclasses.replace(states, inner_noise=states.inner_noise.double(), x_t=states.x_t.double())
    residual = term.residual(flow_map, states, noise, 0).value
    return residual.detach().norm(dim=1) / flow_map.posterior_spread(states.t)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mean_flow"])
def test_every_consistency_condition_vanishes_at_the_exact_map_and_not_at_another(name):
    exact = oracle_states(1)[0]
    errors = consistency_errors(name, exact, exact, 96)
    assert errors.median() < 1e-6
    assert errors.max() < 1e-3
    scaled = Scaled(exact)
    assert consistency_errors(name, scaled, exact, 96).median() > 1e-2


class Scaled(GaussianMixtureFlowMap):
    """A map that leaves its path: the exact average velocity, a tenth longer over long steps."""

    def __init__(self, exact: GaussianMixtureFlowMap) -> None:
        super().__init__(exact.mixture, num_inner_steps=exact.num_inner_steps)

    def velocity(self, x_s, s, u, **condition):
        return (1 + 0.1 * (u - s))[:, None] * super().velocity(x_s, s, u, **condition)


def test_mean_flow_is_the_eulerian_condition_in_expectation():
    """Its target is that of the exact velocity plus noise of mean zero: same gradient, within four standard errors."""
    rows = 6000
    flow_map, batch, noise = (
        network(trained=True),
        examples(rows),
        KeyedNoise.for_rows(0, torch.arange(rows)).fold_in(2),
    )
    exact = GaussianMixtureFlowMap(mixture())
    gradients = {}
    for name in ("mean_flow", "eulerian_teacher"):
        objective = named_objective(name, teacher=exact, max_time=0.9)
        states = objective.sample_states(flow_map, batch, noise)
        residual = objective.terms[1].term.residual(flow_map, states, noise, 0)
        assert residual.s.shape == (rows,)
        gradients[name] = residual.value.detach()  # that of half the squared error, in output space
    difference = gradients["mean_flow"] - gradients["eulerian_teacher"]
    assert difference.norm(dim=1).mean() > 0.1
    assert (difference.mean(0).abs() < 4 * difference.std(0) / math.sqrt(rows)).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_lowers_its_own_errors(name):
    """A few steps of Adam on one batch with one noise: raw errors fall."""
    torch.manual_seed(0)
    space = DataSpace(kind="coordinates", event_shape=(2,))
    flow_map = ResidualMLPFlowMap(space=space, width=32, num_blocks=2, max_time_frequency=0.66)
    batch, noise = examples(512), KeyedNoise.for_rows(0, torch.arange(512)).fold_in(3)
    objective = named_objective(name, teacher=GaussianMixtureFlowMap(mixture()), max_time=0.95)
    optimizer = torch.optim.Adam(flow_map.parameters(), lr=1e-3)
    history = []
    for step in range(40):
        losses = objective(flow_map, batch, noise=noise, step=step)
        optimizer.zero_grad()
        losses.total.mean().backward()
        torch.nn.utils.clip_grad_norm_(flow_map.parameters(), 1.0)
        optimizer.step()
        history.append({key: float(error.mean()) for key, error in losses.squared_errors.items()})
        assert torch.isfinite(losses.total).all()
    assert history[-1]["diagonal"] < history[0]["diagonal"]
    if name != "mean_flow":  # whose target has noise of its own, which grows with the slope of the network
        assert sum(history[-1].values()) < 0.97 * sum(history[0].values())


@pytest.mark.parametrize("name", ["eulerian", "mean_flow", "lagrangian"])
def test_finite_differences_stand_in_for_forward_mode(name):
    flow_map, batch = network(trained=True), examples(64)
    noise = KeyedNoise.for_rows(0, torch.arange(64)).fold_in(4)
    losses = [
        named_objective(name, tangent=tangent, max_time=0.9)(flow_map, batch, noise=noise)
        for tangent in ("exact", "finite_difference")
    ]
    exact, differences = (result.squared_errors[name if name == "lagrangian" else "eulerian"] for result in losses)
    torch.testing.assert_close(differences, exact, rtol=2e-2, atol=2e-2)
    weights = list(flow_map.network.parameters())
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(r.total.mean(), weights)]) for r in losses)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999


class WithoutForwardMode(ResidualMLPFlowMap):
    def velocity(self, x_s, s, u, **condition):
        return super().velocity(torch.nn.functional.dropout(x_s, 0.0, inplace=False).mul_(1.0), s, u, **condition)


def test_a_network_without_forward_derivatives_is_told_so_and_trains_all_the_same():
    flow_map, batch = network(trained=True), examples(16)
    flow_map.__class__ = WithoutForwardMode
    noise = KeyedNoise.for_rows(0, torch.arange(16))
    with pytest.warns(UserWarning, match="mul_ works in place.*finite differences are used instead"):
        losses = named_objective("eulerian")(flow_map, batch, noise=noise)
    assert torch.isfinite(losses.total).all()
    with pytest.raises(TangentError, match=r"mul_ works in place.*objective\.tangent=finite_difference does without"):
        named_objective("eulerian", tangent="exact")(flow_map, batch, noise=noise)


def test_consistency_waits_for_its_warm_up_and_intervals_grow():
    flow_map, batch, noise = network(trained=True), examples(256), KeyedNoise.for_rows(0, torch.arange(256))
    objective = named_objective("semigroup", interval_warmup_steps=10, interval_anneal_steps=20, time_warmup_steps=5)
    early, later = (objective(flow_map, batch, noise=noise, step=step) for step in (9, 10))
    assert bool((early.squared_errors["semigroup"] == 0).all())
    assert later.squared_errors["semigroup"].mean() > 0
    torch.testing.assert_close(early.squared_errors["diagonal"], later.squared_errors["diagonal"])
    times = objective.terms[1].term.times
    lengths = [float((u - s).mean()) for s, u in (times(noise, step) for step in (0, 5, 10, 20, 100))]
    torch.testing.assert_close(torch.tensor(lengths[1:3]), torch.tensor([0.25, 0.5]) * lengths[3], rtol=1e-4, atol=0)
    assert lengths[0] == 0
    assert lengths[4] == lengths[3]
    assert bool((objective(flow_map, batch, noise=noise, step=4).time == 0).all())


def labelled(rows: int) -> Batch:
    return Batch(examples(rows).data, torch.arange(rows) % 3)


def guided_network() -> ResidualMLPFlowMap:
    torch.manual_seed(0)
    space = DataSpace(kind="coordinates", event_shape=(2,))
    flow_map = ResidualMLPFlowMap(space=space, width=32, num_blocks=2, num_classes=3, cfg_scales=(2.5, 4.0))
    for parameter in flow_map.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return flow_map


def test_dropped_labels_are_told_scale_one_and_kept_ones_a_trained_scale():
    rows = 20_000
    objective = Objective([], labels=Labels(dropout=0.2, base_rate=0.25))
    states = objective.sample_states(guided_network(), labelled(rows), KeyedNoise.for_rows(0, torch.arange(rows)))
    assert states.cfg_scale is not None
    dropped = states.label == 3
    assert bool((states.cfg_scale[dropped] == 1).all())
    kept = states.cfg_scale[~dropped]
    shares = torch.tensor([(kept == scale).float().mean() for scale in (1.0, 2.5, 4.0)])
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.375, 0.375]), rtol=0, atol=4 * 0.5 / math.sqrt(16_000))


def test_model_guidance_moves_the_target_by_omega_times_the_difference_and_not_where_the_scale_is_one():
    flow_map, batch = guided_network(), labelled(64)
    noise = KeyedNoise.for_rows(0, torch.arange(64))
    states = Objective([], labels=Labels(dropout=0.3)).sample_states(flow_map, batch, noise)
    s = torch.rand(64, generator=torch.Generator().manual_seed(0))
    x_s = states.inner_state(s)
    target = DataVelocity()(flow_map, states, x_s, s)
    condition = {"t": states.t, "x_t": states.x_t}
    guided = flow_map.velocity(x_s, s, s, label=states.label, cfg_scale=states.cfg_scale, **condition)
    free = flow_map.velocity(x_s, s, s, label=torch.full((64,), 3), cfg_scale=1.0, **condition)
    omega = (1 - 1 / states.cfg_scale)[:, None]
    torch.testing.assert_close(target, states.x1 - states.inner_noise + omega * (guided - free).detach())
    assert not target.requires_grad
    null = states.label == 3
    torch.testing.assert_close(target[null], (states.x1 - states.inner_noise)[null])
    assert (target - states.x1 + states.inner_noise)[~null].abs().mean() > 0.01


class Conditional(FlowMap):
    """A teacher whose drift is a known vector for each label: b_y = y + 1 for labels, 0 for the null class."""

    def __init__(self) -> None:
        super().__init__(DataSpace(kind="coordinates", event_shape=(2,)), num_classes=3, cfg_scales=(2.5,))

    def velocity(self, x_s, s, u, *, t, x_t, label=None, cfg_scale=None):
        value = torch.where(label == 3, 0.0, label + 1.0)
        told = 2.5 if cfg_scale is not None else 1.0
        return (told * value)[:, None].expand_as(x_s)

    def posterior_spread(self, t):
        return torch.ones_like(t)

    def config(self):
        return {}


@pytest.mark.parametrize("kind", [PlainTeacher, ModelGuidedTeacher])
def test_teachers_give_the_same_guided_velocity_from_plain_and_from_guided_answers(kind):
    """b_null + w (b_y - b_null) = w (y + 1); the model-guided one answers 2.5 (y + 1) for a label itself."""
    teacher = kind(Conditional(), **({"trained_scale": 2.5} if kind is ModelGuidedTeacher else {}))
    label, scale = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.5, 4.0, 1.0])
    drift = teacher(torch.zeros(4, 2), torch.full((4,), 0.5), label=label, cfg_scale=scale)
    torch.testing.assert_close(drift[:, 0], torch.tensor([1.0, 5.0, 12.0, 0.0]))


def test_an_unguided_teacher_answers_as_it_is_and_without_labels_all_do():
    x, t = torch.zeros(2, 2), torch.full((2,), 0.5)
    label = torch.tensor([2, 3])
    answer = UnguidedTeacher(Conditional())(x, t, label=label, cfg_scale=torch.tensor([2.5, 1.0]))
    torch.testing.assert_close(answer[:, 0], torch.tensor([3.0, 0.0]))
    exact = GaussianMixtureFlowMap(mixture())
    for teacher in (UnguidedTeacher(exact), PlainTeacher(exact), ModelGuidedTeacher(exact, trained_scale=2.5)):
        torch.testing.assert_close(teacher(x, t, label=None, cfg_scale=None), exact.drift(x, t))


def test_the_teachers_diagonal_target_is_the_exact_posterior_velocity():
    exact, batch, noise = oracle_states(256)
    objective = named_objective("semigroup", teacher=exact, diagonal="teacher", max_time=0.9)
    states = objective.sample_states(exact, batch, noise)
    residual = objective.terms[0].term.residual(exact, states, noise, 0)
    assert residual.value.abs().max() < 1e-3  # float32 noise in a float64 map
    assert not any(parameter.requires_grad for parameter in exact.parameters())


def test_learned_weights_find_the_mean_squared_error_at_each_time():
    """exp(-a) Delta + a is least at a = log E Delta: here E Delta = exp(2 s)."""
    weighting = LearnedWeighting()
    optimizer = torch.optim.Adam(weighting.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        s, t = torch.rand(2, 512, generator=generator)
        error = torch.exp(2 * s) * torch.randn(8, 512, generator=generator).square().mean(0)
        optimizer.zero_grad()
        weighting(error, ErrorPoint(s, t, torch.ones(512), 2)).mean().backward()
        optimizer.step()
    s = torch.linspace(0.1, 0.9, 5)
    torch.testing.assert_close(weighting.log_variance(s, s).detach(), 2 * s, rtol=0, atol=0.25)


def test_log_weighting_is_the_logarithm_of_one_plus_the_mean_error():
    error, point = torch.tensor([0.0, 2.0, 6.0]), ErrorPoint(*[torch.full((3,), 0.5)] * 3, num_dims=2)
    torch.testing.assert_close(LogWeighting()(error, point), torch.log1p(error / 2))
    learned = LogWeighting(learned=True)
    torch.testing.assert_close(learned(error, point), torch.log1p(error / 2))  # a starts at 0
    assert any(parameter.requires_grad for parameter in learned.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "eulerian_teacher"}, "objective.teacher=None: expected a model directory"),
        ({"name": "semigroup", "diagonal": "teacher"}, "objective.teacher=None: expected a model directory"),
        ({"name": "semigroup", "diagonal": "both"}, "objective.diagonal=both: expected one of data, teacher"),
        ({"name": "eulerian", "teacher": "runs/a/model"}, "objective.teacher=runs/a/model: objective=eulerian"),
        ({"name": "eulerian", "tangent": "exactly"}, "tangent=exactly: expected one of auto, exact, finite_difference"),
        ({"name": "semigroup", "consistency_scale": 0}, "consistency_scale=0: expected a number above 0"),
        ({"name": "semigroup", "diagonal_weighting": {"name": "l1"}}, "objective.diagonal_weighting.name=l1: expected"),
        (
            {"name": "semigroup", "consistency_weighting": {"name": "adaptive", "pover": 1}},
            "objective.consistency_weighting.pover: unknown key",
        ),
        ({"name": "semigroup", "interval_anneal_steps": -1}, "anneal_steps=-1: expected an integer of at least 0"),
    ],
)
def test_what_an_objective_cannot_be_made_of_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_objective(settings)
    assert "\n" not in str(caught.value)


def test_the_data_velocity_holds_at_interpolants_alone():
    with pytest.raises(ValueError, match="velocity=DataVelocity: expected one that holds at any state"):
        LagrangianTerm(DataVelocity())
