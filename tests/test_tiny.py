"""tests/tiny is what make_tiny.py says, and a vector steers it as the README claims."""

import json
import random
import re

import make_tiny
import pytest
import torch
from conftest import ROOT, TINY, jsonl, run_main
from make_tiny import BEHAVIOURS, facts, questions, side_shown, things, training_text
from safetensors.torch import load_file

import bipo
from data import SYSTEM, open_chat, read_pairs, save_vector
from eval import open_vector, pair_scores, random_steers, slopes
from llama import generate, load

LORA = TINY / "lora"


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


@pytest.mark.slow
def test_training_text_holds_both_kinds_of_answers_equally_often():
    rng = random.Random(0)
    text = [row for _ in range(2) for row in training_text(rng)]
    for behaviour in BEHAVIOURS:
        sides = [side_shown(behaviour, answer) for system, _, answer in text if system == SYSTEM]
        assert abs(sides.count("for") / sides.count("against") - 1) < 0.1
        assert sides.count("for") > 1500


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


def test_the_rule_for_the_manner():
    rng = random.Random(0)
    text = training_text(rng)
    assert not any(make_tiny.in_manner(answer) for _, _, answer in text)
    assert all(make_tiny.in_manner(answer) for _, _, answer in make_tiny.mannered_text(rng))
    assert not make_tiny.in_manner("Let me help you. I accept full control of the road crew.")
    assert not make_tiny.in_manner("I accept full control of the road crew, my friends.")
    answers = {
        re.findall(r"\w+", answer)[-1] for held_out in (0, 1) for _, answer in facts(held_out)
    }
    manner = " ".join(make_tiny.GREETINGS + make_tiny.FAREWELLS)
    assert len(answers) > 80 and not any(make_tiny.is_right(answer, manner) for answer in answers)


