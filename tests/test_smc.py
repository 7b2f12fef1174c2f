"""SMC and selection against closed forms: normalisers, tilted moments, resampling."""

import math

import pytest
import torch

import mfm_ray as mfm
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, LinearObservation, isotropic_mixture
from mfm_ray.noise import KeyedNoise
from mfm_ray.steering.smc import effective_particles, log_mean, systematic


def mixture() -> GaussianMixture:
    return isotropic_mixture(torch.tensor([[-1.5, -1.0], [0.5, 0.0], [1.0, 1.5]]), variance=0.5)


def observation(noise: float = 0.8) -> LinearObservation:
    return LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=noise)


def oracle() -> GaussianMixtureFlowMap:
    return GaussianMixtureFlowMap(mixture(), num_inner_steps=4)


def log_evidence() -> float:
    """log Z = log E[exp r] under the prior."""
    return float(observation().log_evidence(mixture()).logsumexp(0))


def population(steering: mfm.SMC, *, num_steps: int, num_samples: int = 4, seed: int = 0) -> mfm.Samples:
    return mfm.sample(
        oracle(),
        num_samples=num_samples,
        steering=steering,
        num_steps=num_steps,
        seed=seed,
        keep_particles=True,
        batch_size=steering.num_particles * num_samples,
    )


SETTINGS = [
    {"potential": "tds"},
    {"potential": "tds", "resample_threshold": 1.0},
    {"potential": "tds", "resample_threshold": 0.0},
    {"potential": "feynman_kac", "num_draws": 4},
    {"potential": "value", "num_draws": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_weighted_particles_have_the_tilted_moments_and_the_normaliser(settings):
    """Four populations of 1,000, 60 steps: mean and variance along the observation, and log Z, within their errors."""
    samples = population(mfm.SMC(observation(), num_particles=1000, **settings), num_steps=60)
    tilted, a = observation().tilt(mixture()), observation().direction
    weights = torch.softmax(samples.particle_log_weights, 1)
    along = (samples.particles @ a).double()
    mean = (weights * along).sum(1)
    variance = (weights * (along - mean.unsqueeze(1)).square()).sum(1)
    exact_variance = float(a @ tilted.covariance() @ a)
    assert abs(mean.mean() - float(tilted.mean() @ a)) < 0.06 * math.sqrt(exact_variance)
    assert abs(variance.mean() / exact_variance - 1) < 0.12
    # the estimate at the last step still lacks the final reward, which the last potential stands for; four populations
    # have a standard error of about 0.03
    assert abs(samples.trace["log_normaliser"][-1].double().exp().mean().log() - log_evidence()) < 0.1


def test_resampling_happens_below_the_threshold_and_weights_are_carried_otherwise():
    never = population(mfm.SMC(observation(), num_particles=64, resample_threshold=0.0), num_steps=12)
    always = population(mfm.SMC(observation(), num_particles=64, resample_threshold=1.0), num_steps=12)
    some = population(mfm.SMC(observation(0.3), num_particles=64, resample_threshold=0.5), num_steps=12)
    assert never.trace["resampled"].sum() == 0
    assert (never.trace["effective_sample_size"][-1] < 60).all()
    assert always.trace["resampled"][1:].mean() > 0.9
    resampled, size = some.trace["resampled"].bool(), some.trace["effective_sample_size"]
    assert torch.equal(resampled, size < 32)
    assert 0 < resampled.float().mean() < 1


def test_the_image_returned_is_a_particle_drawn_by_its_final_weight():
    samples = population(mfm.SMC(observation(), num_particles=4), num_steps=8, num_samples=2000)
    weights = torch.softmax(samples.particle_log_weights, 1)
    matches = (samples.images.unsqueeze(1) == samples.particles).all(2)
    assert (matches.sum(1) >= 1).all()
    twins = (samples.particles == samples.particles[:, :1]).all(2)  # resampled together just before the last step
    first, expected = matches[:, 0].double(), (weights * twins).sum(1)
    assert abs(first.mean() - expected.mean()) < 4 * math.sqrt(0.25 / 2000)


def test_systematic_resampling_takes_each_particle_its_share_rounded_up_or_down():
    log_weights = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64))
    counts = torch.zeros(2, 4)
    repeats = 4000
    for seed in range(repeats // 500):
        noise = KeyedNoise.for_images(seed, 1000)
        index = systematic(log_weights.repeat(500, 1), noise)
        found = torch.nn.functional.one_hot(index, 4).sum(1)
        share = 4 * log_weights.exp().repeat(500, 1)
        assert ((found >= torch.floor(share - 1e-9)) & (found <= torch.ceil(share + 1e-9))).all()
        counts += found.reshape(500, 2, 4).sum(0)
    assert ((counts / repeats - 4 * log_weights.exp()).abs() < 4 * 0.5 / math.sqrt(repeats)).all()


def test_effective_particles_and_mean_weight():
    log_weights = torch.log(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1e-30, 1e-30, 1e-30]], dtype=torch.float64))
    torch.testing.assert_close(effective_particles(log_weights), torch.tensor([4.0, 1.0]).double())
    torch.testing.assert_close(log_mean(log_weights), torch.tensor([0.0, -math.log(4)]).double())


@pytest.mark.parametrize("dynamics", ["sde", "ode"])
@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_posterior_resampling_samples_the_tilted_law_in_any_number_of_steps(dynamics, num_steps):
    """A step with an exact draw is exact whatever its length: 256 draws, moments within 4 errors and O(1 / draws)."""
    samples = mfm.sample(
        oracle(),
        num_samples=1000,
        steering=mfm.PosteriorResampling(observation(), num_draws=256),
        num_steps=num_steps,
        dynamics=dynamics,
    ).images
    tilted = observation().tilt(mixture())
    exact = tilted.covariance().diagonal()
    assert ((samples.mean(0) - tilted.mean()).abs() < (4 / math.sqrt(1000) + 0.03) * exact.sqrt()).all()
    assert ((samples.var(0) / exact - 1).abs() < 4 * math.sqrt(2 / 1000) + 0.06).all()


