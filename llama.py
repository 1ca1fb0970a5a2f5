"""Llama in one file: forward pass, a slot for steering vectors, checkpoint loader, generation.

    model = load("path/to/checkpoint", dtype=torch.bfloat16, device="cuda")
    answers = generate(model, prompts, max_new_tokens=64, eos_id=2, steer={15: 2.0 * v})

A steering vector for layer L is added to the residual stream *after* block L, counted from 0: that
is `hidden_states[L + 1]` in transformers and `direction.L` in a llama.cpp control vector.

Architecture: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; rotary embedding: Su et al.
2021, https://arxiv.org/abs/2104.09864. Mistral is the same network, Qwen2 has three biases more.
Weights are read as Hugging Face saves them, with a PEFT LoRA adapter if there is one, and logits
equal transformers' (tests/test_llama.py, tests/test_families.py). Needs torch and safetensors,
nothing else of this project; MIT licence.

Notation: B batch, T tokens of this pass, S keys (cached + T), H heads, K kv heads, D head_dim.
"""

import itertools
import json
import math
import pickle
import re
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class Config:
    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int
    n_kv_heads: int  # fewer than n_heads: grouped-query attention
    head_dim: int
    hidden_dim: int  # width of the feed-forward network
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # the numbers of a kind in ROPE_SCALING
    qkv_bias: bool = False
    max_seq_len: int = 4096  # tokens; longer input is refused
    tied: bool = False  # the head is the embedding, transposed
    family: str = "llama"  # a key of FAMILIES

    def __post_init__(self):
        for name, value in asdict(self).items():
            kind = self.__annotations__[name]
            if type(value) is not kind or (kind in (int, float) and not 0 < value < math.inf):
                raise ValueError(f"{name} = {value!r} is no possible {kind.__name__}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs")
        low, high = self.rope_scaling[1:3] or (1, 2)
        if not all(0 < x < math.inf for x in self.rope_scaling) or low >= high:
            raise ValueError(f"rope_scaling {self.rope_scaling} needs numbers > 0 and low < high")


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight  # cast, then scale: transformers' order


class WidenedProduct(torch.autograd.Function):
    """x @ weight.T of 16-bit x and weight, computed in fp32. The weight, frozen, is widened a slice
    at a time, so that no copy of it is ever held."""

    ROWS = 1024

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        y, rows = x.float(), weight.split(WidenedProduct.ROWS)
        return torch.cat([F.linear(y, part.float()).type_as(x) for part in rows], dim=-1)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        rows = weight.split(WidenedProduct.ROWS)
        columns = grad.split(WidenedProduct.ROWS, dim=-1)
        parts = zip(columns, rows, strict=True)
        return sum(g.float() @ w.float() for g, w in parts).type_as(grad), None


