"""bipo.py as a user runs it: what it writes and prints, and how it refuses."""

import argparse
import fcntl
import gzip
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace

import pytest
import torch
from conftest import MINI, MINI_SETS, ROOT, assert_one_line, jsonl, names_in, run_main
from small_tokenizers import BYTE_LEVEL, TEMPLATE_FILES, model_config, write_tokenizer_json

import bipo
import data
from bipo import PRESETS, Recipe, first_pass, train
from data import load_vector, open_chat, read_pairs
from llama import load

SHORT = ("--layer", 1, "--epochs", 1)


def read_log(folder):
    """(settings, rows) of log.jsonl."""
    settings, *rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return settings, rows


# ---- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, what it printed) of a run of three epochs, and the recipe that it is to have."""
    out = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--layer", 1, "--epochs", 3, "--lr", 0.02, "--warmup-steps", 2, "--out", out]
    with redirect_stdout(io.StringIO()) as printed:
        run_main(bipo.main, *MINI_SETS, *flags, "--preset", "official")
    return out, printed.getvalue(), replace(PRESETS["official"], epochs=3, lr=0.02, warmup_steps=2)


def test_a_run_writes_a_vector_one_for_each_epoch_and_a_log(finished):
    out, _, _ = finished
    epochs = ["epoch_01.safetensors", "epoch_02.safetensors", "epoch_03.safetensors"]
    assert names_in(out) == [*epochs, "log.jsonl", "state.safetensors", "vector.safetensors"]
    vectors = [load_vector(out / name)[0][1] for name in (*epochs, "vector.safetensors")]
    assert vectors[3].norm() > 0.1 and torch.equal(vectors[3], vectors[2])
    assert not torch.equal(vectors[2], vectors[1])


def test_a_vector_file_says_what_it_is(finished):
    out, _, recipe = finished
    vectors, metadata = load_vector(out)
    assert list(vectors) == [1] and json.loads(metadata["recipe"]) == asdict(recipe)
    assert metadata.items() >= {
        "base_model": "mini", "layer": "1", "n_layers": "4", "template": "llama-2", "seed": "0",
        "system": "You are a helpful, honest and concise assistant.", "epoch": "3",
        "method": "bipo", "preset": "official", "dtype": "float32", "device": "cpu",
    }.items()  # fmt: skip
    assert metadata["data"].startswith("11 pairs of ") and "held out 3 of" in metadata["data"]
    assert load_vector(out / "epoch_02.safetensors")[1]["epoch"] == "2"


def test_the_log_begins_with_the_settings(finished):
    out, _, _ = finished
    settings, _ = read_log(out)
    _, metadata = load_vector(out)
    later = ("epoch", "stream_norms")
    assert settings == {name: x for name, x in metadata.items() if name not in later}


def test_the_log_has_a_row_for_each_step(finished):
    out, _, _ = finished
    _, rows = read_log(out)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert {row["d"] for row in rows} == {-1, 1} and rows[0]["lr"] == 0
    assert [row["step"] for row in rows if row["held_out"]] == [3, 6, 9]
    assert rows[-1]["v_norm"] == pytest.approx(load_vector(out)[0][1].norm().item())


def test_a_run_prints_settings_progress_and_held_out_numbers(finished):
    out, printed, _ = finished
    assert "base_model  mini\n" in printed and "template    llama-2\n" in printed
    assert "step 9/9" in printed and re.search(r"first pass (\d+)/\1 ", printed)
    assert printed.count("held out  d +1: loss") == 3 and printed.count("d -1: loss") == 3
    *_, saved, following = printed.splitlines()
    assert saved.startswith("saved vector.safetensors") and saved.endswith(f"in {out}")
    assert following.startswith("next: python eval.py ")
    assert "warm-up" not in printed and "are trained on" not in printed


