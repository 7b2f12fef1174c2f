"""Answers in the shapes that OpenAI's Images API has, with our own fields beside them."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch

from .generation import Finished, Generation, Preview
from .pictures import encode_png

OUTPUT_FORMAT, BACKGROUND = "png", "opaque"
KEEP_ALIVE = ": keep-alive\n\n"
"""A comment of server-sent events, which clients skip; proxies on the way see that the connection lives."""


def generation_answer(generation: Generation, done: Finished) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    return {
        "created": int(time.time()),
        "background": BACKGROUND,
        "output_format": OUTPUT_FORMAT,
        "quality": generation.quality,
        "size": generation.size,
        "model": generation.model,
        "cfg_scale": generation.cfg_scale,
        "data": [_image(generation, done, index) for index in range(len(done.images))],
        "usage": usage(done, len(done.images)),
        "steering": steering_as_done(generation, done),
        **_timing(generation, done),
    }


def _timing(generation: Generation, done: Finished) -> dict[str, Any]:
    """Where the seconds went, where that was asked for. What total_s has beyond the others is transport."""
    seconds = {name: round(value, 6) for name, value in done.timing.items()}
    return {"timing": seconds} if "timing" in generation.include else {}


def preview_events(generation: Generation, preview: Preview) -> list[dict[str, Any]]:
    """One `image_generation.partial_image` for each image of the request."""
    return [
        {
            "type": "image_generation.partial_image",
            "b64_json": encode_png(torch.tensor(image)),
            "partial_image_index": preview.number,
            "image_index": index,
            "step": preview.step,
            "num_steps": generation.num_steps,
            **_of_every_event(generation),
        }
        for index, image in enumerate(preview.images)
    ]


def completed_events(generation: Generation, done: Finished) -> list[dict[str, Any]]:
    """One `image_generation.completed` for each image of the request."""
    return [
        {
            "type": "image_generation.completed",
            **_image(generation, done, index),
            **_of_every_event(generation),
            "usage": usage(done, 1),
            "cfg_scale": generation.cfg_scale,
            "steering": steering_as_done(generation, done),
            **_timing(generation, done),
        }
        for index in range(len(done.images))
    ]


def server_sent(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def usage(done: Finished, num_images: int) -> dict[str, Any]:
    """nfe: network and reward calls of all images; there are no tokens."""
    nothing = {"image_tokens": 0, "text_tokens": 0}
    return {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "input_tokens_details": nothing,
        "nfe": done.nfe * num_images,
    }


def steering_as_done(generation: Generation, done: Finished) -> dict[str, Any]:
    """As resolved, without the rewards that were dropped on the way; those are named."""
    actual = generation
    for title in done.dropped:
        actual = actual.without(title)
    return {**actual.steering(), **({"dropped": list(done.dropped)} if done.dropped else {})}


def _image(generation: Generation, done: Finished, index: int) -> dict[str, Any]:
    image = {
        "b64_json": encode_png(torch.tensor(done.images[index])),
        "seed": generation.seed,
        "index": index,
        "reward": None if done.reward is None else float(done.reward[index]),
        "rewards": {title: float(values[index]) for title, values in done.rewards.items()},
        "nfe": done.nfe,
    }
    if "trace" in generation.include:
        image["trace"] = _trace(done, index)
    return image


def _trace(done: Finished, index: int) -> dict[str, list[float | None]]:
    """One number a step; JSON has no infinity, so that a value that is none is null."""
    traced = {name: values[:, index].tolist() for name, values in done.trace.items()}
    return {name: [v if math.isfinite(v) else None for v in values] for name, values in traced.items()}


def _of_every_event(generation: Generation) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "background": BACKGROUND,
        "output_format": OUTPUT_FORMAT,
        "quality": generation.quality,
        "size": generation.size,
        "model": generation.model,
    }
