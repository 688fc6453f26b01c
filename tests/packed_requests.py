"""Requests that share an engine's passes."""

import itertools

import torch
from torch import Tensor

from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.request import SampleRequest


def run_packed(
    model: DiT, diffusion: DiffusionConfig, requests: list[SampleRequest], cancelled: SampleRequest
) -> list[Tensor]:
    """The generated latents of each request, ``(B, F, L, D)``, all sampled together with one that is cancelled soon."""
    engine = SamplingEngine(model, diffusion)
    numbers = {engine.submit(request): number for number, request in enumerate(requests)}
    leaver = engine.submit(cancelled)
    chunks: list[list[Tensor]] = [[] for _ in requests]
    for iteration in itertools.count():
        if not engine.busy:
            break
        if iteration == 3:
            engine.cancel(leaver)
        for event in engine.step():
            if event.request_id != leaver:
                chunks[numbers[event.request_id]].append(event.latents)
    return [torch.cat(streamed, dim=1) for streamed in chunks]
