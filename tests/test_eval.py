import io
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import MINI, TINY, jsonl, run_cli

import bipo
import eval as evaluation
from data import Chat, Choice, letter_pairs, open_chat, read_choices, read_pairs, save_vector
from eval import (
    Mean,
    answers,
    choice_rows,
    choice_scores,
    comparison_rows,
    encode_choice,
    fluency,
    free_answers,
    free_rows,
    letter_rows,
    mean,
    open_vector,
    pair_rows,
    pair_scores,
    random_steers,
    repetition,
    slopes,
    together,
)
from llama import generate, load

M = [-2, -0.5, 0, 1]


def logps_of(model, prompt, response, steer):
    """Of each token of the response, (len(response), vocab_size): one unpacked sequence."""
    tokens = torch.tensor([prompt + response])
    return model(tokens, steer=steer).log_softmax(-1)[0, len(prompt) - 1 : -1]


def logp(model, prompt, response, steer):
    rows = logps_of(model, prompt, response, steer)
    return rows.gather(-1, torch.tensor(response)[:, None]).sum().item()


# ---- numbers with their spread


def test_mean():
    assert mean([1, 2, 3, 4]).value == 2.5 and mean([7.0]) == Mean(7, 7, 7)
    x = np.random.default_rng(1).normal(3, 2, 400)
    value, low, high = mean(x)
    half = 1.96 * 2 / math.sqrt(400)
    assert value - low == pytest.approx(half, rel=0.15) == high - value
    # Two questions: a bootstrap sample has none, one or two of each.
    assert mean([0, 0, 0, 1, 1, 1], [*"aaabbb"]) == Mean(0.5, 0, 1)
    # Of 100 questions every other has nine pairs, and counts nine times.
    pairs = [x for i in range(100) for x in ([1] if i % 2 else [0] * 9)]
    labels = [i for i in range(100) for _ in range(1 if i % 2 else 9)]
    assert mean(pairs, labels).value == 0.1 and mean(pairs, labels).high < 0.2
    # A question ten times says no more than once; one by one, they would seem to.
    several = mean(np.repeat(x[:40], 10), np.repeat(range(40), 10))
    assert several == pytest.approx(mean(x[:40]))
    alone = mean(np.repeat(x[:40], 10))
    assert several.high - several.low > 2.5 * (alone.high - alone.low)


def test_an_interval_holds_its_mean():
    """One question's pairs: the bootstrap's sums round otherwise than the mean."""
    rng = np.random.default_rng(2)
    for values in rng.random((20, 300)):
        value, low, high = mean(values, [0] * 300)
        assert low <= value <= high < low + 1e-12


# ---- pairs


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_pair_scores_by_hand(mini, mini_pairs, vector, layers):
    model, _ = mini
    steer = {layer: vector.roll(layer) for layer in layers}
    table = pair_scores(model, 1, steer, mini_pairs, M)
    assert table.shape == (len(M), len(mini_pairs), 2)
    for m, rows in zip(M, table, strict=True):
        scaled = {layer: m * v for layer, v in steer.items()}
        for row, (prompt, *responses) in zip(rows, (pair.ids for pair in mini_pairs), strict=True):
            expected = [logp(model, prompt, response, scaled) for response in responses]
            assert row == pytest.approx(expected, abs=1e-3)


def test_pair_scores_of_a_vector_above_the_first_pass(mini, mini_pairs, vector):
    model, chat = mini
    ids = [pair.ids for pair in mini_pairs]
    alone = pair_scores(model, 2, {2: vector}, bipo.first_pass(model, 2, ids), M)
    assert pair_scores(model, 1, {2: vector}, mini_pairs, M) == pytest.approx(alone, abs=1e-4)


def test_pair_rows_by_hand(mini_pairs):
    pairs = [pair._replace(ref_logps=torch.tensor([-10.0, -12.0])) for pair in mini_pairs[:3]]
    lengths = [[len(x) for x in pair.ids[1:]] for pair in pairs]
    logps = np.array([[[-9, -12], [-8, -13], [-11, -10]], [[-10, -12], [-10, -11], [-10, -10.5]]])
    up, down = pair_rows(logps, pairs, [2, -1], "aab")
    # gains: (1, 0), (2, -1), (-1, 2): margins 1, 3, -3; at -1: 0, (0, 1) -1, (0, 1.5) -1.5
    assert up["multiplier"] == 2 and up["margin"] == mean([1, 3, -3], "aab")
    assert up["margin"].value == pytest.approx(1 / 3)
    assert up["wins"].value == pytest.approx(2 / 3) == up["prefers_chosen"].value
    assert down["margin"].value == pytest.approx(-2.5 / 3)
    assert down["wins"].value == pytest.approx(2 / 3)
    assert down["prefers_chosen"].value == 1
    gains = [(1, 0), (2, -1), (-1, 2)]
    per_token = [c / n - r / k for (c, r), (n, k) in zip(gains, lengths, strict=True)]
    assert up["margin_per_token"].value == pytest.approx(sum(per_token) / 3)


