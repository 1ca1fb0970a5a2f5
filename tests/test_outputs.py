"""What is written appears whole or not at all, what is made is kept, and how a run ends."""

import io
import itertools
import json
import multiprocessing
import os
import pty
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, jsonl

import data
import eval as evaluation

QUESTIONS = [json.loads(x)["prompt"] for x in (TINY / "power.test.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "dangling", "device"])
def test_only_a_new_or_a_regular_file_is_replaced(tmp_path, kind, fails):
    path, other = tmp_path / "out.jsonl", tmp_path / "other"
    other.write_text("mine")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "none")
    with pytest.raises(ValueError, match=f"cannot write {path}: it is no regular"):
        data.check_output(path)
    with pytest.raises(ValueError, match="cannot write"), data.whole_file(path) as part:
        part.write_text("x")
    assert other.read_text() == "mine" and not (tmp_path / "none").exists()
    flags = f"--model {TINY} --vector v --data {TINY / 'power.test.jsonl'}".split()
    for name in ("--json", "--plot"):
        fails(evaluation.main, [*flags, name, path], "cannot write")


def test_the_part_follows_no_link_and_goes_when_it_fails(tmp_path):
    path, other = tmp_path / "x.txt", tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".part-x.txt").symlink_to(other)
    with data.whole_file(path) as part:
        part.write_text("first")
    assert path.read_text() == "first" and other.read_text() == "mine"
    for error in (OSError(28, "No space left on device"), RuntimeError("write failed")):
        with pytest.raises(ValueError, match=f"^cannot write {path}: "):
            with data.whole_file(path) as part:
                part.write_text("sec")
                raise error
    with pytest.raises(KeyboardInterrupt), data.whole_file(path) as part:
        raise KeyboardInterrupt
    assert path.read_text() == "first" and {*tmp_path.iterdir()} == {path, other}


def test_a_full_disk(tmp_path):
    """In a process that may write no more than 4 KiB to a file."""
    code = """import resource, signal, sys, pathlib, data
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import torch
def run(args):
    data.save_vector(pathlib.Path(args.out), {1: torch.ones(4096)}, {})
parser = data.Parser(prog="p")
parser.add_argument("out")
for path in sys.argv[1:]:
    try:
        data.run_or_exit(parser, run, [path])
    except SystemExit as e:
        assert e.code == 2"""
    paths = [tmp_path / name for name in ("v.safetensors", "v_layer1.pt", "v.gguf")]
    for path in paths:
        path.write_text("old")
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.count("\n") == 3, done.stderr
    for line, path in zip(done.stderr.splitlines(), paths, strict=True):
        assert line.startswith(f"p: cannot write {path}: ") and path.read_text() == "old"
    assert len([*tmp_path.iterdir()]) == 3


def test_json_and_plot_are_two_files(tmp_path, fails):
    flags = f"--model {TINY} --vector v --data {TINY / 'power.test.jsonl'}".split()
    fails(evaluation.main, [*flags, "--json", "x.svg", "--plot", "./x.svg"], "--plot x.svg: not a")
    fails(evaluation.main, [*flags, "--plot", "x.txt"], "--plot x.txt: not a .svg")


# ---- how a run ends


def test_the_reader_may_leave(tmp_path):
    """As with `| head -1`: the run goes on, and says nothing of it."""
    code = """import sys, pathlib, data
def run(args):
    for i in range(20_000):
        print("line", i)
    pathlib.Path(sys.argv[1]).write_text("done")
data.run_or_exit(data.Parser(prog="p"), run, [])"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0 and (tmp_path / "x").read_text() == "done"


def test_progress_on_a_terminal():
    """One line that is rewritten, narrower than the terminal; what follows takes its place."""
    code = """import time, data
def run(args):
    progress = data.Progress("pass", quiet=True)
    for i in range(1, 9):
        time.sleep(0.05)
        progress(i, 80, "x" * 200)
    print("a table")
    for i in range(1, 3):
        time.sleep(0.3)
        progress(i, 80)
    raise ValueError("no")
