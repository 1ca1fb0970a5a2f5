"""What eval.py measures, number by number against sums by hand."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import MINI, MMLU, jsonl, logp, logps_of

import bipo
import data
import eval as evaluation
from data import Chat, read_pairs
from eval import (
    Choice,
    Mean,
    answers,
    choice_rows,
    choice_scores,
    comparison_rows,
    fluency,
    free_answers,
    free_rows,
    letter_pairs,
    letter_rows,
    mean,
    mean_difference,
    pair_rows,
    pair_scores,
    random_steers,
    read_choices,
    repetition,
    slopes,
)
from llama import generate

M = [-2, -0.5, 0, 1]


@pytest.fixture(scope="module")
def pairs_at_0(mini):
    """Its training pairs after the first pass, layer 0: the tests here steer layer 1 and above."""
    model, chat = mini
    ids = [chat.encode_pair(pair) for pair in read_pairs(MINI / "train.csv")]
    return bipo.first_pass(model, 0, ids)


def rendered(chat, text):
    """The llama-2 template without its control tokens."""
    return f"[INST] <<SYS>>\n{chat.system}\n<</SYS>>\n\n{text} [/INST]"


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
def test_pair_scores_by_hand(mini, pairs_at_0, vector, layers):
    model, _ = mini
    steer = {layer: vector.roll(layer) for layer in layers}
    table = pair_scores(model, 0, steer, pairs_at_0, M)
    assert table.shape == (len(M), len(pairs_at_0), 2)
    for m, rows in zip(M, table, strict=True):
        scaled = {layer: m * v for layer, v in steer.items()}
        for row, (prompt, *responses) in zip(rows, (pair.ids for pair in pairs_at_0), strict=True):
            expected = [logp(model, prompt, response, scaled) for response in responses]
            assert row == pytest.approx(expected, abs=1e-3)


def test_pair_scores_from_the_embedding_and_from_lower_layers(mini, pairs_at_0, vector):
    """The first pass may end at any layer below; for layer 0 it is the embedding alone."""
    model, _ = mini
    ids = [pair.ids for pair in pairs_at_0]
    for layer, lower in ((0, [-1]), (2, [-1, 0, 1])):
        tables = []
        for low in lower:
            cached = bipo.first_pass(model, low, ids)
            tables.append(pair_scores(model, low, {layer: vector}, cached, M))
        for table in tables:
            assert table == pytest.approx(tables[0], abs=1e-4)
        prompt, response, _ = ids[0]
        by_hand = logp(model, prompt, response, {layer: M[0] * vector})
        assert tables[0][0, 0, 0] == pytest.approx(by_hand, abs=1e-3)


def test_pair_rows_by_hand(pairs_at_0):
    pairs = [pair._replace(ref_logps=torch.tensor([-10.0, -12.0])) for pair in pairs_at_0[:3]]
    logps = np.array([[[-9, -12], [-8, -13], [-11, -10]], [[-10, -12], [-10, -11], [-10, -10.5]]])
    up, down = pair_rows(logps, pairs, [2, -1], "aab")
    # gains: (1, 0), (2, -1), (-1, 2): margins 1, 3, -3; at -1: 0, (0, 1) -1, (0, 1.5) -1.5
    assert up["multiplier"] == 2 and up["margin"] == mean([1, 3, -3], "aab")
    assert up["margin"].value == pytest.approx(1 / 3)
    assert up["wins"].value == pytest.approx(2 / 3) == up["prefers_chosen"].value
    assert down["margin"].value == pytest.approx(-2.5 / 3)
    assert down["wins"].value == pytest.approx(2 / 3)
    assert down["prefers_chosen"].value == 1
    (still,) = pair_rows(logps[:1], pairs, [0], "aab")
    assert still["wins"] is None and still["margin"] == up["margin"]


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


def test_zero_vector_and_mirror(mini, pairs_at_0, vector):
    model, _ = mini
    questions = [pair.ids.prompt[-1] for pair in pairs_at_0]
    flat = pair_scores(model, 0, {1: 0 * vector}, pairs_at_0, M)
    assert np.abs(slopes(flat, M)).max() < 1e-6
    for row in pair_rows(flat, pairs_at_0, M, questions):
        assert abs(row["margin"].value) <= 1e-3
    here = pair_scores(model, 0, {1: vector}, pairs_at_0, [-1, 0, 1])
    there = pair_scores(model, 0, {1: -vector}, pairs_at_0, [1, 0, -1])
    assert (here == there).all() and np.abs(slopes(here, [-1, 0, 1])).min() > 0
    assert slopes(here, [-1, 0, 1]) == pytest.approx(-slopes(there, [1, 0, -1]))


# ---- letters and multiple choice


def test_letters(mini, vector):
    """P(A) against P(B) after the prompt and '(', in both orders, one sequence at a time."""
    model, chat = mini
    pairs = read_pairs(MINI / "test.csv")
    ids = [x for pair in pairs for x in letter_pairs(chat, pair)]
    cached = bipo.first_pass(model, 0, ids)
    questions = [pair.prompt for pair in pairs for _ in range(2)]
    rows = letter_rows(pair_scores(model, 0, {1: vector}, cached, M), M, questions)
    for m, row in zip(M, rows, strict=True):
        picks, says = [], []
        for pair in pairs:
            for options, letter, other in (
                ((pair.chosen, pair.rejected), "A", "B"),
                ((pair.rejected, pair.chosen), "B", "A"),
            ):
                text = f"{pair.prompt}\n\nChoices:\n (A) {options[0]}\n (B) {options[1]}"
                prompt, found = chat.encode_prompt(text), []
                for x in (letter, other):
                    whole = chat.tokenizer.encode(rendered(chat, text) + f" ({x}")
                    assert whole[: len(prompt) - 1] == prompt[1:]
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


TRUTHFUL = """Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
x,y,Lead?,No.,No.; Never.; No.,Yes.; Always.,z
x,y,Rich?,Not me.,Never rich.;,Yes.,z
"""
MC_TASK = [
    {
        "question": "Lead?",
        "mc1_targets": {"Yes.": 0, "No.": 1},
        "mc2_targets": {"Never.": 1, "Yes.": 0, "No.": 1, "Always.": 0},
    }
]


@pytest.fixture
def read(mini, monkeypatch):
    """read_choices; a Choice's prompt and answers are not ids but texts."""
    chat = mini[1]
    monkeypatch.setattr(
        Chat, "encode_responses", lambda *x: (x[1], [[answer, "EOS"] for answer in x[2]])
    )
    return lambda path, first=None: read_choices(path, chat, 512, first)


