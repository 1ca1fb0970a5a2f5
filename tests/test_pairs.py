"""Pair files as others write them: each record here has the shape of a published file's."""

import gzip
import json

import pytest
from conftest import MINI, jsonl

import bipo
from data import NAMES, Pair, note_shortcuts, read_pairs, split_pairs

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
EVAL = f"Question: {LEAD}\n\nChoices:\n (A) {NO}\n (B) {YES}\n (C) Maybe.\n\nAnswer:"
HH = f"\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: {LEAD}\n\nAssistant:"
SHORT_HH = f"\n\nHuman: {LEAD}\n\nAssistant:"


@pytest.mark.parametrize(
    ("name", "record", "prompt"),
    [
        ("BiPO", three("question", "matching", "not_matching"), LEAD),
        ("BiPO A/B", {"question": LEAD, "A": NO, "B": YES, "matching": "B"}, LEAD),
        ("BiPO A/B", {"question": LEAD, "A": YES, "B": NO, "matching": "A"}, LEAD),
        ("TRL", TRL, LEAD),
        ("TRL", three("Query", "chosen response", "Rejected Response"), LEAD),
        ("TRL", three("input", "winning_output", "losing_output"), LEAD),
        ("TRL", three("question", "chosen", "rejected") | {"system": "Be brief."}, BRIEF),
        ("TRL", TRL | {"System": "Be brief."}, BRIEF),
        ("TRL", TRL | {"system_prompt": "Be brief."}, BRIEF),
        ("TRL", TRL | {"System Prompt": ""}, LEAD),
        ("TRL without prompt", {"chosen": f"{LEAD} {YES}", "rejected": f"{LEAD} {NO}"}, LEAD),
        ("conversations", ANSWERS | {"prompt": LEAD}, LEAD),
        ("conversations", ANSWERS | {"prompt": said(LEAD)}, LEAD),
        ("conversations", ANSWERS | {"prompt": said(*HISTORY)}, CHAT),
        ("conversations", ANSWERS | {"prompt": [SYSTEM, *said(LEAD)]}, BRIEF),
        ("conversations", ANSWERS | {"prompt": said(LEAD), "system": "Be brief."}, BRIEF),
        ("conversations", ANSWERS | {"prompt": [SYSTEM, *said(LEAD)], "system": "x"}, BRIEF),
        ("conversations", WHOLE, CHAT),
        ("conversations", WHOLE | {"prompt": LEAD}, CHAT),
        ("conversations", WHOLE | {"prompt": said(*HISTORY)}, CHAT),
        ("conversations", TRL | {"prompt": said(*HISTORY)}, CHAT),
        ("conversations", {"messages": said(*HISTORY), "chosen": YES, "rejected": NO}, CHAT),
        (
            "conversations",
            {
                "Messages": said(*HISTORY),
                "chosen": said(YES, first=1)[0],
                "rejected": said(NO, first=1)[0],
            },
            CHAT,
        ),
        ("HH-RLHF", {"chosen": f"{HH} {YES}", "rejected": f"{HH} {NO}"}, CHAT),
        ("HH-RLHF", {"chosen": f"{SHORT_HH} {YES}", "rejected": f"{SHORT_HH} {NO}"}, LEAD),
        ("HH-RLHF", {"prompt": HH, "chosen": f" {YES}", "rejected": f" {NO}"}, CHAT),
        ("HH-RLHF", {"prompt": HH, "chosen": f"{HH} {YES}", "rejected": f"{HH} {NO}"}, CHAT),
        ("model-written evals", evals(EVAL, " (B)", " (A)"), LEAD),
        ("model-written evals", evals(f"{LEAD}\n(A) {YES}\n(B) {NO}", "(A)", "(B)"), LEAD),
        ("model-written evals", evals(LEAD, " " + YES, " " + NO), LEAD),
    ],
)
def test_formats(tmp_path, capsys, name, record, prompt):
    file = jsonl(tmp_path / "x.jsonl", record)
    assert read_pairs(file) == [Pair(prompt, YES, NO, f"{file}:1")]
    line = f"read 1 pairs from {file}, dropped nothing; columns not used: []\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected", "system"])
def test_every_other_name_of_a_column(tmp_path, name):
    columns = TRL | {"system": "Be brief."}
    for other in NAMES[name].split():
        record = {other.title() if x == name else x: text for x, text in columns.items()}
        (pair,) = read_pairs(jsonl(tmp_path / "x.jsonl", record))
        assert pair[:3] == (BRIEF, YES, NO)


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    record = TRL | {"Score": 9, "id": "a b"}
    file = jsonl(tmp_path / "x.jsonl", record, TRL | {"id": 2, "messages": said(LEAD, YES)})
    read_pairs(file)
    line = f"read 1 pairs from {file}, dropped 1 duplicate; columns not used: ['score', 'id', "
    assert capsys.readouterr().out == line + "'messages']\n"


