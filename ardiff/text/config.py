"""Configuration of the text encoder."""

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The encoder of the captions."""

    encoder: str | None = None
    """Text encoder: a folder with model and tokenizer as the package transformers writes it (BERT, CLIP, T5, UMT5 and
    the like), local or ``s3://``; ``text-minilm`` after ``ardiff weights fetch text-minilm``; or the name of a
    repository on the Hugging Face hub. Without it, captions are not encoded."""
    max_tokens: int = 77
    """Most tokens of a caption, which also bounds memory; an encoder that takes fewer lowers it. Prompts have the same
    limit."""
    too_long: Literal["truncate", "error"] = "truncate"
    """What happens to captions with more tokens: ``truncate`` cuts them off and counts them, ``error`` stops."""
    dtype: DType = "float32"
    """Precision of the encoder's weights. T5 overflows in float16: use bfloat16."""
    batch_size: int = 64
    """Captions that the encoder takes at once."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.batch_size < 1:
            raise ValueError("max_tokens and batch_size must be at least 1")
