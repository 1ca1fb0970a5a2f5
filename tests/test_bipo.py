"""The specification: the objective, its gradient, the first pass, the recipe, training."""

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, fields, replace

import pytest
import torch
from conftest import MINI

import bipo
from bipo import (
    DIRECTIONS,
    PRESETS,
    Recipe,
    bipo_loss,
    draw_batches,
    evaluate,
    first_pass,
    lr_at,
    response_logps,
    steered_logps,
    train,
)
from data import read_pairs
from llama import Checkpoint, PairIds, length, load, pack

# ---- the official trainer's numbers


@pytest.mark.parametrize(
    ("trace", "logp_tolerance", "loss_tolerance", "steps"),
    # The fp32 noise of log-probs of 150 nats, 1e-4 or less, times beta: 0.1 and, in trace_clip, 2.
    [("trace", 1e-3, 1e-5, 36), ("trace_clip", 1e-3, 2e-4, 12)],
)
def test_replay_of_the_official_trainer(mini, trace, logp_tolerance, loss_tolerance, steps):
    model, chat = mini
    golden = json.loads((MINI / f"{trace}.json").read_text())
    meta, evals = golden["meta"], iter(golden["evals"])
    training_set, test_set = (
        first_pass(model, meta["layer"], [chat.encode_pair(p) for p in read_pairs(MINI / f)])
        for f in ("train.csv", "test.csv")
    )
    recipe = replace(
        PRESETS["official"],
        beta=meta["beta"],
        lr=meta["lr"],
        warmup_steps=meta["warmup_steps"],
        schedule_epochs=meta["num_train_epochs"],
    )
    assert recipe.weight_decay == meta["weight_decay"] == 0
    assert recipe.clip_norm == meta["max_grad_norm"] and recipe.batch_size == meta["batch"]
    batches = [(step["idx"], step["d"]) for step in golden["steps"]]
    run = train(model, meta["layer"], training_set, test_set, recipe, batches=batches)
    for ours, theirs in zip(run, golden["steps"], strict=True):
        assert ours.step == theirs["step"] and ours.lr == pytest.approx(theirs["lr"], abs=1e-12)
        logps = torch.tensor([theirs["pc"], theirs["pr"]]).T
        assert (ours.logps - logps).abs().max() <= logp_tolerance
        ref_logps = torch.stack([training_set[i].ref_logps for i in theirs["idx"]])
        expected = torch.tensor([theirs["rc"], theirs["rr"]]).T
        assert (ref_logps - expected).abs().max() <= logp_tolerance
        assert abs(ours.loss - theirs["loss"]) <= loss_tolerance
        assert ours.grad_norm == pytest.approx(theirs["gnorm"], rel=1e-4)
        assert (ours.v - torch.tensor(theirs["vec"])).abs().max() <= 1e-5
        if ours.held_out:
            for d in (1, -1):
                expected = next(evals)
                assert expected["after_step"] == ours.step and expected["d"] == d
                assert abs(ours.held_out[d]["loss"] - expected["mean_loss"]) <= loss_tolerance
    assert ours.step == steps and next(evals, None) is None


# ---- the objective


def references(pairs):
    return torch.stack([pair.ref_logps for pair in pairs])


def losses_of(model, pairs, v, d, beta=0.1):
    return bipo_loss(steered_logps(model, 1, v, d, pairs), references(pairs), d, beta)[0]


def gradient(model, pairs, v, d, beta=0.1):
    """(losses, gradient of their mean with respect to v)."""
    v = v.clone().requires_grad_()
    losses = losses_of(model, pairs, v, d, beta)
    losses.mean().backward()
    return losses.detach(), v.grad


def test_loss_by_hand():
    logps = torch.tensor([[-10.0, -12.0], [-5.0, -5.0]])
    ref_logps = torch.tensor([[-11.0, -11.0], [-5.0, -7.0]])
    losses, margin = bipo_loss(logps, ref_logps, -1, 0.5)
    assert margin.tolist() == [2.0, -2.0]
    assert torch.allclose(losses, torch.tensor([math.log1p(math.e), math.log1p(1 / math.e)]))


def test_log_probs_are_those_of_single_unpacked_sequences(mini, mini_pairs, vector):
    model, _ = mini
    packed = steered_logps(model, 1, vector, -1, mini_pairs)
    for pair, row in zip(mini_pairs, packed, strict=True):
        for response, logp in zip((pair.ids.chosen, pair.ids.rejected), row, strict=True):
            tokens = torch.tensor([pair.ids.prompt + response])
            logps = model(tokens, steer={1: -vector}).log_softmax(-1)[0, :-1]
            logps = logps.gather(-1, tokens[0, 1:, None])[:, 0]
            assert abs(logps[len(pair.ids.prompt) - 1 :].sum() - logp) <= 1e-3


