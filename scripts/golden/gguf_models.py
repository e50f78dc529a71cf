#!/usr/bin/env python3
"""Writes tests/golden/gguf: quantized blocks, small GGUF models, and what they stand for.

Needs PyPI's gguf, and torch, transformers and safetensors. Usage: gguf_models.py [OUT]; run from the top
of the tree.

blocks.safetensors: `TYPE.blocks` (bytes as a file has them) and `TYPE.values` (fp32, from
gguf.quants.dequantize) for each quantized type that is read.

NAME.gguf: a random model. NAME.json: `tensors`, the SHA-256 of each tensor's bf16 bytes as
transformers has them after from_pretrained(gguf_file=..., dtype=bfloat16), and `config`, the fields
that it derives. NAME.safetensors: `tokens` (int32 [n]) and `logits` (fp32 [n][vocab]) of that
model, its bf16 weights widened to fp32.
"""
import hashlib
import json
import pathlib
import sys

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
CONFIG_FIELDS = ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
                 "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "sliding_window",
                 "query_pre_attn_scalar", "layer_types", "bos_token_id", "eos_token_id"]
TOKENS = 80


def halves(values):
    return np.ascontiguousarray(values, dtype=np.float16).view(np.uint8).reshape(len(values), 2)


def bf16_exact(values):
    """Numbers that bf16 holds: the file keeps fp32 and fp16 as they are, transformers is asked for bf16."""
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def k_blocks(generator, qtype, count, scales, minima=None):
    """Random blocks of a K type, which gguf-py does not quantize to: every byte but the scales."""
    _, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    if qtype == Type.Q6_K:
        blocks[:, -2:] = halves(scales)
    else:
        blocks[:, 0:2] = halves(scales)
        blocks[:, 2:4] = halves(minima)
    return blocks


def write_blocks(path):
    generator = np.random.default_rng(1)
    out = {}
    for name in BLOCK_TYPES:
        qtype = Type[name]
        _, size = gguf.GGML_QUANT_SIZES[qtype]
        # Zero, subnormal, negative, the largest, and ordinary scales.
        scales = np.array([0.0, 6e-8, -0.25, 65504.0, 1.0, 0.0123, -3e-5, 7.77], dtype=np.float16)
        if name.endswith("_K"):
            blocks = k_blocks(generator, qtype, 8, scales, scales[::-1])
        else:
            blocks = generator.integers(0, 256, (8, size), dtype=np.uint8)
            blocks[:, 0:2] = halves(scales)
            if name.endswith("_1"):
                blocks[:, 2:4] = halves(scales[::-1])
        out[f"{name}.blocks"] = blocks
        out[f"{name}.values"] = gguf.quants.dequantize(blocks, qtype).astype(np.float32)
    save_file(out, path)


class ModelWriter:
    """One GGUF model: random tensors in asked-for types."""

    def __init__(self, path, architecture, seed):
        self.out = gguf.GGUFWriter(path, architecture)
        self.gemma = architecture == "gemma3"
        self.generator = np.random.default_rng(seed)

    def matrix(self, name, rows, columns, type_name, std=0.08):
        qtype = Type[type_name]
        if type_name.endswith("_K"):
            count = rows * columns // 256
            # Means of scale * q and minimum cancel; the deviation is about 257 (Q6_K: 684) * d.
            d = np.full(count, std / (684 if type_name == "Q6_K" else 257))
            data = k_blocks(self.generator, qtype, count, d, 7.5 * d).reshape(rows, -1)
        else:
            values = self.generator.normal(0, std, (rows, columns)).astype(np.float32)
            if type_name in ("F32", "F16"):
                exact = bf16_exact(values).astype({"F32": np.float32, "F16": np.float16}[type_name])
                self.out.add_tensor(name, exact)
                return
            data = gguf.quants.quantize(values, qtype)
        self.out.add_tensor(name, data, raw_dtype=qtype)

    def vector(self, name, size, mean=1.0):
        # Gemma's norms are stored as 1 + w; w is what bf16 must hold.
        add = 1.0 if self.gemma and name.endswith("norm.weight") else 0.0
        values = bf16_exact(mean - add + self.generator.normal(0, 0.1, size))
        self.out.add_tensor(name, np.float32(add) + values)

    def close(self):
        self.out.write_header_to_file()
        self.out.write_kv_data_to_file()
        self.out.write_tensors_to_file()
        self.out.close()


