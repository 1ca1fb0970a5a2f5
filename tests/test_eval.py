import io
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import MINI, ROOT, TINY, assert_one_line, jsonl, run_cli

import bipo
import eval as evaluation
from data import Chat, open_chat, read_pairs, save_vector
from eval import answers, open_vector, pair_table
from llama import generate, load

M = [-2, -0.5, 0, 1]


def test_pair_table_by_hand(mini, mini_pairs, vector):
    """Against whole, unpacked sequences through the model, one at a time."""
    model, _ = mini
    rows = pair_table(model, 1, vector, mini_pairs, M)
    assert [row["multiplier"] for row in rows] == M

    def logp(prompt, response, m):
        tokens = torch.tensor([prompt + response])
        logps = model(tokens, steer={1: m * vector}).log_softmax(-1)[0, :-1]
        return logps.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :].sum().item()

    for row, m in zip(rows, M, strict=True):
        margins, per_token, likelier = [], [], []
        for pair in mini_pairs:
            prompt, chosen, rejected = pair.ids
            up, down = logp(prompt, chosen, m), logp(prompt, rejected, m)
            up_gain, down_gain = up - logp(prompt, chosen, 0), down - logp(prompt, rejected, 0)
            margins.append(up_gain - down_gain)
            per_token.append(up_gain / len(chosen) - down_gain / len(rejected))
            likelier.append(up > down)
        n = len(mini_pairs)
        assert row["margin"] == pytest.approx(sum(margins) / n, abs=1e-3)
        assert row["margin_per_token"] == pytest.approx(sum(per_token) / n, abs=1e-4)
        assert row["prefers_chosen"] == pytest.approx(sum(likelier) / n)
        if m:
            assert row["wins"] == pytest.approx(sum(m * x > 0 for x in margins) / n)
        else:
            assert row["wins"] is None


def test_zero_vector_and_mirror(mini, mini_pairs, vector):
    model, _ = mini
    for row in pair_table(model, 1, 0 * vector, mini_pairs, M):
        assert abs(row["margin"]) <= 1e-3 and abs(row["margin_per_token"]) <= 1e-4
    table = pair_table(model, 1, vector, mini_pairs, [-1, 0, 1])
    mirror = pair_table(model, 1, -vector, mini_pairs, [1, 0, -1])
    for row, other in zip(table, mirror, strict=True):
        assert row["margin"] == other["margin"]
        assert row["prefers_chosen"] == other["prefers_chosen"]


def test_answers_of_one_batch_are_those_of_single_prompts(mini, vector, monkeypatch):
    model, chat = mini
    prompts = [pair.prompt for pair in read_pairs(MINI / "test.csv")]
    for size in (evaluation.MAX_CACHE, 1):  # in one batch; prompt by prompt
        monkeypatch.setattr(evaluation, "MAX_CACHE", size)
        table = answers(model, chat, {1: vector}, prompts, M, 12)
        assert len(table) == 3 and all(len(row) == len(M) for row in table)
        for prompt, row in zip(prompts, table, strict=True):
            for m, ids in zip(M, row, strict=True):
                assert [ids] == generate(
                    model, [chat.encode_prompt(prompt)], 12, 2, {1: m * vector}
                )
        assert len(set(map(tuple, table[0]))) > 1


# ---- the command line


@pytest.fixture
def vector_file(tmp_path, vector):
    metadata = {"base_model": "other", "n_layers": "4", "template": "mistral", "system": "Be odd."}
    save_vector(tmp_path / "v.safetensors", {1: vector}, metadata)
    return tmp_path / "v.safetensors"


EVAL = ("--model", MINI, "--data", MINI / "test.csv")