def test_log_probs_are_steered_by_add_vector_alone(mini, mini_pairs, vector, monkeypatch):
    model, _ = mini
    calls = []

    def record(h, v):
        calls.append(v)
        return h

    monkeypatch.setattr(bipo, "add_vector", record)
    for d in (1, -1):
        unsteered = steered_logps(model, 1, vector, d, mini_pairs)
        assert (unsteered - references(mini_pairs)).abs().max() <= 1e-3
        assert torch.equal(calls.pop(), d * vector) and not calls


def test_training_steers_by_add_vector_alone(mini, mini_pairs, monkeypatch):
    """Without it nothing is learnt: v gets no gradient."""
    model, _ = mini
    monkeypatch.setattr(bipo, "add_vector", lambda h, v: h + 0 * v)
    *_, last = train(model, 1, mini_pairs, mini_pairs, RECIPE)
    assert last.v.norm() == 0 and last.loss == pytest.approx(math.log(2), abs=1e-5)
    assert last.held_out[1]["margin"] == pytest.approx(0, abs=1e-3)


def test_layers_above_can_be_steered_too(mini, mini_pairs, vector):
    """Training does not use this, measuring several vectors does."""
    model, _ = mini
    pair = mini_pairs[0]
    batch = pack([pair.ids])
    (chosen, _) = response_logps(model, 1, pair.h[None], batch, {2: 9 * vector})[0]
    tokens, start = torch.tensor([pair.ids.prompt + pair.ids.chosen]), len(pair.ids.prompt)
    logps = model(tokens, steer={2: 9 * vector}).log_softmax(-1)[0, start - 1 : -1]
    assert abs(logps.gather(-1, tokens[0, start:, None]).sum() - chosen) <= 1e-3
    assert abs(chosen - pair.ref_logps[0]) > 0.1


def test_at_zero_the_loss_is_ln_2_and_d_does_not_matter(mini, mini_pairs):
    model, _ = mini
    zero = torch.zeros(32)
    up, grad_up = gradient(model, mini_pairs, zero, 1)
    down, grad_down = gradient(model, mini_pairs, zero, -1)
    assert (up - math.log(2)).abs().max() <= 1e-5 and (down - math.log(2)).abs().max() <= 1e-5
    assert torch.allclose(grad_up, grad_down, rtol=1e-4, atol=1e-6)
    assert grad_up.norm() > 0.1


def test_flipping_d_and_v_is_swapping_the_responses(mini, mini_pairs, vector):
    model, _ = mini
    swapped = [PairIds(ids.prompt, ids.rejected, ids.chosen) for ids, _, _ in mini_pairs]
    swapped = first_pass(model, 1, swapped)
    losses, _ = gradient(model, mini_pairs, vector, 1)
    mirrored, _ = gradient(model, swapped, -vector, -1)
    assert torch.allclose(losses, mirrored, rtol=1e-4)


def test_vector_times_coefficient(mini, mini_pairs, vector):
    """Four times v is v four times as strong; no strength and no vector are the same, and the
    reference."""
    model, _ = mini

    def logps(v, d):
        return steered_logps(model, 1, v, d, mini_pairs)

    assert torch.equal(logps(4 * vector, 1), logps(vector, 4))
    nothing = logps(vector, 0)
    assert torch.equal(nothing, logps(vector - vector, 3))
    assert (nothing - references(mini_pairs)).abs().max() <= 1e-3
    assert (logps(vector, 1) - references(mini_pairs)).abs().max() > 1


# ---- its gradient


@pytest.fixture(scope="module")
def fp64():
    """golden/mini in fp64 and four of its pairs after the first pass in fp64."""
    from data import open_chat

    model = load(MINI, dtype=torch.float64)
    chat = open_chat(MINI, model.config)
    ids = [chat.encode_pair(pair) for pair in read_pairs(MINI / "train.csv")[:4]]
    return model, first_pass(model, 1, ids)


def test_first_pass_in_fp64_is_in_fp64(fp64):
    _, pairs = fp64
    assert {pair.h.dtype for pair in pairs} == {torch.float64}
    assert {pair.ref_logps.dtype for pair in pairs} == {torch.float64}


