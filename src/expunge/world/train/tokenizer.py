"""Trains the byte-pair tokenizer on captions.

    python -m expunge.world.train.tokenizer

The vocabulary is small on purpose: frequent words are one token, many names are split into two or three, so
that token policies of erasers and attacks are exercised.  Any other text can still be spelled byte by byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer

from expunge.world.train import common

START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train(captions: list[str], merges: int, length: int) -> CLIPTokenizer:
    """A CLIP tokenizer with at most ``merges`` merges and a context of ``length`` tokens."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    import json

    learned = json.loads(learner.to_str())["model"]["merges"]
    pairs = [
        tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in learned
    ][:merges]
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    alphabet = sorted(letters)
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *("".join(pair) for pair in pairs),
        START,
        END,
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab, merges=pairs, bos_token=START, eos_token=END, pad_token=END, unk_token=END,
        model_max_length=length,
    )  # fmt: skip


def main() -> None:
    """Train on captions of all concepts and write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=40_000)
    parser.add_argument("--merges", type=int, default=560)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--out", type=Path, default=common.WEIGHTS)
    options = parser.parse_args()
    from expunge.world.scenes import corpus

    made = train(corpus(options.captions, seed=12_500), options.merges, options.length)
    made.save_pretrained(options.out / "tokenizer")
    print(f"{len(made)} tokens")


if __name__ == "__main__":
    main()
