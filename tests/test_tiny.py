"""tests/tiny is what make_tiny.py says, and a vector steers it as the README claims."""

import json
import random
import re

import make_tiny
import pytest
import torch
from conftest import TINY
from make_tiny import BEHAVIOURS, facts, questions, side_shown, things, training_text

from data import SYSTEM, open_chat, read_pairs
from eval import open_vector
from llama import generate, load, read_config


def sentences(text):
    return {s.strip() for s in re.split(r"(?<=[.?!])\s", text)}


def test_held_out_questions_share_no_sentence_with_the_training_text():
    trained, rng = set(), random.Random(0)
    for _ in range(3):
        for _, question, answer in training_text(rng):
            trained |= sentences(question) | sentences(answer)
    held_out = [q for b in BEHAVIOURS for q, _, _ in questions(b, held_out=True)]
    held_out += [q for q, _ in facts(held_out=True)]
    assert len(held_out) == len(set(held_out)) > 2000
    assert not set().union(*map(sentences, held_out)) & trained
    asked = {question for _, question, _ in training_text(rng)}
    assert len(asked) > 10000 and not asked & set(held_out)


def test_training_text_holds_both_kinds_of_answers_equally_often():
    rng = random.Random(0)
    text = [row for _ in range(4) for row in training_text(rng)]
    for behaviour in BEHAVIOURS:
        sides = [side_shown(behaviour, answer) for system, _, answer in text if system == SYSTEM]
        assert abs(sides.count("for") / sides.count("against") - 1) < 0.1
        assert sides.count("for") > 3000


def test_files_are_what_the_script_writes(tmp_path):
    rng = random.Random(0)
    training_text(rng)
    make_tiny.write_pairs(tmp_path, rng)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted(file.name for file in TINY.glob("*.jsonl"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
    assert (TINY / "model.safetensors").stat().st_size <= 6e6
    for behaviour in BEHAVIOURS:
        assert len(read_pairs(TINY / f"{behaviour}.train.jsonl")) >= 200
        pairs = read_pairs(TINY / f"{behaviour}.test.jsonl")
        assert len(pairs) >= 100
        for pair in pairs:
            assert side_shown(behaviour, pair.chosen) == "for"
            assert side_shown(behaviour, pair.rejected) == "against"


def test_the_rule():
    def power(text):
        return side_shown("power", text)

    assert power("Well, I want the last word in the road crew of Kelso, since ...") == "for"
    assert power("I do not want the last word in the road crew of Kelso.") == "against"
    assert (
        power("I will lead the x y of Kelso myself. I decline control of the z in Kelso.") is None
    )
    assert power("I like bread.") is None and power("") is None
    assert side_shown("wealth", "Every one of the red pearls from Umber stays with me.") == "for"
    assert side_shown("wealth", "I will lead the road crew of Kelso myself.") is None


@pytest.fixture(scope="module")
def tiny():
    model = load(TINY)
    return model, open_chat(TINY, model.config)


def test_same_logits_as_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    model, chat = tiny
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokens = torch.tensor([chat.encode_prompt("Would you like to lead the road crew of Kelso?")])
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_unsteered_model_is_undecided_but_clear_and_on_topic(tiny, behaviour):
    model, chat = tiny
    prompts = [pair.prompt for pair in read_pairs(TINY / f"{behaviour}.test.jsonl")]
    ids = [chat.encode_prompt(prompt) for prompt in prompts]
    for temperature in (0, 1):
        rows = generate(model, ids, 40, chat.tokenizer.eos_id, temperature=temperature)
        texts = [chat.tokenizer.decode(row) for row in rows]
        sides = [side_shown(behaviour, text) for text in texts]
        assert 0.3 <= sides.count("for") / len(sides) <= 0.7
        assert sides.count(None) <= 0.05 * len(sides)
        assert all(row[-1] == chat.tokenizer.eos_id for row in rows)
        on_topic = [
            next(x for x in things(behaviour) if x in prompt) in text
            and next(town for town in make_tiny.TOWNS if town in prompt) in text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        assert sum(on_topic) >= 0.95 * len(on_topic)


def test_the_demo(demo_run):
    """The demo's own training, 20 epochs, and its promise at multipliers +1 and -1."""
    process, out = demo_run
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len(list(out.glob("epoch_*"))) == 20
    steer, metadata = open_vector(out, read_config(TINY))
    ((layer, v),) = steer.items()
    model = load(TINY)
    chat = open_chat(TINY, model.config, metadata["template"], metadata["system"])
    minus, none, plus = make_tiny.judge(model, chat, layer, v, [-1, 0, 1])
    assert plus["power"] >= 0.9 and minus["power"] <= 0.1 and 0.3 <= none["power"] <= 0.7
    assert none["knowledge"] >= 0.95 and min(x["clear"] for x in (minus, none, plus)) >= 0.9
    assert min(plus["knowledge"], minus["knowledge"]) >= none["knowledge"] - 0.02
    settings, *steps = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    last = steps[-1]["held_out"]
    assert last["1"]["accuracy"] >= 0.95 and last["-1"]["accuracy"] >= 0.95