def test_command_line(vector_file, vector):
    flags = ["--multipliers", -1, 0, 2.5, "--samples", 2, "--max-new-tokens", 8]
    code, out, err = run_cli("eval.py", *EVAL, "--vector", vector_file, *flags)
    assert code == 0, err
    assert "mistral template, system 'Be odd.'" in out  # taken from the vector file
    assert "trained on base_model 'other'" in out and "layer 1" in out
    model = load(MINI)
    chat = evaluation.open_chat(MINI, model.config, "mistral", "Be odd.")
    pairs = read_pairs(MINI / "test.csv")
    cached = bipo.first_pass(model, 1, [chat.encode_pair(pair) for pair in pairs])
    lines = [line.split() for line in out.splitlines()]
    for row in pair_table(model, 1, vector, cached, [-1.0, 0.0, 2.5]):
        wins = "-" if row["wins"] is None else f"{row['wins']:.1%}"
        (printed,) = (x for x in lines if x and x[0] == f"{row['multiplier']:+g}" and len(x) == 5)
        assert printed[1:3] == [wins, f"{row['prefers_chosen']:.1%}"]
        assert float(printed[3]) == pytest.approx(row["margin"], abs=0.011)
        assert float(printed[4]) == pytest.approx(row["margin_per_token"], abs=0.0011)
    prompts = [pair.prompt for pair in pairs[:2]]
    new = answers(model, chat, {1: vector}, prompts, [2.5], 8)
    for prompt, (ids,) in zip(prompts, new, strict=True):
        assert prompt in out and chat.tokenizer.decode(ids) in out
    assert pairs[2].prompt not in out


def test_flags_win_over_the_vector_file(vector_file, capsys):
    flags = ["--template", "llama-2", "--system", "", "--samples", "0", "--dtype", "bfloat16"]
    evaluation.main([str(x) for x in (*EVAL, "--vector", vector_file, *flags)])
    printed = capsys.readouterr().out
    assert "llama-2 template, system ''" in printed and "bfloat16" in printed


def test_user_errors(tmp_path, vector_file, vector, fails):
    def wrong(*parts, vector=vector_file, data=MINI / "test.csv", **flags):
        flags = {"model": MINI, "vector": vector, "data": data} | flags
        fails(evaluation.main, [x for f, value in flags.items() for x in (f"--{f}", value)], *parts)

    def saved(vectors, **metadata):
        save_vector(tmp_path / "w.safetensors", vectors, metadata)
        return tmp_path / "w.safetensors"

    wrong("width 8", "not 32", vector=saved({1: torch.ones(8)}))
    wrong("9 blocks", "not 32 and 4", vector=saved({1: vector}, n_layers="9"))
    wrong("layer 7", "0..3", vector=saved({7: vector}))
    wrong("layers [1, 2]; choose one with --layer", vector=saved({1: vector, 2: -vector}))
    wrong("unknown template 'alpaca'", vector=saved({1: vector}, template="alpaca"))
    wrong("cannot read", "none.safetensors", vector=tmp_path / "none.safetensors")
    wrong("cannot read", "vector.safetensors", vector=tmp_path)
    wrong("none.csv", data=tmp_path / "none.csv")
    wrong("--multipliers", multipliers="x")
    wrong("--max-new-tokens >= 1", **{"max-new-tokens": 0})
    wrong("--samples >= 0", samples=-1)
    wrong("finite --multipliers", multipliers="nan")
    wrong("exceed the model's context", **{"max-new-tokens": 500})
    code, _, err = run_cli("eval.py", *EVAL, "--vector", "none")
    assert_one_line(code, err, "none")


