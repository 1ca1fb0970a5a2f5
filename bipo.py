"""BiPO: learn one steering vector from preference pairs, for a frozen Llama.

    python bipo.py --model llama2-7b-chat --data pairs.jsonl --layer 15

Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through
Bi-directional Preference Optimization", NeurIPS 2024, https://arxiv.org/abs/2406.00045; official
code https://github.com/CaoYuanpu/BiPO (@cef1d00). Their symbols: v is `v`, the direction d is `d`,
L is `layer`, the responses r_T and r_O are `chosen` and `rejected`.

What the model computes without v never changes: the residual stream up to block L and the reference
log-probabilities. The first pass computes both once, one block at a time over all pairs; training
holds and runs only the blocks above L, on a packed batch (see data.py).

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
    TEMPLATES,
    PairIds,
    Parser,
    find_model,
    length,
    open_chat,
    pack,
    read_pairs,
    run_or_exit,
    save_vector,
    split_pairs,
)
from llama import Checkpoint, check_steer, read_config


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
    return torch.stack([part.sum() for part in logps.split(batch.lengths)]).view(
        len(batch.masks), -1
    )


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
def lower_pass(model, layer, ids, h, hold=nullcontext):
    """Fill h, (tokens of all PairIds, dim), with the residual stream after block `layer`. Yields
    after each part of each block.

    hold: what to enter while block i is in use; `Checkpoint.hold` brings it and lets it go.
    """
    for i in range(layer + 1):
        with hold(i):
            stop = 0
            for part in parts(ids):
                batch = pack(ids[part], model.device)
                start, stop = stop, stop + batch.tokens.shape[1]
                x = h[start:stop][None].to(model.device) if i else model.embed(batch.tokens)
                h[start:stop] = model.blocks(x, i, i + 1, batch.positions, batch.masks)[0]
                yield


@torch.no_grad()
def reference_pass(model, layer, ids, h):
    """Yields the CachedPair of each PairIds, given `lower_pass`'s h."""
    rows = h.split([*map(length, ids)])
    for part in parts(ids):
        batch = pack(ids[part], model.device)
        x = torch.cat(rows[part])[None].to(model.device)
        ref_logps = response_logps(model, layer, x, batch)
        yield from map(CachedPair, ids[part], rows[part], ref_logps)


def first_pass(model, layer, ids):
    """The CachedPair of each PairIds, by a model that is in memory as a whole."""
    n_tokens = sum(map(length, ids))
    h = torch.empty(n_tokens, model.config.dim, dtype=model.norm.weight.dtype)
    for _ in lower_pass(model, layer, ids, h):
        pass
    return list(reference_pass(model, layer, ids, h))


# ---- Training ------------------------------------------------------------------------------------


def lr_at(step, peak, warmup, horizon):
    """The official schedule's rate at a 0-based step; the first step's is 0."""
    if step < warmup:  # 1. rise
        return peak * step / warmup
    if step < horizon:  # 2. half a cosine down to 0
        return peak * (1 + math.cos(math.pi * (step - warmup) / (horizon - warmup))) / 2
    return 0.0  # 3. past the horizon


def draw_batches(n, recipe, seed):
    """(row numbers, d) of every step: each epoch in a new order, its short last batch kept."""
    rng = random.Random(seed)
    for _ in range(recipe.epochs):
        order = rng.sample(range(n), n)
        for i in range(0, n, recipe.batch_size):
            yield order[i : i + recipe.batch_size], rng.choice((-1, 1))


@torch.no_grad()
def score(model, layer, v, m, pairs, above=None):
    """Log-probs (N, 2) in nats of CachedPairs steered by m * v; above: see `response_logps`."""
    slices = parts([pair.ids for pair in pairs])
    return torch.cat([steered_logps(model, layer, v, m, pairs[part], above) for part in slices])


def evaluate(model, layer, v, pairs, beta):
    """Mean loss, mean margin (nats) and share of margins with d's sign, for d = +1 and d = -1."""
    ref_logps, report = torch.stack([pair.ref_logps for pair in pairs]), {}
    for d in (1, -1):
        losses, margin = bipo_loss(score(model, layer, v, d, pairs), ref_logps, d, beta)
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
    v = torch.zeros(model.config.dim, dtype=torch.float32, device=model.device)
    v.requires_grad_()
    optimizer = torch.optim.AdamW(
        [v], betas=(0.9, 0.999), eps=1e-8, weight_decay=recipe.weight_decay
    )
    per_epoch = math.ceil(len(pairs) / recipe.batch_size)
    horizon = per_epoch * (recipe.schedule_epochs or recipe.epochs)
    if batches is None:
        batches = draw_batches(len(pairs), recipe, seed)
    for step, (rows, d) in enumerate(batches):
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
            raise ValueError(
                f"step {step + 1}: loss {loss}, gradient {norm}; try another dtype or lr"
            )
        lr = lr_at(step, recipe.lr, recipe.warmup_steps, horizon)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        last = (step + 1) % per_epoch == 0
        report = evaluate(model, layer, v, held_out, recipe.beta) if last and held_out else None
        numbers = (lr, loss.item(), margin.mean().item(), norm.item())
        epoch = step // per_epoch + 1
        yield Step(step + 1, epoch, rows, d, *numbers, report, logps, v.detach().clone())


