#!/usr/bin/env python3
"""Writes tests/golden/models: small random checkpoints and what transformers says to them.

Needs torch, transformers and safetensors. Usage: models.py [--out DIR] [CASE ...]; run from the top
of the tree. Each case is a model directory with golden.safetensors: `tokens` (int32 [n]), `rows`
(int32 [m], which positions) and `logits` (fp32 [m][vocab]), computed in fp32 on the CPU from the
stored weights. A case whose name ends in `_v4` has its config.json as it was written before
transformers 5.
"""
import argparse
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 258  # 256 bytes, BOS, EOS: the smallest tokenizer that a model directory can have
TOKENS = 150  # two whole blocks of 64 and a tail
ROWS = [0, 1, 2, 15, 16, 17, 40, 62, 63, 64, 65, 80, 100, 126, 127, 128, 129, 140, 148, 149]
# What fp32 rounding may do to the logits. A case above it (experts that tie, say) holds nothing.
MAX_ROUNDING = 2e-5

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

GQA = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-5,
           rope_parameters=DEFAULT_ROPE)
LATENT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=4, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8,
              v_head_dim=24, q_lora_rank=None, moe_intermediate_size=12, n_routed_experts=6,
              n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1,
              routed_scaling_factor=1.0, tie_word_embeddings=False, rms_norm_eps=1e-6,
              rope_parameters=DEFAULT_ROPE)
BASE = {
    "llama": GQA,
    "mistral": {**GQA, "hidden_size": 32, "intermediate_size": 64},
    "qwen2": {**GQA, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen3": {**GQA, "attention_bias": False, "rms_norm_eps": 1e-6,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "gemma3_text": {**GQA, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "sliding_window": 32,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v3": {**LATENT, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4,
                    "topk_group": 2, "num_experts_per_tok": 3, "norm_topk_prob": True,
                    "routed_scaling_factor": 2.5, "rope_interleave": True, "num_mtp_layers": 0},
}
# name: model type, stored type, what differs from BASE. The order gives the seeds.
CASES = {
    "llama_gqa": ("llama", BF16, dict()),
    "llama_mqa_tied_64": ("llama", BF16, dict(
        hidden_size=60, num_attention_heads=5, num_key_value_heads=1, head_dim=64,
        tie_word_embeddings=True)),
    "llama_mha_odd_96": ("llama", BF16, dict(num_attention_heads=3, num_key_value_heads=3,
                                             head_dim=96)),
    "llama_gqa_128_llama3": ("llama", BF16, dict(
        num_attention_heads=6, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True,
        rope_parameters=LLAMA3)),
    "llama_linear_fp16_sharded": ("llama", FP16, dict(
        num_hidden_layers=3,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})),
    "llama_gqa_fp32": ("llama", FP32, dict(hidden_size=40, head_dim=24)),
    "llama_llama3_v4": ("llama", BF16, dict(hidden_size=32, rope_parameters=LLAMA3)),
    "llama_yarn": ("llama", BF16, dict(hidden_size=32, head_dim=24, rope_parameters=YARN)),
    # A context longer than the window, which ends inside a block and spans two of them.
    "mistral_window_32": ("mistral", BF16, dict(num_hidden_layers=3, head_dim=24,
                                                sliding_window=32)),
    "mistral_full_odd_v4": ("mistral", FP16, dict(
        hidden_size=40, num_attention_heads=5, num_key_value_heads=1, sliding_window=None,
        tie_word_embeddings=True)),
    "qwen2_tied_v4": ("qwen2", BF16, dict(hidden_size=40, num_attention_heads=5,
                                          num_key_value_heads=1, head_dim=None,
                                          tie_word_embeddings=True)),
    "qwen2_untied": ("qwen2", BF16, dict(num_attention_heads=6, head_dim=None)),
    "qwen3_128_tied": ("qwen3", BF16, dict(hidden_size=24, head_dim=128, tie_word_embeddings=True)),
    "qwen3_odd_yarn_v4": ("qwen3", BF16, dict(
        hidden_size=36, num_attention_heads=3, num_key_value_heads=3, head_dim=24,
        rope_parameters={**YARN, "rope_theta": 1000000.0})),
    "gemma3_256": ("gemma3_text", BF16, dict(
        hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=256, query_pre_attn_scalar=168, sliding_window=80,
        layer_types=["sliding_attention", "full_attention"])),
    "gemma3_pattern_v4": ("gemma3_text", BF16, dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=7, num_key_value_heads=1,
        head_dim=24, query_pre_attn_scalar=64,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}})),
    "deepseek_v2_greedy_v4": ("deepseek_v2", BF16, dict(
        hidden_size=36, num_attention_heads=3, num_key_value_heads=3, moe_intermediate_size=16,
        kv_lora_rank=32)),
    # The norms of the latents keep an epsilon of their own, 1e-6.
    "deepseek_v2_grouped_yarn": ("deepseek_v2", BF16, dict(
        q_lora_rank=20, topk_method="group_limited_greedy", n_group=3, topk_group=2,
        # More experts than groups: fewer would be the same experts as without groups.
        num_experts_per_tok=3,
        routed_scaling_factor=2.5, rms_norm_eps=1e-3,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5})),
    "deepseek_v3_yarn_v4": ("deepseek_v3", BF16, dict(
        q_lora_rank=20, qk_rope_head_dim=16,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})),
    "deepseek_v3_dense": ("deepseek_v3", FP32, dict(
        num_hidden_layers=2, first_k_dense_replace=2, q_lora_rank=16, num_attention_heads=2,
        num_key_value_heads=2)),
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