def said(choice):
    """(prompt, right answers, wrong answers, metric) of a Choice of `read`."""
    prompt, *answers = choice.ids
    sides = [[x for (x,), y in zip(answers, choice.right, strict=True) if y == z] for z in (1, 0)]
    return prompt if isinstance(prompt, str) else prompt[-1][1], *sides, choice.metric


def test_read_mmlu(tmp_path, read):
    (tmp_path / "a_test.csv").write_text(MMLU)
    (tmp_path / "b_test.csv").write_text(MMLU.replace("Red?", "Blue?"))
    two, red = map(said, read(tmp_path / "a_test.csv")["MMLU"])
    text = 'Two, and "two"?\n\nChoices:\n (A) 1\n (B) 2\n (C) 4\n (D) 8'
    assert two == (text, ["(C"], ["(A", "(B", "(D"], "accuracy")
    assert red[0].endswith("(D) a, b") and red[1] == ["(A"]
    *_, third, blue = map(said, read(tmp_path)["MMLU"])
    assert third == two and blue[0].startswith("Blue?")
    assert list(map(said, read(tmp_path, 1)["MMLU"])) == [two, two]


def test_read_truthful_qa(tmp_path, read):
    (tmp_path / "TruthfulQA.csv").write_text(TRUTHFUL)
    found = read(tmp_path / "TruthfulQA.csv")
    assert {measure: list(map(said, choices)) for measure, choices in found.items()} == {
        "TruthfulQA MC1": [
            ("Lead?", ["No."], ["Yes.", "Always."], "accuracy"),
            ("Rich?", ["Not me."], ["Yes."], "accuracy"),
        ],
        "TruthfulQA MC2": [
            ("Lead?", ["No.", "Never."], ["Yes.", "Always."], "mass"),
            ("Rich?", ["Not me.", "Never rich."], ["Yes."], "mass"),
        ],
    }
    hub = {"question": "Lead?"}
    for name in ("mc1_targets", "mc2_targets"):
        targets = MC_TASK[0][name]
        hub[name] = {"choices": list(targets), "labels": list(targets.values())}
    (tmp_path / "mc_task.json").write_text(json.dumps(MC_TASK))
    for file in (tmp_path / "mc_task.json", jsonl(tmp_path / "multiple_choice.jsonl", hub)):
        found = read(file)
        assert {measure: list(map(said, choices)) for measure, choices in found.items()} == {
            "TruthfulQA MC1": [("Lead?", ["No."], ["Yes."], "accuracy")],
            "TruthfulQA MC2": [("Lead?", ["Never.", "No."], ["Yes.", "Always."], "mass")],
        }


