"""Checkpoints: found by name, read whole or block by block, and those that are refused."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import MINI, refused, tokens_of
from safetensors.torch import load_file, save_file
from small_tokenizers import model_config

import llama
from data import ALIASES, Tokenizer, find_model, open_chat
from llama import Config, Llama, load, parse_config, read_config

# ---- models by name


def cached(home, hub_id, *revisions, main):
    """A repository as huggingface_hub lays it out: the files are links to blobs."""
    repo = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(main)
    (repo / "blobs").mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(MINI / name, repo / "blobs" / f"0{name[0]}")
        for revision in revisions:
            (repo / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
            (repo / "snapshots" / revision / name).symlink_to(f"../../blobs/0{name[0]}")
    return repo / "snapshots" / main


def test_models_are_found_by_folder_alias_and_hub_id(tmp_path, monkeypatch):
    """In the cache as huggingface_hub looks it up; nothing is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_id = "meta-llama/Llama-2-7b-chat-hf"
    assert set(ALIASES) == {"llama2-7b-chat", "mistral-7b-instruct"}
    for name, advice in (
        ("llama2-7b-chat", f"no folder, nor in the cache; hf download {hub_id}"),
        ("tpyo", "hf download tpyo"),
        ("a/b/c", "hf download a/b/c"),
        ("no/such", "hf download no/such"),
    ):
        refused(lambda name=name: find_model(name), f"no model '{name}': ", advice)

    snapshot = cached(tmp_path, hub_id, "abc", "def", main="def")
    for name in ("llama2-7b-chat", "Llama2-7B-chat", hub_id):
        assert find_model(name) == (snapshot, hub_id)
    assert find_model(snapshot)[0] == snapshot and find_model(MINI) == (MINI, "mini")
    assert Tokenizer(snapshot).name == Tokenizer(MINI).name

    vicuna = cached(tmp_path, "lmsys/vicuna-7b-v1.5", "123", main="123")
    assert open_chat(vicuna, model_config()).template == "vicuna"
    cached(tmp_path, "a/gone", "1", main="2")  # a download that was interrupted
    refused(lambda: find_model("a/gone"), "no model 'a/gone': no folder, nor in the cache")

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: find_model(hub_id), "needs a package, pip install huggingface_hub")


