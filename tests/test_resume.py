"""--resume: a run that was stopped at any moment ends with the vector it would have had."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import MINI, MINI_SETS, ROOT, names_in, run_main

import bipo
from data import load_vector

RUN = (*MINI_SETS, "--layer", 1, "--lr", 0.02, "--warmup-steps", 2, "--epochs")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run itself catches it."""


def train(out, *flags, epochs=2):
    run_main(bipo.main, *RUN, epochs, "--out", out, *flags)


def vectors(out):
    """The bytes of each vector of a run; the order of the metadata in a file is not fixed."""
    files = sorted(out.glob("*[0-9r].safetensors"))
    return {file.name: load_vector(file)[0][1].numpy().tobytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two epochs, six steps, without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    assert len(vectors(out)) == 3
    return out


def assert_same(out, whole):
    assert vectors(out) == vectors(whole)
    assert (out / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


def stop_at(monkeypatch, n, error=Killed):
    """Let the n-th change of a file's name or row of the log raise, before or after it is done."""
    count = itertools.count()

    def stopping(function):
        def call(*args, **kwargs):
            if next(count) == n:
                raise error
            result = function(*args, **kwargs)
            if next(count) == n:
                raise error
            return result

        return call

    monkeypatch.setattr(Path, "replace", stopping(Path.replace))
    monkeypatch.setattr(bipo.json, "dumps", stopping(bipo.json.dumps))


def is_stopped(monkeypatch, n, out, *flags):
    """Train until the n-th moment; whether there was one."""
    error = KeyboardInterrupt if n % 12 == 0 else Killed
    with monkeypatch.context() as patch:
        stop_at(patch, n, error)
        try:
            train(out, *flags)
        except (Killed, SystemExit):
            return True
    return False


def test_killed_at_every_moment(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(bipo, "SAVE_EVERY", 1)
    n = 0
    while is_stopped(monkeypatch, n, tmp_path / str(n)):
        train(tmp_path / str(n), "--resume")
        assert_same(tmp_path / str(n), whole)
        n += 4
    assert n >= 40  # the run was stopped often


def test_killed_at_every_moment_of_overwriting(tmp_path, monkeypatch, whole):
    """What there was can be loaded until there is something new."""
    monkeypatch.setattr(bipo, "SAVE_EVERY", 1)
    train(tmp_path / "old", "--seed", 1, epochs=1)
    old = vectors(tmp_path / "old")
    old_state = (tmp_path / "old" / "state.safetensors").read_bytes()
    n, went_on = 0, []
    while True:
        out = shutil.copytree(tmp_path / "old", tmp_path / str(n))
        if not is_stopped(monkeypatch, n, out, "--overwrite"):
            break
        state, now = out / "state.safetensors", vectors(out)
        is_old = state.exists() and state.read_bytes() == old_state
        if is_old:
            assert now == old
        elif "epoch_01.safetensors" not in now:
            assert now == {"vector.safetensors": old["vector.safetensors"]}
        train(out, "--overwrite" if is_old else "--resume")
        assert_same(out, whole)
        went_on.append(not is_old)
        n += 6
    assert n >= 40 and {*went_on} == {True, False}


def test_killed_again_and_again(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.setattr(bipo, "SAVE_EVERY", 1)
    steps = []
    for n in (13, 17, 19, 23, 29, 31, 37):
        with monkeypatch.context() as patch:
            stop_at(patch, n)
            with suppress(Killed):  # the last ones come after the end
                train(tmp_path / "run", "--resume")
        steps += [line for line in capsys.readouterr().out.splitlines() if "going on" in line]
    train(tmp_path / "run", "--resume")
    assert len(set(steps)) > 2
    assert_same(tmp_path / "run", whole)


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys, whole):
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    train(whole, "--resume")
    assert "going on after step 6\n" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before


@pytest.mark.parametrize(
    "flags, name",
    [
        (("--beta", 0.2), "holds a run with beta 0.1, not 0.2; --overwrite"),
        (("--beta", 0.2, "--seed", 1), "seed 0, not 1, beta 0.1, not 0.2;"),
        (("--epochs", 8), "epochs 2, not 8 (its schedule ends after 2);"),
        (("--seed", 1), "seed 0, not 1"),
        (("--method", "positive"), "method bipo, not positive"),
        (("--system", "Be brief."), "system You are"),
        (("--data", MINI / "test.csv"), "data 11 pairs of"),
    ],
)
def test_other_settings_are_named_and_refused(fails, whole, flags, name):
    fails(
        bipo.main,
        [*RUN, 2, "--out", whole, "--resume", *flags],
        "holds a run with",
        name,
        "--overwrite",
    )


def test_pairs_that_were_changed_are_refused(tmp_path, fails, whole):
    changed, out = tmp_path / "train.csv", tmp_path / "run"
    changed.write_text((MINI / "train.csv").read_text())
    train(out, "--data", changed, epochs=1)
    changed.write_text(changed.read_text().replace("Yes", "Well"))
    fails(bipo.main, [*RUN, 1, "--data", changed, "--out", out, "--resume"], "ids")


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100])
def test_a_damaged_state_is_one_line(tmp_path, fails, content):
    (tmp_path / "state.safetensors").write_bytes(content)
    fails(bipo.main, [*RUN, 1, "--out", tmp_path, "--resume"], "cannot read", "state.safetensors")


def test_a_log_that_lost_its_end_is_refused(tmp_path, fails):
    train(tmp_path, epochs=1)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    fails(bipo.main, [*RUN, 1, "--out", tmp_path, "--resume"], "log.jsonl ends before step 3")


def test_a_run_without_a_vector_yet_is_not_replaced_unasked(tmp_path, fails):
    train(tmp_path, epochs=1)
    (tmp_path / "vector.safetensors").unlink()
    fails(bipo.main, [*RUN, 1, "--out", tmp_path], "holds a run", "--resume or --overwrite")


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, whole, sent, code):
    """It comes after the first epoch's last step but one, when nothing has been saved."""
    out = tmp_path / "run"
    steps_of = bipo.train

    def signalled(*args, **how):
        for step in steps_of(*args, **how):
            yield step
            if step.step == 2:
                os.kill(os.getpid(), sent)

    with monkeypatch.context() as patch:
        patch.setattr(bipo, "train", signalled)
        with pytest.raises(SystemExit) as e:
            train(out)
    err = capsys.readouterr().err
    assert e.value.code == code and err.count("\n") == 1
    assert err.endswith(f"--resume --out {out} goes on after step 2\n")
    train(out, "--resume")
    assert "going on after step 2\n" in capsys.readouterr().out
    assert_same(out, whole)


