"""The benchmark's two ways of training agree, which is a test of both."""

import bench
import pytest

pytest.importorskip("transformers")


def test_official_and_our_steps_agree(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", (32, 64, 4, 4, 1))
    monkeypatch.setattr(bench, "VOCAB_SIZE", 500)
    bench.make_checkpoint("small", tmp_path)
    row = bench.compare("small", 5, tmp_path)  # asserts that losses and vectors are the same
    assert row["ratio"] > 0 and row["steps"] == 3
    monkeypatch.setattr(bench, "lr_at", lambda *args: 0.0)  # the official way then learns nothing
    with pytest.raises(AssertionError):
        bench.compare("small", 5, tmp_path)


def test_lengths_are_those_of_the_official_data():
    pairs = bench.make_pairs(2000)
    for part, mean, most in zip(
        zip(*pairs, strict=True), (86, 24, 25), (253, 121, 119), strict=True
    ):
        lengths = [len(ids) for ids in part]
        assert abs(sum(lengths) / len(lengths) - mean) < 0.06 * mean and max(lengths) <= most
