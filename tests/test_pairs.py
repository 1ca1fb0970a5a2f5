"""Pair files as others write them, and those that are refused: each record here has the shape of a
published file's, and each refusal is one line that says what to do."""

import gzip
import json
import os
import re
import time

import pytest
from conftest import LFS, MINI, jsonl, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import bipo
import data
import llama
from data import NAMES, Pair, encode_pairs, note_shortcuts, read_pairs, split_pairs

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


def truthful(right, wrong):
    """A record with all answers of a question, as TruthfulQA has."""
    return three("question", "correct_answers", "incorrect_answers", ("Who?", right, wrong))


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


# ---- what is read


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
        ("HH-RLHF", {"prompt": HH.replace("\n", "\r\n"), "chosen": YES, "rejected": NO}, CHAT),
        ("HH-RLHF", {"prompt": HH.replace("\n\n", "\n"), "chosen": YES, "rejected": NO}, CHAT),
        ("HH-RLHF", {"prompt": HH.replace("\n\n", " "), "chosen": YES, "rejected": NO}, CHAT),
        ("messages with empty keys", ANSWERS | {"prompt": [said(LEAD)[0] | {"name": None}]}, LEAD),
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


@settings(max_examples=300, deadline=None)
@given(
    st.text("a Q?\n_*-:", max_size=9), st.sampled_from(["", "Choices:", "\n**Answer options**\n"])
)
def test_a_heading_is_found_as_by_one_expression(text, heading):
    """The expression that says what a heading is, the last line; it may take very long."""
    blank = r"((?!\n)[\W_])*"
    wanted = rf"(?i)\n{blank}(\w+ )?(choice|option|answer|response)s?{blank}$"
    question = f"Why?\n{text}\n{heading}"
    prompt, options = data.split_options(f"{question}\n (A) y\n (B) n")
    assert options == {"(A)": "y", "(B)": "n"}
    assert prompt == re.sub(wanted, "", question.rstrip()).strip()


def test_a_text_that_mentions_a_control_token_stays_text(tmp_path):
    rows = [TRL | {"prompt": "What does </s> mean?", "chosen": "End</s>"}, TRL | {"prompt": "<s>x"}]
    assert [pair.prompt for pair in read_pairs(jsonl(tmp_path / "x.jsonl", *rows))][1] == "<s>x"


# ---- files


def test_jsonl(tmp_path):
    file = tmp_path / "x.JSONL"
    odd = TRL | {"prompt": 'two\nlines, a \u2028 and a quote"', "extra": [1]}
    text = json.dumps(TRL) + "\n\n" + json.dumps(odd, ensure_ascii=False) + "\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with Windows' byte order mark and line end
    first, second = read_pairs(file)
    assert first == Pair(LEAD, YES, NO, f"{file}:1")
    assert second == Pair(odd["prompt"], YES, NO, f"{file}:3")


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


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("x.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n', ":1"),
        ("x.json", '[\n{"prompt": "q", "chosen": "a", "rejected": "b"}]', " record 1"),
        ("x.csv", "prompt,chosen,rejected\nq,a,b\n", ":2"),
        # under the other suffix, as Dataset.to_json("x.json") writes lines
        ("x.json", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n', ":1"),
        ("x.jsonl", '[{"prompt": "q", "chosen": "a", "rejected": "b"}]', " record 1"),
    ],
)
def test_containers(tmp_path, name, text, place):
    file = tmp_path / name
    packed = tmp_path / f"{name}.gz"
    file.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (file, packed):
        assert read_pairs(path) == [Pair("q", "a", "b", f"{path}{place}")]


def test_numbers_and_short_echoes_may_be_answers(tmp_path):
    sums = {"prompt": "1 + 1?", "chosen": "2", "rejected": "1", "id": "7"}
    echo = {"prompt": "Hi Ann!", "chosen": "Hi Ann! Well?", "rejected": "Hi Ann! No."}
    assert len(read_pairs(jsonl(tmp_path / "x.jsonl", sums, echo))) == 2


