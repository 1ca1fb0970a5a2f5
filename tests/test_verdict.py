"""Multipliers by their cost, the verdict, and what eval.py says to do next."""

import json
import math
import random
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import TINY, jsonl, run_main

import bipo
import data
import eval as evaluation
from eval import cost, fluency, make_probes, multiplier_at, verdict
from llama import generate, load

POWER = TINY / "power.test.jsonl"


@pytest.fixture
def tiny_vector():
    return torch.randn(128, generator=torch.Generator().manual_seed(0))


# ---- the multiplier at a cost


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_multiplier_is_found_at_any_length_of_the_vector(scale, sign):
    """Cost grows as the square of m; a vector a thousand times too long or short has its range."""
    unit = 50 / scale
    found = multiplier_at(lambda m: (m * scale) ** 2 / 100, 0.25, sign, unit)
    assert found == pytest.approx(sign * 5 / scale, rel=0.06)
    assert found == float(f"{found:.2g}")


def test_a_cost_that_is_not_reached_has_no_multiplier():
    assert multiplier_at(lambda m: 0.01, 0.05, 1, unit=3.0) is None


def test_what_overflows_costs_infinitely_much():
    found = multiplier_at(lambda m: math.inf if m > 7 else 0.0, 0.05, 1, unit=10.0)
    assert found == pytest.approx(7, rel=0.06)


def test_the_cost_is_the_divergence_of_the_unsteered_answers(tiny_vector):
    model = load(TINY)
    chat = data.open_chat(TINY, model.config)
    prompts = [pair.prompt for pair in data.read_pairs(POWER)[:3]]
    probes = make_probes(model, chat, 2, prompts, 12)
    ids = [chat.encode_prompt(prompt) for prompt in prompts]
    new = generate(model, ids, 12, chat.end_ids)
    measured = fluency(model, {3: 2 * tiny_vector}, list(zip(ids, new, strict=True)))
    tokens = [len(answer) for answer in new]
    expected = np.average([kl for _, kl in measured], weights=tokens)
    found = cost(model, 2, {3: 2 * tiny_vector}, probes)
    assert found == pytest.approx(expected, rel=1e-3) and found > 0.01
    assert cost(model, 2, {3: 0 * tiny_vector}, probes) == pytest.approx(0, abs=1e-6)


# ---- the verdict


def gap_of(*shares, n=40):
    """(M, N) gaps; in row i the first shares[i] of the pairs prefer the chosen answer."""
    return np.array([[1.0 if k < share * n else -1.0 for k in range(n)] for share in shares])


PROMPTS = [f"q{i}" for i in range(40)]


def test_an_effect_each_way_is_claimed_with_its_numbers():
    said, m = verdict(gap_of(0.1, 0.5, 0.9), [-2, 0, 2], PROMPTS, {}, {-2: 0.2, 2: 0.21})
    assert said == [
        "At +2 (cost 0.21) the chosen answer is preferred in 90% of the pairs.",
        "At -2 (cost 0.2) the chosen answer is preferred in 10% of the pairs.",
        "Without the vector it is in 50%.",
    ]
    assert m == 2


def test_the_weakest_multiplier_with_most_of_the_effect_is_named():
    said, m = verdict(gap_of(0.5, 0.6, 0.875, 0.9), [0, 1, 2, 4], PROMPTS, {}, {})
    assert m == 2 and said[0].startswith("At +2 the chosen answer is preferred in 88%")


def test_no_effect_is_claimed_where_the_interval_holds_0():
    said, m = verdict(gap_of(0.5, 0.5, 0.55), [-2, 0, 2], PROMPTS, {}, {})
    assert m is None and len(said) == 1
    assert "does not steer these pairs. Try --layer all, or more pairs." in said[0]


def test_an_effect_against_the_multiplier_is_none():
    said, m = verdict(gap_of(0.9, 0.5, 0.1), [-2, 0, 2], PROMPTS, {}, {})
    assert m is None and "does not steer" in said[0]


def test_too_few_prompts():
    said, m = verdict(gap_of(0.1, 0.9, n=19), [0, 2], PROMPTS[:19], {}, {})
    assert m is None and said == ["19 held-out prompts are too few for a verdict: give 20."]


def test_broken_answers_are_said_and_not_recommended():
    degenerate = {0: 0.0, 2: 0.1, 8: 0.5}
    said, m = verdict(gap_of(0.5, 0.8, 1.0), [0, 2, 8], PROMPTS, degenerate, {})
    assert m == 2 and said[-1] == "At +8 a third of the answers are degenerate: too strong."


