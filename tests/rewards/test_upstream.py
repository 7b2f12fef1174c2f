"""Against the originals: numbers of open_clip, hpsv2, torchvision and ImageReward on the same tiny weights.

`upstream_reference.py` made them and says how; nothing of those packages is needed here.
"""

import json
from pathlib import Path

import pytest
import torch

from mfm_ray.rewards import HPSv2, ImageReward, PickScore
from mfm_ray.rewards.clip import clip_of_open_clip
from mfm_ray.rewards.pixels import filled_square, normalised, padded_square
from tests.rewards.tiny_networks import PROMPTS, SIZES, hpsv2_folder, sampled, waves

REFERENCE = json.loads(Path(__file__).with_name("upstream_reference.json").read_text())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_torchvisions_pictures(height, width):
    images, place = waves(height, width), f"{height}x{width}"
    for prepare, name in ((filled_square, "filled"), (padded_square, "padded")):
        ours = sampled(normalised(prepare(images, 224)))
        assert ours == pytest.approx(REFERENCE[name][place], abs=2e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["HPS_v2.1_compressed.pt", "RE-N-Y"])
def test_hpsv2(tmp_path, packed):
    hpsv2_folder(tmp_path, packed=packed)
    for prompt in PROMPTS:
        reward = HPSv2(prompt=prompt, source=tmp_path)
        for height, width in SIZES:
            expected = torch.tensor(REFERENCE["hpsv2"][f"{height}x{width} {prompt}"])
            torch.testing.assert_close(reward(waves(height, width)), expected, rtol=1e-5, atol=2e-7)


def test_open_clips_network_after_conversion(folders):
    path = folders / "hpsv2" / "HPS_v2.1_compressed.pt"
    clip = clip_of_open_clip(path, tokenizer=folders / "hpsv2")
    for prompt in PROMPTS:
        text = clip.text_features(prompt)
        for height, width in SIZES:
            expected = torch.tensor(REFERENCE["open_clip"][f"{height}x{width} {prompt}"])
            ours = clip.cosine(normalised(filled_square(waves(height, width), 224)), [text, text])
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-7)


def test_pickscore_is_that_cosine_times_its_scale(folders):
    """The tiny PickScore has the weights of the tiny HPSv2, in transformers' layout."""
    for prompt in PROMPTS:
        reward = PickScore(prompt=prompt, source=folders / "clip")
        for height, width in SIZES:
            expected = torch.tensor(2.6592).exp() * torch.tensor(REFERENCE["open_clip"][f"{height}x{width} {prompt}"])
            torch.testing.assert_close(reward(waves(height, width)), expected, rtol=1e-5, atol=4e-6)


def test_image_reward(folders):
    for prompt in PROMPTS:
        reward = ImageReward(prompt=prompt, source=folders / "image_reward")
        for height, width in SIZES:
            expected = torch.tensor(REFERENCE["image_reward"][f"{height}x{width} {prompt}"])
            torch.testing.assert_close(reward(waves(height, width)), expected, rtol=1e-5, atol=1e-5)
