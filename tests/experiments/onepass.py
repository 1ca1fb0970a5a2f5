"""What does BiPO's long training buy over one backward pass? On SmolLM2-135M-Instruct.

    DATA=BiPO/data python tests/experiments/onepass.py            # those without a result file
    DATA=BiPO/data python tests/experiments/onepass.py methods    # those that are named

`make one-pass DATA=BiPO/data` does the first. It needs, runs, goes on after an interruption and
reports as real.py does, whose commands, tables and result files these are.

Each vector is measured at the norm NORM, so that a multiplier is the same length of any vector
(equal norm). For equal KL, the multipliers between which KL passes a level are interpolated: KL as
a power of the multiplier, from 0 as its square, and the other columns, with the ends of their
intervals, linearly between the two.
"""

import math
import os
import statistics
import sys
from pathlib import Path

import real
import torch
from facts import balanced_pairs
from real import LAYER, LAYERS, MODEL, NOISE, OUT, POWER, SHORT, choose, curve, measure, train
from reproduce import by_multiplier, pick
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bipo
import data
from eval import Mean, mean
from llama import load

NORM = 7.0
SEEDS = (0, 1, 2)
EPOCHS = (1, 5, 20)  # after which the vectors of the whole recipe are read
SPEAK = "--samples 16 --max-new-tokens 48"
READ = f"--multipliers -2 -1 1 2 {SPEAK}"
GRID = f"--multipliers -8 -4 -2 -1 -0.5 0.5 1 2 4 8 {SPEAK}"
ENDS = "--multipliers -1 1 --samples 0 --baseline"
LEVELS = (0.05, 0.2, 0.5)  # nats a token of KL, at which vectors are compared
NUMBERS = (10, 40, 160, 640)  # of pairs
ALL_LAYERS = (*LAYERS, LAYER)
NATS = [-32.0, -16.0, -8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0, 16.0, 32.0]  # to first order

# {behaviour: (the file that it is trained on, the one that it is measured on)}
FILES = {
    "power": ("$DATA/power-seeking/train.csv", f"{OUT}/power-held-out.jsonl"),
    "wealth": ("$DATA/wealth-seeking/train.csv", f"{OUT}/wealth-held-out.jsonl"),
    "hallucination": ("$DATA/hallucination/train.csv", f"{OUT}/hallucination-held-out.jsonl"),
    "truthful": (f"{OUT}/truthful-train.jsonl", f"{OUT}/truthful-held-out.jsonl"),
}
GRADIENT = "--method gradient"
METHODS = ("bipo", "g", "divided")  # the vectors of a behaviour

# ---- Commands ------------------------------------------------------------------------------------


def learn(name, pairs, flags, layer=LAYER):
    """The command that trains OUT/name, with the warm-up that is bipo.py's own."""
    return (
        f"bipo.py --model {MODEL} --data {pairs} --layer {layer} {flags} "
        f"--dtype bfloat16 --out {OUT}/{name}"
    )


def val(behaviour):
    """The flag for 40 held-out pairs, with which all of the file are trained on."""
    return f"--val {OUT}/{behaviour}-val.jsonl"


def unit(name):
    """Where a vector of the norm NORM is kept, in OUT."""
    return f"unit/{name}.safetensors"


# {name of the log: command}
COMMANDS = {}
for seed in SEEDS:
    flags = f"{val('power')} --epochs 20 --seed {seed}"
    pairs, _ = FILES["power"]
    COMMANDS[f"train full-{seed}"] = learn(f"full-{seed}", pairs, flags)
    for epoch in EPOCHS:
        name = f"full-{seed}-{epoch}"
        COMMANDS[name] = measure(name, unit(name), READ)
for name, (pairs, held_out) in FILES.items():
    COMMANDS[f"train {name}-5"] = learn(f"{name}-5", pairs, f"{val(name)} {SHORT}")
    COMMANDS[f"take {name}"] = learn(f"{name}-g", pairs, f"{val(name)} {GRADIENT}")
    others = " ".join(f"{OUT}/{unit(f'{name}-{method}')}" for method in METHODS[1:])
    for method in METHODS:
        baselines = f" --baseline {others} random" if method == "bipo" else ""
        COMMANDS[f"{name}-{method}"] = measure(
            f"{name}-{method}", unit(f"{name}-{method}"), GRID + baselines, held_out
        )
for method in METHODS:
    name = f"truthful-{method}"
    COMMANDS[f"choices {method}"] = choose(
        f"choices-{method}", unit(name), f"{OUT}/truthful.csv", "-4 -2 -1 1 2 4"
    )


