"""A frozen text encoder: texts to token states.

Shapes: n texts, M tokens, E width of a token state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ardiff.config import fingerprint
from ardiff.errors import ArdiffError, CheckpointError
from ardiff.model_folders import hash_files
from ardiff.text.packages import find_encoder

UNLIMITED = 10**6
"""Tokenizers without a limit state a larger one."""
LEARNED_OFFSET = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "xmod")
"""Kinds of models whose learned positions begin after that of the padding token."""


class TextTokenizer:
    """The tokenizer of a text encoder, and what the encoder's configuration says; without its weights."""

    def __init__(self, uri: str, folder: Path, config: Any, tokenizer: Any, max_tokens: int) -> None:
        self.uri = uri
        """Where the encoder was found."""
        self.folder = folder
        """Its files on this machine."""
        self.config = config
        self.tokenizer = tokenizer
        self.dim = int(config.hidden_size)
        """Width of a token state, E."""
        self.max_tokens = max_tokens
        """Most tokens of a text, M at most; longer texts are truncated."""

    @classmethod
    def load(cls, uri: str, max_tokens: int = 77) -> TextTokenizer:
        """Reads configuration and tokenizer. ``max_tokens`` becomes smaller if the encoder takes fewer.

        Raises:
            ArdiffError: There is no encoder, it is damaged or of an unknown kind, or the package transformers is
                missing.
        """
        return cls(uri, *_read_tokenizer(uri, max_tokens))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of weights, tokenizer, configuration and ``max_tokens``."""
        return fingerprint(hash_files(self.folder), self.max_tokens)

    def too_long(self, text: str) -> bool:
        """Whether the text has more than ``max_tokens`` tokens and is truncated."""
        return self.lengths([text])[0] > self.max_tokens

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before it is truncated."""
        if not texts:
            return []
        return list(map(len, self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]))

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token indices int64 ``(n, M)`` padded to the longest text, and mask bool ``(n, M)``, True for a token."""
        batch = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt", verbose=False
        )
        return batch["input_ids"], batch["attention_mask"].bool()


class TextEncoder(TextTokenizer):
    """A text encoder with its weights."""

    def __init__(self, tokenizer: TextTokenizer, model: nn.Module) -> None:
        super().__init__(tokenizer.uri, tokenizer.folder, tokenizer.config, tokenizer.tokenizer, tokenizer.max_tokens)
        self.model = model

    @classmethod
    def load(  # type: ignore[override]
        cls, uri: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, max_tokens: int = 77
    ) -> TextEncoder:
        """Reads an encoder from a folder, a bucket, the cache, or the Hugging Face hub.

        Args:
            uri: See :func:`ardiff.text.packages.find_encoder`.
            device: Where the encoder computes.
            dtype: Precision of its weights.
            max_tokens: See :meth:`TextTokenizer.load`.

        Raises:
            ArdiffError: There is no encoder, it is damaged, of an unknown kind or without safetensors weights, or the
                package transformers is missing.
        """
        tokenizer = TextTokenizer.load(uri, max_tokens)
        return cls(tokenizer, _read_model(tokenizer, dtype).to(device))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states float32 ``(n, M, E)`` padded to the longest text, zero where padded, and mask bool ``(n, M)``.

        Both are on the encoder's device. The states of a text do not depend on the others but for rounding.
        """
        device = next(self.model.parameters()).device
        if not texts:
            return torch.zeros(0, 1, self.dim, device=device), torch.zeros(0, 1, dtype=torch.bool, device=device)
        indices, mask = (tensor.to(device) for tensor in self.tokens(texts))  # (n, M)
        states = self.model(input_ids=indices, attention_mask=mask.long()).last_hidden_state.float()  # (n, M, E)
        return states * mask[..., None], mask

    def stored_states(self, texts: Sequence[str], batch_size: int) -> list[np.ndarray]:
        """The token states of each text without padding, float16 ``(M, E)``, computed in batches of similar lengths.

        Raises:
            ArdiffError: A state is not finite, which happens if the encoder overflows in float16.
        """
        result: list[np.ndarray] = [np.empty(0)] * len(texts)
        lengths = self.lengths(texts)
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            states, mask = self([texts[index] for index in batch])
            for index, rows, valid in zip(batch, states.half().cpu(), mask.cpu(), strict=True):
                result[index] = rows[valid].numpy()
                if not np.isfinite(result[index]).all():
                    raise ArdiffError(
                        f"The text encoder {self.uri} overflows for '{texts[index]:.80}': set text.dtype to float32 or "
                        "bfloat16."
                    )
        return result


def _read_tokenizer(uri: str, max_tokens: int) -> tuple[Path, Any, Any, int]:
    transformers = _transformers()
    folder = find_encoder(uri)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, padding_side="right", truncation_side="right"
        )
    except Exception as error:  # whatever damaged files raise
        raise CheckpointError(
            f"{uri} is no text encoder that the package transformers can read ({_first_line(error)}): give a folder "
            "with its configuration, safetensors weights and tokenizer."
        ) from error
    config = config.get_text_config()  # CLIP has an encoder of images beside that of text
    limit = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else UNLIMITED
    if config.model_type in LEARNED_OFFSET:
        limit -= config.pad_token_id + 1
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return folder, config, tokenizer, min(max_tokens, limit, tokenizer.model_max_length)


def _read_model(tokenizer: TextTokenizer, dtype: torch.dtype) -> nn.Module:
    transformers = _transformers()
    encoders = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING  # T5 without its decoder
    model_class = encoders.get(type(tokenizer.config), transformers.AutoModel)
    if model_class is transformers.AutoModel and tokenizer.config.is_encoder_decoder:
        raise CheckpointError(
            f"{tokenizer.uri} is a {tokenizer.config.model_type}, whose encoder cannot be read alone: use one such as "
            "BERT, CLIP, T5 or UMT5."
        )
    try:
        model, report = model_class.from_pretrained(
            tokenizer.folder,
            config=tokenizer.config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever damaged files raise
        raise CheckpointError(f"Cannot read the text encoder {tokenizer.uri}: {_first_line(error)}") from error
    if missing := [name for name in report["missing_keys"] if "pooler" not in name]:
        raise CheckpointError(f"The text encoder {tokenizer.uri} lacks weights, such as {missing[0]}.")
    result: nn.Module = model.requires_grad_(False).eval()
    return result


def _transformers() -> Any:
    """The package transformers, without its progress bars. Raises ArdiffError if it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ArdiffError(
            f"Text needs the package {error.name}, which is not installed: pip install 'ardiff[text]'."
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
