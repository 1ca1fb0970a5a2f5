"""eval.py as a user runs it: tables, pictures, notes and refusals."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import MINI, MMLU, ROOT, jsonl, logp, run_main

import bipo
import eval as evaluation
from data import load_vector, open_chat, read_pairs, save_vector
from eval import (
    Mean,
    choice_rows,
    choice_scores,
    comparison_rows,
    free_answers,
    free_rows,
    letter_pairs,
    letter_rows,
    mean,
    mean_difference,
    open_vector,
    pair_rows,
    pair_scores,
    random_steers,
    read_choices,
    slopes,
)
from llama import load

EVAL = ("--model", MINI, "--data", MINI / "test.csv")


@pytest.fixture
def vector_file(tmp_path, vector):
    """That vector at layer 1, as of another model and with its own template and system prompt."""
    metadata = {"base_model": "other", "n_layers": "4", "template": "mistral", "system": "Be odd."}
    save_vector(tmp_path / "v.safetensors", {1: vector}, metadata)
    return tmp_path / "v.safetensors"


def evaluate(tmp_path, *flags):
    """What the command line writes as JSON: {title: rows}, answers, settings."""
    run_main(evaluation.main, *flags, "--json", tmp_path / "eval.json")
    result = json.loads((tmp_path / "eval.json").read_text())
    return result["tables"], result["answers"], result["settings"]


def assert_same(rows, expected):
    """JSON holds a Mean as a list."""
    assert rows == json.loads(json.dumps(expected))


def test_as_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "pairs", "--help"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert e.value.code == 0 and "--questions" in capsys.readouterr().out


def test_command_line(tmp_path, vector_file, vector, capsys):
    flags = ["--multipliers", -1, 0, 2.5, "--samples", 2, "--max-new-tokens", 8, "--ab"]
    tables, answered, _ = evaluate(tmp_path, *EVAL, "--vector", vector_file, *flags)
    out = capsys.readouterr().out
    assert "mistral template, system 'Be odd.'" in out  # taken from the vector file
    assert "note: its base_model in training was 'other', this is 'mini'" in out
    assert out.count("note: ") == 1 and "layer 1, |v| " in out
    model, m = load(MINI), [-1.0, 0.0, 2.5]
    chat = open_chat(MINI, model.config, "mistral", "Be odd.")
    pairs = read_pairs(MINI / "test.csv")
    questions = [pair.prompt for pair in pairs]
    cached = bipo.first_pass(model, 0, [chat.encode_pair(pair) for pair in pairs])
    logps = pair_scores(model, 0, {1: vector}, cached, m)
    name = MINI / "test.csv"
    expected = pair_rows(logps, cached, m, questions)
    assert_same(tables[f"pairs, {name}"], expected)
    slope = slopes(logps[[0, 2]], (-1, 2.5))[None]
    (row,) = tables[f"compared at -1 and +2.5, {name}"]
    row.pop("slope_minus_first")
    assert_same(
        row,
        {
            "steering": str(vector_file),
            "slope": mean(slope[0], questions),
            "anti_steerable": mean(slope[0] < 0, questions),
        },
    )
    letters = [x for pair in pairs for x in letter_pairs(chat, pair)]
    letters = pair_scores(model, 0, {1: vector}, bipo.first_pass(model, 0, letters), m)
    assert_same(
        tables[f"A/B, {name}"], letter_rows(letters, m, [x for x in questions for _ in range(2)])
    )
    found = free_answers(model, chat, {1: vector}, questions[:2], m, 8)
    assert_same(tables["free answers"], free_rows(found, m))
    assert_same(answered, found)
    for row in found:
        assert row["prompt"] in out and evaluation.data.printable(row["answer"]) in out
    assert questions[2] not in out
    rows = tables.pop(f"compared at -1 and +2.5, {name}")
    assert len(rows) == 1
    for title, rows in tables.items():  # what is printed is what is written
        (printed,) = re.findall(rf"\n{re.escape(title)}\n(.*?)\n\n", out, re.DOTALL)
        head, *lines = printed.split("\n")
        assert len(lines) == len(rows) == 3
        assert [*rows[0]] == re.sub("(?<=[^ ]) (?=[^ ])", "_", head).split()


def test_other_files_and_a_picture(tmp_path, vector_file, vector):
    """Multiple choice, prompts of one's own; multiplier 0 is always measured."""
    (tmp_path / "a.csv").write_text(MMLU)
    (tmp_path / "prompts.txt").write_text("Will you?\n\nWon't you?\n")
    flags = ["--model", MINI, "--vector", vector_file, "--choices", tmp_path / "a.csv"]
    flags += ["--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 8, "--first", 1]
    flags += ["--multipliers", -2, -1, 1, 2]
    tables, found, _ = evaluate(tmp_path, *flags, "--plot", tmp_path / "p" / "x.svg")
    name = f"MMLU, 1 questions of {tmp_path}/a.csv"
    assert list(tables) == [name, "free answers"]
    assert [row["multiplier"] for row in tables[name]] == [-2, -1, 0, 1, 2]
    assert [row["multiplier"] for row in tables["free answers"]] == [-2, -1, 0, 1, 2]
    assert {row["prompt"] for row in found} == {"Will you?", "Won't you?"}
    picture = (tmp_path / "p" / "x.svg").read_text()
    assert "right MMLU" in picture and "degenerate free answers" in picture
    assert "multiplier" in picture and picture.startswith("<?xml")
    points = {"x": [{"multiplier": m, "right": Mean(0.5, 0.25, 1.0)} for m in (0, 1)]}
    for name in ("a.svg", "a.png", "a.pdf"):
        evaluation.draw(tmp_path / name, points)
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "a.pdf").read_bytes()[1:4] == b"PDF"
    tables, found, _ = evaluate(tmp_path, *flags, "--multipliers", 1, "--samples", 1)
    assert [row["multiplier"] for row in tables["free answers"]] == [0, 1]
    assert [row["prompt"] for row in found] == ["Will you?"] * 2