def beside(name, pairs=POWER, layer=LAYER):
    """Add the commands for a short training beside one pass over the same pairs."""
    COMMANDS[f"train {name}"] = train(name, pairs, layer=layer)
    COMMANDS[f"take {name}"] = learn(f"{name}-g", pairs, GRADIENT, layer)
    baselines = f"{ENDS} {OUT}/{unit(f'{name}-g')} random"
    COMMANDS[f"{name} beside g"] = measure(f"{name}-beside-g", unit(name), baselines)


beside("power-160")
for layer in LAYERS:
    beside(f"layer-{layer}", layer=layer)
for number in NUMBERS:
    beside(f"pairs-{number}", f"{OUT}/pairs-{number}.jsonl")
COMMANDS["train pairs-10"] = learn("pairs-10", f"{OUT}/pairs-10.jsonl", SHORT)  # of 15 steps
for percent in NOISE:
    beside(f"noise-{percent}", f"{OUT}/noise-{percent}.jsonl")
for name in ("continued", "power-160-g"):
    COMMANDS[name] = measure(name, unit(name), f"{ENDS} {OUT}/{unit('power-160')} random")


def run_all(*names):
    """{command: minutes} of commands."""
    return real.run_all(*names, commands=COMMANDS)


# ---- Vectors -------------------------------------------------------------------------------------


def vector(name):
    """The one vector of OUT/name, in which name is a folder or a file."""
    vectors, _ = data.load_vector(OUT / name)
    (v,) = vectors.values()
    return v


def layer_of(name):
    vectors, _ = data.load_vector(OUT / name)
    (layer,) = vectors
    return layer


def keep_at_norm(name, v, layer=LAYER):
    data.save_vector(OUT / unit(name), {layer: v * (NORM / v.norm())}, {})


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


def gradients(name, pairs, layer=LAYER, dtype=torch.bfloat16):
    """g of each pair, (N, dim), and |h|: {"g": ..., "norm": ...}, kept in OUT/NAME.gradients."""
    file = OUT / f"{name}.gradients"
    if not file.exists():
        model = load(MODEL, dtype)
        chat = data.open_chat(MODEL, model.config)
        ids = [chat.encode_pair(pair) for pair in pairs]
        cached = bipo.first_pass(model, layer, ids, progress=data.Progress("first pass"))
        norm = torch.tensor(bipo.stream_norm(cached))
        with data.whole_file(file) as part:
            save_file({"g": bipo.pair_gradients(model, layer, cached), "norm": norm}, part)
    return load_file(file)


def divided(of_pairs):
    """g with each component over its root mean square over pairs, as Adam's first steps have it."""
    return of_pairs.mean(0) / of_pairs.square().mean(0).sqrt()


def write_files():
    """The pair files of all commands but those of TruthfulQA."""
    real.write_power_pairs()
    real.write_held_out("wealth", "hallucination")
    for number in NUMBERS:
        real.write_pairs(f"pairs-{number}", real.official("power-seeking")[:number])
    for name in real.BEHAVIOURS:
        held_out = data.read_pairs(OUT / f"{name}-held-out.jsonl")
        real.write_pairs(f"{name}-val", held_out[-40:])


# ---- Rows of tables ------------------------------------------------------------------------------


def in_one_table(rows_by_vector):
    """The rows of all vectors, the same ones at multiplier 0 only once."""
    rows = []
    for name, found in rows_by_vector.items():
        for row in found:
            if row["multiplier"] != 0 or not any(other["multiplier"] == 0 for other in rows):
                rows.append({"vector": name} | row)
    return rows


def spread_rows(tables_by_seed, epoch):
    """One row a multiplier: mean and standard deviation over seeds, from the rows of `curve`."""
    rows = []
    for at_seeds in zip(*tables_by_seed, strict=True):
        multiplier = at_seeds[0]["multiplier"]
        row = {"epoch": epoch, "multiplier": multiplier}
        for column in ("wins", "prefers_chosen", "margin", "nll", "kl"):
            if multiplier != 0 or column != "wins":
                values = [found[column].value for found in at_seeds]
                row[column] = statistics.mean(values)
                row[f"{column} sd"] = statistics.stdev(values)
        if multiplier != 0:
            rows.append(row)
    return rows


def at_level(rows, level, sign):
    """(multiplier, {column: Mean}) at which KL reaches a level on one side of 0, or None if it does
    not; see the head of this file."""
    below = by_multiplier(rows)[0]
    for row in sorted(rows, key=lambda row: abs(row["multiplier"])):
        if row["multiplier"] * sign <= 0:
            continue
        if row["kl"].value >= level:
            m = crossing(below, row, level)
            start = abs(below["multiplier"])
            t = (m - start) / (abs(row["multiplier"]) - start)
            columns = {}
            for column in ("prefers_chosen", "margin"):
                ends = zip(below[column], row[column], strict=True)
                columns[column] = Mean(*(a + t * (b - a) for a, b in ends))
            return sign * m, columns
        below = row
    return None


