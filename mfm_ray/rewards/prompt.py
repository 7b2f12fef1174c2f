"""Rewards of an image and a text: a frozen network that scores both, shared by the rewards of all prompts.

A `Scorer` answers for images with one text each, so that requests with different prompts are one pass through its image
encoder. A `PromptReward` is a scorer with its prompt bound.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mfm_ray.errors import require
from mfm_ray.padding import ROW_MULTIPLE, padded_index
from mfm_ray.rewards.pixels import three_channels
from mfm_ray.rewards.reward import DifferentiableReward
from mfm_ray.steering.reward_gradient import value_and_gradient, with_gradient

ROWS_PER_CALL = 8
"""Images of one network call, by default: what a pass with gradient keeps in memory is that of so many images."""
CACHED_PROMPTS = 256
_Loaded = TypeVar("_Loaded", bound="Scorer")


class TextCache:
    """What a network makes of a prompt, kept for the `capacity` prompts that were asked for last.

    hits, misses: how often it was there, and how often it had to be made.
    """

    def __init__(self, make: Callable[[str], Any], *, capacity: int = CACHED_PROMPTS) -> None:
        self._make, self._capacity = make, capacity
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextCache:
        """Empty: what it is a copy for makes its own."""
        return TextCache(copy.deepcopy(self._make, memo), capacity=self._capacity)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_cache, (self._make, self._capacity)

    def get(self, prompt: str) -> Any:
        with self._lock:
            if prompt in self._kept:
                self.hits += 1
                self._kept.move_to_end(prompt)
                return self._kept[prompt]
            self.misses += 1
            made = self._kept[prompt] = self._make(prompt)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
            return made

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


def _new_cache(make: Callable[[str], Any], capacity: int) -> TextCache:
    return TextCache(make, capacity=capacity)


class Scorer(nn.Module, ABC):
    """A frozen network: images (N, 1 or 3, H, W) in [0, 1] and N texts to scores (N,), in the weights' precision.

    Images go through it `rows_per_call` at a time. Where a gradient is wanted it is taken of each part at once and kept
    instead of a graph, so memory does not grow with N and nothing is computed twice. Parts are padded to a multiple of
    four rows, as everywhere (`mfm_ray.padding`). Autocast is off inside.

    rows_per_call: images of one call, a multiple of 4. Weights go to the accelerator that images are on; images on the
    CPU are taken to the weights, and scores brought back.
    """

    reads_prompts: ClassVar[bool] = True

    def __init__(self, *, name: str, rows_per_call: int = ROWS_PER_CALL) -> None:
        super().__init__()
        allowed = f"a multiple of {ROW_MULTIPLE}"
        whole = isinstance(rows_per_call, int) and not isinstance(rows_per_call, bool)
        require(
            whole and rows_per_call > 0 and rows_per_call % ROW_MULTIPLE == 0, "rows_per_call", rows_per_call, allowed
        )
        self.name, self.rows_per_call = name, rows_per_call
        self.texts = TextCache(self._text_of)
        self._texts_for: tuple[torch.device, torch.dtype] | None = None

    def train(self, mode: bool = True) -> Scorer:
        """Never leaves eval mode: a reward is a fixed function."""
        return super().train(False)

    @abstractmethod
    def read(self, prompt: str) -> Any:
        """What the network needs of a prompt, on its device: features or tokens. Made once for each prompt."""

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor:
        """What the image encoder sees of images (N, 1 or 3, H, W) in [0, 1]."""

    @abstractmethod
    def scores(self, pixels: Tensor, texts: Sequence[Any]) -> Tensor:
        """(N,) of prepared images and what `read` made of N prompts."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) of images with one prompt each; its gradient in the images is known where they require one."""
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
        three_channels(images, name=self.name)
        weight = self._weight_near(images)
        self._keep_texts_of(weight)
        inner = images.detach().to(weight)
        graded = images.requires_grad and torch.is_grad_enabled()
        values, gradients = [], []
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, len(images), self.rows_per_call):
                part = slice(start, start + self.rows_per_call)
                value, gradient = self._part(inner[part], prompts[part], graded=graded)
                values.append(value)
                gradients.append(gradient)
        scores = torch.cat(values).to(images.device) if values else inner.new_zeros(0, device=images.device)
        if not graded or not values:
            return scores
        return with_gradient(images, scores, torch.cat(gradients).to(images))

    def _part(self, images: Tensor, prompts: Sequence[str], *, graded: bool) -> tuple[Tensor, Tensor]:
        """Values and gradients (empty where none is wanted) of a few images, in a call of a multiple of four rows."""
        rows = len(images)
        index = padded_index(rows, images.device)
        padded, texts = images[index], [self.texts.get(prompts[row]) for row in index.tolist()]
        if not graded:
            with torch.no_grad():
                return self.scores(self.prepare(padded), texts)[:rows], images
        values, gradients = value_and_gradient(lambda inner: self.scores(self.prepare(inner), texts), padded)
        assert gradients is not None, self.name
        return values[:rows], gradients[:rows]

    def _weight_near(self, images: Tensor) -> Tensor:
        """One of the weights, which go to an accelerator that images are on, once; those on the CPU come to them."""
        weight = next(self.parameters())
        if images.device.type == "cpu" or weight.device == images.device:
            return weight
        self.to(images.device)
        return next(self.parameters())

    def _text_of(self, prompt: str) -> Any:
        with torch.no_grad():
            return self.read(prompt)

    def _keep_texts_of(self, weight: Tensor) -> None:
        """Features are of the weights as they are: on another device or in another precision they are made again."""
        own = (weight.device, weight.dtype)
        if self._texts_for != own:
            self.texts.clear()
            self._texts_for = own


class PromptReward(DifferentiableReward):
    """r(x) = scorer(x, prompt): a scorer with a prompt. Images (N, 1 or 3, H, W) in [0, 1], grey ones as grey RGB.

    Clamping is the caller's: values are reported of clamped images, gradients taken at unclamped ones.
    """

    composes_gradients = True

    def __init__(self, *, scorer: Scorer, prompt: str, name: str) -> None:
        super().__init__(name=name)
        self.scorer, self.prompt = scorer, required(prompt) if scorer.reads_prompts else prompt
        self.eval()

    def train(self, mode: bool = True) -> PromptReward:
        """Never leaves eval mode."""
        return super().train(False)

    def with_prompt(self, prompt: str, *, name: str | None = None) -> PromptReward:
        """The reward of another prompt over the same weights and cached texts."""
        return PromptReward(scorer=self.scorer, prompt=prompt, name=name or self.name)

    def log_weight(self, samples: Tensor) -> Tensor:
        return self.scorer(samples, [self.prompt] * len(samples))


def required(prompt: str) -> str:
    """The prompt. InputError for one that says nothing, before any weights are looked for."""
    require(isinstance(prompt, str) and bool(prompt.strip()), "prompt", repr(prompt), "a text")
    return prompt


_live: WeakValueDictionary[Any, Scorer] = WeakValueDictionary()
_loading = threading.Lock()


def shared(load: Callable[..., _Loaded], **arguments: Any) -> _Loaded:
    """load(**arguments), or what it returned before to somebody who still has it: weights are in memory once."""
    key = (load, tuple(sorted(arguments.items(), key=lambda item: item[0])))
    with _loading:
        scorer: Any = _live.get(key)
        if scorer is None:
            scorer = _live[key] = load(**arguments)
        return scorer
