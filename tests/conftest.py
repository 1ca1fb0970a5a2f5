"""What several test files share: folders and flags, small helpers, fixtures."""

import json
import os
import shutil
import signal
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

MINI = ROOT / "tests" / "golden" / "mini"
TINY = ROOT / "tests" / "tiny"

# The flags of bipo.py for training on golden/mini.
MINI_SETS = ("--model", MINI, "--data", MINI / "train.csv", "--val", MINI / "test.csv")

# Questions of MMLU: text, four answers, the letter of the right one.
MMLU = '"Two, and ""two""?",1,2,4,8,C\nRed?,yes,no,maybe,"a, b",A\n'

# What git leaves of a file that Git LFS holds.
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

# The models here are small: a second thread only waits, and on a busy machine both do.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What a shell starts in the background ignores Ctrl-C, and so would what is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: seconds, for what seldom breaks; `make test-slow`")


# ---- helpers


def run_main(main, *args):
    """Run a program in this process: run_main(bipo.main, "--model", MINI, ...)."""
    main([str(x) for x in args])


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def messages(turns):
    """Turns (role, text) as files have them."""
    return [{"role": role, "content": text} for role, text in turns]


def tokens_of(*shape):
    """Token ids that every model here knows, the same at each call."""
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(0))


def logps_of(model, prompt, response, steer):
    """The log-probs at each token of the response, (len(response), vocab_size), by one forward pass
    over one sequence without packing."""
    tokens = torch.tensor([prompt + response])
    return model(tokens, steer=steer).log_softmax(-1)[0, len(prompt) - 1 : -1]


def logp(model, prompt, response, steer):
    """The log-prob of the response, summed over its tokens."""
    rows = logps_of(model, prompt, response, steer)
    return rows.gather(-1, torch.tensor(response)[:, None]).sum().item()


def refused(reader, *parts):
    """A ValueError that holds every part, within ten seconds."""
    began = time.time()
    with pytest.raises(ValueError) as e:
        reader()
    for part in parts:
        assert part in str(e.value)
    assert time.time() - began < 10


def assert_one_line(code, err, *parts):
    """A user error: exit code 2 and one line that holds every part."""
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, (code, err)
    for part in parts:
        assert part in err, (part, err)


@pytest.fixture
def fails(capsys):
    """Run a program's main with arguments that are wrong; the one line must hold every part."""

    def check(main, args, *parts):
        with pytest.raises(SystemExit) as e:
            run_main(main, *args)
        assert_one_line(e.value.code, capsys.readouterr().err, *parts)

    return check


# ---- golden/mini


@pytest.fixture(scope="session")
def mini():
    """The frozen model and its chat. All tests share them: who changes something undoes it."""
    model = llama.load(MINI)
    return model, data.open_chat(MINI, model.config)


@pytest.fixture(scope="session")
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
def model_folder(tmp_path):
    """A copy of its folder, to be changed."""
    return shutil.copytree(MINI, tmp_path / "model")
