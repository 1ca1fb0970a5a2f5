"""Files as people have them: what they mean, or one line that says what they are and what to do."""

import gzip
import json
import os
import re
import shutil
import time

import pytest
import safetensors.torch
import torch
from conftest import MINI, jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import llama
from data import read_pairs

ONE = {"prompt": "Lead?", "chosen": "Yes, gladly.", "rejected": "No, never."}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
SAID = [{"role": "user", "content": "Lead?"}, {"role": "assistant", "content": "Yes."}]


def refused(reader, *parts):
    began = time.time()
    with pytest.raises(ValueError) as e:
        reader()
    for part in parts:
        assert part in str(e.value)
    assert time.time() - began < 10


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        # rendered already: TRL's issues 1640 and 1752
        (ONE | {"prompt": "<|im_start|>user\nLead?<|im_end|>\n"}, "a prompt holds a chat template"),
        (ONE | {"prompt": "<s>[INST] Lead? [/INST]"}, "a prompt holds a chat template"),
        (ONE | {"prompt": "[INST] Lead? [/INST]"}, "a prompt holds a chat template"),
        ({"chosen": "<|user|>\nLead? Yes", "rejected": "<|user|>\nLead? No"}, "a chat template"),
        (ONE | {"chosen": "Yes.</s>", "rejected": "No.</s>\n"}, "each answer ends in </s>"),
        (ONE | {"chosen": "Yes.<|im_end|>", "rejected": "No.</s>"}, "answer ends in <|im_end|>"),
        # another column could be the prompt
        *[
            ({"chosen": "I would lead.", "rejected": "I would not.", name: value}, f"['{name}']")
            for name, value in {
                "context": "Will you?",
                "history": [["Lead?", "Yes."]],
                "conversations": [{"from": "human", "value": "Lead?"}],
                "topic": "你愿意领导吗",
                "ask": "Lead?",
            }.items()
        ],
        # messages written out as text
        (ONE | {"chosen": str(SAID), "rejected": json.dumps(SAID)}, "messages written out"),
        ({"question": "Q", "correct_answers": "['a' 'b']", "incorrect_answers": "c"}, "written"),
        (
            {"question": "Q", "correct_answers": "a;" * 999, "incorrect_answers": "b;" * 999},
            "10,000",
        ),
        (ONE | {"prompt": "\ud83d"}, "surrogates not allowed"),
    ],
)
def test_records_that_are_refused(tmp_path, record, reason):
    refused(lambda: read_pairs(jsonl(tmp_path / "x.jsonl", record)), "x.jsonl", reason)


def test_a_text_that_mentions_a_control_token_stays_text(tmp_path):
    rows = [ONE | {"prompt": "What does </s> mean?", "chosen": "End</s>"}, ONE | {"prompt": "<s>x"}]
    assert [pair.prompt for pair in read_pairs(jsonl(tmp_path / "x.jsonl", *rows))][1] == "<s>x"


@pytest.mark.parametrize("name", ["System", "system_prompt", "SYSTEM PROMPT", "system_message"])
def test_a_system_prompt_is_found_by_any_name(tmp_path, name):
    (pair,) = read_pairs(jsonl(tmp_path / "x.jsonl", ONE | {name: "Be brief."}))
    assert pair.prompt[0] == ("system", "Be brief.")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", LFS, "Git LFS pointer"),
        ("x.parquet", b"PAR1\x15\x04", "Parquet"),
        ("x.csv", b"prompt;chosen;rejected\na;b;c\n", "the separator must be a comma"),
        ("x.csv", b"prompt\tchosen\trejected\na\tb\tc\n", "the separator must be a comma"),
        ("x.csv", b"sep=,\nprompt,chosen,rejected\na,b,c\n", "the separator must be a comma"),
        ("x.json", b'{"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}', "one object"),
        ("x.json", b"[" * 100_000, "recursion"),
        ("x.jsonl", b'{"a":' * 100_000, "recursion"),
        ("x.jsonl", b'{"prompt": "a", "prompt": "b"}', "one key twice"),
        ("x.jsonl.gz", gzip.compress(b"\n" * 2**26), "holds more than 19 MiB"),
        ("x.jsonl.gz", gzip.compress(b"{}")[:-9], "cannot read"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_pairs(tmp_path / name), name, reason)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").symlink_to("/dev/zero")
    (tmp_path / "z.jsonl").mkdir()
    for name in ("x.jsonl", "y.jsonl", "z.jsonl"):
        for read in (read_pairs, data.load_vector, llama.read_json):
            if not (name == "z.jsonl" and read is data.load_vector):  # a folder of a run
                refused(lambda read=read, name=name: read(tmp_path / name), "a folder, a pipe or")


