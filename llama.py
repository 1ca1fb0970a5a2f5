"""Llama in one file: forward pass with a slot for steering vectors, packing, loading, generation.

    model = load("path/to/checkpoint", dtype=torch.bfloat16, device="cuda")
    answers = generate(model, prompts, max_new_tokens=64, eos_id=2, steer={15: 2.0 * v})

The steering vector of layer L is added to the residual stream *after* block L, counted from 0. That
place is `hidden_states[L + 1]` in transformers and `direction.L` in a llama.cpp control vector.

Architecture: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; rotary embedding: Su et al.
2021, https://arxiv.org/abs/2104.09864. Mistral is the same network; Qwen2 adds biases to q, k, v;
Qwen3 has none, but norms of each head's q and k. Weights are read as Hugging Face saves them;
logits equal transformers' (tests/test_llama.py, tests/test_families.py). Needs torch and
safetensors, nothing else of this project. MIT licence.

Notation: B batch, T tokens of this pass, S keys (cached + T), H heads, K kv heads, D head_dim.
"""

import json
import math
import pickle
import re
import warnings
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """The sizes of a model. Raises ValueError for values that no model has."""

    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int
    n_kv_heads: int  # fewer than n_heads: grouped-query attention
    head_dim: int
    hidden_dim: int  # width of the feed-forward network
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # the numbers that ROPE_SCALING lists for one of its kinds
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False  # of gate, up and down
    qk_norm: bool = False  # each head's q and k have a norm
    max_seq_len: int = 4096  # tokens; longer input is refused
    tied: bool = False  # the head is the embedding, transposed
    family: str = "llama"  # a key of FAMILIES

    def __post_init__(self):
        limits = {int: 10**7, float: math.inf}  # numbers lie between 0 and these
        for name, kind in type(self).__annotations__.items():
            value = getattr(self, name)
            if type(value) is not kind or (kind in limits and not 0 < value < limits[kind]):
                raise ValueError(f"{name} = {value!r} is not a possible {kind.__name__}")
        if self.n_layers > 1000:  # as many objects would be made before any weight is read
            raise ValueError(f"n_layers = {self.n_layers} is more than 1000")

        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(f"n_kv_heads must divide n_heads, and head_dim be even: {self}")
        if not all(0 < number < math.inf for number in self.rope_scaling):
            raise ValueError(f"rope_scaling {self.rope_scaling} needs numbers > 0")
        if len(self.rope_scaling) == 4:
            _, low, high, _ = self.rope_scaling
            if low >= high:
                raise ValueError(f"rope_scaling {self.rope_scaling} needs low < high")


# ---- The network ---------------------------------------------------------------------------------