def start(out):
    """A process that goes on with a run of 400 epochs."""
    command = [sys.executable, "bipo.py", *RUN, 400, "--out", out, "--resume"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([str(x) for x in command], cwd=ROOT, **pipes)


def wait_for_rows(process, log, n):
    """Wait until the log has n rows more than now."""
    began = len(log.read_text().splitlines()) if log.exists() else 0
    while process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= began + n:
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_by_the_system_at_random_moments(tmp_path):
    """A process gets SIGKILL 30 times, some of them while it saves."""
    rng, out, seen = random.Random(0), tmp_path / "run", 0
    train(tmp_path / "whole", epochs=400)
    for _ in range(30):
        process = start(out)
        wait_for_rows(process, out / "log.jsonl", rng.randrange(1, 60))
        time.sleep(rng.random() / 50)
        os.kill(process.pid, signal.SIGKILL)
        seen += "going on after" in process.communicate()[0]
        for file in vectors(out):
            assert load_vector(out / file)
    train(out, "--resume", epochs=400)
    assert seen > 10
    assert_same(out, tmp_path / "whole")


@pytest.mark.parametrize("name", ["vector.safetensors", "state.safetensors", "log.jsonl"])
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, fails, name):
    (tmp_path / name).mkdir()
    fails(bipo.main, [*RUN, 1, "--out", tmp_path], "cannot write", name)
    assert names_in(tmp_path) == [name]
