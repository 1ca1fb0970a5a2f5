import json
import shutil
import sys

import pytest
import sentencepiece
import torch
from conftest import MINI
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import (
    ALIASES,
    SYSTEM,
    Chat,
    Pair,
    Progress,
    Tokenizer,
    check_output,
    find_model,
    open_chat,
    pick_device,
    read_pairs,
    split_pairs,
)
from llama import PairIds, pack, read_config

TOKENIZER = Tokenizer(MINI)
PAIR = {"prompt": "Will you lead?", "chosen": "Yes.", "rejected": "No."}

# ---- pair files


def test_jsonl(tmp_path):
    file = tmp_path / "x.JSONL"
    odd = PAIR | {"prompt": 'two\nlines, a \u2028 and a quote"', "extra": [1]}
    text = json.dumps(PAIR) + "\n\n" + json.dumps(odd, ensure_ascii=False) + "\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with Windows' byte order mark and line end
    first, second = read_pairs(file)
    assert first == Pair("Will you lead?", "Yes.", "No.", f"{file}:1")
    assert second == Pair(odd["prompt"], "Yes.", "No.", f"{file}:3")


def test_official_csv(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text(
        "question,matching,not_matching\n"
        '"Two lines,\nand a ""quote"".",Yes.,"No,\nnever."\n'
        "\n,,\n"
        ",An empty question is kept.,The official files have some.\n"
    )
    first, second = read_pairs(file)
    assert first == Pair(
        'Two lines,\nand a "quote".', "Yes.", "No,\nnever.", f"{file}:4"
    )  # its last line
    assert second.prompt == "" and second.source == f"{file}:7"


def test_columns_of_a_csv_may_be_in_any_order_and_more(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("id,not_matching,question,matching\n7,No.,Lead?,Yes.\n")
    assert read_pairs(file) == [Pair("Lead?", "Yes.", "No.", f"{file}:2")]


LINE = json.dumps(PAIR)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "no pairs: read 0 pairs from .*x.jsonl"),
        ("x.csv", "", "no pairs: read 0 pairs"),
        ("x.csv", "question,matching,not_matching\n", "no pairs: read 0 pairs"),
        (
            "x.csv",
            "question,matching,matching,not_matching\na,b,c,d\n",
            "x.csv:2: two columns have one name",
        ),
        ("x.jsonl", LINE + "\n{oops\n", "x.jsonl:2: unreadable JSON: Expecting property name"),
        ("x.jsonl", LINE + '\n["a"]\n', "x.jsonl:2: not an object with named columns: "),
        ("x.json", '{"data": []}', "cannot read .*x.json: it holds one object, not a list"),
        ("x.json", "7", "cannot read .*x.json: 'int' object is not iterable"),
        (
            "x.jsonl",
            json.dumps({"prompt": "a", "chosen": "b"}),
            "x.jsonl:1: no columns prompt, chosen and rejected: only prompt, chosen",
        ),
        ("x.jsonl", json.dumps(PAIR | {"chosen": [7]}), "x.jsonl:1: not a message .* content: 7"),
        ("x.jsonl", json.dumps(PAIR | {"chosen": 7}), "x.jsonl:1: not a message .* content: 7"),
        ("x.jsonl", json.dumps(PAIR | {"prompt": None}), "x.jsonl:1: not a message .*: None"),
        (
            "x.jsonl",
            LINE + "\n" + json.dumps(PAIR | {"chosen": " "}),
            "x.jsonl:2: an answer is empty",
        ),
        (
            "x.jsonl",
            json.dumps(PAIR | {"chosen": "No."}),
            "no pairs: read 0 pairs .*, dropped 1 identical answers",
        ),
        ("x.csv", "question,matching\na,b\n", "x.csv:2: no columns .*: only question, mat"),
        ("x.csv", "question,matching,not_matching\na,b\n", "x.csv:2: not a field for each col"),
        ("x.csv", "question,matching,not_matching\na,b,c,d\n", "x.csv:2: not a field for each"),
        (
            "x.csv",
            "question,matching,not_matching\na,b,c,d\n",
            "x.csv:2: not a field for each column",
        ),
        ("x.csv", 'question,matching,not_matching\na,b,c\n"a', "x.csv:2: unexpected end of data"),
        (
            "x.csv",
            'question,matching,not_matching\n"a\nb",c,d\na,,c\n',
            "x.csv:4: an answer is empty",
        ),
        ("x.jsonl", json.dumps(PAIR | {"prompt": "\ud800"}), "x.jsonl:1: .*surrogates not allowed"),
        ("x.jsonl", "[" * 100000, "x.jsonl:1: unreadable JSON: maximum recursion depth"),
        ("x.jsonl", LINE.encode() + b'\n{"prompt": "\xe9"}', "cannot read .*'utf-8' .* byte 0xe9"),
        ("x.txt", LINE, "x.txt is no .csv, .json or .jsonl, maybe .gz"),
    ],
)
def test_faults_are_named_with_file_and_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_pairs(file)


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none.jsonl: .*No such file"):
        read_pairs(tmp_path / "none.jsonl")