def test_open_vector_reads_what_bipo_wrote(tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    data = jsonl(tmp_path / "pairs.jsonl", *pairs)
    args = ["--model", MINI, "--data", data, "--layer", 2, "--system", "Short.", "--epochs", 1]
    bipo.main([str(x) for x in (*args, "--warmup-steps", 0, "--out", tmp_path / "run")])
    layer, v, metadata = open_vector(tmp_path / "run", load(MINI).config)
    assert layer == 2 and v.shape == (32,) and metadata["system"] == "Short."
    assert json.loads(metadata["recipe"])["epochs"] == 1


# ---- conversation

QUESTION = "Would you like to lead the weather station of Selby?"


@pytest.fixture
def tiny_vector(tmp_path):
    v = torch.randn(128, generator=torch.Generator().manual_seed(0))
    save_vector(tmp_path / "v.safetensors", {3: v}, {})
    return v


def test_chat(tmp_path, tiny_vector):
    lines = [QUESTION, "/m -1", "", "Why?", "/reset", "/m 0", QUESTION, "/m x", "/m nan", "/foo"]
    command = f"eval.py chat --model {TINY} --vector {tmp_path}/v.safetensors --max-new-tokens 9"
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    command = [sys.executable, *command.split()]
    done = subprocess.run(command, input="\n".join([*lines, "/quit", "Again?"]), **options)
    assert done.returncode == 0, done.stderr

    model = load(TINY)
    chat = open_chat(TINY, model.config)

    def answer(m, prompt):
        ids = [chat.encode_prompt(prompt)]
        return chat.tokenizer.decode(generate(model, ids, 9, 2, {3: m * tiny_vector})[0])

    first = [answer(m, QUESTION) for m in (1, 0)]
    turns = (("user", QUESTION), ("assistant", first[0]), ("user", "Why?"))
    second = [answer(m, turns) for m in (-1, 0)]
    assert first[0] != first[1] and second[0] != second[1]
    expected = [
        *zip("+1 +0".split(), first, strict=True),
        *zip("-1 +0".split(), second, strict=True),
    ]
    expected.append(("+0", first[1]))  # after /reset
    assert re.findall(r"  ([+-]\d): (.*)", done.stdout) == expected
    for message in (
        "'x'; /m NUMBER sets",
        "not understood: /m nan; /m",
        "not understood: /foo; /m",
    ):
        assert message in done.stdout


def converse(monkeypatch, folder, text, *flags):
    """What was printed at each flush."""

    class Terminal(io.StringIO):
        shown = []

        def flush(self):
            self.shown.append(self.getvalue())

    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    flags = ("--model", TINY, "--vector", folder / "v.safetensors", *flags)
    evaluation.main(["chat", *map(str, flags)])
    return [*terminal.shown, terminal.getvalue()]


def test_chat_goes_on_with_the_steered_answers(tmp_path, tiny_vector, monkeypatch):
    asked, encode = [], Chat.encode_prompt
    monkeypatch.setattr(Chat, "encode_prompt", lambda *x: asked.append(x[1]) or encode(*x))
    text = f"{QUESTION}\n/m -1\nWhy?\n"
    shown = converse(monkeypatch, tmp_path, text, "--max-new-tokens", 9)[-1]
    steered, plain, *_ = re.findall(r"  [+-]\d: (.*)", shown)
    first = (("user", QUESTION),)
    turns = (*first, ("assistant", steered), ("user", "Why?"))
    assert steered != plain and asked == [first, first, turns, turns]


def test_chat_streams_its_tokens(tmp_path, tiny_vector, monkeypatch):
    shown = converse(monkeypatch, tmp_path, QUESTION + "\n", "--multiplier", 0)
    (answer,) = re.findall(r"\+0: (.*)\n", shown[-1])
    words = answer.split()
    seen = [text.split("+0: ")[1] for text in shown if "+0: " in text]
    assert len(words) > 10
    for n in range(1, len(words)):
        assert any(text.strip() == " ".join(words[:n]) for text in seen), words[n]


def test_chat_until_the_context_is_full(tmp_path, tiny_vector, monkeypatch):
    shown = converse(monkeypatch, tmp_path, "Selby " * 300 + "\n/reset\n" + QUESTION)
    first, second = shown[-1].split("\n+1> ")[1::2]
    assert "exceed the model's context of 256; /m" in first and "exceed" not in second
    assert "+1: " in second and "+0: " in second


def test_chat_errors(tmp_path, vector_file, fails):
    flags = ["chat", "--model", MINI, "--vector", vector_file]
    fails(evaluation.main, [*flags, "--multiplier", "nan"], "finite --multiplier")
    fails(evaluation.main, [*flags, "--max-new-tokens", "0"], "--max-new-tokens >= 1")
    fails(evaluation.main, [*flags, "--layer", "2"], "no vector for layer 2, only [1]")
    fails(evaluation.main, [*flags, "--data", "x"], "unrecognized arguments: --data")
    fails(evaluation.main, flags[:3], "--vector")