def byte_alphabet():
    """GPT-2's characters for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [characters[b] for b in range(256)]


def add_byte_level(out, pre):
    tokens = byte_alphabet() + ["he", "ll", "hell", "<|bos|>", "<|eos|>"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([1] * 259 + [3] * 2)
    out.add_token_merges(["h e", "l l", "he ll"])
    out.add_bos_token_id(259)
    out.add_eos_token_id(260)
    return len(tokens)


def add_sentence_piece(out):
    pieces = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["▁", "▁a", "th", "▁th", "the", "▁the"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{b:02X}>" for b in range(256)] + pieces
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list(tokens)
    out.add_token_scores([-1000.0] * 260 + [-float(i) for i in range(len(pieces))])
    out.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * len(pieces))
    out.add_bos_token_id(2)
    out.add_eos_token_id(1)
    out.add_unk_token_id(3)
    out.add_add_bos_token(True)
    out.add_add_space_prefix(False)
    return len(tokens)


def write_model(path, architecture, seed, shape, types, tied):
    """shape: hidden, intermediate, layers, heads, kv heads, head_dim. types: by tensor."""
    hidden, intermediate, layers, heads, kv_heads, head_dim = shape
    writer = ModelWriter(path, architecture, seed)
    out = writer.out
    out.add_context_length(256)
    out.add_embedding_length(hidden)
    out.add_block_count(layers)
    out.add_feed_forward_length(intermediate)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(1e-6)
    if architecture == "gemma3":
        out.add_sliding_window(32)
        out.add_rope_freq_base(1000000.0)
    else:
        out.add_rope_freq_base(10000.0)
    if architecture == "llama":
        out.add_rope_dimension_count(head_dim)
    if architecture in ("qwen3", "gemma3"):
        out.add_key_length(head_dim)
        out.add_value_length(head_dim)
    if architecture == "gemma3":
        vocab = add_sentence_piece(out)
    else:
        vocab = add_byte_level(out, "llama-bpe" if architecture == "llama" else "qwen2")
    out.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    writer.matrix("token_embd.weight", vocab, hidden, types["token_embd"], std=0.5)
    writer.vector("output_norm.weight", hidden)
    if not tied:
        writer.matrix("output.weight", vocab, hidden, types["output"])
    for layer in range(layers):
        prefix = f"blk.{layer}."
        for name, rows, columns in (
                ("attn_q", heads * head_dim, hidden), ("attn_k", kv_heads * head_dim, hidden),
                ("attn_v", kv_heads * head_dim, hidden), ("attn_output", hidden, heads * head_dim),
                ("ffn_gate", intermediate, hidden), ("ffn_up", intermediate, hidden),
                ("ffn_down", hidden, intermediate)):
            writer.matrix(f"{prefix}{name}.weight", rows, columns, types[name])
        writer.vector(prefix + "attn_norm.weight", hidden)
        writer.vector(prefix + "ffn_norm.weight", hidden)
        if architecture == "qwen2":
            for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                writer.vector(f"{prefix}attn_{name}.bias", size * head_dim, mean=0.0)
        if architecture in ("qwen3", "gemma3"):
            writer.vector(prefix + "attn_q_norm.weight", head_dim)
            writer.vector(prefix + "attn_k_norm.weight", head_dim)
        if architecture == "gemma3":
            writer.vector(prefix + "post_attention_norm.weight", hidden)
            writer.vector(prefix + "post_ffw_norm.weight", hidden)
    writer.close()


def write_golden(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, attn_implementation="eager")
    digests = {}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        digests[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    fields = model.config.to_dict()
    config = {key: fields[key] for key in CONFIG_FIELDS if fields.get(key) is not None}
    rope = model.config.rope_parameters
    config["rope_theta"] = rope.get("full_attention", rope)["rope_theta"]
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    golden = {"tensors": digests, "config": config}
    path.with_suffix(".json").write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    vocab = config["vocab_size"]
    tokens = np.random.default_rng(5).integers(0, vocab, TOKENS).astype(np.int32)
    # transformers refuses to widen a model that came from quantized weights.
    wide = type(model)(model.config).float().eval()
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        logits = wide(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float().numpy()
    save_file({"tokens": tokens, "logits": logits}, path.with_suffix(".safetensors"))


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/gguf")
    root.mkdir(parents=True, exist_ok=True)
    write_blocks(root / "blocks.safetensors")
    names = ["token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
             "ffn_down"]
    cases = {  # (architecture, shape, types in the order of names, tied)
        "llama": ("llama", (256, 256, 1, 4, 2, 64),
                  ["Q8_0", "Q4_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q4_1", "Q5_1"], False),
        "qwen2": ("qwen2", (64, 96, 2, 4, 2, 16),
                  ["Q4_0", "F16", "F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q5_1"], False),
        # transformers takes head_dim 128 of every qwen3 file, and query_pre_attn_scalar 256 of
        # every gemma3 file.
        "qwen3": ("qwen3", (64, 96, 1, 2, 1, 128),
                  ["Q8_0", "", "Q8_0", "BF16", "F16", "Q5_1", "Q4_0", "Q4_0", "Q5_0"], True),
        "gemma3": ("gemma3", (32, 64, 6, 2, 1, 256),
                   ["Q8_0", "", "Q5_0", "Q4_0", "Q8_0", "Q4_K", "Q5_0", "Q4_0", "Q5_1"], True),
    }
    for seed, (name, (architecture, shape, types, tied)) in enumerate(cases.items()):
        path = root / f"{name}.gguf"
        write_model(path, architecture, seed, shape, dict(zip(names, types)), tied)
        write_golden(path)


if __name__ == "__main__":
    main()
