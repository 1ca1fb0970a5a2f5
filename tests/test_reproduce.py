"""The tables of results are those that reproduce.py writes, below the commands that it runs."""

import json
import re

import pytest
import reproduce
import torch
from conftest import ROOT
from reports import put

from data import save_vector
from eval import Mean

RESULTS = reproduce.RESULTS.read_text(encoding="utf-8")
NAMES = "curve measures methods baselines synergy transfer quality layers".split()


@pytest.mark.parametrize("name", NAMES)
def test_the_results_have_the_table_and_its_commands(name):
    (block,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", RESULTS, re.DOTALL)
    for line in re.findall(r"^python .*", block, re.MULTILINE):
        assert line.removeprefix("python ") in reproduce.COMMANDS.values()
    if block == "Not run.":
        return
    head, rule, *rows = re.findall(r"^\|.*", block, re.MULTILINE)
    assert rows and len({row.count("|") for row in (head, rule, *rows)}) == 1


def test_the_picture_shows_what_the_table_does():
    picture = (ROOT / ".github" / "steering.svg").read_text(encoding="utf-8")
    for name in ("takes power", "keeps wealth", "facts right", "multiplier"):
        assert name in picture and name in RESULTS


def test_tables_are_put_into_their_places():
    text = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- layers -->\n\n<!-- end -->\n"
    text = put(text, "layers", reproduce.below(["train layer-0"], "| t |"))
    text = put(text, "x", "| new |")
    command = f"```\npython {reproduce.COMMANDS['train layer-0']}\n```"
    first = "a\n<!-- x -->\n| new |\n<!-- end -->\nb\n"
    assert text == f"{first}<!-- layers -->\n{command}\n\n| t |\n<!-- end -->\n"
    with pytest.raises(ValueError, match="no lines <!-- y -->"):
        put(text, "y", "")


def test_tables_are_read_as_they_were_written(tmp_path, monkeypatch):
    rows = [{"multiplier": -1, "wins": Mean(0.5, 0.25, 1.0), "margin": Mean(-1, -2, 0)}]
    monkeypatch.setattr(reproduce, "OUT", str(tmp_path))
    (tmp_path / "x.json").write_text(json.dumps({"tables": {"pairs, a": rows, "A/B, a": rows}}))
    (row,) = reproduce.pick(reproduce.read_tables("x"), "pairs")
    assert row == rows[0]
    cells = reproduce.columns(row, "multiplier", "wins", "margin")
    assert cells == ["-1", "50.0% [25.0, 100.0]", "-1.00 [-2.00, +0.00]"]
    assert reproduce.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| :--- | ---: |\n| 1 | 2 |"


def test_the_vectors_of_both_methods_stand_one_under_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", str(tmp_path))
    share = Mean(0.5, 0.5, 0.5)
    judged = {}
    for behaviour, gradient in reproduce.METHODS.items():
        slopes = [{"steering": x, **dict.fromkeys(reproduce.SLOPES, share)} for x in "ab"]
        (tmp_path / f"{gradient}.json").write_text(json.dumps({"tables": {"compared": slopes}}))
        save_vector(tmp_path / behaviour / "vector.safetensors", {3: torch.tensor([3.0, 4])}, {})
        save_vector(tmp_path / gradient / "vector.safetensors", {3: torch.tensor([0.0, 8])}, {})
        for name in (behaviour, gradient):
            judged[f"{name} alone"] = [dict.fromkeys(reproduce.BEHAVIOURS, share)] * 3

    _, _, power, one_pass, wealth, _ = reproduce.methods_table(judged).splitlines()
    assert power.startswith("| power, BiPO | 5.00 | 1.000 | +0.50")
    assert one_pass.startswith("| power, one pass | 8.00 | 0.800 | +0.50")
    assert wealth.startswith("| wealth, BiPO") and power.endswith("50.0% / 50.0% / 50.0% |")


def test_facts_as_truthful_qa(tmp_path):
    """Each fact's answer, and four that are false."""
    from data import open_records
    from eval import to_question

    reproduce.write_facts(tmp_path / "facts.csv")
    found = [to_question(record) for _, record in open_records(tmp_path / "facts.csv")]
    known = reproduce.read_jsonl(reproduce.TINY / "knowledge.jsonl")
    assert [prompt for prompt, _ in found] == [fact["prompt"] for fact in known]
    for (_, measures), fact in zip(found, known, strict=True):
        right, *wrong = measures["TruthfulQA MC1"]
        assert list(measures["TruthfulQA MC1"].values()) == [1, 0, 0, 0, 0]
        assert fact["answer"] in right and len({right, *wrong}) == 5
        assert not any(fact["answer"] in text for text in wrong)


def test_files_of_noise_and_of_fewer_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", str(tmp_path))
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(200)]
    reproduce.write_pair_files(pairs)
    turned, kept = [], []
    for share in reproduce.NOISE:
        rows = reproduce.read_jsonl(tmp_path / f"noise-{share}.jsonl")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in pairs]
        turned.append({row["prompt"] for row in rows if row["chosen"] == "no"})
        assert len(turned[-1]) == 200 * share
    for n in reproduce.NUMBERS:
        rows = reproduce.read_jsonl(tmp_path / f"pairs-{n}.jsonl")
        assert all(row in pairs for row in rows) and len(rows) == n
        kept.append({row["prompt"] for row in rows})
    assert turned[0] < turned[1] < turned[2] and kept[1] < kept[0]  # each contains the smaller one
    assert all(row["chosen"] == "yes" for row in pairs)
