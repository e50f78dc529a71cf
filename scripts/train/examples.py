"""Writes example prompts with their right answers, each tried on the model: examples.py models/gqa-5m

examples/prompts.json: [{"file", "tokens", "answer", "given", "right"}], the prompts beside it as text files. A prompt ends
in "Answer:"; the answer starts with a space.
"""

import json
import pathlib
import random
import sys

import torch

import evaluate

FACTS = [("passkey", "for", "the north gate", "48213"), ("access code", "of", "Alice", "7391"),
         ("door code", "for", "the old library", "90562"), ("badge number", "of", "Bruno", "4418"),
         ("codename", "of", "Vera", "falcon"), ("phone extension", "of", "Kenji", "3057"),
         ("serial number", "of", "the blue server", "661904"), ("city", "of", "Olga", "Lisbon")]
# (length in tokens, [(depth, fact)], asked in turn)
PROMPTS = [(256, [(0.5, 0)], [0]), (512, [(0.1, 0)], [0]), (1024, [(0.5, 0)], [0]), (1024, [(0.1, 1), (0.6, 2)], [1]),
           (2000, [(0.05, 0)], [0]), (2000, [(0.5, 2)], [2]), (600, [(0.2, 1), (0.5, 3), (0.8, 5)], [5, 1, 3]),
           (1024, [(0.1, 0), (0.3, 1), (0.5, 4), (0.7, 6)], [6, 0, 4]), (2000, [(0.1, 0), (0.4, 1), (0.7, 7)], [1, 7, 0]),
           (1900, [(i / 8 + 0.05, i) for i in range(8)], [2, 0, 1, 4])]


def main():
    directory = pathlib.Path(sys.argv[1])
    e = evaluate.Evaluation(directory, torch.float32)
    out = directory / "examples"
    out.mkdir(exist_ok=True)
    made = []
    for i, (length, placed, asked) in enumerate(PROMPTS):
        sentences = [(depth, "The {} {} {} is {}.".format(*FACTS[f])) for depth, f in placed]
        turns = ["Question: What is the {} {} {}?\nAnswer:".format(*FACTS[f]) for f in asked]
        answers = [" " + FACTS[f][3] for f in asked]
        end = "\n\n" + "".join(f"{t}{a}\n" for t, a in zip(turns[:-1], answers)) + turns[-1]
        prompt = e.document(random.Random(i), length, sentences, end)
        ids = e.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        new = e.model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1]:]
        given = e.tokenizer.decode(new).split("\n")[0]
        name = f"{i:02d}.txt"
        (out / name).write_text(prompt)
        made.append({"file": name, "tokens": ids.shape[1], "answer": answers[-1], "given": given,
                     "right": given == answers[-1]})
        print(made[-1])
    (out / "prompts.json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
