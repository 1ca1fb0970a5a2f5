"""Does the way from pairs to steering work for a new user? A voice of one's own on SmolLM2-135M.

    make persona                                     # under five minutes on two idle cores
    python tests/experiments/persona.py --train      # by BiPO at the layer found: minutes more

An old sailor's voice is set against a plain one: 40 pairs that we wrote by hand, and 20 to measure
with (real/sailor.jsonl, real/sailor_held_out.jsonl). Only the first command is ours. All others
are those that the programs print under "next:", with default flags: bipo.py --layer all names the
layer, eval.py finds the multiplier, and a chat shows how the model then speaks.

Commands and output go to real/persona.txt. The model comes as in real.py.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from real import MODEL, RESULTS, ROOT, have_model, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data

OUT = Path("runs/persona")
PAIRS = RESULTS / "sailor.jsonl"
HELD_OUT = RESULTS / "sailor_held_out.jsonl"
TRANSCRIPT = RESULTS / "persona.txt"
QUESTIONS = ["How was your day?", "What should I cook tonight?", "How do I find a good job?"]


def show(command, typed=()):
    """Run a command, a list of words, print what it prints, and return that below the command.
    Raises ValueError if it fails."""
    line = f"$ {shlex.join(command)}\n"
    print(line, end="", flush=True)
    began = time.time()
    words = [sys.executable, "-u", *command[1:]]
    keyboard = "".join(f"{text}\n" for text in typed)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, text=True, encoding="utf-8", **pipes) as program:
        program.stdin.write(keyboard)
        program.stdin.close()
        printed = []
        for row in program.stdout:
            print(row, end="", flush=True)
            printed.append(row)
    output = "".join(printed)
    last = output.strip().rpartition("\n")[2]
    data.require(not program.returncode, f"{command[1]} failed: {last}")
    return f"{line}{with_typed(output, typed)}\n(took {time.time() - began:.0f} s)\n\n"


def with_typed(output, typed):
    """What a terminal shows: each text that was typed stands after the chat's prompt for it."""
    place = 0
    for text in typed:
        end = output.find("> ", place) + 2
        output = f"{output[:end]}{text}\n{output[end:]}"
        place = end + len(text)
    return output


def next_command(shown):
    """The words of the last command that was printed to go on with. Raises ValueError for none."""
    found = re.findall(r"^next: (python .+)$", shown, re.MULTILINE)
    data.require(found, f"no next command in: {shown[-300:]}")
    return shlex.split(found[-1])


def pairs_to_chat(train):
    """Yields what each of the programs shows, from the pairs to the chat."""
    files = ["--model", str(MODEL), "--data", str(PAIRS), "--val", str(HELD_OUT)]
    learn = ["python", "bipo.py", *files, "--overwrite"]
    shown = show([*learn, "--method", "gradient", "--layer", "all", "--out", str(OUT / "layers")])
    yield shown

    if train:
        measure = next_command(shown)
        layer = measure[measure.index("--layer") + 1]
        shown = show([*learn, "--layer", layer, "--out", str(OUT / "trained")])
        yield shown

    shown = show(next_command(shown))
    yield shown
    yield show(next_command(shown), QUESTIONS)


def run(args):
    os.chdir(ROOT)
    have_model()
    began = time.time()
    parts = list(pairs_to_chat(args.train))
    minutes = (time.time() - began) / 60
    parts.append(f"{minutes:.1f} min in all, on {machine()}\n")
    data.write_text(TRANSCRIPT, "".join(parts))
    print(parts[-1], end="")
    print(f"saved {TRANSCRIPT}")


def main(argv=None):
    parser = data.Parser(prog="persona.py", description="From own pairs to a model that speaks so.")
    help_train = "train at the best layer too, by BiPO, instead of taking the vector of one pass"
    parser.add_argument("--train", action="store_true", help=help_train)
    data.run_or_exit(parser, run, argv)


if __name__ == "__main__":
    main()