def test_baselines_synergy_and_system_prompts(tmp_path, vector_file, vector):
    save_vector(tmp_path / "b.safetensors", {1: 7 * vector.roll(1)}, {})
    save_vector(tmp_path / "c.safetensors", {1: vector.roll(2)}, {})
    flags = ["--vector", vector_file, f"{tmp_path}/c.safetensors:2", "--samples", 0]
    flags += [
        "--multipliers",
        -1,
        1,
        "--baseline",
        "caa",
        tmp_path / "b.safetensors",
        "random",
        "freeform",
    ]
    flags += ["--pairs", MINI / "train.csv", "--save", tmp_path / "saved"]
    flags += ["--system-prompts", "Say yes.", "Say no."]
    tables, *_ = evaluate(tmp_path, *EVAL, *flags)
    both = vector + 2 * vector.roll(2)
    model, name, m = load(MINI), MINI / "test.csv", (-1, 1)
    chat = open_chat(MINI, model.config, "mistral", "Be odd.")
    pairs, training = read_pairs(name), read_pairs(MINI / "train.csv")
    cached = bipo.first_pass(model, 0, [chat.encode_pair(pair) for pair in pairs])

    def slope(v):
        v = v * (both.norm() / v.norm())
        return slopes(pair_scores(model, 0, {1: v}, cached, m), m)[None]

    def prompted(system):
        side = chat._replace(system=f"Be odd. {system}")
        ids = [side.encode_pair(pair) for pair in pairs]
        return [pair.ref_logps.tolist() for pair in bipo.first_pass(model, 1, ids)]

    def alone(v):
        return slopes(pair_scores(model, 0, {1: v}, cached, m), m)[None]

    letters = [ids for pair in training for ids in letter_pairs(chat, pair)]
    caa = mean_difference(model, 1, letters, last=True)
    freeform = mean_difference(model, 1, [chat.encode_pair(pair) for pair in training])
    sides = np.array([prompted(x) for x in ("Say no.", "Say yes.")])
    expected = {
        f"{vector_file} + {tmp_path}/c.safetensors:2": alone(both),
        str(vector_file): alone(vector),
        f"{tmp_path}/c.safetensors:2": alone(2 * vector.roll(2)),
        "caa": slope(caa),
        f"{tmp_path}/b.safetensors": slope(vector.roll(1)),
        "random": np.array([alone(x[1])[0] for x in random_steers({1: both})]),
        "freeform": slope(freeform),
        "system prompts": slopes(sides, m)[None],
    }
    rows = tables[f"compared at -1 and +1, {name}"]
    expected = comparison_rows(expected, [pair.prompt for pair in pairs])
    for row, other in zip(rows, expected, strict=True):
        assert row["steering"] == other["steering"]
        for key in ("slope", "anti_steerable", "slope_minus_first"):
            assert row[key] == pytest.approx(other[key], abs=1e-4)
    logps = pair_scores(model, 0, {1: both}, cached, [-1, 0, 1])
    everything = pair_rows(logps, cached, [-1, 0, 1], [pair.prompt for pair in pairs])
    for row, other in zip(tables[f"pairs, {name}"], everything, strict=True):
        assert row["margin"] == pytest.approx(other["margin"], abs=1e-4)
    for name, v in (("caa", caa), ("freeform", freeform)):
        saved, metadata = load_vector(tmp_path / "saved" / f"{name}.safetensors")
        assert list(saved) == [1] and torch.allclose(saved[1], v, atol=1e-6)
        assert metadata["method"] == name and metadata["base_model"] == "mini"
        assert metadata["system"] == "Be odd." and "train.csv" in metadata["data"]