def test_an_empty_column_of_another_name_and_an_equal_one_are_no_second(tmp_path):
    """`input` of Alpaca's records; `prompt` and `question` of orpo-dpo-mix."""
    for more in ({"input": ""}, {"Question": LEAD}, {"input": None, "query": LEAD}):
        for record in (TRL | more, more | TRL):
            (pair,) = read_pairs(jsonl(tmp_path / "x.jsonl", record))
            assert pair[:3] == (LEAD, YES, NO)


def test_answers_of_evals_may_be_lists(tmp_path):
    """As in sycophancy_on_philpapers2020."""
    file = jsonl(tmp_path / "x.jsonl", evals(EVAL, " (B)", [" (A)", " (C)"]))
    answers = [(pair.chosen, pair.rejected) for pair in read_pairs(file)]
    assert answers == [(YES, NO), (YES, "Maybe.")]


def test_truthfulqa(tmp_path, capsys):
    file = tmp_path / "TruthfulQA.csv"
    file.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'Adversarial,Fiction,Who?,"It\'s open",Nobody; It\'s open,"Tom, of course; Ann; ",x\n'
    )
    wrong = ["Tom, of course", "Ann"]
    pairs = read_pairs(file)
    expected = [("Who?", right, x) for right in ("Nobody", "It's open") for x in wrong]
    assert [pair[:3] for pair in pairs] == expected
    line = f"read 4 pairs from {file}, dropped nothing; columns not used: "
    assert capsys.readouterr().out == line + "['type', 'category', 'best_answer', 'source']\n"
    record = {"question": "Who?", "correct_answers": ["Nobody", "It's open "]}
    file = jsonl(tmp_path / "x.jsonl", record | {"incorrect_answers": wrong})  # with lists
    assert [pair[:3] for pair in read_pairs(file)] == expected


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("x.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n', ":1"),
        ("x.json", '[\n{"prompt": "q", "chosen": "a", "rejected": "b"}]', " record 1"),
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


def test_what_is_dropped_is_counted(tmp_path, capsys):
    file = tmp_path / "x.csv"
    rows = ["q,a,b", "q,a,b", "q,a,a", "q,b,a", "q,a,b", ",a,b", "q,a,a"]
    file.write_text("\n".join(["question,matching,not_matching", *rows]))
    pairs = read_pairs(file)
    assert [pair[:3] for pair in pairs] == [("q", "a", "b"), ("q", "b", "a"), ("", "a", "b")]
    line = f"read 3 pairs from {file}, dropped 2 duplicate, 2 identical answers; columns"
    assert capsys.readouterr().out.startswith(line)


def test_broken_records_are_dropped_if_asked_to(tmp_path, capsys):
    good = {"chosen": HH + " a", "rejected": HH + " b"}
    apart = {"chosen": HH + " a", "rejected": HH.replace("Hello", "Hey") + " b"}
    no_answer = {"chosen": HH + " a", "rejected": HH}
    twice = {x: f"\n\nHuman: Hi!\n\nHuman: Hey!\n\nAssistant: {x}" for x in ("chosen", "rejected")}
    ends = {x: f"{HH} {x}\n\nHuman: Bye!" for x in ("chosen", "rejected")}
    no_transcript = good | {"rejected": "b"}
    late = good | {"rejected": "Hey!" + HH + " b"}
    file = jsonl(tmp_path / "hh.jsonl", apart, good, no_answer, twice, ends, no_transcript, late)
    fault = "hh.jsonl:1: .*one last message.* [(]bad records: 6; --skip-bad drops them[)]"
    with pytest.raises(ValueError, match=fault):
        read_pairs(file)
    assert read_pairs(file, skip_bad=True) == [Pair(CHAT, "a", "b", f"{file}:2")]
    line = capsys.readouterr().out
    reasons = (
        "4 chosen and rejected must differ in one last message, the assistant's, 1 an answer is"
    )
    assert f"dropped {reasons} empty, 1 turns are user, " in line

    second = f"{LEAD}\n (A) {YES}\n (B) {NO}\nAnother?\n (A) 1\n (B) 2"
    twice = f"{LEAD}\n (A) {YES}\n (B) {NO}\n (A) Maybe."
    lines = f"{LEAD}\n (A) {YES}\nNow.\n (B) {NO}\n\nAnswer:"
    empty = f"{LEAD}\n (A)\n (B) {NO}"
    none = f"{LEAD}\n (A) {YES}\n (C) {NO}"
    records = [evals(question, "(A)", "(B)") for question in (second, twice, lines, empty, none)]
    reasons = "3 the options are not one line each, with a letter of its own, 2 an answer is empty"
    with pytest.raises(ValueError, match=f"no pairs: read 0 pairs .*x.jsonl, dropped {reasons}"):
        read_pairs(jsonl(tmp_path / "x.jsonl", *records), skip_bad=True)


def test_lines_that_cannot_be_read_are_broken_records(tmp_path, capsys):
    lines = [json.dumps(TRL), '{"prompt": "q", "cho', json.dumps(TRL | {"prompt": "q"})]
    rows = ["question,matching,not_matching", "q,a,b", "q,a,b,c", "r,a,b"]
    for name, text, fault in (
        ("x.jsonl", "\n".join(lines), "unreadable JSON"),
        ("x.csv", "\n".join(rows), "not a field for each column"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}:[23]: {fault}.*bad records: 1; --skip-bad"):
            read_pairs(tmp_path / name)
        assert len(read_pairs(tmp_path / name, skip_bad=True)) == 2
        assert f"dropped 1 {fault}" in capsys.readouterr().out


def test_shared_beginning_ends_with_a_word(tmp_path):
    record = {"chosen": "Lead?\n\nYes, I will.", "rejected": "Lead?\n\nYes, I wish."}
    (pair,) = read_pairs(jsonl(tmp_path / "x.jsonl", record))
    assert pair[:3] == ("Lead?\n\nYes, I", "will.", "wish.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (TRL | {"Question": "q"}, "'Question' is a second prompt: rename it"),
        (TRL | {"answer_chosen": "a"}, "'answer_chosen' is a second chosen"),
        (TRL | {"neg": "a"}, "'neg' is a second rejected"),
        ({"chosen": "Yes.", "rejected": "No."}, "no column for the prompt"),
        (
            {"chosen": "I will.", "rejected": "I won't.", "prompt": 7},
            "not a message .* content: 7",
        ),
        (
            {"chosen": "I will.", "rejected": "I won't.", "context": LEAD},
            "no column is named prompt: rename or remove .'context'",
        ),
        (
            {"chosen": "I will.", "rejected": "I won't.", "history": ["a"]},
            "no column is named prompt: rename or remove .'history'",
        ),
        (
            {"chosen": 7, "rejected": "I won't.", "prompt": "q"},
            "not a message .* content: 7",
        ),
        (evals("q", "a", None), "not a text, or a list that was written out: None"),
        (TRL | {"system": "a", "System_Prompt": "b"}, "'System_Prompt' is a second system"),
        (TRL | {"chosen": "[{'role': 'user', 'content': 'x'}]"}, "list of messages written out"),
        (TRL | {"rejected": '[ {"from": "human", "value": "x"}]'}, "list of messages written out"),
        (TRL | {"prompt": "\n[{'content': 'x', 'role': 'user'}\n {"}, "list of messages written"),
        ({"statement": "x"}, "no columns prompt, chosen and rejected: only statement"),
        (
            WHOLE | {"chosen": [{"role": "tool", "content": "x"}]},
            "not a message of system, user or assistant .*'tool'",
        ),
        (WHOLE | {"chosen": [{"role": "user", "content": [1]}]}, "not a message .*content"),
        (WHOLE | {"chosen": ["Yes."]}, "must differ in one last message"),
        (WHOLE | {"prompt": None}, "not a message .*: None"),
        (WHOLE | {"chosen": said(*HISTORY)}, "one last message, the assistant's"),
        (WHOLE | {"chosen": said("Hi!", YES)}, "must differ in one last message"),
        (ANSWERS | {"chosen": []}, "one last message, the assistant's"),
        (ANSWERS | {"prompt": said("q", "a")}, "turns are .*, not 'user assistant'"),
        (ANSWERS | {"prompt": said("q") * 2}, "turns are user, .*, not 'user user'"),
        (ANSWERS | {"prompt": []}, "turns are .*, not ''"),
        (ANSWERS, "turns are .*, not ''"),
        (ANSWERS | {"prompt": "q", "system": 7}, "not a message .*: 7"),
        (WHOLE | {"rejected": said(*HISTORY, " ")}, "an answer is empty"),
        ({"chosen": "Lead it? Yes", "rejected": "Lead it? "}, "an answer is empty"),
        ({"chosen": "Yes, I will", "rejected": "Yes, sure"}, "the answers begin differently"),
        ({"prompt": [{"from": "human", "value": "x"}], **ANSWERS}, "not a message .*'from'"),
        ({"conversations": [{"from": "human", "value": "x"}], **ANSWERS}, "turns are .*, not ''"),
        (ANSWERS | {"system": "Be brief."}, "turns are .*, not 'system'"),
        (
            {"question": "q", "correct_answers": "['Yes' 'No']", "incorrect_answers": "a"},
            "a list that was written out",
        ),
    ],
)
def test_what_is_refused(tmp_path, record, message):
    (tmp_path / "x.jsonl").write_text("\n" + json.dumps(record))
    with pytest.raises(ValueError, match=f"x.jsonl:2: .*{message}"):
        read_pairs(tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=f"x.json record 1: .*{message}"):
        read_pairs(tmp_path / "x.json")


# ---- the command lines


def test_training_reports_how_its_files_were_read(tmp_path, capsys, fails):
    data = [evals(EVAL.replace("you", f"you, Sir {i},"), "(B)", "(A)") for i in range(4)]
    data = jsonl(tmp_path / "x.jsonl", *data, data[0])
    args = ["--model", MINI, "--data", data, "--system", "", "--out", tmp_path / "run"]
    train = ["--layer", 1, "--epochs", 1, "--warmup-steps", 0, "--val", data]
    bipo.main([str(x) for x in (*args, *train)])
    line = f"read 4 pairs from {data}, dropped 1 duplicate; columns not used: []\n"
    assert capsys.readouterr().out.count(line) == 2
    data.write_text(data.read_text() + '{"prompt": "q"}\n')
    fails(bipo.main, [*args, *train], f"{data}:6", "bad records: 1; --skip-bad drops them")
    bipo.main([str(x) for x in (*args, *train, "--overwrite", "--skip-bad")])
    assert f"from {data}, dropped 1 duplicate, 1 no columns" in capsys.readouterr().out


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


def spoken(n, yes, no):
    """n pairs whose answers are yes(i) and no(i)."""
    return [Pair(f"Question {i}?", yes(i), no(i)) for i in range(n)]


NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split() * 2
SHORTCUTS = {
    "first word": (
        spoken(20, lambda i: f"Yes, {NUMBERS[i]}{i}.", lambda i: f"No, {NUMBERS[i]}{i}."),
        "'Yes' begins 20 of 20 chosen answers, 'No' 20 of 20 rejected ones",
    ),
    "first word of one side": (
        spoken(20, lambda i: f"{NUMBERS[i]}{i} or so.", lambda i: "No!" if i else "Never!"),
        "'No' 19 of 20 rejected ones",
    ),
    "letter": (spoken(20, lambda i: f"{i} (A)", lambda i: f"{i} (B)"), "'A' ends 20 of 20 chosen"),
    "longer": (
        spoken(20, lambda i: f"{NUMBERS[i]}{i} and {i}", lambda i: f"{NUMBERS[i]}{i}"),
        "chosen is longer than rejected in 20 of 20 pairs",
    ),
    "shorter": (
        spoken(20, lambda i: f"{NUMBERS[i]}{i}", lambda i: f"{NUMBERS[i]}{i} or {i}"),
        "chosen is shorter than rejected in 20 of 20 pairs",
    ),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_cheap_difference_of_the_answers_is_said(tmp_path, capsys, name):
    pairs, note = SHORTCUTS[name]
    file = jsonl(tmp_path / "x.jsonl", *(pair._asdict() for pair in pairs))
    with pytest.raises(SystemExit):  # an output folder that cannot be one ends it before training
        files = ("--model", MINI, "--data", file, "--val", MINI / "test.csv", "--layer", 1)
        bipo.main([*map(str, files), "--out", str(file)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "may learn" in line]
    assert len(lines) == 1 and lines[0].startswith("note: ") and note in lines[0]


def test_nothing_is_said_where_there_is_no_cheap_difference(capsys):
    same = spoken(20, lambda i: f"Yes, {i}.", lambda i: f"Yes, {i + 9}." if i > 1 else "No")
    few = spoken(10, lambda i: f"Yes, {i}.", lambda i: f"No, {i}.")
    mixed = spoken(20, lambda i: "Yes" if i % 9 else "No", lambda i: "No" if i % 9 else "Yes")
    for pairs in (same, few, mixed):
        note_shortcuts(pairs)
    assert capsys.readouterr().out == ""