def linear(x, weight, bias=None):
    """x @ weight.T + bias, (..., in) and (out, in) -> (..., out)."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        # A CPU without 16-bit arithmetic is slow at these, and far slower at their backward pass.
        native = torch.backends.mkldnn.is_available() and (
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
            if x.dtype == torch.bfloat16
            else torch.ops.mkldnn._is_mkldnn_fp16_supported()
        )
        if not native:
            y = WidenedProduct.apply(x, weight)
            return y if bias is None else y + bias
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def rope_tables(positions, head_dim, theta, scaling=()):
    """cos and sin of -angle | angle = position * frequency, (..., T) -> (..., 1, T, D) in fp32.
    Made anew in each pass, for a buffer would be rounded by the model's `.to(torch.bfloat16)`.

    scaling: numbers of a kind in ROPE_SCALING, for contexts longer than those first trained on.
    """
    channel = torch.arange(0, head_dim, 2, device=positions.device)
    frequency = 1.0 / theta ** (channel.float() / head_dim)
    if scaling:
        (factor, *bands), kept = scaling, 0.0  # linear: every frequency is divided by the factor
        if bands:  # llama3: only those of few turns within the context first trained on
            low, high, length = bands
            kept = ((frequency * length / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / factor
    angle = positions[..., None] * frequency
    angle = torch.cat((-angle, angle), dim=-1).unsqueeze(-3)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channel i with channel i + D/2: Hugging Face's layout (Meta's files: 2i with 2i + 1)."""
    y = x.float()
    return (y * cos + y.roll(y.shape[-1] // 2, -1) * sin).type_as(x)


def attend(xq, xk, xv, mask):
    """(B, H, T, D), (B, K, S, D) twice -> (B, H, T, D); causal if mask is None."""
    causal, grouped = mask is None and xq.shape[2] > 1, xk.shape[1] < xq.shape[1]
    return F.scaled_dot_product_attention(
        xq, xk, xv, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = Linear(c.dim, c.n_heads * c.head_dim, c.qkv_bias)
        self.wk = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.wv = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.wo = Linear(c.n_heads * c.head_dim, c.dim)

    def forward(self, x, cos, sin, mask, cache, layer):
        xq = self.wq(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        xk = self.wk(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        xv = self.wv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        xq, xk = rotate(xq, cos, sin), rotate(xk, cos, sin)
        if cache is not None:
            xk, xv = cache.extend(layer, xk, xv)  # (B, K, S, D)
        if isinstance(mask, list):  # blocks that do not see each other: one attention each
            sizes = [block.shape[-1] for block in mask]
            blocks = zip(*(x.split(sizes, dim=2) for x in (xq, xk, xv)), mask, strict=True)
            out = torch.cat([attend(*block) for block in blocks], dim=2)
        else:
            out = attend(xq, xk, xv, mask)
        return self.wo(out.transpose(1, 2).flatten(-2))  # (B, T, dim)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1 = Linear(c.dim, c.hidden_dim)
        self.w2 = Linear(c.hidden_dim, c.dim)
        self.w3 = Linear(c.dim, c.hidden_dim)

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


class KVCache:
    """Keys and values of the tokens seen so far, (n_layers, B, K, max_len, D), `length` filled.

    cells: while packed rows run, see `prefill`, (which token, its row, its column) of each cell.
    """

    def __init__(self, model, batch_size, max_len):
        c, like = model.config, model.norm.weight
        shape = (c.n_layers, batch_size, c.n_kv_heads, max_len, c.head_dim)
        self.k = torch.zeros(shape, dtype=like.dtype, device=like.device)  # at padding, finite
        self.v = torch.zeros_like(self.k)
        self.length, self.cells = 0, None

    def extend(self, layer, xk, xv):
        """Append (B, K, T, D) at `length`; returns all so far, (B, K, S, D). What is packed,
        (1, K, T, D), goes into its cells and is returned as it is."""
        if self.cells is not None:
            tokens, rows, columns = self.cells
            self.k[layer, rows, :, columns] = xk[0, :, tokens].transpose(0, 1)
            self.v[layer, rows, :, columns] = xv[0, :, tokens].transpose(0, 1)
            return xk, xv
        end = self.length + xk.shape[2]
        self.k[layer, :, :, self.length : end] = xk
        self.v[layer, :, :, self.length : end] = xv
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows):
        """Drop the rows where the bool (B,) is False."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        embeddings = torch.empty(config.vocab_size, config.dim)  # to draw some would take seconds
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.output = Linear(config.dim, config.vocab_size)

    @property
    def device(self):
        """Where the weights are; those not yet read (see Checkpoint) are nowhere."""
        return next(w.device for w in self.parameters() if not w.is_meta)

    def embed(self, tokens):
        """Token ids (B, T) -> the residual stream before block 0, (B, T, dim)."""
        return self.tok_embeddings(tokens)

    def blocks(self, h, start, stop, positions=None, mask=None, cache=None, steer=None):
        """Run blocks start .. stop - 1 on the residual stream h, (B, T, dim) -> (B, T, dim).

        positions: (T,) or (B, T), by default counted on from the cache's end.
        mask: bool, broadcastable to (B, H, T, S), True where a query sees a key; causal by default.
            A list of square masks: T is divided into blocks of their sizes, which do not see
            each other.
        cache: a KVCache, read and extended; the last block advances its length.
        steer: {layer: tensor broadcastable to (B, T, dim)}, added to that block's output; layers
            that are not run are left out.
        """
        steer = steer or {}
        past, T = cache.length if cache is not None else 0, h.shape[1]
        if positions is None:
            positions = torch.arange(past, past + T, device=h.device)
        if mask is None and past and T > 1:  # query i stands at past + i and sees keys up to there
            mask = torch.ones(T, past + T, dtype=torch.bool, device=h.device).tril(past)
        c = self.config
        cos, sin = rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        for i in range(start, stop):
            h = self.layers[i](h, cos, sin, mask, cache, i)
            if i in steer:
                h = (h + steer[i]).type_as(h)  # the slot; an fp32 vector is added in fp32
        if cache is not None and stop == c.n_layers:
            cache.length += T
        return h

    def head(self, h):
        """The residual stream after the last block (..., dim) -> fp32 logits (..., vocab_size)."""
        weight = self.tok_embeddings.weight if self.config.tied else self.output.weight
        return linear(self.norm(h), weight).float()

    def forward(self, tokens, positions=None, mask=None, cache=None, steer=None):
        """Token ids (B, T) -> fp32 logits (B, T, vocab_size). The other arguments: see `blocks`."""
        n_layers, past = self.config.n_layers, cache.length if cache is not None else 0
        check_steer(steer, n_layers)
        check_length(past + tokens.shape[1], self.config.max_seq_len)
        h = self.blocks(self.embed(tokens), 0, n_layers, positions, mask, cache, steer)
        return self.head(h)


def check_steer(steer, n_layers):
    """Raises ValueError if a layer in steer, an iterable of them or None, is not there."""
    for layer in steer or {}:
        if not 0 <= layer < n_layers:
            raise ValueError(f"cannot steer layer {layer}: the model has layers 0..{n_layers - 1}")


def check_length(length, limit):
    """Raises ValueError for more tokens than the context holds."""
    if length > limit:
        raise ValueError(f"{length} tokens exceed the model's context of {limit}")


# ---- Packing ------------------------------------------------------------------------------------


class PairIds(NamedTuple):
    prompt: list[int]  # with BOS
    chosen: list[int]  # with EOS
    rejected: list[int]


def length(ids):
    """Tokens of `prompt | response | response ...`, a PairIds or any tuple of lists like it."""
    return sum(map(len, ids))


class Batch(NamedTuple):
    """Pairs behind one another in one row of T tokens, none of them padding; R response tokens."""

    tokens: torch.Tensor  # (1, T)
    positions: torch.Tensor  # (1, T)
    masks: list[torch.Tensor]  # one a pair, square: True where a row sees a column
    predictors: torch.Tensor  # (R,) the index in T whose output predicts the response token
    targets: torch.Tensor  # (R,) that token
    lengths: list[int]  # of the responses: chosen and rejected of each pair; their sum is R


def pack(pairs, device="cpu"):
    """PairIds -> Batch. Instead of two, there may be any number of responses to a prompt."""
    tokens, positions, masks, predictors, targets, lengths = [], [], [], [], [], []
    for prompt, *responses in pairs:
        start, p, size = len(tokens), len(prompt), length([prompt, *responses])
        tokens += prompt
        positions += range(p)
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        for response in responses:
            begin, n = len(tokens), len(response)
            mask[begin - start + n :, begin - start : begin - start + n] = False  # to later ones
            tokens += response
            positions += range(p, p + n)
            predictors += [start + p - 1, *range(begin, begin + n - 1)]  # at first the prompt's end
            targets += response
            lengths.append(n)
        masks.append(mask.to(device))
    tokens, positions, predictors, targets = (
        torch.tensor(x, device=device) for x in (tokens, positions, predictors, targets)
    )
    return Batch(tokens[None], positions[None], masks, predictors, targets, lengths)


# ---- Checkpoints as Hugging Face saves them ------------------------------------------------------

# The families we implement: what transformers assumes where their config.json is silent, and what
# holds whatever it says (Qwen2's window is off unless use_sliding_window is set, which is refused).
FAMILIES = {
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(max_position_embeddings=32768, num_key_value_heads=32),
}
FIXED = {"qwen2": dict(qkv_bias=True, sliding_window=None)}

ROPE_SCALING = {  # rope_type: its numbers
    "default": [],
    "linear": ["factor"],
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings".split(),
}

# What else is known, by model_type or field.
GEMMA = "needs norms that scale by 1 + w, a scaled embedding and GeGLU"
NEEDS = {
    "phi3": "needs fused qkv_proj and gate_up_proj to be split",
    "baichuan": "needs fused W_pack to be split",
    "internlm2": "needs fused wqkv to be split",
    **dict.fromkeys(["gemma", "gemma2", "gemma3", "gemma3_text"], GEMMA),
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe"], "needs a mixture of experts"),
    "qwen3": "needs norms of q and k",
    "quantization_config": "needs unpacking; take the 16-bit checkpoint that it was made from",
}

# Fields that do not change what is computed here. Any other field that `parse_config` does not use
# is refused by name, for it could mean another network.
INERT_FIELDS = """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id
    chunk_size_feed_forward do_sample dtype eos_token_id id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id max_length max_window_layers output_attentions
    output_hidden_states pad_token_id pretraining_tp return_dict temperature tokenizer_class top_k
    top_p torch_dtype torchscript transformers.js_config transformers_version unk_token_id
    unsloth_fixed unsloth_version use_cache
""".split()
SWITCHED_OFF = "attention_bias mlp_bias rope_interleaved use_mrope use_sliding_window".split()

# Likewise of an adapter_config.json: what is used or inert, and what means a plain LoRA.
LORA_FIELDS = """
    alpha_pattern auto_mapping base_model_name_or_path ensure_weight_tying inference_mode lora_alpha
    lora_dropout megatron_core peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_rslora
""".split()
LORA_PLAIN = [("bias", "none"), ("init_lora_weights", True), ("init_lora_weights", "gaussian")]

# The first that is there is read.
WEIGHT_FILES = """
    model.safetensors model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json
""".split()
LORA_FILES = ["adapter_model.safetensors", "adapter_model.bin"]

HF_NAMES = {  # ours: Hugging Face's; {} is the number of the block
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wq.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wk.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wv.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def read_json(file):
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {file}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def parse_json(file, parse):
    """parse(the object in a JSON file); any fault in it is a ValueError that names the file."""
    config = read_json(file)
    try:
        return parse(config)
    except KeyError as e:
        raise ValueError(f"{file} lacks the field {e}") from None
    except (TypeError, AttributeError, ZeroDivisionError, re.error) as e:
        raise ValueError(f"{file} is malformed: {e}") from None
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def read_config(path):
    """The Config of the checkpoint in folder `path`.

    Raises ValueError for a field that is missing, malformed or not implemented.
    """
    file = Path(path) / "config.json"
    if not file.is_file() and [*Path(path).glob("params.json"), *Path(path).glob("consolidated.*")]:
        raise ValueError(
            f"{path} holds Meta's files (params.json, consolidated.*), which need other names and "
            "the rows of q and k in another order; take the Hugging Face checkpoint"
        )
    return parse_json(file, parse_config)


def parse_config(config):
    """A Config from the fields of a config.json; a missing one is a KeyError."""
    family = config.get("model_type")
    if family not in FAMILIES:
        needs = NEEDS.get(family, "is not implemented")
        raise ValueError(f"model_type {family!r} {needs}; there are {', '.join(FAMILIES)}")
    config = {"rms_norm_eps": 1e-6} | FAMILIES[family] | config | FIXED.get(family, {})
    config = {name: value for name, value in config.items() if value is not None}
    take = config.pop
    n_heads, dim = take("num_attention_heads"), take("hidden_size")
    window = take("sliding_window", 2**63)
    result = Config(
        dim=dim,
        n_layers=take("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=take("num_key_value_heads", n_heads),
        head_dim=take("head_dim", dim // n_heads),
        hidden_dim=take("intermediate_size"),
        vocab_size=take("vocab_size"),
        norm_eps=float(take("rms_norm_eps")),
        **take_rope(config),
        qkv_bias=take("qkv_bias", False),
        # Vicuna's max_sequence_length counts its scaling in. Within the sliding window attention is
        # full attention; longer input is refused.
        max_seq_len=min(take("max_sequence_length", take("max_position_embeddings")), window),
        tied=take("tie_word_embeddings", False),
        family=take("model_type"),
    )
    plain = {"hidden_act": "silu", "layer_types": ["full_attention"] * result.n_layers}
    plain |= dict.fromkeys(SWITCHED_OFF, False)
    for name, value in config.items():
        if name not in INERT_FIELDS and (name, value) not in plain.items():
            advice = "if it does not change the computation, delete it from the file"
            raise ValueError(f"{name} = {value!r} is not implemented ({NEEDS.get(name, advice)})")
    return result


def take_rope(config):
    """Take what concerns rotary embedding from a config.json's fields, as Config's."""
    theta, scaling = config.pop("rope_theta", 10000.0), ()
    for field in ("rope_scaling", "rope_parameters"):  # transformers 4; 5
        rope = config.pop(field, {})
        theta = rope.get("rope_theta", theta)
        kind = rope.get("rope_type", rope.get("type", "default"))
        numbers = ROPE_SCALING.get(kind, [])
        if kind not in ROPE_SCALING or rope.keys() - {"rope_theta", "rope_type", "type", *numbers}:
            raise ValueError(f"{field} = {rope} is not implemented")
        scaling = tuple(float(rope[name]) for name in numbers) or scaling
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def open_weights(file):
    """A context with keys() and get_tensor(name) of a file of safetensors or, if its name ends
    otherwise, by torch.save. Tensors are mapped into memory; code in a pickle is not run."""
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        weights = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        if not all(isinstance(k, str) and torch.is_tensor(x) for k, x in weights.items()):
            raise pickle.UnpicklingError
    except pickle.UnpicklingError:
        advice = "it could run code and is not read; save its tensors as safetensors"
        raise ValueError(f"{file} holds more than named tensors: {advice}") from None
    except Exception as e:  # a damaged pickle can fail in any way
        raise ValueError(f"cannot read {file}: {e}".split("\n")[0]) from None
    return nullcontext(SimpleNamespace(keys=weights.keys, get_tensor=weights.get))


def first_file(path, names):
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds none of {', '.join(names)}")


def tensor_files(path):
    """{Hugging Face's tensor name: file} of the checkpoint in folder `path`, whole or sharded."""
    file = first_file(path, WEIGHT_FILES)
    files, found = [file], {}
    if file.suffix == ".json":
        shards = parse_json(file, lambda index: set(index["weight_map"].values()))
        files = [path / str(shard) for shard in sorted(shards, key=str)]
    for file in files:
        with open_weights(file) as f:
            found |= dict.fromkeys(f.keys(), file)
    return found


def check_names(path, expected, found):
    """Raises ValueError with the name of a tensor that is missing or left over."""
    expected, found = set(expected), set(found)
    for fault, names in (("lacks", expected - found), ("has left-over", found - expected)):
        if names:
            raise ValueError(f"{path} {fault} tensors: {min(names)} and {len(names) - 1} more")


def read_tensor(f, file, name, shape):
    try:
        tensor = f.get_tensor(name)
    except SafetensorError as e:
        raise ValueError(f"cannot read tensor {name} of {file}: {e}") from None
    if tensor.shape != shape or not tensor.is_floating_point():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"tensor {name} of {file} is {found}, not floating-point {tuple(shape)}")
    return tensor


def parse_lora(config, modules):
    """{module: (rank, scale)} of those modules that an adapter_config.json targets."""
    config = {name: value for name, value in config.items() if value}  # without what is off
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type = {config.get('peft_type')!r} cannot be merged, only LORA")
    for name, value in config.items():
        if name not in LORA_FIELDS and (name, value) not in LORA_PLAIN:
            raise ValueError(f"{name} = {value!r} cannot be merged")
    targets = config["target_modules"]
    if not isinstance(targets, str):  # a regular expression, or ends of names
        targets = rf"(.*\.)?({'|'.join(map(re.escape, targets))})"

    def pick(module, patterns, default):
        fits = (x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(fits, default)

    result = {}
    for module in (m for m in modules if re.fullmatch(targets, m)):
        if not module.endswith("_proj"):
            raise ValueError(f"target_modules: {module} cannot be merged, only what ends in _proj")
        rank = pick(module, config.get("rank_pattern", {}), config["r"])
        alpha = pick(module, config.get("alpha_pattern", {}), config["lora_alpha"])
        result[module] = rank, alpha / (math.sqrt(rank) if "use_rslora" in config else rank)
    return result


def read_lora(path, shapes):
    """{module: (scale, A, B)} of the PEFT adapter in folder `path`; the weight W of the module is
    to become W + scale * B @ A. Raises ValueError for an adapter that does anything else, or that
    lacks a tensor, or has one left over or of the wrong shape.

    shapes: {Hugging Face's name of a module: its weight's shape}, of the whole model.
    """
    targets = parse_json(Path(path) / "adapter_config.json", lambda x: parse_lora(x, shapes))
    file, name, lora = first_file(Path(path), LORA_FILES), "base_model.model.{}.lora_{}.weight", {}
    with open_weights(file) as f:
        check_names(file, (name.format(m, x) for m in targets for x in "AB"), f.keys())
        for m, (rank, scale) in targets.items():
            n_out, n_in = shapes[m]
            A = read_tensor(f, file, name.format(m, "A"), (rank, n_in))
            lora[m] = scale, A, read_tensor(f, file, name.format(m, "B"), (n_out, rank))
    return lora


class Checkpoint:
    """The Hugging Face checkpoint in folder `path`, opened: config, names and files are checked,
    the weights not yet read. Raises ValueError with the name of a tensor that is missing, left over
    or wrongly shaped; see also `read_config`.

    lora: folder of a PEFT adapter, which is merged into what is read; see `read_lora`.
    model: the frozen Llama. What `read` has not brought yet is on torch's meta device and takes no
    memory.
    """

    def __init__(self, path, dtype=torch.float32, device="cpu", lora=None):
        self.path, self.dtype, self.device = Path(path), dtype, device
        with torch.device("meta"):
            self.model = Llama(read_config(path)).eval().requires_grad_(False)
        blocks, files = range(self.model.config.n_layers), tensor_files(self.path)
        names = {our.format(i): hf.format(i) for our, hf in HF_NAMES.items() for i in blocks}
        shapes = {names[our]: w.shape for our, w in self.model.state_dict().items()}
        self.second_head = files.pop("lm_head.weight", None) if self.model.config.tied else None
        found = [name for name in files if not name.endswith("rotary_emb.inv_freq")]
        check_names(path, shapes, found)
        self.sources = {our: (files[names[our]], names[our]) for our in self.model.state_dict()}
        for _ in self.tensors(self.sources):  # are their shapes right?
            pass
        modules = {k.removesuffix(".weight"): x for k, x in shapes.items() if k.endswith(".weight")}
        self.lora = read_lora(lora, modules) if lora else {}

    def tensors(self, names):
        """Yields (name, tensor) as they are in the files: mapped into memory, but not read yet."""
        shapes = {name: weight.shape for name, weight in self.model.state_dict().items()}
        for file in sorted({self.sources[name][0] for name in names}):
            with open_weights(file) as f:
                for name in (n for n in names if self.sources[n][0] == file):
                    yield name, read_tensor(f, *self.sources[name], shapes[name])

    def read(self, start, stop):
        """Read what the model still lacks of blocks start .. stop - 1, of the embedding if start is
        0, and of norm and head if stop is n_layers: each tensor once, into `dtype` on `device`, the
        adapter merged in fp32."""
        last, tied = stop == self.model.config.n_layers, self.model.config.tied
        parts = [f"layers.{i}." for i in range(start, stop)]
        parts += ["tok_embeddings."] * (start == 0 or last and tied) + ["norm.", "output."] * last
        lacking = [name for name, weight in self.model.state_dict().items() if weight.is_meta]
        weights = {}
        for name, tensor in self.tensors([n for n in lacking if n.startswith(tuple(parts))]):
            module = self.sources[name][1].removesuffix(".weight")
            if module in self.lora:
                scale, *tensors = self.lora[module]
                W, A, B = (x.to(self.device, torch.float32) for x in (tensor, *tensors))
                tensor = W + scale * (B @ A)
            weights[name] = tensor.to(self.device, self.dtype)
        if self.second_head and "tok_embeddings.weight" in weights:
            self.check_second_head(weights["tok_embeddings.weight"])
        self.model.load_state_dict(weights, strict=False, assign=True)

    def check_second_head(self, embedding):
        """Some tools save a tied head all the same; transformers unties one that differs."""
        with open_weights(self.second_head) as f:
            head = read_tensor(f, self.second_head, "lm_head.weight", embedding.shape)
        if not torch.equal(head.to(self.device, self.dtype), embedding):
            raise ValueError(
                f"{self.path}: tie_word_embeddings is set, but lm_head.weight is another"
            )

    @contextmanager
    def hold(self, i):
        """Inside, the model has block i, with the embedding if i is 0; then their memory is given
        back."""
        self.read(i, i + 1)
        yield
        self.model.layers[i].to("meta")
        if not self.model.config.tied:
            self.model.tok_embeddings.to("meta")


def load(path, dtype=torch.float32, device="cpu", lora=None):
    """The frozen model of the Hugging Face checkpoint in folder `path`, whole: see Checkpoint."""
    checkpoint = Checkpoint(path, dtype, device, lora)
    checkpoint.read(0, checkpoint.model.config.n_layers)
    return checkpoint.model


# ---- Generation ----------------------------------------------------------------------------------


def sample(logits, temperature, top_p, u):
    """Next ids (B,) for logits (B, vocab_size) and one uniform number a row, u (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # keep the fewest tokens that hold top_p together
    total = probs.cumsum(-1)
    return ids.gather(-1, (total < u * total[:, -1:]).sum(-1, keepdim=True)).squeeze(-1)


def side_by_side(lengths, device):
    """Positions (1, T) and masks of prompts behind one another in one row, see `Llama.blocks`."""
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    causal = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=device).tril()
    return positions, [causal[:n, :n] for n in lengths]


def prefill(model, prompts, cache, steer):
    """Run prompts, lists of token ids, into the cache, aligned at the right: the residual stream
    after the last block at the last token of each, (B, dim). steer: {layer: (B, 1, dim)}.

    They run behind one another, without padding, as pairs do in training; up to the first layer
    that is steered, a prompt that several rows have runs once.
    """
    n_layers, device = model.config.n_layers, model.device
    first = min(steer, default=n_layers - 1)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    row = torch.arange(len(prompts), device=device).repeat_interleave(lengths)  # of each token

    # 1. what the rows share
    different = list(dict.fromkeys(map(tuple, prompts)))
    ends = itertools.accumulate(map(len, different))
    begins = {p: end - len(p) for p, end in zip(different, ends, strict=True)}
    spans = [torch.arange(len(p), device=device) + begins[tuple(p)] for p in prompts]
    origin = torch.cat(spans)  # of each token of the rows, its place among the different prompts
    positions, masks = side_by_side(lengths.tolist(), device)
    columns = positions[0] + (lengths.max() - lengths)[row]
    cache.cells = origin, row, columns
    h = model.embed(torch.tensor([[*itertools.chain(*different)]], device=device))
    h = model.blocks(h, 0, first + 1, *side_by_side([len(p) for p in different], device), cache)

    # 2. each row, with its vector
    steer = {layer: v[row, 0] for layer, v in steer.items()}  # (T, dim)
    h = h[:, origin]
    if first in steer:
        h = (h + steer[first]).type_as(h)
    cache.cells = slice(None), row, columns
    h = model.blocks(h, first + 1, n_layers, positions, masks, cache, steer)
    cache.cells, cache.length = None, max(map(len, prompts))
    return h[0, lengths.cumsum(0) - 1]


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, eos_id, steer=None, temperature=0.0, top_p=1.0, seed=0):
    """`generate`, as it goes: after each step, {row: new id} of the rows that had not ended."""
    B, longest, device = len(prompts), max(map(len, prompts)), model.device
    n_layers = model.config.n_layers
    check_steer(steer, n_layers)
    check_length(longest + max_new_tokens, model.config.max_seq_len)
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1]")
    steer = {layer: v.to(device).expand(B, 1, -1) for layer, v in (steer or {}).items()}
    cache = KVCache(model, B, longest + max_new_tokens)
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)  # (B,), at the left
    u = torch.rand(B, max_new_tokens, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(B)  # the prompts still in the batch
    going = torch.ones(B, dtype=torch.bool)  # which of them have not ended
    h = prefill(model, prompts, cache, steer)  # (B, dim)
    for step in range(max_new_tokens):
        tokens = sample(model.head(h), temperature, top_p, u[rows, step, None].to(device))
        new = tokens.cpu()
        yield dict(zip(rows[going].tolist(), new[going].tolist(), strict=True))
        going &= new != eos_id
        if not going.any() or step == max_new_tokens - 1:
            return
        if going.float().mean() < 0.75:  # rows leave in groups, for each time copies the cache
            on = going.to(device)
            cache.keep(on)
            rows, tokens, pad, going = rows[going], tokens[on], pad[on], going[going]
            steer = {layer: v[on] for layer, v in steer.items()}
        mask = None
        if pad.any():
            keys = torch.arange(cache.length + 1, device=device)
            mask = (keys >= pad[:, None])[:, None, None]  # (B, 1, 1, S)
        positions = (cache.length - pad)[:, None]
        h = model.embed(tokens[:, None])
        h = model.blocks(h, 0, n_layers, positions, mask, cache, steer)[:, 0]


def generate(
    model, prompts, max_new_tokens, eos_id, steer=None, temperature=0.0, top_p=1.0, seed=0
):
    """Continue prompts, lists of token ids whose lengths may differ: the new ids of each, EOS last
    unless max_new_tokens came first.

    steer: {layer: tensor broadcastable to (B, 1, dim)}, one vector for all prompts or one for each,
    added at every position of prompt and answer. temperature 0 is greedy. Row i depends on its
    prompt, its vector, the seed, max_new_tokens and i, not on the other rows. Raises ValueError if
    the context could be exceeded.
    """
    answers = [[] for _ in prompts]
    options = (max_new_tokens, eos_id, steer, temperature, top_p, seed)
    for new in stream(model, prompts, *options):
        for row, token in new.items():
            answers[row].append(token)
    return answers
