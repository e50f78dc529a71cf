"""Batches of text, passkey, key-value and copy rows in given shares. A batch is a function of the seed, the step and its
shape alone, so a resumed run sees what an unbroken one would have seen."""

import pathlib
import random

import numpy as np
import tokenizers

import corpus
import recall

KINDS = ("text", "passkey", "key_value", "copy")


class Data:
    """Immutable after construction."""

    def __init__(self, cache: pathlib.Path, tokenizer: tokenizers.Tokenizer, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.end = tokenizer.token_to_id("<|endoftext|>")
        docs = corpus.documents(cache)
        self.digest = corpus.digest(docs)
        self.prose = [text for _, text in docs["train_doc"]]
        self.code = [text for _, text in docs["train_code"]]
        self.prose_lengths = np.cumsum([len(t) for t in self.prose])
        self.code_lengths = np.cumsum([len(t) for t in self.code])
        texts = self.prose + self.code
        random.Random(seed).shuffle(texts)
        stream = []
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            stream += encoding.ids + [self.end]
        self.stream = np.array(stream, dtype=np.int64)

    def filler(self, rng: random.Random, chars: int, code_share: float = 0.25) -> str:
        """Running text of about so many characters from one training document, from a line's start."""
        texts, ends = (self.code, self.code_lengths) if rng.random() < code_share else (self.prose, self.prose_lengths)
        text = texts[int(np.searchsorted(ends, rng.randrange(int(ends[-1])), side="right"))]
        start = rng.randrange(max(1, len(text) - chars))
        start = text.rfind("\n", 0, start) + 1
        text = text[start:start + chars]
        line = text.rfind("\n")
        return (text[:line] if line > chars // 2 else text).strip("\n")

    def encode(self, pieces: list[tuple[str, float]]) -> tuple[list[int], list[float]]:
        """Token ids of the pieces' joint text and each token's weight: that of the piece it starts in."""
        encoding = self.tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        weight_of_char = np.repeat(np.array([w for _, w in pieces]), [len(text) for text, _ in pieces])
        return encoding.ids, [float(weight_of_char[begin]) for begin, _ in encoding.offsets]

    def episode(self, rng: random.Random, kind: str, tokens: int) -> tuple[list[int], list[float]]:
        """One recall episode of at most `tokens` tokens, ended by <|endoftext|>."""
        make = recall.passkey if kind == "passkey" else recall.key_value
        chars = max(40, int(2.9 * tokens) - 100)
        state = rng.getstate()
        while True:
            rng.setstate(state)
            ids, weights = self.encode(make(rng, self.filler(rng, chars)))
            if len(ids) < tokens:
                return ids + [self.end], weights + [1.0]
            chars = int(chars * min(0.95, tokens / len(ids) * 0.98)) - 20
            if chars < 20:
                return [self.end], [1.0]

    def copy(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """A span, text between, the span again. Half of the spans are shuffled: then only copying helps."""
        ids, weights = [], []
        while len(ids) < length:
            room = rng.randint(64, max(64, length))
            span = rng.randint(16, max(16, room // 2))
            at = rng.randrange(len(self.stream) - 2 * room)
            first, rest = self.stream[at:at + span].tolist(), self.stream[at + span:at + max(span + 8, room - span)].tolist()
            shuffled = rng.random() < 0.5
            if shuffled:
                rng.shuffle(first)
            ids += first + rest + first
            weights += [0.0 if shuffled else 1.0] * len(first) + [1.0] * len(rest) + [1.0] * 2 + [recall.ANSWER] * (len(first) - 2)
        return ids[:length], weights[:length]

    def row(self, rng: random.Random, length: int, shares) -> tuple[list[int], list[float]]:
        kind = rng.choices(KINDS, shares)[0]
        if kind == "text":
            at = rng.randrange(len(self.stream) - length)
            return self.stream[at:at + length].tolist(), [1.0] * length
        if kind == "copy":
            return self.copy(rng, length)
        ids, weights = [], []
        while len(ids) < length:
            room = length - len(ids)
            if room < 96:  # too short for an episode: text
                at = rng.randrange(len(self.stream) - room)
                ids, weights = ids + self.stream[at:at + room].tolist(), weights + [1.0] * room
                break
            wanted = room if rng.random() < 0.5 else int(96 * (room / 96) ** rng.random())
            more, w = self.episode(rng, kind, wanted)
            ids, weights = ids + more, weights + w
        return ids[:length], weights[:length]

    def batch(self, step: int, rows: int, length: int, shares) -> tuple[np.ndarray, np.ndarray]:
        """ids [rows][length + 1], weights of the targets [rows][length]."""
        made = [self.row(random.Random(f"{self.seed}/{step}/{r}"), length + 1, shares) for r in range(rows)]
        return (np.array([ids for ids, _ in made], dtype=np.int64),
                np.array([w for _, w in made], dtype=np.float32)[:, 1:])
