"""data.py bake: the steered model as an ordinary checkpoint."""

import json
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import MINI, ROOT, names_in, refused, run_main, tokens_of
from safetensors.torch import load_file
from test_checkpoints import as_pickle, change_config, change_tensors, shard
from test_families import FAMILIES, make, shrunk

import data
from data import save_vector
from llama import generate, load, read_config

BAKED = {
    "llama": FAMILIES["Llama-2-7b-chat"],
    "llama 3, scaled": FAMILIES["Llama-3.1-8B-Instruct"],
    "llama, attention_bias": FAMILIES["Llama-2-7b-chat"] | {"attention_bias": True},
    "llama, tied": FAMILIES["SmolLM2-135M-Instruct"],
    "mistral": FAMILIES["Mistral-7B-Instruct-v0.2"],
    "mistral, window": FAMILIES["Mistral-7B-Instruct-v0.1"],
    "qwen2": FAMILIES["Qwen2-7B-Instruct"],
    "qwen2, tied": FAMILIES["Qwen2.5-0.5B"],
}


def bake(model, out, *specs):
    run_main(data.main, "bake", "--model", model, "--vector", *specs, "--out", out)


def vector_file(path, **by_layer):
    """A vector file, of vectors layer0=v and so on, with metadata as bipo.py writes them."""
    vectors = {int(name.removeprefix("layer")): v for name, v in by_layer.items()}
    norms = {layer: 2 * v.norm().item() for layer, v in vectors.items()}
    metadata = {"base_model": "mini", "stream_norms": json.dumps(norms)}
    save_vector(path, vectors, metadata)
    return path


@pytest.fixture
def one(tmp_path, vector):
    return vector_file(tmp_path / "one.safetensors", layer1=vector)


def theirs(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def hooked(model, layer, v):
    """transformers' model with v added after a block."""
    model.model.layers[layer].register_forward_hook(
        lambda block, args, out: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
    )
    return model


# ---- it is the steered model


@pytest.mark.parametrize("name", BAKED)
def test_transformers_runs_the_steered_model(tmp_path, name):
    """And so do we; greedy ids are equal too."""
    fields = shrunk(BAKED[name]) | {"eos_token_id": None, "pad_token_id": None}
    make(tmp_path / "model", fields)
    dim = read_config(tmp_path / "model").dim
    v = torch.randn(dim, generator=torch.Generator().manual_seed(1))
    file = vector_file(tmp_path / "v.safetensors", layer0=v)
    bake(tmp_path / "model", tmp_path / "baked", f"{file}:-0.7")

    plain = theirs(tmp_path / "model")
    tokens = tokens_of(2, 40)
    unsteered = plain(tokens).logits
    steered = hooked(plain, 0, -0.7 * v)
    baked = theirs(tmp_path / "baked")
    ours = load(tmp_path / "baked")
    expected = steered(tokens).logits
    assert baked.config.model_type == "llama"
    assert (baked(tokens).logits - expected).abs().max() <= 1e-5
    assert (ours(tokens) - expected).abs().max() <= 1e-5
    assert (expected - unsteered).abs().max() > 0.1

    how = {"max_new_tokens": 30, "do_sample": False}
    ids = steered.generate(tokens, **how)
    assert torch.equal(baked.generate(tokens, **how), ids)
    assert generate(ours, tokens.tolist(), 30, eos_id=-1) == ids[:, 40:].tolist()


@pytest.mark.parametrize("name", ["Llama-2-7b-chat", "Mistral-7B-Instruct-v0.1", "Qwen2.5-0.5B"])
def test_a_config_that_is_silent_is_baked_as_what_it_means(tmp_path, name):
    """The defaults of Llama are others than those of Mistral and Qwen2."""
    fields = shrunk(FAMILIES[name])
    for default in ("rms_norm_eps", "max_position_embeddings", "rope_theta", "head_dim"):
        fields.pop(default, None)
    if fields["model_type"] != "llama":
        fields |= {"num_attention_heads": 64, "hidden_size": 256}
        fields.pop("num_key_value_heads")
    dim = fields["hidden_size"]
    theirs_steered = hooked(make(tmp_path / "model", fields), 1, torch.ones(dim))
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))  # transformers filled it
    file = vector_file(tmp_path / "v.safetensors", layer1=torch.ones(dim))
    bake(tmp_path / "model", tmp_path / "baked", file)
    tokens = tokens_of(1, 30)
    expected = theirs_steered(tokens).logits
    assert (theirs(tmp_path / "baked")(tokens).logits - expected).abs().max() <= 1e-5


def test_weights_in_16_bits_stay_and_the_biases_are_in_fp32(model_folder, tmp_path, one, vector):
    change_tensors(model_folder, lambda w: w.update({name: x.bfloat16() for name, x in w.items()}))
    bake(model_folder, tmp_path / "baked", one)
    first, last = sorted((tmp_path / "baked").glob("*.safetensors"))
    assert first.samefile(model_folder / "model.safetensors")  # a link takes no space
    biases = load_file(last)
    assert {x.dtype for x in biases.values()} == {torch.float32} and len(biases) == 4 * 3
    tokens = tokens_of(1, 20)
    expected = load(model_folder)(tokens, steer={1: vector})
    assert (load(tmp_path / "baked")(tokens) - expected).abs().max() <= 1e-5
    baked = theirs(tmp_path / "baked", dtype=torch.float32)(tokens).logits
    assert (baked - expected).abs().max() <= 1e-5


