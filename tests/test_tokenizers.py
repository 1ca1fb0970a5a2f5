"""Tokenizer files: which is taken, what it decodes to, and those that are refused."""

import hashlib
import json
import shutil
import sys

import pytest
import tokenizers
from conftest import LFS, MINI, messages, refused
from small_tokenizers import (
    BYTE_LEVEL,
    CHATML,
    TEMPLATE_FILES,
    model_config,
    train_tokenizer,
    write_tokenizer_json,
    write_tokenizer_model,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from data import Chat, Pair, Tokenizer, open_chat
from llama import read_config

# ---- which file


def both_files(folder, **config):
    """A tokenizer.model, and the tokenizer.json that transformers makes of it."""
    write_tokenizer_model(folder, tokens=CHATML, chat_template=TEMPLATE_FILES["yi"], **config)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    shutil.move(folder / "saved" / "tokenizer.json", folder)
    return folder


def test_tokenizer_model_is_taken_if_it_holds_the_same_tokens(tmp_path, monkeypatch):
    sha = hashlib.sha256((MINI / "tokenizer.model").read_bytes()).hexdigest()[:12]
    folder = both_files(tmp_path)
    assert Tokenizer(folder).name == Tokenizer(MINI).name == f"tokenizer.model {sha}"
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # which is then not needed
    assert Tokenizer(folder).name == f"tokenizer.model {sha}"


def another_piece(file):
    file["model"]["vocab"]["zz"] = file["model"]["vocab"].pop("the", 400)


def another_token(file):
    file["added_tokens"].append(file["added_tokens"][-1] | {"content": "<new>", "id": 423})


@pytest.mark.parametrize("change", [another_piece, another_token])
def test_tokenizer_json_counts_if_it_holds_others(tmp_path, monkeypatch, change):
    folder = both_files(tmp_path)
    file = json.loads((folder / "tokenizer.json").read_text())
    change(file)
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert Tokenizer(folder).name.startswith("tokenizer.json ")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(lambda: Tokenizer(folder), "tokenizer.json: this needs a package, pip install tokeni")


def test_tokenizer_json_counts_beside_a_tokenizer_model_that_is_tiktokens(tmp_path):
    write_tokenizer_json(tmp_path, TEMPLATE_FILES["qwen2.5"], *BYTE_LEVEL["qwen2.5"])
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert Tokenizer(tmp_path).name.startswith("tokenizer.json ")
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        refused(lambda: Tokenizer(tmp_path), "tokenizer_config.json")


# ---- the same ids as transformers

TURNS = (("user", "Would you lead, harbour-bell?"), ("assistant", "Yes."), ("user", " And now? "))
IM = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
IM += "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BOS_IM = "{{ bos_token }}" + IM
THINKING = (  # as Qwen3's: without thoughts an answer begins with empty ones
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def small_tokenizer(folder, template=BOS_IM, tokens=None, drop="", in_map=None, **config):
    """A byte-level tokenizer.json. tokens: {added token: its flags, or None for no such token};
    drop: a key that tokenizer_config.json lacks; in_map: special_tokens_map.json."""
    write_tokenizer_json(folder, template, "<s>", "<s>", "<|im_end|>", False)
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, flags in ({"<|im_start|>": {}, "<|im_end|>": {}} | (tokens or {})).items():
        if flags is not None:
            flags = {"special": True, "normalized": False} | flags
            bpe.add_tokens([tokenizers.AddedToken(text, **flags)])
    bpe.no_truncation()
    bpe.save(str(folder / "tokenizer.json"))
    fields = {"chat_template": template, "bos_token": "<s>", "eos_token": "<|im_end|>"} | config
    fields.pop(drop, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "special_tokens_map.json").write_text(json.dumps(in_map or {}))
    return folder


WORD = {"harbour-bell": {"special": False, "normalized": True}}
SMALL = {  # what tokenizers of real checkpoints have: arguments of small_tokenizer
    "tokens that strip the blanks after them": {"tokens": {"<|im_end|>": {"rstrip": True}}},
    "tokens that strip the blanks before them": {"tokens": {"<|im_start|>": {"lstrip": True}}},
    "added words": {"tokens": WORD},
    "template tokens that are words": {"tokens": {"<|im_start|>": {"special": False}}},
    "a null BOS": {"bos_token": None},
    "an empty BOS": {"bos_token": ""},
    "BOS in special_tokens_map.json": {"drop": "bos_token", "in_map": {"bos_token": "<s>"}},
    "null in special_tokens_map.json": {"in_map": {"bos_token": None}},
    "a token in additional_special_tokens alone": {
        "tokens": {"<|im_start|>": None},
        "additional_special_tokens": ["<|im_start|>"],
    },
    "a template that can think": {"template": THINKING},
}


@pytest.mark.parametrize("kind", SMALL)
def test_ids_of_tokenizer_json(tmp_path, kind):
    folder = small_tokenizer(tmp_path, **SMALL[kind])
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    chat = open_chat(folder, model_config())
    prompt = oracle.apply_chat_template(
        messages(TURNS), add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert chat.encode_prompt(TURNS) == prompt
    answer = "No, the harbour-bell."
    ours, (response,) = chat.encode_responses(TURNS, [answer])
    both = messages([*TURNS, ("assistant", answer)])
    whole = oracle.apply_chat_template(both, return_dict=False)
    assert ours == prompt and response[-1] == chat.eos_id
    assert ours + response == whole[: len(ours + response)]


def test_ids_are_the_same_each_time(tmp_path):
    """A file may ask for dropout, which is meant for training."""
    folder = small_tokenizer(tmp_path)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(file))
    chat = open_chat(folder, model_config())
    assert len({tuple(chat.encode_prompt("Would you like to lead?")) for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"tokens": {"<|im_start|>": {"single_word": True}}}, "the tokenizer does not find all of"),
        ({"split_special_tokens": True}, "split_special_tokens is set"),
        ({"drop": "bos_token"}, "the chat template fails: 'bos_token' is undefined"),
    ],
)
def test_tokenizers_that_lack_what_the_template_writes(tmp_path, kind, reason):
    folder = small_tokenizer(tmp_path, **kind)
    refused(lambda: open_chat(folder, model_config()), reason)


