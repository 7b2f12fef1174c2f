"""Rewards of images and prompts with tiny random weights: values, gradients, memory, files and their damage."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from mfm_ray.building import PROMPT_REWARDS, build_reward
from mfm_ray.config import load_config
from mfm_ray.errors import InputError
from mfm_ray.rewards import Aesthetic, ClipScore, HPSv2, ImageReward, PickScore, Thresholded
from mfm_ray.rewards.clip import Clip, clip_tokenizer
from mfm_ray.rewards.pixels import filled_square, normalised
from mfm_ray.rewards.preference import PickScorer
from mfm_ray.rewards.prompt import PromptReward, TextCache
from mfm_ray.steering.reward_gradient import evaluate
from tests.rewards import tiny_networks
from tests.rewards.tiny_networks import waves

CAT, DOG = "a photo of a tabby cat", "a dog"


@pytest.fixture
def rewards(folders):
    """One of each kind, by name."""
    return {
        "pickscore": PickScore(prompt=CAT, source=folders / "clip"),
        "hpsv2": HPSv2(prompt=CAT, source=folders / "hpsv2"),
        "image_reward": ImageReward(prompt=CAT, source=folders / "image_reward"),
        "clip_score": ClipScore(prompt=CAT, source=folders / "clip"),
        "aesthetic": Aesthetic(source=folders / "clip", head=folders / "head"),
    }


NAMES = list(PROMPT_REWARDS)


def gradient(reward, images):
    inner = images.clone().requires_grad_()
    return torch.autograd.grad(evaluate(reward, inner).sum(), inner)[0]


def test_clip_rewards_are_those_of_transformers_own_model_and_tokenizer(folders, rewards):
    """CLIPModel and CLIPTokenizer as they are used upstream: batched, padded, logits out of one call."""
    from transformers import CLIPModel, CLIPTokenizer

    network = CLIPModel.from_pretrained(folders / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folders / "clip")
    images = torch.cat([waves(200, 300), 1.4 * waves(200, 300) - 0.2])  # also outside of [0, 1]
    told = tokenizer([CAT, DOG], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = network(pixel_values=normalised(filled_square(images, 224)), **told).logits_per_image
    for index, prompt in enumerate((CAT, DOG)):
        own = rewards["pickscore"].with_prompt(prompt)(images)
        torch.testing.assert_close(own, logits[:, index], rtol=1e-5, atol=1e-6)
        scaled = 100 * logits[:, index] / network.logit_scale.exp()
        torch.testing.assert_close(rewards["clip_score"].with_prompt(prompt)(images), scaled, rtol=1e-5, atol=1e-5)


def test_pickscore_of_a_picture_is_near_that_of_the_whole_processor(folders, rewards):
    """CLIPProcessor with a PIL image, which rounds to 8 bits on the way (tests/rewards/test_pixels.py)."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = (waves(256, 256)[0] * 255).round().byte()
    processor = CLIPProcessor(CLIPImageProcessorPil(), CLIPTokenizer.from_pretrained(folders / "clip"))
    given = processor(
        images=Image.fromarray(np.asarray(picture.permute(1, 2, 0))), text=[CAT], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(folders / "clip").eval()(**given).logits_per_image[0, 0]
    ours = rewards["pickscore"](picture[None].float() / 255)[0]
    assert abs(float(theirs - ours)) < 2e-3 * abs(float(theirs))


def test_the_aesthetic_score_is_its_head_on_unit_features(folders, rewards):
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(folders / "clip").eval()
    weights = tiny_networks.head_weights()
    with torch.no_grad():
        features = network.get_image_features(normalised(filled_square(waves(256, 256), 224))).pooler_output
        expected = features / features.norm(dim=1, keepdim=True)
        for number in (0, 2, 4, 6, 7):
            expected = expected @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    torch.testing.assert_close(rewards["aesthetic"](waves(256, 256)), expected[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences_in_double_precision(rewards, name):
    scorer = copy.deepcopy(rewards[name].scorer).double()
    images = waves(40, 56)[:1].double()
    images = torch.cat([images, 1.5 - images]).requires_grad_()
    torch.autograd.gradcheck(lambda inner: scorer(inner, [CAT, DOG]), images, fast_mode=True, eps=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_are_scored_as_grey_pictures(rewards, name):
    grey = waves(30, 30).mean(1, keepdim=True)
    reward = rewards[name]
    assert torch.equal(reward(grey), reward(grey.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(gradient(reward, grey), gradient(reward, grey.repeat(1, 3, 1, 1)).sum(1, keepdim=True))
    with pytest.raises(InputError, match=r"samples of shape \(2, 2, 5, 5\), expected \(N, 1 or 3, H, W\)"):
        reward(torch.rand(2, 2, 5, 5))


@pytest.mark.parametrize("name", NAMES)
def test_many_prompts_at_once_are_each_by_itself_to_the_bit(rewards, name):
    """Values and gradients do not depend on batch mates, nor on how many images one network call has."""
    images = torch.cat([waves(50, 33), waves(50, 33).flip(-1), 1 - waves(50, 33)])
    prompts = [CAT, DOG, CAT, "cat", DOG, CAT]
    reward = rewards[name]
    inner = images.clone().requires_grad_()
    values = reward.scorer(inner, prompts)
    (gradients,) = torch.autograd.grad(values.sum(), inner)
    for row, prompt in enumerate(prompts):
        own = reward.with_prompt(prompt)
        assert torch.equal(own(images[row : row + 1]), values[row : row + 1].detach())
        assert torch.equal(gradient(own, images[row : row + 1]), gradients[row : row + 1])
    fewer = copy.copy(reward.scorer)
    fewer.rows_per_call = 4
    assert torch.equal(fewer(images, prompts), values.detach())


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_batch_mates_at_the_width_of_a_vit_h(folders, threads):
    from transformers import CLIPConfig, CLIPModel

    config = tiny_networks.clip_config(tiny_networks.clip_tokenizer(folders / "tokens"))
    config["vision_config"].update(hidden_size=1280, intermediate_size=5120, num_attention_heads=16)
    network = tiny_networks.randomised(CLIPModel(CLIPConfig.from_dict(config))).requires_grad_(False)
    rows = config["text_config"]["vocab_size"]
    clip = Clip(network, clip_tokenizer(folders / "tokens", key="tokenizer", rows=rows))
    reward = PromptReward(scorer=PickScorer(clip, name="wide", rows_per_call=8), prompt=CAT, name="wide")
    images = torch.cat([waves(256, 256) * factor for factor in (1.0, 0.9, 0.7, 0.5, 0.2)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values, gradients = reward(images), gradient(reward, images)
        for first, count in ((0, 1), (3, 2), (2, 5)):
            part = slice(first, first + count)
            assert torch.equal(reward(images[part]), values[part])
            assert torch.equal(gradient(reward, images[part]), gradients[part])
    finally:
        torch.set_num_threads(before)


def test_memory_of_a_gradient_is_that_of_one_call(rewards):
    """No more images are in the network at once than `rows_per_call`, and no graph is left behind."""
    scorer, seen = rewards["pickscore"].scorer, []
    hook = scorer.clip.network.vision_model.register_forward_hook(lambda module, given, out: seen.append(len(out[0])))
    inner = waves(30, 30).repeat(10, 1, 1, 1).requires_grad_()
    values = scorer(inner, [CAT] * 20)
    hook.remove()
    assert seen == [8, 8, 4]
    assert type(values.grad_fn).__name__ == "_KnownBackward"


def test_texts_are_read_once_and_the_oldest_leave(folders):
    reward = PickScore(prompt=CAT, source=folders / "clip_28")
    scorer, images = reward.scorer, waves(20, 20)
    calls = []
    hook = scorer.clip.network.text_model.register_forward_hook(lambda *_: calls.append(1))
    for prompt in (CAT, DOG, CAT, CAT):
        reward.with_prompt(prompt)(images)
    hook.remove()
    # two images a call, padded to four rows, each of which asks for its prompt
    assert (len(calls), scorer.texts.misses, scorer.texts.hits) == (2, 2, 14)
    scorer.double()(images, [CAT, CAT])
    assert scorer.texts.misses == 3  # features of other weights
    scorer.float()

    cache = TextCache(str.upper, capacity=2)
    assert [cache.get(word) for word in ("a", "b", "a", "c", "b")] == ["A", "B", "A", "C", "B"]
    assert (cache.hits, cache.misses, len(cache)) == (1, 4, 2)


def test_a_reward_is_fixed_and_in_full_precision(rewards):
    reward, images = rewards["pickscore"], waves(30, 30)
    expected = reward(images)
    reward.train()
    assert not reward.training
    assert not any(module.training for module in reward.modules())
    assert not any(weight.requires_grad for weight in reward.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images), expected)
    assert reward(images.half()).dtype == torch.float32


def test_rewards_of_one_source_share_its_weights(folders, rewards):
    other = PickScore(prompt=DOG, source=folders / "clip")
    assert other.scorer is rewards["pickscore"].scorer
    assert ClipScore(prompt=DOG, source=folders / "clip").scorer is rewards["clip_score"].scorer


def test_a_long_prompt_is_cut_and_an_empty_one_refused(folders, rewards):
    images = waves(30, 30)
    for name, tokens in (("pickscore", 75), ("image_reward", 33)):  # and two for begin and end
        cut, longer = " ".join(["a"] * tokens), " ".join(["a"] * (tokens + 40))
        assert torch.equal(rewards[name].with_prompt(cut)(images), rewards[name].with_prompt(longer)(images))
    for prompt in ("", "  ", None, 3):
        with pytest.raises(InputError, match=r"^prompt=.*: expected a text$"):
            PickScore(prompt=prompt, source=folders / "clip")


def test_files_as_they_are_published(folders, tmp_path):
    """Older pickled weights with counting buffers, and names with `model.` before each and no description."""
    images, own = waves(50, 33), PickScore(prompt=CAT, source=folders / "clip")(waves(50, 33))
    tiny_networks.clip_folder(tmp_path / "binary", binary=True)
    assert torch.equal(PickScore(prompt=CAT, source=tmp_path / "binary")(images), own)
    packed = tmp_path / "packed"
    tiny_networks.clip_tokenizer(packed)
    weights = safetensors.torch.load_file(folders / "clip" / "model.safetensors")
    safetensors.torch.save_file(
        {f"model.{name}": tensor for name, tensor in weights.items()}, packed / "model.safetensors"
    )
    (packed / "config.json").write_text(json.dumps({"model": "yuvalkirstain/PickScore_v1"}))
    assert torch.equal(PickScore(prompt=CAT, source=packed)(images), own)
    tiny_networks.image_reward_folder(tmp_path / "image_reward", packed=True)
    expected = ImageReward(prompt=CAT, source=folders / "image_reward")(images)
    assert torch.equal(ImageReward(prompt=CAT, source=tmp_path / "image_reward")(images), expected)
    halves = {name: tensor.half() for name, tensor in weights.items()}
    safetensors.torch.save_file(halves, tmp_path / "binary" / "model.safetensors")
    halved = PickScore(prompt=CAT, source=tmp_path / "binary", rows_per_call=4)
    assert {weight.dtype for weight in halved.parameters()} == {torch.float32}
    torch.testing.assert_close(halved(images), own, rtol=0.02, atol=1e-3)


def test_openais_networks_keep_their_own_activation(tmp_path):
    """CLIP ViT-L/14 of OpenAI has the quick GELU, which its description says; the exact one gives other numbers."""
    tiny_networks.clip_folder(tmp_path / "quick", act="quick_gelu")
    tiny_networks.clip_folder(tmp_path / "exact")
    quick, exact = (ClipScore(prompt=CAT, source=tmp_path / name)(waves(30, 30)) for name in ("quick", "exact"))
    assert not torch.allclose(quick, exact, rtol=1e-3)


class Code:
    def __reduce__(self):
        return print, ("read",)


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


def damaged(path, change):
    torch.save({"state_dict": change(torch.load(path, weights_only=True)["state_dict"])}, path)


DAMAGE = {
    "missing": (lambda w: without(w, "visual.proj"), "missing visual_projection.weight"),
    "missing layer": (lambda w: without(w, "transformer.resblocks.1.ln_1.bias"), "missing text_model.encoder.layers.1"),
    "unknown": (lambda w: {**w, "score_head.weight": torch.ones(2)}, "unknown score_head.weight"),
    "shape": (
        lambda w: {**w, "visual.ln_pre.bias": torch.zeros(7)},
        r"vision_model.pre_layrnorm.bias has shape \(7,\), expected \(160,\)",
    ),
    "odd projection": (lambda w: {**w, "transformer.resblocks.0.attn.in_proj_bias": torch.zeros(7)}, "multiple of 3"),
    "nan": (lambda w: {**w, "ln_final.bias": torch.full((64,), math.nan)}, "ln_final.bias holds NaN or infinity"),
    "no tensors": (lambda w: {"a": 3}, "holds no tensors by name"),
    "another network": (lambda w: {"layers.0.weight": torch.ones(2, 2)}, "patch_embedding.weight is missing"),
    "code": (lambda w: {"a": Code()}, "cannot be read as weights"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_are_refused_in_one_line(tmp_path, kind):
    tiny_networks.hpsv2_folder(tmp_path)
    change, message = DAMAGE[kind]
    damaged(tmp_path / "HPS_v2.1_compressed.pt", change)
    with pytest.raises(InputError, match=message) as refused:
        HPSv2(prompt=CAT, source=tmp_path)
    assert "\n" not in str(refused.value)
    assert "HPS_v2.1_compressed.pt" in str(refused.value)


def test_truncated_files_and_missing_ones_are_refused_by_their_names(tmp_path, capsys):
    tiny_networks.clip_folder(tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    whole = path.read_bytes()

    def refusal(cls=PickScore, source="clip", **arguments):
        with pytest.raises(InputError) as refused:
            cls(prompt=CAT, source=tmp_path / source, **arguments)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    for kept in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert "model.safetensors cannot be read as weights" in refusal()
    path.unlink()
    assert "expected model.safetensors or pytorch_model.bin" in refusal()
    path.write_bytes(whole)
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    for content, message in (
        ("{", "config.json"),
        ("[]", "no JSON object"),
        (json.dumps({**config, "model_type": "siglip"}), "describes a 'siglip', expected 'clip'"),
        (json.dumps({**config, "projection_dim": 12}), "has shape"),
    ):
        (tmp_path / "clip" / "config.json").write_text(content)
        assert message in refusal()
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    (tmp_path / "clip" / "merges.txt").unlink()
    assert "merges.txt is missing" in refusal()
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\nq q\n")  # of letters without such a token
    assert "the tokenizer cannot be read" in refusal()
    (tmp_path / "more").mkdir()
    tiny_networks.clip_tokenizer(tmp_path / "more")
    vocabulary = json.loads((tmp_path / "more" / "vocab.json").read_text())
    (tmp_path / "more" / "vocab.json").write_text(json.dumps({**vocabulary, "x y": len(vocabulary)}))
    assert "the tokenizer has" in refusal(tokenizer=tmp_path / "more")
    assert "does not exist" in refusal(source="nowhere")
    assert "rows_per_call=6: expected a multiple of 4" in refusal(
        rows_per_call=6, tokenizer=folders_with_merges(tmp_path)
    )
    assert "expected HPS_v2.1_compressed.pt or model.safetensors" in refusal(HPSv2, source="more")
    assert "expected ImageReward.pt or model.safetensors" in refusal(ImageReward, source="more")


def folders_with_merges(tmp_path):
    tiny_networks.clip_tokenizer(tmp_path / "tokens")
    return tmp_path / "tokens"


def test_damaged_image_reward_and_head_are_refused(tmp_path, folders):
    weights = tiny_networks.image_reward_folder(tmp_path)
    path = tmp_path / "ImageReward.pt"
    for changed, message in (
        (without(weights, "mlp.layers.6.bias"), "missing layers.6.bias"),
        (without(weights, "blip.visual_encoder.blocks.1.attn.qkv.weight"), "missing encoder.layers.1.self_attn.qkv"),
        ({**weights, "blip.text_encoder.encoder.layer.0.extra": torch.ones(1)}, "unknown encoder.layer.0.extra"),
        ({**weights, "blip.itm_head.weight": torch.ones(1)}, "unknown blip.itm_head.weight"),
        ({**weights, "mlp.layers.0.weight": torch.ones(1000, 64)}, r"layers.0.weight has shape \(1000, 64\)"),
    ):
        torch.save(changed, path)
        with pytest.raises(InputError, match=message):
            ImageReward(prompt=CAT, source=tmp_path)
    torch.save(weights, path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"vocab.txt has no \[PAD\]"):
        ImageReward(prompt=CAT, source=tmp_path)
    head = tmp_path / "head"
    tiny_networks.aesthetic_folder(head)
    torch.save(tiny_networks.head_weights(32), head / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(InputError, match="takes 32 features, but the CLIP of source has 768"):
        Aesthetic(source=folders / "clip", head=head)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, cls in PROMPT_REWARDS.items():
        given = {} if name == "aesthetic" else {"prompt": CAT}
        with pytest.raises(InputError, match=r"^source=hf://.*local folder works as well"):
            cls(**given)


@pytest.mark.parametrize("binary", [False, True])
def test_weights_come_from_the_hub_once(monkeypatch, tmp_path, folders, binary):
    """Most repositories hold them twice: the pickled ones are asked for only where there are no others."""
    tiny_networks.clip_folder(tmp_path / "hub", binary=binary)
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "cache").mkdir(exist_ok=True)
        for name in allow_patterns:
            if (tmp_path / "hub" / name).is_file():
                shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)
        return tmp_path / "cache"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    reward = ClipScore(prompt=CAT, source=f"hf://test/of-{binary}")
    assert ["pytorch_model.bin" in files for files in asked] == ([False, True] if binary else [False])
    expected = ClipScore(prompt=CAT, source=folders / "clip")(waves(30, 30))
    assert torch.equal(reward(waves(30, 30)), expected)


def test_an_aesthetic_score_needs_no_tokenizer(tmp_path, folders):
    tiny_networks.clip_folder(tmp_path)
    (tmp_path / "vocab.json").unlink()
    own = Aesthetic(source=tmp_path, head=folders / "head")(waves(30, 30))
    assert torch.equal(own, Aesthetic(source=folders / "clip", head=folders / "head")(waves(30, 30)))
    with pytest.raises(InputError, match=r"^source=.*: vocab.json is missing; name a folder with CLIP's"):
        ClipScore(prompt=CAT, source=tmp_path)
    with pytest.raises(InputError, match=r"^tokenizer=.*/nowhere does not exist"):
        ClipScore(prompt=CAT, source=tmp_path, tokenizer=tmp_path / "nowhere")


def test_configured_rewards(folders):
    def build(*words):
        config = load_config("sample", list(words))
        return build_reward(config.reward, load_classifier=lambda: None, load_heldout=lambda place: None)

    source, images = f"reward.source={folders / 'clip'}", waves(30, 30)
    plain = PickScore(prompt=CAT, source=folders / "clip")(images)
    assert torch.equal(build("reward=pickscore", source, f"reward.prompt='{CAT}'")(images), plain)
    ceiling = float(plain.mean())
    capped = build("reward=pickscore", source, f"reward.prompt='{CAT}'", f"reward.threshold={ceiling}")
    assert isinstance(capped, Thresholded)
    assert torch.equal(capped(images), plain.clamp_max(ceiling))
    part = f"{{name: pickscore, source: '{folders / 'clip'}', prompt: '{DOG}', weight: 2}}"
    total = build("reward=weighted_sum", f"reward.parts=[{part}, {{name: brightness, weight: 0}}]")
    torch.testing.assert_close(total(images), 2 * PickScore(prompt=DOG, source=folders / "clip")(images))
    with pytest.raises(InputError, match=r"^reward.prompt='': expected a text"):
        build("reward=pickscore", source)
    with pytest.raises(InputError, match=r"reward.promt: unknown key; did you mean reward.prompt"):
        build("reward=pickscore", "reward.promt=x")