def wide(dtype):
    """The dtype of norms, rotation and logits: fp32, or fp64 in a model of fp64."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight  # cast, then scale: transformers' order


def rope_frequencies(config, dtype, device):
    """By how many radians a position turns each pair of channels, (D / 2,)."""
    channel = torch.arange(0, config.head_dim, 2, device=device)
    frequency = 1.0 / config.rope_theta ** (channel.to(dtype) / config.head_dim)

    # 1. rope_type "linear": every frequency is divided by the factor.
    if len(config.rope_scaling) == 1:
        (factor,) = config.rope_scaling
        return frequency / factor

    # 2. "llama3": a frequency is divided if it makes fewer than `low` turns within the first
    # context, kept if it makes more than `high`, and mixed from both in between.
    if len(config.rope_scaling) == 4:
        factor, low, high, first_context = config.rope_scaling
        turns = frequency * first_context / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequency + (1 - kept) * frequency / factor

    # 3. "default": no scaling.
    return frequency


def rope_tables(positions, config, dtype):
    """cos and sin for `rotate`: positions (..., T) -> two tables (..., 1, T, D) in `dtype`. They
    are made anew in each pass, because `.to(torch.bfloat16)` would round a stored table."""
    frequency = rope_frequencies(config, dtype, positions.device)
    angle = positions[..., None] * frequency  # (..., T, D / 2)
    angle = torch.cat((-angle, angle), dim=-1)  # (..., T, D); the minus is for the sine
    angle = angle.unsqueeze(-3)  # (..., 1, T, D), the same for all heads
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channels i and i + D/2, (a, b) -> (a cos - b sin, b cos + a sin). That is Hugging Face's
    layout; Meta's own files pair channels 2i and 2i + 1. The first half of `sin` has the minus."""
    y = x.to(cos.dtype)
    return (y * cos + y.roll(y.shape[-1] // 2, -1) * sin).type_as(x)


def attend(xq, xk, xv, mask):
    """(B, H, T, D), (B, K, S, D) twice -> (B, H, T, D); causal if mask is None."""
    causal = mask is None and xq.shape[2] > 1  # a single new token sees all keys
    grouped = xk.shape[1] < xq.shape[1]
    return F.scaled_dot_product_attention(xq, xk, xv, mask, is_causal=causal, enable_gqa=grouped)


def attend_packed(xq, xk, xv, masks):
    """`attend` for packed pairs, which do not see each other: one attention each, by its mask."""
    sizes = [len(mask) for mask in masks]
    queries = xq.split(sizes, dim=2)
    keys = xk.split(sizes, dim=2)
    values = xv.split(sizes, dim=2)
    pairs = zip(queries, keys, values, masks, strict=True)
    return torch.cat([attend(q, k, v, mask.to(q.device)) for q, k, v, mask in pairs], dim=2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, cache, layer):
        xq = self.split_heads(self.wq(x))  # (B, H, T, D)
        xk = self.split_heads(self.wk(x))  # (B, K, T, D)
        xv = self.split_heads(self.wv(x))  # (B, K, T, D)

        xq = rotate(self.q_norm(xq), cos, sin)
        xk = rotate(self.k_norm(xk), cos, sin)
        if cache:
            xk, xv = cache.extend(layer, xk, xv)  # (B, K, S, D)

        if isinstance(mask, list):
            out = attend_packed(xq, xk, xv, mask)
        else:
            out = attend(xq, xk, xv, mask)
        return self.wo(out.transpose(1, 2).flatten(-2))  # (B, T, dim)

    def split_heads(self, x):
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=c.mlp_bias)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, h, cos, sin, mask, cache, layer):
        h = h + self.attention(self.attention_norm(h), cos, sin, mask, cache, layer)
        return h + self.feed_forward(self.ffn_norm(h))


def add_vector(h: Tensor, v: Tensor) -> Tensor:
    """The slot: the residual stream h (B, T, dim) steered by v, which is broadcast to its shape. An
    fp32 vector is added to a 16-bit stream in fp32."""
    return (h + v).type_as(h)


class KVCache:
    """Keys and values of the tokens seen so far, kv (2, n_layers, B, K, max_len, D), `length` of
    them filled."""

    def __init__(self, model, batch_size, max_len):
        c = model.config
        shape = (2, c.n_layers, batch_size, c.n_kv_heads, max_len, c.head_dim)
        # Zeros, because attention multiplies what is masked by 0, and 0 times NaN would be NaN.
        self.kv = torch.zeros(shape, dtype=model.norm.weight.dtype, device=model.device)
        self.length = 0

    def extend(self, layer, xk, xv):
        """Append a layer's keys and values of T new tokens, (B, K, T, D) each. Returns those of all
        tokens so far, (2, B, K, S, D). `length` grows when the last layer has appended."""
        new_length = self.length + xk.shape[2]
        filled = self.kv[:, layer, :, :, :new_length]  # a view
        filled[:, :, :, self.length :] = torch.stack((xk, xv))

        n_layers = self.kv.shape[1]
        if layer == n_layers - 1:
            self.length = new_length
        return filled

    def take(self, rows):
        """Go on with the rows of these numbers, in this order; one may be taken several times."""
        self.kv = self.kv[:, :, rows]


