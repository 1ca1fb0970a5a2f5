import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch
from conftest import MINI, ROOT, assert_one_line, jsonl, run_cli

import bipo
import llama
from bipo import (
    PRESETS,
    Recipe,
    bipo_loss,
    draw_batches,
    evaluate,
    first_pass,
    lr_at,
    score,
    steered_logps,
    train,
)
from data import Pair, letter_pairs, load_vector, open_chat, read_pairs, with_options
from llama import length, load

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


def gradient(model, pairs, v, d, beta=0.1):
    v = v.clone().requires_grad_()
    ref_logps = torch.stack([pair.ref_logps for pair in pairs])
    losses, _ = bipo_loss(steered_logps(model, 1, v, d, pairs), ref_logps, d, beta)
    losses.mean().backward()
    return losses.detach(), v.grad


def test_log_probs_are_those_of_single_unpacked_sequences(mini, mini_pairs, vector):
    model, _ = mini
    packed = steered_logps(model, 1, vector, -1, mini_pairs)
    for pair, row in zip(mini_pairs, packed, strict=True):
        for response, logp in zip((pair.ids.chosen, pair.ids.rejected), row, strict=True):
            tokens = torch.tensor([pair.ids.prompt + response])
            logps = model(tokens, steer={1: -vector}).log_softmax(-1)[0, :-1]
            logps = logps.gather(-1, tokens[0, 1:, None])[:, 0]
            assert abs(logps[len(pair.ids.prompt) - 1 :].sum() - logp) <= 1e-3


def test_first_pass_in_any_grouping_is_the_plain_pass(mini, mini_pairs, monkeypatch):
    model, _ = mini
    monkeypatch.setattr(bipo, "MAX_TOKENS", 1)
    alone = first_pass(model, 1, [pair.ids for pair in mini_pairs])
    for one, grouped in zip(alone, mini_pairs, strict=True):
        assert (one.h - grouped.h).abs().max() <= 1e-5
        assert (one.ref_logps - grouped.ref_logps).abs().max() <= 1e-3


def test_loss_by_hand():
    logps = torch.tensor([[-10.0, -12.0], [-5.0, -5.0]])
    ref_logps = torch.tensor([[-11.0, -11.0], [-5.0, -7.0]])
    losses, margin = bipo_loss(logps, ref_logps, -1, 0.5)
    assert margin.tolist() == [2.0, -2.0]
    assert torch.allclose(losses, torch.tensor([math.log1p(math.e), math.log1p(1 / math.e)]))


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
    swapped = [
        pair._replace(
            ids=pair.ids._replace(chosen=pair.ids.rejected, rejected=pair.ids.chosen),
        ).ids
        for pair in mini_pairs
    ]
    swapped = first_pass(model, 1, swapped)
    losses, _ = gradient(model, mini_pairs, vector, 1)
    mirrored, _ = gradient(model, swapped, -vector, -1)
    assert torch.allclose(losses, mirrored, rtol=1e-4)


def test_gradient_by_finite_differences(mini_pairs, vector):
    model = load(MINI, dtype=torch.float64)
    pairs = first_pass(model, 1, [pair.ids for pair in mini_pairs[:4]])
    vector = 0.1 * vector.double()
    _, grad = gradient(model, pairs, vector, -1)
    for i in (0, 7, 31):
        step = torch.zeros(32, dtype=torch.float64)
        step[i] = 1e-3
        above, below = (gradient(model, pairs, vector + s, -1)[0].mean() for s in (step, -step))
        # the head's logits and the norms are fp32 in any model, which limits the agreement
        assert ((above - below) / 2e-3 - grad[i]).abs() <= 1e-2 * grad.abs().max()


def test_coefficient_algebra(mini, mini_pairs, vector):
    model, _ = mini
    assert torch.equal(
        score(model, 1, 4 * vector, 1, mini_pairs), score(model, 1, vector, 4, mini_pairs)
    )
    nothing = score(model, 1, vector, 0, mini_pairs)
    assert torch.equal(nothing, score(model, 1, vector - vector, 3, mini_pairs))
    ref_logps = torch.stack([pair.ref_logps for pair in mini_pairs])
    assert (nothing - ref_logps).abs().max() <= 1e-3
    assert (score(model, 1, vector, 1, mini_pairs) - ref_logps).abs().max() > 1


