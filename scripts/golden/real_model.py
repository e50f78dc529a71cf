#!/usr/bin/env python3
"""Writes tests/golden/gemma-3-270m: what transformers says of the real model, for tests/real_model_test.cc.

Needs torch, transformers, gguf and safetensors, and the file that scripts/get-model fetches. Usage, from the top of the
tree: real_model.py FILE.gguf [OUT]. Weights are rounded to bf16, arithmetic is fp32, on the CPU.

text.txt is mixed on purpose: prose, code, several scripts, emoji. golden.safetensors: `ids` (int32 [n]) of the text with
its BOS; `rows` (int32 [m], positions); `columns` (int32 [m][c], some tokens of the vocabulary, the likeliest among them);
`logits` (fp32 [m][c]) there; `scale` (fp32 [m]), the row's largest |logit|; `prompt` and `greedy` (int32), a prompt and the
64 tokens that follow it one by one.
"""
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

TOKENS, ROWS, LIKELY, ANY, GREEDY = 1500, 24, 24, 24, 64
PROMPT = "The three most important things to know about a distributed cache are"


def main():
    file = pathlib.Path(sys.argv[1])
    out = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "tests/golden/gemma-3-270m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for p in model.eval().parameters():
        p.data = p.data.bfloat16().float()
    ids = tokenizer((out / "text.txt").read_text())["input_ids"][:TOKENS]
    assert len(ids) == TOKENS, f"text.txt has only {len(ids)} tokens"
    rows = sorted({0, 1, 63, 64, 511, 512, 513, TOKENS - 1,
                   *torch.linspace(5, TOKENS - 6, ROWS - 8).long().tolist()})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, rows]
        logits = model.lm_head(hidden)
        columns = torch.cat((logits.topk(LIKELY).indices,
                             torch.randint(0, logits.shape[1], (len(rows), ANY), generator=generator)), 1)
        prompt = tokenizer(PROMPT)["input_ids"]
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=GREEDY, min_new_tokens=GREEDY,
                                do_sample=False)[0, len(prompt):]
    save_file({"ids": torch.tensor(ids, dtype=torch.int32), "rows": torch.tensor(rows, dtype=torch.int32),
               "columns": columns.int().contiguous(), "logits": logits.gather(1, columns).contiguous(),
               "scale": logits.abs().amax(1).contiguous(), "prompt": torch.tensor(prompt, dtype=torch.int32),
               "greedy": greedy.int().contiguous()}, str(out / "golden.safetensors"))
    print(tokenizer.decode(greedy))


if __name__ == "__main__":
    main()
