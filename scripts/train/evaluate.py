"""Measures an exported model through transformers: held-out bits per byte, recall by length and depth, zeroed-prefix loss.

  evaluate.py models/gqa-5m [--samples 20] [--json F]       writes a table to stdout

Recall is counted as greedy decoding would: an answer is right if each of its tokens is the likeliest given those before.
Text comes from the model's heldout.txt, which training has not seen.
"""

import argparse
import json
import math
import pathlib
import random

import torch
import torch.nn.functional as F
import transformers

import recall

LENGTHS, DEPTHS = (512, 1024, 2048), (0.05, 0.25, 0.5, 0.75, 0.95)


class Evaluation:
    def __init__(self, directory: pathlib.Path, dtype: torch.dtype):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.text = (directory / "heldout.txt").read_text()
        self.ids = self.tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        prose = self.text[:self.text.index('"""Bisection algorithms')]  # the pages come first, then the source
        self.prose_ids = self.tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.no_grad()
    def losses(self, ids: list[int], cache=None) -> torch.Tensor:
        """Nats of ids[1:] given what precedes."""
        logits = self.model(torch.tensor([ids]), past_key_values=cache).logits[0].float()
        return F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")

    def bits_per_byte(self, window: int) -> float:
        nats = size = 0.0
        for at in range(0, len(self.ids) - window, window):
            ids = self.ids[at:at + window]
            nats += self.losses(ids).sum().item()
            size += len(self.tokenizer.decode(ids[1:]).encode())
        return nats / math.log(2) / size

    @torch.no_grad()
    def prefix(self, windows: int, prefix: int = 1024, suffix: int = 256) -> dict[str, float]:
        """Mean nats of a suffix after its prefix: exact, with the prefix's keys and values set to zero, with another
        text's prefix, and with no prefix at all."""
        sums = dict.fromkeys(("exact", "zeroed", "shuffled", "unseen"), 0.0)
        step = (len(self.ids) - prefix - suffix) // windows
        other = self.ids[len(self.ids) // 2:][:prefix]
        for w in range(windows):
            ids = self.ids[w * step:w * step + prefix + suffix]
            tail = ids[prefix:]
            for name, head in (("exact", ids[:prefix]), ("zeroed", ids[:prefix]), ("shuffled", other)):
                cache = self.model(torch.tensor([head]), use_cache=True).past_key_values
                if name == "zeroed":
                    for layer in cache.layers:
                        layer.keys.zero_(), layer.values.zero_()
                sums[name] += self.losses(tail, cache).mean().item() / windows
            sums["unseen"] += self.losses(tail).mean().item() / windows
            other = ids[:prefix]
        return sums

    @torch.no_grad()
    def right(self, prompt: str, answer: str) -> bool:
        head = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        logits = self.model(torch.tensor([head + tail])).logits[0]
        return logits[len(head) - 1:-1].argmax(-1).tolist() == tail

    def document(self, rng: random.Random, tokens: int, sentences: list[tuple[float, str]], end: str) -> str:
        """Held-out text with the sentences at their depths and `end` after it, `tokens` long to a few."""
        fixed = len(self.tokenizer(end + " ".join(s for _, s in sentences), add_special_tokens=False)["input_ids"])
        at = rng.randrange(len(self.prose_ids) - tokens)
        filler = self.tokenizer.decode(self.prose_ids[at:at + tokens - fixed - 8])
        for depth, sentence in sorted(sentences, reverse=True):
            spots = [m.start() for m in recall.SPOT.finditer(filler)]
            spot = min(spots, key=lambda s: abs(s - depth * len(filler)))
            gap = filler[spot]
            filler = filler[:spot] + gap + sentence + filler[spot:]
        return filler + end

    def passkey(self, length: int, depth: float, samples: int) -> float:
        """One sentence in a document, one question after it."""
        rng, hits = random.Random(f"passkey {length} {depth}"), 0
        for _ in range(samples):
            place = f"{rng.choice(recall.ADJECTIVES)} {rng.choice(recall.NOUNS)}"
            value = str(rng.randrange(10000, 100000))
            end = f"\n\nQuestion: What is the passkey for the {place}?\nAnswer:"
            hits += self.right(self.document(rng, length - 7, [(depth, f"The passkey for the {place} is {value}.")], end),
                               f" {value}\n")
        return hits / samples

    def key_value(self, length: int, facts: int, samples: int) -> float:
        """As many sentences of one kind, one of them asked for."""
        rng, hits = random.Random(f"key-value {length} {facts}"), 0
        for _ in range(samples):
            names = rng.sample(recall.NAMES, facts)
            values = [str(rng.randrange(1000, 10000)) for _ in names]
            sentences = [(rng.random(), f"The access code of {n} is {v}.") for n, v in zip(names, values)]
            asked = rng.randrange(facts)
            end = f"\n\nQuestion: What is the access code of {names[asked]}?\nAnswer:"
            hits += self.right(self.document(rng, length - 6, sentences, end), f" {values[asked]}\n")
        return hits / samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=20, help="for each length and depth")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    e = Evaluation(args.directory, getattr(torch, args.dtype))
    result = {"dtype": args.dtype, "samples": args.samples, "held_out_tokens": len(e.ids)}
    for window in LENGTHS:
        result[f"bits_per_byte_{window}"] = round(e.bits_per_byte(window), 4)
        print(f"held-out bits per byte, windows of {window}: {result[f'bits_per_byte_{window}']}", flush=True)
    result["prefix"] = {k: round(v, 4) for k, v in e.prefix(max(4, 2 * args.samples)).items()}
    print("nats a token of a 256-token suffix after 1024 tokens:", result["prefix"], flush=True)
    result["passkey"] = {}
    for length in LENGTHS:
        row = {str(d): e.passkey(length, d, args.samples) for d in DEPTHS}
        result["passkey"][str(length)] = {**row, "mean": round(sum(row.values()) / len(row), 4)}
        print(f"passkey at {length}:", result["passkey"][str(length)], flush=True)
    result["key_value"] = {}
    for length in LENGTHS:
        row = {str(n): e.key_value(length, n, 2 * args.samples) for n in (2, 4, 8)}
        result["key_value"][str(length)] = row
        print(f"key-value at {length}, by number of facts:", row, flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
