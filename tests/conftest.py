import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "experiments")]

import bipo  # noqa: E402
import data  # noqa: E402
import llama  # noqa: E402

# What git leaves of a file that Git LFS holds.
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MINI, TINY = ROOT / "tests" / "golden" / "mini", ROOT / "tests" / "tiny"


# The models here are small: a second thread only waits, and on a busy machine both do.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: seconds, for what seldom breaks; `make test-slow`")


def run_cli(script, *args):
    """A script as a user runs it: (exit code, stdout, stderr)."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def assert_one_line(code, err, *parts):
    """A user error: exit code 2 and one line that holds every part."""
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, (code, err)
    for part in parts:
        assert part in err, (part, err)


def refused(reader, *parts):
    """A ValueError that holds every part, soon."""
    began = time.time()
    with pytest.raises(ValueError) as e:
        reader()
    for part in parts:
        assert part in str(e.value)
    assert time.time() - began < 10


@pytest.fixture(scope="session", autouse=True)
def demo_run(request, tmp_path_factory):
    """(process, its --out) of the demo's first command, if a test waits for it. It takes a minute,
    so it runs beside the other tests, on the other core."""
    if not any(item.name == "test_the_demo" for item in request.session.items):
        yield
        return
    out = tmp_path_factory.mktemp("demo") / "run"
    (command,) = (x for x in (ROOT / "Makefile").read_text().splitlines() if "bipo.py" in x)
    values = {"$(PY)": sys.executable, "runs/$(BEHAVIOUR)": out, "$(BEHAVIOUR)": "power"}
    for name, value in (values | {"$(LAYER)": "3"}).items():
        command = command.replace(name, str(value))
    process = subprocess.Popen(
        command.split(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    yield process, out
    process.kill()


@pytest.fixture
def fails(capsys):
    """Run a script's main with arguments that are wrong; the one line must hold every part."""

    def check(main, args, *parts):
        with pytest.raises(SystemExit) as e:
            main([str(x) for x in args])
        assert_one_line(e.value.code, capsys.readouterr().err, *parts)

    return check


@pytest.fixture
def mini():
    """golden/mini: the frozen model and its chat."""
    model = llama.load(MINI)
    return model, data.open_chat(MINI, model.config)


@pytest.fixture
def mini_pairs(mini):
    """Its training pairs after the first pass, layer 1."""
    model, chat = mini
    ids = [chat.encode_pair(pair) for pair in data.read_pairs(MINI / "train.csv")]
    return bipo.first_pass(model, 1, ids)


@pytest.fixture
def vector():
    """A vector of mini's width that is far from 0."""
    return torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vector_file(tmp_path, vector):
    """That vector at layer 1, as of another model and with its own template and system prompt."""
    metadata = {"base_model": "other", "n_layers": "4", "template": "mistral", "system": "Be odd."}
    data.save_vector(tmp_path / "v.safetensors", {1: vector}, metadata)
    return tmp_path / "v.safetensors"


@pytest.fixture
def model_folder(tmp_path):
    """A copy of golden/mini, to be changed."""
    return shutil.copytree(MINI, tmp_path / "model")


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