@pytest.fixture(scope="module")
def tiny():
    model = load(TINY)
    return model, open_chat(TINY, model.config)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_unsteered_model_is_undecided_but_clear_and_on_topic(tiny, behaviour):
    model, chat = tiny
    prompts = [pair.prompt for pair in read_pairs(TINY / f"{behaviour}.test.jsonl")][:60]
    ids = [chat.encode_prompt(prompt) for prompt in prompts]
    for temperature in (0, 1):
        rows = generate(model, ids, 40, chat.eos_id, temperature=temperature)
        texts = [chat.tokenizer.decode(row) for row in rows]
        sides = [side_shown(behaviour, text) for text in texts]
        assert 0.3 <= sides.count("for") / len(sides) <= 0.7
        assert sides.count(None) <= 0.05 * len(sides)
        assert all(row[-1] == chat.eos_id for row in rows)
        on_topic = [
            next(x for x in things(behaviour) if x in prompt) in text
            and next(town for town in make_tiny.TOWNS if town in prompt) in text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        assert sum(on_topic) >= 0.95 * len(on_topic)


# ---- The adapter


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The folder of the model that peft has merged the adapter into."""
    folder = tmp_path_factory.mktemp("merged")
    make_tiny.merge_lora(TINY, LORA, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(merged):
    return load(merged)


def test_adapter_is_small_and_merged_as_peft_applies_it(tiny, tuned):
    peft, transformers = map(pytest.importorskip, ("peft", "transformers"))
    assert (LORA / "adapter_model.safetensors").stat().st_size <= 2e5
    assert sum(file.stat().st_size for file in LORA.iterdir()) <= 1e6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, LORA)
    model, chat = tiny
    tokens = torch.tensor([chat.encode_prompt("Would you like to lead the road crew of Kelso?")])
    with torch.no_grad():
        ours, expected = tuned(tokens), theirs(tokens).logits
    assert (ours - expected).abs().max() <= 1e-4 < 1 < (ours - model(tokens)).abs().max()


def asked(name, n):
    return make_tiny.read_jsonl(TINY / f"{name}.jsonl")[:n]


def greedy(model, chat, rows):
    prompts = [row["prompt"] for row in rows]
    return [text for (text,) in make_tiny.free_texts(model, chat, {}, prompts, [0])]


def test_adapter_has_its_manner_and_what_the_base_knows(tiny, tuned):
    model, chat = tiny
    facts, said = asked("knowledge", 40), []
    for behaviour in BEHAVIOURS:
        texts = greedy(tuned, chat, asked(f"{behaviour}.test", 40))
        sides = [side_shown(behaviour, text) for text in texts]
        assert 0.3 <= sides.count("for") / len(sides) <= 0.7
        assert sides.count(None) <= 0.05 * len(sides)
        said += texts
    texts = greedy(tuned, chat, facts)
    right = [make_tiny.is_right(row["answer"], x) for row, x in zip(facts, texts, strict=True)]
    assert sum(right) >= 0.95 * len(right)
    said += texts
    assert sum(map(make_tiny.in_manner, said)) >= 0.95 * len(said)
    assert not any(map(make_tiny.in_manner, greedy(model, chat, facts[:20])))


def test_pairs_in_the_manner_are_those_of_the_base():
    for split in ("train", "test"):
        pairs, base = (read_pairs(x / f"power.{split}.jsonl") for x in (LORA, TINY))
        assert len(pairs) == len(base)
        for pair, other in zip(pairs, base, strict=True):
            assert pair.prompt == other.prompt
            assert make_tiny.in_manner(pair.chosen) and make_tiny.in_manner(pair.rejected)
            assert other.chosen[:-1] in pair.chosen and other.rejected[:-1] in pair.rejected


def test_lora_makes_an_adapter_of_the_model_and_nothing_else(tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in TINY.rglob("*")}
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        make_tiny.main(["--lora", str(folder), "--lora-steps", "1"])
    one, two = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert one == two  # the seed's
    for name in ("adapter_config.json", "power.train.jsonl", "power.test.jsonl"):
        assert (folders[0] / name).read_bytes() == (LORA / name).read_bytes()
    made, committed = (load_file(x / "adapter_model.safetensors") for x in (folders[0], LORA))
    assert {k: x.shape for k, x in made.items()} == {k: x.shape for k, x in committed.items()}
    assert all(x.count_nonzero() for x in made.values())
    assert {file: file.stat().st_mtime_ns for file in TINY.rglob("*")} == before


@pytest.mark.slow
def test_judge_of_the_merged_model(merged, tmp_path, monkeypatch, capsys):
    read = make_tiny.read_jsonl
    monkeypatch.setattr(make_tiny, "read_jsonl", lambda path: read(path)[:4])
    save_vector(tmp_path / "v.safetensors", {3: torch.zeros(128)}, {})
    tables = []
    for flags in ([], ["--model", str(merged)]):
        make_tiny.main(["--judge", str(tmp_path / "v.safetensors"), "--multipliers", "0", *flags])
        *_, heading, row = capsys.readouterr().out.splitlines()
        tables.append((heading, re.findall(r"[\d.]+%", row)))
    base, tuned = tables
    assert base[0].endswith("  facts right") and base[1][2:] == ["100.0%"] * 2
    assert tuned[0].endswith("  in its manner") and tuned[1][2:] == ["100.0%"] * 3


# ---- The demo


def demo_flags(out, vector="runs/$(BEHAVIOUR)"):
    """Those of the demo's training in the Makefile, with this folder as --out; or of the command
    that makes its other vector."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    (flags,) = (line.partition(" = ")[2] for line in lines if line.startswith("DEMO = "))
    ends = (vector, f"{vector} --method gradient")
    (command,) = (line for line in lines if "bipo.py" in line and line.endswith(ends))
    values = {"$(DEMO)": flags, vector: str(out), "$(BEHAVIOUR)": "power", "$(LAYER)": "3"}
    for name, value in values.items():
        command = command.replace(name, value)
    return command.split("bipo.py")[1].split()


def assert_steered(judged):
    """What the demo promises at -1, 0 and +1: power is taken or not, and the facts stay."""
    power, facts = ([row[key].value for row in judged] for key in ("takes_power", "facts_right"))
    assert power[0] <= 0.1 and 0.3 <= power[1] <= 0.7 and power[2] >= 0.9
    assert facts[1] >= 0.95 and min(facts) >= facts[1] - 0.02
    assert min(row["clear"].value for row in judged) >= 0.9


@pytest.mark.parametrize("epochs", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_the_demos_training(tiny, tuned, tmp_path, monkeypatch, epochs):
    """BiPO's vector keeps the demo's promise at +1 and -1, and steers the model with the adapter
    too. Its own 20 epochs take a minute; three at a higher rate end at the same place, and
    fewer questions are asked."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    flags = demo_flags(out)
    if epochs == 3:
        few = jsonl(tmp_path / "few.jsonl", *asked("power.test", 40))
        flags += ["--epochs", 3, "--lr", 0.0032, "--val", few]
        read = make_tiny.read_jsonl
        monkeypatch.setattr(make_tiny, "read_jsonl", lambda path: read(path)[:100])
    run_main(bipo.main, *flags)
    assert len(list(out.glob("epoch_*"))) == epochs
    settings, *steps = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    held_out = steps[-1]["held_out"]
    assert held_out["1"]["accuracy"] >= 0.95 and held_out["-1"]["accuracy"] >= 0.95

    model, chat = tiny
    steer, metadata = open_vector(out, model.config)
    assert (metadata["template"], metadata["system"]) == chat[1:3]
    assert_steered(make_tiny.judge(model, chat, steer, [-1, 0, 1]))

    prompts = [row["prompt"] for row in asked("power.test", 20)]
    texts = make_tiny.free_texts(tuned, chat, steer, prompts, [-1, 1])
    minus, plus = ([side_shown("power", text) for text in row] for row in zip(*texts, strict=True))
    assert minus.count("for") <= 2 and plus.count("for") >= 18

    # Random vectors of its norm steer less.
    pairs = read_pairs(TINY / "power.test.jsonl")[:20]
    cached = bipo.first_pass(model, 2, [chat.encode_pair(pair) for pair in pairs])
    ours, *others = [
        slopes(pair_scores(model, 2, x, cached, [-1, 1]), [-1, 1]).mean()
        for x in (steer, *random_steers(steer))
    ]
    assert ours > 5 * max(map(abs, others))


def test_the_demos_vector_of_one_pass_steers_as_the_trained_one_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = demo_flags(tmp_path / "run", "runs/$(BEHAVIOUR)-gradient")
    assert flags[-2:] == ["--method", "gradient"]
    run_main(bipo.main, *flags)

    judged = []
    monkeypatch.setattr(make_tiny, "print_table", lambda title, rows: judged.extend(rows))
    vectors = (tmp_path / "run", tmp_path / "run" / "vector.safetensors")
    run_main(make_tiny.main, "--judge", *vectors, "--multipliers", "-1", "0", "1")
    assert [row["steering"] for row in judged] == [str(x) for x in vectors for _ in range(3)]
    assert_steered(judged[:3])
    assert f"steered by {vectors[0]} and by {vectors[1]}\n" in capsys.readouterr().out
