"""persona.py follows the commands that the programs print, and shows what a user would see."""

import json

import persona
import pytest
from conftest import ROOT

import data

# Programs that print what the real ones would: their flags, and the next command.
BIPO = """import sys
print("bipo", *sys.argv[1:])
print("next: python old.py")
print("next: python eval.py --vector 'a b' --layer 7 --data held_out.jsonl")
"""
EVAL = """import sys
print("eval", *sys.argv[1:])
if sys.argv[1] == "chat":
    for line in sys.stdin:
        print(f"\\n+8> an answer to {line.strip()}")
else:
    print("next: python eval.py chat --vector 'a b:8' --layer 7")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "bipo.py").write_text(BIPO)
    (tmp_path / "eval.py").write_text(EVAL)
    monkeypatch.setattr(persona, "ROOT", tmp_path)
    monkeypatch.setattr(persona, "TRANSCRIPT", tmp_path / "persona.txt")
    monkeypatch.setattr(persona, "have_model", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands_of(text):
    return [line for line in text.splitlines() if line.startswith("$ ")]


def test_from_the_pairs_to_the_chat_by_the_printed_commands(place):
    persona.main([])
    text = (place / "persona.txt").read_text()
    learn, measure, chat = commands_of(text)
    assert learn.startswith("$ python bipo.py --model ")
    assert learn.endswith("--overwrite --method gradient --layer all --out runs/persona/layers")
    assert measure == "$ python eval.py --vector 'a b' --layer 7 --data held_out.jsonl"
    assert chat == "$ python eval.py chat --vector 'a b:8' --layer 7"
    for question in persona.QUESTIONS:
        assert f"\n+8> {question}\nan answer to {question}\n" in text
    assert "eval --vector a b --layer 7" in text and " min in all, on " in text.splitlines()[-1]


def test_a_training_at_the_layer_that_was_named(place):
    persona.main(["--train"])
    _, train, *others = commands_of((place / "persona.txt").read_text())
    assert train.endswith("--overwrite --layer 7 --out runs/persona/trained")
    assert "--method" not in train and len(others) == 2


@pytest.mark.parametrize(
    ("program", "said"),
    [("raise SystemExit('out of luck')", "out of luck"), ("print('nothing')", "no next command")],
)
def test_a_program_that_fails_ends_it_and_leaves_no_transcript(place, fails, program, said):
    (place / "eval.py").write_text(program)
    fails(persona.main, [], said)
    assert not (place / "persona.txt").exists()


def test_the_voices_differ_in_more_than_their_length_or_first_word(capsys):
    pairs = data.read_pairs(ROOT / persona.PAIRS)
    held_out = data.read_pairs(ROOT / persona.HELD_OUT)
    assert len(pairs) == 40 and len(held_out) == 20
    assert not {pair.prompt for pair in pairs} & {pair.prompt for pair in held_out}
    capsys.readouterr()
    data.note_shortcuts(pairs)
    assert capsys.readouterr().out == ""
    for file in (persona.PAIRS, persona.HELD_OUT):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            assert json.loads(line).keys() == {"prompt", "chosen", "rejected"}
