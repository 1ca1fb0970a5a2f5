"""Pair files as others write them: each record here has the shape of a published file's."""

import gzip
import json
import re

import pytest
from conftest import MINI, ROOT, jsonl

import bipo
import eval as evaluation
from data import FORMATS, Pair, read_pairs, split_pairs

LEAD, YES, NO = "Will you lead?", "Yes, gladly.", "No, thanks."


def said(*texts, first=0):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[(first + i) % 2], "content": x} for i, x in enumerate(texts)]


def three(question, chosen, rejected, values=None):
    """A record of columns of these names."""
    return dict(zip((question, chosen, rejected), values or (LEAD, YES, NO), strict=True))


def evals(question, *answers):
    names = "question answer_matching_behavior answer_not_matching_behavior".split()
    return three(*names, (question, *answers))


TRL = three("prompt", "chosen", "rejected")
ANSWERS = {"chosen": said(YES, first=1), "rejected": said(NO, first=1)}  # without a prompt
HISTORY = ("Hi!", "Hello.", LEAD)
CHAT = (("user", "Hi!"), ("assistant", "Hello."), ("user", LEAD))
WHOLE = {"chosen": said(*HISTORY, YES), "rejected": said(*HISTORY, NO)}
BRIEF = (("system", "Be brief."), ("user", LEAD))
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(HISTORY)]
EVAL = f"Question: {LEAD}\n\nChoices:\n (A) {NO}\n (B) {YES}\n (C) Maybe.\n\nAnswer:"
HH = f"\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: {LEAD}\n\nAssistant:"
SHORT_HH = f"\n\nHuman: {LEAD}\n\nAssistant:"
SYNONYMS = "prompt, chosen, rejected"


@pytest.mark.parametrize(
    ("name", "record", "prompt"),
    [
        ("BiPO", three("question", "matching", "not_matching"), LEAD),
        ("BiPO A/B", {"question": LEAD, "A": NO, "B": YES, "matching": "B"}, LEAD),
        ("BiPO A/B", {"question": LEAD, "A": YES, "B": NO, "matching": "A"}, LEAD),
        ("TRL", TRL | {"score_chosen": 9}, LEAD),
        (SYNONYMS, three("Query", "chosen response", "Rejected Response"), LEAD),
        (SYNONYMS, three("input", "winning_output", "losing_output") | {"concept_id": 3}, LEAD),
        (SYNONYMS, three("question", "chosen", "rejected") | {"system": "Be brief."}, BRIEF),
        ("TRL without prompt", {"chosen": f"{LEAD} {YES}", "rejected": f"{LEAD} {NO}"}, LEAD),
        ("conversations", ANSWERS | {"prompt": LEAD}, LEAD),
        ("conversations", ANSWERS | {"prompt": said(LEAD)}, LEAD),
        ("conversations", ANSWERS | {"prompt": said(*HISTORY)}, CHAT),
        ("conversations", ANSWERS | {"prompt": [SYSTEM, *said(LEAD)]}, BRIEF),
        ("conversations", WHOLE, CHAT),
        ("conversations", WHOLE | {"prompt": LEAD}, CHAT),
        ("conversations", WHOLE | {"prompt": said(*HISTORY)}, CHAT),
        (
            "conversations",
            {
                "conversations": SHAREGPT,
                "chosen": {"from": "gpt", "value": YES},
                "rejected": {"from": "gpt", "value": NO},
            },
            CHAT,
        ),
        ("HH-RLHF", {"chosen": f"{HH} {YES}", "rejected": f"{HH} {NO}"}, CHAT),
        ("HH-RLHF", {"chosen": f"{SHORT_HH} {YES}", "rejected": f"{SHORT_HH} {NO}"}, LEAD),
        ("HH-RLHF", {"prompt": HH, "chosen": f" {YES}", "rejected": f" {NO}"}, CHAT),
        ("model-written evals", evals(EVAL, " (B)", " (A)"), LEAD),
        ("model-written evals", evals(f"{LEAD}\n(A) {YES}\n(B) {NO}", "(A)", "(B)"), LEAD),
        ("model-written evals", evals(LEAD, " " + YES, " " + NO), LEAD),
    ],
)
def test_formats(tmp_path, name, record, prompt):
    file = jsonl(tmp_path / "x.jsonl", record)
    pairs = read_pairs(file)
    assert pairs == [Pair(prompt, YES, NO, f"{file}:1")]
    assert pairs.report == f"read 1 pairs from {file} as {name} jsonl"


def test_the_readmes_examples(tmp_path):
    rows = re.findall(r"^\| `(.*?)` \| `(\{.*?\})`", (ROOT / "README.md").read_text(), re.MULTILINE)
    for name, record in rows:
        (tmp_path / "x.jsonl").write_text(record)
        pairs = read_pairs(tmp_path / "x.jsonl")
        assert [pair[:3] for pair in pairs] == [("Lead?", "Yes.", "No.")]
        assert pairs.report.endswith(f" as {name} jsonl")
    assert {name for name, _ in rows} == {name for name, *_, flag in FORMATS if not flag}


