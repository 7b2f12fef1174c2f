"""Folders of prompt rewards with tiny random weights, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rewards import tiny_networks


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip, hpsv2, image_reward, head: as they are published, for images of 224; clip_28: of 28."""
    root = tmp_path_factory.mktemp("networks")
    tiny_networks.clip_folder(root / "clip")
    tiny_networks.clip_folder(root / "clip_28", image_size=28)
    tiny_networks.hpsv2_folder(root / "hpsv2")
    tiny_networks.image_reward_folder(root / "image_reward")
    tiny_networks.aesthetic_folder(root / "head")
    return root
