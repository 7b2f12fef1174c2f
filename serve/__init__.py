"""Serving on Ray Serve: an OpenAI-compatible endpoint, a sampler, and rewards as deployments of their own.

Inside this package Ray's `serve` is imported as `from ray import serve` and our own files relatively.
"""