def test_long_fields_and_headings(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,chosen,rejected\n{'a' * 200_000},b,c\n")
    assert len(read_pairs(tmp_path / "x.csv")[0].prompt) == 200_000
    sides = {"answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    for filling in ("_" * 60_000, "\n" * 100_000, " " * 60_000, "w" * 60_000, "\n_" * 50_000):
        began, record = time.time(), {"question": f"Q?\n{filling}x\n (A) Yes\n (B) No", **sides}
        read_pairs(jsonl(tmp_path / "x.jsonl", record))
        assert time.time() - began < 2


# ---- what is dropped and counted


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


def test_rows_without_a_field_for_each_column_are_broken_records(tmp_path, capsys):
    file = tmp_path / "x.csv"
    file.write_text("question,matching,not_matching\nq,a,b\nq,a,b,c\nr,a,b\n")
    refused(lambda: read_pairs(file), "x.csv:3: not a value for each", "bad records: 1; --skip-bad")
    assert len(read_pairs(file, skip_bad=True)) == 2
    assert "dropped 1 not a value for each named column" in capsys.readouterr().out


def test_too_long_pairs_are_dropped_and_counted(mini, tmp_path, capsys):
    _, chat = mini
    rows = [TRL, TRL | {"prompt": "word " * 600}, TRL | {"chosen": "No,  thanks."}]
    file = jsonl(tmp_path / "x.jsonl", *rows)
    pairs = read_pairs(file)
    advice = "bad records: 1; --skip-bad drops them"
    refused(lambda: encode_pairs(chat, pairs, 512), f"{file}:2: too long", advice)
    kept, ids = encode_pairs(chat, pairs, 512, skip_bad=True)
    assert kept == [pairs[0], pairs[2]] and ids == [chat.encode_pair(pair) for pair in kept]
    assert capsys.readouterr().out.endswith("dropped 1 too long, 2 pairs are left\n")
    nothing = "no pairs: dropped 1 too long, 0 pairs are left"
    refused(lambda: encode_pairs(chat, pairs[1:2], 512, skip_bad=True), nothing)

    # Of TruthfulQA's answers only the one that is too long is dropped.
    record = truthful("No; " + "a" * 900, "Yes")
    pairs = read_pairs(jsonl(tmp_path / "y.jsonl", record))
    (pair,), _ = encode_pairs(chat, pairs, 512, skip_bad=True)
    assert len(pairs) == 2 and pair.chosen == "No"


# ---- what is refused

NO_MESSAGE = " is no text, nor a message of a known role: "
MISSING = ("nan", "None", "NULL", "N/A", " \\N\n")
TOOL_CALL = {"role": "assistant", "content": YES, "tool_calls": [{"function": {"name": "lead"}}]}
THOUGHT = {"role": "assistant", "content": NO, "reasoning_content": "Hm."}
POINTERS = {"prompt": LEAD, "model_a": YES, "model_b": NO}
NO_TURNS = "turns are user, assistant, ..., user, maybe after system, not "
ANOTHER_END = "chosen and rejected must differ in one last message, the assistant's"
NO_PROMPT = "no column is the prompt, and there are no messages before the answers"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        # columns
        ({"statement": "x"}, "no columns prompt, chosen and rejected: only statement"),
        ({"prompt": "q", "chosen": "a"}, "no columns prompt, chosen and rejected: only prompt, c"),
        (TRL | {"Question": "q"}, "'Question' is a second prompt: rename it"),
        (TRL | {"answer_chosen": "a"}, "'answer_chosen' is a second chosen: rename it"),
        (TRL | {"neg": "a"}, "'neg' is a second rejected: rename it"),
        (TRL | {"system": "a", "System_Prompt": "b"}, "'System_Prompt' is a second system: rename"),
        # there is no prompt, or it is in a column of another name
        ({"chosen": f"{LEAD} {YES}", "rejected": f"{LEAD} {NO}"}, NO_PROMPT),
        ({"chosen": YES, "rejected": NO, "context": LEAD}, NO_PROMPT),
        (ANSWERS, NO_PROMPT),
        (ANSWERS | {"prompt": []}, NO_PROMPT),
        (ANSWERS | {"system": "Be brief."}, NO_PROMPT),
        (ANSWERS | {"conversations": [{"from": "human", "value": "x"}]}, NO_PROMPT),
        # texts
        (TRL | {"chosen": 7}, f"chosen{NO_MESSAGE}7"),
        (TRL | {"chosen": [7]}, f"chosen{NO_MESSAGE}7"),
        (TRL | {"prompt": 7}, f"prompt{NO_MESSAGE}7"),
        (TRL | {"prompt": None}, f"prompt{NO_MESSAGE}None"),
        (TRL | {"system": 7}, f"system{NO_MESSAGE}7"),
        (TRL | {"prompt": "\ud800"}, "surrogates not allowed"),
        (TRL | {"chosen": " "}, "an answer is empty"),
        (TRL | {"rejected": None}, f"rejected{NO_MESSAGE}None"),
        # messages
        (TRL | {"prompt": said("q", "a")}, f"{NO_TURNS}'user assistant'"),
        (TRL | {"prompt": said("q") * 2}, f"{NO_TURNS}'user user'"),
        (TRL | {"prompt": [{"from": "human", "value": "x"}]}, f"{NO_MESSAGE}{{'from': 'human'"),
        (WHOLE | {"prompt": None}, f"{NO_MESSAGE}None"),
        (WHOLE | {"chosen": [{"role": "tool", "content": "x"}]}, f"{NO_MESSAGE}{{'role': 'tool'"),
        (WHOLE | {"chosen": [{"role": "user", "content": [1]}]}, f"{NO_MESSAGE}{{'role': 'user'"),
        (WHOLE | {"chosen": ["Yes."]}, "chosen is a list of texts, not one text: 'Yes.'"),
        (WHOLE | {"prompt": "Why?"}, "the messages before the answer do not hold the prompt"),
        (WHOLE | {"chosen": said(*HISTORY)}, ANOTHER_END),
        (WHOLE | {"chosen": said("Hi!", YES)}, ANOTHER_END),
        (ANSWERS | {"chosen": []}, "an answer is empty"),
        (WHOLE | {"rejected": said(*HISTORY, " ")}, "an answer is empty"),
        (WHOLE | {"prompt": said("q") + [3]}, f"prompt{NO_MESSAGE}3"),
        # what a message says beside its content
        (
            ANSWERS | {"prompt": [said(LEAD)[0] | {"name": "Ann"}]},
            "more than role and content: ['n",
        ),
        (WHOLE | {"chosen": [*said(*HISTORY), TOOL_CALL]}, "role and content: ['tool_calls']"),
        (WHOLE | {"rejected": [*said(*HISTORY), THOUGHT]}, "role and content: ['reasoning_c"),
        # transcripts whose turns cannot be told apart
        (
            TRL | {"prompt": "Human: Hi!Assistant: Hello.\n\nAssistant:"},
            "a turn of a transcript ho",
        ),
        (TRL | {"prompt": "Human: Hi!\n\nAssistant: Hm.\nAssistant:"}, "a turn of a transcript ho"),
        # answers that repeat the prompt, are missing, or stand in other columns
        (
            TRL | {"chosen": f"{LEAD}\n{YES}", "rejected": f" {LEAD} {NO}"},
            "the whole prompt, remove",
        ),
        *[(TRL | {"rejected": x}, f"a value is missing: {x!r}") for x in MISSING],
        *[(TRL | {"system": x}, f"a value is missing: {x!r}") for x in MISSING],
        (truthful("N/A", "a"), "a value is missing: 'N/A'"),
        (POINTERS | {"chosen": "0", "rejected": "1"}, "the answers 0 and 1 are names, not texts"),
        (POINTERS | {"chosen": "model_a", "rejected": "model_b"}, "are names, not texts"),
        (POINTERS | {"chosen": 1, "rejected": 0}, f"chosen{NO_MESSAGE}1"),
        # lists and messages that were written out as text
        (TRL | {"chosen": "[{'role': 'user', 'content': 'x'}]"}, "a list of messages written out"),
        (TRL | {"rejected": '[ {"from": "human", "value": "x"}]'}, "list of messages written out"),
        (TRL | {"prompt": "\n[{'content': 'x', 'role': 'user'}\n {"}, "list of messages written"),
        (TRL | {"chosen": str(said(*HISTORY)), "rejected": json.dumps(said(LEAD))}, "written out"),
        (truthful("['Yes' 'No']", "a"), "not a text, or a list that was written out"),
        (evals("q", "a", None), "not a text, or a list that was written out: None"),
        (truthful("a;" * 999, "b;" * 999), "there are more than 10,000 pairs of its answers"),
        # prompts that are rendered already, as in TRL's issues 1640 and 1752
        (TRL | {"prompt": "<|im_start|>user\nLead?<|im_end|>\n"}, "a text holds a chat template"),
        (TRL | {"prompt": "<s>[INST] Lead? [/INST]"}, "a text holds a chat template"),
        (TRL | {"prompt": "[INST] Lead? [/INST]"}, "a text holds a chat template"),
        (TRL | {"chosen": "<|assistant|>\nYes."}, "a text holds a chat template"),
        # and answers that hold their end
        (TRL | {"chosen": "Yes.</s>", "rejected": "No.</s>\n"}, "both answers end in"),
        (TRL | {"chosen": "Yes.<|im_end|>", "rejected": "No.</s>"}, "both answers end in"),
    ],
)
def test_records_that_are_refused(tmp_path, record, reason):
    lines, whole = tmp_path / "x.jsonl", tmp_path / "x.json"
    lines.write_text("\n" + json.dumps(record))
    refused(lambda: read_pairs(lines), "x.jsonl:2: ", reason)
    whole.write_text(json.dumps([record]))
    refused(lambda: read_pairs(whole), "x.json record 1: ", reason)