@pytest.mark.parametrize("d", [1, -1])
def test_gradient_by_finite_differences(fp64, vector, d):
    model, pairs = fp64
    v, step = 0.1 * vector.double(), 1e-5
    losses, grad = gradient(model, pairs, v, d)
    assert losses.dtype == grad.dtype == torch.float64
    by_differences = torch.empty_like(grad)
    with torch.no_grad():
        for i, direction in enumerate(torch.eye(32, dtype=torch.float64)):
            above = losses_of(model, pairs, v + step * direction, d).mean()
            below = losses_of(model, pairs, v - step * direction, d).mean()
            by_differences[i] = (above - below) / (2 * step)
    assert grad.abs().max() > 0.01
    assert (by_differences - grad).abs().max() <= 1e-8 * grad.abs().max()


# ---- the first pass


def test_first_pass_in_any_grouping_is_the_plain_pass(mini, mini_pairs, monkeypatch):
    model, _ = mini
    monkeypatch.setattr(bipo, "MAX_TOKENS", 1)
    alone = first_pass(model, 1, [pair.ids for pair in mini_pairs])
    for one, grouped in zip(alone, mini_pairs, strict=True):
        assert one.ids == grouped.ids
        assert (one.h - grouped.h).abs().max() <= 1e-5
        assert (one.ref_logps - grouped.ref_logps).abs().max() <= 1e-3


def test_first_pass_caches_the_stream_after_the_layer(mini, mini_pairs):
    model, _ = mini
    for pair in mini_pairs:
        tokens = torch.tensor([pair.ids.prompt + pair.ids.chosen])
        h = model.blocks(model.embed(tokens), 0, 2)[0]
        assert pair.h.shape == (length(pair.ids), 32)
        assert (pair.h[: len(h)] - h).abs().max() <= 1e-4


def test_first_pass_at_layer_minus_one_caches_the_embedding(mini, mini_pairs):
    model, _ = mini
    embedded = first_pass(model, -1, [pair.ids for pair in mini_pairs])
    for before, after in zip(embedded, mini_pairs, strict=True):
        tokens = torch.tensor(sum(before.ids, []))
        assert torch.equal(before.h, model.embed(tokens))
        assert (before.ref_logps - after.ref_logps).abs().max() <= 1e-3


def in_memory(model):
    return {name for name, weight in model.named_parameters() if not weight.is_meta}


@pytest.mark.parametrize("layer", [-1, 1, 3])
def test_first_pass_of_a_streamed_model_is_bitwise_that_of_a_whole_one(mini, mini_pairs, layer):
    ids = [pair.ids for pair in mini_pairs]
    checkpoint = Checkpoint(MINI)
    checkpoint.read(layer + 1, 4)
    streamed = first_pass(checkpoint.model, layer, ids, checkpoint.hold)
    whole = first_pass(mini[0], layer, ids)
    for ours, expected in zip(streamed, whole, strict=True):
        assert torch.equal(ours.h, expected.h)
        assert torch.equal(ours.ref_logps, expected.ref_logps)


def test_first_pass_holds_one_lower_block_at_a_time(mini_pairs):
    checkpoint = Checkpoint(MINI)
    checkpoint.read(2, 4)
    upper, held = in_memory(checkpoint.model), []

    @contextmanager
    def look(i):
        assert in_memory(checkpoint.model) == upper
        with checkpoint.hold(i):
            held.append(in_memory(checkpoint.model) - upper)
            yield

    first_pass(checkpoint.model, 1, [pair.ids for pair in mini_pairs], look)
    prefixes = [{name[:8] for name in names} for names in held]
    assert prefixes == [{"tok_embe"}, {"layers.0"}, {"layers.1"}]
    assert in_memory(checkpoint.model) == upper


def test_a_prompt_may_have_any_number_of_responses(mini, mini_pairs):
    model, _ = mini
    a, b = mini_pairs[0], mini_pairs[1]
    several = [(*a.ids, a.ids.chosen), (*b.ids, b.ids.chosen)]
    for found, pair in zip(first_pass(model, 1, several), (a, b), strict=True):
        expected = pair.ref_logps[[0, 1, 0]]
        assert (found.ref_logps - expected).abs().max() <= 1e-3
    (one,) = first_pass(model, 1, [(a.ids.prompt, a.ids.rejected)])
    assert (one.ref_logps - a.ref_logps[1:]).abs().max() <= 1e-3


def test_first_pass_reports_its_progress(mini, mini_pairs, monkeypatch):
    model, _ = mini
    calls = []
    monkeypatch.setattr(bipo, "MAX_TOKENS", 1)
    ids = [pair.ids for pair in mini_pairs[:2]]
    first_pass(model, 1, ids, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]  # two blocks, the reference; two pairs