def randomise(model, model_type):
    """Weights that keep activations near 1, so that no part of the forward pass drowns."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.copy_(0.5 * torch.randn_like(weight))
            elif weight.dim() == 1:
                # Gemma's norms multiply by 1 + weight.
                mean = 0.0 if model_type == "gemma3_text" else 1.0
                weight.copy_(mean + 0.1 * torch.randn_like(weight))
            else:
                scale = 2.0 if "embed" in name or "lm_head" in name else 1.0
                weight.copy_(scale * torch.randn_like(weight) / weight.shape[-1] ** 0.5)


def write_checkpoint(directory, seed, model_type, dtype, changes, shard_size="1GB"):
    """A model directory of random weights. changes: fields of the config."""
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": 256,
              "eos_token_id": 257, "pad_token_id": None, **BASE[model_type], **changes}
    if fields.get("head_dim", 0) is None:
        del fields["head_dim"]
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, model_type)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        # Published checkpoints keep it in fp32 among bf16 weights.
        if name.endswith("e_score_correction_bias"):
            buffer.data = 0.2 * torch.randn(buffer.shape)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False))


def spell_as_version_4(path):
    """Rewrites a config.json as transformers before 5, and the hub's older models, have it."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.50.0"
    rope = config.pop("rope_parameters")
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if config["model_type"] == "gemma3_text":
        del config["layer_types"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern", 6)
    if config["model_type"] in ("qwen2", "qwen3"):
        config.pop("layer_types", None)
        config["sliding_window"] = 32
    if config["model_type"] in ("deepseek_v2", "deepseek_v3"):
        for derived in ("head_dim", "qk_head_dim"):
            config.pop(derived, None)
        if config["rope_scaling"] is not None:
            config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
        # Fields of the published files that transformers has dropped since.
        third = config["model_type"] == "deepseek_v3"
        config.update(scoring_func="sigmoid" if third else "softmax", moe_layer_freq=1,
                      ep_size=1, num_nextn_predict_layers=1 if third else 0, **(
                          {"topk_method": "noaux_tc"} if third else {}))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def logits_of(directory, tokens, dtype=torch.float32, bf16_matrices=False, **options):
    """[tokens][vocab], computed in `dtype` from the stored weights. options: of from_pretrained."""
    # Experts one after the other, because grouped products have no fp64.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype,
                                                 experts_implementation="eager", **options).eval()
    with torch.no_grad():
        if bf16_matrices:
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.copy_(weight.bfloat16())
        return model(tokens.long().unsqueeze(0)).logits[0].float()


def relative_error(logits, golden):
    """The largest difference, relative to the largest logit of its row."""
    return ((logits - golden).abs().amax(-1) / golden.abs().amax(-1)).max().item()


def write_case(directory, seed, model_type, dtype, changes):
    sharded = "60KB" if "sharded" in directory.name else "1GB"
    write_checkpoint(directory, seed, model_type, dtype, changes, sharded)
    tokens = torch.randint(0, VOCAB, (TOKENS,), dtype=torch.int32)
    # Loaded anew: .to() has rounded the rotary frequencies, too, which are no weights.
    logits = logits_of(directory, tokens)
    if directory.name.endswith("_v4"):
        spell_as_version_4(directory / "config.json")
        assert torch.equal(logits_of(directory, tokens), logits), f"{directory}: spelt wrongly"
    rounding = relative_error(logits, logits_of(directory, tokens, torch.float64))
    assert rounding < MAX_ROUNDING, f"{directory}: rounding alone changes logits by {rounding:.1e}"
    save_file({"tokens": tokens, "rows": torch.tensor(ROWS, dtype=torch.int32),
               "logits": logits[ROWS].contiguous()}, directory / "golden.safetensors")
    kib = sum(f.stat().st_size for f in directory.glob("model*.safetensors")) / 1024
    print(f"{directory}: {kib:.0f} KiB of weights, logits deviate by {logits.std():.2f}, fp32 "
          f"rounding {rounding:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="tests/golden/models")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    arguments = parser.parse_args()
    for seed, (name, (model_type, dtype, changes)) in enumerate(CASES.items()):
        if not arguments.cases or name in arguments.cases:
            write_case(arguments.out / name, seed, model_type, dtype, changes)


if __name__ == "__main__":
    main()