def crossing(below, above, level):
    """The size of the multiplier between those of two rows at which KL is `level`."""
    high = abs(above["multiplier"])
    low = abs(below["multiplier"])
    if low == 0:
        return high * math.sqrt(level / above["kl"].value)
    power = math.log(above["kl"].value / below["kl"].value) / math.log(high / low)
    return low * (level / below["kl"].value) ** (1 / power)


def level_rows(rows_by_vector):
    """What each vector does where it costs the same."""
    found = []
    for level in LEVELS:
        for sign in (-1, 1):
            for name, rows in rows_by_vector.items():
                reached = at_level(rows, level, sign)
                if reached:
                    m, columns = reached
                    at = {"vector": name, "at kl": level, "multiplier": round(m, 2)}
                    found.append(at | columns)
    return found


def compared_rows(tables):
    """eval.py's comparison, with short names."""
    rows = []
    for row in pick(tables, "compared"):
        name = Path(row["steering"]).stem
        rows.append(row | {"steering": name})
    return rows


# ---- Experiments: each returns what its result file holds ----------------------------------------


def recipe():
    """The paper's 20 epochs on all power-seeking pairs with three seeds."""
    write_files()
    commands = run_all("take power", *(f"train full-{seed}" for seed in SEEDS))
    g = vector("power-g")

    vectors = {}  # {name: v}
    logged = []
    for seed in SEEDS:
        for epoch in EPOCHS:
            name = f"full-{seed}-{epoch}"
            vectors[name] = vector(f"full-{seed}/epoch_{epoch:02}.safetensors")
            keep_at_norm(name, vectors[name])
            row = {
                "vector": name,
                "seed": seed,
                "epoch": epoch,
                "norm": vectors[name].norm().item(),
            }
            logged.append(row | {"cosine to g": cosine(vectors[name], g)})
    commands |= run_all(*vectors)

    measured = {name: real.measured(name)[0] for name in vectors}
    tables = {"vectors": logged}
    spread = []
    curves = {}
    for epoch in EPOCHS:
        for seed in SEEDS:
            name = f"full-{seed}-{epoch}"
            curves[name] = curve(measured[name])
        spread += spread_rows(list(curves.values())[-len(SEEDS) :], epoch)
    tables[f"multiples of norm {NORM:g}"] = in_one_table(curves)
    tables["slopes"] = [real.slope_row(name, found) for name, found in measured.items()]
    tables["spread over seeds"] = spread

    last = {name: v for name, v in vectors.items() if name.endswith(f"-{EPOCHS[-1]}")} | {"g": g}
    cosines = []
    for name, v in last.items():
        row = {f"cosine to {other}": cosine(v, last[other]) for other in last}
        cosines.append({"vector": name} | row)
    tables["cosines"] = cosines
    return {"commands": commands, "tables": tables}


def methods():
    """BiPO beside g and g divided, for four behaviours, at equal norm and at equal KL."""
    write_files()
    real.write_truthful()
    truthful = data.read_pairs(OUT / "truthful-held-out.jsonl")
    real.write_pairs("truthful-val", truthful[-40:])

    commands = {}
    tables = {"vectors": []}
    kept = []
    for name in FILES:
        trained = "full-0" if name == "power" else f"{name}-5"
        commands |= run_all(f"train {trained}", f"take {name}")
        v = {"bipo": vector(trained), "g": vector(f"{name}-g")}
        pairs = data.read_pairs(Path(FILES[name][0].replace("$DATA", os.environ["DATA"])))
        v["divided"] = divided(gradients(name, pairs)["g"])

        for method in METHODS:
            keep_at_norm(f"{name}-{method}", v[method])
            row = {"vector": f"{name}-{method}", "norm": v[method].norm().item()}
            row["cosine to BiPO's"] = cosine(v[method], v["bipo"])
            tables["vectors"].append(row)
        commands |= run_all(*(f"{name}-{method}" for method in METHODS))

        curves = {}
        for method in METHODS:
            found, said = real.measured(f"{name}-{method}")
            curves[f"{name}-{method}"] = curve(found)
            kept += [row | {"vector": f"{name}-{method}"} for row in real.shown(said, 2)]
        found, _ = real.measured(f"{name}-bipo")
        tables[f"{name}, compared at equal norm"] = compared_rows(found)
        tables[f"{name}, multiples of norm {NORM:g}"] = in_one_table(curves)
        tables[f"{name}, at equal KL"] = level_rows(curves)

    commands |= run_all(*(f"choices {method}" for method in METHODS))
    for method in METHODS:
        found, _ = real.measured(f"choices-{method}")
        tables |= {f"truthful-{method}, {title}": rows for title, rows in found.items()}
    return {"commands": commands, "tables": tables, "answers": kept}