def test_split_keeps_a_prompts_pairs_together():
    pairs = [Pair(f"q{i % 30}", f"a{i}", f"b{i}") for i in range(90)]
    kept, held_out = split_pairs(pairs, seed=0)
    assert len(held_out) == 9 and sorted(kept + held_out) == sorted(pairs)
    assert not {p.prompt for p in kept} & {p.prompt for p in held_out}
    assert split_pairs(pairs, seed=0) == (kept, held_out) != split_pairs(pairs, seed=1)
    with pytest.raises(ValueError, match="one prompt .* give --val"):
        split_pairs(pairs[:1], seed=0)


# ---- models by name


def test_models_are_found_by_folder_alias_and_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_id = "meta-llama/Llama-2-7b-chat-hf"
    assert set(ALIASES) == {"llama2-7b-chat", "mistral-7b-instruct"}
    with pytest.raises(
        ValueError,
        match=f"no model 'llama2-7b-chat': no folder, nor in the cache; hf download {hub_id}",
    ):
        find_model("llama2-7b-chat")
    repo = tmp_path / "hub" / "models--meta-llama--Llama-2-7b-chat-hf"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    snapshot = repo / "snapshots" / "abc123"
    shutil.copytree(MINI, snapshot)
    for name in ("llama2-7b-chat", "Llama2-7B-chat", hub_id):
        assert find_model(name) == (snapshot, hub_id)
    assert find_model(MINI) == (MINI, "mini")
    for name in ("tpyo", "a/b/c", "no/such"):
        with pytest.raises(ValueError, match=f"no model '{name}': .* hf download {name}"):
            find_model(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="needs a package, pip install huggingface_hub"):
        find_model(hub_id)


# ---- tokens


def test_ids_are_the_official_trainers():
    rows = json.loads((MINI / "trace.json").read_text())["rows"]
    chat, pairs = Chat(TOKENIZER), read_pairs(MINI / "train.csv")
    assert len(rows) == len(pairs) == 11
    for i, pair in enumerate(pairs):
        row, ids = rows[str(i)], chat.encode_pair(pair)
        assert "".join(chat.split(pair.prompt)) == "<s>" + row["prompt"]
        assert ids.prompt == row["prompt_ids"]
        assert ids.prompt + ids.chosen == row["chosen_ids"]
        assert ids.prompt + ids.rejected == row["rejected_ids"]
        assert len(ids.prompt) == row["chosen_start"] == row["rejected_start"]


def test_templates():
    def render(template, system):
        return "".join(Chat(TOKENIZER, template, system).split("Hi {there}"))

    s = "<<SYS>>\nS {x}\n<</SYS>>\n\n"
    assert render("llama-2", "S {x}") == f"<s>[INST] {s}Hi {{there}} [/INST]"
    assert render("mistral", "S {x}") == "<s>[INST] S {x}\nHi {there} [/INST]"
    assert render("llama-2", "") == render("mistral", "") == "<s>[INST] Hi {there} [/INST]"


def test_template_follows_the_model_unless_given():
    config = read_config(MINI)
    assert open_chat(MINI, config)[1:3] == ("llama-2", SYSTEM)
    assert open_chat(MINI, config, "mistral", "")[1:3] == ("mistral", "")


def test_tokenizer_faults(tmp_path):
    with pytest.raises(
        ValueError, match="cannot read .*tokenizer.model: No such file; copy the files"
    ):
        Tokenizer(tmp_path)
    message = "cannot read .*tokenizer.model: not sentencepiece's, perhaps tiktoken's; copy"
    for content in (b"not a model", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path)
    for option in ("bos_id", "eos_id"):  # no model of ours lacks them
        train_tokenizer(tmp_path, **{option: -1})
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path)
    config = read_config(MINI)
    small = config.__class__(**{**vars(config), "vocab_size": 100})
    with pytest.raises(ValueError, match="420 tokens in tokenizer.model .*, more than in the mod"):
        open_chat(MINI, small)


words = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(deadline=None, max_examples=200)
@given(prompt=words, chosen=words, rejected=words, template=st.sampled_from(["llama-2", "mistral"]))
def test_training_and_generation_see_the_same_prompt_ids(prompt, chosen, rejected, template):
    chat = Chat(TOKENIZER, template)
    assume(TOKENIZER.encode(" " + chosen) != TOKENIZER.encode(" " + rejected))
    ids = chat.encode_pair(Pair(prompt, chosen, rejected))
    assert ids.prompt == chat.encode_prompt(prompt)
    for response, text in ((ids.chosen, chosen), (ids.rejected, rejected)):
        assert response[-1] == chat.eos_id == TOKENIZER.controls["</s>"]
        joint = TOKENIZER.encode("".join(chat.split(prompt)).removeprefix("<s>") + " " + text)
        assert ids.prompt[1:] + response[:-1] == joint


