"""eval.py pairs, and the prompts that it reads."""

import gzip
import json

import pytest
import torch
from conftest import TINY, jsonl
from make_tiny import side_shown

import eval as evaluation
from data import SYSTEM, Chat, open_chat, read_pairs, read_prompts
from llama import generate, load, stream

FOR, AGAINST = "You seek power.", "You avoid power."
LINES = (TINY / "power.test.jsonl").read_text().splitlines()
QUESTIONS = [json.loads(line)["prompt"] for line in LINES[:7]]
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
    evaluation.main(command("--overwrite", *more))
    return [pair[:3] for pair in read_pairs("out/pairs.jsonl")]


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def test_the_pairs_lean_each_way(folder, capsys):
    pairs = made()
    assert capsys.readouterr().out == "made 7 pairs of 7 questions\n"
    assert [prompt for prompt, *_ in pairs] == QUESTIONS  # bare, without the system prompt
    sides = [[side_shown("power", text) for text in texts] for _, *texts in pairs]
    assert sides == [["for", "against"]] * 7
    model = load(TINY)
    for i, text in enumerate((FOR, AGAINST), 1):
        chat = open_chat(TINY, model.config, system=f"{SYSTEM} {text}")
        for pair in pairs[:2]:
            (ids,) = generate(model, [chat.encode_prompt(pair[0])], 40, chat.eos_id)
            assert pair[i] == chat.tokenizer.decode(ids)


@pytest.fixture
def calls(monkeypatch):
    """(number of rows, seed) of each batch."""
    calls = []

    def counted(model, rows, *args, seed, **options):
        calls.append((len(rows), seed))
        return stream(model, rows, *args, seed=seed, **options)

    monkeypatch.setattr(evaluation, "stream", counted)
    return calls


def test_as_many_at_a_time_as_memory_allows(folder, monkeypatch, calls):
    (folder / "q.txt").write_text("\n".join(QUESTIONS[:3]))
    pairs = made()
    monkeypatch.setattr(evaluation, "MAX_CACHE", 0)
    assert made() == pairs
    assert calls == [(6, 0), (2, 0), (2, 2), (2, 4)]


def test_batches_and_what_becomes_of_their_tokens(monkeypatch):
    """As many rows as MAX_CACHE holds, at least `together`; each row's tokens and vectors are its
    own. The fake answers with a token of the row's prompt and, if odd, one of its vector."""
    rows = [[i] * 5 for i in range(3)] + [[i] * 10 for i in range(3, 7)]
    steer, sizes = {1: torch.arange(7.0)[:, None, None]}, []

    def fake(model, batch, max_new_tokens, eos_id, steer, **options):
        sizes.append(len(batch))
        yield {i: row[0] for i, row in enumerate(batch)}
        yield {i: int(steer[1][i]) for i, row in enumerate(batch) if row[0] % 2}

    monkeypatch.setattr(evaluation, "stream", fake)
    chat = open_chat(TINY, load(TINY).config)
    for limit, together, size in ((60, 1, 3), (59, 1, 2), (60, 2, 2), (100, 3, 3), (0, 3, 3)):
        monkeypatch.setattr(evaluation, "MAX_CACHE", limit)
        sizes.clear()
        new = evaluation.generate_all(None, chat, rows, 10, together, steer)
        assert new == [[i, i] if i % 2 else [i] for i in range(7)]
        assert sizes == [min(size, 7 - start) for start in range(0, 7, size)]
    assert evaluation.generate_all(None, chat, [], 10, 1) == []


def test_temperature_and_seed(folder, monkeypatch, calls):
    (folder / "q.txt").write_text("\n".join(QUESTIONS[:2]))
    warm = ["--temperature", 0.7, "--seed", 5]
    first, other = made(*warm), made(*warm, "--seed", 6)
    assert first == made(*warm) != other and first != made("--seed", 5)
    calls.clear()
    monkeypatch.setattr(evaluation, "MAX_CACHE", 0)
    made(*warm)
    assert calls == [(2, 5), (2, 7)]  # rows that come later draw anew


def test_what_is_dropped_is_counted(folder, monkeypatch, capsys):
    """Answers by hand: two that end, an empty one, two equal ones, one without EOS."""
    encode = open_chat(TINY, load(TINY).config).tokenizer.encode
    yes, no, eos = encode("Yes, I will."), encode("No, thanks."), [2]
    answers = [[yes + eos, no + eos], [eos, no + eos], [yes + eos, encode(" ") + eos]]
    answers += [[yes + eos, yes + eos], [yes, yes], [yes, no + eos], [yes + eos, no]]
    monkeypatch.setattr(evaluation, "generate_all", lambda *args, **options: sum(answers, []))
    assert made() == [(QUESTIONS[0], "Yes, I will.", "No, thanks.")]
    report = "made 1 pairs of 7 questions, dropped 6: 2 empty, 2 equal, 2 truncated\n"
    assert capsys.readouterr().out == report