def test_weights_are_frozen_and_only_v_learns(mini, mini_pairs):
    model, _ = mini
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    list(train(model, 1, mini_pairs, mini_pairs[:2], Recipe(epochs=1)))
    for name, weight in model.named_parameters():
        assert not weight.requires_grad and weight.grad is None
        assert torch.equal(weight, before[name])


# ---- schedule, order, loop


def test_schedule():
    rates = [lr_at(k, 2.0, 4, 10) for k in range(12)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx(1.0) and rates[10:] == [0.0, 0.0]
    assert all(a > b for a, b in zip(rates[4:11], rates[5:11], strict=False))
    assert lr_at(0, 2.0, 0, 10) == 2.0


def test_order_and_draws():
    recipe = Recipe(epochs=50, batch_size=4)
    steps = list(draw_batches(11, recipe, seed=0))
    assert [len(rows) for rows, _ in steps[:3]] == [4, 4, 3] and len(steps) == 150
    for i in range(0, 150, 3):
        assert sorted(sum((rows for rows, _ in steps[i : i + 3]), [])) == list(range(11))
    assert steps[0][0] != steps[3][0]
    assert 50 < sum(d == 1 for _, d in steps) < 100 and {d for _, d in steps} == {-1, 1}
    assert steps == list(draw_batches(11, recipe, seed=0)) != list(draw_batches(11, recipe, seed=1))


RECIPE = Recipe(lr=0.02, warmup_steps=5, epochs=8, weight_decay=0.0)


def test_same_seed_twice_is_bitwise_the_same(mini, mini_pairs):
    model, _ = mini

    def last(seed):
        return list(train(model, 1, mini_pairs, mini_pairs[:2], RECIPE, seed))[-1].v

    assert torch.equal(last(0), last(0)) and not torch.equal(last(0), last(1))


def test_loss_falls_and_both_directions_are_learnt(mini, mini_pairs):
    model, _ = mini
    *_, last = train(model, 1, mini_pairs, mini_pairs, RECIPE)
    for d in (1, -1):
        assert last.held_out[d]["loss"] < 0.6
        assert d * last.held_out[d]["margin"] > 2 and last.held_out[d]["accuracy"] > 0.9


def test_evaluation_by_hand(mini, mini_pairs, vector):
    model, _ = mini
    report = evaluate(model, 1, vector, mini_pairs, 0.1)
    ref_logps = torch.stack([pair.ref_logps for pair in mini_pairs])
    for d in (1, -1):
        gain = steered_logps(model, 1, vector, d, mini_pairs) - ref_logps
        margin = gain[:, 0] - gain[:, 1]
        assert report[d]["margin"] == pytest.approx(margin.mean().item(), abs=1e-3)
        assert report[d]["accuracy"] == pytest.approx(((margin > 0) == (d > 0)).float().mean())
        loss = torch.log1p(torch.exp(-d * 0.1 * margin)).mean().item()
        assert report[d]["loss"] == pytest.approx(loss, abs=1e-4)


def test_long_batches_run_in_parts(mini, mini_pairs, monkeypatch):
    model, _ = mini
    *_, whole = train(model, 1, mini_pairs, mini_pairs, RECIPE)
    sizes, pack = [], bipo.pack
    monkeypatch.setattr(bipo, "pack", lambda ids, *a: sizes.append(len(ids)) or pack(ids, *a))
    monkeypatch.setattr(bipo, "MAX_TOKENS", 2 * max(length(pair.ids) for pair in mini_pairs))
    *_, in_parts = train(model, 1, mini_pairs, mini_pairs, RECIPE)
    assert 2 in sizes and max(sizes) <= 3
    assert (in_parts.v - whole.v).abs().max() <= 1e-4 * whole.v.norm()
    assert in_parts.loss == pytest.approx(whole.loss, rel=1e-3)
    assert torch.allclose(in_parts.logps, whole.logps, atol=1e-2)
    assert in_parts.held_out[1]["loss"] == pytest.approx(whole.held_out[1]["loss"], rel=1e-3)


def test_parts():
    def cut(*lengths):
        ids = [bipo.PairIds([1], [2] * (n - 2), [3]) for n in lengths]
        return [lengths[part] for part in bipo.parts(ids)]

    assert cut(1000, 24, 4, 3000, 2000, 5, 5) == [(1000, 24), (4,), (3000,), (2000,), (5, 5)]
    assert cut(7) == [(7,)]


@pytest.mark.parametrize("flag", [f.name for f in fields(Recipe)])
def test_every_setting_changes_the_vector(mini, mini_pairs, flag):
    model, _ = mini
    base = Recipe(lr=0.02, warmup_steps=2, epochs=2, clip_norm=0.5)
    other = dict(
        beta=0.2, lr=0.01, batch_size=3, weight_decay=0.5, warmup_steps=0, epochs=3,
        schedule_epochs=9, clip_norm=0.01,
    )[flag]  # fmt: skip
    a, b = (
        list(train(model, 1, mini_pairs, mini_pairs[:2], recipe))[-1].v
        for recipe in (base, replace(base, **{flag: other}))
    )
    assert (a - b).abs().max() > 1e-6


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


def test_a_loss_that_is_not_finite_stops_the_run(mini, mini_pairs):
    model, _ = mini
    broken = [pair._replace(h=pair.h * math.nan) for pair in mini_pairs]
    with pytest.raises(ValueError, match="step 1: loss nan"):
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


# ---- the command line

TRAIN = ("bipo.py", "--model", MINI, "--data", MINI / "train.csv", "--layer", 1)


def test_command_line(tmp_path):
    out = tmp_path / "run"
    args = ["--val", MINI / "test.csv", "--epochs", 3, "--lr", 0.02, "--warmup-steps", 2]
    code, stdout, stderr = run_cli(*TRAIN, *args, "--out", out, "--preset", "official")
    assert code == 0, stderr
    assert sorted(file.name for file in out.iterdir()) == [
        "epoch_01.safetensors",
        "epoch_02.safetensors",
        "epoch_03.safetensors",
        "log.jsonl",
        "vector.safetensors",
    ]
    vectors, metadata = load_vector(out)
    assert list(vectors) == [1] and vectors[1].norm() > 0.1
    assert torch.equal(vectors[1], load_vector(out / "epoch_03.safetensors")[0][1])
    assert not torch.equal(vectors[1], load_vector(out / "epoch_02.safetensors")[0][1])
    recipe = asdict(PRESETS["official"]) | {"epochs": 3, "lr": 0.02, "warmup_steps": 2}
    assert json.loads(metadata["recipe"]) == recipe
    assert metadata.items() >= {
        "base_model": "mini", "layer": "1", "n_layers": "4", "template": "llama-2", "seed": "0",
        "system": "You are a helpful, honest and concise assistant.", "epoch": "3",
        "preset": "official", "dtype": "float32", "device": "cpu",
    }.items()  # fmt: skip

    settings, *steps = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert json.loads(settings["recipe"]) == recipe and "held out 3" in settings["data"]
    assert [row["step"] for row in steps] == list(range(1, 10))
    assert {row["d"] for row in steps} == {-1, 1} and steps[0]["lr"] == 0
    assert [row["step"] for row in steps if row["held_out"]] == [3, 6, 9]
    assert steps[-1]["v_norm"] == pytest.approx(vectors[1].norm().item())
    assert "prompts are" not in stdout
    assert "9/9" in stdout and stdout.count("held out  d +1") == 3 and "saved" in stdout

    # the same by the functions, on a model that is in memory as a whole: bitwise
    model = load(MINI)
    chat = open_chat(MINI, model.config)
    sets = (
        first_pass(model, 1, [chat.encode_pair(p) for p in read_pairs(MINI / name)])
        for name in ("train.csv", "test.csv")
    )
    *_, last = train(model, 1, *sets, Recipe(**recipe))
    assert torch.equal(last.v, vectors[1])


def test_command_line_with_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    jsonl(tmp_path / "pairs.jsonl", *pairs)
    bipo.main(["--model", str(MINI), "--data", "pairs.jsonl", "--layer", "1"])
    printed = capsys.readouterr().out
    assert "all 60 steps are warm-up" in printed and "are trained on" not in printed
    assert "10 pairs of pairs.jsonl, held out 2 split off by prompt" in printed
    assert printed.count("held out  d +1") == 20  # epochs
    vectors, metadata = load_vector(tmp_path / "runs" / "pairs-layer1")
    assert json.loads(metadata["recipe"]) == asdict(PRESETS["paper"]) and list(vectors) == [1]


def test_training_holds_only_the_blocks_above_the_layer(tmp_path, monkeypatch):
    kept, names, train, read_tensor = [], [], bipo.train, llama.read_tensor

    def look(model, *args):
        kept.append({name for name, weight in model.named_parameters() if not weight.is_meta})
        return train(model, *args)

    monkeypatch.setattr(bipo, "train", look)
    monkeypatch.setattr(
        llama, "read_tensor", lambda f, *args: names.append(args[1]) or read_tensor(f, *args)
    )
    every = set(load(MINI).state_dict())
    names.clear()
    bipo.main([str(x) for x in (*TRAIN[1:], "--epochs", 1, "--out", tmp_path)])
    below = ("tok_embeddings.", "layers.0.", "layers.1.")
    assert kept == [{name for name in every if not name.startswith(below)}]
    mapped, read = names[: len(every)], names[len(every) :]  # at first to see the shapes
    assert sorted(mapped) == sorted(read) and len(read) == len(set(read)) == len(every)


def test_first_pass_in_a_file_gives_the_same_vector(tmp_path, capsys):
    args = [str(x) for x in (*TRAIN[1:], "--epochs", 1, "--out")]
    bipo.main([*args, str(tmp_path / "a")])
    assert "GiB, in memory" in capsys.readouterr().out
    bipo.main([*args, str(tmp_path / "b"), "--cache-gib", "0"])
    assert f"GiB, in a file in {tmp_path / 'b'}" in capsys.readouterr().out
    settings = json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[0])
    assert "in a file" in settings["first_pass"]
    files = [sorted(file.name for file in (tmp_path / x).iterdir()) for x in "ab"]
    assert files[0] == files[1] == ["epoch_01.safetensors", "log.jsonl", "vector.safetensors"]
    assert torch.equal(*(load_vector(tmp_path / x)[0][1] for x in "ab"))