def test_a_download_that_left_files_out_is_found(tmp_path, monkeypatch):
    """hf download --exclude "original/*": the cache's list of the repository names more files."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = cached(tmp_path, "acme/crew-chat", commit, main=commit)
    file = TreeCacheEntry(size=1, blob_id="x", lfs_sha256=None, lfs_size=None, xet_hash=None)
    files = {"config.json": file, "original/consolidated.00.pth": file}
    write_tree_cache(str(snapshot.parent.parent), commit, files)
    assert find_model("acme/crew-chat") == (snapshot, "acme/crew-chat")


# ---- weights


def change_tensors(folder, edit):
    """Rewrite the checkpoint's file after edit({name: tensor})."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def shard(folder, stem="model", suffix=".safetensors", save=save_file):
    """Put the tensors of model.safetensors into three files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"{stem}-{i}{suffix}" for i in range(3)]
    weight_map = {name: files[i % 3] for i, name in enumerate(sorted(weights))}
    for file in files:
        here = [name for name, place in weight_map.items() if place == file]
        save({name: weights[name] for name in here}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def test_sharded_equals_whole(model_folder):
    shard(model_folder)
    tokens = tokens_of(1, 8)
    assert torch.equal(load(model_folder)(tokens), load(MINI)(tokens))


def test_of_two_tensors_of_one_name_the_first_files_counts(model_folder):
    shard(model_folder)
    first, last = model_folder / "model-0.safetensors", model_folder / "model-2.safetensors"
    name = min(load_file(first))
    save_file(load_file(last) | {name: torch.zeros(1)}, last)
    tokens = tokens_of(1, 8)
    assert torch.equal(load(model_folder)(tokens), load(MINI)(tokens))


Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(Q), f"lacks the tensor {Q}"),
        (lambda w: w.update({Q: torch.zeros(32, 31)}), rf"{Q} .*\(32, 31\).*\(32, 32\)"),
        (lambda w: w.update({Q: torch.zeros(32, 32, dtype=torch.int8)}), f"{Q} .*int8"),
        (lambda w: w.update({Q + "_g": torch.zeros(1)}), f"has the unknown tensor {Q}_g"),
    ],
)
def test_odd_tensors_are_refused_by_name(model_folder, edit, message):
    """Before any of them is read into memory."""
    change_tensors(model_folder, edit)
    with pytest.raises(ValueError, match=message):
        llama.Checkpoint(model_folder)


def test_tensors_that_the_index_does_not_list_are_unknown(model_folder):
    shard(model_folder)
    file = model_folder / "model-1.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"has the unknown tensor .*q_proj.bias"):
        load(model_folder)


@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
def test_a_tied_checkpoint_is_read_as_transformers_reads_it(model_folder, head):
    """A head that was saved all the same counts if it differs from the embedding."""
    change_config(model_folder, tie_word_embeddings=True)
    if head == "absent":
        change_tensors(model_folder, lambda w: w.pop("lm_head.weight"))
    if head == "equal":
        change_tensors(
            model_folder,
            lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}),
        )
    if head == "alone":
        change_tensors(model_folder, lambda w: w.pop("model.embed_tokens.weight"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokens = tokens_of(1, 5)
    assert (load(model_folder)(tokens) - theirs(tokens).logits).abs().max() <= 1e-4
    is_embedding = torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert is_embedding == (head != "different")


def test_tied_head_is_the_embedding(mini):
    model, _ = mini
    tied = Llama(replace(model.config, tied=True))
    tied.load_state_dict({k: w for k, w in model.state_dict().items() if k != "output.weight"})
    h = torch.randn(1, 3, 32)
    assert torch.allclose(tied.head(h), model.norm(h) @ model.tok_embeddings.weight.T, atol=1e-5)


def test_what_is_no_fault(model_folder):
    change_tensors(
        model_folder,
        lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    load(model_folder)  # old files carry this table


def test_broken_files(model_folder):
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot read .*model.safetensors"):
        load(model_folder)
    file.unlink()
    with pytest.raises(ValueError, match="holds no model.safetensors, no pytorch_model.bin"):
        load(model_folder)


def test_index_without_a_map(model_folder):
    shard(model_folder)
    (model_folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json lacks the field 'weight_map'"):
        load(model_folder)


def test_index_that_names_a_missing_file(model_folder):
    shard(model_folder)
    (model_folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot read .*model-1.safetensors"):
        load(model_folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", ".", "a/b.safetensors"])
def test_shards_outside_the_checkpoint(model_folder, name):
    weights = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").rename(model_folder.parent / "x.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(weights, name)})
    (model_folder / "model.safetensors.index.json").write_text(index)
    refused(lambda: llama.Checkpoint(model_folder), "model")


def test_links_as_in_the_cache_are_followed(model_folder):
    (model_folder / "model.safetensors").rename(model_folder.parent / "blob")
    (model_folder / "model.safetensors").symlink_to("../blob")
    assert llama.load(model_folder).config.n_layers


def test_weights_that_are_not_finite_or_plain(model_folder):
    file, name = model_folder / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(file)
    for value, dtype in ((float("nan"), torch.float32), (1e30, torch.float16)):
        weights[name][0, 0] = value
        save_file(weights, file)
        refused(
            lambda dtype=dtype: llama.load(model_folder, dtype), str(file), name, "NaN or infinity"
        )
    file.unlink()
    for wrong in (weights[name].to("meta"), weights[name].to_sparse()):
        torch.save(weights | {name: wrong}, model_folder / "pytorch_model.bin")
        refused(lambda: llama.load(model_folder), name)


# ---- files of torch.save


def as_pickle(folder):
    """model.safetensors becomes pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_pickles_equal_safetensors(model_folder):
    tokens = tokens_of(1, 8)
    expected = load(model_folder)(tokens)
    shard(model_folder, "pytorch_model", ".bin", torch.save)
    assert torch.equal(load(model_folder)(tokens), expected)


def test_safetensors_win_over_pickles(model_folder):
    (model_folder / "pytorch_model.bin").write_bytes(b"not read")
    load(model_folder)


def mapped(file, weight):
    """Does this weight lie in the file, as mapped into memory, and not in a copy?"""
    regions = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(file)]
    ends = [[int(x, 16) for x in region[0].split("-")] for region in regions]
    return any(start <= weight.data_ptr() < end for start, end in ends)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux only")
