#!/usr/bin/env python3
"""Writes tests/golden/tokenizer: small tokenizers and what `tokenizers` and `sentencepiece` make of text.

Needs the Python packages of those names. Usage: tokenizer.py [OUT]; run from the top of the tree.
Each NAME.json is a tokenizer.json, NAME.model a SentencePiece model, and NAME.tables.json what a GGUF
file holds; each NAME.cases.json is a list of {text, ids, special} (ids without and with special
tokens) and of {decode, text, all} (ids and their text without and with special tokens).
"""
import io
import json
import pathlib
import random
import sys

import sentencepiece
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

# Not trained on. Characters that Oniguruma takes for parts of words; some that combine or decompose
# in Unicode 10 and later only; more marks than one; conjoining Jamo.
RARE = ["x\u00b2 \u00bdy \u00b9z a\u02b0", "a\u1abf\u0301 \u32ff \U00011935\U00011930 \U00011938",
        "a\u0323\u0301\u0327 \u0344 \u1e69\u0308 \u2126\u212b \ufb01\ufdfa\u3392",
        "\u1100\u1161\u11a8 \uac00\u11a8 \u0958 \u0dd9\u0dcf\u0dca", "\u0130\u1e9e\u03a3\u03c2 DZ \u01c5"]


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


def train_text(pre_tokenizer, normalizer=None, decoder=None, vocab=500, byte_fallback=True, **model):
    """BPE over characters, with tokens for bytes unless byte_fallback is False."""
    specials = ["<unk>", "<s>", "</s>"]
    if byte_fallback:
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, **model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    # Half of the texts, so that the others hold characters without a token.
    tokenizer.train_from_iterator(TEXTS[:12] * 3, trainers.BpeTrainer(
        vocab_size=vocab + len(specials), special_tokens=specials, show_progress=False))
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def llama_decoder(strip=1):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", strip, 0)] if strip else []))


def build_text():
    """Tokenizers over characters, as SentencePiece's models become, and the remaining steps."""
    split = lambda pattern, behavior, invert=False: pre_tokenizers.Split(
        Regex(pattern), behavior, invert)
    yield "llama2", train_text(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        llama_decoder(), fuse_unk=True)
    gemma = train_text(pre_tokenizers.Split(" ", "merged_with_previous"),
                       normalizers.Replace(" ", "▁"), llama_decoder(0), fuse_unk=True)
    gemma.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<table>", normalized=False)])
    yield "gemma", gemma
    yield "metaspace_first", train_text(
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None, llama_decoder(),
        fuse_unk=True)
    yield "metaspace_split", train_text(
        pre_tokenizers.Metaspace(prepend_scheme="always", split=True), None,
        decoders.Metaspace(prepend_scheme="always", split=True), byte_fallback=False)
    added = train_text(pre_tokenizers.Whitespace(), normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Strip()]), llama_decoder(0), byte_fallback=False,
        fuse_unk=True)
    added.add_tokens([AddedToken("Fox", single_word=True, normalized=True),
                      AddedToken("over", lstrip=True, normalized=False),
                      AddedToken("Hello", rstrip=True, normalized=True),
                      AddedToken("return", lstrip=True, rstrip=True, single_word=True),
                      AddedToken("A", single_word=True, normalized=False)])
    yield "added", added
    yield "words", train_text(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                 pre_tokenizers.Punctuation("merged_with_previous")]),
        normalizers.NFKC(), llama_decoder(0), byte_fallback=False)
    yield "behaviors", train_text(
        pre_tokenizers.Sequence([
            pre_tokenizers.Punctuation("contiguous"), split(r"\h{2}|\b\w", "merged_with_next"),
            split(r"(?i)[aeiou]+|\u0435|^\s|\d$", "merged_with_previous"),
            split(r"[\p{Han}\p{Hiragana}]", "contiguous"), split(r"\w\W\B|\x41", "isolated", True)]),
        normalizers.Sequence([normalizers.NFD(), normalizers.Replace(Regex(r"\s+"), " ")]),
        llama_decoder(0))