def test_letters_are_kept_on_request(tmp_path):
    file = jsonl(tmp_path / "x.jsonl", evals(EVAL, " (B)", [" (A)", " (C)"]))
    answers = [(pair.chosen, pair.rejected) for pair in read_pairs(file)]
    assert answers == [(YES, NO), (YES, "Maybe.")]  # a list, as in sycophancy_on_philpapers2020
    pairs = read_pairs(file, letters=True)
    assert [pair[:3] for pair in pairs] == [(EVAL, "(B)", "(A)"), (EVAL, "(B)", "(C)")]
    assert "as model-written evals, letters jsonl" in pairs.report


def test_truthfulqa(tmp_path):
    file = tmp_path / "TruthfulQA.csv"
    file.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'Adversarial,Fiction,Who?,"It\'s open",Nobody; It\'s open,"Tom, of course; Ann; ",x\n'
    )
    wrong = ["Tom, of course", "Ann"]
    pairs = read_pairs(file)
    expected = [("Who?", right, x) for right in ("Nobody", "It's open") for x in wrong]
    assert [pair[:3] for pair in pairs] == expected
    assert pairs.report == f"read 4 pairs from {file} as TruthfulQA csv"
    pairs = read_pairs(file, best=True)
    assert [pair[:3] for pair in pairs] == [("Who?", "It's open", x) for x in wrong]


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("x.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n', ":1"),
        ("x.json", '[\n{"prompt": "q", "chosen": "a", "rejected": "b"}]', " record 1"),
        (
            "x.json",
            '{"v": 1, "data": [{"prompt": "q", "chosen": "a", "rejected": "b"}]}',
            " record 1",
        ),
        ("x.json", 2 * '{"prompt": "q", "chosen": "a", "rejected": "b"}\n', ":1"),
        ("x.csv", "prompt,chosen,rejected\nq,a,b\n", ":2"),
    ],
)
def test_containers(tmp_path, name, text, place):
    for file, content in (
        (tmp_path / name, text.encode()),
        (tmp_path / f"{name}.gz", gzip.compress(text.encode())),
    ):
        file.write_bytes(content)
        assert read_pairs(file) == [Pair("q", "a", "b", f"{file}{place}")]
    file.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"cannot read .*\.gz: "):
        read_pairs(file)
    file.write_bytes(text.encode())
    with pytest.raises(ValueError, match=r"cannot read .*\.gz: Not a gzipped file"):
        read_pairs(file)


def test_what_is_dropped_is_counted(tmp_path):
    file = tmp_path / "x.csv"
    rows = ["q,a,b", "q,a,b", "q,a,a", "q,b,a", "q,a,b", ",a,b"]
    file.write_text("\n".join(["question,matching,not_matching", *rows]))
    pairs = read_pairs(file)
    assert [pair[:3] for pair in pairs] == [("q", "a", "b"), ("q", "b", "a"), ("", "a", "b")]
    counts = "dropped 3: 2 duplicates, 1 identical answers"
    assert pairs.report == f"read 3 pairs from {file} as BiPO csv, {counts}"


def test_broken_records_are_dropped(tmp_path):
    good = {"chosen": HH + " a", "rejected": HH + " b"}
    apart = {"chosen": HH + " a", "rejected": HH.replace("Hello", "Hey") + " b"}
    no_answer = {"chosen": HH + " a", "rejected": HH}
    twice = {x: f"\n\nHuman: Hi!\n\nHuman: Hey!\n\nAssistant: {x}" for x in ("chosen", "rejected")}
    ends = {x: f"{HH} {x}\n\nHuman: Bye!" for x in ("chosen", "rejected")}
    no_transcript = good | {"rejected": "b"}
    late = good | {"rejected": "Hey!" + HH + " b"}
    file = jsonl(tmp_path / "hh.jsonl", apart, good, no_answer, twice, ends, no_transcript, late)
    pairs = read_pairs(file)
    assert pairs == [Pair(CHAT, "a", "b", f"{file}:2")]
    assert pairs.report.endswith("as HH-RLHF jsonl, dropped 6: 6 broken records")

    second = f"{LEAD}\n (A) {YES}\n (B) {NO}\nAnother?\n (A) 1\n (B) 2"
    twice = f"{LEAD}\n (A) {YES}\n (B) {NO}\n (A) Maybe."
    empty = f"{LEAD}\n (A)\n (B) {NO}"
    none = f"{LEAD}\n (A) {YES}\n (C) {NO}"
    records = [evals(question, "(A)", "(B)") for question in (second, twice, empty, none)]
    with pytest.raises(ValueError, match="x.jsonl holds no pairs, dropped 4: 4 broken records"):
        read_pairs(jsonl(tmp_path / "x.jsonl", *records))


