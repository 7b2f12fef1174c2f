"""The whole of docs/imagenet.md at toy size: images, latents, an official file, training, steering, tuning, serving."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import save_tiny_autoencoder
from tests.networks import dit_reference as reference
from tests.rewards import tiny_networks

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

SIDE, CLASSES, PROMPT = 16, 3, "a photo of a tabby cat"
TOY = ["network.depth=2", "network.hidden_size=32", "network.num_heads=2", "network.encoder_depth=1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user brings: images by class, an autoencoder, a DMF file, PickScore; the true classes and layouts."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for number in range(48):
        path = folder / "images" / f"n0000000{number % CLASSES}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (18 + number % 4, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    save_tiny_autoencoder(folder / "vae")
    size = {"width": 32, "depth": 2, "patch": 2, "channels": 4, "grid": SIDE // 4, "classes": CLASSES}
    torch.save(reference.random_weights(**size, kind="one_time"), folder / "dmf.pt")
    tiny_networks.clip_folder(folder / "pickscore", image_size=28)
    return folder


def test_from_images_to_a_tuned_and_evaluated_model_and_a_served_one(run_job, serve_url, files, tmp_path) -> None:
    def done(name: str, *words: str):
        finished = run_job(name, *words)
        assert finished.code == 0, finished.describe()
        return finished

    source = [f"source={files}/images", f"autoencoder={files}/vae", "output=latents"]
    prepared = done("prepare_data", "data=images", *source, f"image_size={SIDE}", "shard_size=16", "heldout_share=0.3")
    assert prepared.metrics["images"] == 48
    assert prepared.metrics["train.rows"] + prepared.metrics["heldout.rows"] == 48

    recipe = ["experiment=imagenet_xl2_distilled", f"init_from={files}/dmf.pt", "data.path=latents", *TOY]
    steps = ["global_batch_size=8", "max_steps=3", "log_every=1", "activation_checkpointing=true"]
    model = done("train", *recipe, *steps).artifacts["model"]
    described = json.loads((Path(model) / "config.json").read_text())["data"]
    assert described["autoencoder"]["image_size"] == SIDE
    assert described["autoencoder"]["source"] == str(files / "vae")

    wish = ["reward=pickscore", f"reward.prompt='{PROMPT}'", f"reward.source={files}/pickscore"]
    small = ["num_samples=4", "num_steps=3", "label=1", "cfg_scale=2.5", "name=steered"]
    steered = done("sample", f"model={model}", *small, "steering=gradient", "steering.num_draws=2", *wish)
    assert Path(steered.artifacts["grid"]).read_bytes().startswith(b"\x89PNG")

    short = ["max_steps=2", "global_batch_size=8", "log_every=1", "sample_every=0", "evaluate_samples=8", "name=tuned"]
    short += ["evaluate_steps=2", "anchors.start_steps=0", "data.path=latents", "precision=bf16"]
    tuned = done("finetune", f"model={model}", *wish, *short).artifacts["model"]

    protocol = [
        "protocol=imagenet_steering",
        "protocol.rewards=[brightness]",
        "protocol.label=1",
        "protocol.num_images=4",
    ]
    protocol += ["protocol.num_steps=2", "protocol.pool_size=8", "protocol.best_of=[1,4]", "scaling.num_workers=0"]
    report = done("evaluate", *protocol, f"model={tuned}").artifacts["report"]
    assert "brightness" in Path(report).read_text()

    check_served(serve_url, {"base": model, "tuned": tuned}, files)


def check_served(url: str, models: dict[str, str], files: Path) -> None:
    """Both models, and the prompt reward in a deployment of its own."""
    import httpx
    from PIL import Image
    from ray import serve

    from serve.app import build_app
    from serve.settings import AppSettings

    own = {"name": "pickscore", "weights": {"source": str(files / "pickscore")}}
    serve.run(build_app(AppSettings.model_validate({"model": models, "rewards": [own]})), name="scale")
    steering = {"rewards": [{"name": "pickscore"}], "method": "gradient", "num_draws": 1, "num_steps": 3}
    asked = {"prompt": PROMPT, "class_label": 1, "seed": 3, "steering": steering}
    with httpx.Client(base_url=url, timeout=120) as client:
        pictures = []
        for name in models:
            answer = client.post("/v1/images/generations", json={**asked, "model": name})
            assert answer.status_code == 200, answer.text
            (made,) = answer.json()["data"]
            assert np.isfinite(made["reward"])
            pictures.append(base64.b64decode(made["b64_json"]))
        assert all(Image.open(io.BytesIO(picture)).size == (SIDE, SIDE) for picture in pictures)
        images = [base64.b64encode(picture).decode() for picture in pictures]
        scores = client.post("/v1/rewards/pickscore/score", json={"images": images, "prompt": PROMPT, "model": "base"})
        assert scores.status_code == 200, scores.text
        assert len(scores.json()["scores"]) == 2
