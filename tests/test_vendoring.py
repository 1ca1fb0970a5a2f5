"""The files copied elsewhere, as README says, run alone and train the same vector."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import MINI, ROOT

import llama
from bipo import Recipe, first_pass, train
from llama import PairIds

VENDORED = """\
import sys
import torch
from bipo import Recipe, first_pass, train
from llama import PairIds, load

torch.set_num_threads(1)
model = load(sys.argv[1])
ids = [PairIds([1, 5, 9], [7, 8, 2], [30, 2]), PairIds([1, 60], [70, 2], [80, 90, 2])]
pairs = first_pass(model, 1, ids)
*_, last = train(model, 1, pairs, pairs, Recipe(epochs=3, warmup_steps=0, batch_size=1))
torch.save(last.v, "v.pt")
assert "data" not in sys.modules
"""


def test_two_files_in_an_empty_folder_train_the_same_vector(tmp_path):
    for name in ("bipo.py", "llama.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-c", VENDORED, str(MINI)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = [PairIds([1, 5, 9], [7, 8, 2], [30, 2]), PairIds([1, 60], [70, 2], [80, 90, 2])]
    model = llama.load(MINI)
    pairs = first_pass(model, 1, ids)
    *_, last = train(model, 1, pairs, pairs, Recipe(epochs=3, warmup_steps=0, batch_size=1))
    assert last.v.norm() > 0
    assert torch.equal(torch.load(tmp_path / "v.pt"), last.v)


@pytest.mark.slow
def test_copied_files_run_alone(tmp_path):
    """First llama.py, then data.py and bipo.py beside it, with nothing else of ours to import."""
    (tmp_path / "use.py").write_text(
        f"""
import importlib, shutil, sys

def copy(name):
    shutil.copy({str(ROOT)!r} + "/" + name, {str(tmp_path)!r})
    importlib.invalidate_caches()

copy("llama.py")
import torch, llama
model = llama.load({str(MINI)!r})
assert len(llama.generate(model, [[1, 5, 6]], 4, -1, steer={{1: torch.ones(32)}})[0]) == 4
assert "sentencepiece" not in sys.modules

copy("data.py"), copy("bipo.py")
import bipo, data
chat = data.open_chat({str(MINI)!r}, model.config)
ids = [chat.encode_pair(pair) for pair in data.read_pairs({str(MINI / "train.csv")!r})]
*_, last = bipo.train(model, 1, bipo.first_pass(model, 1, ids), [], bipo.Recipe(epochs=1))
data.save_vector("v.gguf", {{1: last.v}}, {{}})
assert list(data.load_vector("v.gguf")[0]) == [1]
print(*(module.__file__ for module in (llama, data, bipo)))
"""
    )
    command = [sys.executable, "-E", "-s", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    files = [str(tmp_path / name) for name in ("llama.py", "data.py", "bipo.py")]
    assert (done.stdout.splitlines()[-1].split(), done.stderr) == (files, "")
