"""Tiny text encoders with random weights of real architectures, as folders that the package transformers writes."""

from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["bert", "clip", "t5", "umt5", "roberta", "gpt2"]
COLOURS, SHAPES = ["red", "blue", "green"], ["ring", "square", "plus"]
WORDS = ["a", *COLOURS, *SHAPES, "moves", "to", "the", "left", "right", "up", "down", "and", "then", "stops"]
WIDTH = 16


def write_encoder(folder: Path, kind: Kind = "bert", seed: int = 0, words: list[str] = WORDS) -> str:
    """Writes an encoder that knows ``words``. Returns its folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    starts = "" if "t5" in kind else "<s> "
    backend.post_processor = processors.TemplateProcessing(
        single=f"{starts}$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    shared: dict[str, Any] = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    t5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model: Any
    match kind:
        case "bert":
            model = transformers.BertModel(transformers.BertConfig(**shared, **sizes, max_position_embeddings=24))
        case "roberta":
            model = transformers.RobertaModel(transformers.RobertaConfig(**shared, **sizes, max_position_embeddings=12))
        case "clip":  # with its encoder of images
            vision = {**sizes, "image_size": 8, "patch_size": 4}
            config = transformers.CLIPConfig(
                text_config={**shared, **sizes, "max_position_embeddings": 10}, vision_config=vision
            )
            model = transformers.CLIPModel(config)
        case "t5":  # with its decoder
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shared, **t5))
        case "umt5":
            model = transformers.UMT5EncoderModel(transformers.UMT5Config(**shared, **t5))
        case _:
            model = transformers.GPT2Model(transformers.GPT2Config(**shared, n_embd=WIDTH, n_layer=1, n_head=2))
    torch.set_rng_state(torch_state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