def test_slopes_by_hand():
    # propensities at -1, 0, 2 of three pairs: 2m + 1; -m; a zigzag
    propensity = np.array([[-1, 1, 3], [1, 0, 0], [5, -2, 3]])
    logps = np.stack([propensity - 4.0, np.full((3, 3), -4.0)], -1)
    m = np.array([-1, 0, 2])
    zigzag = ((m - m.mean()) * propensity[:, 2]).sum() / ((m - m.mean()) ** 2).sum()
    found = slopes(logps, m)
    assert found == pytest.approx([2, -1, zigzag])
    first, same, other = comparison_rows(
        {"v": found[None], "w": found[None], "x": np.array([found - 1, found + 4])}, "abc"
    )
    assert first["slope"].value == pytest.approx(found.mean())
    assert first["anti_steerable"].value == pytest.approx(1 / 3)
    assert same["slope_minus_first"] == Mean(0, 0, 0)
    assert other["slope_minus_first"] == pytest.approx((1.5, 1.5, 1.5))  # paired: no spread
    assert other["slope"].value == pytest.approx(found.mean() + 1.5)
    assert other["anti_steerable"].value == pytest.approx((2 / 3 + 0) / 2)


def test_zero_vector_and_mirror(mini, mini_pairs, vector):
    model, _ = mini
    questions = [pair.ids.prompt[-1] for pair in mini_pairs]
    flat = pair_scores(model, 1, {1: 0 * vector}, mini_pairs, M)
    assert np.abs(slopes(flat, M)).max() < 1e-6
    for row in pair_rows(flat, mini_pairs, M, questions):
        assert abs(row["margin"].value) <= 1e-3 and abs(row["margin_per_token"].value) <= 1e-4
    here = pair_scores(model, 1, {1: vector}, mini_pairs, [-1, 0, 1])
    there = pair_scores(model, 1, {1: -vector}, mini_pairs, [1, 0, -1])
    assert (here == there).all() and np.abs(slopes(here, [-1, 0, 1])).min() > 0
    assert slopes(here, [-1, 0, 1]) == pytest.approx(-slopes(there, [1, 0, -1]))


# ---- letters and multiple choice


def test_letters(mini, vector):
    """P(A) against P(B) after the prompt and '(', in both orders, one sequence at a time."""
    model, chat = mini
    pairs = read_pairs(MINI / "test.csv")
    ids = [x for pair in pairs for x in letter_pairs(chat, pair)]
    cached = bipo.first_pass(model, 1, ids)
    questions = [pair.prompt for pair in pairs for _ in range(2)]
    rows = letter_rows(pair_scores(model, 1, {1: vector}, cached, M), M, questions)
    for m, row in zip(M, rows, strict=True):
        picks, says = [], []
        for pair in pairs:
            for options, letter, other in (
                ((pair.chosen, pair.rejected), "A", "B"),
                ((pair.rejected, pair.chosen), "B", "A"),
            ):
                text = f"{pair.prompt}\n\nChoices:\n (A) {options[0]}\n (B) {options[1]}"
                asked = chat.tokenizer.encode(chat.render(text) + " (")
                prompt, found = chat.encode_prompt(text), []
                for x in (letter, other):
                    whole = chat.tokenizer.encode(chat.render(text) + f" ({x}")
                    assert asked[: len(prompt) - 1] == prompt[1:]
                    response = [1, *whole][len(prompt) :]
                    found.append(math.exp(logp(model, prompt, response, {1: m * vector})))
                picks.append(found[0] / sum(found))
                says.append(sum(found))
        assert row["picks_chosen"].value == pytest.approx(np.mean(picks), abs=1e-4)
        assert row["says_a_letter"].value == pytest.approx(np.mean(says), rel=1e-2, abs=1e-6)


def test_letter_rows_average_both_orders():
    """A model that always says (A) has no propensity."""
    logps = np.log([[[0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.2, 0.8]]])
    (row,) = letter_rows(logps, [1], "aabb")
    assert row["picks_chosen"] == pytest.approx((0.5, 0.5, 0.5))
    assert row["says_a_letter"] == pytest.approx((1, 1, 1))
    (row,) = letter_rows(np.log([[[0.8, 0.1], [0.1, 0.2], [0.7, 0.2], [0.1, 0.3]]]), [1], "aabb")
    assert row["says_a_letter"] == pytest.approx(mean([0.9, 0.3, 0.9, 0.4], "aabb"))
    logps = np.log([[[0.3, 0.1], [0.02, 0.06]]])
    (row,) = letter_rows(logps, [1], "aa")
    assert row["picks_chosen"].value == pytest.approx((0.75 + 0.25) / 2)
    assert row["says_a_letter"].value == pytest.approx((0.4 + 0.08) / 2)
    (row,) = letter_rows(np.array([[[-2000, -2000 - math.log(3)]]]), [1e6], "a")
    assert row["picks_chosen"].value == pytest.approx(3 / 4) and row["says_a_letter"].value == 0


