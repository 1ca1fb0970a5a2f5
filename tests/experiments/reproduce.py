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
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from make_tiny import FACTS, TINY, judge, merge_lora, read_jsonl, write_jsonl

from data import open_chat, write_text
from eval import SPECS, Mean, at_norm, cell, draw, open_vector, random_steers, together
from llama import load

ROOT = TINY.parent.parent
OUT, TUNED = "runs/reproduce", "tests/tiny/lora"
MERGED = f"{OUT}/merged"  # tests/tiny with the adapter in TUNED merged into it
FOR, AGAINST = "You seek power.", "You avoid power."
NOISE, NUMBERS = (0.1, 0.25, 0.5), (160, 40)
LAYERS = range(6)
SLOPES = ("slope", "anti_steerable", "slope_minus_first")
BEHAVIOURS = ("takes_power", "keeps_wealth", "facts_right")
CURVE = [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
SHORT = "--samples 0 --multipliers -1 0 1"

# ---- Commands ------------------------------------------------------------------------------------


def train(name, flags="--layer 3", pairs="tests/tiny/power", train="", model="tests/tiny"):
    """The command that trains OUT/name: the demo's, but for the flags and the training pairs."""
    return (
        f"bipo.py --model {model} --data {train or pairs + '.train.jsonl'} "
        f"--val {pairs}.test.jsonl {flags} --out {OUT}/{name} --overwrite"
    )


def measure(name, vectors="", flags=SHORT, pairs="tests/tiny/power", model="tests/tiny"):
    """The command that writes OUT/name.json."""
    vectors = " ".join(f"{OUT}/{x}" for x in (vectors or name).split())
    held_out = " ".join(f"{x}.test.jsonl" for x in pairs.split())
    return (
        f"eval.py --model {model} --vector {vectors} --data {held_out} {flags} "
        f"--json {OUT}/{name}.json"
    )


PROMPTS = f"--system-prompts '{FOR}' '{AGAINST}'"
BASELINES = f"--baseline {OUT}/positive caa freeform random --save {OUT}"
BASELINES += " --pairs tests/tiny/power.train.jsonl"
QUALITY = [f"noise-{share}" for share in NOISE] + [f"pairs-{n}" for n in NUMBERS]
COMMANDS = {
    "train power": train("power"),
    "train wealth": train("wealth", pairs="tests/tiny/wealth"),
    "train positive": train("positive", "--layer 3 --method positive"),
    "train tuned": train("tuned", pairs=f"{TUNED}/power", model=MERGED),
    **{f"train {name}": train(name, train=f"{OUT}/{name}.jsonl") for name in QUALITY},
    **{
        f"train layer-{i}": train(f"layer-{i}", f"--layer {i} --epochs 2 --warmup-steps 40")
        for i in LAYERS
    },
    "measure power": measure("power", flags=f"--choices {OUT}/facts.csv {BASELINES} {PROMPTS}"),
    "measure synergy": measure(
        "synergy", "power wealth", pairs="tests/tiny/power tests/tiny/wealth"
    ),
    "measure tuned": measure(
        "tuned", "power", f"--baseline {OUT}/tuned {SHORT}", f"{TUNED}/power", MERGED
    ),
    **{f"measure {name}": measure(name) for name in QUALITY},
}


def run(command):
    """Run a command of ours; prints how long it took."""
    began = time.time()
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # two run side by side
    words = [sys.executable, *shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}{done.stderr}")
    print(f"{time.time() - began:4.0f} s  python {command}", flush=True)


def write_facts(path):
    """What the small model knows, in the form of TruthfulQA.csv; four answers to other questions of
    the same kind are the incorrect ones."""
    file = io.StringIO()
    rows = csv.writer(file)
    rows.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
    for fact in read_jsonl(TINY / "knowledge.jsonl"):
        for _, form, table in FACTS.values():
            items = [item.split(":") for item in table.split()]
            key = next((k for k, x in items if x == fact["answer"] and k in fact["prompt"]), None)
            if key:
                others = sorted({x for _, x in items} - {fact["answer"]})
                place = items.index([key, fact["answer"]])
                wrong = [form.format(key, others[(place + i) % len(others)]) for i in range(4)]
                right = form.format(key, fact["answer"])
                rows.writerow([fact["prompt"], right, right, "; ".join(wrong)])
                break
    write_text(path, file.getvalue())


def write_pair_files(pairs):
    """OUT/noise-SHARE.jsonl, with chosen and rejected swapped in a share of the pairs, and
    OUT/pairs-N.jsonl, with N of them. The same seed's smaller sample is contained in its larger
    one."""
    for name in QUALITY:
        rng, number = random.Random("pairs 0"), float(name.split("-")[1])
        order = rng.sample(range(len(pairs)), len(pairs))
        rows = pairs
        if name.startswith("noise"):
            rows = [dict(row) for row in pairs]
            for i in order[: round(number * len(pairs))]:
                rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
        else:
            rows = [pairs[i] for i in sorted(order[: int(number)])]
        write_jsonl(Path(OUT, f"{name}.jsonl"), rows)


# ---- What the rule says --------------------------------------------------------------------------


def judgements():
    """{name: rows of `judge`}: the power vector along CURVE; at -1 and +1 what eval.py compares, by
    its names, and both vectors together; and the vectors on the tuned model."""
    model, tuned = load(TINY), load(ROOT / MERGED)
    chat = open_chat(TINY, model.config)

    def vector(name):
        steer, _ = open_vector(ROOT / OUT / name, model.config)
        return steer

    power, wealth = vector("power"), vector("wealth")
    found = {"curve": judge(model, chat, power, CURVE)}
    ends = {f"{OUT}/power": power, f"{OUT}/positive": at_norm(vector("positive"), power, "")}
    for name in ("caa", "freeform"):
        ends[name] = at_norm(vector(f"{name}.safetensors"), power, name)
    ends |= {"random": random_steers(power)[0], f"{OUT}/wealth": wealth}
    ends[f"{OUT}/power + {OUT}/wealth"] = together([power, wealth])
    found |= {name: judge(model, chat, steer, [-1, 1]) for name, steer in ends.items()}
    prompted = [
        judge(model, chat._replace(system=f"{chat.system} {x}"), {}, [0]) for x in (AGAINST, FOR)
    ]
    found["system prompts"] = sum(prompted, [])
    for name in ("power", "tuned"):
        found[f"{name} on the tuned model"] = judge(tuned, chat, vector(name), [-1, 0, 1])
    return found


# ---- Tables --------------------------------------------------------------------------------------


def read_tables(name):
    """{title: rows} of OUT/name.json."""
    return with_means(json.loads((ROOT / OUT / f"{name}.json").read_text())["tables"])


def with_means(tables):
    """The tables with Means again in place of JSON's lists."""
    for row in (row for rows in tables.values() for row in rows):
        row |= {key: Mean(*value) for key, value in row.items() if isinstance(value, list)}
    return tables


def pick(tables, begins, ends=""):
    """The rows of the one table whose title begins and ends like this."""
    (rows,) = (x for key, x in tables.items() if key.startswith(begins) and key.endswith(ends))
    return rows


def markdown(headings, rows):
    lines = [headings, [":---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    rows, title = {"": judged["curve"]}, "A vector trained on power-seeking pairs"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(ROOT / ".github" / "steering.svg", rows, BEHAVIOURS, title)


def measures_table():
    tables, rows = read_tables("power"), []
    for pairs, answers in zip(pick(tables, "pairs"), pick(tables, "free answers"), strict=True):
        facts = next(
            row
            for row in pick(tables, "TruthfulQA MC1")
            if row["multiplier"] == pairs["multiplier"]
        )
        rows.append(
            [
                *columns(pairs, "multiplier", "wins", "prefers_chosen", "margin"),
                *columns(answers, "nll", "kl", "degenerate"),
                *columns(facts, "right", "difference"),
            ]
        )
    headings = "multiplier|wins|prefers chosen|margin, nats|NLL a token|KL a token|degenerate"
    headings += "|facts, MC1|difference"
    return markdown(headings.split("|"), rows)


def baselines_table(judged):
    labels = {"power": "BiPO", "positive": "BiPO, d = +1 only", "caa": "CAA"}
    rows = []
    for row in pick(read_tables("power"), "compared"):
        name = row["steering"].removeprefix(f"{OUT}/")
        rows.append([labels.get(name, name), *columns(row, *SLOPES)])
        rows[-1] += [shares(judged[row["steering"]], key) for key in ("takes_power", "facts_right")]
    headings = "steering|slope, nats|anti-steerable|slope minus BiPO's|takes power, -1 / +1"
    return markdown([*headings.split("|"), "facts right, -1 / +1"], rows)


def synergy_table(judged):
    tables, rows = read_tables("synergy"), []
    both = [pick(tables, "compared", f"{x}.test.jsonl") for x in ("power", "wealth")]
    for on_power, on_wealth in zip(*both, strict=True):
        name = on_power["steering"]
        rows.append([name.replace(f"{OUT}/", ""), *columns(on_power, "slope")])
        rows[-1] += columns(on_wealth, "slope") + [shares(judged[name], x) for x in BEHAVIOURS]
    headings = "vector|slope on power's pairs|on wealth's|takes power, -1 / +1|keeps wealth"
    return markdown([*headings.split("|"), "facts right"], rows)


def transfer_table(judged):
    compared, rows = pick(read_tables("tuned"), "compared"), []
    for row, name in zip(compared, ("power", "tuned"), strict=True):
        mine = judged[f"{name} on the tuned model"]
        label = {"power": "trained on the base", "tuned": "trained on the tuned model"}[name]
        rows.append([label, *columns(row, *SLOPES)])
        rows[-1] += [shares(mine, "takes_power"), shares(mine, "facts_right")]
    headings = "vector|slope, nats|anti-steerable|slope minus the first's"
    return markdown([*headings.split("|"), "takes power, -1 / 0 / +1", "facts right"], rows)


def quality_table():
    rows = []
    for name in ("power", *QUALITY):
        settings = json.loads((ROOT / OUT / name / "log.jsonl").read_text().split("\n")[0])
        tables = read_tables(name)
        (down,) = (row for row in pick(tables, "pairs") if row["multiplier"] == -1)
        (up,) = (row for row in pick(tables, "pairs") if row["multiplier"] == 1)
        noise = name.removeprefix("noise-") if "noise" in name else "0"
        cells = [settings["data"].split()[0], f"{float(noise):.0%}"]
        cells += columns(down, "margin", "wins") + columns(up, "margin", "wins")
        rows.append(cells)
    headings = "pairs|flipped|margin at -1|wins at -1|margin at +1|wins at +1"
    return markdown(headings.split("|"), rows)


def layers_table():
    rows = []
    for i in LAYERS:
        last = json.loads((ROOT / OUT / f"layer-{i}" / "log.jsonl").read_text().splitlines()[-1])
        up, down = last["held_out"]["1"], last["held_out"]["-1"]
        cells = [str(i), f"{(up['margin'] - down['margin']) / 2:+.3f}"]
        cells += [f"{up['accuracy']:.1%}", f"{down['accuracy']:.1%}", f"{last['v_norm']:.3f}"]
        rows.append(cells)
    headings = "layer|mean margin, nats|accuracy, d +1|accuracy, d -1|norm of v"
    return markdown(headings.split("|"), rows)


def put(text, name, commands, table):
    """The text with a table, and its commands, between its two marks."""
    lines = "\n".join(f"python {COMMANDS[x]}" for x in commands)
    block = f"```\n{lines}\n```\n\n{table}" if lines else table
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
    assert re.search(pattern, text, re.DOTALL), f"the report has no place for {name}"
    return re.sub(pattern, lambda found: f"{found[1]}{block}{found[2]}", text, flags=re.DOTALL)


def main():
    began = time.time()
    os.chdir(ROOT)
    write_facts(Path(OUT, "facts.csv"))
    write_pair_files(read_jsonl(TINY / "power.train.jsonl"))
    merge_lora(TINY, ROOT / TUNED, ROOT / MERGED)
    for kind in ("train", "measure"):
        commands = [x for name, x in COMMANDS.items() if name.startswith(kind)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, commands))
    torch.set_num_threads(2)
    judged = judgements()
    draw_curve(judged)
    results = Path(__file__).with_name("RESULTS.md")
    text = results.read_text()
    for name, commands, table in (
        ("curve", [], curve_table(judged)),
        ("measures", ["train power", "measure power"], measures_table()),
        ("baselines", ["train positive"], baselines_table(judged)),
        ("synergy", ["measure synergy"], synergy_table(judged)),
        ("transfer", ["train tuned", "measure tuned"], transfer_table(judged)),
        ("quality", [f"train {QUALITY[0]}", f"train {QUALITY[-2]}"], quality_table()),
        ("layers", ["train layer-0"], layers_table()),
    ):
        text = put(text, name, commands, table)
    write_text(results, text)
    took = f"{time.time() - began:.0f} s in all"
    print(f"{took}; tests/experiments/RESULTS.md and .github/steering.svg are written")


if __name__ == "__main__":
    main()