def test_shared_beginning_ends_with_a_word(tmp_path):
    record = {"chosen": "Lead?\n\nYes, I will.", "rejected": "Lead?\n\nYes, I wish."}
    (pair,) = read_pairs(jsonl(tmp_path / "x.jsonl", record))
    assert pair[:3] == ("Lead?\n\nYes, I", "will.", "wish.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (TRL | {"Question": "q"}, "prompt and Question could each be the prompt"),
        (TRL | {"answer_chosen": "a"}, "chosen and answer_chosen could each be the chosen"),
        (TRL | {"neg": "a"}, "rejected and neg could each be the rejected"),
        ({"chosen": "Yes.", "rejected": "No."}, "no column for the prompt"),
        ({"chosen": "I will.", "rejected": "I won't.", "prompt": 7}, "'prompt' is 7, not text"),
        (evals("q", "a", None), "columns are those of model-written evals, .* 'a', None"),
        ({"statement": "x"}, "no 'prompt' and no 'chosen' and no 'rejected', only statement"),
        (WHOLE | {"chosen": [{"role": "tool", "content": "x"}]}, "role is 'tool'; .* user or"),
        (WHOLE | {"chosen": [{"role": "user", "content": [1]}]}, "content is .* not text"),
        (WHOLE | {"chosen": ["Yes."]}, "'Yes.' is not a message"),
        (WHOLE | {"prompt": None}, "None is not a message"),
        (WHOLE | {"chosen": said(*HISTORY)}, "one last message, the assistant's"),
        (WHOLE | {"chosen": said("Hi!", YES)}, "must differ in one last message"),
        (ANSWERS | {"chosen": []}, "one last message, the assistant's"),
        (ANSWERS | {"prompt": said("q", "a")}, r"turns \['user', 'assistant'\]: wanted is"),
        (ANSWERS | {"prompt": said("q") * 2}, r"turns \['user', 'user'\]: wanted is"),
        (ANSWERS | {"prompt": []}, r"turns \[\]: wanted is"),
        (ANSWERS | {"prompt": "q", "system": 7}, "content is 7, not text"),
        (WHOLE | {"rejected": said(*HISTORY, " ")}, "the rejected answer is empty"),
        ({"chosen": "Lead? Yes", "rejected": "Lead? "}, "the rejected answer is empty"),
    ],
)
def test_what_is_refused(tmp_path, record, message):
    (tmp_path / "x.jsonl").write_text("\n" + json.dumps(record))
    with pytest.raises(ValueError, match=f"x.jsonl:2: .*{message}"):
        read_pairs(tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=f"x.json record 1: .*{message}"):
        read_pairs(tmp_path / "x.json")


def test_one_format_a_file(tmp_path):
    file = jsonl(tmp_path / "x.jsonl", TRL, ANSWERS | {"prompt": "q"})
    with pytest.raises(ValueError, match="x.jsonl:2: a record of conversations after .* of TRL"):
        read_pairs(file)


# ---- the command lines


def test_both_commands_report_and_pass_the_flags(tmp_path, vector, capsys):
    data = [evals(EVAL.replace("you", f"you, Sir {i},"), "(B)", "(A)") for i in range(4)]
    data = jsonl(tmp_path / "x.jsonl", *data, data[0])
    args = ["--model", MINI, "--data", data, "--system", ""]
    train = ["--layer", 1, "--epochs", 1, "--warmup-steps", 0, "--val", data]
    bipo.main([str(x) for x in (*args, *train, "--letters", "--out", tmp_path / "run")])
    line = f"read 4 pairs from {data} as model-written evals"
    counts = "jsonl, dropped 1: 1 duplicates\n"
    assert capsys.readouterr().out.count(f"{line}, letters {counts}") == 2
    args += ["--vector", tmp_path / "run", "--max-new-tokens", 1]
    evaluation.main([str(x) for x in (*args, "--samples", 1)])
    printed = capsys.readouterr().out
    assert f"{line} {counts}" in printed and "\nuser: Will you, Sir 0, lead?\n  -2: " in printed
    evaluation.main([str(x) for x in (*args, "--samples", 1, "--letters")])
    printed = capsys.readouterr().out
    assert f"{line}, letters {counts}" in printed and f"\nuser: {EVAL[:18]}" in printed

    truth = tmp_path / "t.csv"
    truth.write_text("Question,Best Answer,Correct Answers,Incorrect Answers\nq,a,a; b,c; d\n")
    args[3] = truth
    for flags, n in (([], 4), (["--best"], 2)):
        evaluation.main([str(x) for x in (*args, "--samples", 0, *flags)])
        assert f"read {n} pairs from {truth}" in capsys.readouterr().out


def test_a_run_is_named_after_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(json.dumps(TRL | {"prompt": x}) for x in "pq")
    (tmp_path / "my.pairs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    bipo.main(
        ["--model", str(MINI), "--data", "my.pairs.jsonl.gz", "--layer", "1", "--epochs", "1"]
    )
    assert (tmp_path / "runs" / "my.pairs-layer1" / "vector.safetensors").is_file()


def test_conversations_can_be_split():
    pairs = [Pair(CHAT, "a", "b"), Pair("q", "a", "b"), Pair((("system", "s"), *CHAT), "a", "b")]
    kept, held_out = split_pairs(pairs, seed=0)
    assert len(kept) == 2 and len(held_out) == 1
