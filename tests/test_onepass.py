"""onepass.py: what it runs, in which order, and the tables that it makes of the results.

The commands are stubs here: with the model they take hours.
"""

import json
import re
import shlex
from pathlib import Path

import onepass
import pytest
import real
import torch
from conftest import ROOT, TINY
from facts import balanced_pairs

import bipo
import data
from eval import Mean, read_prompts
from llama import load

REPORT = (ROOT / real.REPORT).read_text(encoding="utf-8")
N_PAIRS = 50


def flags_of(words):
    """{flag: its values}"""
    found = {}
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found


def write_vectors(flags):
    """What bipo.py would write: vectors that depend on the folder's name."""
    (out,) = map(Path, flags["--out"])
    (layer,) = map(int, flags["--layer"])
    rng = torch.Generator().manual_seed(sum(map(ord, out.name)))
    v = torch.randn(8, generator=rng)
    for name in ("vector", *(f"epoch_{epoch:02}" for epoch in onepass.EPOCHS)):
        data.save_vector(out / f"{name}.safetensors", {layer: v}, {})


def write_tables(flags):
    """What eval.py would write, with a KL of m^2 / 100."""
    multipliers = sorted({0.0, *map(float, flags["--multipliers"])})
    on_pairs = []
    answers = []
    for m in multipliers:
        on_pairs.append({"multiplier": m, "wins": [1, 1, 1], "margin": [m, m, m]})
        on_pairs[-1]["prefers_chosen"] = [0.5 + m / 100] * 3
        costs = {"kl": [m * m / 100] * 3}
        for key in ("nll", "repeated", "degenerate", "refuses"):
            costs[key] = [0.5, 0.4, 0.6]
        answers.append({"multiplier": m} | costs)

    compared = []
    for steering in (*flags["--vector"], *flags.get("--baseline", [])):
        row = {"steering": steering, "slope": [1, 1, 1], "anti_steerable": [0, 0, 0]}
        compared.append(row | {"slope_minus_first": [0, 0, 0]})
    tables = {"pairs": on_pairs, "compared": compared, "free answers": answers}
    if "--choices" in flags:
        tables = {"TruthfulQA MC1": [{"multiplier": m, "right": [1, 1, 1]} for m in multipliers]}
    (file,) = flags["--json"]
    data.write_text(Path(file), json.dumps({"tables": tables, "answers": []}))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the official files in small; returns it, and the names of what was run."""
    ran = []

    def run(name, command):
        ran.append(name)
        program, *words = shlex.split(command.replace("$DATA", str(tmp_path / "data")))
        flags = flags_of(words)
        read = []
        for flag in ("--data", "--val", "--vector", "--choices", "--baseline"):
            read += [x for x in flags.get(flag, []) if x != "random"]
        assert all(Path(file).exists() for file in read), (name, read)
        {"bipo.py": write_vectors, "eval.py": write_tables}[program](flags)
        return 0.5

    for behaviour in real.BEHAVIOURS.values():
        for split in ("train", "test"):
            rows = [f"{split} {i}?,yes {i},no {i}" for i in range(N_PAIRS)]
            text = "\n".join(["question,matching,not_matching", *rows])
            data.write_text(tmp_path / "data" / behaviour / f"{split}.csv", text)
    questions = ["Category,Question,Best Answer,Best Incorrect Answer"]
    questions += [f"C{i % 2},Why {i}?,So {i},Not {i}" for i in range(N_PAIRS)]
    data.write_text(tmp_path / "truthfulqa" / "TruthfulQA.csv", "\n".join(questions))
    places = [f"<!-- {name} -->\nNot run.\n<!-- end -->\n" for name in onepass.EXPERIMENTS]
    data.write_text(tmp_path / real.REPORT, "".join(places))

    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.setattr(real, "ROOT", tmp_path)
    monkeypatch.setattr(real, "run", run)
    monkeypatch.setattr(real, "have_model", lambda: None)
    monkeypatch.setattr(onepass, "gradients", some_gradients)
    monkeypatch.setattr(onepass, "train_from", lambda v: v + 1)
    monkeypatch.setattr(real, "ask_premises", some_answers)
    monkeypatch.chdir(tmp_path)
    return tmp_path, ran


def some_gradients(name, pairs, layer=14, dtype=None):
    rng = torch.Generator().manual_seed(0)
    g = torch.randn(len(pairs), 8, generator=rng)
    return {"g": g + 1, "norm": torch.tensor(float(layer))}


def some_answers(vector, multipliers):
    assert vector.exists()
    for kind in real.PREMISES:
        said = [
            {"prompt": f"{i}?", "multiplier": m, "answer": "No." if m < 0 else "Yes."}
            for m in multipliers
            for i in range(5)
        ]
        yield kind, said, [{"multiplier": m, "kl": Mean(0, 0, 0)} for m in multipliers]


@pytest.mark.parametrize("name", onepass.EXPERIMENTS)
def test_an_experiment_writes_its_result_and_its_tables(place, name):
    folder, ran = place
    onepass.main([name])
    result = json.loads((folder / real.RESULTS / f"{name}.json").read_text())
    report = (folder / real.REPORT).read_text()
    (block,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", report, re.DOTALL)
    assert block == real.report(name, result, "onepass.py")
    assert f"python tests/experiments/onepass.py {name}" in block
    assert {*result["commands"]} == {onepass.COMMANDS[x] for x in ran}
    for rows in result["tables"].values():
        assert rows and all(row.keys() == rows[0].keys() for row in rows)


@pytest.mark.parametrize("name", onepass.EXPERIMENTS)
def test_the_report_has_its_place(name):
    (block,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", REPORT, re.DOTALL)
    file = ROOT / real.RESULTS / f"{name}.json"
    if file.exists():
        assert block == real.report(name, json.loads(file.read_text("utf-8")), "onepass.py")
    else:
        assert block == "Not run."


def test_vectors_are_measured_at_one_norm(place):
    onepass.main(["one-pass-layers"])
    for layer in onepass.ALL_LAYERS:
        name = "power-160" if layer == real.LAYER else f"layer-{layer}"
        for vector in (name, f"{name}-g"):
            vectors, _ = data.load_vector(onepass.OUT / onepass.unit(vector))
            assert vectors[layer].norm().item() == pytest.approx(onepass.NORM)


def test_a_training_that_real_py_has_too_is_the_same_command():
    shared = {*onepass.COMMANDS} & {*real.COMMANDS}
    assert {"train power-160", "train layer-6", "train noise-25", "train pairs-640"} <= shared
    for name in shared:
        assert onepass.COMMANDS[name] == real.COMMANDS[name]


# ---- numbers


def rows_of(kl):
    """Rows of `curve`, from {multiplier: KL}."""
    rows = []
    for m, x in kl.items():
        effect = Mean(m, m - 1, m + 1)
        rows.append({"multiplier": m, "kl": Mean(x, x, x), "margin": effect})
        rows[-1]["prefers_chosen"] = effect
    return rows


def test_multipliers_at_which_the_cost_is_a_level():
    rows = rows_of({m: m * m / 100 for m in (-4, -2, -1, 0, 1, 2, 4)})
    for sign in (-1, 1):
        for level in (0.004, 0.01, 0.05):
            m, columns = onepass.at_level(rows, level, sign)
            assert m == pytest.approx(sign * 10 * level**0.5)
            assert columns["margin"] == pytest.approx((m, m - 1, m + 1))
    assert onepass.at_level(rows, 0.2, 1) is None  # not reached


def test_only_levels_that_are_reached_are_compared():
    rows = {"a": rows_of({-1: 0.3, 0: 0, 1: 0.1}), "b": rows_of({-1: 0.1, 0: 0, 1: 0.01})}
    found = [(row["vector"], row["at kl"]) for row in onepass.level_rows(rows)]
    assert found == [("a", 0.05), ("b", 0.05), ("a", 0.05), ("a", 0.2)]


def test_swapped_pairs_pull_against_the_others():
    rng = torch.Generator().manual_seed(0)
    of_pairs = torch.randn(100, 8, generator=rng) / 4 + 1
    is_swapped = torch.arange(100) % 10 == 3
    assert onepass.find_swapped(of_pairs, is_swapped) == (1, pytest.approx(0.9))


def test_the_mean_and_the_spread_over_seeds():
    low = rows_of({0: 0.0, 1: 0.1})
    high = rows_of({0: 0.0, 1: 0.3})
    for row in low + high:
        row |= {"wins": Mean(0.5, 0, 1), "nll": Mean(2, 2, 2)}
    (row,) = onepass.spread_rows([low, high], 5)  # nothing happens at 0
    assert row["epoch"] == 5 and row["multiplier"] == 1
    assert row["kl"] == pytest.approx(0.2) and row["kl sd"] == pytest.approx(0.1414, rel=1e-3)
    assert row["nll sd"] == 0


# ---- the model


def test_gradients_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(onepass, "MODEL", TINY)
    monkeypatch.setattr(onepass, "OUT", tmp_path)
    pairs = data.read_pairs(TINY / "power.train.jsonl")[:4]
    made = onepass.gradients("x", pairs, layer=3, dtype=torch.float32)

    model = load(TINY)
    chat = data.open_chat(TINY, model.config)
    cached = bipo.first_pass(model, 3, [chat.encode_pair(pair) for pair in pairs])
    expected = bipo.preference_gradient(model, 3, cached)
    torch.testing.assert_close(made["g"].mean(0), expected)
    assert made["norm"].item() == pytest.approx(bipo.stream_norm(cached))
    monkeypatch.setattr(onepass, "load", lambda *args: pytest.fail("it is there"))
    assert torch.equal(onepass.gradients("x", pairs)["g"], made["g"])


def test_a_training_goes_on_from_a_vector(tmp_path, monkeypatch):
    monkeypatch.setattr(onepass, "MODEL", TINY)
    monkeypatch.setattr(onepass, "OUT", tmp_path)
    monkeypatch.setattr(onepass, "LAYER", 3)
    rows = (TINY / "power.train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "power-160.jsonl").write_text("\n".join(rows))
    v = onepass.train_from(torch.ones(128))
    assert 0 < (v - 1).abs().max() < 0.1


# ---- facts


def test_the_pairs_of_facts_are_balanced(capsys):
    pairs = balanced_pairs()
    assert len(pairs) >= 300 and len({pair.prompt for pair in pairs}) == len(pairs)
    for true, false in zip(pairs[::2], pairs[1::2], strict=True):
        assert true.chosen.startswith("No, ") and true.rejected.startswith("Yes, ")
        assert false.chosen.startswith("Yes, ") and false.rejected.startswith("No, ")
    data.note_shortcuts(pairs)
    assert capsys.readouterr().out == ""


def test_no_fact_is_asked_for_in_the_control():
    asked = read_prompts(ROOT / real.TRUE_PREMISES)
    assert not {pair.prompt for pair in balanced_pairs()} & {*asked}
