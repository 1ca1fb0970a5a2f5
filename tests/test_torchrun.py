"""bipo.py in several processes, started by torchrun: the numbers of one process."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection

import pytest
import torch
from conftest import MINI, MINI_SETS, ROOT, jsonl, run_main

import bipo
from bipo import Recipe, first_pass, train
from data import load_vector

TRAIN = (*MINI_SETS, "--layer", 1)
RECIPE = ("--lr", 0.02, "--warmup-steps", 5)


def torchrun(n, *args, wait=True):
    """`bipo.py` in n processes: (exit code, stdout, stderr), or the process."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [sys.executable, "-m", *launcher, "bipo.py", *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def forked(n, folder, *args):
    """The same in forks of this process, which has imported all. They are told what torchrun tells,
    and one that fails ends the others: (exit codes, stdout, stderr)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank):
        told = {"WORLD_SIZE": n, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(x) for name, x in told.items()})
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
            setattr(sys, name, open(number, "w", closefd=False))
        sys.argv = ["bipo.py", *map(str, args)]
        runpy.run_path(str(ROOT / "bipo.py"), run_name="__main__")

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=[rank]) for rank in range(n)]
    for process in processes:
        process.start()
    running = list(processes)
    while running:
        connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in processes):
            for process in running:
                process.terminate()

    out, err = (
        "".join((folder / f"{name}{rank}").read_text() for rank in range(n))
        for name in ("stdout", "stderr")
    )
    return [process.exitcode for process in processes], out, err


def alone(out, *args):
    """The same run in one process."""
    run_main(bipo.main, *TRAIN, *args, "--out", out)


def check_equal(out, expected_out):
    """Equal vectors to 1e-6, equal logs but for rounding."""
    (v,), (expected,) = (load_vector(folder)[0].values() for folder in (out, expected_out))
    assert (v - expected).norm() <= 1e-6 * expected.norm()
    ours, theirs = ((x / "log.jsonl").read_text().splitlines() for x in (out, expected_out))
    for row, other in zip(map(json.loads, ours[1:]), map(json.loads, theirs[1:]), strict=True):
        assert (row["rows"], row["d"]) == (other["rows"], other["d"])
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["margin"] == pytest.approx(other["margin"], abs=1e-3)
        for d, numbers in (row["held_out"] or {}).items():
            assert numbers == pytest.approx(other["held_out"][d], abs=1e-3)


def test_two_processes_give_the_vector_of_one(tmp_path):
    """11 pairs in batches of 4: the last batch is short, and the shares are unequal."""
    args = (*RECIPE, "--epochs", 3)
    alone(tmp_path / "one", *args)
    code, out, err = torchrun(2, *TRAIN, *args, "--out", tmp_path / "two")
    assert code == 0, err
    assert out.count("saved vector.safetensors") == out.count("epoch  3") == 1  # rank 0 alone
    assert len(list((tmp_path / "two").glob("epoch_*"))) == 3
    check_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_twenty_epochs_in_several_processes_give_the_vector_of_one(tmp_path, n):
    alone(tmp_path / "one", *RECIPE)
    code, _, err = torchrun(n, *TRAIN, *RECIPE, "--out", tmp_path / "several")
    assert code == 0, err
    check_equal(tmp_path / "several", tmp_path / "one")


def test_the_blocks_over_two_devices_give_the_vector_of_one(tmp_path):
    args = (*RECIPE, "--epochs", 1)
    alone(tmp_path / "one", *args)
    alone(tmp_path / "two", *args, "--device", "cpu,cpu")
    results = [load_vector(tmp_path / name)[0][1] for name in ("one", "two")]
    assert torch.equal(*results)


@pytest.mark.slow
def test_a_process_without_a_pair_of_the_batch_contributes_nothing(tmp_path):
    """Batches of one pair, and one held-out pair for two processes."""
    pair = {"prompt": "Lead?", "chosen": "Yes.", "rejected": "No."}
    args = ("--val", jsonl(tmp_path / "val.jsonl", pair), "--batch-size", 1, "--epochs", 1)
    results = []
    for n in (1, 2):
        out = tmp_path / str(n)
        code, _, err = torchrun(n, *TRAIN, *args, "--warmup-steps", 0, "--out", out)
        assert code == 0, err
        results.append(load_vector(out)[0][1])
    assert (results[0] - results[1]).norm() <= 1e-6 * results[0].norm()


def test_a_user_error_is_one_line_of_ours(tmp_path):
    codes, out, err = forked(2, tmp_path, *TRAIN[:3], tmp_path / "none.csv", "--layer", 1)
    ours = [line for line in err.splitlines() if line.startswith("bipo.py:")]
    assert codes[0] == 2 and len(ours) == 1 and "none.csv" in ours[0]
    assert out.count("note:") == len(out.splitlines()) == 1  # of the first process


@pytest.mark.slow
def test_a_process_that_dies_ends_all(tmp_path):
    """Within 20 seconds, and no half-written file is left."""
    args = ("--out", tmp_path / "run", "--epochs", 100000, "--val", MINI / "train.csv")
    process = torchrun(2, *TRAIN, *args, wait=False)
    try:
        while not (tmp_path / "run" / "epoch_02.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.1)
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        workers = [int(x) for x in open(children).read().split()]
        os.kill(workers[-1], signal.SIGKILL)
        died = time.time()
        process.wait(timeout=60)
        assert process.returncode != 0 and time.time() - died <= 20
        ours = [x for x in process.stderr.read().splitlines() if x.startswith("bipo.py:")]
        assert len(ours) == 1 and "another process has ended" in ours[0]
    finally:
        process.kill()
    assert load_vector(tmp_path / "run")[0].keys() == {1}
    names = {file.name.partition("_")[0] for file in (tmp_path / "run").iterdir()}
    whole = {"epoch", "log.jsonl", "state.safetensors", "vector.safetensors"}
    assert {name for name in names if not name.startswith(".part-")} <= whole


def test_one_process_of_several_trains_on_its_own_pairs(mini, mini_pairs):
    """None stands for a pair of another process: it is not run, and counts in the mean."""
    model, _ = mini
    recipe = Recipe(epochs=1, batch_size=11, warmup_steps=0)
    held = [pair if i % 2 == 0 else None for i, pair in enumerate(mini_pairs)]
    (step,) = train(model, 1, held, [], recipe)
    (whole,) = train(model, 1, mini_pairs, [], recipe)
    assert step.rows == whole.rows and len(step.logps) == 6 and len(whole.logps) == 11
    assert step.loss == pytest.approx(whole.loss * 6 / 11, rel=1e-4)  # ln 2 each
    assert torch.isfinite(step.v).all() and first_pass(model, 1, []) == []