# ---- Command line --------------------------------------------------------------------------------


def add_model_flags(parser):
    """What bipo.py and eval.py have in common."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="checkpoint folder, alias or hub id")
    group.add_argument(
        "--template", choices=TEMPLATES, help="chat template (default: the vector's or the model's)"
    )
    group.add_argument("--system", help="'' for none (default: the vector's or the template's)")
    group.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: bfloat16 on a GPU, float32 on the CPU)",
    )
    group.add_argument("--lora", help="folder of a PEFT adapter to merge into the weights")


def add_pair_flags(parser):
    """Likewise."""
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--data", type=Path, required=True, help=".csv, .json, .jsonl, .gz; formats: README"
    )
    group.add_argument(
        "--letters", action="store_true", help="answer '(B)' to multiple choice, not its text"
    )
    group.add_argument("--best", action="store_true", help="TruthfulQA: the best answers only")


def pick_device(device, dtype):
    """(torch.device, torch.dtype) from --device and --dtype, which may be None. Raises ValueError
    for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    device = device or next(name for name in there if there[name])
    if not there.get(device.split(":")[0]):
        usable = ", ".join(name for name in there if there[name])
        raise ValueError(f"--device {device} is not there; this machine has {usable}")
    device = torch.device(device)
    dtype = dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return device, getattr(torch, dtype)


