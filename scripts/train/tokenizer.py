"""Makes the default models' tokenizer (byte-level BPE of exactly 4096 tokens, one token a digit) and held-out text.

Usage: tokenizer.py OUT_DIR. Convention: <|endoftext|> (id 0) ends a document and stands for bos and eos; the tokenizer
adds neither.
"""

import json
import pathlib
import random
import sys

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import corpus
import recall

VOCABULARY = 4096
END = "<|endoftext|>"
# Llama 3's pattern, but a single digit a piece: numbers are copied digit by digit.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")


def make(cache: pathlib.Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    docs = corpus.documents(cache)
    texts = [text for part in ("train_doc", "train_code") for _, text in docs[part]]
    rng = random.Random(1)
    texts += [recall.sample_text(rng) for _ in range(3000)]
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, out: pathlib.Path, context: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
              "model_max_length": context, "clean_up_tokenization_spaces": False, "add_bos_token": False,
              "add_eos_token": False}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    cache, out = pathlib.Path("/var/tmp/kvant-train"), pathlib.Path(sys.argv[1])
    save(make(cache), out, 2048)
    held_out = corpus.documents(cache)["held_out"]
    (out / "heldout.txt").write_text("\n\n".join(text.strip() for _, text in held_out) + "\n")