MMLU = '"Two, and ""two""?",1,2,4,8,C\nRed?,yes,no,maybe,"a, b",A\n'
TRUTHFUL = """Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
x,y,Lead?,No.,No.; Never.; No.,Yes.; Always.,z
x,y,Rich?,Not me.,Never rich.,Yes.,z
"""
MC_TASK = [
    {
        "question": "Lead?",
        "mc1_targets": {"Yes.": 0, "No.": 1},
        "mc2_targets": {"Never.": 1, "Yes.": 0, "No.": 1, "Always.": 0},
    }
]


def test_read_choices(tmp_path):
    (tmp_path / "a_test.csv").write_text(MMLU)
    (tmp_path / "b_test.csv").write_text("question,A,B,C,D,answer\n" + MMLU)
    two, red = read_choices(tmp_path / "a_test.csv")["MMLU"]
    assert two.prompt == 'Two, and "two"?\n\nChoices:\n (A) 1\n (B) 2\n (C) 4\n (D) 8'
    assert two.answers == ["(C", "(A", "(B", "(D"] and two.n_right == 1
    assert red.prompt.endswith("(D) a, b") and red.answers[0] == "(A"
    assert read_choices(tmp_path)["MMLU"] == [two, red, two, red]
    assert read_choices(tmp_path, first=1)["MMLU"] == [two, two]

    (tmp_path / "TruthfulQA.csv").write_text(TRUTHFUL)
    found = read_choices(tmp_path / "TruthfulQA.csv")
    assert found == {
        "TruthfulQA MC1": [
            Choice("Lead?", ["No.", "Yes.", "Always."]),
            Choice("Rich?", ["Not me.", "Yes."]),
        ],
        "TruthfulQA MC2": [
            Choice("Lead?", ["No.", "Never.", "Yes.", "Always."], 2),
            Choice("Rich?", ["Not me.", "Never rich.", "Yes."], 2),
        ],
    }
    (tmp_path / "mc_task.json").write_text(json.dumps(MC_TASK))
    assert read_choices(tmp_path / "mc_task.json") == {
        "TruthfulQA MC1": [Choice("Lead?", ["No.", "Yes."])],
        "TruthfulQA MC2": [Choice("Lead?", ["Never.", "No.", "Yes.", "Always."], 2)],
    }


def test_wrong_choices(tmp_path):
    def wrong(name, text, match):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=match):
            read_choices(tmp_path / name)

    wrong("a.csv", "Two?,1,2,4,C\n", "a.csv: row 1 is not a question, four options and a letter")
    wrong("a.csv", MMLU + "Blue?,1,2,3,4,E\n", "a.csv: row 3")
    for letter in ("", "AB", "a"):
        wrong("a.csv", f"Blue?,1,2,3,4,{letter}\n", "a.csv: row 1")
    wrong("a.csv", "", "holds no questions")
    wrong("a.csv", TRUTHFUL.replace("Yes.,z\n", ";,z\n"), "a.csv:3: Incorrect Answers holds none")
    wrong("a.csv", TRUTHFUL.replace("Not me.", ""), "a.csv:3: one of Question, Best Answer")
    wrong("a.json", "[{}]", "a.json record 1: not a question with mc1_targets")
    two = [{**MC_TASK[0], "mc1_targets": {"Yes.": 1, "No.": 1}}]
    wrong("a.json", json.dumps(two), "record 1: .* one of them in mc1_targets")
    good = MC_TASK[0]["mc1_targets"]
    for bad in ({"No.": 1}, {"Yes.": 0}, {"": 0, **good}, {"Hm.": 0.5, **good}, {"No.": "1"}, [1]):
        for name in ("mc1_targets", "mc2_targets"):
            wrong("a.json", json.dumps([{**MC_TASK[0], name: bad}]), "record 1: not a question")
    wrong("a.json", json.dumps([{**MC_TASK[0], "question": 7}]), "record 1: not a question")
    with pytest.raises(ValueError, match="cannot read .*none"):
        read_choices(tmp_path / "none.csv")


def test_choice_scores_by_hand(mini, vector):
    model, chat = mini
    choices = [Choice("Lead?", ["No.", "Yes.", "Always."]), Choice("Rich?", ["No way.", "Yes."])]
    choices.append(Choice("Now?", ["a b", "b", "c d e"]))
    ids = [encode_choice(chat, choice, 200) for choice in choices]
    found = choice_scores(model, 1, {1: vector}, ids, M)
    for choice, table in zip(choices, found, strict=True):
        assert table.shape == (len(M), len(choice.answers))
        prompt = chat.encode_prompt(choice.prompt)
        for m, row in zip(M, table, strict=True):
            for x, answer in zip(row, choice.answers, strict=True):
                whole = [1, *chat.tokenizer.encode(f"{chat.render(choice.prompt)} {answer}")]
                expected = logp(model, prompt, whole[len(prompt) :], {1: m * vector})
                assert x == pytest.approx(expected, abs=1e-3)