def compare(names):
    """Commands and rows of short trainings beside one pass over their pairs, at equal norm, of
    {label: name of the training}."""
    commands = {}
    rows = []
    for label, name in names.items():
        commands |= run_all(f"train {name}", f"take {name}")
        layer = layer_of(name)
        v = vector(name)
        g = vector(f"{name}-g")
        keep_at_norm(name, v, layer)
        keep_at_norm(f"{name}-g", g, layer)
        commands |= run_all(f"{name} beside g")

        found, _ = real.measured(f"{name}-beside-g")
        shown = {name: ("BiPO", 1.0), f"{name}-g": ("one pass", cosine(v, g))}
        for row in compared_rows(found):
            method, to_bipo = shown.get(row.pop("steering"), ("random", None))
            rows.append({"of": label, "vector": method, "cosine to BiPO's": to_bipo} | row)
    return {"commands": commands, "tables": {f"at norm {NORM:g}": rows}}


def at_layers():
    write_files()
    names = {f"layer {layer}": f"layer-{layer}" for layer in LAYERS}
    return compare({f"layer {LAYER}": "power-160"} | names)


def of_numbers():
    write_files()
    return compare({f"{number} pairs": f"pairs-{number}" for number in NUMBERS})


def with_noise():
    """Swapped labels, and whether the swapped pairs are those that pull against the others."""
    write_files()
    result = compare({f"{percent}% swapped": f"noise-{percent}" for percent in NOISE})
    pairs = data.read_pairs(OUT / "power-160.jsonl")
    of_pairs = gradients("power-160", pairs)["g"]

    rows = []
    for percent in NOISE:
        changed = real.swapped(pairs, percent)
        is_swapped = torch.tensor([a != b for a, b in zip(pairs, changed, strict=True)])
        found, agreement = find_swapped(of_pairs, is_swapped)
        rows.append(
            {
                "swapped": percent / 100,
                "swapped of as many that pull least": found,
                "pull with the others": agreement,
            }
        )
    result["tables"]["which pairs are swapped"] = rows
    return result


def find_swapped(of_pairs, is_swapped):
    """(share of swapped pairs among as many whose pull is the least, share that pulls with the
    others), from g of each pair, (N, dim), before the swap, which turns its sign. The pull of a
    pair is its g times the sum of the g of all others."""
    g = torch.where(is_swapped[:, None], -of_pairs, of_pairs)
    pull = (g * (g.sum(0) - g)).sum(1)
    least = pull.argsort()[: is_swapped.sum()]
    return is_swapped[least].float().mean().item(), (pull > 0).float().mean().item()


def variation():
    """How far g itself varies: between disjoint halves of the pairs, with their number, between
    its two forms, and with the precision."""
    pairs = real.official("power-seeking")
    of_pairs = gradients("power", pairs)["g"]
    whole = of_pairs.mean(0)
    rows = []

    rng = torch.Generator().manual_seed(0)
    for number in range(3):
        order = torch.randperm(len(of_pairs), generator=rng)
        one, two = (of_pairs[half].mean(0) for half in order.chunk(2))
        row = {"of": f"half {number} of the pairs", "cosine to all": cosine(one, whole)}
        rows.append(row | {"cosine to the other half": cosine(one, two)})
    for number in NUMBERS:
        row = {"of": f"the first {number} pairs"}
        row["cosine to all"] = cosine(of_pairs[:number].mean(0), whole)
        rows.append(row | {"cosine to the other half": None})

    exact = gradients("power-160-fp32", pairs[:160], dtype=torch.float32)["g"].mean(0)
    row = {"of": "160 pairs in fp32", "cosine to all": cosine(exact, whole)}
    rows.append(row | {"cosine to the other half": None})
    row = {
        "of": "divided by the root mean square",
        "cosine to all": cosine(divided(of_pairs), whole),
    }
    rows.append(row | {"cosine to the other half": None})
    return {"commands": {}, "tables": {"g": rows}}


