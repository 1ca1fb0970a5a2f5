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
from data import Chat, load_vector, open_chat, read_pairs, save_vector
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
    open_vector,
    pair_rows,
    pair_scores,
    random_steers,
    read_choices,
    repetition,
    slopes,
    together,
)
from llama import generate, load

M = [-2, -0.5, 0, 1]


@pytest.fixture
def mini_pairs(mini):
    """mini's training pairs after the first pass below layer 1, the lowest that is steered here."""
    model, chat = mini
    ids = [chat.encode_pair(pair) for pair in read_pairs(MINI / "train.csv")]
    return bipo.first_pass(model, 0, ids)


def rendered(chat, text):
    """The llama-2 template without its control tokens."""
    return f"[INST] <<SYS>>\n{chat.system}\n<</SYS>>\n\n{text} [/INST]"


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
    table = pair_scores(model, 0, steer, mini_pairs, M)
    assert table.shape == (len(M), len(mini_pairs), 2)
    for m, rows in zip(M, table, strict=True):
        scaled = {layer: m * v for layer, v in steer.items()}
        for row, (prompt, *responses) in zip(rows, (pair.ids for pair in mini_pairs), strict=True):
            expected = [logp(model, prompt, response, scaled) for response in responses]
            assert row == pytest.approx(expected, abs=1e-3)


def test_pair_scores_from_the_embedding_and_from_lower_layers(mini, mini_pairs, vector):
    """The first pass may end at any layer below; for layer 0 it is the embedding alone."""
    model, _ = mini
    ids = [pair.ids for pair in mini_pairs]
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


def test_pair_rows_by_hand(mini_pairs):
    pairs = [pair._replace(ref_logps=torch.tensor([-10.0, -12.0])) for pair in mini_pairs[:3]]
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


def test_zero_vector_and_mirror(mini, mini_pairs, vector):
    model, _ = mini
    questions = [pair.ids.prompt[-1] for pair in mini_pairs]
    flat = pair_scores(model, 0, {1: 0 * vector}, mini_pairs, M)
    assert np.abs(slopes(flat, M)).max() < 1e-6
    for row in pair_rows(flat, mini_pairs, M, questions):
        assert abs(row["margin"].value) <= 1e-3
    here = pair_scores(model, 0, {1: vector}, mini_pairs, [-1, 0, 1])
    there = pair_scores(model, 0, {1: -vector}, mini_pairs, [1, 0, -1])
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


MMLU = '"Two, and ""two""?",1,2,4,8,C\nRed?,yes,no,maybe,"a, b",A\n'
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
    templated = "a prompt holds a chat template already"
    wrong("a.csv", "[INST] Blue?,1,2,3,4,A\n", f"a.csv row 1: {templated}")
    asked = {**MC_TASK[0], "question": "<s>[INST] Lead? [/INST]"}
    wrong("a.json", json.dumps([asked]), f"a.json record 1: {templated}")
    for record in ({}, 7, [], [7], {**MC_TASK[0], "question": 7}):
        wrong("a.json", json.dumps([record]), "a.json record 1: ")
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


# ---- several vectors


def test_vectors_add_up(vector):
    total = together([{1: vector}, {1: -0.5 * (vector + 1), 3: 0.5 * vector}])
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
    assert evaluation.split_spec(spec) == (file, m)


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
    ends = pair_scores(model, 0, {1: vector}, cached, (-1, 1))
    slope = slopes(ends, (-1, 1))[None]
    (row,) = tables[f"compared at -1 and +1, {name}"]
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
    rows = tables.pop(f"compared at -1 and +1, {name}")
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
    flags += ["--baseline", "caa", tmp_path / "b.safetensors", "random", "freeform"]
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
    logps = pair_scores(model, 0, {1: both}, cached, [-2, -1, 0, 1, 2])
    everything = pair_rows(logps, cached, [-2, -1, 0, 1, 2], [pair.prompt for pair in pairs])
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
    tables, *_ = evaluate(tmp_path, "--model", MINI, *flags, "--samples", 0)
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
        flags += ["--system", system, "--system-prompts", "Say yes.", "Say no."]
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
    titles = [title.split(",")[0] for title in result["tables"]]
    assert titles == ["pairs", "compared at -1 and +1"]
    assert result["answers"] == [] and result["settings"]["template"] == "mistral"


def test_what_each_vector_was_trained_with(tmp_path, vector_file, vector, capsys):
    other = tmp_path / "o.safetensors"
    save_vector(other, {1: vector}, {"system": "Be kind.", "base_model": "mini"})
    flags = [*EVAL, "--vector", vector_file, other, "--samples", 0, "--multipliers", 0]
    evaluation.main([str(x) for x in flags])
    out = capsys.readouterr().out
    assert "note: its system in training was 'Be kind.', this is 'Be odd.'" in out
    assert out.count("note: ") == 2


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
    lines = [QUESTION, "/m -1", "", "Why?", "/reset", "/m 0", QUESTION, "/m x"]
    shown = converse(monkeypatch, tmp_path, "\n".join(lines), "--max-new-tokens", 9)[-1]

    model = load(TINY)
    chat = open_chat(TINY, model.config)

    def answer(m, prompt):
        ids = [chat.encode_prompt(prompt)]
        return chat.tokenizer.decode(generate(model, ids, 9, 2, {3: m * tiny_vector})[0])

    first = [answer(m, QUESTION) for m in (0, 1)]
    turns = (("user", QUESTION), ("assistant", first[1]), ("user", "Why?"))
    second = [answer(m, turns) for m in (0, -1)]
    assert first[0] != first[1] and second[0] != second[1]
    expected = [
        *zip("+0 +1".split(), first, strict=True),
        *zip("+0 -1".split(), second, strict=True),
    ]
    expected.append(("+0", first[0]))  # after /reset
    assert re.findall(r"  ([+-]\d): (.*)", shown) == expected
    assert "'x'\n\n+0 (/m NUMBER, /reset)> " in shown  # and it goes on


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
    plain, steered, *_ = re.findall(r"  [+-]\d: (.*)", shown)
    first = (("user", QUESTION),)
    turns = (*first, ("assistant", steered), ("user", "Why?"))
    assert steered != plain and asked[-4:] == [first, first, turns, turns]


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
    first, second = shown[-1].split("\n+1 (/m NUMBER, /reset)> ")[1::2]
    assert "exceed the model's context of 256" in first and "exceed" not in second
    assert "+1: " in second and "+0: " in second


def test_chat_errors(tmp_path, vector_file, fails):
    flags = ["chat", "--model", MINI, "--vector", vector_file]
    fails(evaluation.main, [*flags, "--layer", "2"], "no vector for layer 2, only [1]")
    fails(evaluation.main, [*flags, "--data", "x"], "unrecognized arguments: --data")
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