def test_weights_of_the_files_dtype_stay_in_the_file(model_folder):
    file = str(model_folder / "model.safetensors")
    assert all(mapped(file, weight) for weight in load(model_folder).parameters())
    as_pickle(model_folder)
    file = str(model_folder / "pytorch_model.bin")
    assert all(mapped(file, weight) for weight in load(model_folder).parameters())
    assert not mapped(file, load(model_folder, torch.bfloat16).norm.weight)


class Code:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.norm.weight": Code()}, "could run code, so it is not read"),
        ({"model.norm.weight": [1.0]}, "lacks the tensor lm_head.weight"),
        ([torch.ones(3)], "cannot read .*pytorch_model.bin: "),
        ({0: torch.ones(3)}, "has the unknown tensor 0"),
        ({"model.norm.weight": torch.ones(3)}, "lacks the tensor lm_head.weight"),
        (None, "cannot read .*pytorch_model.bin: "),
    ],
)
def test_other_pickles_are_refused(model_folder, monkeypatch, content, message):
    monkeypatch.chdir(model_folder)
    as_pickle(model_folder)
    file = model_folder / "pytorch_model.bin"
    if content is None:
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message) as e:
        load(model_folder)
    assert "\n" not in str(e.value) and not (model_folder / "pwned").exists()


# ---- block by block


@pytest.fixture
def brought(monkeypatch):
    """The names of the weights that a model was given so far, in order."""
    names, load_state_dict = [], Llama.load_state_dict

    def record(model, weights, **how):
        names.extend(weights)
        return load_state_dict(model, weights, **how)

    monkeypatch.setattr(Llama, "load_state_dict", record)
    return names


@pytest.fixture(params=["untied", "tied", "pickles"])
def sharded(request, model_folder):
    """golden/mini in three shards, with a head of its own or with the embedding as head."""
    if request.param == "pickles":
        shard(model_folder, "pytorch_model", ".bin", torch.save)
        return model_folder
    if request.param == "tied":
        change_config(model_folder, tie_word_embeddings=True)
        change_tensors(model_folder, lambda w: w.pop("lm_head.weight"))
    shard(model_folder)
    return model_folder


def missing(model):
    """The first part of the names of the weights that are not in memory: 'layers.0' and so on."""
    names = [name for name, weight in model.named_parameters() if weight.is_meta]
    return {re.match(r"layers\.\d+|\w+", name)[0] for name in names}


def test_a_checkpoint_brings_each_weight_once_when_it_is_asked_for(sharded, brought):
    checkpoint = llama.Checkpoint(sharded)
    model = checkpoint.model
    every = set(model.state_dict())
    assert brought == [] and all(w.is_meta for w in model.parameters())
    checkpoint.read(-1, 1)
    assert set(brought) == {x for x in every if x.startswith(("tok_embeddings.", "layers.0."))}
    checkpoint.read(0, 3)
    assert not any(name.startswith("layers.3.") for name in brought)
    checkpoint.read(-1, 4)
    assert len(brought) == len(set(brought)) and set(brought) == every
    assert torch.equal(model(tokens_of(1, 8)), load(sharded)(tokens_of(1, 8)))
    assert not any(w.requires_grad for w in model.parameters())


def test_reading_up_to_the_last_block_brings_norm_and_head(sharded):
    checkpoint = llama.Checkpoint(sharded)
    checkpoint.read(2, 4)
    embedding = set() if checkpoint.model.config.tied else {"tok_embeddings"}
    assert missing(checkpoint.model) == {"layers.0", "layers.1"} | embedding


def test_held_blocks_give_their_memory_back(sharded):
    checkpoint = llama.Checkpoint(sharded)
    model, every = checkpoint.model, missing(checkpoint.model)
    for i, name in ((-1, "tok_embeddings"), (0, "layers.0"), (1, "layers.1")):
        with checkpoint.hold(i):
            assert missing(model) == every - {name}
        if name == "tok_embeddings" and model.config.tied:  # it is the head
            every = every - {name}
        assert missing(model) == every