def test_parts_hold_as_many_tokens_as_allowed_or_one_pair():
    def cut(*lengths):
        ids = [PairIds([1], [2] * (n - 2), [3]) for n in lengths]
        return [lengths[part] for part in bipo.parts(ids)]

    assert cut(1000, 24, 4, 3000, 2000, 5, 5) == [(1000, 24), (4,), (3000,), (2000,), (5, 5)]
    assert cut(7) == [(7,)]


# ---- the recipe


def test_presets():
    paper, official = PRESETS["paper"], PRESETS["official"]
    assert (paper.beta, paper.lr, paper.batch_size, paper.epochs) == (0.1, 5e-4, 4, 20)
    assert (paper.weight_decay, paper.schedule_epochs, paper.warmup_steps) == (0.05, 0, 100)
    changed = {"weight_decay": 0.0, "schedule_epochs": 100}
    assert asdict(official) == asdict(paper) | changed


@pytest.mark.parametrize(
    "wrong",
    [
        dict(epochs=0),
        dict(batch_size=0),
        dict(lr=-1.0),
        dict(beta=math.nan),
        dict(beta=0.0),
        dict(clip_norm=math.inf),
    ],
)
def test_impossible_recipes(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_schedule():
    rates = [lr_at(k, 2.0, 4, 10) for k in range(12)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx(1.0) and rates[10:] == [0.0, 0.0]
    assert all(a > b for a, b in zip(rates[4:11], rates[5:11], strict=False))
    assert lr_at(0, 2.0, 0, 10) == 2.0


def test_every_epoch_has_each_pair_once_in_a_new_order():
    steps = list(draw_batches(11, Recipe(epochs=50, batch_size=4), seed=0))
    assert [len(rows) for rows, _ in steps[:3]] == [4, 4, 3] and len(steps) == 150
    for i in range(0, 150, 3):
        assert sorted(sum((rows for rows, _ in steps[i : i + 3]), [])) == list(range(11))
    assert steps[0][0] != steps[3][0]


def test_both_directions_are_drawn_equally_often():
    draws = [d for _, d in draw_batches(11, Recipe(epochs=50), seed=0)]
    assert set(draws) == {-1, 1} and 50 < draws.count(1) < 100


def test_the_seed_decides_order_and_directions():
    recipe = Recipe(epochs=50)
    steps = list(draw_batches(11, recipe, seed=0))
    assert steps == list(draw_batches(11, recipe, seed=0)) != list(draw_batches(11, recipe, seed=1))


def test_the_method_positive_draws_d_1_alone_in_the_order_of_bipo():
    bipo_steps, positive_steps = (
        list(draw_batches(11, Recipe(), 0, DIRECTIONS[method])) for method in ("bipo", "positive")
    )
    assert {d for _, d in positive_steps} == {1}
    assert [rows for rows, _ in positive_steps] == [rows for rows, _ in bipo_steps]


@pytest.mark.parametrize("setting", [f.name for f in fields(Recipe)])
def test_every_setting_changes_the_vector(mini, mini_pairs, setting):
    model, _ = mini
    base = Recipe(lr=0.02, warmup_steps=2, epochs=2, clip_norm=0.5)
    other = dict(
        beta=0.2, lr=0.01, batch_size=3, weight_decay=0.5, warmup_steps=0, epochs=3,
        schedule_epochs=9, clip_norm=0.01,
    )[setting]  # fmt: skip
    a, b = (
        list(train(model, 1, mini_pairs, mini_pairs[:2], recipe))[-1].v
        for recipe in (base, replace(base, **{setting: other}))
    )
    assert (a - b).abs().max() > 1e-6


# ---- training

RECIPE = Recipe(lr=0.02, warmup_steps=5, epochs=8, weight_decay=0.0)


def test_loss_falls_and_both_directions_are_learnt(mini, mini_pairs):
    model, _ = mini
    *_, last = train(model, 1, mini_pairs, mini_pairs, RECIPE)
    for d in (1, -1):
        assert last.held_out[d]["loss"] < 0.6
        assert d * last.held_out[d]["margin"] > 2 and last.held_out[d]["accuracy"] > 0.9


def test_weights_are_frozen_and_only_v_learns(mini, mini_pairs):
    model, _ = mini
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    list(train(model, 1, mini_pairs, mini_pairs[:2], Recipe(epochs=1)))
    for name, weight in model.named_parameters():
        assert not weight.requires_grad and weight.grad is None
        assert torch.equal(weight, before[name])


def test_same_seed_twice_is_bitwise_the_same(mini, mini_pairs):
    model, _ = mini

    def last(seed):
        recipe = replace(RECIPE, epochs=2)
        return list(train(model, 1, mini_pairs, mini_pairs[:2], recipe, seed))[-1].v

    assert torch.equal(last(0), last(0)) and not torch.equal(last(0), last(1))


def test_each_step_says_what_it_did(mini, mini_pairs):
    model, _ = mini
    steps = list(train(model, 1, mini_pairs, mini_pairs[:2], replace(RECIPE, epochs=2), seed=3))
    expected = list(draw_batches(11, replace(RECIPE, epochs=2), seed=3))
    assert [(step.rows, step.d) for step in steps] == expected
    assert [(step.step, step.epoch) for step in steps] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2),
    ]  # fmt: skip
    assert [step.step for step in steps if step.held_out] == [3, 6]
    assert [step.lr for step in steps] == [lr_at(k, 0.02, 5, 6) for k in range(6)]