def check_folder(out, overwrite):
    """Raises ValueError if the folder can't be made or written to, or holds a run already."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        raise ValueError(f"cannot write to --out {out}: {e.strerror}") from None
    if run_files(out) and not overwrite:
        raise ValueError(f"--out {out} holds a run: name another folder, or --overwrite")


def run_files(out):
    """The vector files of a run in this folder."""
    files = [*out.glob("epoch_*.safetensors"), out / "vector.safetensors"]
    return [file for file in files if file.is_file()]


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
        if hasattr(
            os, "posix_fallocate"
        ):  # else a disk that fills up ends the process, unexplained
            os.posix_fallocate(file.fileno(), 0, size)
        h = np.memmap(file, np.uint8, shape=size)
    except OSError as e:
        raise ValueError(
            f"no room for the first pass, {what}: it may take {memory / 2**30:.2f} GiB of memory "
            f"(--cache-gib), and a file in {folder} cannot hold it: {e.strerror}"
        ) from None
    return torch.from_numpy(h).view(dtype).view(n_tokens, dim), f"{what}, in a file in {folder}"


class Progress:
    """Prints 'step 40/160  12.5 ms each, 0:02 left' and more, every few seconds and at the end.

    quiet: not at the end, if that comes within the first few seconds.
    """

    def __init__(self, what, total, quiet=False):
        self.what, self.total, self.quiet = what, total, quiet
        self.began = self.printed = time.time()

    def __call__(self, done, more=""):
        early = time.time() - self.printed < 5
        if early and (done < self.total or (self.quiet and self.printed == self.began)):
            return
        self.printed = time.time()
        each = (self.printed - self.began) / done
        count = f"{done:{len(str(self.total))}}/{self.total}"
        left = clock(each * (self.total - done))
        line = f"{self.what} {count}  {1000 * each:.1f} ms each, {left} left  {more}"
        print(line.rstrip(), flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run(args):
    # 1. everything that can be wrong, before any long work
    began = time.time()
    flags = {name: getattr(args, name) for name in asdict(Recipe())}
    recipe = replace(PRESETS[args.preset], **{k: v for k, v in flags.items() if v is not None})
    path, base_model = find_model(args.model)
    config = read_config(path)
    check_steer([args.layer], config.n_layers)
    chat = open_chat(path, config, args.template, args.system)
    pairs = read_pairs(args.data, args.letters, args.best)
    print(pairs.report)
    if args.val:
        held_out, origin = read_pairs(args.val, args.letters, args.best), f"of {args.val}"
        print(held_out.report)
    else:
        (pairs, held_out), origin = split_pairs(pairs, args.seed), "split off by prompt"
    ids = [chat.encode_pair(pair, config.max_seq_len) for pair in pairs + held_out]
    device, dtype = pick_device(args.device, args.dtype)
    stem = Path(args.data.name.removesuffix(".gz")).stem
    out = args.out or Path("runs", f"{stem}-layer{args.layer}")
    check_folder(out, args.overwrite)
    checkpoint = Checkpoint(path, dtype, device, args.lora)
    n_tokens = sum(map(length, ids))
    memory = free_memory() / 2 if args.cache_gib is None else args.cache_gib * 2**30
    h, place = open_cache(n_tokens, config.dim, dtype, memory, out)
    settings = {
        "base_model": base_model,
        "model_type": config.family,
        "lora": args.lora or "",
        "n_layers": str(config.n_layers),
        "layer": str(args.layer),
        "template": chat.template,
        "system": chat.system,
        "tokenizer": chat.tokenizer.name,
        "preset": args.preset,
        "recipe": json.dumps(asdict(recipe)),
        "seed": str(args.seed),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "data": f"{len(pairs)} pairs of {args.data}, held out {len(held_out)} {origin}",
    }
    for name, value in settings.items():
        print(f"{name:10}  {value}".rstrip())
    print(f"first pass  {place}")
    no_prompt = [pair.source for pair in pairs + held_out if not str(pair.prompt).strip()]
    if no_prompt:
        print(f"note: {len(no_prompt)} prompts are empty, the first at {no_prompt[0]}")
    shared = {pair.prompt for pair in pairs} & {pair.prompt for pair in held_out}
    if shared:
        example = min(map(str, shared))
        print(f"note: {len(shared)} held-out prompts are trained on, for example {example!r}")
    n_steps = recipe.epochs * math.ceil(len(pairs) / recipe.batch_size)
    if recipe.warmup_steps >= n_steps:
        print(f"note: all {n_steps} steps are warm-up; see --warmup-steps")

    # 2. what does not depend on v; blocks up to the layer come one at a time, the others stay
    model, cached, n_parts = checkpoint.model, [], len(list(parts(ids)))
    progress = Progress(f"first pass, blocks 0-{args.layer}:", n_parts * (args.layer + 1))
    for done, _ in enumerate(lower_pass(model, args.layer, ids, h, checkpoint.hold), 1):
        progress(done)
    checkpoint.read(args.layer + 1, config.n_layers)
    progress = Progress("first pass, reference: pair", len(ids))
    for pair in reference_pass(model, args.layer, ids, h):
        cached.append(pair)
        progress(len(cached))
    training_set, held_out = cached[: len(pairs)], cached[len(pairs) :]

    # 3. training
    progress = Progress("step", n_steps)
    old = run_files(out)
    with open(out / "log.jsonl", "w", encoding="utf-8") as log:
        print(json.dumps(settings | {"first_pass": place}), file=log)
        for step in train(model, args.layer, training_set, held_out, recipe, args.seed):
            row = {k: x for k, x in step._asdict().items() if not isinstance(x, torch.Tensor)}
            row["v_norm"] = step.v.norm().item()
            print(json.dumps(row), file=log, flush=True)
            progress(step.step, "loss {loss:.4f}  lr {lr:.1e}  |v| {v_norm:.3f}".format(**row))
            if step.held_out:
                print(epoch_line(step.epoch, step.held_out), flush=True)
                while old:  # of a run that is overwritten, now that there is something better
                    old.pop().unlink()
                for name in (f"epoch_{step.epoch:02}", "vector"):
                    metadata = settings | {"epoch": str(step.epoch)}
                    save_vector(out / f"{name}.safetensors", {args.layer: step.v}, metadata)
    took = clock(time.time() - began)
    print(f"saved vector.safetensors, a file an epoch and log.jsonl in {out} after {took}")


def epoch_line(epoch, held_out):
    line = f"epoch {epoch:2}  held out"
    for d, x in held_out.items():
        line += f"  d {d:+d}: loss {x['loss']:.4f}, margin {x['margin']:+6.2f} nats,"
        line += f" accuracy {x['accuracy']:4.0%}"
    return line


def main(argv=None):
    parser = Parser(prog="bipo.py", description="Learn a steering vector from preference pairs.")
    add_model_flags(parser)
    add_pair_flags(parser)
    group = parser.add_argument_group("held-out pairs and output")
    group.add_argument("--val", type=Path, help="held-out pairs (default: a tenth of the prompts)")
    group.add_argument("--out", type=Path, help="folder (default: runs/DATA-layerL)")
    group.add_argument("--overwrite", action="store_true", help="replace a run found in --out")
    group.add_argument(
        "--cache-gib",
        type=float,
        help="memory for the first pass; more goes to a file in --out (default: half of the free)",
    )
    group = parser.add_argument_group("training (flags win over the preset)")
    group.add_argument("--layer", type=int, required=True, help="add v after this block, from 0")
    group.add_argument("--preset", choices=PRESETS, default="paper", help="default: paper")
    group.add_argument("--seed", type=int, default=0, help="of the split, the order and d")
    group.add_argument("--beta", type=float, help="scale of the margin in the loss, per nat")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--batch-size", type=int, help="pairs a step")
    group.add_argument("--weight-decay", type=float, help="AdamW's, per unit of rate")
    group.add_argument("--warmup-steps", type=int, help="steps from rate 0 to the peak")
    group.add_argument("--epochs", type=int, help="passes over the pairs; each saves a vector")
    group.add_argument("--schedule-epochs", type=int, help="epochs to rate 0; 0: those run")
    group.add_argument("--clip-norm", type=float, help="largest norm of v's gradient")
    run_or_exit(parser, run, argv)


if __name__ == "__main__":
    main()