class Llama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def device(self):
        """The device of the weights that have been read, see Checkpoint."""
        return next(w.device for w in self.parameters() if not w.is_meta)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> the residual stream before block 0, (B, T, dim)."""
        return self.tok_embeddings(tokens)

    def blocks(self, h, start, stop, positions=None, mask=None, cache=None, steer=None) -> Tensor:
        """Run blocks start .. stop - 1 on the residual stream h, (B, T, dim) -> (B, T, dim).

        positions: (T,) or (B, T); by default they count on from the cache's end.
        mask: bool, broadcastable to (B, H, T, S), True where a query sees a key; causal by default.
            Or a list of square masks, as `pack` makes them: T is cut into pieces of their sizes,
            which do not see each other.
        cache: a KVCache, read and extended.
        steer: {layer: v broadcastable to (B, T, dim)}; layers that are not run are left out.
        """
        T = h.shape[1]
        past = cache.length if cache else 0
        if positions is None:
            positions = torch.arange(past, past + T, device=h.device)
        if mask is None and past and T > 1:
            # New token i stands at past + i and sees the keys up to there.
            mask = torch.ones(T, past + T, dtype=torch.bool, device=h.device).tril(past)
        cos, sin = rope_tables(positions, self.config, wide(h.dtype))

        # Blocks may lie on several devices, see `place`; the stream goes along and comes back.
        home = h.device
        for i in range(start, stop):
            device = self.layers[i].ffn_norm.weight.device
            h, cos, sin = h.to(device), cos.to(device), sin.to(device)
            h = self.layers[i](h, cos, sin, mask, cache, i)
            if steer and i in steer:
                h = add_vector(h, steer[i].to(device))
        return h.to(home)

    def head(self, h: Tensor) -> Tensor:
        """The residual stream after the last block (..., dim) -> logits (..., vocab_size) in fp32,
        or in fp64 in a model of fp64."""
        weight = self.tok_embeddings.weight if self.config.tied else self.output.weight
        return F.linear(self.norm(h), weight).to(wide(h.dtype))

    def forward(self, tokens: Tensor, positions=None, mask=None, cache=None, steer=None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocab_size). For the other arguments see `blocks`.
        Raises ValueError for a vector that does not fit and for input longer than the context."""
        past = cache.length if cache else 0
        check_fit(self.config, steer or {}, past + tokens.shape[1])
        check_vectors(self.config, steer or {})
        h = self.embed(tokens)
        h = self.blocks(h, 0, self.config.n_layers, positions, mask, cache, steer)
        return self.head(h)


def check_fit(config: Config, layers: Collection[int], n_tokens: int):
    """Raises ValueError if the model lacks one of the layers or if its context is too short."""
    for layer in layers:
        if not 0 <= layer < config.n_layers:
            raise ValueError(f"no layer {layer}: the model has layers 0..{config.n_layers - 1}")
    if n_tokens > config.max_seq_len:
        raise ValueError(f"{n_tokens} tokens exceed the model's context of {config.max_seq_len}")


def check_vectors(config: Config, steer: dict[int, Tensor]):
    """Raises ValueError for a vector that cannot be added to the stream, (..., dim) and float."""
    for layer, v in steer.items():
        if v.shape[-1:] != (config.dim,) or not v.is_floating_point():
            found = f"the vector of layer {layer} is {v.dtype} {list(v.shape)}"
            raise ValueError(f"{found}, but the model needs float numbers, {config.dim} of them")


# ---- Packing -------------------------------------------------------------------------------------
#
# One pair becomes one sequence, `prompt | chosen | rejected`, in which both responses see the
# prompt and themselves and count positions from the prompt's end. A batch is its pairs behind one
# another, without padding:
#
#     tokens         p0 p1 p2   c0 c1   r0 r1 r2 | next pair's p0 ...
#     positions       0  1  2    3  4    3  4  5 | 0 ...
#     predicted by              p2 c0   p2 r0 r1 |


class PairIds(NamedTuple):
    prompt: list[int]  # with the tokens that the chat template puts before an answer
    chosen: list[int]  # with the token that ends an answer
    rejected: list[int]


def length(ids: PairIds) -> int:
    """Tokens of `prompt | response | response ...`, a PairIds or any tuple of lists like it."""
    return sum(len(part) for part in ids)


class Batch(NamedTuple):
    """Pairs behind one another in one row of T tokens, without padding; R response tokens."""

    tokens: Tensor  # (1, T)
    positions: Tensor  # (1, T)
    masks: list[Tensor]  # one a pair, square: True where a row sees a column
    predictors: Tensor  # (R,) the index in T whose output predicts the response token
    targets: Tensor  # (R,) that token
    lengths: list[int]  # of the responses: chosen and rejected of each pair; their sum is R