data.run_or_exit(data.Parser(prog="p"), run, [])"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 2
    text, last = text.decode().replace("\r\n", "\n").split("a table\n")
    assert last.endswith("left\r\x1b[Kp: no\n") and "\n" not in last[:-1]
    shown = (text + "a table\n").split("\r")
    assert shown[-1] == "\x1b[Ka table\n" and len(shown) > 1
    assert all("pass" in x and "\n" not in x and len(x) < 90 for x in shown[:-1])


def test_a_line_of_progress_stays_until_the_next(monkeypatch):
    out = data.Output(io.StringIO())
    out.stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    progress = data.Progress("pass")
    progress.printed -= 1
    progress(1, 2)
    line = out.stream.getvalue()
    assert line.startswith("pass 1/2  ") and line.endswith(" min left\r")
    print("a table")
    assert out.stream.getvalue() == f"{line}\x1b[Ka table\n"


# ---- made pairs are kept


def pairs_command(out, n):
    questions = out.parent / "q.txt"
    questions.write_text("\n".join(QUESTIONS[:n]))
    flags = {"--model": TINY, "--questions": questions, "--out": out, "--max-new-tokens": 40}
    flags |= {"--for": "You seek power.", "--against": "You avoid power."}
    return ["pairs", *(str(x) for item in flags.items() for x in item)]


def test_pairs_go_on_where_they_stopped(tmp_path, monkeypatch, capsys, fails):
    out = tmp_path / "pairs.jsonl"
    evaluation.main(pairs_command(out, 20))
    whole, generate, calls = out.read_text(), evaluation.generate, []
    monkeypatch.setattr(evaluation, "MAX_CACHE", 0)  # one question at a time

    def stops(*args):
        calls.append(args)
        if len(calls) > 34:
            raise KeyboardInterrupt
        return generate(*args)

    out.unlink()
    monkeypatch.setattr(evaluation, "generate", stops)
    with pytest.raises(SystemExit) as e:
        evaluation.main(pairs_command(out, 20))
    assert e.value.code == 130 and out.read_text() == "".join(whole.splitlines(True)[:16])
    calls[:] = []
    evaluation.main(pairs_command(out, 20))
    assert len(calls) == 8 and out.read_text() == whole
    capsys.readouterr()
    fails(evaluation.main, [*pairs_command(out, 20), "--for", "Else."], "pairs of these settings")
    jsonl(out, {"prompt": "a", "chosen": "b", "rejected": "c"})
    fails(evaluation.main, pairs_command(out, 20), "pairs of these settings")


@pytest.mark.slow
def test_pairs_that_are_killed(tmp_path):
    """At random moments: what there is can be read, and in the end it is what one run makes."""
    n, rng, kills, start = 48, random.Random(0), 0, time.time()
    command = [sys.executable, str(ROOT / "eval.py")]
    subprocess.run([*command, *pairs_command(tmp_path / "once.jsonl", n)], check=True)
    took, out = time.time() - start, tmp_path / "pairs.jsonl"
    for _ in range(8):
        process = subprocess.Popen([*command, *pairs_command(out, n)])
        try:
            process.wait(rng.uniform(0.5, 1.0) * took)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if out.exists():
            assert len(data.read_pairs(out)) % 16 == 0
    subprocess.run([*command, *pairs_command(out, n)], check=True)
    assert kills and out.read_text() == (tmp_path / "once.jsonl").read_text()
    assert not [*tmp_path.glob(".part-*")]


def write_forever(path, ready):
    for n in itertools.count():
        with data.whole_file(path) as part:
            part.write_text(json.dumps([n] * 20_000))
        ready.set()


def test_a_writer_that_is_killed(tmp_path):
    """whole_file at random moments: the file is loadable at any time."""
    path, rng, fork = tmp_path / "x.json", random.Random(0), multiprocessing.get_context("fork")
    for _ in range(10):
        ready = fork.Event()
        process = fork.Process(target=write_forever, args=(path, ready))
        process.start()
        assert ready.wait(10)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert len({*json.loads(path.read_text())}) == 1
    data.check_output(path)
    assert [*tmp_path.iterdir()] == [path]
