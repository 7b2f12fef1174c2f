import math

import pytest
import torch

from mfm_ray.noise import GeneratorNoise, KeyedNoise, Stream, _philox, as_noise

ALL_ONES = 0xFFFFFFFF


def philox_words(counter, key):
    """The generator at one counter and key, as four hexadecimal words."""
    packed = key[0] | key[1] << 32
    keys = torch.tensor([packed - 2**64 if packed >= 2**63 else packed])
    even, odd = _philox(keys, torch.tensor(counter).reshape(4, 1, 1))
    return " ".join(f"{int(word):08x}" for word in (even[0], odd[0], even[1], odd[1]))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers_of_random123(counter, key, words):
    assert philox_words(counter, key) == words


def test_blocks_of_a_key_are_philox_at_counters_0_1_2():
    keys = torch.tensor([5, -7])
    counters = torch.zeros(4, 2, 3, dtype=torch.int64)
    counters[0] = torch.arange(3)
    together = _philox(keys, counters)
    for block in range(3):
        alone = _philox(keys, counters[..., block : block + 1])
        assert all(torch.equal(a[..., block : block + 1], b) for a, b in zip(together, alone, strict=True))


def test_normals_have_the_moments_and_tails_of_normals():
    x = KeyedNoise.for_images(3, 50_000).normal(8).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)  # 4 standard errors, here and below
    assert abs(x.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(x.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    beyond_3 = math.erfc(3 / math.sqrt(2))
    assert abs((x.abs() > 3).double().mean() - beyond_3) < 4 * math.sqrt(beyond_3 / n)


def test_uniforms_fill_the_open_unit_interval_evenly():
    u = KeyedNoise.for_images(4, 200_000).uniform()
    assert 0 < u.min() < u.max() < 1
    counts = torch.histc(u.double(), bins=100, min=0, max=1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert abs(chi_square - 99) < 4 * math.sqrt(2 * 99)


def test_the_extreme_uniforms_stay_inside_the_open_interval(monkeypatch):
    extremes = KeyedNoise(torch.tensor([0, -1]))
    monkeypatch.setattr(KeyedNoise, "fold_in", lambda self, value: self)
    low, high = extremes.uniform()
    assert 0 < low < 1e-6
    assert 1 - 1e-6 < high < 1


def correlations(a, b):
    """Standard scores of the correlation of two sets of deviates of unit variance."""
    return (a * b).double().mean() * math.sqrt(a.numel())


def test_streams_steps_particles_draws_and_images_are_uncorrelated():
    base = KeyedNoise.for_images(0, 20_000)
    first = base.fold_in(0).fold_in(Stream.DRAW).spread(2)
    others = {
        "draw": first.normal(4)[:, 1],
        "stream": base.fold_in(0).fold_in(Stream.DIFFUSION).spread(2).normal(4)[:, 0],
        "step": base.fold_in(1).fold_in(Stream.DRAW).spread(2).normal(4)[:, 0],
        "seed": KeyedNoise.for_images(1, 20_000).fold_in(0).fold_in(Stream.DRAW).spread(2).normal(4)[:, 0],
        "image": first.normal(4)[:, 0].roll(1, 0),
        "coordinate": first.normal(4)[:, 0].roll(1, 1),
    }
    scores = {name: abs(float(correlations(first.normal(4)[:, 0], other))) for name, other in others.items()}
    assert max(scores.values()) < 4.5, scores


def test_uniform_and_normal_of_one_key_are_uncorrelated():
    noise = KeyedNoise.for_images(0, 100_000)
    u = (noise.uniform() - 0.5) * math.sqrt(12)
    assert abs(correlations(u, noise.normal(1)[:, 0])) < 4


def test_no_key_is_used_twice_within_a_steered_sampling_run():
    """Image, particle, step, stream and draw: all keys of a run are different, for seed and image 0 as well."""
    rows = KeyedNoise.for_images(0, 16).spread(4)
    keys = [rows.fold_in(Stream.START).keys.flatten()]
    for step in range(64):
        at_step = rows.fold_in(step)
        keys += [at_step.fold_in(Stream.DRAW).spread(8).keys.flatten()]
        keys += [at_step.fold_in(stream).keys.flatten() for stream in (Stream.DIFFUSION, Stream.RENOISE)]
    together = torch.cat(keys)
    assert together.unique().numel() == together.numel()


def test_key_zero_does_not_fold_into_itself():
    noise = KeyedNoise(torch.zeros(1, dtype=torch.int64))
    assert int(noise.fold_in(0).keys) != 0


def test_a_row_does_not_depend_on_its_neighbours_or_position():
    everyone = KeyedNoise.for_images(7, 37)
    alone = KeyedNoise.for_images(7, 1, first=20)
    for event in ((2,), (1, 8, 8), (7,)):
        assert torch.equal(everyone.normal(*event)[20], alone.normal(*event)[0])
    assert torch.equal(everyone.uniform()[20], alone.uniform()[0])
    assert torch.equal(everyone[torch.tensor([20, 3])].normal(5)[0], alone.normal(5)[0])
    assert torch.equal(everyone.spread(3).flatten().normal(4).unflatten(0, (37, 3)), everyone.spread(3).normal(4))


def test_the_first_numbers_do_not_depend_on_how_many_are_asked_for():
    noise = KeyedNoise.for_images(0, 5)
    assert torch.equal(noise.normal(64)[:, :3], noise.normal(3))


def test_indices_fold_in_row_by_row():
    noise = KeyedNoise.for_images(0, 3)
    together = noise.fold_in(torch.tensor([4, 5, 6])).normal(2)
    apart = torch.stack([noise.fold_in(4 + i).normal(2)[i] for i in range(3)])
    assert torch.equal(together, apart)


def test_a_generator_gives_the_same_face():
    x = torch.zeros(3, 5)
    noise = as_noise(torch.Generator().manual_seed(0), like=x)
    assert isinstance(noise, GeneratorNoise)
    drawn = noise.fold_in(Stream.DRAW).spread(4)
    expected = torch.Generator().manual_seed(0)
    assert torch.equal(drawn.normal(5), torch.randn(3, 4, 5, generator=expected))
    assert torch.equal(drawn.uniform(), torch.rand(3, 4, generator=expected))
    keyed = KeyedNoise.for_images(0, 3)
    assert as_noise(keyed, like=x) is keyed


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 0.5])
def test_refuses_a_seed_that_is_no_64_bit_integer(seed):
    with pytest.raises(ValueError, match=r"seed=.*: expected an integer from -2\^63"):
        KeyedNoise.for_images(seed, 1)