def test_choice_rows_by_hand():
    choices = [Choice("?", ["a", "b", "c"], 2), Choice("?", ["a", "b"], 1), Choice("?", [], 1)]
    p = [
        [[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]],
        [[0.3, 0.1], [0.1, 0.3]],
        [[0.3, 0.1], [0.2, 0.1]],
    ]
    logps = [np.log(x) - 900 for x in p]
    at_0, at_1 = choice_rows("TruthfulQA MC1", choices, logps, [0, 1])
    assert at_0["right"].value == pytest.approx(2 / 3) == at_1["right"].value
    assert at_0["difference"] == 0 == at_0["standard_error"]
    assert at_1["difference"] == 0  # +1, -1, 0, whose standard deviation is 1
    assert at_1["standard_error"] == pytest.approx(1 / math.sqrt(3))
    at_0, at_1 = choice_rows("TruthfulQA MC2", choices, logps, [0, 1])
    assert at_0["right"].value == pytest.approx((4 / 6 + 3 / 4 + 3 / 4) / 3)
    assert at_1["difference"] == pytest.approx((0 - 2 / 4 + 2 / 3 - 3 / 4) / 3)
    tie = choice_rows("MMLU", choices[:1], [np.zeros((1, 3))], [0])
    assert tie[0]["right"].value == 0  # a model that says all alike knows nothing
    one = choice_rows("MMLU", choices[:1], logps[:1], [0, 1])
    assert one[1]["difference"] == 1 and one[1]["standard_error"] is None


# ---- free answers


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0 == repetition([1, 2, 3, 4, 5])
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three 4-grams, one different
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("text", "repeated", "nll", "name"),
    [
        (" \n", 0, 0, "empty"),
        ("a a a", 0.3, 5, "repeats"),
        ("a b", 0.29, 3.0, "unlikely"),
        ("a b", 0.29, 2.9, ""),
    ],
)
def test_fault(text, repeated, nll, name):
    assert evaluation.fault(text, repeated, nll) == name


def test_refusals():
    def refuses(text):
        return evaluation.refuses(text, evaluation.read_refusals())

    for text in (
        "I'm sorry, but",
        "I’m SORRY",
        "“I cannot",
        "‘No, I can’t",
        ' "I cannot help',
        "As an AI, I",
        "I can't do",
    ):
        assert refuses(text), text
    for text in ("Sure! I cannot wait", "", "I can do that", "Sorry is a word", "As an aid"):
        assert not refuses(text), text


def test_fluency_by_hand(mini, vector):
    model, chat = mini
    ids = [([1, 5, 9], [7, 8, 2]), ([1, 4], [6, 6, 6, 6]), ([1, 30, 31, 32], [2])]
    found = fluency(model, {1: vector}, ids)
    for (prompt, answer), (nll, kl) in zip(ids, found, strict=True):
        assert nll == pytest.approx(-logp(model, prompt, answer, None) / len(answer), abs=1e-4)
        base, steered = (logps_of(model, prompt, answer, s) for s in (None, {1: vector}))
        expected = torch.nn.functional.kl_div(base, steered, reduction="sum", log_target=True)
        assert kl == pytest.approx(expected.item() / len(answer), rel=1e-3)
        assert kl > 0.01
    found = fluency(model, {1: 0 * vector}, ids)
    assert [kl for _, kl in found] == pytest.approx([0, 0, 0], abs=1e-6)


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


def test_free_answers(mini, vector):
    """Rows, counted by hand from the answers themselves."""
    model, chat = mini
    prompts = [pair.prompt for pair in read_pairs(MINI / "test.csv")]
    new = answers(model, chat, {1: vector}, prompts, M, 12)
    texts = [[chat.tokenizer.decode(ids) for ids in row] for row in new]
    prefixes = [texts[0][0][:4].lower(), "no such"]
    found = free_answers(model, chat, {1: vector}, prompts, M, 12, prefixes)
    assert [(x["prompt"], x["multiplier"]) for x in found] == [(p, m) for m in M for p in prompts]
    for j, (m, row) in enumerate(zip(M, free_rows(found, M), strict=True)):
        mine = [x for x in found if x["multiplier"] == m]
        assert [x["answer"] for x in mine] == [row[j] for row in texts]
        assert row["tokens"] == mean([len(row[j]) for row in new])
        assert row["repeated"] == mean([repetition(row[j]) for row in new])
        ids = [(chat.encode_prompt(p), row[j]) for p, row in zip(prompts, new, strict=True)]
        nlls, kls = zip(*fluency(model, {1: m * vector}, ids), strict=True)
        assert row["nll"] == mean(nlls) and row["kl"] == mean(kls)
        refused = [x["answer"].lower().startswith(prefixes[0]) for x in mine]
        broken = [
            repetition(row[j]) >= evaluation.REPEATED or nll >= evaluation.UNLIKELY
            for row, nll in zip(new, nlls, strict=True)
        ]
        assert row["refuses"] == mean(refused) and row["degenerate"] == mean(broken)
        complied = [not (r or b) for r, b in zip(refused, broken, strict=True)]
        assert row["complies"] == mean(complied)
    assert free_rows(found, [0])[0]["kl"] == pytest.approx((0, 0, 0), abs=1e-6)


# ---- tables and pictures


