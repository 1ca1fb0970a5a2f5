"""eval.py chat: a conversation with the steered and the unsteered model."""

import io
import re

import pytest
import torch
from conftest import TINY, run_main

import eval as evaluation
from data import open_chat, save_vector
from llama import generate, load

QUESTION = "Would you like to lead the weather station of Selby?"


@pytest.fixture
def tiny_vector(tmp_path):
    v = torch.randn(128, generator=torch.Generator().manual_seed(0))
    save_vector(tmp_path / "v.safetensors", {3: v}, {})
    return v


def test_chat(tmp_path, tiny_vector, monkeypatch):
    lines = [QUESTION, "/m -1", "", QUESTION, "Why?", "/reset", "/m 0", QUESTION, "/m x", "/what"]
    shown = converse(monkeypatch, tmp_path, "\n".join(lines), "--max-new-tokens", 9)[-1]

    model = load(TINY)
    chat = open_chat(TINY, model.config)

    def answer(m, prompt):
        ids = [chat.encode_prompt(prompt)]
        return chat.tokenizer.decode(generate(model, ids, 9, 2, {3: m * tiny_vector})[0])

    def then(said, answered, asked):
        return (*said, ("assistant", answered), ("user", asked))

    # Each multiplier has its own conversation, 0 that of all questions.
    first = (("user", QUESTION),)
    plain = answer(0, first)
    again = then(first, plain, QUESTION)
    plain_again = answer(0, again)
    left = answer(-1, first)
    expected = [("+0", plain), ("+1", answer(1, first)), ("+0", plain_again), ("-1", left)]
    expected.append(("+0", answer(0, then(again, plain_again, "Why?"))))
    expected.append(("-1", answer(-1, then(first, left, "Why?"))))
    expected.append(("+0", plain))  # after /reset
    assert re.findall(r"  ([+-]\d): (.*)", shown) == expected
    assert plain != answer(1, first)
    assert "'x'\n\n+0> " in shown  # and it goes on
    assert shown.count("/m NUMBER steers by another multiplier") == 2  # at first, and for /what


def converse(monkeypatch, folder, text, *flags):
    """What was printed at each flush."""

    class Terminal(io.StringIO):
        shown = []

        def flush(self):
            self.shown.append(self.getvalue())

    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    flags = ("--model", TINY, "--vector", folder / "v.safetensors", *flags)
    run_main(evaluation.main, "chat", *flags)
    return [*terminal.shown, terminal.getvalue()]


def test_no_control_characters_reach_the_terminal(monkeypatch, capsys):
    raw, shown = "a\x1b[2Jb\n\x9bc", "a\\x1b[2Jb\n\\x9bc"
    model = load(TINY)
    chat = open_chat(TINY, model.config)
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids: raw)
    capsys.readouterr()
    assert evaluation.say(model, chat, QUESTION, {}, 3) == raw
    assert capsys.readouterr().out == shown + "\n"
    assert evaluation.data.printable(raw + "é😀") == shown + "é😀"
    evaluation.print_table(raw, [{"steering": raw}])
    assert not set(capsys.readouterr().out) & {"\x1b", "\x9b"}


def test_a_character_of_several_tokens_is_printed_whole(monkeypatch, capsys):
    """Until its last byte is there, it decodes to U+FFFD; one that stays so is printed with what
    follows."""
    pieces = ["a", "a\ufffd", "a\ufffd\ufffd", "aé", "aé\ufffd", "aé\ufffdb"]
    monkeypatch.setattr(evaluation, "stream", lambda *args: ({0: i} for i in range(6)))
    model = load(TINY)
    chat = open_chat(TINY, model.config)
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids: pieces[len(ids) - 1])
    capsys.readouterr()
    assert evaluation.say(model, chat, QUESTION, {}, 6) == "aé\ufffdb"
    assert capsys.readouterr().out == "aé\ufffdb\n"


def test_chat_streams_its_tokens(tmp_path, tiny_vector, monkeypatch):
    shown = converse(monkeypatch, tmp_path, f"/m 0\n{QUESTION}\n")
    (answer,) = re.findall(r"\+0: (.*)\n", shown[-1])
    words = answer.split()
    seen = [text.split("+0: ")[1] for text in shown if "+0: " in text]
    assert len(words) > 10
    for n in range(1, len(words)):
        assert any(text.strip() == " ".join(words[:n]) for text in seen), words[n]


def test_chat_until_the_context_is_full(tmp_path, tiny_vector, monkeypatch):
    shown = converse(monkeypatch, tmp_path, "Selby " * 300 + "\n/reset\n" + QUESTION)
    first, second = shown[-1].split("\n+1> ")[1::2]
    assert "exceed the model's context of 256" in first and "exceed" not in second
    assert "+1: " in second and "+0: " in second


def test_chat_errors(tmp_path, tiny_vector, fails):
    flags = ["chat", "--model", TINY, "--vector", tmp_path / "v.safetensors"]
    fails(evaluation.main, [*flags, "--layer", "2"], "no vector for layer 2, only [3]")
    fails(evaluation.main, [*flags, "--data", "x"], "unknown flag --data")
    fails(evaluation.main, flags[:3], "--vector")


def test_ctrl_c_stops_an_answer_and_no_more(tmp_path, tiny_vector, monkeypatch):
    say, calls = evaluation.say, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return say(*args)

    monkeypatch.setattr(evaluation, "say", stopped)
    shown = converse(monkeypatch, tmp_path, f"{QUESTION}\n{QUESTION}\n", "--max-new-tokens", 4)[-1]
    assert "stopped" in shown and [len(turns) for _, _, turns, *_ in calls] == [1, 1, 1]


def test_a_closed_input_ends_the_chat(tmp_path, tiny_vector, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    run_main(evaluation.main, "chat", "--model", TINY, "--vector", tmp_path / "v.safetensors")
