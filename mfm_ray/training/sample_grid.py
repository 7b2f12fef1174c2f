"""Pictures of what a model draws, made while it trains: the same noise every time, so that pictures compare."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.storage import Storage

STEP_COUNTS = (1, 4)
_COLUMNS, _ROWS, _POINTS = 10, 4, 2048


def write_sample_grid(run: Storage, step: int, samples: Mapping[str, Tensor]) -> None:
    """samples/step-<step>.png in the run's folder: samples (N, *sample_shape) in data units by title.

    Images as a block of rows for each title (ten a row), 2D data as scatter plots.
    """
    is_image = next(iter(samples.values())).ndim == 4
    run.write_bytes(f"samples/step-{step:08d}.png", _png(_images(samples) if is_image else _points(samples)))


def draw_steps(flow_map: FlowMap, *, seed: int) -> dict[str, Tensor]:
    """Samples by one and by four steps of the map, by title."""
    return {
        "one step" if steps == 1 else f"{steps} steps": draw(flow_map, num_steps=steps, seed=seed)
        for steps in STEP_COUNTS
    }


def picture_size(flow_map: FlowMap) -> int:
    """Samples of one block of a picture."""
    return _COLUMNS * _ROWS if flow_map.space.makes_images else _POINTS


def can_be_shown(space: DataSpace) -> bool:
    """Whether there is a picture of samples: not of latents that nothing decodes."""
    return space.makes_images or space.kind == "coordinates"


def picture_labels(flow_map: FlowMap, device: torch.device) -> Tensor | None:
    """One class a column, None for a map without classes."""
    count = picture_size(flow_map)
    return torch.arange(count, device=device) % flow_map.num_classes if flow_map.num_classes else None


@torch.no_grad()
def draw(flow_map: FlowMap, *, num_steps: int, seed: int) -> Tensor:
    """Samples (N, *sample_shape) in data units, clamped: draws from the posterior at t = 0, which is the data's law."""
    count, device = picture_size(flow_map), next(flow_map.parameters()).device
    label = picture_labels(flow_map, device)
    x1 = flow_map.eval().posterior_draws(
        torch.zeros(count, *flow_map.event_shape, device=device),
        torch.zeros(count, device=device),
        num_draws=1,
        generator=KeyedNoise.for_images(seed, count, device=device),
        label=label,
        num_steps=num_steps,
    )
    return flow_map.space.clamp(flow_map.space.to_data_units(x1[:, 0])).cpu()


def _images(samples: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(6.0, 2.6 * len(samples)), layout="constrained")
    for axes, (title, images) in zip(np.atleast_1d(figure.subplots(len(samples), 1)), samples.items(), strict=True):
        axes.imshow(_tile(images), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
        _finish(axes, title)
        axes.set_axis_off()
    return figure


def _tile(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in rows of ten with a white pixel between; (height, width) or (height, width, 3)."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    channels, height, width = padded.shape[1:]
    grid = padded.reshape(-1, _COLUMNS, channels, height, width).permute(0, 3, 1, 4, 2)
    tiled = grid.reshape(-1, _COLUMNS * width, channels).numpy()
    return tiled if channels == 3 else tiled[..., 0]


def _points(samples: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(4.0 * len(samples), 4.2), layout="constrained")
    for axes, (title, points) in zip(np.atleast_1d(figure.subplots(1, len(samples))), samples.items(), strict=True):
        axes.scatter(*points[:, :2].T.numpy(), s=2, alpha=0.5, linewidths=0)
        axes.set_aspect("equal", adjustable="datalim")
        _finish(axes, title)
    return figure


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