COLUMNS = "question,matching,not_matching\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.txt", b"", "is no .csv, .json or .jsonl"),
        ("x.jsonl", LFS, "Git LFS pointer"),
        ("x.jsonl", b"PAR1\x15\x04", "Parquet"),
        ("x.parquet", b"PAR1\x15\x04", "is no .csv, .json or .jsonl"),
        ("x.txt.gz", gzip.compress(b"{}", mtime=0), "is no .csv, .json or .jsonl, maybe with .gz"),
        ("x.jsonl.gz", b"{}", "Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9], "ended before the end-of-stream marker"),
        ("x.jsonl.gz", gzip.compress(b"\n" * 2**26, mtime=0), "holds more than 19 MiB"),
        # JSON
        ("x.jsonl", b"", "no pairs: read 0 pairs from "),
        ("x.jsonl", b"\n{oops\n", ": line 2 holds no whole record: Expecting property name"),
        ("x.jsonl", b'\n["a"]\n', ":2: not a value for each named column: ['a']"),
        (
            "x.jsonl",
            b'{"prompt": "\xe9"}',
            "save it as UTF-8: 'utf-8' codec can't decode byte 0xe9",
        ),
        ("x.jsonl", b'{"a":' * 100_000, ": line 1 holds no whole record: it is nested too deeply"),
        ("x.json", b"[" * 100_000, "it is nested too deeply"),
        ("x.json", b'[{"a":' * 100_000, "it is nested too deeply"),
        ("x.json", b"7", ":1: not a value for each named column: 7"),
        ("x.json", b'{\n"prompt": "a"\n}', ": line 1 holds no whole record: Expecting property"),
        ("x.json", b'{"prompt": ["a"], "chosen": ["b"]}', ":1: no columns prompt, chosen and"),
        # CSV
        ("x.csv", b"", "no pairs: read 0 pairs"),
        ("x.csv", COLUMNS, "no pairs: read 0 pairs"),
        ("x.csv", COLUMNS + "a,b\n", ":2: not a value for each named column"),
        ("x.csv", COLUMNS + "a,b,c,d\n", ":2: not a value for each named column"),
        ("x.csv", COLUMNS + 'a,b,c\n"a', ": line 3: unexpected end of data"),
        ("x.csv", COLUMNS + '"a\nb",c,d\na,,c\n', ":4: an answer is empty"),
        ("x.csv", "question,matching\na,b\n", ":2: no columns prompt, chosen and rejected: only q"),
        ("x.csv", "matching,matching\na,b\n", "two columns have one name"),
        ("x.csv", "prompt;chosen;rejected\na;b;c\n", "rejected: only prompt;chosen;rejected"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, reason):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_pairs(tmp_path / name), name, reason)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    refused(
        lambda: read_pairs(tmp_path / "none.jsonl"), "cannot read", "none.jsonl", "No such file"
    )


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").symlink_to("/dev/zero")
    (tmp_path / "z.jsonl").mkdir()
    for name in ("x.jsonl", "y.jsonl", "z.jsonl"):
        for read in (read_pairs, data.load_vector, llama.read_json):
            if not (name == "z.jsonl" and read is data.load_vector):  # a folder of a run
                refused(lambda read=read, name=name: read(tmp_path / name), "a folder, a pipe or")