def test_held_and_read_blocks_compute_what_a_whole_model_does(sharded):
    checkpoint, tokens = llama.Checkpoint(sharded), tokens_of(1, 8)
    model = checkpoint.model
    with checkpoint.hold(-1):
        h = model.embed(tokens)
    for i in (0, 1):
        with checkpoint.hold(i):
            h = model.blocks(h, i, i + 1)
    checkpoint.read(2, 4)
    assert torch.equal(model.head(model.blocks(h, 2, 4)), load(sharded)(tokens))


def test_blocks_are_placed_over_the_devices_in_order():
    def places(start, stop, *devices):
        names = [f"layers.{i}.attention.wq.weight" for i in range(max(start, 0), stop)]
        return [llama.place(name, start, stop, devices) for name in names]

    assert places(40, 80, 0, 1) == [0] * 20 + [1] * 20
    assert places(2, 7, 0, 1) == [0, 0, 0, 1, 1] and places(2, 4, 0, 1, 2) == [0, 1]
    assert places(-1, 4, 0, 1) == [0, 0, 1, 1]  # the embedding counts as one
    assert places(3, 4, 0, 1) == [0]  # what the first pass holds
    for name in ("tok_embeddings.weight", "norm.weight", "output.weight"):
        assert llama.place(name, 2, 4, ["first", "second"]) == "first"


def test_the_stream_is_handed_on_to_the_device_of_a_block(monkeypatch):
    """With block 3 on torch's meta device, attention and slot there have all they need."""
    seen, attend = [], llama.attend

    def record(*args):
        seen.append({x.device.type for x in args})
        return attend(*args)

    monkeypatch.setattr(llama, "attend", record)
    checkpoint, batch = llama.Checkpoint(MINI), llama.pack([([1, 2], [3], [4])])
    checkpoint.read(2, 4)
    model, steer = checkpoint.model, {3: torch.ones(32)}
    model.layers[3].to("meta")
    with pytest.raises(NotImplementedError, match="meta"):  # it cannot come back from there
        model.blocks(torch.zeros(1, 4, 32), 2, 4, batch.positions, batch.masks, steer=steer)
    assert seen == [{"cpu"}, {"meta"}]


# ---- config.json


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}),
        ("rope_scaling", {"type": "linear", "factor": 4.0, "low_freq_factor": 1.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("quantization_config", {"bits": 4}),
        ("quantization_config", "gptq"),
        ("auto_map", {"AutoModel": "theirs.Model"}),
        ("is_causal", False),
        ("partial_rotary_factor", 0.0),
        ("some_new_field", 3),
        ("model_type", "gemma"),
    ],
)
def test_config_fields_we_do_not_implement_are_refused_by_name(model_folder, field, value):
    change_config(model_folder, **{field: value})
    with pytest.raises(ValueError, match=rf"config.json: .*{field}"):
        load(model_folder)


def test_config_fields_are_honoured(model_folder):
    change_config(
        model_folder, model_type="mistral", sliding_window=100, head_dim=6, use_cache=False,
        rms_norm_eps=0.5, tie_word_embeddings=True, mlp_bias=False,
    )  # fmt: skip
    expected = Config(
        dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=6, hidden_dim=88, vocab_size=420,
        norm_eps=0.5, rope_theta=10000.0, max_seq_len=100, tied=True, family="mistral",
    )  # fmt: skip
    assert read_config(model_folder) == expected


def test_old_and_new_name_of_rope_theta(tmp_path):
    fields = json.loads((MINI / "config.json").read_text())
    del fields["rope_scaling"]
    old = parse_config(fields | {"rope_theta": 77.0})
    del fields["rope_theta"]
    new = parse_config(fields | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}})
    assert old == new and old.rope_theta == 77.0
    assert parse_config(fields).rope_theta == 10000.0


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "n_kv_heads must divide n_heads.*n_heads=4, n_kv_heads=3"),
        ({"num_key_value_heads": 0}, "n_kv_heads = 0 is not a possible int"),
        ({"head_dim": 7}, "head_dim be even.*head_dim=7"),
        ({"hidden_size": "32"}, "'str' and 'int'"),
        ({"num_attention_heads": 0}, "zero"),
        ({"rope_scaling": "linear"}, "'dict' and 'str'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.* 'linear' with {} is not"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_scaling .* needs numbers > 0"),
        ({"rope_scaling": LLAMA_3 | {"low_freq_factor": 4.0}}, "rope_scaling .* low < high"),
        ({"model_type": ["llama"]}, "'list'"),
        ({"vocab_size": 420.5}, "vocab_size = 420.5 is not a possible int"),
        ({"num_hidden_layers": True}, "n_layers = True is not a possible int"),
        ({"rms_norm_eps": -1.0}, "norm_eps = -1.0 is not a possible float"),
        ({"tie_word_embeddings": "false"}, "tied = 'false' is not a possible bool"),
        ({"hidden_size": None}, "lacks the field 'hidden_size'"),
    ],
)
def test_impossible_config_fields(model_folder, change, message):
    change_config(model_folder, **change)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        read_config(model_folder)


