"""BiPO: learn one steering vector from preference pairs, for a frozen Llama.

    python bipo.py --model llama2-7b-chat --data pairs.jsonl --layer 15

Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through
Bi-directional Preference Optimization", NeurIPS 2024, https://arxiv.org/abs/2406.00045; official
code https://github.com/CaoYuanpu/BiPO (@cef1d00). Their symbols: v is `v`, the direction d is `d`,
L is `layer`, the responses r_T and r_O are `chosen` and `rejected`.

What the model computes without v never changes: the residual stream up to block L and the reference
log-probabilities. The first pass computes both once, one block at a time over all pairs; training
holds and runs only the blocks above L, on a packed batch (see data.py).

Baselines by --method: positive, which draws d = +1 alone; caa and freeform, see `mean_difference`.

Where we depart from the paper (P) and the official code (C), whose numbers are in tests/golden:
 1. weight decay. P: 0.05. C: 0, the flag is parsed and never used. Ours: --preset paper, official.
 2. cosine schedule. P: over the epochs run. C: over 100, of which 5-20 are run. Ours: the presets.
 3. gradient clipping. P: not mentioned. C: norm 1.0, an inherited default. Ours: 1.0.
 4. d and the pairs' order. P: d per batch. C: d per micro-batch, from Python's global generator.
    Ours: per batch, from the run's seed, logged. Given C's draws and order we give C's numbers.
 5. precision. P: not mentioned. C: fp32, two models. Ours: any, one model; v and loss in fp32.

Needs llama.py and data.py beside it; MIT licence.
"""

import json
import math
import os
import random
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import (
    Parser,
    Progress,
    add_model_flags,
    add_pair_flags,
    clock,
    find_model,
    letter_pairs,
    open_chat,
    pick_device,
    read_pairs,
    run_or_exit,
    save_vector,
    split_pairs,
)
from llama import Checkpoint, PairIds, check_steer, length, pack, read_config


@dataclass(frozen=True)
class Recipe:
    """The settings of the paper's appendix A.3."""

    beta: float = 0.1
    lr: float = 5e-4  # at its peak
    batch_size: int = 4  # pairs
    weight_decay: float = 0.05
    warmup_steps: int = 100
    epochs: int = 20
    schedule_epochs: int = 0  # the cosine's horizon; 0: the epochs run
    clip_norm: float = 1.0

    def __post_init__(self):
        may_be_zero = ("weight_decay", "warmup_steps", "schedule_epochs")
        for name, value in asdict(self).items():
            if not 0 <= value < 1e6 or (value == 0 and name not in may_be_zero):
                raise ValueError(f"{name} is {value}, which is out of range")


PRESETS = {"paper": Recipe(), "official": Recipe(weight_decay=0.0, schedule_epochs=100)}
DIRECTIONS = {"bipo": (-1, 1), "positive": (1, 1)}  # to draw d from; two: the order stays the same
METHODS = (*DIRECTIONS, "caa", "freeform")
SEARCH_EPOCHS = 2  # at each candidate for the layer


# ---- The objective -------------------------------------------------------------------------------


class CachedPair(NamedTuple):
    """A pair after the first pass."""

    ids: PairIds
    h: torch.Tensor  # (T, dim), residual stream after block `layer` at `prompt | chosen | rejected`
    ref_logps: torch.Tensor  # (2,) log-probs of chosen and rejected without v, in nats


def response_logps(model, layer, h, batch, above=None):
    """log p(response | prompt), summed over the response's tokens with EOS, (P, 2) nats: chosen and
    rejected of each pair, from the residual stream after block `layer`, (1, T, dim).

    above: {layer: vector} to add after blocks above `layer`.
    """
    n_layers = model.config.n_layers
    h = model.blocks(h, layer + 1, n_layers, batch.positions, batch.masks, steer=above)
    logits = model.head(h[0, batch.predictors])  # (R, vocab_size)
    logps = -F.cross_entropy(logits, batch.targets, reduction="none")  # (R,)
    sums = [part.sum() for part in logps.split(batch.lengths)]
    return torch.stack(sums).view(len(batch.masks), -1)


def steered_logps(model, layer, v, d, pairs, above=None):
    """`response_logps` of CachedPairs under steering by d * v, at every position."""
    batch = pack([pair.ids for pair in pairs], model.device)
    h = torch.cat([pair.h for pair in pairs])[None].to(model.device)  # (1, T, dim)
    h = (h + d * v).type_as(h)
    return response_logps(model, layer, h, batch, above)


