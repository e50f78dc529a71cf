#!/usr/bin/env python3
"""Compares `kvant logits` and `kvant tokenize` with transformers on random tokens and texts.

  check_logits.py MODEL [--tokens N] [--seed S]     MODEL: a Hugging Face directory or a .gguf file
  check_logits.py --random ARCH [--seed S] [--count N]    random checkpoints of random shapes, made first

Needs torch and transformers (and gguf for .gguf files); run from the top of the tree. Prints the
largest relative error of the logits and how many texts got the same ids; exits with 1 if the error
is not below --tolerance or an id differs.
"""
import argparse
import pathlib
import random
import re
import subprocess
import sys
import tempfile

import numpy
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import models

TEXTS = [
    "Hello, world!", " leading and trailing ", "\n\n\t tabs\r\nand  spaces   ", "don't we'll I'M",
    "def f(x):\n    return x ** 2  # 3.14e-10\n", "1234567 12 3 007", "naïve café, Ærøskøbing, ß",
    "Привет, мир", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "你好，世界", "こんにちは世界", "안녕하세요",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇰 ✨", "a\u0301 e\u0308 \u00e4", "\u200b\u00a0\u3000\ufeff", "<|begin_of_text|> <bos> </s>",
]


def arguments_of():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=pathlib.Path)
    parser.add_argument("--random", metavar="ARCH", choices=[*models.BASE, "all"],
                        help=", ".join(models.BASE) + " or all")
    parser.add_argument("--count", type=int, default=1, help="checkpoints of each ARCH")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=100, help="random texts besides the fixed ones")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--bf16-weights", action="store_true",
                        help="round matrices to bf16 first, as kvant does with quantized ones")
    parser.add_argument("--kvant", type=pathlib.Path, default="build/release/node/kvant")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.random is None):
        parser.error("give a MODEL or --random ARCH")
    return arguments


def random_rope(rng):
    theta = rng.choice([500.0, 10000.0, 1000000.0])
    factor = rng.choice([2.0, 4.0, 8.0])
    original = int(512 / factor)
    return rng.choice([
        {"rope_type": "default", "rope_theta": theta},
        {"rope_type": "linear", "rope_theta": theta, "factor": factor},
        {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
         "high_freq_factor": rng.choice([2.0, 4.0]), "original_max_position_embeddings": original},
        {"rope_type": "yarn", "rope_theta": theta, "factor": factor,
         "original_max_position_embeddings": original,
         **rng.choice([{}, {"beta_fast": 16.0, "beta_slow": 2.0},
                       {"mscale": 0.707, "mscale_all_dim": 0.707},
                       {"mscale": 1.0, "mscale_all_dim": 0.5}])},
    ])