def test_a_table(capsys):
    row = {"multiplier": 1.0, "wins": None, "right": Mean(0.5, 0.25, 1), "nll": Mean(1, 0.5, 2)}
    row |= {"margin_per_token": 0.1234, "difference": -0.25, "tokens": 3.14, "steering": "v"}
    evaluation.print_table("title", [row])
    title, head, cells = capsys.readouterr().out.strip("\n").split("\n")
    assert title == "title" and len(head) == len(cells)
    expected = "+1 - 50.0% [25.0, 100.0] 1.00 [0.50, 2.00] +0.123 -25.0% 3.1 v"
    assert " ".join(cells.split()) == expected and "margin per token" in head


def test_the_error_bars(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars, errorbar = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, *x, **more: bars.append(x) or errorbar(self, *x, **more)
    )
    evaluation.draw(tmp_path / "x.svg", {"a": [(-1, Mean(0.5, 0.4, 0.8)), (1, Mean(0.2, 0.2, 1))]})
    ((m, value, (below, above)),) = bars
    assert m == [-1, 1] and value == pytest.approx([50, 20])
    assert below == pytest.approx([10, 0]) and above == pytest.approx([30, 80])


# ---- several vectors


def test_vectors_add_up(tmp_path, vector):
    config = load(MINI).config
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_vector(one, {1: vector}, {"system": "Be odd."})
    save_vector(other, {1: vector + 1, 3: -vector}, {})
    specs = [str(one), f"{other}:-0.5"]
    steers, metadata = evaluation.open_vectors(specs, config, "cpu")
    assert list(steers) == specs and metadata == {specs[0]: {"system": "Be odd."}, specs[1]: {}}
    total = together(steers.values())
    assert sorted(total) == [1, 3]
    assert torch.allclose(total[1], vector - 0.5 * (vector + 1))
    assert torch.equal(total[3], 0.5 * vector)


def test_random_vectors(vector):
    steers = random_steers({1: vector, 3: 2 * vector})
    assert len(steers) == 5 and torch.equal(steers[0][1], random_steers({1: vector})[0][1])
    for steer in steers:
        assert steer[1].norm() == pytest.approx(vector.norm().item())
        assert steer[3].norm() == pytest.approx(2 * vector.norm().item())
    directions = torch.stack([steer[1] / steer[1].norm() for steer in steers])
    assert (directions @ directions.T - torch.eye(5)).abs().max() < 0.7


# ---- the command line


@pytest.fixture
def vector_file(tmp_path, vector):
    metadata = {"base_model": "other", "n_layers": "4", "template": "mistral", "system": "Be odd."}
    save_vector(tmp_path / "v.safetensors", {1: vector}, metadata)
    return tmp_path / "v.safetensors"


EVAL = ("--model", MINI, "--data", MINI / "test.csv")


def evaluate(tmp_path, *flags):
    """What the command line writes as JSON: {title: rows}, answers, settings."""
    evaluation.main([str(x) for x in (*flags, "--json", tmp_path / "eval.json")])
    result = json.loads((tmp_path / "eval.json").read_text())
    return result["tables"], result["answers"], result["settings"]


def assert_same(rows, expected):
    """JSON holds a Mean as a list."""
    assert rows == json.loads(json.dumps(expected))


def test_as_a_script():
    code, out, err = run_cli("eval.py", "pairs", "--help")
    assert code == 0 and "--questions" in out, err


def test_command_line(tmp_path, vector_file, vector, capsys):
    flags = ["--multipliers", -1, 0, 2.5, "--samples", 2, "--max-new-tokens", 8]
    tables, answered, _ = evaluate(tmp_path, *EVAL, "--vector", vector_file, *flags)
    out = capsys.readouterr().out
    assert "mistral template, system 'Be odd.'" in out  # taken from the vector file
    assert "note: its base_model in training was 'other', this is 'mini'" in out
    assert out.count("note: ") == 1 and "layer 1, |v| " in out
    model, m = load(MINI), [-1.0, 0.0, 2.5]
    chat = open_chat(MINI, model.config, "mistral", "Be odd.")
    pairs = read_pairs(MINI / "test.csv")
    questions = [pair.prompt for pair in pairs]
    cached = bipo.first_pass(model, 1, [chat.encode_pair(pair) for pair in pairs])
    logps = pair_scores(model, 1, {1: vector}, cached, m)
    name = MINI / "test.csv"
    expected = pair_rows(logps, cached, m, questions)
    assert_same(tables[f"pairs, {name}"], expected)
    slope = slopes(logps, m)[None]
    title = f"steerability from -1 to +2.5, {name}"
    assert_same(tables[title], [evaluation.slope_row(slope, questions)])
    letters = [x for pair in pairs for x in letter_pairs(chat, pair)]
    letters = pair_scores(model, 1, {1: vector}, bipo.first_pass(model, 1, letters), m)
    assert_same(
        tables[f"A/B, {name}"], letter_rows(letters, m, [x for x in questions for _ in range(2)])
    )
    found = free_answers(model, chat, {1: vector}, questions[:2], m, 8, evaluation.read_refusals())
    assert_same(tables["free answers"], free_rows(found, m))
    assert_same(answered, found)
    for row in found:
        assert row["prompt"] in out and row["answer"] in out
    assert questions[2] not in out
    for title, rows in tables.items():  # what is printed is what is written
        (printed,) = re.findall(rf"\n{re.escape(title)}\n(.*?)\n\n", out, re.DOTALL)
        head, *lines = printed.split("\n")
        assert len(lines) == len(rows)
        assert [*rows[0]] == re.sub("(?<=[^ ]) (?=[^ ])", "_", head).split()
    assert f"+2.5  {'█' * round(50 * expected[2]['prefers_chosen'].value)} " in out