@pytest.mark.slow
def test_no_room_for_the_first_pass(tmp_path):
    args = [sys.executable, *TRAIN, "--out", tmp_path / "run", "--cache-gib", 0]
    command = "ulimit -f 64; exec " + shlex.join(map(str, args))  # files of at most 64 KiB
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert_one_line(done.returncode, done.stderr, "no room", "--cache-gib", "File too large")
    assert list((tmp_path / "run").iterdir()) == []


def test_out_of_memory_is_one_line(tmp_path, fails, monkeypatch):
    def fail(error):
        def read(*args):
            raise error

        monkeypatch.setattr(bipo.Checkpoint, "read", read)
        return [*TRAIN[1:], "--out", tmp_path / "run"]

    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee ...")
    fails(bipo.main, fail(gpu), "out of memory", "--dtype", "2 GiB")
    fails(bipo.main, fail(MemoryError()), "out of memory", "--dtype")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        bipo.main([str(x) for x in fail(RuntimeError("a fault of ours"))])


def test_free_memory(tmp_path):
    assert bipo.free_memory(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    300 kB\nX: 1 kB")
    assert bipo.free_memory(tmp_path) == 300 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert bipo.free_memory(tmp_path) == 300 * 1024
    (group / "memory.max").write_text("5000\n")
    (group / "memory.current").write_text("2000\n")
    assert bipo.free_memory(tmp_path) == 3000


# ---- baselines, drawn pairs, the choice of a layer

SETS = ("--model", MINI, "--data", MINI / "train.csv", "--val", MINI / "test.csv")


def run_main(out, *args):
    """(vectors, metadata, rows of the log) of a run with these arguments on mini."""
    bipo.main([str(x) for x in (*SETS, "--out", out, *args)])
    return *load_vector(out), [*map(json.loads, (out / "log.jsonl").read_text().splitlines())]


def test_letter_pairs(mini):
    _, chat = mini
    pair = Pair("Lead?", "Yes.", "No.", "x:1")
    question, swapped = "Lead?\n\nChoices:\n (A) Yes.\n (B) No.", "Choices:\n (A) No.\n (B) Yes."
    assert with_options("Lead?", ["Yes.", "No."]) == question
    assert with_options("q", "xyz") == "q\n\nChoices:\n (A) x\n (B) y\n (C) z"
    talk = (("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "Lead?"))
    assert with_options(talk, ["Yes.", "No."]) == (*talk[:3], ("user", question))

    def texts(pair):
        return [[chat.tokenizer.decode(x) for x in ids] for ids in letter_pairs(chat, pair, 512)]

    first, second = texts(pair)
    assert first[1:] == ["(A", "(B"] and second[1:] == ["(B", "(A"]
    assert first[0].endswith(f"{question} [/INST]") and swapped in second[0]
    ((prompt, *letters),) = texts(Pair(question, "(B)", "(A)"))
    assert prompt == first[0] and letters == ["(B", "(A"]
    assert chat.eos_id not in sum(sum(map(list, letter_pairs(chat, pair)), []), [])
    for answers in (("(no)", "(A)"), ("(A)", "(no)")):  # of which one is no letter
        lines = "Choices:\n (A) {}\n (B) {}".format(*answers)
        assert lines in texts(Pair("q", *answers))[0][0]
    with pytest.raises(ValueError, match="x:1: .* context is 9"):
        letter_pairs(chat, pair, 9)


@pytest.mark.parametrize("method", ["caa", "freeform", "letters"])
def test_mean_differences_by_hand(mini, tmp_path, capsys, monkeypatch, method):
    model, chat = mini

    def h(ids, start):
        """Mean over the tokens from `start` on of a single sequence, after block 1."""
        return model.blocks(model.embed(torch.tensor([ids])), 0, 2)[0, start:].mean(0)

    differences, flags, pairs = [], ["--method", method], read_pairs(MINI / "train.csv")
    for question, chosen, rejected, _ in pairs:
        if method == "freeform":
            prompt = chat.encode_prompt(question)
            ids = [chat.encode([*chat.pieces(question), f" {x}"]) for x in (chosen, rejected)]
            a, b = (h([*x, chat.eos_id], len(prompt)) for x in ids)
            differences.append(a - b)
            continue
        for texts in ((chosen, rejected), (rejected, chosen)):
            asked = "{}\n\nChoices:\n (A) {}\n (B) {}".format(question, *texts)
            a, b = (h(chat.encode([*chat.pieces(asked), f" ({x}"]), -1) for x in "AB")
            differences.append(a - b if texts[0] == chosen else b - a)
    if method == "letters":  # the same questions, as a file
        keys = "question", "answer_matching_behavior", "answer_not_matching_behavior"
        rows = []
        for pair in pairs:
            for options, answers in ((pair[1:3], "AB"), (pair[2:0:-1], "BA")):
                values = (with_options(pair.prompt, options), *(f" ({x})" for x in answers))
                rows.append(dict(zip(keys, values, strict=True)))
        file = jsonl(tmp_path / "letters.jsonl", *rows)
        flags = ["--method", "caa", "--letters", "--data", file]
    expected = torch.stack(differences).mean(0)
    capsys.readouterr()
    referenced, cached = [], bipo.CachedPair
    with monkeypatch.context() as patch:
        patch.setattr(bipo, "CachedPair", lambda *x: referenced.append(x) or cached(*x))
        vectors, metadata, (settings, row) = run_main(tmp_path / "run", "--layer", 1, *flags)
    assert len(referenced) == 3  # the pairs that are held out
    assert expected.norm() > 0.005 and torch.allclose(vectors[1], expected, atol=1e-6)
    assert metadata["method"] == settings["method"] == flags[1]
    assert not {"epoch", "recipe", "preset"} & metadata.keys()
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert names == ["log.jsonl", "vector.safetensors"]
    printed = capsys.readouterr().out
    assert (
        printed.count("\nheld out  d +1: loss") == 1 and "saved vector.safetensors and" in printed
    )
    held_out = first_pass(model, 1, [chat.encode_pair(x) for x in read_pairs(MINI / "test.csv")])
    report = evaluate(model, 1, expected, held_out, 0.1)
    for d in (1, -1):
        assert row["held_out"][str(d)]["margin"] == pytest.approx(report[d]["margin"], abs=1e-3)
    assert row["v_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


def test_positive_draws_d_1_alone_in_the_order_of_bipo(mini, mini_pairs, tmp_path):
    flags = ["--layer", 1, "--epochs", 2, "--warmup-steps", 0, "--lr", 0.02]
    both, _, (_, *steps) = run_main(tmp_path / "a", *flags)
    vectors, metadata, (_, *positive) = run_main(tmp_path / "b", *flags, "--method", "positive")
    assert [row["rows"] for row in positive] == [row["rows"] for row in steps]
    assert {row["d"] for row in positive} == {1} and {row["d"] for row in steps} == {1, -1}
    assert metadata["method"] == "positive" and metadata["epoch"] == "2"
    batches = [(row["rows"], 1) for row in steps]
    recipe = Recipe(epochs=2, warmup_steps=0, lr=0.02)
    *_, last = train(mini[0], 1, mini_pairs, [], recipe, batches=batches)
    assert torch.allclose(last.v, vectors[1], atol=1e-6)
    assert (both[1] - vectors[1]).norm() > 1e-4
    long = [
        [rows for rows, _ in draw_batches(11, Recipe(), 0, bipo.DIRECTIONS[method])]
        for method in ("bipo", "positive")
    ]
    assert long[0] == long[1]


def test_drawn_pairs():
    pairs = [Pair(f"q{i}", f"yes {i}", f"no {i}") for i in range(2000)]

    def draw(most, noise, seed=0):
        drawn, n_swapped = bipo.draw_pairs(pairs, most, noise, seed)
        number = [int(pair.prompt[1:]) for pair in drawn]
        swapped = {i for i, pair in zip(number, drawn, strict=True) if pair.chosen == f"no {i}"}
        assert n_swapped == len(swapped) and number == sorted(number)
        sides = [("no {0}", "yes {0}") if i in swapped else ("yes {0}", "no {0}") for i in number]
        assert [pair[1:3] for pair in drawn] == [
            (a.format(i), b.format(i)) for i, (a, b) in zip(number, sides, strict=True)
        ]
        return number, swapped

    assert draw(None, 0) == draw(2000, 0) == draw(9999, 0) == ([*range(2000)], set())
    drawn = [draw(most, 0)[0] for most in (1, 7, 20, 2000)]
    assert [len(x) for x in drawn] == [1, 7, 20, 2000] and drawn[1] != [*range(7)]
    assert all(set(a) < set(b) for a, b in zip(drawn, drawn[1:], strict=False))
    noisy = [draw(20, noise) for noise in (0.04, 0.1, 0.5, 1)]
    assert [len(swapped) for _, swapped in noisy] == [1, 2, 10, 20]
    assert all(a < b for (_, a), (_, b) in zip(noisy, noisy[1:], strict=False))
    assert all(kept == drawn[2] for kept, _ in noisy) and noisy[2][1] != set(drawn[2][:10])
    few, many = draw(None, 0.1)[1], draw(None, 0.5)[1]
    assert len(few) == 200 and few < many
    assert draw(7, 0, seed=1)[0] != drawn[1] and draw(20, 0.5, seed=1) != noisy[2]


def test_label_noise_and_max_pairs(tmp_path, capsys):
    flags = ["--layer", 1, "--method", "freeform"]
    clean, _, (_, row) = run_main(tmp_path / "a", *flags)
    noisy, metadata, (_, other) = run_main(tmp_path / "b", *flags, "--label-noise", 1)
    assert torch.allclose(noisy[1], -clean[1], atol=1e-6)
    for d, x in row["held_out"].items():  # whose pairs are as they were
        found = other["held_out"][str(-int(d))]["margin"]
        assert x["margin"] == pytest.approx(found, abs=1e-3) and abs(found) > 0.01
    assert "11 pairs of" in metadata["data"] and "swapped in 11, held out 3" in metadata["data"]
    capsys.readouterr()
    *_, metadata, (settings, _) = run_main(
        tmp_path / "c", *flags, "--label-noise", 0.3, "--max-pairs", 8
    )
    said = f"8 pairs of {MINI / 'train.csv'}, drawn from 11, chosen and rejected swapped in 2, held"
    assert metadata["data"].startswith(said) and settings["data"] == metadata["data"]
    assert f"data        {said}" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "flags"), [("bipo", []), ("positive", ["--cache-gib", 0])])
def test_choosing_a_layer(tmp_path, monkeypatch, capsys, method, flags):
    held, hold, counted = [], llama.Checkpoint.hold, []

    def look(checkpoint, i):
        held.append(i)
        lower = [w for block in checkpoint.model.layers[:i] for w in block.parameters()]
        assert all(w.is_meta for w in lower)
        return hold(checkpoint, i)

    def count(model, layer, *args, reference_pass=bipo.reference_pass):
        counted.append(layer)
        return reference_pass(model, layer, *args)

    common = ["--method", method, "--lr", 0.02]
    with monkeypatch.context() as patch:
        patch.setattr(llama.Checkpoint, "hold", look)
        patch.setattr(bipo, "reference_pass", count)
        args = ["--layer", "3,1,2", "--epochs", 1, *common]
        run_main(tmp_path / "run", *args, *flags)
    printed = capsys.readouterr().out
    chosen = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert [row["layer"] for row in chosen["tried"]] == [1, 2, 3]
    best = {"bipo": 1, "positive": 3}[method]
    assert held == [0, 1, 2, 3, *range(best + 1)] and counted == [1]

    # the table: that of runs of two epochs at one layer; a quarter of the six steps is warm-up
    margins = {}
    for row in chosen["tried"]:
        args = ["--layer", row["layer"], "--epochs", 2, "--warmup-steps", 1, *common]
        *_, (_, *steps) = run_main(tmp_path / f"{row['layer']}", *args)
        assert len(steps) == 6 and row["held_out"] == steps[-1]["held_out"]
        assert row["v_norm"] == steps[-1]["v_norm"]
        margins[row["layer"]] = sum(d * row["held_out"][f"{d}"]["margin"] for d in (1, -1)) / 2
        assert row["margin"] == pytest.approx(margins[row["layer"]])
        end = "  mean margin {margin:+.3f} nats, |v| {v_norm:.3f}\n".format(**row)
        (line,) = re.findall(f"^layer {row['layer']:2}  held out  d .*\n", printed, re.MULTILINE)
        assert line.endswith(end)
    assert chosen["layer"] == best == max(margins, key=margins.get)

    # the run that follows: that at the layer alone, bitwise
    vectors, metadata = load_vector(tmp_path / "run")
    alone, *more = run_main(tmp_path / "plain", "--layer", best, "--epochs", 1, *common)
    assert torch.equal(vectors[best], alone[best]) and metadata == more[0]
    run_main(tmp_path / "run", "--layer", best, "--epochs", 1, *common, "--overwrite")
    assert not (tmp_path / "run" / "layers.json").exists()


def test_layers_by_name():
    def layers(text, n_layers):
        return bipo.parse_layers(argparse.Namespace(layer=text, method="bipo"), n_layers)

    assert layers("13", 32) == layers("13,13", 32) == [13] and layers("15,3", 32) == [3, 15]
    assert layers("auto", 32) == [*range(8, 25, 2)] and layers("auto", 4) == [1, 2, 3]
    assert layers("auto", 80) == [*range(20, 61, 5)]
    assert layers("auto", 2) == [0, 1] and layers("auto", 1) == [0]


def test_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, name in (
        (["--layer", "2, 1,2", "--epochs", 1], "train-layer1-2"),
        (["--layer", "auto", "--epochs", 1, "--method", "positive"], "train-layerauto-positive"),
        (["--layer", "1", "--method", "caa"], "train-layer1-caa"),
    ):
        bipo.main([str(x) for x in (*SETS, *flags)])
        assert list(load_vector(tmp_path / "runs" / name)[0]) != []


@pytest.mark.slow
def test_pairs_of_2048_tokens(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MINI, model)
    fields = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(fields))
    long = [
        {"prompt": f"{i}" + "x" * 1900, "chosen": "a" * 100 + "b" * i, "rejected": "c" * 100}
        for i in range(3)
    ]
    args = ["--model", model, "--data", jsonl(tmp_path / "p.jsonl", *long), "--layer", 1]
    bipo.main([str(x) for x in (*args, "--out", tmp_path / "run", "--epochs", 1)])
    _, *steps = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert [len(step["rows"]) for step in steps] == [2]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def broken(*args, **flags):
    raise ValueError("it broke")


def test_a_finished_run_is_not_overwritten_unasked(tmp_path, fails, monkeypatch):
    args = [str(x) for x in (*TRAIN[1:], "--epochs", 1, "--out", tmp_path)]
    bipo.main(args)
    before = (tmp_path / "vector.safetensors").read_bytes()
    fails(bipo.main, args, str(tmp_path), "--overwrite")
    assert (tmp_path / "vector.safetensors").read_bytes() == before
    (tmp_path / "epoch_07.safetensors").write_bytes(b"of a longer run")
    (tmp_path / "notes.safetensors").write_bytes(b"not of a run")
    (tmp_path / "log.txt").write_bytes(b"neither")
    (tmp_path / "layers.json").write_bytes(b"of a run that tried layers")
    names = {"epoch_01.safetensors", "log.jsonl", "log.txt", "notes.safetensors"}
    names |= {"vector.safetensors"}
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == names | {"epoch_07.safetensors", "layers.json"}
    search = ["--overwrite", "--layer", "1,2"]
    for broke, flags in (  # before there is a vector, and when it cannot be saved
        ("evaluate", ["--overwrite"]),
        ("evaluate", ["--overwrite", "--method", "caa"]),
        ("save_vector", search),
    ):
        given = args[:6] + args[8:] if "caa" in flags else args
        with monkeypatch.context() as patch:
            patch.setattr(bipo, broke, broken)
            fails(bipo.main, [*given, *flags], "it broke")
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    bipo.main([*args, *search])
    assert {file.name for file in tmp_path.iterdir()} == names | {"layers.json"}
    bipo.main([*args, "--overwrite"])
    assert {file.name for file in tmp_path.iterdir()} == names
    bipo.main([*args[:6], *args[8:], "--overwrite", "--method", "caa"])
    assert {file.name for file in tmp_path.iterdir()} == names - {"epoch_01.safetensors"}
    (tmp_path / "vector.safetensors").unlink()
    fails(bipo.main, args, str(tmp_path), "--overwrite")  # for its log


def test_notes_about_the_pairs(tmp_path, capsys):
    pairs = [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in ("", "a", "b")]
    data = jsonl(tmp_path / "p.jsonl", *pairs)
    val = jsonl(
        tmp_path / "v.jsonl", *pairs[1:], {"prompt": "c", "chosen": "yes", "rejected": "no"}
    )
    args = ["--model", MINI, "--data", data, "--val", val, "--layer", 1, "--epochs", 1]
    bipo.main([str(x) for x in (*args, "--out", tmp_path / "run")])
    printed = capsys.readouterr().out
    assert f"1 prompts are empty, the first at {data}:1" in printed
    assert "2 held-out prompts are trained on, for example 'a'" in printed


def test_a_wrong_path_by_subprocess():
    code, out, err = run_cli(*TRAIN[:3], "--data", "none.csv", "--layer", 1)
    assert_one_line(code, err, "none.csv")
    assert out == ""


def test_user_errors(tmp_path, fails):
    def wrong(*parts, **flags):
        flags = {"model": MINI, "data": MINI / "train.csv", "layer": 1, "out": out} | flags
        args = [x for flag, value in flags.items() for x in (f"--{flag}", value)]
        fails(bipo.main, args, *parts)
        assert not out.exists()

    out, a_file, empty = tmp_path / "out", tmp_path / "file", tmp_path / "empty.jsonl"
    a_file.touch()
    empty.touch()
    long = jsonl(tmp_path / "long.jsonl", {"prompt": "x" * 600, "chosen": "a", "rejected": "b"})
    wrong("no model 'nobody/none'", "hf download", model="nobody/none")
    wrong("config.json", model=tmp_path)
    wrong("layer 4", "0..3", layer=4)
    wrong("layer -1", "0..3", layer=-1)
    wrong("--layer 'x'", "10,13,15", "auto", layer="x")
    wrong("layer 7", "0..3", layer="1,7")
    wrong("caa cannot choose a layer", "[1, 2]", layer="1,2", method="caa")
    wrong("freeform cannot choose a layer", layer="auto", method="freeform")
    wrong("caa does not train", "--warmup-steps", **{"warmup-steps": 0}, method="caa")
    wrong("freeform does not train", "--preset", preset="paper", method="freeform")
    wrong("invalid choice: 'mean'", method="mean")
    for wrong_share in (-0.1, 1.1, math.nan):
        wrong("--label-noise from 0 to 1", **{"label-noise": wrong_share})
    wrong("--max-pairs >= 1", **{"max-pairs": 0})
    wrong("none.csv", data=tmp_path / "none.csv")
    wrong("holds no pairs", data=empty)
    wrong("long.jsonl:1", "context is 512", val=long)
    wrong("cannot write", out=a_file / "out")
    wrong("epochs is 0", epochs=0)
    wrong("unrecognized arguments", nonsense=1)
    for device in ("warp", "cpu:x", "cuda:99"):
        wrong(f"--device {device} is not there", "cpu", device=device)


def test_a_checkpoint_that_cannot_be_read(tmp_path, fails):
    broken = tmp_path / "broken"
    shutil.copytree(MINI, broken)
    (broken / "model.safetensors").write_bytes(b"cut")
    args = ["--model", broken, *TRAIN[3:], "--out", tmp_path / "out"]
    fails(bipo.main, args, "cannot read", "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_every_flag_is_read(monkeypatch, tmp_path):
    """Every attribute the parser makes is looked at by the run."""
    read = set()

    class Spy(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    seen = []
    monkeypatch.setattr(bipo, "run", lambda args, run=bipo.run: run(seen.append(args) or spy(args)))

    def spy(args):
        return Spy(**vars(args))

    args = [str(x) for x in (*TRAIN[1:], "--epochs", 1, "--out", tmp_path / "run")]
    bipo.main(args)
    assert set(vars(seen[0])) <= read