def bipo_loss(logps, ref_logps, d, beta):
    """Equation 3 of the paper: losses (P,), margins (P,) in nats, from log-probs (P, 2) of chosen
    and rejected. Under d = -1 the model, steered by -v, is to prefer rejected."""
    gain = logps - ref_logps
    margin = gain[:, 0] - gain[:, 1]
    return -F.logsigmoid(d * beta * margin), margin


# ---- What does not depend on v -------------------------------------------------------------------


MAX_TOKENS = 1024  # that run at a time: it bounds the memory and, but for rounding, no result


def parts(ids):
    """Slices of a list of PairIds: as many in a row as hold MAX_TOKENS tokens, at least one."""
    start = total = 0
    for i, pair in enumerate(ids):
        if total + length(pair) > MAX_TOKENS and i > start:
            yield slice(start, i)
            start, total = i, 0
        total += length(pair)
    yield slice(start, len(ids))


@torch.no_grad()
def lower_pass(model, layer, ids, h, hold=nullcontext, start=0):
    """Fill h, (tokens of all PairIds, dim), with the residual stream after block `layer`. Yields
    after each part of each block.

    hold: what to enter while block i is in use; `Checkpoint.hold` brings it and lets it go.
    start: the first block to run; above 0, h holds what comes before it.
    """
    for i in range(start, layer + 1):
        with hold(i):
            end = 0
            for part in parts(ids):
                batch = pack(ids[part], model.device)
                begin, end = end, end + batch.tokens.shape[1]
                x = h[begin:end][None].to(model.device) if i else model.embed(batch.tokens)
                h[begin:end] = model.blocks(x, i, i + 1, batch.positions, batch.masks)[0]
                yield


@torch.no_grad()
def reference_pass(model, layer, ids, h):
    """Yields the CachedPair of each PairIds, given `lower_pass`'s h, of which it holds a view: h
    filled for another layer makes it that layer's."""
    rows = h.split([*map(length, ids)])
    for part in parts(ids):
        batch = pack(ids[part], model.device)
        x = torch.cat(rows[part])[None].to(model.device)
        ref_logps = response_logps(model, layer, x, batch)
        yield from map(CachedPair, ids[part], rows[part], ref_logps)


def first_pass(model, layer, ids, aloud=False):
    """The CachedPair of each PairIds, by a model that is in memory as a whole.

    aloud: print how far it is, if it takes more than a few seconds.
    """
    h = torch.empty(sum(map(length, ids)), model.config.dim, dtype=model.norm.weight.dtype)
    progress = Progress("first pass", len(list(parts(ids))) * (layer + 1), quiet=True)
    for done, _ in enumerate(lower_pass(model, layer, ids, h), 1):
        if aloud:
            progress(done)
    return list(reference_pass(model, layer, ids, h))


# ---- Training ------------------------------------------------------------------------------------


def lr_at(step, peak, warmup, horizon):
    """The official schedule's rate at a 0-based step; the first step's is 0."""
    if step < warmup:  # 1. rise
        return peak * step / warmup
    if step < horizon:  # 2. half a cosine down to 0
        return peak * (1 + math.cos(math.pi * (step - warmup) / (horizon - warmup))) / 2
    return 0.0  # 3. past the horizon


def draw_batches(n, recipe, seed, directions=DIRECTIONS["bipo"]):
    """(row numbers, d) of every step: each epoch in a new order, its short last batch kept."""
    rng = random.Random(seed)
    for _ in range(recipe.epochs):
        order = rng.sample(range(n), n)
        for i in range(0, n, recipe.batch_size):
            yield order[i : i + recipe.batch_size], rng.choice(directions)


@torch.no_grad()
def score(model, layer, v, m, pairs, above=None):
    """Log-probs (N, 2) in nats of CachedPairs steered by m * v; above: see `response_logps`."""
    slices = parts([pair.ids for pair in pairs])
    return torch.cat([steered_logps(model, layer, v, m, pairs[part], above) for part in slices])


def evaluate(model, layer, v, pairs, beta):
    """Mean loss, mean margin (nats) and share of margins with d's sign, for d = +1 and d = -1.
    Raises ValueError if a loss is not finite."""
    ref_logps, report = torch.stack([pair.ref_logps for pair in pairs]), {}
    for d in (1, -1):
        losses, margin = bipo_loss(score(model, layer, v, d, pairs), ref_logps, d, beta)
        if not losses.isfinite().all():
            raise ValueError(f"held-out loss {losses.mean()} at d {d:+d}; try another dtype or lr")
        means = (losses.mean(), margin.mean(), (d * margin > 0).float().mean())
        report[d] = dict(zip(("loss", "margin", "accuracy"), map(float, means), strict=True))
    return report


