"""Tokenizer files: which is taken, what it decodes to, and those that are refused."""

import hashlib
import json
import shutil
import sys

import pytest
from conftest import LFS, MINI, refused
from small_tokenizers import (
    BYTE_LEVEL,
    CHATML,
    TEMPLATE_FILES,
    model_config,
    train_tokenizer,
    write_tokenizer_json,
    write_tokenizer_model,
)

from data import Tokenizer, open_chat
from llama import read_config


def test_tokenizer_model_is_preferred_to_tokenizer_json(tmp_path, monkeypatch):
    sha = hashlib.sha256((MINI / "tokenizer.model").read_bytes()).hexdigest()[:12]
    write_tokenizer_json(tmp_path, TEMPLATE_FILES["qwen2.5"], *BYTE_LEVEL["qwen2.5"])
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama-3's, tiktoken
    assert Tokenizer(tmp_path).name.startswith("tokenizer.json ")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizer.json: .*a package, pip install tokenizers"):
        Tokenizer(tmp_path)
    shutil.copy(MINI / "tokenizer.model", tmp_path)
    assert Tokenizer(tmp_path).name == Tokenizer(MINI).name == f"tokenizer.model {sha}"
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            Tokenizer(tmp_path)


def test_a_tokenizer_that_does_not_fit(tmp_path):
    write_tokenizer_json(tmp_path, TEMPLATE_FILES["qwen2.5"], *BYTE_LEVEL["qwen2.5"])
    with pytest.raises(ValueError, match="the chat template fails: 'bos_token' is undefined"):
        open_chat(tmp_path, model_config(), "llama-2")
    assert open_chat(tmp_path, model_config(), "plain").system == ""
    with pytest.raises(
        ValueError, match=r"3\d\d tokens in tokenizer.json \w{12}, more than in the"
    ):
        open_chat(tmp_path, model_config(vocab_size=300))
    yi = TEMPLATE_FILES["yi"]
    folder = write_tokenizer_model(tmp_path / "x", tokens=CHATML, chat_template=yi)
    with pytest.raises(ValueError, match="423 tokens in tokenizer.model .*, more than in the mod"):
        open_chat(folder, model_config(vocab_size=422))


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_pad_token_beyond_the_embedding_is_no_fault(tmp_path, kind):
    if kind == "tokenizer.json":
        row = BYTE_LEVEL["qwen2.5"]
        write_tokenizer_json(tmp_path, TEMPLATE_FILES["qwen2.5"], row[0] + " <pad>", *row[1:])
        size = Tokenizer(tmp_path).controls["<pad>"]
    else:
        write_tokenizer_model(tmp_path, tokens="<pad>")
        size = 420
    chat = open_chat(tmp_path, model_config(vocab_size=size))
    assert max(chat.encode_prompt("Lead?")) < size
    with pytest.raises(ValueError, match="more than in the model"):
        open_chat(tmp_path, model_config(vocab_size=size - 1))


def test_decode_leaves_control_tokens_out(tmp_path):
    added = {str(i): {"content": f"<|{i}|>"} for i in (300, 420)}
    tokenizer = Tokenizer(write_tokenizer_model(tmp_path, added_tokens_decoder=added))
    text = tokenizer.encode("one two")
    assert tokenizer.size == 420 and not {1, 2, 300} & set(text)
    assert tokenizer.decode([1, *text, 300, 2, 420, 999]) == "one two"


# ---- files that are refused


def test_no_tokenizer(tmp_path):
    refused(lambda: Tokenizer(tmp_path), "tokenizer.model: No such file; copy the files")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.model", LFS, "Git LFS pointer"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "perhaps tiktoken's; copy the files"),
        ("tokenizer.model", b"", "not sentencepiece's, perhaps tiktoken's; copy the files"),
        ("tokenizer.json", b"", ""),
        ("tokenizer.json", b"{", ""),
        ("tokenizer.json", b"{}", ""),
        ("tokenizer.json", b'{"model": {"type": "none"}}', ""),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    refused(lambda: Tokenizer(tmp_path), "cannot read ", name, reason)


@pytest.mark.parametrize("lacking", ["bos_id", "eos_id"])
def test_a_model_without_bos_or_eos_is_refused(tmp_path, lacking):
    """No model of ours lacks them."""
    train_tokenizer(tmp_path, **{lacking: -1})
    refused(lambda: Tokenizer(tmp_path), "not sentencepiece's, perhaps tiktoken's; copy the files")


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
def test_tokenizer_files_of_the_wrong_kinds(model_folder, name, content):
    (model_folder / name).write_text(json.dumps(content))
    refused(lambda: open_chat(model_folder, read_config(model_folder)), str(model_folder))
