"""What is written appears whole or not at all, and how a run ends."""

import io
import itertools
import json
import multiprocessing
import os
import pty
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, names_in

import data
import eval as evaluation
from data import Progress, check_output, pick_device


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


@pytest.fixture
def small_disk():
    """This process may write no more than 4 KiB to a file."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["v.safetensors", "v_layer1.pt", "v.gguf"])
def test_a_full_disk(tmp_path, small_disk, fails, name):
    path = tmp_path / name
    path.write_text("old")

    def save(argv):
        vectors = {1: torch.ones(4096)}
        data.run_or_exit(data.Parser(), lambda _: data.save_vector(path, vectors, {}), argv)

    fails(save, [], f"cannot write {path}: ")
    assert path.read_text() == "old" and names_in(tmp_path) == [name]


def test_json_and_plot_are_two_files(tmp_path, fails):
    flags = f"--model {TINY} --vector v --data {TINY / 'power.test.jsonl'}".split()
    fails(evaluation.main, [*flags, "--json", "x.svg", "--plot", "./x.svg"], "--plot x.svg: not a")
    fails(evaluation.main, [*flags, "--plot", "x.txt"], "--plot x.txt: not a .svg")


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


def test_folders_are_made_and_files_in_the_way_refused_before_long_work(tmp_path):
    check_output(tmp_path / "new" / "file")
    assert [*tmp_path.rglob("*")] == [tmp_path / "new"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*x: "):
        check_output(tmp_path / "file" / "x")


# ---- how a run ends


def test_the_reader_may_leave(tmp_path):
    """As with `| head -1`: the run ends, and says nothing of it."""
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
    assert process.returncode == 141 and not (tmp_path / "x").exists()


def test_a_reader_that_leaves_before_the_last_lines():
    """They are written when the run has ended, and nothing is said of them either."""
    code = """import sys, data
def run(args):
    sys.stdin.readline()
    print("the end")
data.run_or_exit(data.Parser(prog="p"), run, [])"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_lacks_a_character_gets_an_escape(encoding):
    code = """import data
def run(args):
    print("Да 😀 é")
    raise ValueError("нет")
data.run_or_exit(data.Parser(prog="p"), run, [])"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": encoding}, encoding=encoding,
    )  # fmt: skip
    accent = "\\xe9" if encoding == "ascii" else "é"
    assert done.stdout == f"\\u0414\\u0430 \\U0001f600 {accent}\n"
    assert (done.returncode, done.stderr) == (2, "p: \\u043d\\u0435\\u0442\n")


@pytest.mark.parametrize(
    ("where", "code", "err"), [(">&-", 0, ""), ("> /dev/full", 2, "p: [Errno 28] No space left")]
)
def test_standard_output_that_is_closed_or_full(where, code, err):
    program = "import data; data.run_or_exit(data.Parser(prog='p'), lambda args: print('x'), [])"
    line = f'{sys.executable} -c "{program}" {where}'
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(err)
    assert done.stderr.count("\n") == bool(err)


def test_nesting_that_is_too_deep_is_one_line(fails):
    def endless(args):
        endless(args)

    fails(
        lambda argv: data.run_or_exit(data.Parser(prog="p"), endless, argv),
        [],
        "p: what is read is nested too",
    )


def test_a_program_may_run_beside_the_main_thread(fails):
    def broken(args):
        raise ValueError("no")

    def in_a_thread(argv):
        ended = []

        def call():
            try:
                data.run_or_exit(data.Parser(prog="p"), broken, argv)
            except SystemExit as e:
                ended.append(e)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        raise ended[0]

    fails(in_a_thread, [], "p: no")


def test_progress_on_a_terminal(monkeypatch):
    """One line that is rewritten, narrower than the terminal; what follows takes its place."""
    ours, theirs = pty.openpty()
    terminal = open(theirs, "w")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")

    def run(args):
        progress = Progress("pass", quiet=True)
        for i in range(1, 9):
            time.sleep(0.05)
            progress(i, 80, "x" * 200)
        data.clear_line()
        print("a table")
        for i in range(1, 3):
            time.sleep(0.3)
            progress(i, 80)
        raise ValueError("no")

    with pytest.raises(SystemExit):
        data.run_or_exit(data.Parser(prog="p"), run, [])
    terminal.close()
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # the other end is closed
        os.close(ours)
    text, last = text.decode().replace("\r\n", "\n").split("a table\n")
    assert last.endswith("left\r\x1b[Kp: no\n") and "\n" not in last[:-1]
    *lines, cleared = text.split("\r")
    assert cleared == "\x1b[K" and len(lines) > 1
    assert all(x.startswith("\x1b[Kpass") and "\n" not in x and len(x) < 90 for x in lines)


@pytest.mark.parametrize("quiet", [False, True])
def test_the_last_line_of_progress_stays_unless_it_is_quiet(monkeypatch, quiet):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress("pass", quiet)
    progress.printed -= 1
    progress(1, 2)
    first = terminal.getvalue()
    assert first.startswith("\x1b[Kpass 1/2  ") and first.endswith(" s left\r")
    progress(2, 2)
    rest = terminal.getvalue().removeprefix(first)
    assert rest == "\x1b[K" if quiet else rest.startswith("\x1b[Kpass 2/2") and rest[-1] == "\n"


def test_progress(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("data.time.time", lambda: now[0])
    progress = Progress("step")
    for now[0], done in ((1, 1), (6, 1), (7, 2), (35, 5), (37, 6), (38, 10)):
        progress(done, 10, "loss 1")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/10  6000.0 ms each, 54 s left  loss 1",  # how long it will take, at once
        "step 5/10  7000.0 ms each, 35 s left  loss 1",  # then ever more seldom
        "step 10/10  3800.0 ms each, 0 s left  loss 1",
    ]
    now[0] = 0.0
    progress = Progress("pass", quiet=True)
    now[0] = 1.0
    progress(10, 10)
    assert capsys.readouterr().out == ""  # it took no time


def test_16_bits_on_a_cpu_without_them_are_noted(capsys, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for dtype in ("bfloat16", "float16"):
        assert pick_device("cpu", dtype) == (torch.device("cpu"), getattr(torch, dtype))
        note = f"note: this CPU has no {dtype} arithmetic and is much faster in float32\n"
        assert capsys.readouterr().out == note
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    pick_device("cpu", "bfloat16")
    assert pick_device("cpu", None)[1] == torch.float32
    pick_device("meta", "float16")  # which is no CPU
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="--device cuda:77 is not there: "):
        pick_device("cuda:77", None)