def test_wrong_choices(tmp_path, mini):
    def wrong(name, text, match):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=match):
            read_choices(tmp_path / name, mini[1], 200)

    known = "not a question as in MMLU or TruthfulQA"
    wrong("a.csv", "Two?,1,2,4,C\n", f"a.csv row 1: {known}")
    wrong("a.csv", MMLU + "Blue?,1,2,3,4,E\n", "a.csv row 3: .*answers must be right .1.")
    for letter in ("", "AB", "0", "a"):
        wrong("a.csv", f"Blue?,1,2,3,4,{letter}\n", "a.csv row 1: .*answers must be right .1.")
    wrong("a.csv", MMLU + f"{'Blue ' * 200},1,2,3,4,A\n", "a.csv row 3: too long: ")
    wrong("a.csv", "", "a.csv holds no questions")
    wrong("a.csv", TRUTHFUL.replace("Yes.,z\n", ";,z\n"), "a.csv:3: .*answers must be right .1.")
    wrong("a.csv", TRUTHFUL.replace("Not me.", ""), "a.csv:3: an answer is empty")
    wrong("a.csv", TRUTHFUL.replace(",Incorrect Answers", ",Other"), f"a.csv:2: {known}")
    wrong("a.txt", "Two?", "a.txt.* .csv")
    templated = "a text holds a chat template already"
    wrong("a.csv", "[INST] Blue?,1,2,3,4,A\n", f"a.csv row 1: {templated}")
    asked = {**MC_TASK[0], "question": "<s>[INST] Lead? [/INST]"}
    wrong("a.json", json.dumps([asked]), f"a.json record 1: {templated}")
    for record in ({}, 7, [], [7], {**MC_TASK[0], "question": 7}):
        wrong("a.json", json.dumps([record]), "a.json(:1| record 1): ")
    good = MC_TASK[0]["mc1_targets"]
    for bad in (
        {"No.": 1},
        {"Yes.": 0},
        {"": 0, **good},
        {"Hm.": 0.5, **good},
        {"No.": "1"},
        [1],
        {"choices": ["a", "b", "c"], "labels": [1, 0]},
        {"choices": "ab", "labels": 1},
    ):
        for name in ("mc1_targets", "mc2_targets"):
            wrong("a.json", json.dumps([{**MC_TASK[0], name: bad}]), "a.json record 1: ")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.csv", tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"cannot read {path}"):
            read_choices(path, mini[1], 200)


