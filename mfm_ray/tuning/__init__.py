"""Sweeps: search spaces, trials on Ray Tune that share one model a worker, and their Pareto front."""
