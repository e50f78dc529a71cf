#!/usr/bin/env python3
"""Writes tests/golden/tokenizer: small byte-level BPE tokenizers and what `tokenizers` makes of text.

Needs the Python package `tokenizers`. Usage: tokenizer.py [OUT]; run from the top of the tree. Each
NAME.json is a tokenizer, each NAME.cases.json a list of {text, ids, special} (ids without and with
special tokens) and of {decode, text, all} (ids and their text without and with special tokens).
"""
import json
import pathlib
import random
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import AddedToken, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|end|>", "<|end_of|>"]

TEXTS = [
    "", " ", "  ", "\n", "a", "Hello, world!", "  leading and trailing  ", "don't DON'T we'LL I'd",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "for (int i = 0; i < 10; ++i) {\n\treturn x[i] * 3.14159;\n}\n\n\n",
    "def f(x):\n    if x == 2024:\n        return 'a\\n'  # comment\n\n\nprint(f(1234567890))\r\n",
    "Grüße aus Köln: Straße, Äpfel, Übermut. Ça va? El niño comió piñata.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "我能吞下玻璃而不伤身体。日本語のテキスト、カタカナ。한국어 문장입니다.",
    "هذا نص عربي ١٢٣٤. שלום עולם. नमस्ते दुनिया १२३. สวัสดีชาวโลก",
    "emoji: 😀 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 🇩🇪 ½ ² Ⅷ ①",
    "e\u0301 cafe\u0301 A\u030a \u1e9b\u0323 \uac00\u11a8",
    "\u00a0no\u00a0break\u2003em\u3000ideographic\u200bzero\u0085nel\u2028line\u180emvs",
    "tabs\t\t\tand   spaces \t \n \n\n x", "x" * 300, " " * 70 + "y", "aaaaaaaaabababababab" * 8,
    "<|begin_of_text|>user<|end_of_text|>", "a<|end_of|><|end_of_text|><|end|>b <|end", "<|end|>",
    "special tool token <tool_call>x</tool_call>", "'S 'ſ K\u212a", "\x00\x01\x7f \u0080\u00ff",
    "1 12 123 1234 12345678901234567890 3.14 1,000,000", "http://a.b/c?d=e&f=%20#g_h-i",
]


def random_texts(rng, count):
    ranges = [(0x20, 0x7E)] * 4 + [(0x9, 0xD), (0xA0, 0x24F), (0x370, 0x52F), (0x3040, 0x30FF),
              (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0x2000, 0x206F), (0x900, 0x97F)]
    for _ in range(count):
        length = rng.randrange(1, 60)
        low, high = rng.choice(ranges)
        text = ""
        while len(text) < length:
            if rng.random() < 0.2:
                low, high = rng.choice(ranges)
            text += chr(rng.randrange(low, high + 1))
        yield text


def train(pre_tokenizer, vocab=700):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def bos_template(tokenizer):
    return processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))])


def build():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = lambda pattern, behavior, invert=False: pre_tokenizers.Split(
        Regex(pattern), behavior, invert)

    yield "gpt2", train(pre_tokenizers.ByteLevel(add_prefix_space=False))
    prefix = train(pre_tokenizers.ByteLevel(add_prefix_space=True))
    prefix.post_processor = processors.ByteLevel(trim_offsets=False)
    yield "gpt2_prefix_space", prefix

    llama3 = train(pre_tokenizers.Sequence([split(LLAMA3, "isolated"), byte_level]))
    llama3.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), bos_template(llama3)])
    llama3.add_tokens([AddedToken("<tool_call>", normalized=True), "</tool_call>"])
    description = json.loads(llama3.to_str())
    # As in Llama 3: a whole piece that is a token is taken without merging; here some such tokens
    # cannot be reached by merges.
    description["model"]["ignore_merges"] = True
    merges = description["model"]["merges"]
    description["model"]["merges"] = [m for i, m in enumerate(merges) if i % 5 != 4 or
                                      any("".join(m) in "".join(o) for o in merges[i + 1:])]
    yield "llama3", Tokenizer.from_str(json.dumps(description))

    digits = train(pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]))
    digits.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        special_tokens=[(t, digits.token_to_id(t)) for t in SPECIALS[:2]])
    description = json.loads(digits.to_str())
    # The older form of merges.
    description["model"]["merges"] = [" ".join(m) for m in description["model"]["merges"]]
    yield "digits", description
    yield "removed_inverted", train(pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False),
         split(r"[\p{L}\p{N}]+|[^\p{L}\p{N}\s]+", "removed", True), byte_level]))
    nfc = train(pre_tokenizers.Sequence([split(r"\s+", "removed"), byte_level]))
    nfc.normalizer = normalizers.NFC()
    yield "nfc_removed", nfc


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/tokenizer")
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(3)
    for name, built in build():
        description = built if isinstance(built, dict) else json.loads(built.to_str())
        tokenizer = Tokenizer.from_str(json.dumps(description))
        (out / f"{name}.json").write_text(
            json.dumps(description, ensure_ascii=False, separators=(",", ":")) + "\n")
        cases = []
        for text in TEXTS + list(random_texts(rng, 40)):
            cases.append({"text": text,
                          "ids": tokenizer.encode(text, add_special_tokens=False).ids,
                          "special": tokenizer.encode(text).ids})
        size = tokenizer.get_vocab_size()
        for _ in range(40):  # mostly no UTF-8
            ids = [rng.randrange(size + 5) for _ in range(rng.randrange(0, 30))]
            cases.append({"decode": ids, "text": tokenizer.decode(ids),
                          "all": tokenizer.decode(ids, skip_special_tokens=False)})
        (out / f"{name}.cases.json").write_text(
            "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")
        print(f"{name}: {len(cases)} cases")


if __name__ == "__main__":
    main()
