"""Does our vector give our greedy answers in the libraries that people steer with?

    make engines                                   # these and the servers
    python tests/experiments/peers.py [NAME ...]   # some of them

Each library is installed by pip, once, into a virtual environment of its own, runs/engines/NAME.
It runs its lines of PEERS.md, beside this file, on tests/tiny with a vector of `--method gradient`.
The table is printed; if all of them ran, it also goes into PEERS.md. What could not be installed or
run is named in one line, with exit code 2.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from engines import ENGINES, TORCH, call, compare, python_of, table
from real import ROOT, machine, read
from reports import put, python_block

import data
import llama

PAGE = Path("tests/experiments/PEERS.md")
MODEL = "tests/tiny"
PAIRS = f"{MODEL}/power.train.jsonl"
HELD_OUT = f"{MODEL}/power.test.jsonl"
LAYER = 3
VECTOR = ENGINES / "tiny-vector"
MULTIPLIERS = [-2.0, 0.0, 2.0]
N_PROMPTS = 3
N_TOKENS = 40
TOKENIZER = ["sentencepiece==0.2.3", "protobuf"]  # what transformers reads tests/tiny's with


class Peer(NamedTuple):
    """A library, and what its lines in PAGE begin with."""

    package: str
    start: str
    transformers: str = "transformers==5.23.0"


PEERS = {
    "steering-vectors": Peer(
        "steering-vectors==0.12.2", "from steering_vectors import", "transformers==4.57.6"
    ),
    "repeng": Peer("repeng==0.4.0", "from repeng import"),
    "transformer-lens": Peer("transformer-lens==4.3.0", "from transformer_lens."),
    "nnsight": Peer("nnsight==0.8.1", "from nnsight."),
    "pyvene": Peer("pyvene==0.1.8", "import pyvene"),
}

# What comes around the lines of a library, which get a new model each time.
WORK = """
import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(path)
v = load_file(f"{vector}/vector.safetensors")[f"direction.{L}"]
greedy = {"max_new_tokens": n_tokens, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
found = []
for m in multipliers:
    found.append([])
    for prompt in prompts:
        model = AutoModelForCausalLM.from_pretrained(path).float().eval()
        ids = torch.tensor([prompt])
        with torch.no_grad():
            # its lines
        found[-1].append(out[0].tolist()[len(prompt) :])
with open(answers, "w") as file:
    json.dump(found, file)
"""


class Given(NamedTuple):
    """What every library gets, and our answers to it."""

    prompts: list  # their ids
    answers: list  # at each multiplier, the ids of each answer


def prepare():
    """The vector and its GGUF file in VECTOR, and Given."""
    command = [sys.executable, "bipo.py", "--model", MODEL, "--data", PAIRS, "--val", HELD_OUT]
    command += ["--layer", LAYER, "--method", "gradient", "--out", VECTOR, "--overwrite"]
    call("tiny-vector", command)
    steer, metadata = data.load_vector(VECTOR)
    data.save_vector(VECTOR / "vector.gguf", steer, metadata)

    model = llama.load(MODEL)
    chat = data.open_chat(MODEL, model.config)
    pairs = data.read_pairs(HELD_OUT)[:N_PROMPTS]
    prompts = [chat.encode_prompt(pair.prompt) for pair in pairs]
    answers = []
    for m in MULTIPLIERS:
        steered = {LAYER: m * steer[LAYER]}
        answers.append(llama.generate(model, prompts, N_TOKENS, chat.eos_id, steered))
    return Given(prompts, answers)


def ask(name, given):
    """At each multiplier, the ids of a library's answers."""
    peer = PEERS[name]

    def install(pip, python):
        call(name, [*pip, peer.package, peer.transformers, TORCH, *TOKENIZER])

    python = python_of(name, peer.package, install)
    answers = ENGINES / f"{name}.json"
    values = {
        "path": MODEL,
        "vector": str(VECTOR),
        "gguf": str(VECTOR / "vector.gguf"),
        "L": LAYER,
        "multipliers": MULTIPLIERS,
        "prompts": given.prompts,
        "n_tokens": N_TOKENS,
        "answers": str(answers),
    }
    lines = "".join(f"{key} = {value!r}\n" for key, value in values.items())

    # A file, because nnsight reads the text of its `with` blocks.
    recipe = textwrap.indent(python_block(read(PAGE), peer.start), " " * 12)
    program = ENGINES / f"run-{name}.py"
    program.write_text(lines + WORK.replace("            # its lines\n", recipe), encoding="utf-8")
    call(name, [python, program], HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    return json.loads(answers.read_text())


def run_peers(args):
    os.chdir(ROOT)
    ENGINES.mkdir(parents=True, exist_ok=True)
    given = prepare()

    rows = []
    missing = []
    for name in args.names or PEERS:
        try:
            theirs = ask(name, given)
            rows += compare(PEERS[name].package, theirs, given.answers, MULTIPLIERS)
        except (ValueError, OSError, subprocess.CalledProcessError) as e:
            missing.append(f"{name}: {e}")
    if rows:
        print(table(rows))
    data.require(not missing, "; ".join(missing))

    if not args.names:
        text = f"Run on {machine()}, by `make engines`.\n\n{table(rows)}"
        data.write_text(PAGE, put(read(PAGE), "peers", text))


def main(argv=None):
    parser = data.Parser(prog="peers.py", description="Our vector in other libraries.")
    parser.add_argument("names", nargs="*", choices=[*PEERS, []], help="some of them; default: all")
    data.run_or_exit(parser, run_peers, argv)


if __name__ == "__main__":
    main()