def build_deepseek():
    split = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    yield "deepseek2", train(pre_tokenizers.Sequence(
        [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
         pre_tokenizers.Digits(individual_digits=True), byte_level]))
    deepseek3 = train(pre_tokenizers.Sequence(
        [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"),
         split(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
               r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""), byte_level]))
    deepseek3.normalizer = normalizers.Sequence([])
    yield "deepseek3", deepseek3
    qwen = train(pre_tokenizers.Sequence(
        [split(LLAMA3.replace("{1,3}", "")), byte_level]))
    qwen.normalizer = normalizers.NFC()
    yield "qwen2", qwen


def derived_merges(tokens, score_of):
    """Every way in which a token is two others; the better score, then the longer left part first."""
    ids = {token: index for index, token in enumerate(tokens)}
    ways = [(score_of[token], at, len(token) - at, ids[token], ids[token[:at]], ids[token[at:]])
            for token in tokens for at in range(1, len(token))
            if token[:at] in ids and token[at:] in ids]
    ways.sort(key=lambda way: (-way[0], -way[1], -way[2], way[3:]))
    return [(tokens[way[4]], tokens[way[5]]) for way in ways]


def add_sentencepiece_specials(tokenizer):
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])


def build_tables():
    """(name, tables, the tokenizer that `tokenizers` has for them)."""
    base = json.loads(train_text(None, normalizers.Replace(" ", "▁"), llama_decoder(0)).to_str())
    vocab = base["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    rng = random.Random(11)
    # Few different scores, so that the order of equal ones counts.
    scores = [0.0] * 259 + [-float(rng.randrange(40)) for _ in tokens[259:]]
    shared = {"bos": 1, "eos": 2, "unknown": 0}
    llama = Tokenizer(models.BPE(vocab, derived_merges(tokens, dict(zip(tokens, scores))),
                                 unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama.decoder = llama_decoder()
    add_sentencepiece_specials(llama)
    yield "spm", {"kind": "llama", "architecture": "llama", "tokens": tokens, "types": types,
                  "scores": scores, **shared}, llama
    spaces = ["▁" * count for count in range(2, 9)]
    tokens = tokens + [token for token in spaces if token not in vocab] + ["<b>"]
    types = types + [4] * (len(tokens) - len(types))
    types = [4 if set(token) == {"▁"} and len(token) > 1 else kind
             for token, kind in zip(tokens, types)]
    by_id = {token: -index for index, token in enumerate(tokens)}
    gemma = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, derived_merges(tokens, by_id),
                                 unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    gemma.normalizer = normalizers.Replace(" ", "▁")
    gemma.decoder = llama_decoder(0)
    gemma.add_tokens([AddedToken("<b>", normalized=False)])
    add_sentencepiece_specials(gemma)
    written = [" " * len(token) if set(token) == {"▁"} and len(token) > 1 else token
               for token in tokens]
    yield "spm_gemma", {"kind": "llama", "architecture": "gemma3", "tokens": written,
                        "types": types, "scores": [0.0] * len(tokens), "add_bos": True,
                        "add_space_prefix": False, **shared}, gemma
    for pre, name in (("llama-bpe", "llama3"), ("qwen2", "qwen2"), ("deepseek-v3", "deepseek3")):
        tokenizer = next(t for n, t in [*build(), *build_deepseek()] if n == name)
        description = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
        description["normalizer"] = None
        description["model"]["ignore_merges"] = pre == "llama-bpe"
        special = {t["content"]: t["special"] for t in description["added_tokens"]}
        for token in description["added_tokens"]:
            token["normalized"] = False
        vocab = {**description["model"]["vocab"],
                 **{t["content"]: t["id"] for t in description["added_tokens"]}}
        description["post_processor"] = json.loads(bos_template(tokenizer).__getstate__())
        tokens = sorted(vocab, key=vocab.get)
        yield "bpe_" + name, {
            "kind": "gpt2", "architecture": "llama", "pre": pre, "tokens": tokens,
            "types": [{True: 3, False: 4}.get(special.get(t), 1) for t in tokens],
            "merges": [" ".join(m) for m in description["model"]["merges"]],
            "bos": vocab["<|begin_of_text|>"], "add_bos": True,
        }, Tokenizer.from_str(json.dumps(description))


class SentencePiece:
    """A SentencePiece model with the interface of a Tokenizer."""

    def __init__(self, proto):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.controls = [self.model.id_to_piece(i) for i in range(self.model.vocab_size())
                         if self.model.is_control(i)]

    def encode(self, text, add_special_tokens=True):
        ids = self.model.encode(text)
        return type("", (), {"ids": ([self.model.bos_id()] if add_special_tokens else []) + ids})

    def decode(self, ids, skip_special_tokens=True):
        return self.model.decode([i for i in ids if i < self.model.vocab_size()])

    def get_vocab_size(self):
        return self.model.vocab_size()


def build_sentencepiece(out):
    rules = out / "rules.tsv"  # a few of NFKC's, with their code points in hexadecimal
    rules.write_text("A0\t20\n3000\t20\nBD\t31 2044 32\n2168\t49 58\nFF01\t21\nE9\t65 301\n65 301\tE9\n"
                     "200B\t\n41 30A\tC5\n9\t20\nA\t20\nD\t20\n")
    base = {"vocab_size": 420, "hard_vocab_limit": False, "character_coverage": 0.98,
            "minloglevel": 2, "num_threads": 1}
    # Trainers are deterministic for these texts.
    for name, options in {
            "sp_bpe": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 620,
                       "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                       "user_defined_symbols": ["<tool>", "aab", "▁▁▁"], "split_digits": True,
                       "control_symbols": ["[INST]"]},
            "sp_bpe_unknown": {"model_type": "bpe", "normalization_rule_tsv": str(rules)},
            "sp_unigram": {"model_type": "unigram", "normalization_rule_tsv": str(rules),
                           "user_defined_symbols": ["fox", " x"]},
            "sp_unigram_bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 620,
                                 "normalization_rule_name": "identity",
                                 "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    }.items():
        proto = io.BytesIO()
        texts = [line for text in TEXTS * 2 for line in text.split("\n") if line]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=proto, **{**base, **options})
        yield name, proto.getvalue()
    rules.unlink()


def write_cases(path, tokenizer, rng, texts, decodes):
    cases = []
    for text in texts:
        cases.append({"text": text,
                      "ids": tokenizer.encode(text, add_special_tokens=False).ids,
                      "special": tokenizer.encode(text).ids})
    size = tokenizer.get_vocab_size()
    for _ in range(decodes):  # mostly no UTF-8
        ids = [rng.randrange(size + 5) for _ in range(rng.randrange(0, 30))]
        if rng.random() < 0.3:  # a run of bytes of a character, where there are such tokens
            ids += [3 + byte for byte in rng.choice("é字😀").encode()[:rng.randrange(1, 5)]]
        case = {"decode": ids, "text": tokenizer.decode(ids)}
        if not isinstance(tokenizer, SentencePiece):
            case["all"] = tokenizer.decode(ids, skip_special_tokens=False)
        cases.append(case)
    path.write_text(
        "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")
    print(f"{path.name}: {len(cases)} cases")


def dump(path, description):
    path.write_text(json.dumps(description, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/tokenizer")
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(3)
    old = list(build())
    for name, built in old + list(build_text()) + list(build_deepseek()):
        description = built if isinstance(built, dict) else json.loads(built.to_str())
        tokenizer = Tokenizer.from_str(json.dumps(description))
        dump(out / f"{name}.json", description)
        few = not any(name == n for n, _ in old)
        texts = TEXTS + RARE + list(random_texts(rng, 8 if few else 20))
        write_cases(out / f"{name}.cases.json", tokenizer, rng, texts, 15 if few else 25)
    for name, tables, tokenizer in build_tables():
        dump(out / f"{name}.tables.json", tables)
        write_cases(out / f"{name}.cases.json", tokenizer, rng, TEXTS + RARE, 15)
    for name, proto in build_sentencepiece(out):
        (out / f"{name}.model").write_bytes(proto)
        tokenizer = SentencePiece(proto)
        # Names of control tokens become ids here and text there.
        texts = [text for text in TEXTS + RARE + list(random_texts(rng, 8))
                 if not any(control in text for control in tokenizer.controls)]
        write_cases(out / f"{name}.cases.json", tokenizer, rng, texts, 15)


if __name__ == "__main__":
    main()