def pack(pairs: Collection[PairIds], device="cpu") -> Batch:
    """Put pairs behind one another. Instead of two, a prompt may have any number of responses."""
    tokens, positions, masks = [], [], []
    predictors, targets, lengths = [], [], []
    for prompt, *responses in pairs:
        tokens += prompt
        positions += range(len(prompt))
        last_of_prompt = len(tokens) - 1

        # Each token is predicted by the one before it, a response's first by the prompt's last.
        for response in responses:
            first = len(tokens)
            tokens += response
            positions += range(len(prompt), len(prompt) + len(response))
            predictors += [last_of_prompt, *range(first, len(tokens) - 1)]
            targets += response
            lengths.append(len(response))
        masks.append(pair_mask(prompt, responses).to(device))

    return Batch(
        tokens=torch.tensor([tokens], device=device),
        positions=torch.tensor([positions], device=device),
        masks=masks,
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor(targets, device=device),
        lengths=lengths,
    )


def pair_mask(prompt, responses):
    """Which tokens of `prompt | response | response ...` (rows) see which (columns), bool."""
    size = length([prompt, *responses])
    mask = torch.ones(size, size, dtype=torch.bool).tril()  # causal
    start = len(prompt)
    for response in responses:
        end = start + len(response)
        mask[end:, start:end] = False  # the responses behind this one do not see it
        start = end
    return mask


# ---- Checkpoints as Hugging Face saves them ------------------------------------------------------

# The families that this file implements, and what transformers assumes where their config.json is
# silent.
FAMILIES = {
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(max_position_embeddings=32768, num_key_value_heads=32),
    "qwen3": dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
}

QUANTIZED = "take the checkpoint that these quantized weights were made from: "

ROPE_SCALING = {  # rope_type: its numbers
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}

# Fields that may be there if they say what this file does anyway.
IMPLEMENTED = dict(
    hidden_act="silu", attention_bias=False, mlp_bias=False,
    rope_interleaved=False, use_mrope=False, use_sliding_window=False,
)  # fmt: skip

# Fields that do not change what is computed here. Any other field that `parse_config` does not use
# is refused by name, because it could mean another network. sliding_window is Mistral's alone;
# Qwen's is off unless use_sliding_window is set, which is refused.
INERT_FIELDS = """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id
    chunk_size_feed_forward do_sample dtype eos_token_id id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id max_length max_window_layers output_attentions
    output_hidden_states pad_token_id pretraining_tp return_dict sliding_window temperature
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_cache
""".split()

HF_NAMES = dict(  # ours: Hugging Face's
    tok_embeddings="embed_tokens", output="lm_head",
    attention_norm="input_layernorm", ffn_norm="post_attention_layernorm",
    attention="self_attn", wq="q_proj", wk="k_proj", wv="v_proj", wo="o_proj",
    feed_forward="mlp", w1="gate_proj", w2="down_proj", w3="up_proj",
)  # fmt: skip


def hf_name(name: str) -> str:
    """'layers.0.attention.wq.weight' -> 'model.layers.0.self_attn.q_proj.weight'."""
    theirs = ".".join(HF_NAMES.get(part, part) for part in name.split("."))
    return theirs if theirs.startswith("lm_head") else f"model.{theirs}"


def regular(path: Path) -> Path:
    """The path of a file that a user or a checkpoint names, if it is a regular file. Raises
    ValueError otherwise, and for what often stands under another file's name."""
    if not path.is_file():
        raise ValueError("it is a folder, a pipe or a device" if path.exists() else "No such file")
    with path.open("rb") as file:
        start = file.read(20)
    if start.startswith(b"version https://git-"):
        raise ValueError("it is a Git LFS pointer instead of the file, which `git lfs pull` brings")
    if start.startswith(b"PAR1"):
        raise ValueError("it is a Parquet file; write it as .jsonl, for example with pandas")
    return path