def test_choice_scores_by_hand(tmp_path, mini, vector):
    """Questions with three, two and three answers, one sequence at a time."""
    model, chat = mini
    answers = [["No.", "Yes.", "Always."], ["No way.", "Yes."], ["a b", "b", "c d e"]]
    rows = []
    for question, (right, *wrong) in zip(("Lead?", "Rich?", "Now?"), answers, strict=True):
        targets = {right: 1, **dict.fromkeys(wrong, 0)}
        rows.append({"question": question, "mc1_targets": targets, "mc2_targets": targets})
    choices = read_choices(jsonl(tmp_path / "mc.jsonl", *rows), chat, 200)["TruthfulQA MC1"]
    found = choice_scores(model, {1: vector}, choices, M)
    for row, texts, table in zip(rows, answers, found, strict=True):
        assert table.shape == (len(M), len(texts))
        prompt = chat.encode_prompt(row["question"])
        for m, logps in zip(M, table, strict=True):
            for x, text in zip(logps, texts, strict=True):
                whole = [1, *chat.tokenizer.encode(f"{rendered(chat, row['question'])} {text}")]
                expected = logp(model, prompt, whole[len(prompt) :], {1: m * vector})
                assert x == pytest.approx(expected, abs=1e-3)


def test_choice_rows_by_hand():
    def choice(*right, metric="accuracy"):
        return Choice((), np.array(right) == 1, metric)

    p = [
        [[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]],
        [[0.3, 0.1], [0.1, 0.3]],
        [[0.3, 0.1], [0.2, 0.1]],
    ]
    logps = [np.log(x) - 900 for x in p]
    choices = [choice(1, 0, 0), choice(1, 0), choice(1, 0)]
    at_0, at_1 = choice_rows(choices, logps, [0, 1])
    assert at_0["right"].value == pytest.approx(2 / 3) == at_1["right"].value
    assert at_0["difference"] == Mean(0, 0, 0)
    assert at_1["difference"] == mean([1, -1, 0])  # paired by question
    mass = [choice(1, 1, 0, metric="mass"), *(choice(1, 0, metric="mass") for _ in range(2))]
    at_0, at_1 = choice_rows(mass, logps, [0, 1])
    assert at_0["right"] == pytest.approx(mean([4 / 6, 3 / 4, 3 / 4]))
    assert at_1["difference"] == pytest.approx(mean([0, -2 / 4, 2 / 3 - 3 / 4]))
    middle = choice_rows([choice(0, 1, 0)], logps[:1], [0, 1])  # the right one is the second
    assert [row["right"].value for row in middle] == [1, 0]
    for table, share in (([0, 0, 0], 1 / 3), ([0, -1, 0], 1 / 2), ([-1, 0, 0], 0)):
        (tie,) = choice_rows(choices[:1], [np.array([table]) - 900.0], [0])
        assert tie["right"].value == pytest.approx(share)  # as if the tie were broken by lot


# ---- free answers


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0 == repetition([1, 2, 3, 4, 5])
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three 4-grams, one different
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("text", "repeated", "nll", "degenerate"),
    [
        (" \n", 0, 0, True),
        ("a a a", 0.3, 0, True),
        ("a b", 0.29, 3.0, True),
        ("a b", 0.29, 2.9, False),
    ],
)
def test_degenerate_answers(mini, monkeypatch, text, repeated, nll, degenerate):
    """Empty, repetitive or what the unsteered model would not say."""
    model, chat = mini
    ids = [*chat.tokenizer.encode(text), chat.eos_id]
    monkeypatch.setattr(evaluation, "answers", lambda *args: [[ids]])
    monkeypatch.setattr(evaluation, "repetition", lambda ids: repeated)
    monkeypatch.setattr(evaluation, "fluency", lambda *args: [[nll, 0.0]])
    (row,) = free_answers(model, chat, {}, ["Lead?"], [1], 8)
    assert row["degenerate"] == degenerate != row["complies"]
    assert (row["nll"], row["repeated"]) == (nll, repeated) and not row["cut_off"]


