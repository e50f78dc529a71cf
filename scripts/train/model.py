"""The default models in PyTorch, parameter for parameter as transformers names them, so that a state dict is a
checkpoint. An architecture is one class with a CONFIG and forward(ids [batch][tokens]) -> logits; ARCHITECTURES lists
them."""

import json
import pathlib

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class SwiGlu(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_tables(tokens: int, dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [tokens][dim], the halves alike (Llama's rotate-half form)."""
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(tokens, dtype=torch.float64), inverse)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rotate_pairs(x, cos, sin):
    """The same rotation of neighbouring channels (DeepSeek's layout); the halves come out one behind the other."""
    half = x.shape[-1] // 2
    x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


CHUNK = 128


def causal_attention(q, k, v):
    """q [batch][heads][tokens][dim], k and v [batch][kv_heads][tokens][dim]; query head h reads kv head h / group.

    On a CPU, queries go through in chunks, each against the keys up to its end: compiled, it takes half of the time of
    PyTorch's own kernel there.
    """
    b, heads, t, dim = q.shape
    if q.is_cuda or t % CHUNK:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q = q.view(b, kv_heads, group, t, dim) * dim ** -0.5
    outs = []
    for begin in range(0, t, CHUNK):
        end = begin + CHUNK
        chunk = q[:, :, :, begin:end].reshape(b, kv_heads, group * CHUNK, dim)
        scores = (chunk @ k[:, :, :end].mT).view(b, kv_heads, group, CHUNK, end)
        seen = torch.ones(CHUNK, end, dtype=torch.bool, device=q.device).tril(begin)
        weights = scores.float().masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
        outs.append((weights.view(b, kv_heads, group * CHUNK, end) @ v[:, :, :end]).view(b, kv_heads, group, CHUNK, -1))
    return torch.cat(outs, 3).reshape(b, heads, t, -1)


def initialize(model: nn.Module) -> None:
    """Embeddings as large as what layers will add to them, so that the token stays visible in the residual stream (heads
    that copy need it). What writes into the stream and the output matrix start at zero: no token is guessed at first."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.5 if "embed" in name else 0.03)
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            nn.init.zeros_(p)


class LlamaAttention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.heads, self.kv_heads, self.dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        width = c["hidden_size"]
        self.q_proj = nn.Linear(width, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, width, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = causal_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class LatentAttention(nn.Module):
    """DeepSeek's multi-head latent attention, as DeepSeek-V3 computes it without a query rank: a token's cache is a
    normed latent and one rope key for all heads."""

    def __init__(self, c: dict):
        super().__init__()
        self.heads, self.nope, self.rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        self.rank, self.value = c["kv_lora_rank"], c["v_head_dim"]
        width = c["hidden_size"]
        self.q_proj = nn.Linear(width, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RmsNorm(self.rank, 1e-6)  # transformers takes no other epsilon here
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, width, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, -1).transpose(1, 2)
        latent, rope_key = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, t, self.heads, -1).transpose(1, 2)
        q_rope = rotate_pairs(q[..., self.nope:], cos, sin).to(kv.dtype)
        k_rope = rotate_pairs(rope_key, cos, sin).to(kv.dtype)[:, None].expand(-1, self.heads, -1, -1)
        q = torch.cat((q[..., :self.nope], q_rope), -1)
        k = torch.cat((kv[..., :self.nope], k_rope), -1)
        y = causal_attention(q, k, kv[..., self.nope:])
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class Layer(nn.Module):
    def __init__(self, c: dict, attention: nn.Module):
        super().__init__()
        self.input_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = attention
        self.post_attention_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = SwiGlu(c["hidden_size"], c["intermediate_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, c: dict, attention):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, attention(c)) for _ in range(c["num_hidden_layers"]))
        self.norm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])


class Llama(nn.Module):
    """Grouped-query attention; the output matrix is one of its own."""

    CONFIG = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 256,
        "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": None, "use_cache": True, "torch_dtype": "bfloat16",
    }
    ATTENTION = LlamaAttention
    ROPE_DIM = "head_dim"

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = Trunk(config, self.ATTENTION)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        cos, sin = rope_tables(config["max_position_embeddings"], config[self.ROPE_DIM], config["rope_theta"])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        initialize(self)

    def hidden(self, ids):
        x = self.model.embed_tokens(ids)
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return x

    def head(self, x):
        return self.lm_head(self.model.norm(x))

    def forward(self, ids):
        return self.head(self.hidden(ids))


class DeepSeek(Llama):
    """Multi-head latent attention with dense layers only: a quarter of the numbers a token that Llama above keeps."""

    CONFIG = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 4096, "hidden_size": 256,
        "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
        "q_lora_rank": None, "kv_lora_rank": 48, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64,
        "first_k_dense_replace": 6, "moe_intermediate_size": 704, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "rope_interleave": True,
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "use_cache": True, "torch_dtype": "bfloat16",
    }
    ATTENTION = LatentAttention
    ROPE_DIM = "qk_rope_head_dim"


ARCHITECTURES = {"gqa": Llama, "mla": DeepSeek}


def export(model: nn.Module, out: pathlib.Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bf16), each replaced in one step."""
    out.mkdir(parents=True, exist_ok=True)
    c = model.config
    write(out / "config.json", json.dumps(c, indent=2) + "\n")
    write(out / "generation_config.json", json.dumps(
        {"bos_token_id": c["bos_token_id"], "eos_token_id": c["eos_token_id"], "do_sample": False}, indent=2) + "\n")
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    part = out / "model.safetensors.part"
    safetensors.torch.save_file(tensors, str(part), metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(out / "model.safetensors")


def write(path: pathlib.Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