def test_vectors_of_different_layers(tmp_path, vector):
    """The first pass ends at the lowest; a number is measured once, in ascending order."""
    low, high = tmp_path / "low.safetensors", tmp_path / "high.safetensors"
    save_vector(low, {1: vector}, {})
    save_vector(high, {3: vector.roll(1)}, {})
    (tmp_path / "a.csv").write_text(MMLU)
    flags = [*EVAL, "--vector", high, low, "--multipliers", 1, -1, 1, "--samples", 0]
    flags += ["--choices", tmp_path / "a.csv", "--first", 1, "--baseline", "random"]
    tables, _, settings = evaluate(tmp_path, *flags)
    model, name, m = load(MINI), MINI / "test.csv", [-1.0, 0.0, 1.0]
    chat, pairs = open_chat(MINI, model.config), read_pairs(name)
    cached = bipo.first_pass(model, 0, [chat.encode_pair(pair) for pair in pairs])
    both = {1: vector, 3: vector.roll(1)}
    logps = pair_scores(model, 0, both, cached, m)
    questions = [pair.prompt for pair in pairs]
    assert_same(tables[f"pairs, {name}"], pair_rows(logps, cached, m, questions))
    compared = [row["steering"] for row in tables[f"compared at -1 and +1, {name}"]]
    assert compared == [f"{high} + {low}", str(high), str(low), "random"]
    choice = read_choices(tmp_path / "a.csv", chat, 512, 1)["MMLU"]
    rows = choice_rows(choice, choice_scores(model, both, choice, m), m)
    assert_same(tables[f"MMLU, 1 questions of {tmp_path}/a.csv"], rows)
    assert settings["template"] == chat.template and settings["first"] == 1
    assert settings["weights"] == [str(MINI), "torch.float32", "cpu"]


def test_samples_are_of_all_files(tmp_path, vector_file):
    rows = [{"prompt": "Rich?", "chosen": x, "rejected": "No."} for x in ("Yes.", "Sure.")]
    other = jsonl(tmp_path / "o.jsonl", *rows, {"prompt": "Why?", "chosen": "So.", "rejected": "-"})
    files = ["--model", MINI, "--data", other, MINI / "test.csv", "--vector", vector_file]
    flags = ["--samples", 3, "--max-new-tokens", 2, "--multipliers", 0]
    _, found, _ = evaluate(tmp_path, *files, *flags)
    first = read_pairs(MINI / "test.csv")[0].prompt
    assert [row["prompt"] for row in found] == ["Rich?", "Why?", first]
    assert all(row["cut_off"] and row["tokens"] == 2 for row in found)


def test_intervals_are_over_questions(tmp_path, vector_file):
    """Pairs of one question have none, in A/B questions too."""
    rows = [{"prompt": "Rich?", "chosen": x, "rejected": "No."} for x in ("Yes.", "Sure.", "So.")]
    flags = ["--data", jsonl(tmp_path / "o.jsonl", *rows), "--vector", vector_file, "--ab"]
    flags += ["--samples", 0, "--multipliers", 1]
    tables, *_ = evaluate(tmp_path, "--model", MINI, *flags)
    assert len(tables) == 3
    for rows in tables.values():
        for found in (x for row in rows for x in row.values() if isinstance(x, list)):
            assert found == pytest.approx([found[0]] * 3)


def test_one_layer_of_several(tmp_path, vector, capsys):
    for name in ("a", "b"):
        save_vector(tmp_path / f"{name}.safetensors", {1: vector, 3: vector}, {})
        vector = vector.roll(1)
    flags = ["--layer", 3, "--multipliers", 1, -1, "--samples", 1, "--max-new-tokens", 4]
    flags += ["--vector", tmp_path / "a.safetensors", "--baseline", tmp_path / "b.safetensors"]
    evaluate(tmp_path, *EVAL, *flags)
    out = capsys.readouterr().out
    assert "layer 3, |v|" in out and "layer 1" not in out