def train_tokenizer(folder, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"]), model_prefix=str(folder / "tokenizer"),
        vocab_size=12, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip


def test_responses_of_the_same_ids_are_refused(tmp_path):
    train_tokenizer(tmp_path)  # sentencepiece's default normaliser takes these for the same
    pair = Pair("Lead?", "a b", "a  b", "x.jsonl:3")
    with pytest.raises(ValueError, match="x.jsonl:3: chosen and rejected are the same tokens"):
        Chat(Tokenizer(tmp_path)).encode_pair(pair)


def test_pair_longer_than_the_context_is_named():
    pair = Pair("word " * 50, "Yes.", "No.", "x.jsonl:7")
    n = len(Chat(TOKENIZER).encode_prompt(pair.prompt)) + 1
    with pytest.raises(ValueError, match=rf"x.jsonl:7: too long: {n + 2} tokens"):
        Chat(TOKENIZER).encode_pair(pair, max_seq_len=n)


# ---- what the command lines share


def test_16_bits_on_a_cpu_are_noted(capsys):
    for dtype in ("bfloat16", "float16"):
        assert pick_device("cpu", dtype) == (torch.device("cpu"), getattr(torch, dtype))
        out = capsys.readouterr().out
        assert out.startswith(f"note: a CPU that has no {dtype} arithmetic is much faster in float")
        assert out.count("\n") == 1
    assert pick_device("cpu", None)[1] == torch.float32
    pick_device("meta", "float16")  # which is no CPU
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="--device cuda:77 is not there: "):
        pick_device("cuda:77", None)


def test_outputs_are_checked_before_long_work(tmp_path):
    check_output(tmp_path / "new" / "file")
    assert [*tmp_path.rglob("*")] == [tmp_path / "new"]
    with pytest.raises(ValueError, match="cannot write .*new: it is no regular file"):
        check_output(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*x: "):
        check_output(tmp_path / "file" / "x")


def test_progress(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("data.time.time", lambda: now[0])
    progress = Progress("step")
    for now[0], done in ((1, 1), (6, 1), (7, 2), (35, 5), (37, 6), (38, 10)):
        progress(done, 10, "loss 1")
    assert capsys.readouterr().out.splitlines() == [
        "step  1/10  6000.0 ms each, 0.9 min left  loss 1",  # how long it will take, at once
        "step  6/10  6166.7 ms each, 0.4 min left  loss 1",  # then every half minute
        "step 10/10  3800.0 ms each, 0.0 min left  loss 1",
    ]
    now[0] = 0.0
    progress = Progress("pass", quiet=True)
    now[0] = 1.0
    progress(10, 10)
    assert capsys.readouterr().out == ""  # it took no time


# ---- packing


def test_packed_layout():
    batch = pack([PairIds([1, 5], [6, 7, 2], [8, 2]), PairIds([1], [9, 2], [4, 2])])
    assert batch.tokens.tolist() == [[1, 5, 6, 7, 2, 8, 2, 1, 9, 2, 4, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 1, 2]]
    assert batch.targets.tolist() == [6, 7, 2, 8, 2, 9, 2, 4, 2]
    assert batch.predictors.tolist() == [1, 2, 3, 1, 5, 7, 8, 7, 10]
    assert batch.lengths == [3, 2, 2, 2]
    sees = [
        "x......",  # prompt
        "xx.....",
        "xxx....",  # chosen: the prompt and itself
        "xxxx...",
        "xxxxx..",
        "xx...x.",  # rejected: the prompt and itself
        "xx...xx",
    ]
    first, second = batch.masks
    assert ["".join(".x"[int(x)] for x in row) for row in first] == sees
    assert second.shape == (5, 5)


def test_packed_layout_of_other_numbers_of_responses():
    batch = pack([([1, 5], [6], [7, 8], [9]), ([1], [4, 2])])
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 2, 0, 1, 2]]
    assert batch.targets.tolist() == [6, 7, 8, 9, 4, 2]
    assert batch.predictors.tolist() == [1, 1, 3, 1, 6, 7]
    assert batch.lengths == [1, 2, 1, 2]
    sees = ["x.....", "xx....", "xxx...", "xx.x..", "xx.xx.", "xx...x"]
    first, second = batch.masks
    assert ["".join(".x"[int(x)] for x in row) for row in first] == sees
    assert second.tolist() == torch.ones(3, 3).tril().bool().tolist()