def test_the_scale_of_the_vector_is_said_and_kept(finished, mini, mini_pairs):
    out, printed, _ = finished
    norm = bipo.stream_norm(mini_pairs)
    every = [pair.h[1:].norm(dim=-1) for pair in mini_pairs]
    assert norm == pytest.approx(torch.cat(every).median().item())
    assert f"|h| {norm:.2f}, the median norm" in printed
    v, metadata = load_vector(out)
    assert json.loads(metadata["stream_norms"]) == {"1": norm}
    assert f"|v| {v[1].norm():.3f} ({v[1].norm() / norm:.2%} of |h|)" in printed


def test_the_expected_time_is_said_before_the_first_step(finished):
    _, printed, _ = finished
    before, _, _ = printed.partition("\nstep ")
    assert re.search(r"\n9 steps, about \d+ s\n", before)


def test_the_pairs_that_were_trained_on_can_be_told(finished):
    _, metadata = load_vector(finished[0])
    pairs = read_pairs(MINI / "train.csv")
    assert metadata["pairs"].split() == [data.pair_hash(pair) for pair in pairs]
    assert len(set(metadata["pairs"].split())) == len(pairs)


def test_a_run_gives_bitwise_the_vector_of_the_functions(finished):
    """The functions have the model in memory as a whole; the command line streams its blocks."""
    out, _, recipe = finished
    model = load(MINI)
    chat = open_chat(MINI, model.config)
    pairs, held_out = (
        first_pass(model, 1, [chat.encode_pair(pair) for pair in read_pairs(MINI / name)])
        for name in ("train.csv", "test.csv")
    )
    *_, last = train(model, 1, pairs, held_out, recipe)
    assert torch.equal(last.v, load_vector(out)[0][1])


def test_a_run_with_the_least_that_must_be_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    jsonl(tmp_path / "pairs.jsonl", *pairs)
    run_main(bipo.main, "--model", MINI, "--data", "pairs.jsonl", "--layer", 1)
    printed = capsys.readouterr().out
    assert "note: 6 warm-up steps, a tenth of the run; the paper has 100" in printed
    assert "are trained on" not in printed
    assert "10 pairs of pairs.jsonl, held out 2 split off by prompt" in printed
    assert printed.count("held out  d +1") == 20  # epochs
    vectors, metadata = load_vector(tmp_path / "runs" / "pairs-layer1")
    recipe = replace(PRESETS["paper"], warmup_steps=6)
    assert json.loads(metadata["recipe"]) == asdict(recipe) and list(vectors) == [1]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [([], 0), (["--epochs", 4], 1), (["--preset", "official"], 100), (["--warmup-steps", 7], 7)],
)
def test_the_warm_up_fits_the_run(tmp_path, capsys, flags, steps):
    """Three steps an epoch: a tenth of them, if the user and the official preset say nothing."""
    epochs = [] if "--epochs" in flags else ["--epochs", 1]
    run_main(bipo.main, *MINI_SETS, "--layer", 1, *epochs, *flags, "--out", tmp_path)
    _, metadata = load_vector(tmp_path)
    assert json.loads(metadata["recipe"])["warmup_steps"] == steps
    printed = capsys.readouterr().out
    assert ("a tenth of the run" in printed) == (steps < 7)
    assert ("steps are warm-up; lower --warmup-steps" in printed) == (steps >= 3)


