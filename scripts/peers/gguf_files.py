#!/usr/bin/env python3
"""Writes the GGUF files that scripts/bench-peers gives to llama.cpp and to us. Needs PyPI's gguf.

gguf_files.py random TYPE OUT: a Llama of random weights, 12 layers, 16 query and 4 kv heads of 64, in BF16 or
Q8_0; the numbers are the same in both.
gguf_files.py retype TYPE FROM OUT: a model's matrices in another type.
"""
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 2816, 12, 16, 4, 64, 8192
POSITIONS = 32768
NORMAL_TOKEN, UNUSED_TOKEN = 1, 5


def finish(out):
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def add_matrix(out, name, values, qtype):
    # Both types begin with what bf16 holds.
    exact = gguf.quants.dequantize(gguf.quants.quantize(values, Type.BF16), Type.BF16)
    out.add_tensor(name, gguf.quants.quantize(exact, qtype), raw_dtype=qtype)


def write_random(qtype, path):
    out = gguf.GGUFWriter(path, "llama")
    generator = np.random.default_rng(1)
    out.add_context_length(POSITIONS)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INTERMEDIATE)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_dimension_count(HEAD_DIM)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    letters = [chr(ord("a") + i) for i in range(26)]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("llama-bpe")
    out.add_token_list([*letters, "ab", *(f"<{i}>" for i in range(27, VOCAB))])
    out.add_token_types([NORMAL_TOKEN] * 27 + [UNUSED_TOKEN] * (VOCAB - 27))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(VOCAB - 2)
    out.add_eos_token_id(VOCAB - 1)

    def matrix(name, rows, columns):
        values = generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns ** -0.5)
        add_matrix(out, name, values, qtype)

    def norm(name):
        out.add_tensor(name, np.ones(HIDDEN, dtype=np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        norm(prefix + "attn_norm.weight")
        norm(prefix + "ffn_norm.weight")
        for name, rows, columns in (("attn_q", HEADS * HEAD_DIM, HIDDEN), ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
                                    ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN), ("attn_output", HIDDEN, HEADS * HEAD_DIM),
                                    ("ffn_gate", INTERMEDIATE, HIDDEN), ("ffn_up", INTERMEDIATE, HIDDEN),
                                    ("ffn_down", HIDDEN, INTERMEDIATE)):
            matrix(f"{prefix}{name}.weight", rows, columns)
    norm("output_norm.weight")
    matrix("output.weight", VOCAB, HIDDEN)
    finish(out)


def retype(qtype, source, path):
    file = gguf.GGUFReader(source)
    architecture = "general.architecture"
    out = gguf.GGUFWriter(path, file.fields[architecture].contents())
    for field in file.fields.values():
        if field.name in (architecture, "general.file_type") or field.name.startswith("GGUF."):
            continue
        elements = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        out.add_key_value(field.name, field.contents(), field.types[0], elements)
    for tensor in file.tensors:
        if len(tensor.shape) == 1:
            out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            add_matrix(out, tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type), qtype)
    finish(out)


if __name__ == "__main__":
    if sys.argv[1] == "random":
        write_random(Type[sys.argv[2]], sys.argv[3])
    else:
        retype(Type[sys.argv[2]], sys.argv[3], sys.argv[4])