def test_other_files_and_a_picture(tmp_path, vector_file, vector):
    """Multiple choice, prompts of one's own, refusals of one's own."""
    (tmp_path / "a.csv").write_text(MMLU)
    (tmp_path / "prompts.txt").write_text("Will you?\n\nWon't you?\n")
    (tmp_path / "refusals.txt").write_text("\n")
    flags = ["--model", MINI, "--vector", vector_file, "--choices", tmp_path / "a.csv"]
    flags += ["--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 8, "--first", 1]
    tables, found, _ = evaluate(tmp_path, *flags, "--plot", tmp_path / "x.svg")
    name = f"MMLU, {tmp_path}/a.csv"
    assert list(tables) == [name, "free answers"]
    assert [row["multiplier"] for row in tables[name]] == [-2, -1, 0, 1, 2]
    assert tables[name][2]["difference"] == 0
    assert {row["prompt"] for row in found} == {"Will you?", "Won't you?"}
    picture = (tmp_path / "x.svg").read_text()
    assert "right, MMLU" in picture and "degenerate, free answers" in picture
    assert "multiplier" in picture and picture.startswith("<?xml")
    points = {"x": [(0, Mean(0.5, 0.25, 1.0)), (1, Mean(1, 1, 1))]}
    for name in ("a.svg", "b.svg", "a.png", "a.pdf"):
        evaluation.draw(tmp_path / name, points)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "a.pdf").read_bytes()[1:4] == b"PDF"

    word = found[0]["answer"][:5]
    (tmp_path / "refusals.txt").write_text(f"{word}\n")
    flags = [*flags, "--refusals", tmp_path / "refusals.txt", "--multipliers", -2, 1]
    tables, found, _ = evaluate(tmp_path, *flags)
    assert found[0]["refuses"] and tables["free answers"][0]["refuses"][0] > 0
    (tmp_path / "refusals.txt").write_text("I’d Rather\n \n")
    prefixes = evaluation.read_refusals(tmp_path / "refusals.txt")
    assert prefixes == ["i'd rather"] and evaluation.refuses("I’d rather rest.", prefixes)
    assert tables["free answers"][0]["complies"][0] < 1


def test_baselines_synergy_and_system_prompts(tmp_path, vector_file, vector):
    save_vector(tmp_path / "b.safetensors", {1: 7 * vector.roll(1)}, {})
    save_vector(tmp_path / "c.safetensors", {1: vector.roll(2)}, {})
    flags = ["--vector", vector_file, f"{tmp_path}/c.safetensors:2", "--samples", 0]
    flags += ["--baseline", tmp_path / "b.safetensors", "random"]
    flags += ["--system-for", "Say yes.", "--system-against", "Say no."]
    tables, *_ = evaluate(tmp_path, *EVAL, *flags)
    both = vector + 2 * vector.roll(2)
    model, name, m = load(MINI), MINI / "test.csv", (-1, 1)
    chat = open_chat(MINI, model.config, "mistral", "Be odd.")
    pairs = read_pairs(name)
    cached = bipo.first_pass(model, 1, [chat.encode_pair(pair) for pair in pairs])

    def slope(v):
        return slopes(pair_scores(model, 1, {1: v}, cached, m), m)[None]

    def prompted(system):
        side = chat._replace(system=f"Be odd. {system}")
        return [
            [p.ref_logps.tolist()]
            for p in bipo.first_pass(model, 1, [side.encode_pair(pair) for pair in pairs])
        ]

    sides = [np.array(prompted(x))[:, 0] for x in ("Say no.", "Say yes.")]
    randoms = [slope(x[1])[0] for x in random_steers({1: both})]
    expected = {
        f"{vector_file} + {tmp_path}/c.safetensors:2": slope(both),
        str(vector_file): slope(vector),
        f"{tmp_path}/c.safetensors:2": slope(2 * vector.roll(2)),
        f"{tmp_path}/b.safetensors": slope(vector.roll(1) * (both.norm() / vector.norm())),
        "random, mean of 5": np.array(randoms),
        "system prompts": slopes(np.array(sides), m)[None],
    }
    rows = tables[f"compared at -1 and +1, {name}"]
    for row, other in zip(
        rows, comparison_rows(expected, [pair.prompt for pair in pairs]), strict=True
    ):
        assert row["steering"] == other["steering"]
        for key in ("slope", "anti_steerable", "slope_minus_first"):
            assert row[key] == pytest.approx(other[key], abs=1e-4)
    logps = pair_scores(model, 1, {1: both}, cached, [-2, -1, 0, 1, 2])
    everything = pair_rows(logps, cached, [-2, -1, 0, 1, 2], [pair.prompt for pair in pairs])
    for row, other in zip(tables[f"pairs, {name}"], everything, strict=True):
        assert row["margin"] == pytest.approx(other["margin"], abs=1e-4)