def test_sums_and_several_layers(tmp_path, vector):
    first = vector_file(tmp_path / "first.safetensors", layer1=vector)
    second = vector_file(tmp_path / "second.safetensors", layer1=vector.flip(0), layer3=vector)
    bake(MINI, tmp_path / "baked", f"{first}:2", f"{second}:-0.5")
    steer = {1: 2 * vector - 0.5 * vector.flip(0), 3: -0.5 * vector}
    tokens = tokens_of(1, 20)
    expected = load(MINI)(tokens, steer=steer)
    assert (load(tmp_path / "baked")(tokens) - expected).abs().max() <= 1e-5


def test_baking_twice_adds(tmp_path, one, vector):
    other = vector_file(tmp_path / "other.safetensors", layer1=vector.flip(0), layer2=vector)
    bake(MINI, tmp_path / "once", one)
    bake(tmp_path / "once", tmp_path / "twice", other)
    bake(MINI, tmp_path / "both", one, other)
    tokens = tokens_of(1, 20)
    assert torch.equal(load(tmp_path / "twice")(tokens), load(tmp_path / "both")(tokens))
    assert (theirs(tmp_path / "twice")(tokens).logits - load(MINI)(
        tokens, steer={1: vector + vector.flip(0), 2: vector}
    )).abs().max() <= 1e-5  # fmt: skip
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) == 2  # no old biases
    bake(tmp_path / "once", tmp_path / "undone", f"{one}:-1")
    assert torch.equal(load(tmp_path / "undone")(tokens), load(MINI)(tokens))


def test_a_baked_model_can_be_steered_again(tmp_path, one, vector):
    bake(MINI, tmp_path / "baked", one)
    tokens = tokens_of(1, 20)
    again = load(tmp_path / "baked")(tokens, steer={1: vector})
    assert (again - load(MINI)(tokens, steer={1: 2 * vector})).abs().max() <= 1e-5


def test_alternatives_need_a_layer(tmp_path, vector):
    file = tmp_path / "all.safetensors"
    vectors = {layer: vector * (layer + 1) for layer in range(4)}
    save_vector(file, vectors, {"alternatives": "a vector for each layer"})
    refused(
        lambda: data.load_sum([str(file)]), "for each of the layers [0, 1, 2, 3]: --layer takes"
    )
    args = ["--model", MINI, "--vector", file, "--out", tmp_path / "baked", "--layer", 2]
    run_main(data.main, "bake", *args)
    biases = load_file(tmp_path / "baked" / "model-00002-of-00002.safetensors")
    changed = [name for name, bias in biases.items() if bias.any()]
    assert changed == ["model.layers.2.mlp.down_proj.bias"]
    assert torch.equal(biases[changed[0]], 3 * vector)


# ---- the folder


def test_what_goes_along(model_folder, tmp_path, one):
    """The files of a checkpoint, but no others, with the mode of any new file."""
    shard(model_folder)
    for name in ("generation_config.json", "chat_template.jinja", "token", "notes.txt", ".env"):
        (model_folder / name).write_text("{}")
        (model_folder / name).chmod(0o600)
    (tmp_path / "new").touch()
    bake(model_folder, tmp_path / "baked", one)
    files = names_in(tmp_path / "baked")
    weights = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    expected = {"README.md", "chat_template.jinja", "config.json", "generation_config.json"}
    expected |= {*weights, "model.safetensors.index.json"}
    tokenizer = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    assert set(files) - tokenizer == expected
    mode = (tmp_path / "new").stat().st_mode
    assert (tmp_path / "baked" / "chat_template.jinja").stat().st_mode == mode
    assert (tmp_path / "baked" / weights[3]).stat().st_mode == mode
    assert not [name for name in names_in(tmp_path) if name.startswith(".part-")]


def test_only_config_and_weights_are_needed(model_folder, tmp_path, one):
    for file in model_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    bake(model_folder, tmp_path / "baked", one)
    assert "tokenizer.model" not in names_in(tmp_path / "baked")
    load(tmp_path / "baked")


def test_where_nothing_can_be_linked_it_is_copied(tmp_path, one, monkeypatch):
    def refuse(source, target):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    bake(MINI, tmp_path / "baked", one)
    first, _ = sorted((tmp_path / "baked").glob("*.safetensors"))
    assert first.read_bytes() == (MINI / "model.safetensors").read_bytes()
    assert not first.samefile(MINI / "model.safetensors")