# ---- the new user's way


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory):
    """The folder of a vector by one pass over 60 pairs."""
    out = tmp_path_factory.mktemp("one-pass")
    rows = [json.loads(row) for row in (TINY / "power.train.jsonl").read_text().splitlines()]
    training = jsonl(out / "pairs.jsonl", *rows[:60])
    held_out = jsonl(out / "held_out_pairs.jsonl", *rows[300:304])
    flags = ["--data", training, "--val", held_out, "--layer", 3, "--method", "gradient"]
    run_main(bipo.main, "--model", TINY, *flags, "--out", out)
    return out


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    rows = [json.loads(row) for row in POWER.read_text().splitlines()]
    return jsonl(tmp_path_factory.mktemp("held-out") / "pairs.jsonl", *rows[:40])


def test_the_commands_that_are_printed_lead_to_a_steered_chat(one_pass, held_out, capsys):
    """eval.py by its defaults finds the multipliers, says that they work, and how to go on."""
    flags = ["--data", held_out, "--samples", 8]
    run_main(evaluation.main, "--model", TINY, "--vector", one_pass, *flags)
    printed = capsys.readouterr().out
    assert (
        len(re.findall(r"^multiplier [+-][0-9.]+ costs 0\.\d\d nats a token", printed, re.M)) == 6
    )
    shares = [int(x) for x in re.findall(r"is preferred in (\d+)% of the pairs", printed)]
    assert shares[0] > 80 and shares[1] < 25
    words = shlex.split(printed.splitlines()[-1].removeprefix("next: python eval.py "))
    assert words[0] == "chat"
    file, m = data.split_spec(words[-1])
    assert file == str(one_pass) and 0.5 < m < 2.5


def test_the_range_is_found_for_a_vector_far_too_long(one_pass, held_out, tmp_path):
    vectors, metadata = data.load_vector(one_pass)
    long = tmp_path / "long.safetensors"
    data.save_vector(long, {3: 1000 * vectors[3]}, metadata)
    flags = ["--samples", 4, "--max-new-tokens", 8, "--json", tmp_path / "x.json"]
    run_main(evaluation.main, "--model", TINY, "--vector", long, "--data", held_out, *flags)
    tables = json.loads((tmp_path / "x.json").read_text())["tables"]
    multipliers = [row["multiplier"] for row in next(iter(tables.values()))]
    assert len(multipliers) == 7 and all(abs(m) < 0.003 for m in multipliers)


def test_pairs_that_were_trained_on_are_noted(one_pass, tmp_path, capsys):
    rows = (TINY / "power.train.jsonl").read_text().splitlines()[:3]
    rows += POWER.read_text().splitlines()[:2]
    mixed = jsonl(tmp_path / "mixed.jsonl", *(json.loads(row) for row in rows))
    flags = ["--samples", 0, "--multipliers", 1]
    run_main(evaluation.main, "--model", TINY, "--vector", one_pass, "--data", mixed, *flags)
    printed = capsys.readouterr().out
    assert f"note: the vector was trained on 3 of the 5 pairs of {mixed}" in printed
    assert "prompts are too few for a verdict" in printed


def test_lists_with_commas_are_refused(one_pass, fails):
    args = ["--model", TINY, "--vector", one_pass, "--data", POWER]
    fails(evaluation.main, [*args, "--multipliers", "1,2"], "'1,2' is no number", "blanks")
    fails(evaluation.main, [*args, "--samples", 0], "without prompts", "must be numbers")


@pytest.mark.slow
def test_random_labels_seldom_get_a_verdict(tmp_path, capsys):
    """With labels swapped at random in training and held-out pairs, three of 20 seeds at most."""
    files = {name: TINY / f"power.{name}.jsonl" for name in ("train", "test")}
    rows = {k: [json.loads(x) for x in f.read_text().splitlines()] for k, f in files.items()}
    claims = 0
    for seed in range(20):
        rng = random.Random(seed)
        swapped = {}
        for name, records in rows.items():
            records = [dict(record) for record in records]
            for record in records:
                if rng.random() < 0.5:
                    record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
            swapped[name] = jsonl(tmp_path / f"{name}.jsonl", *records[:100])
        common = ["--model", TINY, "--data", swapped["train"], "--val", swapped["test"]]
        out = tmp_path / str(seed)
        run_main(bipo.main, *common, "--layer", 3, "--method", "gradient", "--out", out)
        capsys.readouterr()
        flags = ["--vector", out, "--data", swapped["test"], "--samples", 8]
        run_main(evaluation.main, "--model", TINY, *flags, "--max-new-tokens", 12)
        claims += "is preferred in" in capsys.readouterr().out
    assert claims <= 3
