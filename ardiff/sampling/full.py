"""Mode ``full``: a request through the plain sampler, which evaluates every visible frame in every iteration.

Shapes: B videos, F frames, L tokens, D latent width, P prompts, M text tokens, E their width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.prediction import Denoiser
from ardiff.diffusion.sampler import initial_noise, stream_full
from ardiff.dit import DiT, TextTokens
from ardiff.sampling.request import SampleRequest


def stream_request(
    model: DiT,
    diffusion: DiffusionConfig,
    request: SampleRequest,
    max_tokens: int = 1,
    on_step: Callable[[int], None] = lambda step: None,
) -> Iterator[Tensor]:
    """Clean latents ``(B, n, L, D)`` of the n frames of a checked request that became final; given frames first.

    Args:
        max_tokens: Text is padded to this length or more. With that of the text encoder, all prompts are computed in
            the same shapes, so that another prompt does not change the rounding of frames before it.
        on_step: Called after each iteration with its index.
    """
    params, config, weight = request.params, model.config, next(model.parameters())
    steps, solver = params.resolved_num_inference_steps, params.resolved_solver
    schedule = ad_schedule(
        params.num_frames,
        steps,
        params.resolved_ar_step,
        config.num_frames,
        params.given_frames,
        params.sink_frames,
        params.window_stride,
    )
    seeds = [video.seed for video in request.videos]
    noise, *later_noise = (
        initial_noise(seeds, params.num_frames, config.num_tokens, config.token_dim, step)
        for step in range(steps if solver == "lcm" else 1)
    )
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    yield from stream_full(
        request_denoiser(model, diffusion, request, max_tokens),
        noise.to(weight.device, dtype),
        schedule,
        diffusion,
        request.condition,
        solver,
        params.resolved_timestep_spacing,
        later_noise,
        on_step,
    )


def request_denoiser(model: DiT, diffusion: DiffusionConfig, request: SampleRequest, max_tokens: int) -> Denoiser:
    """The guided denoiser of a request: labels and guidance per video, or per frame if they change; text per frame."""
    videos, frames, device = len(request.videos), range(request.params.num_frames), next(model.parameters()).device
    scale: float | Tensor = request.params.guidance_scale
    labels = torch.tensor([request.labels(model, frame)[:videos] for frame in frames], device=device).T  # (B, F)
    if (labels == labels[:, :1]).all():
        labels = labels[:, 0]  # (B,), which condition tokens need
    if request.guided and any(video.conditions for video in request.videos):
        scale = torch.tensor([request.guidance_scales(frame) for frame in frames], device=device).T  # (B, F)
    if not model.config.text:
        return guided_denoiser(model, diffusion, labels, scale)
    texts = list(request.prompts)
    length = max([max_tokens, *(prompt.key.num_tokens for prompt in request.prompts.values())])
    states = torch.zeros(len(texts), length, model.config.condition_dim)  # (P, M, E)
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, prompt in enumerate(request.prompts.values()):
        states[row, : prompt.key.num_tokens], mask[row, : prompt.key.num_tokens] = prompt.states, True
    rows = [[texts.index(text) if text else -1 for text in request.texts(frame)] for frame in frames]
    index = torch.tensor(rows, device=device).T  # (B or 2 B, F)
    text = TextTokens(states.to(device), mask.to(device), index[:videos])
    return guided_denoiser(model, diffusion, labels, scale, text, index[videos:] if request.guided else None)
