"""Data sets as checked Arrow shards, and the order in which training reads them."""

from mfm_ray.data.batch import Batch, read_batch
from mfm_ray.data.datasets import Dataset, Split, digits, gmm, mnist
from mfm_ray.data.moments import Moments, data_moments
from mfm_ray.data.order import SampleOrder
from mfm_ray.data.shards import (
    Manifest,
    OpenSplit,
    load_moments,
    load_split,
    open_split,
    read_manifest,
    verify_shards,
    write_shards,
)

__all__ = [
    "Batch",
    "Dataset",
    "Manifest",
    "Moments",
    "OpenSplit",
    "SampleOrder",
    "Split",
    "data_moments",
    "digits",
    "gmm",
    "load_moments",
    "load_split",
    "mnist",
    "open_split",
    "read_batch",
    "read_manifest",
    "verify_shards",
    "write_shards",
]
