"""Every family we claim, as a miniature of its real config.json, against transformers and peft."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import MINI, run_main, tokens_of

import bipo
import llama
from data import load_vector
from llama import Config, load, read_config

# The fields of each config.json that say what is computed, as they stand there: those left out are
# left out there too, and so are nulls, but where a null matters.
LLAMA = dict(model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, pretraining_tp=1)
LLAMA |= dict(num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)
LLAMA |= dict(vocab_size=32000, tie_word_embeddings=False, rope_scaling=None, use_cache=True)
LLAMA_3 = LLAMA | dict(num_key_value_heads=8, rope_theta=500000.0, vocab_size=128256)
LLAMA_3 |= dict(attention_bias=False, mlp_bias=False, eos_token_id=[128001, 128008, 128009])
LLAMA_3_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3")
LLAMA_3_ROPE |= dict(original_max_position_embeddings=8192)
MISTRAL = dict(model_type="mistral", hidden_act="silu", rms_norm_eps=1e-5, vocab_size=32000)
MISTRAL |= dict(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
MISTRAL |= dict(tie_word_embeddings=False, use_cache=True)
QWEN = dict(model_type="qwen2", hidden_act="silu", rms_norm_eps=1e-6, attention_dropout=0.0)
QWEN |= dict(use_sliding_window=False, max_position_embeddings=32768, rope_theta=1000000.0)
QWEN_3 = QWEN | dict(model_type="qwen3", head_dim=128, max_position_embeddings=40960)
QWEN_3 |= dict(rope_scaling=None, sliding_window=None, vocab_size=151936, attention_bias=False)
SMOL = LLAMA | dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192)
SMOL |= dict(rope_theta=100000, tie_word_embeddings=True, is_llama_config=True, vocab_size=49152)
FAMILIES = {
    "Llama-2-7b-chat": LLAMA,
    "Llama-2-7b-chat, early": LLAMA | dict(rms_norm_eps=1e-6, max_position_embeddings=2048),
    "Llama-2-13b-chat": LLAMA | dict(num_attention_heads=40, num_key_value_heads=40),
    "Llama-2-70b-chat": LLAMA | dict(num_attention_heads=64, num_key_value_heads=8),
    "vicuna-7b-v1.5": LLAMA | dict(max_length=4096, pad_token_id=0, torch_dtype="float16"),
    "vicuna-7b-v1.5-16k": LLAMA
    | dict(max_sequence_length=16384, rope_scaling={"factor": 4.0, "type": "linear"}),
    "CodeLlama-7b-Instruct": LLAMA
    | dict(rope_theta=1000000, max_position_embeddings=16384, vocab_size=32016),
    "Yi-6B-Chat": LLAMA | dict(num_key_value_heads=4, rope_theta=5000000.0, vocab_size=64000),
    "Yi-1.5-6B-Chat": LLAMA | dict(num_key_value_heads=4, rope_theta=5e6, rms_norm_eps=1e-6),
    "TinyLlama-1.1B-Chat-v1.0": LLAMA
    | dict(num_key_value_heads=4, rope_theta=10000.0, max_position_embeddings=2048),
    "Mistral-7B-Instruct-v0.1": MISTRAL | dict(rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-Instruct-v0.2": MISTRAL | dict(rope_theta=1000000.0, sliding_window=None),
    "Mistral-7B-Instruct-v0.3": MISTRAL
    | dict(rope_theta=1000000.0, sliding_window=None, vocab_size=32768),
    "zephyr-7b-beta": MISTRAL | dict(rope_theta=10000.0, sliding_window=4096, pad_token_id=2),
    "Meta-Llama-3-8B-Instruct": LLAMA_3 | dict(max_position_embeddings=8192),
    "Llama-3.1-8B-Instruct": LLAMA_3
    | dict(max_position_embeddings=131072, rope_scaling=LLAMA_3_ROPE | {"factor": 8.0}),
    "Llama-3.2-1B-Instruct": LLAMA_3
    | dict(max_position_embeddings=131072, rope_scaling=LLAMA_3_ROPE | {"factor": 32.0})
    | dict(tie_word_embeddings=True, head_dim=64),
    "SmolLM2-135M-Instruct": SMOL
    | {
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    },
    "Qwen2-7B-Instruct": QWEN
    | dict(num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)
    | dict(sliding_window=131072, max_window_layers=28, tie_word_embeddings=False),
    "Qwen3-0.6B": QWEN_3
    | dict(num_attention_heads=16, num_key_value_heads=8, hidden_size=1024)
    | dict(max_window_layers=28, tie_word_embeddings=True),
    "Qwen3-8B": QWEN_3
    | dict(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    | dict(max_window_layers=36, tie_word_embeddings=False),
    "Qwen2.5-0.5B": QWEN
    | dict(num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, use_mrope=False)
    | dict(sliding_window=32768, max_window_layers=24, tie_word_embeddings=True),
}


def shrunk(fields):
    """Two blocks, two key/value heads of 16 channels and a small vocabulary; all else stays, but
    that rope_scaling's context shrinks so that 300 tokens and 8 frequencies meet all its bands."""
    heads = 2 * fields["num_attention_heads"] // fields["num_key_value_heads"]
    small = dict(num_attention_heads=heads, num_key_value_heads=2, hidden_size=16 * heads)
    small |= dict(num_hidden_layers=2, intermediate_size=48, vocab_size=97, initializer_range=0.1)
    for name in {"pad_token_id", "eos_token_id"} & fields.keys():
        small[name] = 0
    if "head_dim" in fields:
        small["head_dim"] = 16
    if fields.get("rope_scaling", None) and "low_freq_factor" in fields["rope_scaling"]:
        small["rope_scaling"] = fields["rope_scaling"] | {"original_max_position_embeddings": 256}
    return fields | small


