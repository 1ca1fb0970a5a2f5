"""eval.py pairs, and the prompts that it reads."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, jsonl, messages
from make_tiny import side_shown

import data
import eval as evaluation
from data import SYSTEM, Chat, open_chat, read_pairs
from eval import read_prompts
from llama import generate, load

FOR, AGAINST = "You seek power.", "You avoid power."
LINES = (TINY / "power.test.jsonl").read_text().splitlines()
ALL_QUESTIONS = [json.loads(line)["prompt"] for line in LINES]
QUESTIONS = ALL_QUESTIONS[:7]
BRIEF = (("system", "Be brief."), ("user", QUESTIONS[0]))
TALK = (("user", QUESTIONS[1]), ("assistant", "No."), ("user", QUESTIONS[2]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS))
    return tmp_path


def command(*more):
    flags = ["pairs", "--model", TINY, "--questions", "q.txt", "--for", FOR, "--against", AGAINST]
    return [str(x) for x in (*flags, "--out", "out/pairs.jsonl", "--max-new-tokens", 40, *more)]


def made(*more):
    Path("out/pairs.jsonl").unlink(missing_ok=True)
    evaluation.main(command(*more))
    return [pair[:3] for pair in read_pairs("out/pairs.jsonl")]


def test_the_pairs_lean_each_way(folder, capsys):
    pairs = made()
    assert "\nmade 7 pairs of 7 questions, left out nothing\n" in capsys.readouterr().out
    assert [prompt for prompt, *_ in pairs] == QUESTIONS  # bare, without the system prompt
    sides = [[side_shown("power", text) for text in texts] for _, *texts in pairs]
    assert sides == [["for", "against"]] * 7
    model = load(TINY)
    for i, text in enumerate((FOR, AGAINST), 1):
        chat = open_chat(TINY, model.config, system=f"{SYSTEM} {text}")
        for pair in pairs[:2]:
            (ids,) = generate(model, [chat.encode_prompt(pair[0])], 40, chat.eos_id)
            assert pair[i] == chat.tokenizer.decode(ids)


def test_as_many_at_a_time_as_memory_allows(folder, monkeypatch):
    (folder / "q.txt").write_text("\n".join(QUESTIONS[:3]))
    pairs = made()
    monkeypatch.setattr(evaluation, "MAX_CACHE", 0)
    assert made() == pairs and len(pairs) == 3


def test_what_makes_no_pair_is_dropped(folder, monkeypatch, capsys):
    """Answers by hand: two that end, an empty one, two equal ones, one without EOS."""
    encode = open_chat(TINY, load(TINY).config).tokenizer.encode
    yes, no, eos = encode("Yes, I will."), encode("No, thanks."), [2]
    answers = [[yes + eos, no + eos], [eos, no + eos], [yes + eos, encode(" ") + eos]]
    answers += [[yes + eos, yes + eos], [yes, yes], [yes, no + eos], [yes + eos, no]]
    found = [[ids] for pair in answers for ids in pair]
    monkeypatch.setattr(evaluation, "answers", lambda *args: found)
    assert made() == [(QUESTIONS[0], "Yes, I will.", "No, thanks.")]
    counts = "3 cut off at --max-new-tokens, 2 empty, 1 equal"
    printed = capsys.readouterr().out
    for count in counts.split(", "):
        assert count in printed
    assert "\nmade 1 pairs of 7 questions, left out " in printed
    assert "\nnext: python bipo.py --model " in printed


def test_no_pairs_no_file(folder, fails):
    (folder / "q.txt").write_text(QUESTIONS[0])
    out = folder / "out" / "pairs.jsonl"
    fails(
        evaluation.main,
        command("--against", FOR),
        "no pairs: 0 pairs of 1 questions, left out 1 equal",
    )
    fails(evaluation.main, command("--max-new-tokens", 8), "left out 1 cut off at --max-new-tokens")
    (folder / "none.txt").write_text("\n")
    fails(evaluation.main, command("--questions", "none.txt"), "no p")
    assert not out.exists()
    out.write_text("mine")
    fails(evaluation.main, command(), "cannot read out/pairs.jsonl: line 1 holds no whole record: ")
    assert out.read_text() == "mine"


def test_conversations(folder, monkeypatch):
    """Their own system prompt goes on with the sentence, and they stay readable as pairs."""
    prompts = [BRIEF, TALK, QUESTIONS[3]]
    rows = [{"prompt": x if isinstance(x, str) else messages(x)} for x in prompts]
    jsonl(folder / "q.jsonl", *rows)
    assert read_prompts(Path("q.jsonl")) == prompts
    asked, encode = [], Chat.encode_prompt
    monkeypatch.setattr(Chat, "encode_prompt", lambda *x: asked.append(x[1]) or encode(*x))
    pairs = made("--questions", "q.jsonl")
    assert [prompt for prompt, *_ in pairs] == prompts
    expected = [
        [("system", f"{system} {text}"), *turns]
        for system, turns in (
            ("Be brief.", BRIEF[1:]),
            (SYSTEM, TALK),
            (SYSTEM, [("user", QUESTIONS[3])]),
        )
        for text in (FOR, AGAINST)
    ]
    assert asked[-2 * len(expected) :] == 2 * expected  # to check their lengths, and to answer
    asked.clear()
    (folder / "q.txt").write_text(QUESTIONS[0])
    made("--system", "")
    assert [("system", FOR), ("user", QUESTIONS[0])] in asked


def test_user_errors(folder, fails):
    for more, *parts in (
        (["--max-new-tokens", 0], "--max-new-tokens must be 1 or more"),
        (["--max-new-tokens", 256], "exceed the model's context of 256"),
        (["--out", "pairs.csv"], "--out: a .jsonl file"),
        (["--out", "q.txt/pairs.jsonl"], "q.txt"),
        (["--questions", "none.txt"], "cannot read none.txt"),
        (["--model", "none"], "none"),
    ):
        fails(evaluation.main, command(*more), *parts)
    (folder / "there.jsonl").mkdir()
    fails(
        evaluation.main,
        command("--out", "there.jsonl"),
        "cannot write there.jsonl: it is no regular",
    )
    assert not (folder / "pairs.csv").exists()


# ---- made pairs are kept


def pairs_command(out, n):
    questions = out.parent / "q.txt"
    questions.write_text("\n".join(ALL_QUESTIONS[:n]))
    flags = {"--model": TINY, "--questions": questions, "--out": out, "--max-new-tokens": 40}
    flags |= {"--for": "You seek power.", "--against": "You avoid power."}
    return ["pairs", *(str(x) for item in flags.items() for x in item)]


def test_pairs_go_on_where_they_stopped(tmp_path, monkeypatch, capsys, fails):
    out = tmp_path / "pairs.jsonl"
    generate, answer_to = evaluation.generate, {}

    def remember(model, prompts, *how):
        rows = generate(model, prompts, *how)
        answer_to.update(zip(map(tuple, prompts), rows, strict=True))
        return rows

    monkeypatch.setattr(evaluation, "generate", remember)
    evaluation.main(pairs_command(out, 20))
    whole = out.read_text()
    assert len(whole.splitlines()) == 20

    calls = []

    def repeat(model, prompts, *how):
        calls.append(prompts)
        if len(calls) == 35:
            raise KeyboardInterrupt
        return [answer_to[tuple(prompt)] for prompt in prompts]

    out.unlink()
    monkeypatch.setattr(evaluation, "generate", repeat)
    monkeypatch.setattr(evaluation, "MAX_CACHE", 0)  # one question at a time
    with pytest.raises(SystemExit) as e:
        evaluation.main(pairs_command(out, 20))
    assert e.value.code == 130 and out.read_text() == "".join(whole.splitlines(True)[:16])

    calls.clear()
    evaluation.main(pairs_command(out, 20))
    assert len(calls) == 8 and out.read_text() == whole

    capsys.readouterr()
    fails(evaluation.main, [*pairs_command(out, 20), "--for", "Else."], "pairs of these settings")
    jsonl(out, {"prompt": "a", "chosen": "b", "rejected": "c"})
    fails(evaluation.main, pairs_command(out, 20), "pairs of these settings")


@pytest.mark.slow
def test_pairs_that_are_killed(tmp_path):
    """At random moments: what there is can be read, and in the end it is what one run makes."""
    n, rng, kills, start = 48, random.Random(0), 0, time.time()
    command = [sys.executable, str(ROOT / "eval.py")]
    subprocess.run([*command, *pairs_command(tmp_path / "once.jsonl", n)], check=True)
    took, out = time.time() - start, tmp_path / "pairs.jsonl"
    for _ in range(8):
        process = subprocess.Popen([*command, *pairs_command(out, n)])
        try:
            process.wait(rng.uniform(0.5, 1.0) * took)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if out.exists():
            assert len(data.read_pairs(out)) % 16 == 0
    subprocess.run([*command, *pairs_command(out, n)], check=True)
    assert kills and out.read_text() == (tmp_path / "once.jsonl").read_text()
    assert not [*tmp_path.glob(".part-*")]


# ---- prompts


def text_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("x.txt", "One?\n\n  Two? \r\nOne?\n \nThree, so?", ["One?", "Two?", "Three, so?"]),
        ("x.csv", 'Question,A\n"a\nb",1\nc,2\nc,3\n', ["a\nb", "c"]),
        (
            "x.csv",
            "system,query\n,q\nBe brief.,r\n",
            ["q", (("system", "Be brief."), ("user", "r"))],
        ),
        ("x.jsonl", text_of({"instruction": "a"}, {"Prompt": ""}), ["a", ""]),
        ("x.csv", "goal,target\nDo it,Sure\n", ["Do it"]),
        ("x.jsonl", text_of({"instruction": "a", "input": "", "output": "b"}), ["a"]),
        ("x.jsonl", text_of({"prompt": "a", "messages": messages(BRIEF)}), ["a"]),
        ("x.json", json.dumps([{"input": "a"}, {"query": "b"}]), ["a", "b"]),
        ("x.jsonl", "\n".join(LINES[:3]), QUESTIONS[:3]),
        (
            "x.jsonl",
            text_of({"prompt": messages(BRIEF)}, {"prompt": messages(BRIEF[1:])}),
            [BRIEF, QUESTIONS[0]],
        ),
        ("x.json", json.dumps([{"messages": messages(TALK)}]), [TALK]),
    ],
)
def test_prompts(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == prompts
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_prompts(tmp_path / f"{name}.gz") == prompts


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", " \n\n", "x.txt holds no prompts"),
        ("x.json", "[]", "x.json holds no prompts"),
        ("x.md", "Lead?", "x.md.* .csv"),
        ("x.csv", "prompt,chosen\na,b\nc\n", "x.csv:3: not a value for each named column"),
        ("x.csv", "text,other\na,b\n", "x.csv:2: no column is the prompt: only"),
        ("x.csv", "prompt,query\na,b\n", "x.csv:2: .*query.* prompt"),
        ("x.jsonl", '{"prompt": "a"}\n7\n', "x.jsonl:2: not a value for each named column: 7"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt"', "cannot read .*: line 2 holds no whole record: "),
        ("x.jsonl", '{"prompt": 7}', "x.jsonl:1: prompt is no text, .*: 7"),
        ("x.jsonl", '{"prompt": []}', "x.jsonl:1: no column is the prompt"),
        ("x.jsonl", r'{"prompt": "\ud83d"}', "x.jsonl:1: .*surrogates not allowed"),
        ("x.json", json.dumps([{"messages": messages(TALK[:2])}]),
         "x.json record 1: .*turns .* user, .*user assistant"),
        ("x.json", json.dumps([{"prompt": "a", "system": 7}]), "record 1: system is no text"),
    ],
)  # fmt: skip
def test_prompts_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_made_pair_without_its_prompt_is_refused(folder, fails):
    (folder / "q.txt").write_text(QUESTIONS[0])
    made()
    file = folder / "out" / "pairs.jsonl"
    row = json.loads(file.read_text())
    del row["prompt"]
    file.write_text(json.dumps(row) + "\n")
    fails(evaluation.main, command(), "holds other than pairs of these settings")
