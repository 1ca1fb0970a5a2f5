"""The benchmark's two ways of training agree, which is a test of both."""

import json

import bench
import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A checkpoint of the benchmark's making."""
    monkeypatch.setitem(bench.SIZES, "small", bench.Size(32, 64, 10, 4, 1))
    monkeypatch.setattr(bench, "VOCAB_SIZE", 500)
    bench.make_checkpoint("small", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    return tmp_path


def test_official_and_our_steps_agree(small, monkeypatch):
    how = ("small", small, torch.float32, "cpu", 5)
    row = bench.compare_steps(*how)  # asserts that losses and vectors are the same
    assert row["ratio"] > 0 and row["steps"] == 3
    monkeypatch.setattr(bench, "lr_at", lambda *args: 0.0)  # the official way then learns nothing
    with pytest.raises(AssertionError):
        bench.compare_steps(*how)


def test_the_whole_way_to_a_vector_by_three_ways(small):
    how = ("small", small, torch.float32, "cpu", 5, 30, 20)
    official, ours, gradient = bench.compare_vectors(*how)  # asserts that the steps agree
    assert official["steps"] == ours["steps"] == 160 and gradient["steps"] == 0
    assert official["total_s"] == official["step_s"] * 160
    assert ours["total_s"] == ours["first_pass_s"] + ours["step_s"] * 160
    assert gradient["total_s"] == gradient["first_pass_s"] + gradient["backward_pass_s"]
    assert official["times_as_fast"] == 1 < ours["times_as_fast"] < gradient["times_as_fast"]


def test_the_backward_pass_runs_over_each_pair_once(small, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "pair_gradients", lambda model, layer, pairs: seen.extend(pairs))
    bench.compare_vectors("small", small, torch.float32, "cpu", 4, 30)
    ids = [pair.ids for pair in seen]
    assert len(ids) == 30 and all(pair in ids for pair in bench.make_pairs(30))


def test_generation_agrees(small, monkeypatch):
    how = ("small", small, torch.float32, "cpu", 3, 4)
    assert bench.compare_generation(*how)["same_answers"] == 1  # asserted there
    monkeypatch.setattr(bench, "MULTIPLIERS", [1.0, 2.0])
    generate = bench.generate
    monkeypatch.setattr(bench, "generate", lambda *args: generate(*args[:-1]))  # not steered
    with pytest.raises(AssertionError, match="answers differ"):
        bench.compare_generation(*how)


def test_flops_are_those_of_the_shapes():
    pairs = [bench.PairIds([1] * 20, [2] * 5, [3] * 7), bench.PairIds([1] * 9, [2] * 3, [3] * 4)]
    products = bench.step_products("15M", pairs)
    flops = sum(4 * rows * n_in * n_out * count for rows, n_in, n_out, count in products)
    attention = 12 * 2 * 288 * (32**2 + 16**2)  # blocks 4 and 5
    assert bench.step_flops("15M", 3, pairs) == flops + attention


@pytest.fixture
def bench_main(small, monkeypatch, tmp_path):
    """The command as a user gives it, on a smaller model; returns the rows of its file."""
    monkeypatch.setattr(bench, "full_run", lambda *args, run=bench.full_run: run(*args, 9, 2))
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")

    def run(*args):
        out = tmp_path / "bench.json"
        args = ["bench.py", *args, "--folder", small, "--out", out]
        monkeypatch.setattr("sys.argv", list(map(str, args)))
        bench.main()
        return json.loads(out.read_text())["rows"]

    return run


def test_the_parts_that_are_asked_for_run(bench_main, capsys):
    complexity, full = bench_main("--parts", "complexity", "full", "--sizes", "small")
    assert complexity["step_s"] > 0 and complexity["gflop"] > 0 and full["steps"] == 6
    printed = capsys.readouterr().out
    assert "**complexity**\n\n| size | layer |" in printed and "**full**" in printed


def test_a_whole_run_puts_its_tables_into_the_results(bench_main, monkeypatch):
    bench.RESULTS.write_text("above\n<!-- bench -->\nold\n<!-- end -->\nbelow\n")
    monkeypatch.setitem(bench.USUAL, "cpu", {"full": ["small"]})
    (row,) = bench_main()
    text = bench.RESULTS.read_text()
    assert text.startswith("above\n<!-- bench -->\ndevice cpu, dtype torch.float32, threads 1\n")
    assert text.endswith("|\n<!-- end -->\nbelow\n") and "old" not in text
    assert f"| small | 6 | {row['first_pass_s']:.3g} | {row['training_s']:.3g} |" in text


def test_large_numbers_are_written_out():
    rows = [{"size": "7B", "n": 12, "mib": 13579.6, "s": 0.012345}]
    expected = "| size | n | mib | s |\n| :--- | ---: | ---: | ---: |\n| 7B | 12 | 13580 | 0.0123 |"
    assert bench.table(rows) == expected


def test_a_run_of_some_parts_leaves_the_results_as_they_are(bench_main):
    bench.RESULTS.write_text("<!-- bench -->\nold\n<!-- end -->\n")
    bench_main("--parts", "full", "--sizes", "small")
    assert "old" in bench.RESULTS.read_text()


OF_US = {"read upper blocks", "first pass"}
REPORTED = {
    "official": {"step"},
    "ours": OF_US | {"step"},
    "gradient": OF_US | {"backward pass"},
}


@pytest.mark.parametrize("way", bench.VECTORS)
def test_a_process_reports_its_phases_and_its_memory(small, capsys, way):
    bench.run_alone(way, "small", small, 2, 8, torch.float32, "cpu")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.keys() == REPORTED[way] | {"peak_mib"} and min(report.values()) > 0


def test_lengths_are_those_of_the_official_data():
    pairs = bench.make_pairs(2000)
    for part, mean, most in zip(
        zip(*pairs, strict=True), (86, 24, 25), (253, 121, 119), strict=True
    ):
        lengths = [len(ids) for ids in part]
        assert abs(sum(lengths) / len(lengths) - mean) < 0.06 * mean and max(lengths) <= most