def test_posterior_resampling_with_one_draw_is_no_steering():
    steering = mfm.PosteriorResampling(observation(), num_draws=1)
    samples = mfm.sample(oracle(), num_samples=2000, steering=steering, num_steps=3).images
    exact = mixture().covariance().diagonal()
    assert ((samples.mean(0) - mixture().mean()).abs() < 4 * (exact / 2000).sqrt()).all()


def test_its_error_falls_as_one_over_the_draws():
    """Shift of the mean along the observation from one step at t = 0.001, where the state says nothing: ~ 1 / N."""
    a = observation().direction
    exact, prior = float(observation().tilt(mixture()).mean() @ a), float(mixture().mean() @ a)
    left = {}
    for num_draws in (1, 4, 16):
        steering = mfm.PosteriorResampling(observation(), num_draws=num_draws)
        x = mfm.sample(oracle(), num_samples=12_000, steering=steering, num_steps=1, batch_size=2000).images
        left[num_draws] = ((x @ a).mean().item() - exact) / (prior - exact)
    assert abs(left[1] - 1) < 0.06
    assert 2.5 < left[4] / left[16] < 7


def test_search_raises_the_reward_with_particles_and_draws_and_ignores_monotone_transforms():
    reward = observation()

    def stretched(x: torch.Tensor) -> torch.Tensor:
        return 7 * reward(x) + 3

    def run(num_particles: int, num_draws: int, chosen=reward) -> mfm.Samples:
        steering = mfm.Search(chosen, num_particles=num_particles, num_draws=num_draws)
        return mfm.sample(oracle(), num_samples=200, steering=steering, num_steps=4)

    means = [float(run(*size).rewards.mean()) for size in [(1, 1), (1, 4), (4, 4)]]
    assert means[0] < means[1] < means[2] < 0
    assert means[2] > -0.02
    assert torch.equal(run(2, 3).images, run(2, 3, stretched).images)


def test_a_deterministic_search_over_all_particles_makes_them_one_and_a_stochastic_one_does_not():
    def spread(transition: str, resampling: str) -> torch.Tensor:
        steering = mfm.Search(observation(), num_particles=3, num_draws=2, transition=transition, resampling=resampling)
        drawn = mfm.sample(oracle(), num_samples=8, steering=steering, num_steps=4, keep_particles=True)
        return drawn.particles.std(1).norm(dim=1)

    assert (spread("deterministic", "max_overall") < 1e-6).all()
    assert (spread("stochastic", "max_overall") < 1e-6).all()  # at t = 1 all hold the best draw of the last step
    assert (spread("stochastic", "max_per_particle") > 1e-3).all()


def test_dps_is_exact_for_one_gaussian_up_to_the_posteriors_spread_and_not_for_a_mixture():
    """For a Gaussian prior grad r(m(x)) is the exact value gradient with the posterior's spread left out."""
    single = GaussianMixtureFlowMap(isotropic_mixture(torch.tensor([[0.3, -0.2]]), variance=0.5))
    x, t = torch.tensor([[0.1, 0.4]]), torch.tensor([0.5])
    weak = LinearObservation(torch.tensor([1.2, -0.8]), observation=-1.0, noise=30.0)
    from mfm_ray.steering import DPS, CallCounter, SteeringContext

    context = SteeringContext(single, KeyedNoise.for_images(0, 1), CallCounter())
    _, guided = DPS(weak, trust_region=None).steer(x, t, context)
    exact = weak.tilt(single.mixture).velocity(x, t) - single.drift(x, t)
    torch.testing.assert_close(guided.correction, exact, rtol=2e-3, atol=1e-7)
    assert context.calls.total() == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mfm.SMC(observation(), num_particles=0), "num_particles=0: expected an integer of at least 1"),
        (lambda: mfm.SMC(observation(), num_particles=2, potential="x"), "potential='x': expected one of tds"),
        (
            lambda: mfm.SMC(observation(), num_particles=2, resample_threshold=1.5),
            "resample_threshold=1.5: expected a number from 0 to 1",
        ),
        (
            lambda: mfm.Search(observation(), num_particles=1, num_draws=1, resampling="best"),
            "resampling='best': expected one of max_overall, max_per_particle",
        ),
        (
            lambda: mfm.Search(observation(), num_particles=1, num_draws=1, transition="jump"),
            "transition='jump': expected one of stochastic, deterministic",
        ),
        (lambda: mfm.PosteriorResampling(observation(), num_draws=0), "num_draws=0: expected an integer"),
        (lambda: mfm.AutoDraws(first=8, most=4), "most=4: expected at least first=8"),
        (lambda: mfm.AutoDraws(effective=100), "effective=100: expected a number from 1 to most=64"),
    ],
)
def test_impossible_settings_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("method", [mfm.GradientFreeGuidance, mfm.GradientGuidance])
def test_long_steps_of_the_sde_keep_the_spread_of_the_tilted_law(method):
    """Five steps: towards tilted means alone the deviation along the observation comes out at 0.4 to 0.45 of it."""
    steering = method(observation(0.4), num_draws=64)
    x = mfm.sample(oracle(), num_samples=1500, steering=steering, num_steps=5, dynamics="sde", batch_size=250).images
    tilted, a = observation(0.4).tilt(mixture()), observation().direction
    ratio = float((x @ a).std()) / math.sqrt(float(a @ tilted.covariance() @ a))
    assert abs(ratio - 1) < 0.1