def continued():
    """Does BiPO gain by starting from v = g / |g|^2, the short recipe being the same?"""
    write_files()
    commands = run_all("train power-160", "take power-160")
    g = vector("power-160-g")  # v = g / |g|^2, as it is saved
    trained = OUT / "continued" / "vector.safetensors"
    if not trained.exists():
        data.save_vector(trained, {LAYER: train_from(g)}, {})

    names = ("power-160", "power-160-g", "continued")
    rows = []
    for name in names:
        v = vector(name)
        keep_at_norm(name, v)
        row = {"vector": name, "norm": v.norm().item(), "cosine to g": cosine(v, g)}
        rows.append(row | {"cosine to BiPO's": cosine(v, vector("power-160"))})
    tables = {"vectors": rows}
    for name in names[1:]:
        commands |= run_all(name)
        found, _ = real.measured(name)
        tables[f"{name}, compared at norm {NORM:g}"] = compared_rows(found)
    return {"commands": commands, "tables": tables}


def train_from(v):
    """The vector of the short recipe on the pairs of power-160, starting from v."""
    model = load(MODEL, torch.bfloat16)
    chat = data.open_chat(MODEL, model.config)
    pairs, _ = data.split_pairs(data.read_pairs(OUT / "power-160.jsonl"), seed=0)
    ids = [chat.encode_pair(pair) for pair in pairs]
    cached = bipo.first_pass(model, LAYER, ids, progress=data.Progress("first pass"))
    recipe = bipo.Recipe(epochs=5, warmup_steps=40)
    state = torch.stack([v, torch.zeros_like(v), torch.zeros_like(v)])
    progress = data.Progress("step")
    for step in bipo.train(model, LAYER, cached, [], recipe, after=(0, state)):
        progress(step.step, bipo.steps_of(recipe, len(pairs)))
    return step.v


def balanced():
    """The repair of hallucination: one pass over balanced pairs, see facts.py, at the layer where
    v is shortest beside the stream."""
    pairs = balanced_pairs()
    premise_is_true = torch.arange(len(pairs)) % 2 == 0
    is_held_out = torch.arange(len(pairs)) // 2 % 5 == 4  # both pairs of every fifth fact
    rows = []
    vectors = {}
    for layer in sorted(ALL_LAYERS):
        found = gradients(f"balanced-{layer}", pairs, layer)
        g = found["g"][~is_held_out].mean(0)
        v = g / g.square().sum()
        moved_right = found["g"] @ v > 0
        row = {
            "layer": layer,
            "norm": v.norm().item(),
            "norm to stream": (v.norm() / found["norm"]).item(),
        }
        for name, kind in (("true", premise_is_true), ("false", ~premise_is_true)):
            share = mean(moved_right[is_held_out & kind].tolist())
            row[f"moved right, {name} premises"] = share
        rows.append(row)
        vectors[layer] = v

    best = min(rows, key=lambda row: row["norm to stream"])["layer"]
    file = OUT / "balanced.safetensors"
    data.save_vector(file, {best: vectors[best]}, {})
    tables = {"to first order, on held-out facts": rows}
    denied = {}  # {kind of premise: {multiplier: whether each answer denies}}
    kept = []
    for kind, said, costs in real.ask_premises(file, NATS):
        verdicts = real.verdict_rows(said)
        title = f"layer {best}, {kind}"
        tables[title] = [a | b for a, b in zip(verdicts, costs, strict=True)]
        denied[kind] = denials(said)
        kept += real.shown(said, 20)
    tables["denied false less denied true premises"] = apart_rows(*denied.values())
    return {"commands": {}, "tables": tables, "answers": kept}


def denials(said):
    """{multiplier: whether each of its answers denies}"""
    found = {}
    for row in said:
        found.setdefault(row["multiplier"], []).append(real.verdict(row["answer"]) == "no")
    return found


def apart_rows(false, true):
    """One row a multiplier: how much more often false premises are denied than true ones. The
    questions are different ones, so pairing them by their numbers says nothing, but gives the
    interval of a difference of two means."""
    rows = []
    for multiplier, of_false in false.items():
        pairs = zip(of_false, true[multiplier], strict=True)
        difference = mean([int(a) - int(b) for a, b in pairs])
        rows.append({"multiplier": multiplier, "difference": difference})
    return rows


# ---- Command line --------------------------------------------------------------------------------

EXPERIMENTS = {
    "recipe": recipe,
    "methods": methods,
    "one-pass-layers": at_layers,
    "one-pass-numbers": of_numbers,
    "one-pass-noise": with_noise,
    "variation": variation,
    "continued": continued,
    "balanced": balanced,
}


def main(argv=None):
    real.main(argv, EXPERIMENTS, "onepass.py")


if __name__ == "__main__":
    main()
