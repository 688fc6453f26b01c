"""Exact fast sampling: parameters in :mod:`ardiff.sampling.params`, the engine in :mod:`ardiff.sampling.engine`.

This package does not import torch, so that a client can read the parameters.
"""
