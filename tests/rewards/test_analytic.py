import math

import pytest
import torch

from mfm_ray.rewards import LinearGaussian, MaskedObservation, Symmetry, TargetBrightness, half_mask

SHAPE = (1, 4, 5)


def samples(num=3, shape=SHAPE, dtype=torch.float64, seed=0):
    return torch.rand(num, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def all_rewards():
    return [
        MaskedObservation(observed=samples(1)[0].float(), mask=half_mask(SHAPE), noise=0.1),
        TargetBrightness(target=0.3, scale=0.02),
        Symmetry(scale=0.3),
        Symmetry(scale=0.3, axis="vertical", name="vertical"),
        LinearGaussian(direction=samples(1, seed=1)[0].float(), observation=-1.0, noise=0.2),
    ]


@pytest.fixture(params=all_rewards(), ids=lambda reward: reward.name)
def reward(request):
    return request.param


def test_gradients_match_finite_differences(reward):
    x = samples(seed=7).requires_grad_()
    torch.autograd.gradcheck(reward.log_weight, (x,))
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    (precise,) = torch.autograd.grad(reward.log_weight(x).sum(), x)
    assert torch.equal(gradient, precise)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rewards_are_float32_of_shape_n_for_every_input_precision(reward, dtype):
    x = samples(5, dtype=torch.float32).to(dtype)
    values = reward(x)
    assert values.dtype == torch.float32
    assert values.shape == (5,)
    assert values.isfinite().all()
    torch.testing.assert_close(values, reward(x.double()), rtol=1e-5, atol=1e-5)


def test_rewards_of_a_row_do_not_depend_on_the_others(reward):
    x = samples(16, dtype=torch.float32)
    together = reward(x)
    assert torch.equal(together[4:12], reward(x[4:12]))
    assert torch.equal(together.flip(0), reward(x.flip(0)))


def test_masked_observation_is_the_gaussian_log_likelihood():
    observed, mask, x = samples(1)[0], half_mask(SHAPE), samples(2, seed=3)
    values = MaskedObservation(observed=observed, mask=mask, noise=0.1)(x)
    normal = torch.distributions.Normal(x, 0.1)
    expected = ((normal.log_prob(observed) - normal.log_prob(x)) * mask).sum((1, 2, 3))
    torch.testing.assert_close(values, expected.float())


def test_masked_observation_ignores_what_is_not_observed():
    observed, mask = samples(1)[0], half_mask(SHAPE, "left")
    reward = MaskedObservation(observed=observed, mask=mask, noise=0.1)
    x = torch.where(mask.bool(), observed.float(), samples(1, seed=9)[0].float())[None]
    assert reward(x).item() == 0


def test_target_brightness_is_best_at_its_target():
    reward = TargetBrightness(target=0.25, scale=0.05)
    levels = torch.tensor([0.20, 0.25, 0.30])[:, None, None, None].expand(3, *SHAPE)
    torch.testing.assert_close(reward(levels), torch.tensor([-0.5, 0.0, -0.5]), rtol=1e-4, atol=1e-6)


def test_symmetry_counts_each_mirrored_pair_once():
    x = torch.zeros(1, *SHAPE)
    x[0, 0, 1, 0] = 0.6
    assert math.isclose(Symmetry(scale=0.3)(x).item(), -(0.6**2) / (2 * 0.3**2), rel_tol=1e-6)
    on_the_axis = torch.zeros(1, *SHAPE)
    on_the_axis[0, 0, :, 2] = 1.0
    assert Symmetry(scale=0.3)(on_the_axis).item() == 0
    assert Symmetry(scale=0.3, axis="vertical")(on_the_axis).item() == 0


def test_symmetry_is_zero_on_symmetric_images_only_along_its_axis():
    x = samples(2)
    mirrored = (x + x.flip(-1)) / 2
    torch.testing.assert_close(Symmetry(scale=0.1)(mirrored), torch.zeros(2))
    assert (Symmetry(scale=0.1, axis="vertical")(mirrored) < -1).all()


def test_linear_gaussian_on_coordinates():
    reward = LinearGaussian(direction=[1.2, -0.8], observation=-1.0, noise=0.2)
    values = reward(torch.tensor([[0.0, 1.25], [1.0, 1.0]]))
    torch.testing.assert_close(values, torch.tensor([0.0, -(1.4**2) / 0.08]))


def test_half_masks_split_the_image_without_the_middle_line():
    assert half_mask((1, 8, 8)).sum() == 32
    assert half_mask((1, 8, 8))[0, :4].all()
    assert (half_mask((2, 5, 4)) + half_mask((2, 5, 4), "lower"))[:, 2].sum() == 0
    assert torch.equal(half_mask((1, 4, 4), "right"), half_mask((1, 4, 4), "left").flip(-1))


def test_rewards_move_and_save_like_modules(reward):
    state = reward.double().state_dict()
    assert all(value.dtype == torch.float64 for value in state.values())
    assert reward(samples()).dtype == torch.float32
    reward.float()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskedObservation(observed=torch.zeros(1, 2, 2), mask=torch.ones(2, 2), noise=0.1), "mask: shape"),
        (lambda: MaskedObservation(observed=[[1.0]], mask=[[0.5]], noise=0.1), "mask: expected entries 0 and 1"),
        (lambda: MaskedObservation(observed=[[1.0]], mask=[[0]], noise=0.1), "at least one 1"),
        (lambda: MaskedObservation(observed=[[1.0]], mask=[[1]], noise=0.0), "noise=0.0"),
        (lambda: MaskedObservation(observed=[[1.0]], mask=[[1]], noise="a"), "noise=a"),
        (lambda: MaskedObservation(observed=[[float("nan")]], mask=[[1]], noise=1), "observed: holds NaN"),
        (lambda: MaskedObservation(observed=[[1.0], [1.0, 2.0]], mask=[[1]], noise=1), "observed: expected numbers"),
        (lambda: TargetBrightness(target=float("nan"), scale=1.0), "target: holds NaN"),
        (lambda: TargetBrightness(target="bright", scale=1.0), "target: expected numbers"),
        (lambda: TargetBrightness(target=0.5, scale=-1.0), "scale=-1.0"),
        (lambda: TargetBrightness(target=0.5, scale=float("inf")), "scale=inf"),
        (lambda: TargetBrightness(target=0.5, scale=1.0, name=""), "name is empty"),
        (lambda: Symmetry(scale=True), "scale=True"),
        (lambda: Symmetry(scale=1.0, axis="diagonal"), "axis='diagonal': expected one of horizontal, vertical"),
        (lambda: LinearGaussian(direction=[0.0, 0.0], observation=0.0, noise=1.0), "direction: expected"),
        (lambda: LinearGaussian(direction=1.0, observation=0.0, noise=1.0), "direction: expected"),
        (lambda: LinearGaussian(direction=[1.0], observation=0.0, noise=0), "noise=0"),
        (lambda: half_mask((1, 8, 8), "middle"), "half='middle'"),
        (lambda: half_mask((8, 8)), "event_shape"),
    ],
)
def test_wrong_arguments_are_one_line_naming_the_field(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_arguments_are_keyword_only_and_typos_are_type_errors():
    with pytest.raises(TypeError):
        TargetBrightness(0.5, 1.0)
    with pytest.raises(TypeError, match="sigma"):
        TargetBrightness(target=0.5, sigma=1.0)


def test_samples_of_another_shape_are_refused_naming_the_reward():
    reward = MaskedObservation(observed=torch.zeros(SHAPE), mask=half_mask(SHAPE), noise=0.1)
    with pytest.raises(ValueError, match=r"reward masked: samples of shape \(3, 1, 4, 4\), expected \(N, 1, 4, 5\)"):
        reward(torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match="reward symmetry"):
        Symmetry(scale=1.0)(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="reward brightness"):
        TargetBrightness(target=0.0, scale=1.0)(torch.zeros(3))