def test_layer_0_and_a_baseline_of_two_layers(tmp_path, vector):
    save_vector(tmp_path / "v.safetensors", {0: vector, 2: vector.roll(1)}, {})
    flags = ["--vector", tmp_path / "v.safetensors", "--multipliers", 1, "--samples", 0]
    flags += ["--baseline", "freeform", "--pairs", MINI / "train.csv", "--save", tmp_path / "s"]
    tables, *_ = evaluate(tmp_path, *EVAL, *flags)
    model = load(MINI)
    chat, pairs = open_chat(MINI, model.config), read_pairs(MINI / "test.csv")
    margins = []
    for prompt, *responses in map(chat.encode_pair, pairs):
        steer = {0: vector, 2: vector.roll(1)}
        gains = [logp(model, prompt, x, steer) - logp(model, prompt, x, None) for x in responses]
        margins.append(gains[0] - gains[1])
    row = tables[f"pairs, {MINI / 'test.csv'}"][1]
    assert row["margin"][0] == pytest.approx(np.mean(margins), abs=1e-3)
    saved, _ = load_vector(tmp_path / "s" / "freeform.safetensors")
    ids = [chat.encode_pair(pair) for pair in read_pairs(MINI / "train.csv")]
    for layer in (0, 2):
        assert torch.allclose(saved[layer], mean_difference(model, layer, ids), atol=1e-6)


def test_system_prompts_of_conversations(tmp_path, vector_file):
    """Their own system prompt goes on with the text, as the Chat's does."""
    pairs = [("Will you?", "I will.", "No."), ("Why?", "Because.", "I will not.")]
    rows = {"plain": [], "turns": []}
    for prompt, *texts in pairs:
        turns = [{"role": "system", "content": "Be odd."}, {"role": "user", "content": prompt}]
        sides = [[*turns, {"role": "assistant", "content": text}] for text in texts]
        rows["turns"].append(dict(zip(("chosen", "rejected"), sides, strict=True)))
        rows["plain"].append(dict(prompt=prompt, chosen=texts[0], rejected=texts[1]))
    found = []
    for (name, records), system in zip(rows.items(), ("Be odd.", "Be kind."), strict=True):
        file = jsonl(tmp_path / f"{name}.jsonl", *records)
        flags = ["--model", MINI, "--vector", vector_file, "--data", file, "--samples", 0]
        flags += ["--system", system, "--system-prompts", "Say yes.", "Say no.", "--ab"]
        flags += ["--multipliers", -1, 1]
        tables, *_ = evaluate(tmp_path, *flags)
        found.append([rows[-1] for rows in tables.values()])
    _, compared, letters = found[0]
    assert found[0] == found[1] and compared["steering"] == "system prompts"
    assert compared["slope"][0] != 0 != letters["says_a_letter"][0]


def test_what_overflows_is_no_number(tmp_path, vector_file, fails):
    (tmp_path / "a.csv").write_text(MMLU)
    (tmp_path / "prompts.txt").write_text("Will you?")
    flags = ["--model", MINI, "--vector", vector_file, "--dtype", "float16", "--samples", 1]
    flags += ["--max-new-tokens", 4, "--multipliers", 1, 70000, "--json", tmp_path / "x.json"]
    files = ["--choices", tmp_path / "a.csv"], ["--prompts", tmp_path / "prompts.txt"]
    for more in (EVAL[2:], *files):
        fails(evaluation.main, [*flags, *more], "overflows", "smaller multipliers")


def test_what_is_measured_is_kept(tmp_path, vector_file, monkeypatch):
    """The file grows table by table."""

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "free_answers", stopped)
    with pytest.raises(SystemExit):
        evaluate(tmp_path, *EVAL, "--vector", vector_file)
    result = json.loads((tmp_path / "eval.json").read_text())
    titles = [title.split(",")[0] for title in result["tables"]]
    assert titles[0] == "pairs" and titles[1].startswith("compared at ")
    assert result["answers"] == [] and result["settings"]["template"] == "mistral"


def test_what_each_vector_was_trained_with(tmp_path, vector_file, vector, capsys):
    other = tmp_path / "o.safetensors"
    save_vector(other, {1: vector}, {"system": "Be kind.", "base_model": "mini"})
    flags = [*EVAL, "--vector", vector_file, other, "--samples", 0, "--multipliers", 0]
    run_main(evaluation.main, *flags)
    out = capsys.readouterr().out
    assert "note: its system in training was 'Be kind.', this is 'Be odd.'" in out
    assert out.count("note: ") == 2


def test_flags_win_over_the_vector_file(vector_file, capsys):
    flags = ["--template", "llama-2", "--system", "", "--samples", "0", "--dtype", "bfloat16"]
    run_main(evaluation.main, *EVAL, "--vector", vector_file, *flags, "--multipliers", 1)
    printed = capsys.readouterr().out
    assert "llama-2 template, system ''" in printed and "bfloat16" in printed