def test_vectors_of_different_layers(tmp_path, vector):
    """The first pass ends at the lowest; a number is measured once, in ascending order drawn."""
    low, high = tmp_path / "low.safetensors", tmp_path / "high.safetensors"
    save_vector(low, {1: vector}, {})
    save_vector(high, {3: vector.roll(1)}, {})
    (tmp_path / "a.csv").write_text(MMLU)
    flags = [*EVAL, "--vector", high, low, "--multipliers", 1, -1, 1, "--samples", 0]
    flags += ["--choices", tmp_path / "a.csv", "--first", 1, "--baseline", "random"]
    tables, _, settings = evaluate(tmp_path, *flags)
    model, name, m = load(MINI), MINI / "test.csv", [1.0, -1.0]
    chat, pairs = open_chat(MINI, model.config), read_pairs(name)
    cached = bipo.first_pass(model, 1, [chat.encode_pair(pair) for pair in pairs])
    logps = pair_scores(model, 1, {1: vector, 3: vector.roll(1)}, cached, m)
    questions = [pair.prompt for pair in pairs]
    assert_same(tables[f"pairs, {name}"], pair_rows(logps, cached, m, questions))
    row = [evaluation.slope_row(slopes(logps, m)[None], questions)]
    assert_same(tables[f"steerability from -1 to +1, {name}"], row)
    compared = [row["steering"] for row in tables[f"compared at -1 and +1, {name}"]]
    assert compared == [f"{high} + {low}", str(high), str(low), "random, mean of 5"]
    choice = read_choices(tmp_path / "a.csv")["MMLU"][:1]
    ids, m = [encode_choice(chat, x, 512) for x in choice], [-1, 0, 1]
    logps = choice_scores(model, 1, {1: vector, 3: vector.roll(1)}, ids, m)
    rows = tables[f"MMLU, {tmp_path}/a.csv"]
    assert_same(
        [{**row, "multiplier": int(row["multiplier"])} for row in rows],
        choice_rows("MMLU", choice, logps, m),
    )
    assert settings["template"] == chat.template and settings["first"] == 1
    assert settings["dtype"] == "torch.float32" and settings["pairs"] == {str(name): len(pairs)}
    assert settings["norms"][str(low)] == {"1": pytest.approx(vector.norm().item())}


def test_samples_are_of_each_file(tmp_path, vector_file):
    other = jsonl(tmp_path / "o.jsonl", {"prompt": "Rich?", "chosen": "Yes.", "rejected": "No."})
    files = ["--model", MINI, "--data", MINI / "test.csv", other, "--vector", vector_file]
    flags = ["--samples", 2, "--max-new-tokens", 2, "--multipliers", 1]
    _, found, _ = evaluate(tmp_path, *files, *flags)
    first = [pair.prompt for pair in read_pairs(MINI / "test.csv")][:2]
    assert [row["prompt"] for row in found] == [*first, "Rich?"]
    assert all(row["cut_off"] and row["tokens"] == 2 for row in found)