def test_the_config_has_what_older_programs_read(tmp_path):
    """And keeps the model's fields."""
    fields = shrunk(FAMILIES["Llama-3.1-8B-Instruct"])
    make(tmp_path / "model", fields)  # as transformers 5 saves it
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "rope_theta" not in before and "rope_scaling" not in before
    dim = read_config(tmp_path / "model").dim
    bake(
        tmp_path / "model",
        tmp_path / "baked",
        vector_file(tmp_path / "v.gguf", layer1=torch.ones(dim)),
    )
    after = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert after["rope_theta"] == 500000.0 and after["architectures"] == ["LlamaForCausalLM"]
    assert after["rope_scaling"]["rope_type"] == "llama3"
    for name, value in before.items():
        assert name == "mlp_bias" or after[name] == value


def test_the_readme_says_what_was_baked(tmp_path, one, capsys):
    bake(MINI, tmp_path / "baked", f"{one}:-0.5")
    text = (tmp_path / "baked" / "README.md").read_text()
    assert text.startswith(f"# mini, steered by {one}:-0.5\n")
    assert "(25.00% of |h|)" in text and "base_model  mini" in text
    assert "are fixed" in text and "SGLang" in text and "eval.py chat" in text
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'baked'}\n" in printed and "(25.00% of |h|)" in printed


def test_the_length_of_a_sliding_window_is_said(tmp_path, capsys):
    fields = shrunk(FAMILIES["Mistral-7B-Instruct-v0.1"])
    make(tmp_path / "model", fields)
    dim = read_config(tmp_path / "model").dim
    file = vector_file(tmp_path / "v.safetensors", layer1=torch.ones(dim))
    bake(tmp_path / "model", tmp_path / "baked", file)
    assert "note: max_position_embeddings becomes 4096" in capsys.readouterr().out
    after = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert after["max_position_embeddings"] == 4096 and "sliding_window" not in after


# ---- whole or not at all


def test_a_folder_that_is_there_stays(tmp_path, one, fails):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("there", "link", "file"):
        args = ["bake", "--model", MINI, "--vector", one, "--out", tmp_path / name]
        fails(data.main, args, f"{name} is there: name a new folder")
    assert names_in(tmp_path / "there") == [] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("broken", ["shutil.copyfile", "safetensors.torch.save_file", "json.dumps"])
def test_a_failure_leaves_nothing(tmp_path, one, monkeypatch, broken):
    def full(*args, **how):
        raise OSError("disk full")

    monkeypatch.setattr(broken, full)
    with pytest.raises((SystemExit, OSError)):
        bake(MINI, tmp_path / "baked", one)
    assert names_in(tmp_path) == ["one.safetensors"]


def test_a_kill_leaves_no_folder_of_that_name(tmp_path, one):
    """And what it leaves does not disturb the next run."""
    code = "import os, signal, shutil, sys; import data\n"
    code += "shutil.copyfile = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "data.main(sys.argv[1:])"
    words = ["bake", "--model", MINI, "--vector", one, "--out", tmp_path / "baked"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert names_in(tmp_path) == [".part-baked", "one.safetensors"]
    bake(MINI, tmp_path / "baked", one)
    assert names_in(tmp_path) == ["baked", "one.safetensors"]


# ---- what cannot be baked


def test_models_that_cannot_be_baked_are_refused_with_the_reason(tmp_path, one, fails, capsys):
    make(tmp_path / "model", shrunk(FAMILIES["Qwen3-8B"]))
    capsys.readouterr()  # transformers' progress
    args = ["bake", "--model", tmp_path / "model", "--vector", one, "--out", tmp_path / "baked"]
    fails(data.main, args, "qwen3 cannot be baked: its MLP has no biases, and Llama")
    assert not (tmp_path / "baked").exists()


def test_vectors_that_do_not_fit_are_refused(tmp_path, fails):
    wide = vector_file(tmp_path / "wide.safetensors", layer1=torch.ones(33))
    high = vector_file(tmp_path / "high.safetensors", layer4=torch.ones(32))
    for file, part in (
        (wide, "layer 1 is torch.float32 [33]"),
        (high, "no layer 4: the model has"),
    ):
        args = ["bake", "--model", MINI, "--vector", file, "--out", tmp_path / "baked"]
        fails(data.main, args, part)
        assert not (tmp_path / "baked").exists()


def test_no_file_is_rewritten(model_folder, tmp_path, one, fails):
    """A bias that stands among other weights would stay there under the same name."""
    args = ["bake", "--model", model_folder, "--vector", one, "--out", tmp_path / "baked"]
    change_config(model_folder, mlp_bias=True)
    biases = {}
    for i in range(4):
        for part, width in (("gate", 88), ("up", 88), ("down", 32)):
            biases[f"model.layers.{i}.mlp.{part}_proj.bias"] = torch.ones(width)
    change_tensors(model_folder, lambda w: w.update(biases))
    fails(data.main, args, "bias stands in a file with other weights")
    change_config(model_folder, mlp_bias=False)
    change_tensors(model_folder, lambda w: [w.pop(name) for name in biases])
    as_pickle(model_folder)
    fails(data.main, args, "only weights in safetensors can be baked")
    assert not (tmp_path / "baked").exists()
