"""One backward pass: g, the vector g / |g|^2, and the layers; bipo.py --method gradient."""

import json
import random
import re

import pytest
import torch
from conftest import MINI, MINI_SETS, TINY, jsonl, run_main
from test_torchrun import forked

import bipo
import eval as evaluation
from bipo import bipo_loss, first_pass, pair_gradients, preference_gradient, steered_logps
from data import load_vector, read_pairs
from llama import load

GRADIENT = ("--method", "gradient")


def preference(model, pairs, v):
    """The mean over pairs of log p(chosen) - log p(rejected) under v at layer 1."""
    logps = steered_logps(model, 1, v, 1, pairs)
    return (logps[:, 0] - logps[:, 1]).mean()


# ---- the function


def test_finite_differences_confirm_the_gradient(mini_pairs):
    model = load(MINI, torch.float64)
    pairs = first_pass(model, 1, [pair.ids for pair in mini_pairs[:3]])
    g = preference_gradient(model, 1, pairs)
    assert g.shape == (32,) and g.dtype == torch.float64
    for i in (0, 7, 31):
        step = torch.zeros(32, dtype=torch.float64)
        step[i] = 1e-5
        difference = preference(model, pairs, step) - preference(model, pairs, -step)
        assert g[i].item() == pytest.approx(difference.item() / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("d", [-1, 1])
def test_at_zero_the_loss_has_the_gradient_minus_half_beta_g_for_both_d(mini, mini_pairs, d):
    model, _ = mini
    v = torch.zeros(32, requires_grad=True)
    ref_logps = torch.stack([pair.ref_logps for pair in mini_pairs])
    losses, _ = bipo_loss(steered_logps(model, 1, v, d, mini_pairs), ref_logps, d, beta=0.1)
    (gradient,) = torch.autograd.grad(losses.mean(), v)
    expected = -0.05 * preference_gradient(model, 1, mini_pairs)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_each_pair_has_its_own_gradient(mini, mini_pairs, monkeypatch):
    """Packed together, in parts or alone: the same, and their mean is g."""
    model, _ = mini
    together = pair_gradients(model, 1, mini_pairs)
    alone = torch.cat([pair_gradients(model, 1, [pair]) for pair in mini_pairs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.mean(0), preference_gradient(model, 1, mini_pairs))
    monkeypatch.setattr(bipo, "MAX_TOKENS", 200)
    torch.testing.assert_close(pair_gradients(model, 1, mini_pairs), together, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_pairs_changes_nothing_but_rounding(mini, mini_pairs):
    g = preference_gradient(mini[0], 1, mini_pairs)
    again = preference_gradient(mini[0], 1, mini_pairs[::-1])
    assert (g - again).norm() < 1e-5 * g.norm()


def test_multiplier_1_is_one_nat_to_first_order(mini, mini_pairs):
    """The mean margin under a small multiplier of g / |g|^2 is that multiplier."""
    model, _ = mini
    g = preference_gradient(model, 1, mini_pairs)
    v = g / g.square().sum()
    margin = preference(model, mini_pairs, 0.01 * v) - preference(model, mini_pairs, -0.01 * v)
    assert margin.item() / 0.02 == pytest.approx(1, abs=0.02)


def test_no_pairs_are_refused(mini):
    with pytest.raises(ValueError, match="no pairs"):
        preference_gradient(mini[0], 1, [])


# ---- the command line


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    out = tmp_path_factory.mktemp("gradient")
    run_main(bipo.main, *MINI_SETS, "--layer", 1, *GRADIENT, "--out", out)
    return out


def test_the_vector_is_g_over_its_square(one_layer, mini, mini_pairs):
    vectors, metadata = load_vector(one_layer)
    g = preference_gradient(mini[0], 1, mini_pairs)
    torch.testing.assert_close(vectors[1], g / g.square().sum(), rtol=1e-4, atol=1e-6)
    assert metadata["method"] == "gradient" and "one nat" in metadata["unit"]
    assert "recipe" not in metadata and "preset" not in metadata
    assert json.loads(metadata["stream_norms"]) == {"1": bipo.stream_norm(mini_pairs)}


def test_what_is_printed(tmp_path, capsys):
    run_main(bipo.main, *MINI_SETS, "--layer", 1, *GRADIENT, "--out", tmp_path)
    printed = capsys.readouterr().out
    for part in ("first pass", "backward pass 11/11", "|g| ", "% of |h|)", "d +1: ", "d -1: "):
        assert part in printed, part
    assert "of the pairs pull in the direction of the others" in printed
    assert f"saved {tmp_path / 'vector.safetensors'}\nnext: python eval.py " in printed


@pytest.mark.parametrize("layers", [["all"], [0, 3]])
def test_several_layers_in_one_pass(tmp_path, mini, mini_pairs, capsys, layers):
    run_main(bipo.main, *MINI_SETS, "--layer", *layers, *GRADIENT, "--out", tmp_path)
    printed = capsys.readouterr().out
    vectors, metadata = load_vector(tmp_path, layer=0)
    assert "alternatives" in metadata and vectors.keys() == {0}
    numbers = range(4) if layers == ["all"] else layers
    ratios = {}
    for layer in numbers:
        (v,) = load_vector(tmp_path, layer)[0].values()
        pairs = first_pass(mini[0], layer, [pair.ids for pair in mini_pairs])
        g = preference_gradient(mini[0], layer, pairs)
        torch.testing.assert_close(v, g / g.square().sum(), rtol=1e-3, atol=1e-5)
        norm = json.loads(metadata["stream_norms"])[str(layer)]
        assert norm == pytest.approx(bipo.stream_norm(pairs), rel=1e-5)
        ratios[layer] = (v.norm() / norm).item()
        assert f"{ratios[layer]:.2%}" in printed
    assert f"layer {min(ratios, key=ratios.get)} has the smallest |v|/|h|" in printed


def test_held_out_numbers_of_the_layers_are_dot_products(tmp_path, mini, capsys):
    run_main(bipo.main, *MINI_SETS, "--layer", 0, 2, *GRADIENT, "--out", tmp_path)
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("    2 "))
    (v,) = load_vector(tmp_path, 2)[0].values()
    model, chat = mini
    ids = [chat.encode_pair(pair) for pair in read_pairs(MINI / "test.csv")]
    margins = pair_gradients(model, 2, first_pass(model, 2, ids)) @ v
    assert row.split()[-2] == f"{margins.mean():+.2f}"
    assert row.split()[-1] == f"{(margins > 0).float().mean():.0%}"


def test_two_processes_give_the_vector_of_one(tmp_path, one_layer):
    for layers in ([1], [1, 2]):
        out = tmp_path / str(layers)
        args = (*MINI_SETS, "--layer", *layers, *GRADIENT, "--out", out)
        codes, printed, err = forked(2, tmp_path, *args)
        assert codes == [0, 0], err
        assert printed.count("saved ") == 1
        v = load_vector(out, 1)[0][1]
        expected = load_vector(one_layer)[0][1]
        assert (v - expected).norm() <= 1e-6 * expected.norm()


def test_random_labels_have_no_common_direction(tmp_path, capsys):
    """Half of the pairs pull with the others; of the true ones, most do."""
    lines = (TINY / "power.train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in random.Random(0).sample(lines, 80)]
    true = jsonl(tmp_path / "true.jsonl", *rows)
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    swapped = jsonl(tmp_path / "swapped.jsonl", *rows)
    shares = []
    for pairs in (swapped, true):
        args = ("--model", TINY, "--data", pairs, "--layer", 3, *GRADIENT)
        run_main(bipo.main, *args, "--out", tmp_path / pairs.stem)
        printed = capsys.readouterr().out
        shares.append(int(re.search(r"(\d+)% of the pairs pull", printed)[1]))
    assert shares[0] < 70 and shares[1] > 95


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--epochs", 3], ["--method gradient does not train", "leave out --epochs"]),
        (["--lr", 0.1, "--preset", "paper"], ["leave out --preset, --lr"]),
        (["--resume"], ["leave out --resume"]),
        (["--weight-decay", 0], ["leave out --weight-decay"]),
        (["--layer", 9], ["layer 9", "0..3"]),
    ],
)
def test_flags_that_do_not_fit(tmp_path, fails, flags, parts):
    out = tmp_path / "out"
    fails(bipo.main, [*MINI_SETS, "--layer", 1, *GRADIENT, *flags, "--out", out], *parts)
    assert not out.exists()


@pytest.mark.parametrize("layers", [["all"], [1, 2]])
def test_a_training_has_one_layer(tmp_path, fails, layers):
    args = [*MINI_SETS, "--layer", *layers, "--out", tmp_path / "out"]
    fails(bipo.main, args, "one --layer", "--method gradient")
    assert not (tmp_path / "out").exists()


def test_a_vector_of_before_is_replaced_only_if_asked(one_layer, fails):
    before = (one_layer / "vector.safetensors").read_bytes()
    args = [*MINI_SETS, "--layer", 1, *GRADIENT, "--out", one_layer]
    fails(bipo.main, args, "holds a run", "--overwrite")
    assert (one_layer / "vector.safetensors").read_bytes() == before


def test_the_baseline_of_eval_is_this_vector(one_layer, tmp_path, mini, mini_pairs):
    """Against the vector that bipo.py saved, the one that eval.py computes makes no difference."""
    args = ["--model", MINI, "--vector", one_layer, "--data", MINI / "test.csv", "--samples", 0]
    args += ["--multipliers", -1, 1, "--pairs", MINI / "train.csv", "--baseline", "gradient"]
    args += ["--save", tmp_path, "--json", tmp_path / "eval.json"]
    run_main(evaluation.main, *args)
    tables = json.loads((tmp_path / "eval.json").read_text())["tables"]
    (rows,) = (rows for title, rows in tables.items() if title.startswith("compared"))
    by_name = {row["steering"]: row for row in rows}
    assert by_name["gradient"]["slope_minus_first"][0] == pytest.approx(0, abs=1e-4)
    assert abs(by_name["gradient"]["slope"][0]) > 0.01
    saved, metadata = load_vector(tmp_path / "gradient.safetensors")
    g = preference_gradient(mini[0], 1, mini_pairs)
    torch.testing.assert_close(saved[1], g / g.square().sum(), rtol=1e-3, atol=1e-5)
    assert metadata["method"] == "gradient"


def test_the_gradient_is_computed_from_pairs_that_are_given(one_layer, fails):
    args = ["--model", MINI, "--vector", one_layer, "--data", MINI / "test.csv"]
    fails(evaluation.main, [*args, "--baseline", "gradient"], "computed from --pairs")
