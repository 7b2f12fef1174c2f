"""Rewards of people's preferences, and of how well an image shows a text, from published networks.

    PickScore    exp(logit_scale) cos(image, text)      CLIP ViT-H-14    short side to 224, middle cropped
    HPSv2        cos(image, text)                       CLIP ViT-H-14    long side to 224, padded with black
    ImageReward  (head(BLIP(image, text)) - mean) / std BLIP             short side to 224, middle cropped
    ClipScore    100 cos(image, text)                   CLIP             short side to 224, middle cropped
    Aesthetic    head(image features of length 1)       CLIP ViT-L-14    short side to 224, middle cropped

All with bicubic antialiased resizing and CLIP's mean and deviation (`mfm_ray.rewards.pixels`), in float32. A source is
a folder, or `hf://owner/name`. Rewards that differ in their prompts alone have one network and its cached texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mfm_ray.errors import InputError
from mfm_ray.hub import local_folder
from mfm_ray.rewards import blip as blips
from mfm_ray.rewards import clip as clips
from mfm_ray.rewards.blip import Blip
from mfm_ray.rewards.clip import Clip
from mfm_ray.rewards.pixels import filled_square, normalised, padded_square, three_channels
from mfm_ray.rewards.prompt import ROWS_PER_CALL, PromptReward, Scorer, required, shared
from mfm_ray.rewards.weights import first_file, read_tensors

PICKSCORE = "hf://yuvalkirstain/PickScore_v1"
HPSV2 = "hf://xswu/HPSv2"
IMAGE_REWARD = "hf://THUDM/ImageReward"
CLIP_L = "hf://openai/clip-vit-large-patch14"
AESTHETIC_HEAD = "hf://camenduru/improved-aesthetic-predictor"
TOKENIZER_H = "hf://laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_BERT = "hf://google-bert/bert-base-uncased"
_HPSV2_FILES = ("HPS_v2.1_compressed.pt", "model.safetensors")
_IMAGE_REWARD_FILES = ("ImageReward.pt", "model.safetensors")
_HEAD_FILES = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")


class _ClipScorer(Scorer):
    """What the scorers over a CLIP share: text features that are cached, the middle of the image."""

    def __init__(self, clip: Clip, *, name: str, rows_per_call: int) -> None:
        super().__init__(name=name, rows_per_call=rows_per_call)
        self.clip = clip

    def read(self, prompt: str) -> Any:
        return self.clip.text_features(prompt)

    def prepare(self, images: Tensor) -> Tensor:
        return normalised(filled_square(three_channels(images, name=self.name), self.clip.image_size))


class PickScorer(_ClipScorer):
    """exp(logit_scale) cos, in the range of about 15 to 25."""

    @classmethod
    def load(cls, *, source: str | Path, tokenizer: str | Path | None, rows_per_call: int) -> PickScorer:
        texts = tokenizer or clips.own_tokenizer_or(source, TOKENIZER_H)
        clip = clips.clip_of_folder(source, tokenizer=texts)
        return cls(clip, name="pickscore", rows_per_call=rows_per_call)

    def scores(self, pixels: Tensor, texts: Sequence[Any]) -> Tensor:
        return self.clip.logit_scale * self.clip.cosine(pixels, texts)


class HPSv2Scorer(_ClipScorer):
    """cos without the logit scale, about 0.2 to 0.35."""

    @classmethod
    def load(cls, *, source: str | Path, tokenizer: str | Path | None, rows_per_call: int) -> HPSv2Scorer:
        folder = local_folder(source, key="source", files=_HPSV2_FILES)
        texts = tokenizer or clips.own_tokenizer_or(source, TOKENIZER_H)
        clip = clips.clip_of_open_clip(first_file(folder, _HPSV2_FILES, what="HPSv2.1"), tokenizer=texts)
        return cls(clip, name="hpsv2", rows_per_call=rows_per_call)

    def prepare(self, images: Tensor) -> Tensor:
        # padded before it is normalised: the bars are black, as the original has them
        return normalised(padded_square(three_channels(images, name=self.name), self.clip.image_size))

    def scores(self, pixels: Tensor, texts: Sequence[Any]) -> Tensor:
        return self.clip.cosine(pixels, texts)


class ClipScorer(_ClipScorer):
    """100 cos. (The metric of that name clips it at 0, where there would be no gradient.)"""

    @classmethod
    def load(cls, *, source: str | Path, tokenizer: str | Path | None, rows_per_call: int) -> ClipScorer:
        clip = clips.clip_of_folder(source, tokenizer=tokenizer)
        return cls(clip, name="clip_score", rows_per_call=rows_per_call)

    def scores(self, pixels: Tensor, texts: Sequence[Any]) -> Tensor:
        return 100 * self.clip.cosine(pixels, texts)


class AestheticScorer(_ClipScorer):
    """The head on image features of length 1, about 1 to 10; no text is read."""

    reads_prompts = False  # of the image alone

    def __init__(self, clip: Clip, head: nn.Module, *, rows_per_call: int) -> None:
        super().__init__(clip, name="aesthetic", rows_per_call=rows_per_call)
        self.head = head

    @classmethod
    def load(cls, *, source: str | Path, head: str | Path, rows_per_call: int) -> AestheticScorer:
        clip = clips.clip_of_folder(source, tokenizer=None, reads_texts=False)
        path = first_file(local_folder(head, key="head", files=_HEAD_FILES), _HEAD_FILES, what="aesthetic head")
        linear = blips.linear_head(read_tensors(path), path)
        _require_width(linear, clip, path)
        return cls(clip, linear, rows_per_call=rows_per_call)

    def read(self, prompt: str) -> None:
        return None

    def scores(self, pixels: Tensor, texts: Sequence[Any]) -> Tensor:
        scored: Tensor = self.head(self.clip.image_features(pixels)).squeeze(1)
        return scored


class ImageRewardScorer(Scorer):
    """The head on what the text encoder makes of text and image together: tokens alone can be cached."""

    def __init__(self, blip: Blip, *, rows_per_call: int) -> None:
        super().__init__(name="image_reward", rows_per_call=rows_per_call)
        self.blip = blip

    @classmethod
    def load(cls, *, source: str | Path, tokenizer: str | Path | None, rows_per_call: int) -> ImageRewardScorer:
        folder = local_folder(source, key="source", files=(*_IMAGE_REWARD_FILES, "vocab.txt"))
        path = first_file(folder, _IMAGE_REWARD_FILES, what="ImageReward")
        texts = tokenizer or (folder if (folder / "vocab.txt").is_file() else TOKENIZER_BERT)
        return cls(blips.read_blip(path, tokenizer=texts, key="tokenizer"), rows_per_call=rows_per_call)

    def read(self, prompt: str) -> tuple[Tensor, Tensor]:
        return self.blip.tokens(prompt)

    def prepare(self, images: Tensor) -> Tensor:
        return normalised(filled_square(three_channels(images, name=self.name), self.blip.image_size))

    def scores(self, pixels: Tensor, texts: Sequence[Any]) -> Tensor:
        return self.blip.reward(pixels, texts)


class PickScore(PromptReward):
    """PickScore of images for a prompt (Kirstain et al. 2023, arXiv 2305.01569).

    prompt: cut at 77 tokens. source: transformers folder of a CLIPModel. tokenizer: folder with CLIP's vocab.json and
    merges.txt; None: the source's own, or where a hub's source has none, laion's. rows_per_call: images of one call.
    """

    def __init__(
        self,
        *,
        prompt: str,
        source: str | Path = PICKSCORE,
        tokenizer: str | Path | None = None,
        rows_per_call: int = ROWS_PER_CALL,
        name: str = "pickscore",
    ) -> None:
        wish = required(prompt)
        scorer = shared(PickScorer.load, source=source, tokenizer=tokenizer, rows_per_call=rows_per_call)
        super().__init__(scorer=scorer, prompt=wish, name=name)


class HPSv2(PromptReward):
    """HPSv2.1 of images for a prompt (Wu et al. 2023, arXiv 2306.09341).

    source: folder with HPS_v2.1_compressed.pt, or model.safetensors as RE-N-Y/hpsv21 packs it. Else as `PickScore`.
    """

    def __init__(
        self,
        *,
        prompt: str,
        source: str | Path = HPSV2,
        tokenizer: str | Path | None = None,
        rows_per_call: int = ROWS_PER_CALL,
        name: str = "hpsv2",
    ) -> None:
        wish = required(prompt)
        scorer = shared(HPSv2Scorer.load, source=source, tokenizer=tokenizer, rows_per_call=rows_per_call)
        super().__init__(scorer=scorer, prompt=wish, name=name)


class ImageReward(PromptReward):
    """ImageReward of images for a prompt (Xu et al. 2023, arXiv 2304.05977).

    prompt: cut at 35 tokens. source: folder with ImageReward.pt, or model.safetensors as RE-N-Y/ImageReward packs it.
    tokenizer: folder with bert-base-uncased's vocab.txt; None: the source's own, or that of the hub.
    """

    def __init__(
        self,
        *,
        prompt: str,
        source: str | Path = IMAGE_REWARD,
        tokenizer: str | Path | None = None,
        rows_per_call: int = ROWS_PER_CALL,
        name: str = "image_reward",
    ) -> None:
        wish = required(prompt)
        scorer = shared(ImageRewardScorer.load, source=source, tokenizer=tokenizer, rows_per_call=rows_per_call)
        super().__init__(scorer=scorer, prompt=wish, name=name)


class ClipScore(PromptReward):
    """100 cos of a CLIP's image and text features (Hessel et al. 2021, arXiv 2104.08718, without its clipping at 0).

    source: transformers folder of any CLIPModel, with its tokenizer in it unless `tokenizer` names another.
    """

    def __init__(
        self,
        *,
        prompt: str,
        source: str | Path = CLIP_L,
        tokenizer: str | Path | None = None,
        rows_per_call: int = ROWS_PER_CALL,
        name: str = "clip_score",
    ) -> None:
        wish = required(prompt)
        scorer = shared(ClipScorer.load, source=source, tokenizer=tokenizer, rows_per_call=rows_per_call)
        super().__init__(scorer=scorer, prompt=wish, name=name)


class Aesthetic(PromptReward):
    """LAION's improved aesthetic predictor (github.com/christophschuhmann/improved-aesthetic-predictor); no prompt.

    source: transformers folder of CLIP ViT-L/14. head: folder with sac+logos+ava1-l14-linearMSE.pth (or its copy
    aesthetic-model.pth).
    """

    def __init__(
        self,
        *,
        source: str | Path = CLIP_L,
        head: str | Path = AESTHETIC_HEAD,
        rows_per_call: int = ROWS_PER_CALL,
        name: str = "aesthetic",
    ) -> None:
        scorer = shared(AestheticScorer.load, source=source, head=head, rows_per_call=rows_per_call)
        super().__init__(scorer=scorer, prompt="", name=name)


SCORERS: dict[str, type[Any]] = {
    "pickscore": PickScorer,
    "hpsv2": HPSv2Scorer,
    "image_reward": ImageRewardScorer,
    "clip_score": ClipScorer,
    "aesthetic": AestheticScorer,
}
"""By the name of their reward."""


def _require_width(head: nn.Module, clip: Clip, path: Path) -> None:
    wide, own = head.layers[0].in_features, clip.network.config.projection_dim  # type: ignore[union-attr,index]
    if wide != own:
        raise InputError(f"{path}: takes {wide} features, but the CLIP of source has {own}")