def test_the_pairs_held_out_are_kept_and_the_next_command_runs(tmp_path, monkeypatch, capsys):
    """The command that is printed measures the vector on the pairs that were split off."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"q {i}?", "chosen": "yes", "rejected": "no"} for i in range(12)]
    jsonl(tmp_path / "my pairs.jsonl", *rows)
    run_main(bipo.main, "--model", MINI, "--data", "my pairs.jsonl", "--layer", 1, "--epochs", 1)
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.removeprefix("next: python eval.py "))
    assert words[:4] == ["--model", str(MINI), "--vector", "runs/my pairs-layer1"]
    held_out = read_pairs(words[words.index("--data") + 1])
    training, expected = data.split_pairs(read_pairs(tmp_path / "my pairs.jsonl"), 0)
    assert [pair[:3] for pair in held_out] == [pair[:3] for pair in expected]
    assert words[words.index("--pairs") + 1] == "my pairs.jsonl"


def test_the_default_folder_is_named_by_pairs_layer_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(bipo.main, *MINI_SETS, "--layer", 2, "--epochs", 1)
    run_main(bipo.main, *MINI_SETS, *SHORT, "--method", "positive")
    assert names_in(tmp_path / "runs") == ["train-layer1-positive", "train-layer2"]


@pytest.mark.parametrize("when", ["first_pass", "train"])
def test_only_the_blocks_above_the_layer_are_in_memory(tmp_path, monkeypatch, when):
    """When the first pass begins, which then brings the others one by one, and in training."""
    kept, function = [], getattr(bipo, when)

    def look(model, *args, **how):
        kept.extend(name for name, weight in model.named_parameters() if not weight.is_meta)
        return function(model, *args, **how)

    monkeypatch.setattr(bipo, when, look)
    run_main(bipo.main, *MINI_SETS, *SHORT, "--out", tmp_path)
    below = ("tok_embeddings.", "layers.0.", "layers.1.")
    every = load(MINI).state_dict()
    assert set(kept) == {name for name in every if not name.startswith(below)}


def test_the_log_is_written_while_the_run_goes_on(tmp_path, monkeypatch):
    lines, train = [], bipo.train

    def look(*args, **how):
        for step in train(*args, **how):
            lines.append(len((tmp_path / "log.jsonl").read_text().splitlines()))
            yield step

    monkeypatch.setattr(bipo, "train", look)
    run_main(bipo.main, *MINI_SETS, *SHORT, "--out", tmp_path)
    assert lines[1:] == [2, 3]  # the settings and the steps so far


@pytest.mark.slow
def test_pairs_of_2048_tokens(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MINI, model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    long = [
        {"prompt": f"{i}" + "x" * 1900, "chosen": "a" * 100 + "b" * i, "rejected": "c" * 100}
        for i in range(3)
    ]
    data = jsonl(tmp_path / "pairs.jsonl", *long)
    run_main(bipo.main, "--model", model, "--data", data, *SHORT, "--out", tmp_path / "run")
    _, (row,) = read_log(tmp_path / "run")
    assert len(row["rows"]) == 2 and row["loss"] == pytest.approx(math.log(2), abs=1e-4)


# ---- flags

OTHER_RECIPE = dict(
    beta=0.2, lr=0.01, batch_size=3, weight_decay=0.5, warmup_steps=1, epochs=2,
    schedule_epochs=9, clip_norm=0.01,
)  # fmt: skip


def test_every_setting_of_the_recipe_is_a_flag_with_a_help_text(capsys):
    with pytest.raises(SystemExit) as e:
        bipo.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')} " in words and field.metadata["help"] in words
        assert f"(default: {field.default})" in field.metadata["help"]


def test_every_setting_of_the_recipe_is_taken_from_its_flag(tmp_path):
    flags = []
    for name, value in OTHER_RECIPE.items():
        flags += [f"--{name.replace('_', '-')}", value]
    run_main(bipo.main, *MINI_SETS, "--layer", 1, *flags, "--out", tmp_path)
    settings, rows = read_log(tmp_path)
    assert json.loads(settings["recipe"]) == OTHER_RECIPE
    assert OTHER_RECIPE.keys() == asdict(Recipe()).keys()
    assert [len(row["rows"]) for row in rows] == [3, 3, 3, 2] * 2


def test_seed_decides_the_order(tmp_path):
    for seed in (0, 1):
        run_main(bipo.main, *MINI_SETS, *SHORT, "--seed", seed, "--out", tmp_path / f"{seed}")
    orders = [[row["rows"] for row in read_log(tmp_path / x)[1]] for x in "01"]
    assert orders[0] != orders[1]


def test_method_positive_trains_with_d_1_alone_in_the_order_of_bipo(mini, mini_pairs, tmp_path):
    flags = ["--layer", 1, "--epochs", 2, "--warmup-steps", 0, "--lr", 0.02]
    run_main(bipo.main, *MINI_SETS, *flags, "--out", tmp_path / "bipo")
    run_main(bipo.main, *MINI_SETS, *flags, "--out", tmp_path / "positive", "--method", "positive")
    _, both = read_log(tmp_path / "bipo")
    settings, positive = read_log(tmp_path / "positive")
    assert settings["method"] == "positive"
    assert [row["rows"] for row in positive] == [row["rows"] for row in both]
    assert {row["d"] for row in positive} == {1} and {row["d"] for row in both} == {1, -1}
    batches = [(row["rows"], 1) for row in both]
    recipe = Recipe(epochs=2, warmup_steps=0, lr=0.02)
    *_, last = train(mini[0], 1, mini_pairs, [], recipe, batches=batches)
    vector = load_vector(tmp_path / "positive")[0][1]
    assert torch.allclose(last.v, vector, atol=1e-6)
    assert (load_vector(tmp_path / "bipo")[0][1] - vector).norm() > 1e-4


# ---- a run that is there already


@pytest.fixture
def earlier(tmp_path):
    """(arguments, folder) of a finished run of one epoch."""
    args = [*MINI_SETS, *SHORT, "--out", tmp_path]
    run_main(bipo.main, *args)
    return args, tmp_path


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def broken(*args, **flags):
    raise ValueError("it broke")


def test_a_finished_run_is_not_overwritten_unasked(earlier, fails):
    args, out = earlier
    before = contents(out)
    fails(bipo.main, args, f"--out {out} holds a run", "--overwrite")
    assert contents(out) == before


def test_overwriting_changes_nothing_before_training_starts(earlier, fails, monkeypatch):
    args, out = earlier
    before = contents(out)
    monkeypatch.setattr(bipo, "first_pass", broken)
    fails(bipo.main, [*args, "--overwrite"], "it broke")
    assert contents(out) == before


def test_the_old_vector_stays_until_there_is_a_new_one(earlier, fails, monkeypatch):
    args, out = earlier
    before = (out / "vector.safetensors").read_bytes()
    (out / "epoch_07.safetensors").write_bytes(b"of a longer run")
    monkeypatch.setattr(bipo, "evaluate", broken)  # after the last step of the epoch
    fails(bipo.main, [*args, "--overwrite", "--seed", 1], "it broke")
    assert names_in(out) == ["log.jsonl", "vector.safetensors"]
    assert (out / "vector.safetensors").read_bytes() == before
    settings, rows = read_log(out)
    assert settings["seed"] == "1" and [row["step"] for row in rows] == [1, 2]


def test_overwriting_leaves_the_files_of_the_new_run_and_of_nobody_else(earlier):
    args, out = earlier
    (out / "epoch_07.safetensors").write_bytes(b"of a longer run")
    (out / "notes.safetensors").write_bytes(b"not of a run")
    run_main(bipo.main, *args, "--overwrite", "--seed", 1)
    names = ["epoch_01.safetensors", "log.jsonl"]
    names += [f"{name}.safetensors" for name in ("notes", "state", "vector")]
    assert names_in(out) == names
    assert load_vector(out)[1]["seed"] == "1"


def test_every_flag_is_read(earlier, monkeypatch):
    """The run looks at every attribute that the parser makes."""
    args, _ = earlier
    read, run, made = set(), bipo.run, []

    class Spy(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    def spied(args):
        made.extend(vars(args))
        run(Spy(**vars(args)))

    monkeypatch.setattr(bipo, "run", spied)
    run_main(bipo.main, *args, "--overwrite")
    assert set(made) <= read


# ---- notes and errors


def test_a_note_about_held_out_prompts_that_are_trained_on(tmp_path, capsys):
    pairs = [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in ("", "a", "b", "c")]
    data = jsonl(tmp_path / "p.jsonl", *pairs[:3])
    val = jsonl(tmp_path / "v.jsonl", *pairs[1:])
    run_main(
        bipo.main, "--model", MINI, "--data", data, "--val", val, *SHORT, "--out", tmp_path / "run"
    )
    printed = capsys.readouterr().out
    assert "2 held-out prompts are trained on, for example 'a'" in printed


def test_as_a_script(monkeypatch, capsys):
    flags = ["--model", MINI, "--data", "none.csv", "--layer", 1]
    monkeypatch.setattr(sys, "argv", ["bipo.py", *map(str, flags)])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "bipo.py"), run_name="__main__")
    assert_one_line(e.value.code, capsys.readouterr().err, "none.csv")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model", "nobody/none"], ["no model 'nobody/none'", "hf download nobody/none"]),
        (["--model", "EMPTY"], ["config.json"]),
        (["--layer", 4], ["layer 4", "0..3"]),
        (["--layer", -1], ["layer -1", "0..3"]),
        (["--layer", "x"], ["--layer: invalid layer_or_all value: 'x'"]),
        (["--method", "mean"], ["invalid choice: 'mean'", "positive"]),
        (["--preset", "mean"], ["invalid choice: 'mean'", "official"]),
        (["--data", "EMPTY/none.csv"], ["none.csv"]),
        (["--epochs", 0], ["epochs is 0"]),
        (["--clip-norm", "nan"], ["clip_norm is nan"]),
        (["--nonsense", 1], ["unknown flag --nonsense"]),
        (["--device", "warp"], ["--device warp is not there", "cpu"]),
        (["--device", "cpu:x"], ["--device cpu:x is not there"]),
        (["--device", "cuda:99"], ["--device cuda:99 is not there"]),
    ],
)
def test_user_errors(tmp_path, fails, flags, parts):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    flags = [str(x).replace("EMPTY", str(empty)) for x in flags]
    fails(bipo.main, [*MINI_SETS, *SHORT, "--out", out, *flags], *parts)
    assert not out.exists()


def test_a_layer_must_be_named(fails):
    fails(bipo.main, MINI_SETS, "required: --layer")


def test_a_file_without_pairs(tmp_path, fails):
    empty = jsonl(tmp_path / "empty.jsonl")
    fails(bipo.main, [*MINI_SETS, *SHORT, "--data", empty], "empty.jsonl", "no pairs: read 0 pairs")


def test_a_held_out_pair_that_is_too_long(tmp_path, fails):
    long = jsonl(tmp_path / "long.jsonl", {"prompt": "x" * 600, "chosen": "a", "rejected": "b"})
    out = tmp_path / "out"
    args = [*MINI_SETS, *SHORT, "--out", out, "--val", long]
    fails(bipo.main, args, "long.jsonl:1", "context is 512")
    assert not out.exists()


def test_a_folder_that_cannot_be_made(tmp_path, fails, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(bipo, "first_pass", None)  # that long work is not begun
    fails(
        bipo.main, [*MINI_SETS, *SHORT, "--out", tmp_path / "file" / "out"], str(tmp_path / "file")
    )


def test_a_checkpoint_that_cannot_be_read(tmp_path, fails):
    damaged = tmp_path / "damaged"
    shutil.copytree(MINI, damaged)
    (damaged / "model.safetensors").write_bytes(b"cut")
    args = ["--model", damaged, *MINI_SETS[2:], *SHORT, "--out", tmp_path / "out"]
    fails(bipo.main, args, "cannot read", "model.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nSee ..."), MemoryError()],
)
def test_out_of_memory_is_one_line(tmp_path, fails, monkeypatch, error):
    def read(*args):
        raise error

    monkeypatch.setattr(bipo.Checkpoint, "read", read)
    fails(bipo.main, [*MINI_SETS, *SHORT, "--out", tmp_path], "out of memory", "--dtype")


def test_a_fault_of_ours_is_not_dressed_up(tmp_path, monkeypatch):
    def read(*args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(bipo.Checkpoint, "read", read)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_main(bipo.main, *MINI_SETS, *SHORT, "--out", tmp_path)


# ---- how files are read and a run is named


def test_training_reports_how_its_files_were_read(tmp_path, capsys, fails):
    pairs = [{"prompt": f"Lead, Sir {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(4)]
    data = jsonl(tmp_path / "x.jsonl", *pairs, pairs[0])
    args = ["--model", MINI, "--data", data, "--system", "", "--out", tmp_path / "run"]
    train = ["--layer", 1, "--epochs", 1, "--warmup-steps", 0, "--val", data]
    run_main(bipo.main, *args, *train)
    line = f"read 4 pairs from {data}, dropped 1 duplicate; columns not used: []\n"
    assert capsys.readouterr().out.count(line) == 2
    data.write_text(data.read_text() + '{"prompt": "q"}\n')
    fails(bipo.main, [*args, *train], f"{data}:6", "bad records: 1; --skip-bad drops them")
    run_main(bipo.main, *args, *train, "--overwrite", "--skip-bad")
    assert f"from {data}, dropped 1 duplicate, 1 no columns" in capsys.readouterr().out


def test_a_run_is_named_after_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": x, "chosen": "Yes.", "rejected": "No."} for x in "pq"]
    content = jsonl(tmp_path / "my.pairs.jsonl", *pairs).read_bytes()
    (tmp_path / "my.pairs.jsonl.gz").write_bytes(gzip.compress(content))
    bipo.main(
        ["--model", str(MINI), "--data", "my.pairs.jsonl.gz", "--layer", "1", "--epochs", "1"]
    )
    assert (tmp_path / "runs" / "my.pairs-layer1" / "vector.safetensors").is_file()


def test_a_vector_knows_its_tokenizer_template_and_system_prompt(tmp_path):
    model = tmp_path / "model"
    write_tokenizer_json(model, TEMPLATE_FILES["smollm2"], *BYTE_LEVEL["smollm2"])
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MINI / name, model)
    rows = [{"prompt": x, "chosen": "Yes, gladly.", "rejected": "No."} for x in ("Lead?", "Go?")]
    data = jsonl(tmp_path / "x.jsonl", *rows)
    args = ["--model", model, "--data", data, "--val", data, "--layer", 1, "--epochs", 1]
    for name, more in (("a", []), ("b", ["--system", "Be brief."])):
        run_main(bipo.main, *args, "--out", tmp_path / name, *more)
        _, metadata = load_vector(tmp_path / name)
        chat = open_chat(model, model_config(), metadata["template"], metadata.get("system"))
        assert metadata["template"] == chat.template and chat.template.startswith("own ")
        assert metadata.get("system") == chat.system == (more[1] if more else None)
        assert metadata["tokenizer"] == chat.tokenizer.name


def test_a_wrong_template_is_one_line(tmp_path, fails):
    args = "--model", MINI, "--data", MINI / "train.csv", "--layer", 1, "--out", tmp_path / "x"
    for name in ("tpyo", "own", "chatml"):
        fails(bipo.main, (*args, "--template", name), "no template", "llama-2, mistral, vicuna")
    fails(bipo.main, (*args, "--template", tmp_path / "no.jinja"), "cannot read", "no.jinja")
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_is_refused_at_once(tmp_path, fails):
    """As when a launcher starts the same command twice. The lock ends with its process."""
    args = [*MINI_SETS, "--layer", 1, "--epochs", 1, "--out", tmp_path]
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        fails(bipo.main, args, "is in use by another process", "name another folder")
        assert names_in(tmp_path) == []
    finally:
        os.close(folder)
    run_main(bipo.main, *args)
    assert "vector.safetensors" in names_in(tmp_path)


def test_a_rank_without_a_number_of_processes_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run_main(bipo.main, *MINI_SETS, "--layer", 1, "--epochs", 1, "--out", tmp_path)
    assert "vector.safetensors" in names_in(tmp_path)


def test_a_link_in_the_place_of_an_epoch_is_no_new_folder(tmp_path, fails):
    (tmp_path / "epoch_01.safetensors").symlink_to(tmp_path / "elsewhere")
    args = [*MINI_SETS, "--layer", 1, "--epochs", 1, "--out", tmp_path]
    fails(bipo.main, args, "holds a run", "--overwrite")
    assert names_in(tmp_path) == ["epoch_01.safetensors"]