def test_broken_config_files(model_folder):
    for text in ("{", "[]", "\0"):
        (model_folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            read_config(model_folder)


@pytest.mark.parametrize("value", [10**9, 10**5, 9999, 10**18, int("9" * 400), True, -1, 1.0])
@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_numbers_that_no_model_has(model_folder, name, value):
    change_config(model_folder, **{name: value})
    refused(lambda: llama.Checkpoint(model_folder))


# ---- folders and files that hold something else


@pytest.mark.parametrize("kind", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantized_weights_are_refused_by_their_kind(model_folder, kind):
    change_config(model_folder, quantization_config={"quant_method": kind, "bits": 4})
    refused(lambda: load(model_folder), "take the checkpoint that", f"'quant_method': '{kind}'")


@pytest.mark.parametrize("name", ["qweight", "weight.absmax", "weight_scale", "weight_scale_inv"])
def test_quantized_weights_show_without_the_configs_word(model_folder, name):
    tensor = f"model.layers.0.mlp.up_proj.{name}"
    change_tensors(model_folder, lambda w: w.update({tensor: torch.ones(3)}))
    refused(lambda: load(model_folder), f"these quantized weights were made from: {tensor}")


def test_an_adapter_beside_the_weights_is_refused(model_folder):
    """transformers would load it with them, so the model would be another."""
    (model_folder / "adapter_config.json").write_text("{}")
    refused(lambda: load(model_folder), "holds an adapter; merge it: PeftModel.from_pretrained(")
    (model_folder / "config.json").unlink()
    refused(lambda: load(model_folder), "holds an adapter; merge it: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params.json", "holds Meta's files; take the checkpoint in Hugging Face's format"),
        ("model.Q4_K_M.gguf", "holds weights for llama.cpp; take the checkpoint that they"),
        ("model.onnx", "holds weights for ONNX; take the checkpoint that they were made from"),
    ],
)
def test_other_formats_are_refused_by_name(model_folder, name, message):
    (model_folder / name).write_text("{}")
    load(model_folder)  # beside the weights it may stand
    (model_folder / "model.safetensors").unlink()
    refused(lambda: load(model_folder), message)
    (model_folder / "config.json").unlink()
    refused(lambda: load(model_folder), message)
    refused(lambda: load(model_folder / name), f"{name} is a file; a model is a folder in Hugging")


# ---- where generation ends


@pytest.mark.parametrize(
    ("general", "of_generation", "expected"),
    [
        (2, None, [2]),
        ([2, 7], None, [2, 7]),
        (2, {"eos_token_id": [5, 6]}, [5, 6]),
        (2, {"eos_token_id": 5}, [5]),
        (2, {"eos_token_id": None}, []),
        (2, {}, []),
        (None, None, []),
    ],
)
def test_the_ids_that_end_an_answer_are_transformers(
    model_folder, general, of_generation, expected
):
    change_config(model_folder, eos_token_id=general)
    (model_folder / "generation_config.json").unlink(missing_ok=True)
    if of_generation is not None:
        (model_folder / "generation_config.json").write_text(json.dumps(of_generation))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder).generation_config
    in_a_list = expected[0] if len(expected) == 1 else expected
    assert theirs.eos_token_id == (in_a_list or None)
    assert llama.read_eos_ids(model_folder) == expected


@pytest.mark.parametrize("value", ["</s>", [2, None], True, -1, [[2]], 2.0, {}])
def test_what_is_no_id_ends_nothing(model_folder, value):
    change_config(model_folder, eos_token_id=value)
    (model_folder / "generation_config.json").unlink(missing_ok=True)
    refused(lambda: llama.read_eos_ids(model_folder), "config.json: eos_token_id = ", ">= 0")