class Step(NamedTuple):
    """What one optimizer step did."""

    step: int  # 1-based
    epoch: int  # 1-based
    rows: list[int]  # numbers of the batch's pairs
    d: int
    lr: float
    loss: float
    margin: float  # mean over the batch, nats
    grad_norm: float  # before clipping
    held_out: dict | None  # after an epoch's last step, if there are such pairs, see `evaluate`
    logps: torch.Tensor  # (P, 2), before the step
    v: torch.Tensor  # (dim,), after the step


def train(model, layer, pairs, held_out, recipe=PRESETS["paper"], seed=0, batches=None):
    """Algorithm 1: learn v on CachedPairs. Yields a Step after each step; the last one has the v.

    batches: [(row numbers, d)] to use instead of the seed's. Raises ValueError if the loss or its
    gradient is not finite.
    """
    v = torch.zeros(model.config.dim, dtype=torch.float32, device=model.device, requires_grad=True)
    decay = recipe.weight_decay
    optimizer = torch.optim.AdamW([v], betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    per_epoch = math.ceil(len(pairs) / recipe.batch_size)
    horizon = per_epoch * (recipe.schedule_epochs or recipe.epochs)
    if batches is None:
        batches = draw_batches(len(pairs), recipe, seed)
    for step, (rows, d) in enumerate(batches, 1):
        batch, results = [pairs[i] for i in rows], []
        optimizer.zero_grad()
        for part in parts([pair.ids for pair in batch]):  # mostly one
            logps = steered_logps(model, layer, v, d, batch[part])
            ref_logps = torch.stack([pair.ref_logps for pair in batch[part]])
            losses, margin = bipo_loss(logps, ref_logps, d, recipe.beta)
            (losses.sum() / len(batch)).backward()
            results.append((logps.detach(), losses.detach(), margin.detach()))
        logps, losses, margin = map(torch.cat, zip(*results, strict=True))
        loss = losses.mean()
        norm = torch.nn.utils.clip_grad_norm_(v, recipe.clip_norm)
        if not (loss.isfinite() and norm.isfinite()):
            raise ValueError(f"step {step}: loss {loss}, gradient {norm}; try another dtype or lr")
        lr = lr_at(step - 1, recipe.lr, recipe.warmup_steps, horizon)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        last = step % per_epoch == 0
        report = evaluate(model, layer, v, held_out, recipe.beta) if last and held_out else None
        numbers = (lr, loss.item(), margin.mean().item(), norm.item())
        epoch = math.ceil(step / per_epoch)
        yield Step(step, epoch, rows, d, *numbers, report, logps, v.detach().clone())


def mean_difference(ids, h, last=False):
    """Mean over PairIds of h at the chosen response minus h at the rejected one, (dim,) fp32.
    h at a response is the mean over its tokens (freeform) or, by `last`, that at its last token,
    which is the letter in the pairs of `letter_pairs` (CAA)."""
    differences = []
    for pair, rows in zip(ids, h.split([*map(length, ids)]), strict=True):
        _, *sides = rows.float().split([*map(len, pair)])
        chosen, rejected = (x[-1] if last else x.mean(0) for x in sides)
        differences.append(chosen - rejected)
    return torch.stack(differences).mean(0)


# ---- Command line --------------------------------------------------------------------------------


def check_folder(out, overwrite):
    """The files of the run that the folder holds. Raises ValueError if there are such, unless
    `overwrite`, and if the folder can't be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        raise ValueError(f"cannot write to --out {out}: {e.strerror}") from None
    names = "vector.safetensors", "epoch_*.safetensors", "log.jsonl", "layers.json"
    old = {file for name in names for file in out.glob(name)}
    if old and not overwrite:
        raise ValueError(f"--out {out} holds a run: name another folder, or --overwrite")
    return old


def free_memory(root="/"):
    """Bytes that may still be taken, by the account of Linux and of a container; 0 elsewhere."""
    meminfo, group = Path(root, "proc/meminfo"), Path(root, "sys/fs/cgroup")
    if not meminfo.is_file():
        return 0
    free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int((group / "memory.current").read_text()))
    return free


def open_cache(n_tokens, dim, dtype, memory, folder):
    """(h, where it lies): an empty tensor (n_tokens, dim) in memory, if it takes at most `memory`
    bytes of it, or else in a file without a name in `folder`, which goes when the process ends.
    Raises ValueError if there is no room for that either."""
    size = n_tokens * dim * dtype.itemsize
    what = f"{n_tokens} tokens x {dim} x {dtype.itemsize} bytes = {size / 2**30:.2f} GiB"
    if size <= memory:
        return torch.empty(n_tokens, dim, dtype=dtype), f"{what}, in memory"
    file = tempfile.TemporaryFile(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # or a disk that fills up ends the process, unexplained
            os.posix_fallocate(file.fileno(), 0, size)
        h = np.memmap(file, np.uint8, shape=size)
    except OSError as e:
        raise ValueError(
            f"no room for the first pass, {what}: it may take {memory / 2**30:.2f} GiB of memory "
            f"(--cache-gib), and a file in {folder} cannot hold it: {e.strerror}"
        ) from None
    return torch.from_numpy(h).view(dtype).view(n_tokens, dim), f"{what}, in a file in {folder}"


def make_recipe(args):
    """The preset with the flags that were given. ValueError if there are such, but no training."""
    flags = {k: x for k in asdict(Recipe()) if (x := getattr(args, k)) is not None}
    if args.method not in DIRECTIONS and (flags or args.preset):
        name = next(iter(flags), "preset").replace("_", "-")
        raise ValueError(f"--method {args.method} does not train: leave out --{name}")
    return replace(PRESETS[args.preset or "paper"], **flags)


def parse_layers(args, n_layers):
    """The layers that --layer names, ascending. ValueError if there is none, or one too many."""
    auto = range(n_layers // 4, 3 * n_layers // 4 + 1, max(1, n_layers // 16))
    try:
        layers = sorted({int(x) for x in (auto if args.layer == "auto" else args.layer.split(","))})
    except ValueError:
        raise ValueError(f"--layer {args.layer!r}: give 15, or 10,13,15, or auto") from None
    check_steer(layers, n_layers)
    if len(layers) > 1 and args.method not in DIRECTIONS:
        raise ValueError(f"--method {args.method} cannot choose a layer: give one, not {layers}")
    return layers


def draw_pairs(pairs, most, noise, seed):
    """(at most `most` of the pairs, in their order, a share `noise` of them with chosen and
    rejected exchanged; how many are). What a seed draws for less it draws for more too."""
    rng = random.Random(f"pairs {seed}")
    kept = sorted(rng.sample(range(len(pairs)), len(pairs))[:most])
    swapped = set(rng.sample(kept, len(kept))[: round(noise * len(kept))])
    drawn = [(pairs[i], i in swapped) for i in kept]
    drawn = [p._replace(chosen=p.rejected, rejected=p.chosen) if turn else p for p, turn in drawn]
    return drawn, len(swapped)


def read_sets(args):
    """(training pairs, held-out pairs, what they are in words); prints how they were read, and
    what may not be meant."""
    if not 0 <= args.label_noise <= 1 or (args.max_pairs is not None and args.max_pairs < 1):
        raise ValueError("needs --label-noise from 0 to 1 and --max-pairs >= 1")
    pairs = read_pairs(args.data, args.letters, args.best)
    print(pairs.report)
    if args.val:
        held_out, origin = read_pairs(args.val, args.letters, args.best), f"of {args.val}"
        print(held_out.report)
    else:
        (pairs, held_out), origin = split_pairs(pairs, args.seed), "split off by prompt"
    drawn, n_swapped = draw_pairs(pairs, args.max_pairs, args.label_noise, args.seed)
    what = f"{len(drawn)} pairs of {args.data}"
    what += f", drawn from {len(pairs)}" if len(drawn) < len(pairs) else ""
    what += f", chosen and rejected swapped in {n_swapped}" if args.label_noise else ""
    no_prompt = [pair.source for pair in drawn + held_out if not str(pair.prompt).strip()]
    if no_prompt:
        print(f"note: {len(no_prompt)} prompts are empty, the first at {no_prompt[0]}")
    shared = {str(pair.prompt) for pair in drawn} & {str(pair.prompt) for pair in held_out}
    if shared:
        print(f"note: {len(shared)} held-out prompts are trained on, for example {min(shared)!r}")
    return drawn, held_out, f"{what}, held out {len(held_out)} {origin}"


def count_steps(recipe, n):
    return recipe.epochs * math.ceil(n / recipe.batch_size)


def fill(checkpoint, start, layer, ids, h):
    """`lower_pass`, streamed from the checkpoint; then the model has the blocks above `layer`."""
    model, total = checkpoint.model, len(list(parts(ids))) * (layer + 1 - start)
    progress = Progress(f"first pass, blocks {start}-{layer}:", total)
    for done, _ in enumerate(lower_pass(model, layer, ids, h, checkpoint.hold, start), 1):
        progress(done)
    checkpoint.read(layer + 1, model.config.n_layers)


def train_aloud(what, args, model, layer, pairs, held_out, recipe):
    """`train` as --method and --seed say, with progress. Yields a row of the log and v."""
    progress = Progress(what, count_steps(recipe, len(pairs)))
    batches = draw_batches(len(pairs), recipe, args.seed, DIRECTIONS[args.method])
    for step in train(model, layer, pairs, held_out, recipe, args.seed, batches):
        row = {k: x for k, x in step._asdict().items() if not isinstance(x, torch.Tensor)}
        row["v_norm"] = step.v.norm().item()
        progress(step.step, "loss {loss:.4f}  lr {lr:.1e}  |v| {v_norm:.3f}".format(**row))
        yield row, step.v


def try_layer(args, model, layer, sets, recipe):
    """What a brief training at this layer comes to."""
    recipe = replace(recipe, epochs=SEARCH_EPOCHS)
    warmup = min(recipe.warmup_steps, count_steps(recipe, len(sets[0])) // 4)
    recipe = replace(recipe, warmup_steps=warmup)
    *_, (row, _) = train_aloud(f"layer {layer}: step", args, model, layer, *sets, recipe)
    margin = sum(d * x["margin"] for d, x in row["held_out"].items()) / 2
    return {"layer": layer, "margin": margin} | {key: row[key] for key in ("held_out", "v_norm")}


def run(args):
    # 1. everything that can be wrong, before any long work
    began = time.time()
    recipe, trains = make_recipe(args), args.method in DIRECTIONS
    path, base_model = find_model(args.model)
    config = read_config(path)
    layers = parse_layers(args, config.n_layers)
    chat = open_chat(path, config, args.template, args.system)
    pairs, held_out, data = read_sets(args)
    if args.method == "caa":
        ids = [x for pair in pairs for x in letter_pairs(chat, pair, config.max_seq_len)]
    else:
        ids = [chat.encode_pair(pair, config.max_seq_len) for pair in pairs]
    n = len(ids)  # the others are held out
    ids += [chat.encode_pair(pair, config.max_seq_len) for pair in held_out]
    device, dtype = pick_device(args.device, args.dtype)
    checkpoint = Checkpoint(path, dtype, device, args.lora)
    stem = Path(args.data.name.removesuffix(".gz")).stem
    name = "auto" if args.layer == "auto" else "-".join(map(str, layers))
    out = args.out or Path("runs", f"{stem}-layer{name}-{args.method}".removesuffix("-bipo"))
    old = check_folder(out, args.overwrite)
    memory = free_memory() / 2 if args.cache_gib is None else args.cache_gib * 2**30
    h, place = open_cache(sum(map(length, ids)), config.dim, dtype, memory, out)
    settings = {"base_model": base_model, "model_type": config.family, "lora": args.lora or ""}
    settings |= {"n_layers": str(config.n_layers), "layer": ",".join(map(str, layers))}
    settings |= {"template": chat.template, "system": chat.system, "tokenizer": chat.tokenizer.name}
    settings |= {"method": args.method, "seed": str(args.seed), "device": str(device)}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "data": data}
    if trains:
        settings |= {"preset": args.preset or "paper", "recipe": json.dumps(asdict(recipe))}
    for name, value in settings.items():
        print(f"{name:10}  {value}".rstrip())
    print(f"first pass  {place}")
    if trains and recipe.warmup_steps >= count_steps(recipe, n):
        print(f"note: all {count_steps(recipe, n)} steps are warm-up; see --warmup-steps")

    # 2. what does not depend on v; blocks up to the layer come one at a time, the others stay
    model, cached, layer = checkpoint.model, [], layers[0]
    fill(checkpoint, 0, layer, ids, h)
    if not trains:
        n_tokens = sum(map(length, ids[:n]))
        v = mean_difference(ids[:n], h[:n_tokens], args.method == "caa").to(device)
        n, ids, h = 0, ids[n:], h[n_tokens:]  # those that are held out need a reference
    progress = Progress("first pass, reference: pair", len(ids))
    for pair in reference_pass(model, layer, ids, h):
        cached.append(pair)
        progress(len(cached))
    sets = cached[:n], cached[n:]
    new = [out / "log.jsonl"]  # written as .part, to take its name when there is a vector
    if len(layers) > 1:
        tried = []
        for before, after in zip(layers[:1] + layers, layers, strict=False):
            fill(checkpoint, before + 1, after, ids, h)  # makes `sets`, which view h, this layer's
            tried.append(try_layer(args, model, after, sets, recipe))
        print(*map(held_out_line, tried), sep="\n")
        layer = max(tried, key=lambda row: row["margin"])["layer"]
        new.append(out / "layers.json")
        Path(f"{new[-1]}.part").write_text(json.dumps({"layer": layer, "tried": tried}))
        print(f"layer {layer} has the largest margin; the table goes to {new[-1]}", flush=True)
        settings["layer"] = str(layer)
        fill(checkpoint, 0, layer, ids, h)

    # 3. the vector
    if trains:
        found = train_aloud("step", args, model, layer, *sets, recipe)
    else:
        report = evaluate(model, layer, v, sets[1], recipe.beta)
        found = [({"held_out": report, "v_norm": v.norm().item()}, v)]
    with open(f"{new[0]}.part", "w", encoding="utf-8") as log:
        print(json.dumps(settings | {"first_pass": place}), file=log)
        for row, v in found:
            print(json.dumps(row), file=log, flush=True)
            if not row["held_out"]:
                continue
            print(held_out_line(row), flush=True)
            files = [out / "vector.safetensors"]
            if trains:
                files.append(out / f"epoch_{row['epoch']:02}.safetensors")
                settings["epoch"] = str(row["epoch"])
            for file in files:
                save_vector(file, {layer: v}, settings)
            for file in old.difference(files):  # only now may the run that is overwritten go
                file.unlink(missing_ok=True)
            for file in new:
                os.replace(f"{file}.part", file)
            old, new = set(), []
    files = "vector.safetensors, a file an epoch" if trains else "vector.safetensors"
    print(f"saved {files} and log.jsonl in {out} after {clock(time.time() - began)}")


def held_out_line(row):
    numbers = "d {:+d}: loss {loss:.4f}, margin {margin:+6.2f} nats, accuracy {accuracy:4.0%}"
    line = [f"{key} {row[key]:2}" for key in ("epoch", "layer") if key in row] + ["held out"]
    line += [numbers.format(d, **x) for d, x in row["held_out"].items()]
    if "layer" in row:
        line.append("mean margin {margin:+.3f} nats, |v| {v_norm:.3f}".format(**row))
    return "  ".join(line)


def main(argv=None):
    parser = Parser(prog="bipo.py", description="Learn a steering vector from preference pairs.")
    add_model_flags(parser)
    add_pair_flags(parser)
    add = parser.add_argument_group("held-out pairs and output").add_argument
    add("--val", type=Path, help="held-out pairs (default: a tenth of the prompts)")
    add("--out", type=Path, help="folder (default: runs/DATA-layerL[-METHOD])")
    add("--overwrite", action="store_true", help="replace a run found in --out")
    add("--cache-gib", type=float, help="of memory; the rest in --out (default: half of the free)")
    add("--max-pairs", type=int, help="train on at most so many, drawn by the seed")
    add("--label-noise", type=float, default=0, help="share of pairs to swap")
    add = parser.add_argument_group("training (flags win over the preset)").add_argument
    add("--layer", required=True, help="v's block, from 0; 10,13 or auto: the best")
    add("--method", choices=METHODS, default="bipo", help="positive: d = +1; caa, freeform: means")
    add("--preset", choices=PRESETS, help="default: paper")
    add("--seed", type=int, default=0, help="of split, drawn pairs, order and d")
    add("--beta", type=float, help="scale of the margin in the loss, per nat")
    add("--lr", type=float, help="peak learning rate")
    add("--batch-size", type=int, help="pairs a step")
    add("--weight-decay", type=float, help="AdamW's, per unit of rate")
    add("--warmup-steps", type=int, help="steps from rate 0 to the peak")
    add("--epochs", type=int, help="passes over the pairs; each saves a vector")
    add("--schedule-epochs", type=int, help="epochs to rate 0; 0: those run")
    add("--clip-norm", type=float, help="largest norm of v's gradient")
    run_or_exit(parser, run, argv)


if __name__ == "__main__":
    main()
