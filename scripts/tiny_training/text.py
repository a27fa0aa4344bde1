"""Build tokenizers and text encoders that know the words of the captions, and read captions as the pipelines do.

The real pipelines do not mask padding: of the 512 tokens of T5 that reach FLUX's transformer 504 are pads, of SD3's 77
+ 256 tokens all but 17, and training on all of them is slow. So every pad is made to give the same vector, and training
shows one that counts as many (`pad_bias`):

T5: its attention writes nothing (the output projection is zero), so a token does not see where it stands.
CLIP: SD3 reads the last layer but one, which in an encoder of one layer is the embedding. Positions that training never
    shows repeat the last that it does (`repeat_last_position`). FLUX reads the end of the text only, and attention is
    causal: padding changes nothing there.

What is given up: T5 knows words but not their order, which is CLIP's part; and a transformer trained for one number of
text tokens paints worse at another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from scripts.tiny_tokenizers import (
    clip_vocabulary,
    merges_of_words,
    t5_vocabulary,
    write_clip_tokenizer,
    write_t5_tokenizer,
)
from scripts.tiny_training.drawing import COLOURS, SHAPES

CLIP_LENGTH = 77  # tokens; what the pipelines pad to
SHORT_LENGTH = 10  # tokens in training: at most 7 words, begin and end, then at least one pad
T5_WIDTH = 96
WORDS = ("a", "on", "ground", *COLOURS, *SHAPES)

_MERGES = merges_of_words(WORDS)
_CLIP_VOCABULARY = clip_vocabulary(_MERGES)
_T5_VOCABULARY = t5_vocabulary([f"▁{word}" for word in WORDS])


def write_tokenizers(folder: Path, components: Mapping[str, tuple[str, str]], clip_padding: Mapping[str, str]) -> None:
    """Write the tokenizers that a pipeline's `components` (name: library and class) name into folders of `folder`."""
    for name, (_, class_name) in components.items():
        if class_name == "CLIPTokenizer":
            write_clip_tokenizer(folder / name, _CLIP_VOCABULARY, clip_padding[name], _MERGES)
        elif class_name == "T5TokenizerFast":
            write_t5_tokenizer(folder / name, _T5_VOCABULARY)


def clip_config(width: int, layers: int) -> transformers.CLIPTextConfig:
    """Describe a CLIP text encoder."""
    size = len(_CLIP_VOCABULARY)
    return transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,  # the pooled vector is read at this token
        pad_token_id=size - 1,
    )


def build_t5() -> transformers.T5EncoderModel:
    """Build a T5 encoder of two layers whose attention writes nothing."""
    config = transformers.T5Config(
        vocab_size=len(_T5_VOCABULARY),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=T5_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = transformers.T5EncoderModel(config)
    for name, parameter in encoder.named_parameters():
        if "SelfAttention" in name:
            parameter.requires_grad_(False)
            if name.endswith("SelfAttention.o.weight"):
                parameter.zero_()
    return encoder


@torch.no_grad()
def repeat_last_position(encoder: nn.Module) -> None:
    """Give all positions of a CLIP encoder that training did not show the embedding of the last that it did."""
    for name, parameter in encoder.named_parameters():
        if name.endswith("position_embedding.weight"):
            parameter[SHORT_LENGTH:] = parameter[SHORT_LENGTH - 1]


def token_ids(folder: Path, captions: list[str]) -> Tensor:
    """Return the ids that the tokenizer in `folder` gives captions, padded: (captions, SHORT_LENGTH)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(captions, padding="max_length", max_length=SHORT_LENGTH, return_tensors="pt").input_ids


def pad_bias(*parts: tuple[int, int]) -> Tensor:
    """Return what to add to attention scores, so that the last key of a part counts as all that it stands for.

    parts: the keys in training and in the pipeline, in the order of the keys. n equal keys add up to one key whose
    score is higher by log n. Returns (1, 1, 1, keys in training).
    """
    weights = [torch.tensor([1.0] * (short - 1) + [full - short + 1]) for short, full in parts]
    return torch.cat(weights).log()[None, None, None]
