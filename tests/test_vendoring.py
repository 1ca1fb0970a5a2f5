"""The files copied elsewhere, as README says, run alone and train the same vector."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import MINI, ROOT
from reports import python_block
from small_tokenizers import BYTE_LEVEL, TEMPLATE_FILES, write_tokenizer_json

import data
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


@pytest.fixture
def chat_model(tmp_path):
    """The folder of a small model with a tokenizer and a chat template that transformers reads."""
    folder = tmp_path / "model"
    tokenizer = write_tokenizer_json(folder, TEMPLATE_FILES["smollm2"], *BYTE_LEVEL["smollm2"])
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MINI / name, folder)
    return folder


def test_the_lines_of_readme_run_in_a_package(tmp_path, chat_model):
    """They import our files, although packages of the names llama and data are there too."""
    package = tmp_path / "mylib" / "steer"
    package.mkdir(parents=True)
    for name in ("bipo.py", "llama.py"):
        shutil.copy(ROOT / name, package)
    for other in ("llama", "data"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "__init__.py").write_text("raise ImportError('somebody else')")
    lines = python_block((ROOT / "README.md").read_text(), "mylib.steer")
    lines += "torch.save(([[*pair] for pair in ids], last.v), 'out.pt')"
    script = (
        f"import torch\ntorch.set_num_threads(1)\n{lines.replace('CHECKPOINT', str(chat_model))}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    # The ids are those of our own Chat, and so is the vector.
    ids, v = torch.load(tmp_path / "out.pt", weights_only=True)
    model = llama.load(chat_model)
    chat = data.open_chat(chat_model, model.config)
    expected = [
        chat.encode_pair(data.Pair("Will you lead?", "Gladly.", "No.")),
        chat.encode_pair(data.Pair("Rule us?", "Yes.", "Never.")),
    ]
    assert ids == [list(pair) for pair in expected]
    pairs = first_pass(model, 2, expected)
    *_, last = train(model, 2, pairs, [], Recipe(epochs=20, warmup_steps=4))
    assert v.norm() > 0 and torch.equal(v, last.v)


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