def parse_json(text: str):
    """The value that a text in JSON holds. Raises ValueError for any other text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ValueError, with the file's name, for anything else."""
    try:
        value = parse_json(regular(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {file}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


# What may stand in a folder instead of a checkpoint.
OTHER_KINDS = {
    "adapter_config.json": "an adapter; merge it: PeftModel.from_pretrained(MODEL, ADAPTER)"
    ".merge_and_unload().save_pretrained(FOLDER), and copy the tokenizer's files there",
    "params.json": "Meta's files; take the checkpoint in Hugging Face's format",
    "*.gguf": "weights for llama.cpp; take the checkpoint that they were made from",
    "*onnx*": "weights for ONNX; take the checkpoint that they were made from",
}


def refuse_other_kinds(path, patterns=OTHER_KINDS):
    """Raises ValueError if the folder holds a file of these names, keys of OTHER_KINDS."""
    for pattern in patterns:
        if any(path.glob(pattern)):
            raise ValueError(f"{path} holds {OTHER_KINDS[pattern]}")


def read_config(path: str | Path) -> Config:
    """The Config of the checkpoint in folder `path`. Raises ValueError for a field that is missing,
    malformed or not implemented."""
    path = Path(path)
    file = path / "config.json"
    if path.is_file():
        raise ValueError(f"{path} is a file; a model is a folder in Hugging Face's format")
    refuse_other_kinds(path, ["adapter_config.json"] if file.is_file() else OTHER_KINDS)
    fields = read_json(file)

    try:
        return parse_config(fields)
    except KeyError as e:
        raise ValueError(f"{file} lacks the field {e}") from None
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ValueError(f"{file}: {e}") from None


def read_eos_ids(path: str | Path) -> list[int]:
    """The ids at which generation ends, as generation_config.json in folder `path` lists them or,
    without such a file, config.json; none if there is neither. Raises ValueError for what is no
    id."""
    file = Path(path, "generation_config.json")
    if not file.is_file():
        file = Path(path, "config.json")
    listed = read_json(file).get("eos_token_id") if file.is_file() else None
    if listed is None:
        return []
    ids = listed if isinstance(listed, list) else [listed]
    for i in ids:
        if type(i) is not int or i < 0:
            raise ValueError(f"{file}: eos_token_id = {listed!r}, but an id is an int >= 0")
    return ids


def parse_config(said: dict) -> Config:
    """The Config that the fields of a config.json mean. Raises KeyError for one that is missing,
    ValueError, TypeError or ArithmeticError for what is malformed or not implemented."""
    family = said.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not implemented; {', '.join(FAMILIES)} are")
    if said.get("quantization_config"):
        raise ValueError(f"{QUANTIZED}quantization_config = {said['quantization_config']}")

    # What the file says, over what transformers assumes of the family. A null takes that back.
    merged = FAMILIES[family] | said
    known = {name: value for name, value in merged.items() if value is not None}

    # Both over what transformers assumes of every model.
    n_heads = known["num_attention_heads"]
    defaults = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, num_key_value_heads=n_heads)
    defaults["head_dim"] = known["hidden_size"] // n_heads
    fields = defaults | known

    # Each field that is used is popped, so that what is left is not used. Vicuna's
    # max_sequence_length includes its scaling. Within Mistral's sliding window attention is full;
    # longer input is refused.
    max_seq_len = fields.pop("max_position_embeddings")
    max_seq_len = fields.pop("max_sequence_length", max_seq_len)
    if family == "mistral":
        max_seq_len = min(max_seq_len, fields.pop("sliding_window", max_seq_len))
    rope_theta, rope_scaling = pop_rope(fields)

    # Other families have their biases, or none, in any case; here True is refused below.
    attention_bias = family in ("llama", "qwen3") and fields.pop("attention_bias", False)
    mlp_bias = family == "llama" and fields.pop("mlp_bias", False)

    config = Config(
        dim=fields.pop("hidden_size"),
        n_layers=fields.pop("num_hidden_layers"),
        n_heads=fields.pop("num_attention_heads"),
        n_kv_heads=fields.pop("num_key_value_heads"),
        head_dim=fields.pop("head_dim"),
        hidden_dim=fields.pop("intermediate_size"),
        vocab_size=fields.pop("vocab_size"),
        norm_eps=fields.pop("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        max_seq_len=max_seq_len,
        tied=fields.pop("tie_word_embeddings"),
        family=fields.pop("model_type"),
    )

    # What is left must not change the network.
    implemented = IMPLEMENTED | {"layer_types": ["full_attention"] * config.n_layers}
    for name, value in fields.items():
        if name not in INERT_FIELDS and value != implemented.get(name):
            raise ValueError(f"{name} = {value!r} is not implemented; delete it if it does nothing")
    return config


def pop_rope(fields):
    """Pop the rotary fields of a config.json; returns Config's rope_theta and rope_scaling."""
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 all in rope_parameters.
    rope = {"rope_theta": fields.pop("rope_theta", 10000.0)}
    rope = rope | fields.pop("rope_scaling", {})
    rope = rope | fields.pop("rope_parameters", {})
    rope_theta = rope.pop("rope_theta")

    # The kind was called type before it was called rope_type. What is left are its numbers.
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    if kind not in ROPE_SCALING or rope.keys() != set(ROPE_SCALING[kind]):
        raise ValueError(f"rope_scaling, rope_parameters: {kind!r} with {rope} is not implemented")
    return float(rope_theta), tuple(float(rope[name]) for name in ROPE_SCALING[kind])


def weight_files(path):
    """The files that hold the weights of the checkpoint in folder `path`."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            return indexed_files(index)
    refuse_other_kinds(path)
    raise ValueError(f"{path} holds no model.safetensors, no pytorch_model.bin and no index of one")


def indexed_files(index):
    """The files that an index names: its weight_map is {name of a tensor: name of its file}."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} lacks the field 'weight_map'")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(f"{index}: weight_map names {name!r}, which is no file beside it")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def open_weights(file):
    """{name: tensor} of a file of safetensors or, if its name ends in .bin, of torch.save. Tensors
    are mapped into memory, which reads nothing yet; code in a pickle is not run."""
    try:
        if regular(file).suffix == ".safetensors":
            return load_file(file)

        # torch warns of odd kinds of tensors, which `is_plain` leaves out.
        with warnings.catch_warnings(action="ignore"):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(saved, dict):
            raise ValueError("it holds no tensors by name")
        return {str(name): x for name, x in saved.items() if is_plain(x)}
    except pickle.UnpicklingError:
        raise ValueError(f"{file} could run code, so it is not read; take safetensors") from None
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(f"cannot read {file}: {e}".split("\n")[0]) from None


def is_plain(x):
    """Is this a tensor whose numbers stand one by one in memory: not sparse, nested, on meta?"""
    return torch.is_tensor(x) and x.layout == torch.strided and not (x.is_nested or x.is_meta)


def place(name, start, stop, devices):
    """The device of a weight: blocks start .. stop - 1 are laid over the devices in order, to each
    as many as to the others or one more. Embedding, norm and head are on the first, where the
    stream comes in and comes out; `Llama.blocks` hands it on."""
    if not name.startswith("layers."):
        return devices[0]
    block = int(name.split(".")[1])
    return devices[(block - start) * len(devices) // (stop - start)]


class Checkpoint:
    """The Hugging Face checkpoint in folder `path`, opened: config, names and shapes are checked,
    the weights are not read yet. Raises ValueError with the name of a tensor that is missing, left
    over or of the wrong shape; see also `read_config`.

    more: further devices, over which `read` lays the blocks that it reads at once, see `place`.
    model: the frozen Llama. What `read` has not brought yet is on torch's meta device and takes no
    memory. Only training and `first_pass` may use several devices: a KVCache is on one.
    """

    def __init__(self, path: str | Path, dtype=torch.float32, device="cpu", more=()):
        self.dtype = dtype
        self.devices = [device, *more]
        config = read_config(path)

        # The file of each tensor. If several files hold one of the same name, the first counts.
        self.files = {}
        tensors = {}
        for file in weight_files(Path(path)):
            for name, tensor in open_weights(file).items():
                self.files.setdefault(name, file)
                tensors.setdefault(name, tensor)

        # The model, whose weights take no memory yet. As in transformers 5, a head that was saved
        # beside an embedding is not tied, whatever the config says.
        if {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys():
            config = replace(config, tied=False)
        with torch.device("meta"):
            self.model = Llama(config).eval().requires_grad_(False)

        # {our name: Hugging Face's}. What head and embedding share may have either's name.
        weights = self.model.state_dict()
        self.names = {our: hf_name(our) for our in weights}
        if config.tied and "lm_head.weight" in tensors:
            self.names["tok_embeddings.weight"] = "lm_head.weight"
        shapes = {self.names[our]: tuple(weight.shape) for our, weight in weights.items()}

        # Each tensor is a weight, and each weight has its tensor.
        for name in sorted(tensors.keys() - shapes.keys()):
            if re.search(r"qweight|scale|absmax", name):
                raise ValueError(f"{path}: {QUANTIZED}{name}")
            if not name.endswith("rotary_emb.inv_freq"):  # old files carry this table
                raise ValueError(f"{path} has the unknown tensor {name}")
        for name, shape in sorted(shapes.items()):
            if name not in tensors:
                raise ValueError(f"{path} lacks the tensor {name}")
            x = tensors[name]
            if tuple(x.shape) != shape or not x.is_floating_point():
                raise ValueError(f"{path}: {name} is {x.dtype} {tuple(x.shape)}, not float {shape}")

    def read(self, start: int, stop: int):
        """Read what the model still lacks of blocks start .. stop - 1, -1 being the embedding, and
        of norm and head if stop is n_layers, into `dtype` on `device`."""
        parts = [f"layers.{i}." for i in range(start, stop)]
        if start < 0:
            parts.append("tok_embeddings.")
        if stop == self.model.config.n_layers:
            parts += ["norm.", "tok_embeddings." if self.model.config.tied else "output."]

        # {Hugging Face's name: ours} of their weights that are not there yet.
        lacking = [our for our, weight in self.model.state_dict().items() if weight.is_meta]
        wanted = {self.names[our]: our for our in lacking if our.startswith(tuple(parts))}

        # Each file is opened once, for all its weights.
        weights = {}
        for file in {self.files[name] for name in wanted}:
            for name, tensor in open_weights(file).items():
                if name in wanted and self.files[name] == file:
                    our = wanted[name]
                    weight = tensor.to(place(our, start, stop, self.devices), self.dtype)
                    extremes = torch.stack(weight.aminmax())  # NaN if the weight has one
                    if not extremes.isfinite().all():
                        raise ValueError(f"{file}: {name} holds NaN or infinity in {self.dtype}")
                    weights[our] = weight
        self.model.load_state_dict(weights, strict=False, assign=True)

    @contextmanager
    def hold(self, i: int):
        """Inside this context the model has block i, or the embedding if i is -1; afterwards its
        memory is given back. A tied embedding stays, because it is the head."""
        self.read(i, i + 1)
        yield
        if i >= 0:
            self.model.layers[i].to("meta")
        elif not self.model.config.tied:
            self.model.tok_embeddings.to("meta")


def load(path: str | Path, dtype=torch.float32, device="cpu") -> Llama:
    """The frozen model of the Hugging Face checkpoint in folder `path`: see Checkpoint."""
    checkpoint = Checkpoint(path, dtype, device)
    checkpoint.read(-1, checkpoint.model.config.n_layers)
    return checkpoint.model


# ---- Generation ----------------------------------------------------------------------------------


def sample(logits, temperature, top_p, u):
    """Next ids (B,) for logits (B, vocab_size) and one uniform number a row, u (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    total = probs.cumsum(-1)
    kept = total.masked_fill(total - probs >= top_p, 0)  # the fewest tokens that hold top_p

    # The token in whose share of the kept probability u falls.
    drawn = (total < u * kept.amax(-1, keepdim=True)).sum(-1, keepdim=True)
    return ids.gather(-1, drawn).squeeze(-1)


def prefill(model, prompts, max_len, steer):
    """Fill a cache with prompts, lists of token ids, right-aligned. Returns it and the stream after
    the last block at the last token of each, (B, dim).

    steer: {layer: (B, 1, dim)}. A prompt of several rows runs once up to the first steered layer.
    Padding moves the positions of a row, which changes nothing: rotary embedding is relative.
    """
    n_layers = model.config.n_layers
    first = min(steer, default=n_layers - 1)  # the first steered layer
    longest = max(len(prompt) for prompt in prompts)
    cache = KVCache(model, len(prompts), max_len)
    last = cache.kv.new_empty(len(prompts), model.config.dim)

    rows_of = {}  # {prompt: the rows that have it}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(row)

    for prompt, rows in rows_of.items():
        # 1. Up to the first steered layer the rows are alike: run one of them.
        start = longest - len(prompt)
        positions = torch.arange(start, longest, device=model.device)
        prompt_cache = KVCache(model, 1, len(prompt))
        h = model.embed(torch.tensor([prompt], device=model.device))  # (1, T, dim)
        h = model.blocks(h, 0, first + 1, positions, cache=prompt_cache)
        prompt_cache.take([0] * len(rows))

        # 2. From there on each row has its own vectors, and so its own stream.
        if steer:
            h = add_vector(h, steer[first][rows])  # (rows, T, dim)
            above = {layer: v[rows] for layer, v in steer.items()}
            h = model.blocks(h, first + 1, n_layers, positions, cache=prompt_cache, steer=above)

        cache.kv[:, :, rows, :, start:longest] = prompt_cache.kv
        last[rows] = h[:, -1]
    cache.length = longest
    return cache, last


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, eos_id, steer=None, temperature=0, top_p=1, seed=0):
    """`generate`, step by step: yields {row: new id} of the rows that had not ended."""
    if not prompts or not all(prompts):
        raise ValueError("there is no prompt, or one has no tokens")
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    steer = steer or {}
    check_fit(model.config, steer, longest + max_new_tokens)
    check_vectors(model.config, steer)
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1]")
    ends = torch.tensor([eos_id] if isinstance(eos_id, int) else list(eos_id), device=device)

    # A random number for each row and step, so what a row says does not depend on the others.
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(len(prompts), max_new_tokens, dtype=torch.float32, generator=generator)
    u = u.to(device)

    # The batch: the rows in it, which of them have not ended, their padding and their vectors.
    rows = torch.arange(len(prompts), device=device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    vectors = {layer: v.to(device).expand(len(prompts), 1, -1) for layer, v in steer.items()}

    cache, h = prefill(model, prompts, longest + max_new_tokens, vectors)
    for step in range(max_new_tokens):
        tokens = sample(model.head(h), temperature, top_p, u[rows, step, None])
        yield dict(zip(rows[going].tolist(), tokens[going].tolist(), strict=True))
        going &= ~torch.isin(tokens, ends)
        if not going.any() or step == max_new_tokens - 1:
            return

        # Rows that have ended leave the batch, in groups, because each time copies the cache.
        if going.float().mean() < 0.75:
            left = going.nonzero()[:, 0]
            cache.take(left)
            rows, going, padding, tokens = rows[left], going[left], padding[left], tokens[left]
            vectors = {layer: v[left] for layer, v in vectors.items()}

        # The new tokens see all keys that are not padding.
        mask = None
        if padding.any():
            keys = torch.arange(cache.length + 1, device=device)
            mask = (keys >= padding[:, None])[:, None, None]  # (B, 1, 1, S)
        h = model.embed(tokens[:, None])  # (B, 1, dim)
        h = model.blocks(h, 0, model.config.n_layers, mask=mask, cache=cache, steer=vectors)[:, 0]


def generate(model, prompts, max_new_tokens, eos_id, steer=None, temperature=0, top_p=1, seed=0):
    """Continue prompts, lists of token ids whose lengths may differ: the new ids of each, with the
    EOS last unless max_new_tokens came first.

    eos_id: the id that ends an answer, or several.
    steer: {layer: tensor broadcastable to (B, 1, dim)}, one vector for all prompts or one for each,
        added at every position of prompt and answer.
    temperature: 0 is greedy; otherwise tokens are drawn from the fewest that hold top_p.

    Row i depends on its prompt, its vector, the seed, max_new_tokens and i, not on the other rows.
    Raises ValueError if the context could be exceeded.
    """
    answers = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, eos_id, steer, temperature, top_p, seed):
        for row, token in new.items():
            answers[row].append(token)
    return answers
