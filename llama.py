"""Llama in one file: forward pass with a slot for steering vectors, packing, loading, generation.

    model = load("path/to/checkpoint", dtype=torch.bfloat16, device="cuda")
    answers = generate(model, prompts, max_new_tokens=64, eos_id=2, steer={15: 2.0 * v})

The steering vector of layer L is added to the residual stream *after* block L, counted from 0. That
place is `hidden_states[L + 1]` in transformers and `direction.L` in a llama.cpp control vector.

Architecture: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; rotary embedding: Su et al.
2021, https://arxiv.org/abs/2104.09864. Mistral is the same network; Qwen2 adds biases to q, k, v.
Weights are read as Hugging Face saves them; logits equal transformers' (tests/test_llama.py,
tests/test_families.py). Needs torch and safetensors, nothing else of this project. MIT licence.

Notation: B batch, T tokens of this pass, S keys (cached + T), H heads, K kv heads, D head_dim.
"""

import json
import math
import pickle
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file


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
    rope_scaling: tuple = ()  # the numbers that ROPE_SCALING lists for one of its kinds
    qkv_bias: bool = False
    max_seq_len: int = 4096  # tokens; longer input is refused
    tied: bool = False  # the head is the embedding, transposed
    family: str = "llama"  # a key of FAMILIES

    def __post_init__(self):
        limits = {int: 10**7, float: math.inf}  # far above any model's
        for name, value in asdict(self).items():
            kind = type(self).__annotations__[name]
            limit = 1000 if name == "n_layers" else limits.get(kind)
            if type(value) is not kind or (limit and not 0 < value < limit):
                raise ValueError(f"{name} = {value!r} is not a possible {kind.__name__}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(f"n_kv_heads must divide n_heads, and head_dim be even: {self}")
        low, high = self.rope_scaling[1:3] or (1, 2)
        if not all(0 < x < math.inf for x in self.rope_scaling) or low >= high:
            raise ValueError(f"rope_scaling {self.rope_scaling} needs numbers > 0 and low < high")


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


def rope_tables(positions, config, dtype):
    """cos and sin of -angle | angle = position * frequency, (..., T) -> (..., 1, T, D) in `dtype`.
    They are made anew in each pass, because `.to(torch.bfloat16)` would round a stored table."""
    D, scaling = config.head_dim, config.rope_scaling
    channel = torch.arange(0, D, 2, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (channel.to(dtype) / D)
    if len(scaling) == 1:  # rope_type "linear": every frequency is divided by the factor
        frequency = frequency / scaling[0]
    if len(scaling) == 4:  # "llama3": only those that turn seldom within the first context are
        factor, low, high, length = scaling
        kept = ((frequency * length / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / factor
    angle = positions[..., None] * frequency
    angle = torch.cat((-angle, angle), dim=-1).unsqueeze(-3)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channel i with channel i + D/2: Hugging Face's layout (Meta's files: 2i with 2i + 1)."""
    y = x.to(cos.dtype)
    return (y * cos + y.roll(y.shape[-1] // 2, -1) * sin).type_as(x)


def attend(xq, xk, xv, mask):
    """(B, H, T, D), (B, K, S, D) twice -> (B, H, T, D); causal if mask is None."""
    causal, grouped = mask is None and xq.shape[2] > 1, xk.shape[1] < xq.shape[1]
    return F.scaled_dot_product_attention(xq, xk, xv, mask, is_causal=causal, enable_gqa=grouped)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):
        heads = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        xq, xk, xv = (each.transpose(1, 2) for each in heads)  # (B, H, T, D), (B, K, T, D) twice
        xq, xk = rotate(xq, cos, sin), rotate(xk, cos, sin)
        if cache:
            xk, xv = cache.extend(layer, xk, xv)  # (B, K, S, D)
        if isinstance(mask, list):  # packed pairs do not see each other: one attention each
            sizes = [len(pair_mask) for pair_mask in mask]
            pairs = zip(*(x.split(sizes, dim=2) for x in (xq, xk, xv)), mask, strict=True)
            out = torch.cat([attend(q, k, v, m.to(x.device)) for q, k, v, m in pairs], dim=2)
        else:
            out = attend(xq, xk, xv, mask)
        return self.wo(out.transpose(1, 2).flatten(-2))  # (B, T, dim)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias=False)

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


def add_vector(h, v):
    """The slot: the residual stream h (B, T, dim) steered by v, which is broadcast to its shape. An
    fp32 vector is added to a 16-bit stream in fp32."""
    return (h + v).type_as(h)


class KVCache:
    """Keys and values of the tokens seen so far, kv (2, n_layers, B, K, max_len, D), `length` of
    them filled."""

    def __init__(self, model, batch_size, max_len):
        c = model.config
        shape = (2, c.n_layers, batch_size, c.n_kv_heads, max_len, c.head_dim)
        self.kv, self.length = model.norm.weight.new_zeros(shape), 0  # finite where masked

    def extend(self, layer, xk, xv):
        """Append (B, K, T, D) twice at `length`; returns all so far, (2, B, K, S, D)."""
        kv = self.kv[:, layer, :, :, : self.length + xk.shape[2]]
        kv[:, :, :, self.length :] = torch.stack((xk, xv))
        return kv

    def take(self, rows):
        """Go on with the rows of these numbers, in this order; one may be taken several times."""
        self.kv = self.kv[:, :, rows]


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def device(self):
        """Where the weights are. Those not yet read, see Checkpoint, are nowhere."""
        return next(w.device for w in self.parameters() if not w.is_meta)

    def embed(self, tokens):
        """Token ids (B, T) -> the residual stream before block 0, (B, T, dim)."""
        return self.tok_embeddings(tokens)

    def blocks(self, h, start, stop, positions=None, mask=None, cache=None, steer=None):
        """Run blocks start .. stop - 1 on the residual stream h, (B, T, dim) -> (B, T, dim).

        positions: (T,) or (B, T); by default they count on from the cache's end.
        mask: bool, broadcastable to (B, H, T, S), True where a query sees a key; causal by default.
            Or a list of square masks, as `pack` makes them: T is cut into pieces of their sizes,
            which do not see each other.
        cache: a KVCache, read and extended; the last block advances its length.
        steer: {layer: v broadcastable to (B, T, dim)}; layers that are not run are left out.
        """
        past, T, device = cache.length if cache else 0, h.shape[1], h.device
        if positions is None:
            positions = torch.arange(past, past + T, device=h.device)
        if mask is None and past and T > 1:  # query i stands at past + i and sees keys up to there
            mask = torch.ones(T, past + T, dtype=torch.bool, device=h.device).tril(past)
        cos, sin = rope_tables(positions, self.config, wide(h.dtype))
        for i in range(start, stop):
            where = self.layers[i].ffn_norm.weight.device  # the block's card, see `place`
            h, cos, sin = h.to(where), cos.to(where), sin.to(where)
            h = self.layers[i](h, cos, sin, mask, cache, i)
            if steer and i in steer:
                h = add_vector(h, steer[i].to(where))
        if cache and stop == self.config.n_layers:
            cache.length += T
        return h.to(device)

    def head(self, h):
        """The residual stream after the last block (..., dim) -> logits (..., vocab_size) in fp32,
        or in fp64 in a model of fp64."""
        weight = self.tok_embeddings.weight if self.config.tied else self.output.weight
        return F.linear(self.norm(h), weight).to(wide(h.dtype))

    def forward(self, tokens, positions=None, mask=None, cache=None, steer=None):
        """Token ids (B, T) -> logits (B, T, vocab_size). For the other arguments see `blocks`.
        Raises ValueError for a layer that is not there and for input longer than the context."""
        past, stop = cache.length if cache else 0, self.config.n_layers
        check_fit(self.config, steer or {}, past + tokens.shape[1])
        return self.head(self.blocks(self.embed(tokens), 0, stop, positions, mask, cache, steer))


def check_fit(config, layers, n_tokens):
    """Raises ValueError if the model lacks one of the layers, or if its context is shorter."""
    for layer in layers:
        if not 0 <= layer < config.n_layers:
            raise ValueError(f"no layer {layer}: the model has layers 0..{config.n_layers - 1}")
    if n_tokens > config.max_seq_len:
        raise ValueError(f"{n_tokens} tokens exceed the model's context of {config.max_seq_len}")


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


def length(ids):
    """Tokens of `prompt | response | response ...`, a PairIds or any tuple of lists like it."""
    return sum(map(len, ids))


class Batch(NamedTuple):
    """Pairs behind one another in one row of T tokens, without padding; R response tokens."""

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
    tokens, positions = torch.tensor([tokens, positions], device=device)
    predictors, targets = torch.tensor([predictors, targets], device=device)
    return Batch(tokens[None], positions[None], masks, predictors, targets, lengths)


# ---- Checkpoints as Hugging Face saves them ------------------------------------------------------

# The families that this file implements, and what transformers assumes where their config.json is
# silent.
FAMILIES = {
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(max_position_embeddings=32768, num_key_value_heads=32),
}

CONFIG_NAMES = dict(  # ours: Hugging Face's
    dim="hidden_size", n_layers="num_hidden_layers", norm_eps="rms_norm_eps", family="model_type",
    n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", hidden_dim="intermediate_size",
    head_dim="head_dim", vocab_size="vocab_size", tied="tie_word_embeddings",
)  # fmt: skip

ROPE_SCALING = {  # rope_type: its numbers
    "default": [],
    "linear": ["factor"],
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings".split(),
}

# Fields that do not change what is computed here. Any other field that `parse_config` does not use
# is refused by name, for it could mean another network. sliding_window is Mistral's alone; Qwen2's
# is off unless use_sliding_window is set, which is refused.
INERT_FIELDS = """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id
    chunk_size_feed_forward do_sample dtype eos_token_id id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id max_length max_window_layers output_attentions
    output_hidden_states pad_token_id pretraining_tp return_dict sliding_window temperature
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_cache
""".split()
SWITCHED_OFF = "attention_bias mlp_bias rope_interleaved use_mrope use_sliding_window".split()

HF_NAMES = dict(  # ours: Hugging Face's
    tok_embeddings="embed_tokens", output="lm_head",
    attention_norm="input_layernorm", ffn_norm="post_attention_layernorm",
    attention="self_attn", wq="q_proj", wk="k_proj", wv="v_proj", wo="o_proj",
    feed_forward="mlp", w1="gate_proj", w2="down_proj", w3="up_proj",
)  # fmt: skip


def hf_name(name):
    """'layers.0.attention.wq.weight' -> 'model.layers.0.self_attn.q_proj.weight'."""
    parts = [HF_NAMES.get(part, part) for part in name.split(".")]
    return ".".join(parts if parts[0] == "lm_head" else ["model", *parts])


def regular(path):
    """The path of a file that a user or a checkpoint names. Raises ValueError for a folder, a pipe
    or a device, and for what is known to stand under other files' names."""
    if not path.is_file():
        raise ValueError("it is a folder, a pipe or a device" if path.exists() else "No such file")
    with path.open("rb") as file:
        start = file.read(20)
    if start.startswith(b"version https://git-"):
        raise ValueError("it is a Git LFS pointer instead of the file, which `git lfs pull` brings")
    if start.startswith(b"PAR1"):
        raise ValueError("it is a Parquet file; write it as .jsonl, for example with pandas")
    return path


def parse_json(text):
    """The value that a text in JSON holds. Raises ValueError for any other text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply: maximum recursion depth exceeded") from None


def read_json(file):
    """The object in a JSON file. Raises ValueError, with the file's name, for anything else."""
    try:
        value = parse_json(regular(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"cannot read {file}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def read_config(path):
    """The Config of the checkpoint in folder `path`. Raises ValueError for a field that is missing,
    malformed or not implemented."""
    file = Path(path) / "config.json"
    if not file.is_file() and Path(path, "params.json").is_file():
        raise ValueError(f"{path} holds Meta's files; take the checkpoint in Hugging Face's format")
    fields = read_json(file)
    try:
        return parse_config(fields)
    except KeyError as e:
        raise ValueError(f"{file} lacks the field {e}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(f"{file}: {e}") from None


def parse_config(fields):
    """A Config from the fields of a config.json; a missing one is a KeyError."""
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not implemented; {', '.join(FAMILIES)} are")
    fields = {name: x for name, x in (FAMILIES[family] | fields).items() if x is not None}
    n_heads = fields["num_attention_heads"]
    silent = dict(num_key_value_heads=n_heads, head_dim=fields["hidden_size"] // n_heads)
    fields = dict(rms_norm_eps=1e-6, tie_word_embeddings=False) | silent | fields
    # Each field that is used is popped. Vicuna's max_sequence_length includes its scaling. Within
    # Mistral's sliding window attention is full attention; longer input is refused.
    longest = fields.pop("max_sequence_length", fields.pop("max_position_embeddings"))
    if family == "mistral":
        longest = min(longest, fields.pop("sliding_window", longest))
    ours = {our: fields.pop(name) for our, name in CONFIG_NAMES.items()} | take_rope(fields)
    config = Config(**ours, max_seq_len=longest, qkv_bias=family == "qwen2")
    plain = {"hidden_act": "silu", "layer_types": ["full_attention"] * config.n_layers}
    plain |= dict.fromkeys(SWITCHED_OFF, False)
    for name, value in fields.items():
        if name not in INERT_FIELDS and plain.get(name) != value:
            raise ValueError(f"{name} = {value!r} is not implemented; delete it if it does nothing")
    return config


def take_rope(fields):
    """Pop the rotary fields of a config.json; return Config's two arguments for them."""
    rope = {"rope_theta": fields.pop("rope_theta", 10000.0)}  # where transformers 4 has it
    rope = rope | fields.pop("rope_scaling", {}) | fields.pop("rope_parameters", {})  # 4 | 5
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ROPE_SCALING or rope.keys() != set(ROPE_SCALING[kind]):
        raise ValueError(f"rope_scaling, rope_parameters: {kind!r} with {rope} is not implemented")
    scaling = tuple(float(rope[name]) for name in ROPE_SCALING[kind])
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def weight_files(path):
    """The files that hold the weights of the checkpoint in folder `path`."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(x)).name != x for x in shards.values()):
                raise ValueError(f"{index} lacks the field 'weight_map': names of files beside it")
            return [path / shard for shard in sorted(set(shards.values()))]
    raise ValueError(f"{path} holds no model.safetensors, no pytorch_model.bin and no index of one")


def is_plain(x):
    """Is this a tensor whose numbers stand one by one in memory: not sparse, nested, on meta?"""
    return torch.is_tensor(x) and x.layout == torch.strided and not (x.is_nested or x.is_meta)


def open_weights(file):
    """{name: tensor} of a file of safetensors or, if its name ends in .bin, of torch.save. Tensors
    are mapped into memory, which reads nothing yet; code in a pickle is not run."""
    try:
        if regular(file).suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(action="ignore"):
            weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {str(name): x for name, x in weights.items() if is_plain(x)}
    except pickle.UnpicklingError:
        raise ValueError(f"{file} could run code, so it is not read; take safetensors") from None
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(f"cannot read {file}: {e}".split("\n")[0]) from None


def place(name, start, stop, devices):
    """The device of a weight: blocks start .. stop - 1 are laid over the devices in order, in runs
    that differ by at most one block. Embedding, norm and head are on the first, where the stream
    comes in and comes out; `Llama.blocks` hands it on."""
    i = name.split(".")[1]  # the block's number, or "weight" of what is no block
    return devices[(int(i) - start) * len(devices) // (stop - start) if i.isdecimal() else 0]


class Checkpoint:
    """The Hugging Face checkpoint in folder `path`, opened: config, names and shapes are checked,
    the weights are not read yet. Raises ValueError with the name of a tensor that is missing, left
    over or of the wrong shape; see also `read_config`.

    more: further devices, over which `read` lays the blocks that it reads at once, see `place`.
    model: the frozen Llama. What `read` has not brought yet is on torch's meta device and takes no
    memory. Only training and `first_pass` may use several devices: a KVCache is on one.
    """

    def __init__(self, path, dtype=torch.float32, device="cpu", more=()):
        self.dtype, self.devices = dtype, [device, *more]
        config, tensors, self.files = read_config(path), {}, {}
        for file in weight_files(Path(path)):
            tensors = open_weights(file) | tensors  # of two of one name the first counts
            self.files |= dict.fromkeys(tensors.keys() - self.files.keys(), file)
        # As in transformers 5, a head that was saved all the same is not tied.
        config = replace(config, tied=config.tied and "lm_head.weight" not in tensors)
        with torch.device("meta"):
            self.model = Llama(config).eval().requires_grad_(False)
        shapes = {hf_name(our): tuple(w.shape) for our, w in self.model.state_dict().items()}
        for name in sorted(shapes.keys() ^ tensors.keys()):
            if not name.endswith("rotary_emb.inv_freq"):  # old files carry this table
                fault = "lacks the tensor" if name in shapes else "has the unknown tensor"
                raise ValueError(f"{path} {fault} {name}")
        for name, shape in shapes.items():
            x = tensors[name]
            if x.shape != shape or not x.is_floating_point():
                raise ValueError(f"{path}: {name} is {x.dtype} {tuple(x.shape)}, not float {shape}")

    def read(self, start, stop):
        """Read what the model still lacks of blocks start .. stop - 1, -1 being the embedding, and
        of norm and head if stop is n_layers, into `dtype` on `device`."""
        parts = [f"layers.{i}." for i in range(start, stop)] + ["tok_embeddings."] * (start < 0)
        if stop == self.model.config.n_layers:
            parts += ["norm.", "tok_embeddings." if self.model.config.tied else "output."]
        lacking = [name for name, weight in self.model.state_dict().items() if weight.is_meta]
        names = {hf_name(our): our for our in lacking if our.startswith(tuple(parts))}
        weights = {}
        for file in {self.files[name] for name in names}:
            for name, x in open_weights(file).items():
                if name in names and self.files[name] == file:
                    device = place(names[name], start, stop, self.devices)
                    weights[names[name]] = x = x.to(device, self.dtype)
                    if not torch.stack(x.aminmax()).isfinite().all():
                        raise ValueError(f"{file}: {name} holds NaN or infinity in {self.dtype}")
        self.model.load_state_dict(weights, strict=False, assign=True)

    @contextmanager
    def hold(self, i):
        """Inside this context the model has block i, or the embedding if i is -1; afterwards its
        memory is given back. A tied embedding stays, for it is the head."""
        self.read(i, i + 1)
        yield
        if i >= 0:
            self.model.layers[i].to("meta")
        elif not self.model.config.tied:
            self.model.tok_embeddings.to("meta")


def load(path, dtype=torch.float32, device="cpu"):
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
    drawn = (total < u * kept.amax(-1, keepdim=True)).sum(-1, keepdim=True)
    return ids.gather(-1, drawn).squeeze(-1)


def prefill(model, prompts, max_len, steer):
    """Fill a cache with prompts, lists of token ids, right-aligned. Returns it and the stream after
    the last block at the last token of each, (B, dim).

    steer: {layer: (B, 1, dim)}. A prompt of several rows runs once up to the first steered layer.
    Padding moves the positions of a row, which changes nothing: rotary embedding is relative.
    """
    n_layers, longest, device = model.config.n_layers, max(map(len, prompts)), model.device
    first, cache = min(steer, default=n_layers - 1), KVCache(model, len(prompts), max_len)
    last = model.norm.weight.new_empty(len(prompts), model.config.dim)
    for prompt in dict.fromkeys(map(tuple, prompts)):
        rows = [i for i, other in enumerate(prompts) if tuple(other) == prompt]
        start, one = longest - len(prompt), KVCache(model, 1, len(prompt))
        positions = torch.arange(start, longest, device=device)
        h = model.embed(torch.tensor([prompt], device=device))
        h = model.blocks(h, 0, first + 1, positions, cache=one)
        one.take([0] * len(rows))
        if steer:  # from here on it has its rows
            h = add_vector(h, steer[first][rows])
        above, one.length = {layer: v[rows] for layer, v in steer.items()}, 0
        h = model.blocks(h, first + 1, n_layers, positions, cache=one, steer=above)
        cache.kv[:, :, rows, :, start:longest] = one.kv
        last[rows] = h[:, -1]
    cache.length = longest
    return cache, last


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, eos_id, steer=None, temperature=0, top_p=1, seed=0):
    """`generate`, step by step: yields {row: new id} of the rows that had not ended."""
    B, longest, device = len(prompts), max(map(len, prompts)), model.device
    check_fit(model.config, steer or {}, longest + max_new_tokens)
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1]")
    steer = {layer: v.to(device).expand(B, 1, -1) for layer, v in (steer or {}).items()}
    u = torch.rand(B, max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = torch.arange(B, device=device)  # the prompts still in the batch
    going = torch.ones(B, dtype=torch.bool, device=device)  # which of them have not ended
    pad = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    cache, h = prefill(model, prompts, longest + max_new_tokens, steer)
    for step in range(max_new_tokens):
        tokens = sample(model.head(h), temperature, top_p, u[rows, step, None])
        yield dict(zip(rows[going].tolist(), tokens[going].tolist(), strict=True))
        going &= tokens != eos_id
        if not going.any() or step == max_new_tokens - 1:
            return
        if going.float().mean() < 0.75:  # rows leave in groups, for each time copies the cache
            left = going.nonzero()[:, 0]
            cache.take(left)
            rows, tokens, pad, going = rows[left], tokens[left], pad[left], going[left]
            steer = {layer: v[left] for layer, v in steer.items()}
        keys = torch.arange(cache.length + 1, device=device)
        mask = (keys >= pad[:, None])[:, None, None] if pad.any() else None  # (B, 1, 1, S)
        h = model.embed(tokens[:, None])
        h = model.blocks(h, 0, model.config.n_layers, mask=mask, cache=cache, steer=steer)[:, 0]


def generate(model, prompts, max_new_tokens, eos_id, steer=None, temperature=0, top_p=1, seed=0):
    """Continue prompts, lists of token ids whose lengths may differ: the new ids of each, EOS last
    unless max_new_tokens came first.

    steer: {layer: tensor broadcastable to (B, 1, dim)}, one vector for all prompts or one for each,
    added at every position of prompt and answer. temperature 0 is greedy. Row i depends on its
    prompt, its vector, the seed, max_new_tokens and i, not on the other rows. Raises ValueError if
    the context could be exceeded.
    """
    answers = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, eos_id, steer, temperature, top_p, seed):
        for row, token in new.items():
            answers[row].append(token)
    return answers