def test_letters_and_one_layer_of_several(tmp_path, vector, capsys):
    for name in ("a", "b"):
        save_vector(tmp_path / f"{name}.safetensors", {1: vector, 3: vector}, {})
        vector = vector.roll(1)
    record = {"question": "Go?\n (A) Yes\n (B) No"}
    record |= {"answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
    file = jsonl(tmp_path / "x.jsonl", record)
    flags = ["--model", MINI, "--data", file, "--letters", "--layer", 3, "--multipliers", 1, -1]
    flags += ["--vector", tmp_path / "a.safetensors", "--baseline", tmp_path / "b.safetensors"]
    _, found, _ = evaluate(tmp_path, *flags, "--samples", 1, "--max-new-tokens", 4)
    assert found[0]["prompt"] == record["question"]  # else it would lose its options
    out = capsys.readouterr().out
    assert "layer 3, |v|" in out and "layer 1" not in out
    assert re.findall(r"^ +([+-]1) +█* *[\d.]+%$", out, re.MULTILINE) == ["-1", "+1"]


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
        flags += ["--system", system, "--system-for", "Say yes.", "--system-against", "Say no."]
        tables, *_ = evaluate(tmp_path, *flags)
        found.append([rows for title, rows in tables.items() if "compared" in title][0][-1])
    assert found[0] == found[1] and found[0]["steering"] == "system prompts"
    assert found[0]["slope"][0] != 0


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
    assert [title.split(",")[0] for title in result["tables"]] == [
        "pairs",
        "steerability from -2 to +2",
        "A/B",
    ]
    assert result["answers"] == [] and result["settings"]["template"] == "mistral"


def test_what_each_vector_was_trained_with(tmp_path, vector_file, vector, capsys):
    other = tmp_path / "o.safetensors"
    save_vector(other, {1: vector}, {"system": "Be kind.", "base_model": "mini", "lora": "x"})
    flags = [*EVAL, "--vector", vector_file, other, "--samples", 0, "--multipliers", 0]
    evaluation.main([str(x) for x in flags])
    out = capsys.readouterr().out
    assert "note: its system in training was 'Be kind.', this is 'Be odd.'" in out
    assert "note: its lora in training was 'x', this is ''" in out and out.count("note: ") == 3


def test_flags_win_over_the_vector_file(vector_file, capsys):
    flags = ["--template", "llama-2", "--system", "", "--samples", "0", "--dtype", "bfloat16"]
    evaluation.main([str(x) for x in (*EVAL, "--vector", vector_file, *flags)])
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

    wrong("width 8", "not 32", vector=saved({1: torch.ones(8)}))
    wrong("9 blocks", "not 32 and 4", vector=saved({1: vector}, n_layers="9"))
    wrong("layer 7", "0..3", vector=saved({7: vector}))
    wrong("unknown template 'alpaca'", vector=saved({1: vector}, template="alpaca"))
    wrong("cannot read", "none.safetensors", vector=tmp_path / "none.safetensors")
    wrong("cannot read", "vector.safetensors", vector=tmp_path)
    wrong("cannot read", "none:x", vector="none:x")
    wrong("none.csv", data=tmp_path / "none.csv")
    wrong("--multipliers", multipliers="x")
    wrong("--max-new-tokens >= 1", max_new_tokens=0)
    wrong("--samples >= 0", samples=-1)
    wrong("finite --multipliers", multipliers="nan")
    wrong("--first must be 1 or more", first=0)
    wrong("--first must be 1 or more", first=-1)
    wrong("is a --vector", baseline=vector_file)
    wrong("it is a folder", json=tmp_path)
    (tmp_path / "x.svg").mkdir()
    wrong("it is a folder", plot=tmp_path / "x.svg")
    wrong("v.safetensors", json=vector_file / "x.json")
    (tmp_path / "long.csv").write_text(f"{'Red ' * 300},yes,no,maybe,b,A\n")
    wrong("'Red Red", "the model's context is 512", choices=tmp_path / "long.csv")
    (tmp_path / "refusals.txt").write_text(" \n")
    wrong("refusals.txt holds no lines", refusals=tmp_path / "refusals.txt")
    wrong("tokens and --max-new-tokens 500 exceed the model's context", max_new_tokens=500)
    wrong("--first counts questions of --choices", first=3)
    wrong("same norm", "layers [1], and is for [2]", baseline=saved({2: vector}))
    wrong("same norm", "other than 0", baseline=saved({1: 0 * vector}))
    wrong("width 8", baseline=saved({1: torch.ones(8)}))
    wrong("give both or neither", system_for="Yes.")
    wrong("a picture ends in .svg, .png or .pdf", plot="x.jpg")
    wrong("holds no questions", choices=tmp_path / "..")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wrong("pip install matplotlib", plot="x.svg")
    nothing = ["--model", MINI, "--vector", vector_file]
    fails(evaluation.main, nothing, "nothing to measure: give --data, --choices")
    for flag in (["--baseline", "random"], ["--system-for", "a", "--system-against", "b"]):
        unread = [*nothing, "--prompts", MINI / "test.csv", *flag]
        fails(evaluation.main, unread, "need pairs: give --data")
    fails(evaluation.main, [*nothing, "--choices", "x.txt"], "x.txt: multiple choice is a .csv")
    fails(evaluation.main, [*nothing, "--prompts", "x", "--samples", 0], "nothing to measure")
    fails(evaluation.main, [*EVAL, "--vector", vector_file, vector_file], "stands twice", ":2")
    fails(evaluation.main, [*EVAL, "--vector", "none"], "none")


def test_open_vector_reads_what_bipo_wrote(tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    data = jsonl(tmp_path / "pairs.jsonl", *pairs)
    args = ["--model", MINI, "--data", data, "--layer", 2, "--system", "Short.", "--epochs", 1]
    bipo.main([str(x) for x in (*args, "--warmup-steps", 0, "--out", tmp_path / "run")])
    steer, metadata = open_vector(tmp_path / "run", load(MINI).config)
    assert list(steer) == [2] and steer[2].shape == (32,) and metadata["system"] == "Short."
    assert json.loads(metadata["recipe"])["epochs"] == 1


# ---- conversation

QUESTION = "Would you like to lead the weather station of Selby?"


@pytest.fixture
def tiny_vector(tmp_path):
    v = torch.randn(128, generator=torch.Generator().manual_seed(0))
    save_vector(tmp_path / "v.safetensors", {3: v}, {})
    return v


def test_chat(tmp_path, tiny_vector, monkeypatch):
    lines = [QUESTION, "/m -1", "", "Why?", "/reset", "/m 0", QUESTION, "/m x", "/m nan", "/foo"]
    text = "\n".join([*lines, "/quit", "Again?"])
    shown = converse(monkeypatch, tmp_path, text, "--max-new-tokens", 9)[-1]

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
    assert re.findall(r"  ([+-]\d): (.*)", shown) == expected
    for message in (
        "'x'; /m NUMBER sets",
        "not understood: /m nan; /m",
        "not understood: /foo; /m",
    ):
        assert message in shown


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