# ---- sets of pairs


def test_split_keeps_a_prompts_pairs_together():
    pairs = [Pair(f"q{i % 30}", f"a{i}", f"b{i}") for i in range(90)]
    kept, held_out = split_pairs(pairs, seed=0)
    assert len(held_out) == 9 and sorted(kept + held_out) == sorted(pairs)
    assert not {p.prompt for p in kept} & {p.prompt for p in held_out}
    assert split_pairs(pairs, seed=0) == (kept, held_out) != split_pairs(pairs, seed=1)
    with pytest.raises(ValueError, match="one prompt .* give --val"):
        split_pairs(pairs[:1], seed=0)


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
        "'Yes' begins chosen alone in 20 of 20 pairs; 'No' begins rejected alone in 20 of 20 pairs",
    ),
    "first word of one side": (
        spoken(20, lambda i: f"{NUMBERS[i]}{i} or so.", lambda i: "No!" if i else "Never!"),
        "'No' begins rejected alone in 19 of 20 pairs",
    ),
    "longer": (
        spoken(20, lambda i: f"{NUMBERS[i]}{i} and {i}", lambda i: f"{NUMBERS[i]}{i}"),
        "chosen is longer in 20 of 20 pairs",
    ),
    "shorter": (
        spoken(20, lambda i: f"{NUMBERS[i]}{i}", lambda i: f"{NUMBERS[i]}{i} or {i}"),
        "chosen is shorter in 20 of 20 pairs",
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
