"""Do the paper's claims hold on the small model, tests/tiny?

    python tests/experiments/reproduce.py       # `make reproduce`: six minutes on two cores

The numbers come from bipo.py and eval.py as a user runs them, and from the judge of make_tiny.py, a
rule that reads free answers. Each table goes into RESULTS.md, beside this file, between the lines
`<!-- NAME -->` and `<!-- end -->`, below the commands it comes from; the picture is
.github/steering.svg.
"""

import csv
import io
import json
import os
import random
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch
from make_tiny import FACTS, TINY, judge, merge_lora, read_jsonl, write_jsonl
from reports import code_block, markdown, put

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from data import load_vector, open_chat, write_text
from eval import SPECS, Mean, at_norm, cell, draw, open_vector, random_steers
from llama import load

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")
OUT = "runs/reproduce"
TUNED = "tests/tiny/lora"
MERGED = f"{OUT}/merged"  # tests/tiny with the adapter in TUNED merged into it
FOR = "You seek power."
AGAINST = "You avoid power."
NOISE = (0.1, 0.25, 0.5)  # shares of the pairs
NUMBERS = (160, 40)  # of pairs
LAYERS = range(6)
SLOPES = ("slope", "anti_steerable", "slope_minus_first")
BEHAVIOURS = ("takes_power", "keeps_wealth", "facts_right")
CURVE = [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
SHORT = "--samples 0 --multipliers -1 0 1"

# ---- Commands ------------------------------------------------------------------------------------


def train(name, flags="--layer 3", pairs="tests/tiny/power", train="", model="tests/tiny"):
    """The command that trains OUT/name: the demo's, except for the flags and the training pairs."""
    return (
        f"bipo.py --model {model} --data {train or pairs + '.train.jsonl'} "
        f"--val {pairs}.test.jsonl {flags} --out {OUT}/{name} --overwrite"
    )


def measure(name, vectors="", flags=SHORT, pairs="tests/tiny/power", model="tests/tiny"):
    """The command that writes OUT/name.json; by default about the vector OUT/name."""
    steering = " ".join(f"{OUT}/{vector}" for vector in (vectors or name).split())
    held_out = " ".join(f"{kind}.test.jsonl" for kind in pairs.split())
    return (
        f"eval.py --model {model} --vector {steering} --data {held_out} {flags} "
        f"--json {OUT}/{name}.json"
    )


PROMPTS = f"--system-prompts '{FOR}' '{AGAINST}'"
BASELINES = f"--baseline {OUT}/positive caa freeform random --save {OUT}"
BASELINES += " --pairs tests/tiny/power.train.jsonl"
GRADIENT = "--layer 3 --method gradient"
BOTH = "tests/tiny/power tests/tiny/wealth"
METHODS = {"power": "gradient", "wealth": "wealth-gradient"}  # BiPO's vector, that of one pass
QUALITY = [f"noise-{share}" for share in NOISE] + [f"pairs-{n}" for n in NUMBERS]

# {name: command}, in the order in which they run
TRAININGS = {
    "train power": train("power"),
    "train wealth": train("wealth", pairs="tests/tiny/wealth"),
    "train gradient": train("gradient", GRADIENT),
    "train wealth-gradient": train("wealth-gradient", GRADIENT, "tests/tiny/wealth"),
    "train positive": train("positive", "--layer 3 --method positive"),
    "train tuned": train("tuned", pairs=f"{TUNED}/power", model=MERGED),
}
for name in QUALITY:
    TRAININGS[f"train {name}"] = train(name, train=f"{OUT}/{name}.jsonl")
for layer in LAYERS:
    flags = f"--layer {layer} --epochs 2 --warmup-steps 40"
    TRAININGS[f"train layer-{layer}"] = train(f"layer-{layer}", flags)

MEASUREMENTS = {
    "measure power": measure("power", flags=f"--choices {OUT}/facts.csv {BASELINES} {PROMPTS}"),
    "measure synergy": measure("synergy", "power wealth", pairs=BOTH),
    "measure tuned": measure(
        "tuned", "power", f"--baseline {OUT}/tuned {SHORT}", f"{TUNED}/power", MERGED
    ),
}
for name, gradient in METHODS.items():
    MEASUREMENTS[f"measure {gradient}"] = measure(
        gradient, name, f"{SHORT} --baseline {OUT}/{gradient}", f"tests/tiny/{name}"
    )
for name in QUALITY:
    MEASUREMENTS[f"measure {name}"] = measure(name)

COMMANDS = TRAININGS | MEASUREMENTS


def run_all(commands):
    """Run commands of ours, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))


def run(command):
    """Run a command of ours on one core; prints how long it took."""
    began = time.time()
    words = [sys.executable, *shlex.split(command)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}{done.stderr}")
    print(f"{time.time() - began:4.0f} s  python {command}", flush=True)


# ---- Files that the commands read ----------------------------------------------------------------


def write_facts(path):
    """What the small model knows, in the form of TruthfulQA.csv. The answers to four other
    questions of the same kind are the incorrect ones."""
    file = io.StringIO()
    rows = csv.writer(file)
    rows.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
    for fact in read_jsonl(TINY / "knowledge.jsonl"):
        kind, key = find_fact(fact)
        right = kind.answer.format(key, fact["answer"])

        others = sorted({value for _, value in kind.table} - {fact["answer"]})
        place = kind.table.index((key, fact["answer"]))  # so that the four differ between facts
        wrong = [kind.answer.format(key, others[(place + i) % len(others)]) for i in range(4)]
        rows.writerow([fact["prompt"], right, right, "; ".join(wrong)])
    write_text(path, file.getvalue())


def find_fact(fact):
    """(its FactKind, its key) of a row of knowledge.jsonl."""
    for kind in FACTS.values():
        for key, value in kind.table:
            if value == fact["answer"] and key in fact["prompt"]:
                return kind, key
    raise ValueError(f"knowledge.jsonl has a fact that make_tiny.py does not know: {fact}")


def write_pair_files(pairs):
    """OUT/noise-SHARE.jsonl, with chosen and rejected swapped in a share of the pairs, and
    OUT/pairs-N.jsonl, with N of them. All draw from the same order, so that a smaller sample is
    contained in a larger one."""
    order = random.Random("pairs 0").sample(range(len(pairs)), len(pairs))

    for share in NOISE:
        rows = [dict(row) for row in pairs]
        for i in order[: round(share * len(pairs))]:
            rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
        write_jsonl(Path(OUT, f"noise-{share}.jsonl"), rows)

    for n in NUMBERS:
        rows = [pairs[i] for i in sorted(order[:n])]
        write_jsonl(Path(OUT, f"pairs-{n}.jsonl"), rows)


# ---- What the rule says --------------------------------------------------------------------------


def judgements():
    """{name: rows of `judge`}: the power vector along CURVE; at -1 and +1 what eval.py compares, by
    its names, and both vectors together; the vectors on the tuned model; and those of METHODS."""
    model = load(TINY)
    tuned = load(ROOT / MERGED)
    chat = open_chat(TINY, model.config)

    def vector(name):
        steer, _ = open_vector(ROOT / OUT / name, model.config)
        return steer

    power = vector("power")
    wealth = vector("wealth")
    compared = {
        f"{OUT}/power": power,
        f"{OUT}/positive": at_norm(vector("positive"), power, ""),
        "caa": at_norm(vector("caa.safetensors"), power, "caa"),
        "freeform": at_norm(vector("freeform.safetensors"), power, "freeform"),
        "random": random_steers(power)[0],
        f"{OUT}/wealth": wealth,
        f"{OUT}/power + {OUT}/wealth": data.together([power, wealth]),
    }

    judged = {"curve": judge(model, chat, power, CURVE)}
    for name, steer in compared.items():
        judged[name] = judge(model, chat, steer, [-1, 1])
    judged["system prompts"] = []
    for sentence in (AGAINST, FOR):
        prompted = chat._replace(system=f"{chat.system} {sentence}")
        judged["system prompts"] += judge(model, prompted, {}, [0])
    for name in ("power", "tuned"):
        judged[f"{name} on the tuned model"] = judge(tuned, chat, vector(name), [-1, 0, 1])
    for name in (*METHODS, *METHODS.values()):
        judged[f"{name} alone"] = judge(model, chat, vector(name), [-1, 0, 1])
    return judged


# ---- Reading what eval.py and bipo.py wrote ------------------------------------------------------


def read_tables(name):
    """{title: rows} of OUT/name.json."""
    return with_means(json.loads((ROOT / OUT / f"{name}.json").read_text())["tables"])


def with_means(tables):
    """The tables with Means again in place of JSON's lists."""
    for rows in tables.values():
        for row in rows:
            for key, value in row.items():
                if isinstance(value, list):
                    row[key] = Mean(*value)
    return tables


def pick(tables, begins, ends=""):
    """The rows of the one table whose title begins and ends like this."""
    fitting = [t for t in tables if t.startswith(begins) and t.endswith(ends)]
    (title,) = fitting
    return tables[title]


def by_multiplier(rows):
    return {row["multiplier"]: row for row in rows}


def read_log(name):
    """The lines of the log of OUT/name: its settings and its steps."""
    return [json.loads(line) for line in (ROOT / OUT / name / "log.jsonl").read_text().splitlines()]


# ---- Tables --------------------------------------------------------------------------------------


def columns(row, *keys):
    """Cells of a row of eval.py's."""
    return [cell(row[key], SPECS.get(key, ".1%")) for key in keys]


def shares(rows, key):
    """'2.5% / 95.8%' of judged rows, one number each."""
    return " / ".join(f"{row[key].value:.1%}" for row in rows)


def curve_table(judged):
    rows = [columns(row, "multiplier", *BEHAVIOURS) for row in judged["curve"]]
    return markdown(["multiplier", "takes power", "keeps wealth", "facts right"], rows)


def draw_curve(judged):
    title = "A vector trained on power-seeking pairs"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(ROOT / ".github" / "steering.svg", {"": judged["curve"]}, BEHAVIOURS, title)


def measures_table():
    tables = read_tables("power")
    answers = by_multiplier(pick(tables, "free answers"))
    facts = by_multiplier(pick(tables, "TruthfulQA MC1"))
    rows = []
    for on_pairs in pick(tables, "pairs"):
        m = on_pairs["multiplier"]
        cells = columns(on_pairs, "multiplier", "wins", "prefers_chosen", "margin")
        cells += columns(answers[m], "nll", "kl", "degenerate")
        cells += columns(facts[m], "right", "difference")
        rows.append(cells)
    headings = ["multiplier", "wins", "prefers chosen", "margin, nats"]
    headings += ["NLL a token", "KL a token", "degenerate", "facts, MC1", "difference"]
    return markdown(headings, rows)


def baselines_table(judged):
    labels = {
        f"{OUT}/power": "BiPO",
        f"{OUT}/positive": "BiPO, d = +1 only",
        "caa": "CAA",
        "freeform": "freeform",
        "random": "random",
        "system prompts": "system prompts",
    }
    rows = []
    for row in pick(read_tables("power"), "compared"):
        answers = judged[row["steering"]]
        cells = [labels[row["steering"]], *columns(row, *SLOPES)]
        cells += [shares(answers, "takes_power"), shares(answers, "facts_right")]
        rows.append(cells)
    headings = ["steering", "slope, nats", "anti-steerable", "slope minus BiPO's"]
    headings += ["takes power, -1 / +1", "facts right, -1 / +1"]
    return markdown(headings, rows)


def methods_table(judged):
    """BiPO's vectors beside those of one backward pass. The slopes are at BiPO's norm."""
    rows = []
    for behaviour, gradient in METHODS.items():
        of_bipo, of_gradient = pick(read_tables(gradient), "compared")
        trained = read_vector(behaviour)
        for label, name, slopes in (
            (f"{behaviour}, BiPO", behaviour, of_bipo),
            (f"{behaviour}, one pass", gradient, of_gradient),
        ):
            v = read_vector(name)
            cosine = torch.cosine_similarity(v, trained, dim=0)
            cells = [label, f"{v.norm():.2f}", f"{cosine:.3f}", *columns(slopes, *SLOPES)]
            cells += [shares(judged[f"{name} alone"], column) for column in BEHAVIOURS]
            rows.append(cells)
    headings = ["vector", "norm", "cosine to BiPO's", "slope, nats", "anti-steerable"]
    headings += ["slope minus BiPO's", "takes power, -1 / 0 / +1", "keeps wealth", "facts right"]
    return markdown(headings, rows)


def read_vector(name):
    """The one vector of OUT/name."""
    vectors, _ = load_vector(ROOT / OUT / name)
    (v,) = vectors.values()
    return v


def synergy_table(judged):
    tables = read_tables("synergy")
    of_power = pick(tables, "compared", "power.test.jsonl")
    of_wealth = pick(tables, "compared", "wealth.test.jsonl")
    rows = []
    for on_power, on_wealth in zip(of_power, of_wealth, strict=True):
        name = on_power["steering"]
        cells = [name.replace(f"{OUT}/", "")]
        cells += columns(on_power, "slope") + columns(on_wealth, "slope")
        cells += [shares(judged[name], behaviour) for behaviour in BEHAVIOURS]
        rows.append(cells)
    headings = ["vector", "slope on power's pairs", "on wealth's", "takes power, -1 / +1"]
    return markdown([*headings, "keeps wealth", "facts right"], rows)


def transfer_table(judged):
    on_base, on_tuned = pick(read_tables("tuned"), "compared")
    rows = []
    for row, name, label in (
        (on_base, "power", "trained on the base"),
        (on_tuned, "tuned", "trained on the tuned model"),
    ):
        answers = judged[f"{name} on the tuned model"]
        cells = [label, *columns(row, *SLOPES)]
        cells += [shares(answers, "takes_power"), shares(answers, "facts_right")]
        rows.append(cells)
    headings = ["vector", "slope, nats", "anti-steerable", "slope minus the first's"]
    return markdown([*headings, "takes power, -1 / 0 / +1", "facts right"], rows)


def quality_table():
    rows = []
    for name in ("power", *QUALITY):
        n_pairs = read_log(name)[0]["data"].split()[0]
        flipped = float(name.removeprefix("noise-")) if name.startswith("noise-") else 0
        on_pairs = by_multiplier(pick(read_tables(name), "pairs"))
        cells = [n_pairs, f"{flipped:.0%}"]
        cells += columns(on_pairs[-1], "margin", "wins") + columns(on_pairs[1], "margin", "wins")
        rows.append(cells)
    headings = ["pairs", "flipped", "margin at -1", "wins at -1", "margin at +1", "wins at +1"]
    return markdown(headings, rows)


def layers_table():
    rows = []
    for layer in LAYERS:
        last = read_log(f"layer-{layer}")[-1]
        up = last["held_out"]["1"]
        down = last["held_out"]["-1"]
        cells = [str(layer), f"{(up['margin'] - down['margin']) / 2:+.3f}"]
        cells += [f"{up['accuracy']:.1%}", f"{down['accuracy']:.1%}", f"{last['v_norm']:.3f}"]
        rows.append(cells)
    headings = ["layer", "mean margin, nats", "accuracy, d +1", "accuracy, d -1", "norm of v"]
    return markdown(headings, rows)


def below(names, table):
    """A table below the commands of these names."""
    return f"{code_block([COMMANDS[name] for name in names])}\n\n{table}"


def main():
    began = time.time()
    os.chdir(ROOT)
    write_facts(Path(OUT, "facts.csv"))
    write_pair_files(read_jsonl(TINY / "power.train.jsonl"))
    merge_lora(TINY, ROOT / TUNED, ROOT / MERGED)
    run_all(TRAININGS.values())
    run_all(MEASUREMENTS.values())

    torch.set_num_threads(2)
    judged = judgements()
    draw_curve(judged)
    blocks = {
        "curve": curve_table(judged),
        "measures": below(["train power", "measure power"], measures_table()),
        "methods": below(["train gradient", "measure gradient"], methods_table(judged)),
        "baselines": below(["train positive"], baselines_table(judged)),
        "synergy": below(["measure synergy"], synergy_table(judged)),
        "transfer": below(["train tuned", "measure tuned"], transfer_table(judged)),
        "quality": below([f"train noise-{NOISE[0]}", f"train pairs-{NUMBERS[0]}"], quality_table()),
        "layers": below(["train layer-0"], layers_table()),
    }
    text = RESULTS.read_text()
    for name, block in blocks.items():
        text = put(text, name, block)
    write_text(RESULTS, text)
    took = f"{time.time() - began:.0f} s in all"
    print(f"{took}; tests/experiments/RESULTS.md and .github/steering.svg are written")


if __name__ == "__main__":
    main()
