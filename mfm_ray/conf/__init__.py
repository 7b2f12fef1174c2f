"""Hydra configuration as package data; the file makes `pkg://mfm_ray.conf` importable."""