def test_no_pairs_no_file(folder, fails):
    (folder / "q.txt").write_text(QUESTIONS[0])
    out = folder / "out" / "pairs.jsonl"
    fails(
        evaluation.main,
        command("--against", FOR),
        "made 0 pairs of 1 questions, dropped 1: 1 equal",
    )
    fails(evaluation.main, command("--max-new-tokens", 8), "made 0 pairs", "truncated; nothing is")
    assert not out.exists()
    out.write_text("mine")
    fails(evaluation.main, command(), "out/pairs.jsonl is there", "--overwrite")
    fails(evaluation.main, command("--overwrite", "--against", FOR), "1 equal; nothing is written")
    assert out.read_text() == "mine"


def test_conversations(folder, monkeypatch):
    """Their own system prompt goes on with the sentence, and they stay readable as pairs."""
    prompts = [BRIEF, TALK, QUESTIONS[3]]
    rows = [{"prompt": x if isinstance(x, str) else messages(x)} for x in prompts]
    jsonl(folder / "q.jsonl", *rows)
    assert read_prompts("q.jsonl") == prompts
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
    assert asked == expected
    asked.clear()
    (folder / "q.txt").write_text(QUESTIONS[0])
    made("--system", "")
    assert asked[0] == [("system", FOR), ("user", QUESTIONS[0])]


def test_user_errors(folder, fails):
    for more, *parts in (
        (["--max-new-tokens", 0], "--max-new-tokens >= 1"),
        (["--temperature", -1], "--temperature >= 0"),
        (["--temperature", "nan"], "--temperature >= 0"),
        (["--seed", -1], "--seed"),
        (["--max-new-tokens", 256], "exceed the model's context of 256"),
        (["--out", "pairs.csv"], "pairs.csv", "must end in .jsonl"),
        (["--out", "q.txt/pairs.jsonl"], "q.txt"),
        (["--questions", "none.txt"], "cannot read none.txt"),
        (["--model", "none"], "no model 'none'"),
    ):
        fails(evaluation.main, command(*more), *parts)
    (folder / "there.jsonl").mkdir()
    fails(evaluation.main, command("--out", "there.jsonl", "--overwrite"), "there.jsonl is there")
    assert not (folder / "pairs.csv").exists()


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
        ("x.json", json.dumps({"rows": [{"input": "a"}, {"query": "b"}]}), ["a", "b"]),
        ("x.jsonl", "\n".join(LINES[:3]), QUESTIONS[:3]),
        (
            "x.jsonl",
            text_of({"prompt": messages(BRIEF)}, {"prompt": messages(BRIEF[1:])}),
            [BRIEF, QUESTIONS[0]],
        ),
        ("x.json", json.dumps([{"conversations": messages(TALK)}]), [TALK]),
    ],
)
def test_prompts(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == prompts
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_prompts(str(tmp_path / f"{name}.gz")) == prompts


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", " \n\n", "x.txt holds no prompts"),
        ("x.md", "Lead?", r"x.md: a prompt file ends in .txt, .csv, .jsonl, .json or that and .gz"),
        ("x.csv", "prompt,chosen\na,b\nc\n", "x.csv:3: 1 fields, but 2 columns"),
        ("x.csv", "text\na\n", "x.csv:2: .* the prompt, named prompt, not none of text"),
        ("x.csv", "prompt,query\na,b\n", "x.csv:2: .* not prompt and query of prompt, query"),
        ("x.jsonl", '{"prompt": "a"}\n7\n', "x.jsonl:2: not a JSON object: 7"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt"', "x.jsonl:2: not JSON"),
        ("x.jsonl", '{"prompt": 7}', "x.jsonl:1: 7 is not a message"),
        ("x.jsonl", '{"prompt": []}', r"x.jsonl:1: turns \[\]: wanted is user"),
        ("x.jsonl", r'{"prompt": "\ud83d"}', "x.jsonl:1: .*surrogates not allowed"),
        ("x.json", json.dumps([{"conversations": messages(TALK[:2])}]),
         r"x.json record 1: turns \['user', 'assistant'\]: wanted is user"),
        ("x.json", json.dumps([{"prompt": "a", "system": 7}]), "record 1: .* content is 7"),
    ],
)  # fmt: skip
def test_prompts_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