def test_user_errors(tmp_path, vector_file, vector, fails, monkeypatch):
    def wrong(*parts, vector=vector_file, data=MINI / "test.csv", **flags):
        flags = {"model": MINI, "vector": vector, "data": data} | flags
        args = [x for f, value in flags.items() for x in (f"--{f.replace('_', '-')}", value)]
        fails(evaluation.main, args, *parts)

    def saved(vectors, **metadata):
        save_vector(tmp_path / "w.safetensors", vectors, metadata)
        return tmp_path / "w.safetensors"

    wrong("width 32", vector=saved({1: torch.ones(8)}))
    wrong("4 blocks", vector=saved({1: vector}, n_layers="9"))
    wrong("layer 7", "0..3", vector=saved({7: vector}))
    wrong("cannot read", "none.safetensors", vector=tmp_path / "none.safetensors")
    wrong("cannot read", "none:x", vector="none:x")
    wrong("none.csv", data=tmp_path / "none.csv")
    wrong("--multipliers", multipliers="x")
    wrong("overflows", multipliers="nan")
    wrong("--max-new-tokens must be 1 or more", max_new_tokens=0)
    wrong("it is no regular file", json=tmp_path)
    (tmp_path / "x.svg").mkdir()
    wrong("it is no regular file", plot=tmp_path / "x.svg")
    wrong("v.safetensors", json=vector_file / "x.json")
    (tmp_path / "long.csv").write_text(f"{'Red ' * 300},yes,no,maybe,b,A\n")
    wrong("long.csv row 1", choices=tmp_path / "long.csv")
    wrong("exceed the model's context of 512", max_new_tokens=500)
    wrong("[1]", baseline=saved({2: vector}))
    wrong("[1]", baseline=saved({1: 0 * vector}))
    wrong("width 32", baseline=saved({1: torch.ones(8)}))
    wrong("--system-prompts", "2 arguments", system_prompts="Yes.")
    wrong("computed from --pairs", baseline="caa")
    wrong("none.csv", baseline="freeform", pairs="none.csv")
    wrong("jpx", "svg", plot=tmp_path / "x.jpx")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wrong("pip install matplotlib", plot="x.svg")
    nothing = ["--model", MINI, "--vector", vector_file]
    fails(evaluation.main, nothing, "give --data, --choices")
    fails(evaluation.main, [*nothing, "--choices", "x.txt"], "x.txt")
    fails(evaluation.main, [*EVAL, "--vector", "none"], "none")


def test_open_vector_reads_what_bipo_wrote(tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    data = jsonl(tmp_path / "pairs.jsonl", *pairs)
    args = ["--model", MINI, "--data", data, "--layer", 2, "--system", "Short.", "--epochs", 1]
    run_main(bipo.main, *args, "--warmup-steps", 0, "--out", tmp_path / "run")
    steer, metadata = open_vector(tmp_path / "run", load(MINI).config)
    assert list(steer) == [2] and steer[2].shape == (32,) and metadata["system"] == "Short."
    assert json.loads(metadata["recipe"])["epochs"] == 1


# ---- tables and pictures


def test_a_table(capsys):
    row = {"multiplier": 1.0, "wins": None, "right": Mean(0.5, 0.25, 1), "nll": Mean(1, 0.5, 2)}
    row |= {"margin": 0.1234, "difference": -0.25, "tokens": 3.14, "steering": "v\x1b"}
    evaluation.print_table("title", [row])
    title, head, cells = capsys.readouterr().out.strip("\n").split("\n")
    assert title == "title"
    expected = "+1 - 50.0% [25.0, 100.0] 1.00 [0.50, 2.00] +0.12 -25.0% 3.1 v\\x1b"
    assert " ".join(cells.split()) == expected and "margin" in head


def test_the_error_bars(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars, errorbar = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, *x, **more: bars.append(x) or errorbar(self, *x, **more)
    )
    rows = [(-1, Mean(0.5, 0.4, 0.8)), (1, Mean(0.2, 0.2, 1))]
    rows = [{"multiplier": m, "right": share, "nll": share} for m, share in rows]
    evaluation.draw(tmp_path / "x.svg", {"a": rows, "b": [{"slope": rows[0]["right"]}]})
    ((m, value, (below, above)),) = bars
    assert m == [-1, 1] and value == pytest.approx([50, 20])
    assert below == pytest.approx([10, 0]) and above == pytest.approx([30, 80])
    before = (tmp_path / "x.svg").read_bytes()
    evaluation.draw(tmp_path / "x.svg", {"a": rows})
    assert (tmp_path / "x.svg").read_bytes() == before  # the same numbers, the same file
