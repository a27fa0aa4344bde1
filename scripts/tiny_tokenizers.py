"""Write the small CLIP and T5 tokenizers of a tiny pipeline, as the files that every transformers since 4.48 reads.

CLIP: byte-level BPE with a dozen merges. T5: Unigram over the printable ASCII and a few whole words. Both encode any
ASCII text, and both are written down here rather than trained, so that the same tokens come out everywhere.
"""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

T5_MAX_LENGTH = 512  # tokens; what FluxPipeline asks for
CLIP_MERGES = ["t h", "i n", "a n", "r e", "o n", "e r</w>", "th e</w>", "in g</w>", "a t</w>", "o f</w>", "e n", "s t"]
T5_WORDS = ("▁a", "▁an", "▁the", "▁of", "▁on", "▁in", "▁photo", "▁painting", "ing", "ed", "er")


def clip_vocabulary(merges: Sequence[str] = CLIP_MERGES) -> dict[str, int]:
    """Number CLIP's tokens: each byte, each byte that ends a word, the merges, and last begin and end of the text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def merges_of_words(words: Sequence[str]) -> list[str]:
    """Return byte-pair merges that make one token of each of `words`, which are lower-case ASCII letters.

    The most frequent pair is merged first and an encoder applies merges in the same order, so that both agree.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for pieces in split for pair in itertools.pairwise(pieces)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(f"{left} {right}")
        split = [_merged(pieces, left, right) for pieces in split]
    return merges


def _merged(pieces: Sequence[str], left: str, right: str) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if piece == right and result and result[-1] == left:
            result[-1] = left + right
        else:
            result.append(piece)
    return result


def t5_vocabulary(words: Sequence[str] = T5_WORDS) -> list[tuple[str, float]]:
    """List T5's pieces with their log-probabilities; a whole word is likelier than its letters together."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -6.0) for letter in ("▁", *string.printable.strip())]
    return [*special, *((word, -4.0) for word in words), *letters, *((name, 0.0) for name in _t5_sentinels())]


def _t5_sentinels() -> list[str]:
    return [f"<extra_id_{number}>" for number in reversed(range(100))]


def write_clip_tokenizer(
    folder: Path, vocabulary: Mapping[str, int], padding: str, merges: Sequence[str] = CLIP_MERGES
) -> None:
    """Write CLIP's tokenizer files into a new folder; `padding` is the token that fills short prompts.

    `vocabulary` is `clip_vocabulary(merges)`.
    """
    folder.mkdir()
    write_json(folder / "vocab.json", vocabulary)
    Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": padding}
    _write_tokenizer_config(folder, "CLIPTokenizer", special, model_max_length=77, do_lower_case=True)


def write_t5_tokenizer(folder: Path, vocabulary: Sequence[tuple[str, float]]) -> None:
    """Write T5's tokenizer files into a new folder."""
    folder.mkdir()
    tokenizer = Tokenizer(models.Unigram(list(vocabulary), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sentinels = _t5_sentinels()
    names = ["<pad>", "</s>", "<unk>", *sentinels]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    options = {"extra_ids": len(sentinels), "additional_special_tokens": sentinels[::-1]}
    _write_tokenizer_config(folder, "T5Tokenizer", special, model_max_length=T5_MAX_LENGTH, **options)


def _write_tokenizer_config(folder: Path, class_name: str, special: Mapping[str, str], **options: object) -> None:
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": class_name, **special, **options})


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file as the model repositories format it, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