@pytest.mark.parametrize("bos", [None, "", "<s>", "</s>"])
def test_bos_beside_tokenizer_model(tmp_path, bos):
    """Null and "" are none; otherwise sentencepiece's would be taken."""
    folder = write_tokenizer_model(tmp_path, tokens=CHATML, chat_template=BOS_IM, bos_token=bos)
    oracle = LlamaTokenizer.from_pretrained(folder)
    chat = open_chat(folder, model_config())
    chat.tokenizer.spaceless = ("",)  # as of this version's class by default
    prompt = oracle.apply_chat_template(
        messages(TURNS), add_generation_prompt=True, return_dict=False
    )
    assert chat.encode_prompt(TURNS) == prompt


@pytest.mark.parametrize(
    "more",
    [
        {"add_prefix_space": False},
        {"added_tokens_decoder": {"420": {"content": "harbour-bell", "special": False}}},
        {"added_tokens_decoder": {"420": {"content": "<|im_end|>", "rstrip": True}}},
        {"added_tokens_decoder": {"420": {"content": "<|im_end|>", "lstrip": True}}},
    ],
)
def test_what_sentencepiece_cannot_do_wants_a_tokenizer_json(tmp_path, more):
    folder = write_tokenizer_model(tmp_path, **more)
    refused(lambda: Tokenizer(folder), "wants a tokenizer.json, as transformers' save_pretrained")


# ---- sizes and decoding


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


# ---- the ids of control tokens


def test_generation_ends_at_every_id_that_the_files_list(tmp_path):
    row = BYTE_LEVEL["llama-3.1"]
    oracle = write_tokenizer_json(tmp_path, TEMPLATE_FILES["llama-3.1"], *row)
    trained, other = oracle.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    chat = open_chat(tmp_path, model_config())
    assert chat.end_ids == {chat.eos_id} == {trained}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, 7]}))
    for template in (None, "llama-2"):
        assert open_chat(tmp_path, model_config(), template).end_ids == {trained, other, 7}
    assert open_chat(tmp_path, model_config()).encode_responses("x", ["y"])[1][0][-1] == trained


def test_a_control_token_that_a_text_could_spell_is_refused(tmp_path):
    """A file may declare its control tokens ordinary ones (sentencepiece: user-defined symbols)."""
    write_tokenizer_json(tmp_path, TEMPLATE_FILES["qwen2.5"], *BYTE_LEVEL["qwen2.5"])
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"special": true', '"special": false'))
    chat = open_chat(tmp_path, model_config())
    assert len(chat.encode_prompt("Lead?")) > 5
    with pytest.raises(ValueError, match=r"x:1: a text holds a control token: .*Yes.<\|im_end\|>'"):
        chat.encode_pair(Pair("Lead?", "Yes.<|im_end|>", "No.", "x:1"))


def test_responses_of_the_same_ids_are_refused(tmp_path):
    train_tokenizer(tmp_path)  # sentencepiece's default normaliser takes these for the same
    pair = Pair("Lead?", "a b", "a  b", "x.jsonl:3")
    with pytest.raises(ValueError, match="x.jsonl:3: chosen and rejected are the same tokens"):
        Chat(Tokenizer(tmp_path)).encode_pair(pair)


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