def random_shape(model_type, rng):
    """Fields of a config that kvant must be able to run."""
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3, 5])
    layers = rng.randint(1, 5)
    shape = dict(num_key_value_heads=kv_heads, num_attention_heads=heads,
                 hidden_size=heads * rng.choice([8, 16, 24]), num_hidden_layers=layers,
                 intermediate_size=rng.randint(8, 200),
                 head_dim=rng.choice([8, 16, 24, 40, 64, 80, 96, 128, 256]),
                 tie_word_embeddings=rng.random() < 0.5, rms_norm_eps=rng.choice([1e-6, 1e-5]),
                 rope_parameters=random_rope(rng))
    window = rng.choice([1, 5, 33, 64, 65, 128, 130])
    if model_type == "mistral":
        shape.update(sliding_window=rng.choice([None, window]))
    if model_type == "qwen2":
        shape.update(head_dim=None)
    if model_type == "gemma3_text":
        shape.update(sliding_window=window, query_pre_attn_scalar=rng.randint(8, 300),
                     layer_types=[rng.choice(["sliding_attention", "full_attention"])
                                  for _ in range(layers)],
                     rope_parameters={
                         "full_attention": rng.choice([
                             {"rope_type": "default", "rope_theta": 1000000.0},
                             {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}]),
                         "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}})
    if model_type.startswith("deepseek"):
        groups = rng.choice([1, 2, 4])
        experts = groups * rng.choice([2, 3, 4])
        chosen_groups = rng.randint(1, groups)
        del shape["head_dim"]
        shape.update(num_key_value_heads=heads, kv_lora_rank=8 * rng.randint(1, 8),
                     qk_nope_head_dim=rng.choice([8, 16, 24, 40]),
                     qk_rope_head_dim=8 * rng.randint(1, 3), v_head_dim=rng.choice([8, 16, 32]),
                     q_lora_rank=rng.choice([None, 8, 20, 40]),
                     moe_intermediate_size=rng.randint(4, 24), n_routed_experts=experts,
                     n_shared_experts=rng.randint(1, 2), n_group=groups, topk_group=chosen_groups,
                     num_experts_per_tok=rng.randint(1, chosen_groups * experts // groups),
                     first_k_dense_replace=rng.randint(0, layers),
                     routed_scaling_factor=rng.choice([1.0, 2.5]))
        if model_type == "deepseek_v2":
            shape.update(topk_method=rng.choice(["greedy", "group_limited_greedy"]))
        else:
            shape.update(norm_topk_prob=rng.random() < 0.5)
    return shape


def make_random(model_type, seed, directory):
    rng = random.Random(f"{model_type} {seed}")
    shape = random_shape(model_type, rng)
    dtype = rng.choice([models.BF16, models.FP16, models.FP32])
    spelling = "transformers 5"
    models.write_checkpoint(directory, seed, model_type, dtype, shape)
    # The older spelling has no list of sliding layers.
    if model_type != "gemma3_text" and rng.random() < 0.5:
        models.spell_as_version_4(directory / "config.json")
        spelling = "before transformers 5"
    print(f"{model_type}, {str(dtype).removeprefix('torch.')}, config of {spelling}: {shape}")


def source_of(model):
    """What from_pretrained takes."""
    if model.suffix == ".gguf":
        return str(model.parent), {"gguf_file": model.name}
    return str(model), {}


def run(kvant, *command):
    result = subprocess.run([str(kvant), *map(str, command)], capture_output=True, text=True,
                            encoding="utf-8", check=False)
    if result.returncode != 0:
        sys.exit(f"{kvant} {command[0]}: {result.stderr.strip()}")
    return result.stdout


def check_logits(arguments, model, seed):
    source, options = source_of(model)
    generator = torch.Generator().manual_seed(seed)
    vocab = AutoConfig.from_pretrained(source, **options).get_text_config().vocab_size
    tokens = torch.randint(0, vocab, (arguments.tokens,), generator=generator)
    with tempfile.TemporaryDirectory() as directory:
        listed = pathlib.Path(directory) / "tokens"
        listed.write_text(",".join(map(str, tokens.tolist())))
        out = pathlib.Path(directory) / "logits.npy"
        run(arguments.kvant, "logits", "--model", model, "--tokens-file", listed, "--out", out)
        logits = torch.from_numpy(numpy.load(out))
    golden = models.logits_of(source, tokens, bf16_matrices=arguments.bf16_weights, **options)
    error = models.relative_error(logits, golden)
    print(f"{model}: {arguments.tokens} tokens, largest relative error of the logits {error:.1e}")
    return error < arguments.tolerance  # not when it is no number


def random_text(rng):
    alphabets = ["abcdefghij KLMNOP", "0123456789.,-", " \n\t", "{}[]()<>=+*/_'\"", "äöüßéñ", "абвгд",
                 "漢字かな", "ابجد", "😀👍🏽", "ठडढ"]
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 60)))


def check_ids(arguments, model, seed):
    if (model / "tokenizer.json").exists():
        # AutoTokenizer builds some families' tokenizers anew, from the vocabulary alone.
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    else:
        source, options = source_of(model)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    rng = random.Random(seed)
    texts = TEXTS + [random_text(rng) for _ in range(arguments.texts)]
    wrong = 0
    for text in texts:
        ids = [int(i) for i in re.findall(r"\d+", run(arguments.kvant, "tokenize", "--model", model,
                                                      "--text", text))]
        golden = tokenizer(text).input_ids
        if ids != golden:
            wrong += 1
            print(f"ids of {text!r}:\n  kvant        {ids}\n  transformers {golden}")
    print(f"{model}: {len(texts) - wrong} of {len(texts)} texts have the same ids")
    return wrong == 0


def check(arguments, model, seed):
    same_ids = check_ids(arguments, model, seed)
    return check_logits(arguments, model, seed) and same_ids


def main():
    arguments = arguments_of()
    if not arguments.random:
        sys.exit(0 if check(arguments, arguments.model, arguments.seed) else 1)
    failed = []
    for model_type in models.BASE if arguments.random == "all" else [arguments.random]:
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            with tempfile.TemporaryDirectory() as directory:
                model = pathlib.Path(directory) / model_type
                make_random(model_type, seed, model)
                if not check(arguments, model, seed):
                    failed.append(f"--random {model_type} --seed {seed}")
    sys.exit("failed: " + ", ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