def make(folder, fields):
    """A random model of transformers, saved in `folder` under this config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.eval().requires_grad_(False).named_parameters():
        if "norm" in name or "bias" in name:  # 1 and 0 at first
            weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers(tmp_path, name):
    fields = shrunk(FAMILIES[name])
    theirs = make(tmp_path, fields)
    rewritten = read_config(tmp_path)  # as transformers 5 saves it, no field silent
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = load(tmp_path)
    assert ours.config == rewritten
    tokens = tokens_of(1, 300)
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() <= 1e-4
    assert expected.std() > 0.1  # there is something to compare
    limit = fields.get("max_sequence_length", fields["max_position_embeddings"])
    if fields["model_type"] == "mistral":
        limit = fields["sliding_window"] or limit
    with pytest.raises(ValueError, match=f"exceed the model's context of {limit}"):
        ours(torch.zeros(1, limit + 1, dtype=torch.long))


def test_a_silent_config_means_what_transformers_takes_it_to_mean(tmp_path):
    for name in ("Llama-2-7b-chat", "Mistral-7B-Instruct-v0.1", "Qwen2-7B-Instruct", "Qwen3-8B"):
        fields = shrunk(FAMILIES[name])
        told = {"model_type", "hidden_size", "num_attention_heads", "num_hidden_layers"}
        told |= {"intermediate_size", "vocab_size"}
        fields = {k: v for k, v in fields.items() if k in told} | {"num_attention_heads": 64}
        (tmp_path / "config.json").write_text(json.dumps(fields | {"hidden_size": 1024}))
        silent = read_config(tmp_path)
        transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert silent == read_config(tmp_path)


@pytest.mark.parametrize("name", ["Qwen2-7B-Instruct", "Qwen3-8B"])
def test_qwens_window_is_off(tmp_path, name):
    fields = shrunk(FAMILIES[name]) | {"sliding_window": 64}
    theirs = make(tmp_path, fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tokens = tokens_of(1, 100)
    assert (load(tmp_path)(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


def test_llama_3_bands_are_all_met():
    plain = Config(16, 1, 1, 1, 16, 48, 97, rope_theta=500000.0)
    scaled = replace(plain, rope_scaling=(8.0, 1.0, 4.0, 256.0))
    angles = []
    for config in (plain, scaled):  # of position 1, which are the frequencies
        _, sin = llama.rope_tables(torch.tensor([1]), config, torch.float32)
        angles.append(sin[0, 0, 8:].asin())
    frequency = 1 / 500000 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(angles[0][1:], frequency[1:], rtol=1e-4)
    ratio = angles[1] / angles[0]
    assert ratio[0] == ratio[1] == 1 and 0.13 < ratio[2] < 0.9
    assert torch.allclose(ratio[3:], torch.tensor(1 / 8), rtol=1e-4)


# ---- other networks


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "phi3"}, "'phi3' is not implemented; llama, mistral, qwen2, qwen3 are"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not implemented; llama, mistral, "),
        ({"attention_bias": True}, "attention_bias = True is not implemented"),
        ({"mlp_bias": True}, "mlp_bias = True is not implemented"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = ["),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, change, part):
    fields = shrunk(FAMILIES["Qwen2-7B-Instruct"]) | change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"config.json: .*{re.escape(part)}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["Llama-2-7b-chat", "Qwen3-8B"])
def test_biases_that_the_config_asks_for_count(tmp_path, name):
    fields = shrunk(FAMILIES[name]) | {"attention_bias": True}
    if name == "Llama-2-7b-chat":
        fields["mlp_bias"] = True
    theirs = make(tmp_path, fields)
    tokens = tokens_of(1, 30)
    assert (load(tmp_path)(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


# ---- adapters

# As in tests/experiments/README.md.
MERGE = """\
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("base", dtype="auto")
model = PeftModel.from_pretrained(model, "adapter").merge_and_unload()
model.save_pretrained("merged")
for pattern in ("*token*", "chat_template*"):  # the tokenizer's files and the chat template
    for file in Path("base").glob(pattern):
        shutil.copy(file, "merged")
"""


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """These lines have run: the folders base, adapter and merged, and peft's own model."""
    import peft  # takes seconds

    shutil.copytree(MINI, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(MINI)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True)
    adapted = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # it is 0 at first
            weight.data.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    exec(MERGE, {})
    return tmp_path, adapted.eval()


def test_merged_checkpoint_has_pefts_logits(merged):
    folder, adapted = merged
    tokens = tokens_of(1, 40)
    expected = adapted(tokens).logits
    assert (load(folder / "merged")(tokens) - expected).abs().max() <= 1e-4
    assert (load(folder / "base")(tokens) - expected).abs().max() > 0.1


def test_training_on_a_merged_checkpoint(merged):
    folder, _ = merged
    norms = []
    for name in ("base", "merged"):
        args = ["--model", name, "--data", MINI / "train.csv", "--val", MINI / "test.csv"]
        args += ["--layer", 1, "--epochs", 1, "--warmup-steps", 1, "--out", f"run-{name}"]
        run_main(bipo.main, *args)
        vectors, metadata = load_vector(folder / f"run-{name}")
        assert metadata["base_model"] == name
        norms.append(vectors[1].norm().item())
    assert min(norms) > 0 and norms[0] != norms[1]
