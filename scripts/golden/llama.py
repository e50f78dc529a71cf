#!/usr/bin/env python3
"""Writes tests/golden/llama: small random Llama checkpoints and what transformers says to them.

Needs torch, transformers and safetensors. Usage: llama.py [OUT]; run from the top of the tree. Each
case is a model directory with golden.safetensors: `tokens` (int32 [n]), `rows` (int32 [m], which
positions) and `logits` (fp32 [m][vocab]), computed in fp32 on the CPU from the stored weights.
"""
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 258  # 256 bytes, BOS, EOS: the smallest tokenizer that a model directory can have
TOKENS = 150  # two whole blocks of 64 and a tail
ROWS = [0, 1, 2, 15, 16, 17, 40, 62, 63, 64, 65, 80, 100, 126, 127, 128, 129, 140, 148, 149]

BASE = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
CASES = {
    "gqa": (torch.bfloat16, dict()),
    "mqa_tied_64": (torch.bfloat16, dict(hidden_size=60, num_attention_heads=5, num_key_value_heads=1, head_dim=64,
                                         tie_word_embeddings=True)),
    "mha_odd_96": (torch.bfloat16, dict(num_attention_heads=3, num_key_value_heads=3, head_dim=96)),
    "gqa_128_llama3": (torch.bfloat16, dict(
        num_attention_heads=6, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64})),
    "linear_fp16_sharded": (torch.float16, dict(
        num_hidden_layers=3, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0,
                                              "factor": 4.0})),
    "gqa_fp32": (torch.float32, dict(hidden_size=40, head_dim=24)),
}


def byte_alphabet():
    """GPT-2's characters for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def tokenizer():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    added = [{"id": 256 + i, "content": content, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False, "special": True}
             for i, content in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {c: b for b, c in sorted(byte_alphabet().items())},
                      "merges": []}}


def write_case(directory, seed, dtype, changes):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=512, bos_token_id=256,
                         eos_token_id=257, **{**BASE, **changes})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(1.0 + 0.1 * torch.randn_like(weight))
            else:
                scale = 2.0 if "embed" in name or "lm_head" in name else 1.0
                weight.copy_(scale * torch.randn_like(weight) / weight.shape[1] ** 0.5)
    model.to(dtype).save_pretrained(
        directory, max_shard_size="60KB" if "sharded" in directory.name else "1GB")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False))
    tokens = torch.randint(0, VOCAB, (TOKENS,), dtype=torch.int32)
    # Loaded anew: .to() has rounded the rotary frequencies, too, which are no weights.
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens.long().unsqueeze(0)).logits[0, ROWS].contiguous()
    save_file({"tokens": tokens, "rows": torch.tensor(ROWS, dtype=torch.int32),
               "logits": logits}, directory / "golden.safetensors")
    print(f"{directory}: logits deviate by {logits.std():.2f}")


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/llama")
    for seed, (name, (dtype, changes)) in enumerate(CASES.items()):
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        write_case(directory, seed, dtype, changes)


if __name__ == "__main__":
    main()