def test_long_fields_and_headings(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,chosen,rejected\n{'a' * 200_000},b,c\n")
    assert len(read_pairs(tmp_path / "x.csv")[0].prompt) == 200_000
    sides = {"answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    for filling in ("_" * 60_000, "\n" * 100_000, " " * 60_000, "w" * 60_000, "\n_" * 50_000):
        began, record = time.time(), {"question": f"Q?\n{filling}x\n (A) Yes\n (B) No", **sides}
        read_pairs(jsonl(tmp_path / "x.jsonl", record))
        assert time.time() - began < 2


@settings(max_examples=300, deadline=None)
@given(
    st.text("a Q?\n_*-:", max_size=9), st.sampled_from(["", "Choices:", "\n**Answer options**\n"])
)
def test_a_heading_is_found_as_by_one_expression(text, heading):
    """The expression that says what a heading is, the last line; it may take very long."""
    blank = r"((?!\n)[\W_])*"
    wanted = rf"(?i)\n{blank}(\w+ )?(choice|option|answer|response)s?{blank}$"
    question = f"Why?\n{text}\n{heading}"
    ((prompt, *_),) = data.spelled_out(f"{question}\n (A) y\n (B) n", ["(A)"], ["(B)"])
    assert prompt == re.sub(wanted, "", question.rstrip()).strip()


def test_too_long_pairs_are_dropped_and_counted(mini, tmp_path, capsys):
    _, chat = mini
    rows = [ONE, ONE | {"prompt": "word " * 600}, ONE | {"chosen": "No,  never."}]
    file = jsonl(tmp_path / "x.jsonl", *rows)
    advice = "bad records: 1; --skip-bad drops them"
    refused(lambda: read_pairs(file, False, chat, 512), f"{file}:2: too long", advice)
    kept = read_pairs(file, True, chat, 512)
    assert [pair.ids for pair in kept] == [chat.encode_pair(pair) for pair in kept]
    assert len(kept) == 2 and "dropped 1 too long" in capsys.readouterr().out

    # One answer of TruthfulQA's makes its record too long.
    record = {
        "Question": "Lead?",
        "Correct Answers": "No; " + "a" * 900,
        "Incorrect Answers": "Yes",
    }
    file = jsonl(tmp_path / "y.jsonl", record, ONE)
    assert len(read_pairs(file)) == 3 and len(read_pairs(file, True, chat, 512)) == 1


# ---- checkpoints


@pytest.fixture
def model(tmp_path):
    shutil.copytree(MINI, tmp_path / "model")
    return tmp_path / "model"


def change(model, **fields):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("value", [10**9, 10**5, 9999, 10**18, int("9" * 400), True, -1, 1.0])
@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_numbers_that_no_model_has(model, name, value):
    change(model, **{name: value})
    refused(lambda: llama.Checkpoint(model))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", ".", "a/b.safetensors"])
def test_shards_outside_the_checkpoint(model, name):
    weights = safetensors.torch.load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(weights, name)})
    (model / "model.safetensors.index.json").write_text(index)
    refused(lambda: llama.Checkpoint(model), "model")


def test_links_as_in_the_cache_are_followed(model):
    (model / "model.safetensors").rename(model.parent / "blob")
    (model / "model.safetensors").symlink_to("../blob")
    assert llama.load(model).config.n_layers


def test_weights_that_are_not_finite_or_plain(model):
    file, name = model / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    weights = safetensors.torch.load_file(file)
    for value, dtype in ((float("nan"), torch.float32), (1e30, torch.float16)):
        weights[name][0, 0] = value
        safetensors.torch.save_file(weights, file)
        refused(lambda dtype=dtype: llama.load(model, dtype), str(file), name, "NaN or infinity")
    file.unlink()
    for wrong in (weights[name].to("meta"), weights[name].to_sparse()):
        torch.save(weights | {name: wrong}, model / "pytorch_model.bin")
        refused(lambda: llama.load(model), name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": None}}}),
        ("tokenizer_config.json", {"bos_token": 7}),
        ("tokenizer_config.json", {"chat_template": [1]}),
        ("tokenizer_config.json", {"chat_template": 7}),
        ("added_tokens.json", {"<x>": "1"}),
        ("added_tokens.json", {"<x>": -1}),
    ],
)
def test_tokenizer_files_of_the_wrong_kinds(model, name, content):
    (model / name).write_text(json.dumps(content))
    refused(lambda: data.open_chat(model, llama.read_config(model)), "model")


def test_a_folder_without_a_tokenizer_says_what_to_do(model):
    (model / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    refused(lambda: data.Tokenizer(model), "perhaps tiktoken's; copy the files")
    (model / "tokenizer.model").write_bytes(LFS)
    refused(lambda: data.Tokenizer(model), "Git LFS pointer")
    (model / "tokenizer.model").unlink()
    refused(lambda: data.Tokenizer(model), "tokenizer.model: No such file; copy the files")