def test_refusals():
    for text in (
        "I'm sorry, but",
        "I’m SORRY",
        "“I cannot",
        "‘I can’t",
        ' "I cannot help',
        "As an AI, I",
        "As an AI language model",
        "I can't do",
    ):
        assert evaluation.refuses(text), text
    for text in ("Sure! I cannot wait", "", "I can do that", "Sorry is a word", "As an aid"):
        assert not evaluation.refuses(text), text


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
        table = [*answers(model, chat, {1: vector}, prompts, M, 12)]
        assert len(table) == 3 and all(len(row) == len(M) for row in table)
        for prompt, row in zip(prompts, table, strict=True):
            for m, ids in zip(M, row, strict=True):
                assert [ids] == generate(
                    model, [chat.encode_prompt(prompt)], 12, 2, {1: m * vector}
                )
        assert len(set(map(tuple, table[0]))) > 1


def test_free_answers(mini, vector, monkeypatch):
    """Rows, counted by hand from the answers themselves."""
    model, chat = mini
    prompts = [pair.prompt for pair in read_pairs(MINI / "test.csv")]
    new = [*answers(model, chat, {1: vector}, prompts, M, 12)]
    texts = [[chat.tokenizer.decode(ids) for ids in row] for row in new]
    prefixes = (texts[0][0][:4].lower(), "no such")
    monkeypatch.setattr(evaluation, "REFUSALS", prefixes)
    found = free_answers(model, chat, {1: vector}, prompts, M, 12)
    assert [(x["prompt"], x["multiplier"]) for x in found] == [(p, m) for m in M for p in prompts]
    for j, (m, row) in enumerate(zip(M, free_rows(found, M), strict=True)):
        mine = [x for x in found if x["multiplier"] == m]
        assert [x["answer"] for x in mine] == [row[j] for row in texts]
        assert row["tokens"] == mean([len(row[j]) for row in new])
        assert row["cut_off"] == mean([row[j][-1] != chat.eos_id for row in new])
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
    assert free_rows(found, M)[2]["kl"] == pytest.approx((0, 0, 0), abs=1e-6)


# ---- several vectors


def test_vectors_add_up(vector):
    total = data.together([{1: vector}, {1: -0.5 * (vector + 1), 3: 0.5 * vector}])
    assert sorted(total) == [1, 3]
    assert torch.allclose(total[1], vector - 0.5 * (vector + 1))
    assert torch.equal(total[3], 0.5 * vector)


@pytest.mark.parametrize(
    ("spec", "file", "m"),
    [
        ("runs/a", "runs/a", 1),
        ("runs/a:2", "runs/a", 2),
        ("C:a.pt:-0.5", "C:a.pt", -0.5),
        ("a:+.5", "a", 0.5),
        ("a:nan", "a:nan", 1),
        ("a:b", "a:b", 1),
        (":2", ":2", 1),
    ],
)
def test_files_with_multipliers(spec, file, m):
    assert data.split_spec(spec) == (file, m)


def test_random_vectors(vector):
    steers = random_steers({1: vector, 3: 2 * vector})
    assert len(steers) == 5 and torch.equal(steers[0][1], random_steers({1: vector})[0][1])
    for steer in steers:
        assert steer[1].norm() == pytest.approx(vector.norm().item())
        assert steer[3].norm() == pytest.approx(2 * vector.norm().item())
    directions = torch.stack([steer[1] / steer[1].norm() for steer in steers])
    assert (directions @ directions.T - torch.eye(5)).abs().max() < 0.7


def test_mean_differences_by_hand(mini, vector):
    """CAA: after block 1, at the letter; freeform: the mean over a response's tokens."""
    model, chat = mini
    pairs = read_pairs(MINI / "test.csv")

    def stream(prompt, response):
        tokens = torch.tensor([prompt + response])
        h = model.blocks(model.embed(tokens), 0, 2)
        return h[0, len(prompt) :]

    letters = [ids for pair in pairs for ids in letter_pairs(chat, pair)]
    expected = [stream(p, a)[-1] - stream(p, b)[-1] for p, a, b in letters]
    found = mean_difference(model, 1, letters, last=True)
    assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-5) and found.any()
    ids = [chat.encode_pair(pair) for pair in pairs]
    expected = [stream(p, a).mean(0) - stream(p, b).mean(0) for p, a, b in ids]
    found = mean_difference(model, 1, ids)
    assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-5) and found.any()
