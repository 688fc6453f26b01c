"""Encodes prompts with the text encoder of a model, which is loaded at the first prompt.

Shapes: M text tokens, E their width.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ardiff.data.texts import UsedEncoder
from ardiff.errors import CheckpointError
from ardiff.sampling.config import LongPrompts
from ardiff.sampling.params import InvalidParamError, SamplingParams
from ardiff.sampling.request import EncodedPrompt, PromptKey

logger = logging.getLogger(__name__)
MAX_CACHED = 128
"""Encoded prompts that are kept, of 118 KB each at 77 tokens of width 384."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder(Protocol):
    """A frozen text encoder."""

    uri: str
    dim: int
    """Width of a token state, E."""
    max_tokens: int
    """Tokens of a text at most; further ones are cut off."""

    @property
    def fingerprint(self) -> str:
        """Of weights, tokenizer, configuration and ``max_tokens``."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states, float32 ``(n, M, E)``, and their mask, bool ``(n, M)``, True for a token."""

    def too_long(self, text: str) -> bool:
        """Whether a text has more than ``max_tokens`` tokens."""


def load_encoder(uri: str, device: torch.device, dtype: torch.dtype, max_tokens: int) -> Encoder:
    """The text encoder in a folder, a bucket or a model hub. Raises ArdiffError."""
    from ardiff.text.encoder import TextEncoder  # at the first prompt only

    return TextEncoder.load(uri, device, dtype, max_tokens)


class PromptEncoder:
    """Encodes prompts, each alone, so that its token states depend on no other text. Keeps the last ones.

    Several threads may use it.
    """

    def __init__(self, dim: int, source: UsedEncoder | None, encoder: Encoder | None = None) -> None:
        """
        Args:
            dim: Width of the token states that the model takes, ``dit.condition_dim``.
            source: The encoder with which the model was trained; None if it is unknown.
            encoder: The encoder, if it is loaded already.

        Raises:
            CheckpointError: The encoder is not that of ``source``, or its token states have another width.
        """
        self.dim, self.source = dim, source
        self._encoder: Encoder | None = None
        self._prompts: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._lock = threading.Lock()
        if encoder is not None:
            self._encoder = self._checked(encoder)
            self.source = source or UsedEncoder(
                uri=encoder.uri,
                fingerprint=encoder.fingerprint,
                dim=encoder.dim,
                max_tokens=encoder.max_tokens,
                dtype="float32",
            )

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt at most; 1 if the encoder is unknown."""
        return 1 if self.source is None else self.source.max_tokens

    def encode(self, texts: Iterable[str], device: torch.device, long_prompts: LongPrompts) -> dict[str, EncodedPrompt]:
        """Encodes texts on ``device``; see :class:`ardiff.sampling.config.EngineConfig` for ``long_prompts``.

        Raises:
            CheckpointError: The text encoder is missing, or it is not the one with which the model was trained.
            InvalidParamError: A prompt is too long.
        """
        with self._lock:
            return {text: self._encode(text, device, long_prompts) for text in texts}

    def load(self, device: torch.device) -> None:
        """Loads the text encoder now. Raises ArdiffError like :meth:`encode`."""
        with self._lock:
            self._load(device)

    def check(self, texts: Iterable[str], device: torch.device, long_prompts: LongPrompts) -> None:
        """Raises like :meth:`encode`, without encoding anything."""
        with self._lock:
            for text in texts:
                self._check(self._load(device), text, long_prompts)

    def placeholders(self, params: SamplingParams) -> dict[str, EncodedPrompt]:
        """Stand-ins for the texts of a video, of the greatest length, to check it before they are encoded."""
        states = torch.empty(self.max_tokens, self.dim, device="meta")
        return {text: EncodedPrompt(states, PromptKey(text, self.max_tokens)) for text in params.texts}

    def _encode(self, text: str, device: torch.device, long_prompts: LongPrompts) -> EncodedPrompt:
        encoder = self._load(device)
        self._check(encoder, text, long_prompts)
        if text not in self._prompts:
            states, mask = encoder([text])  # (1, M, E), (1, M)
            self._prompts[text] = EncodedPrompt.of(states[0, mask[0]])
        self._prompts.move_to_end(text)
        while len(self._prompts) > MAX_CACHED:
            self._prompts.popitem(last=False)
        return self._prompts[text]

    @staticmethod
    def _check(encoder: Encoder, text: str, long_prompts: LongPrompts) -> None:
        if not encoder.too_long(text):
            return
        problem = f"The prompt '{text[:64]}...' has more than the {encoder.max_tokens} tokens that are read"
        match long_prompts:
            case "truncate":
                logger.warning("%s: the rest of it has no effect.", problem)
            case "error":
                raise InvalidParamError("prompt", f"{problem}: shorten it, or set engine.long_prompts=truncate")

    def _load(self, device: torch.device) -> Encoder:
        if self._encoder is None:
            if self.source is None:
                raise CheckpointError(
                    "The pipeline names no text encoder: give a loaded one to ARDiffusionPipeline(text_encoder=...)."
                )
            source = self.source
            self._encoder = self._checked(
                load_encoder(source.uri, device=device, dtype=DTYPES[source.dtype], max_tokens=source.max_tokens)
            )
        return self._encoder

    def _checked(self, encoder: Encoder) -> Encoder:
        if self.source is not None and encoder.fingerprint != self.source.fingerprint:
            raise CheckpointError(
                f"The text encoder {encoder.uri} ({encoder.fingerprint}) is not the one with which the model was "
                f"trained ({self.source.fingerprint}): give the URI of that one with from_pretrained(..., "
                "text_encoder=URI)."
            )
        if encoder.dim != self.dim:
            raise CheckpointError(
                f"The token states of the text encoder {encoder.uri} are {encoder.dim} wide, but the model takes "
                f"{self.dim} (dit.condition_dim)."
            )
        return encoder