def test_a_step_is_the_gradient_of_its_batch_with_its_d(mini, mini_pairs):
    model, _ = mini
    steps = train(model, 1, mini_pairs, [], RECIPE)
    v = torch.zeros(32)
    for _ in range(5):
        step = next(steps)
        batch = [mini_pairs[i] for i in step.rows]
        losses, grad = gradient(model, batch, v, step.d)
        assert step.loss == pytest.approx(losses.mean().item(), abs=1e-6)
        assert step.grad_norm == pytest.approx(grad.norm().item(), rel=1e-4)
        gain = step.logps - references(batch)
        assert step.margin == pytest.approx((gain[:, 0] - gain[:, 1]).mean().item(), abs=1e-4)
        v = step.v


def test_evaluation_by_hand(mini, mini_pairs, vector):
    model, _ = mini
    report = evaluate(model, 1, vector, mini_pairs, 0.1)
    for d in (1, -1):
        gain = steered_logps(model, 1, vector, d, mini_pairs) - references(mini_pairs)
        margin = gain[:, 0] - gain[:, 1]
        assert report[d]["margin"] == pytest.approx(margin.mean().item(), abs=1e-3)
        assert report[d]["accuracy"] == pytest.approx(((margin > 0) == (d > 0)).float().mean())
        loss = torch.log1p(torch.exp(-d * 0.1 * margin)).mean().item()
        assert report[d]["loss"] == pytest.approx(loss, abs=1e-4)


def test_long_batches_run_in_parts(mini, mini_pairs, monkeypatch):
    model, _ = mini
    *_, whole = train(model, 1, mini_pairs, mini_pairs, RECIPE)
    sizes = []

    def record(ids, *args):
        sizes.append(len(ids))
        return pack(ids, *args)

    monkeypatch.setattr(bipo, "pack", record)
    monkeypatch.setattr(bipo, "MAX_TOKENS", 2 * max(length(pair.ids) for pair in mini_pairs))
    *_, in_parts = train(model, 1, mini_pairs, mini_pairs, RECIPE)
    assert 2 in sizes and max(sizes) <= 3
    assert (in_parts.v - whole.v).abs().max() <= 1e-4 * whole.v.norm()
    assert in_parts.loss == pytest.approx(whole.loss, rel=1e-3)
    assert torch.allclose(in_parts.logps, whole.logps, atol=1e-2)
    assert in_parts.held_out[1]["loss"] == pytest.approx(whole.held_out[1]["loss"], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(mini, mini_pairs):
    model, _ = mini
    broken = [pair._replace(h=pair.h * math.nan) for pair in mini_pairs]
    with pytest.raises(ValueError, match="step 1, pairs .*: loss nan"):
        next(train(model, 1, broken, mini_pairs, RECIPE))
    with pytest.raises(ValueError, match="held-out loss nan at d [+]1"):
        list(train(model, 1, mini_pairs, broken, RECIPE))


def test_bf16_weights_train_an_fp32_vector(mini_pairs):
    model = load(MINI, dtype=torch.bfloat16)
    pairs = first_pass(model, 1, [pair.ids for pair in mini_pairs])
    assert pairs[0].h.dtype == torch.bfloat16 and pairs[0].ref_logps.dtype == torch.float32
    *_, last = train(model, 1, pairs, pairs, RECIPE)
    assert last.v.dtype == last.logps.dtype == torch.float32
    assert last.held_out[1]["loss"] < 0.6 and last.held_out[-1]["loss"] < 0.6
    assert not torch.equal(last.v, last.v.bfloat16().float())
