"""BiPO: learn one steering vector from preference pairs, for a frozen Llama.

    python bipo.py --model llama2-7b-chat --data pairs.jsonl --layer 15

Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through
Bi-directional Preference Optimization", NeurIPS 2024, https://arxiv.org/abs/2406.00045; official
code https://github.com/CaoYuanpu/BiPO (@cef1d00). Their symbols: v is `v`, the direction d is `d`,
L is `layer`, the responses r_T and r_O are `chosen` and `rejected`.

What the model computes without v never changes: the residual stream up to block L, and the
reference log-probabilities. The first pass computes both once; training runs only the blocks above
L, on batches without padding (see Packing in llama.py). Started by torchrun, process i of N
keeps every N-th pair from pair i on, and one all_reduce a step sums the gradients of v.

Where this code departs from the paper (P) and the official code (C), whose numbers tests/golden
holds:
 1. weight decay. P: 0.05. C: 0, for the flag is parsed and never used. Here: the presets.
 2. cosine schedule. P: over the epochs run. C: over 100, of which 5-20 are run. Here: the presets.
 3. gradient clipping. P: not mentioned. C: norm 1.0, an inherited default. Here: 1.0.
 4. d and the pairs' order. P: d per batch. C: d per micro-batch, from Python's global generator.
    Here: per batch, from the run's seed, logged. Given C's draws and order we give C's numbers.
 5. precision. P: not mentioned. C: fp32, two models. Here: any, one model; v and loss in fp32.

The functions need llama.py beside this file, the command line needs data.py too. MIT licence.
"""

import json
import math
import os
import random
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llama import Checkpoint, PairIds, add_vector, check_fit, length, pack

# ---- The objective -------------------------------------------------------------------------------


def bipo_loss(logps, ref_logps, d, beta):
    """Equation 3 of the paper: losses (P,), margins (P,) in nats, from log-probs (P, 2) of chosen
    and rejected. Under d = -1 the model, steered by -v, is to prefer rejected."""
    gain = logps - ref_logps
    margin = gain[:, 0] - gain[:, 1]
    return -F.logsigmoid(d * beta * margin), margin


class CachedPair(NamedTuple):
    """A pair after the first pass."""

    ids: PairIds
    h: torch.Tensor  # (T, dim), residual stream after block `layer` at `prompt | chosen | rejected`
    ref_logps: torch.Tensor  # (2,) log-probs of chosen and rejected without v, in nats


def steered_logps(model, layer, v, d, pairs):
    """`response_logps` of CachedPairs under steering by d * v, at every position."""
    batch = pack([pair.ids for pair in pairs], model.device)
    h = torch.cat([pair.h for pair in pairs])[None].to(model.device)  # (1, T, dim)
    return response_logps(model, layer, add_vector(h, d * v), batch)


def response_logps(model, layer, h, batch, steer=None):
    """log p(response | prompt), summed over the response's tokens with EOS, (P, 2) nats: chosen and
    rejected of each pair, from the residual stream after block `layer`, (1, T, dim).

    steer: {layer: vector} for blocks above `layer`, which training does not use.
    """
    n_layers = model.config.n_layers
    h = model.blocks(h, layer + 1, n_layers, batch.positions, batch.masks, steer=steer)
    logits = model.head(h[0, batch.predictors])  # (R, vocab_size)
    logps = -F.cross_entropy(logits, batch.targets, reduction="none")  # (R,)
    sums = [part.sum() for part in logps.split(batch.lengths)]
    return torch.stack(sums).view(len(batch.masks), -1)


# ---- The first pass: what does not depend on v ---------------------------------------------------

MAX_TOKENS = 1024  # that run at a time; it bounds the memory and changes results by rounding only


def parts(ids):
    """Slices of a list of PairIds, each of at most MAX_TOKENS tokens, or of one longer pair."""
    start = total = 0
    for i, pair in enumerate(ids):
        if total + length(pair) > MAX_TOKENS and i > start:
            yield slice(start, i)
            start, total = i, 0
        total += length(pair)
    if ids:
        yield slice(start, len(ids))


@torch.no_grad()
def first_pass(model, layer, ids, hold=nullcontext, progress=lambda done, total: None):
    """The CachedPair of each PairIds. Each block runs over all pairs before the next one does.

    layer: -1 stands for the embedding.
    hold: a context in which block i is in memory, -1 being the embedding, for a model that lacks
        its lower blocks; see `Checkpoint.hold`.
    progress: called after each part of the work.
    """
    groups, cached = [ids[part] for part in parts(ids)], []
    total = len(groups) * (layer + 2)
    with hold(-1):
        streams = [model.embed(pack(group, model.device).tokens).cpu() for group in groups]
    for i in range(layer + 1):
        with hold(i):
            for j, group in enumerate(groups, 1):
                batch, h = pack(group, model.device), streams.pop(0).to(model.device)
                h = model.blocks(h, i, i + 1, batch.positions, batch.masks)
                streams.append(h.cpu())  # (1, T, dim)
                progress(i * len(groups) + j, total)
    for j, (group, h) in enumerate(zip(groups, streams, strict=True), total - len(groups) + 1):
        ref_logps = response_logps(model, layer, h.to(model.device), pack(group, model.device))
        cached += map(CachedPair, group, h[0].split([*map(length, group)]), ref_logps)
        progress(j, total)
    return cached


# ---- Training ------------------------------------------------------------------------------------


def setting(default, help, zero=False):
    """A field of Recipe and, with this help text, a flag; zero: may it be 0?"""
    return field(default=default, metadata={"help": f"{help} (default: {default})", "zero": zero})


@dataclass(frozen=True)
class Recipe:
    """The settings of the paper's appendix A.3."""

    beta: float = setting(0.1, "scale of the margin in the loss, per nat")
    lr: float = setting(5e-4, "peak learning rate")
    batch_size: int = setting(4, "pairs a step")
    weight_decay: float = setting(0.05, "AdamW's, per unit of learning rate", zero=True)
    warmup_steps: int = setting(100, "steps from rate 0 to the peak", zero=True)
    epochs: int = setting(20, "passes over the pairs; each saves a vector")
    schedule_epochs: int = setting(0, "epochs until the rate is 0; 0: all epochs run", zero=True)
    clip_norm: float = setting(1.0, "largest norm of v's gradient")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if not 0 <= value < 1e6 or (value == 0 and not f.metadata["zero"]):
                raise ValueError(f"{f.name} is {value}: it must be positive and below 1000000")


PRESETS = {"paper": Recipe(), "official": Recipe(weight_decay=0.0, schedule_epochs=100)}
# (+1, +1), not (+1,): both methods then draw equally often, so the order of the pairs is the same.
DIRECTIONS = {"bipo": (-1, 1), "positive": (1, 1)}


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


def summed(x):
    """x, to which all_reduce adds the x of all other processes, if there are any. Raises ValueError
    if one of them has ended."""
    if torch.distributed.is_initialized():
        try:
            torch.distributed.all_reduce(x)
        except RuntimeError as e:
            raise ValueError(f"another process has ended: {e}") from None
    return x


def outcomes(model, layer, v, d, pairs, beta):
    """Log-probs (P, 2), losses (P,) and margins (P,) of CachedPairs under d * v, part by part."""
    for part in parts([pair.ids for pair in pairs]):  # mostly one
        logps = steered_logps(model, layer, v, d, pairs[part])
        ref_logps = torch.stack([pair.ref_logps for pair in pairs[part]])
        yield logps, *bipo_loss(logps, ref_logps, d, beta)


@torch.no_grad()
def evaluate(model, layer, v, pairs, beta):
    """Mean loss, mean margin (nats) and share of margins with d's sign, for d = +1 and d = -1.
    pairs: as in `train`. Raises ValueError if a loss is not finite."""
    own, report = [pair for pair in pairs if pair], {}
    for d in (1, -1):
        sums = v.new_zeros(3)
        for _, losses, margin in outcomes(model, layer, v, d, own, beta):
            sums += torch.stack([losses.sum(), margin.sum(), (d * margin > 0).sum()])
        means = (summed(sums) / len(pairs)).tolist()
        if not math.isfinite(means[0]):
            raise ValueError(f"held-out loss {means[0]} at d {d:+d}; try another dtype or lr")
        report[d] = dict(zip(("loss", "margin", "accuracy"), means, strict=True))
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
    logps: torch.Tensor  # (P, 2), before the step, of the pairs that this process holds
    v: torch.Tensor  # (dim,), after the step
    state: torch.Tensor  # (3, dim), v and AdamW's running means of its gradient and the square


def train(model, layer, pairs, held_out, recipe=Recipe(), seed=0, batches=None, after=(), names=()):
    """Algorithm 1: learn v on CachedPairs. Yields a Step after each step; the last one has the v.

    pairs, held_out: None stands for a pair that another process of torch.distributed holds. The
        gradients and all numbers are summed over the processes, so that v is the same in each.
    batches: [(row numbers, d)] to use instead of the seed's.
    after: (step, state) of the Step to go on after. What follows is bitwise what it would have been
        without the interruption.
    names: of the pairs, for the error; by default their row numbers.
    Raises ValueError, with the batch's pairs, if the loss or its gradient is not finite.
    """
    done, state = after or (0, torch.zeros(3, model.config.dim))
    v, mean, square = state.to(model.device, copy=True)
    v.requires_grad_()
    adam = torch.optim.AdamW([v], betas=(0.9, 0.999), eps=1e-8, weight_decay=recipe.weight_decay)
    adam.state[v] = dict(step=torch.tensor(float(done)), exp_avg=mean, exp_avg_sq=square)
    per_epoch = math.ceil(len(pairs) / recipe.batch_size)
    horizon = per_epoch * (recipe.schedule_epochs or recipe.epochs)
    batches = draw_batches(len(pairs), recipe, seed) if batches is None else batches
    for step, (rows, d) in list(enumerate(batches, 1))[done:]:
        own, logps = [pairs[i] for i in rows if pairs[i]], [v.new_zeros(0, 2)]
        v.grad, sums = torch.zeros_like(v), v.new_zeros(2)
        for part_logps, losses, margin in outcomes(model, layer, v, d, own, recipe.beta):
            (losses.sum() / len(rows)).backward()
            sums += torch.stack([losses.sum(), margin.sum()]).detach()
            logps.append(part_logps.detach())
        sums = summed(torch.cat([v.grad, sums / len(rows)]))  # (dim + 2,)
        v.grad, (loss, margin) = sums[:-2], sums[-2:].tolist()
        norm = torch.nn.utils.clip_grad_norm_(v, recipe.clip_norm).item()
        if not math.isfinite(loss + norm):
            where = f"step {step}, pairs {[names[i] for i in rows] if names else rows}"
            raise ValueError(f"{where}: loss {loss}, gradient {norm}; try another dtype or lr")
        adam.param_groups[0]["lr"] = lr = lr_at(step - 1, recipe.lr, recipe.warmup_steps, horizon)
        adam.step()
        last = step % per_epoch == 0
        report = evaluate(model, layer, v, held_out, recipe.beta) if last and held_out else None
        numbers = (lr, loss, margin, norm, report, torch.cat(logps))
        state = torch.stack([v.detach(), mean, square])
        yield Step(step, math.ceil(step / per_epoch), rows, d, *numbers, state[0], state)


# ---- Command line --------------------------------------------------------------------------------

SAVE_EVERY = 20  # steps between two saves of what --resume reads; an epoch's end saves it too
PROGRESS = "loss {loss:.4f}  lr {lr:.1e}  |v| {v_norm:.3f}"
HELD_OUT = "d {:+d}: loss {loss:.4f}, margin {margin:+6.2f} nats, accuracy {accuracy:4.0%}"


def run(args):
    import data

    # 1. the processes of torchrun: all do the same but for their share of the pairs, and the first
    # alone prints, logs and saves
    rank, n = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if n > 1:
        torch.distributed.init_process_group()  # gloo for the CPU, nccl for cards
    if n > 1 and args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"

    # 2. everything that can be wrong, before any long work
    flags = {f.name: x for f in fields(Recipe) if (x := getattr(args, f.name)) is not None}
    recipe, layer = replace(PRESETS[args.preset], **flags), args.layer
    args.device, *more = (args.device or "").split(",")
    path, base_model, config, chat, device, dtype = data.open_model(args)
    check_fit(config, [layer], 0)
    ids, names, what = data.read_sets(args, chat, config.max_seq_len)
    checkpoint = Checkpoint(path, dtype, device, [data.pick_device(x, args.dtype)[0] for x in more])
    stem = Path(args.data.name.removesuffix(".gz")).stem
    out = args.out or Path("runs", f"{stem}-layer{layer}-{args.method}".removesuffix("-bipo"))
    settings = {"base_model": base_model, "model_type": config.family, "layer": str(layer)}
    settings |= {"n_layers": str(config.n_layers), "template": chat.template, "system": chat.system}
    settings |= {"tokenizer": chat.tokenizer.name, "method": args.method, "preset": args.preset}
    settings |= {"recipe": json.dumps(asdict(recipe)), "seed": str(args.seed), "data": what}
    settings |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    for name, value in settings.items():
        print(f"{name:10}  {value}".rstrip())
    n_steps = recipe.epochs * math.ceil(len(names) / recipe.batch_size)
    if recipe.warmup_steps >= n_steps:
        print(f"note: all {n_steps} steps are warm-up; lower --warmup-steps below that")
    after, rows = data.open_run(out, settings, config.dim, args.resume, args.overwrite)

    # 3. what does not depend on v; the blocks up to the layer come one at a time, the others stay
    checkpoint.read(layer + 1, config.n_layers)
    model, progress, cached = checkpoint.model, data.Progress("first pass"), [None] * len(ids)
    cached[rank::n] = first_pass(model, layer, ids[rank::n], checkpoint.hold, progress)

    # 4. the vector; under --overwrite the old one stays until it is replaced
    pairs, held_out = cached[: len(names)], cached[len(names) :]
    batches = draw_batches(len(pairs), recipe, args.seed, DIRECTIONS[args.method])
    steps = train(model, layer, pairs, held_out, recipe, args.seed, batches, after, names)
    if rank > 0:
        return sum(1 for _ in steps)

    data.start_run(out, after, rows)
    progress = data.Progress("step", start=after[0])
    try:
        for step in steps:
            row = {k: x for k, x in step._asdict().items() if not isinstance(x, torch.Tensor)}
            row["v_norm"] = step.v.norm().item()
            with open(out / data.LOG, "a", encoding="utf-8") as log:
                print(json.dumps(row), file=log)
            progress(step.step, n_steps, PROGRESS.format(**row))
            if step.held_out:
                both = [HELD_OUT.format(d, **x) for d, x in step.held_out.items()]
                print(f"epoch {step.epoch:2}  held out", *both, sep="  ", flush=True)
                settings["epoch"] = str(step.epoch)
                for name in (f"epoch_{step.epoch:02}", "vector"):
                    data.save_vector(out / f"{name}.safetensors", {layer: step.v}, settings)
            after = step.step, step.state  # only now: a step that is interrupted is done again
            if step.held_out or step.step % SAVE_EVERY == 0:
                data.save_run(out, settings, after)
    except (KeyboardInterrupt, SystemExit) as e:
        data.save_run(out, settings, after)
        e.add_note(f"the same command with --resume --out {out} goes on after step {after[0]}")
        raise
    print(f"saved vector.safetensors, a file an epoch and log.jsonl in {out}")


def main(argv=None):
    import data

    parser = data.Parser(prog="bipo.py", description="Learn a steering vector from pairs.")
    data.add_model_flags(parser)
    data.add_pair_flags(parser, required=True)
    add = parser.add_argument_group("held-out pairs and output").add_argument
    add("--val", type=Path, help="held-out pairs (default: a tenth of the prompts)")
    add("--out", type=Path, help="folder (default: runs/DATA-layerL[-METHOD])")
    add("--overwrite", action="store_true", help="replace a run found in --out")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add = parser.add_argument_group("training (flags win over the preset)").add_argument
    add("--layer", type=int, required=True, help="the block that v is added after, from 0")
    add("--method", choices=DIRECTIONS, default="bipo", help="positive: always d = +1")
    add("--preset", choices=PRESETS, default="paper", help="default: paper")
    add("--seed", type=int, default=0, help="random seed of the split, the pairs' order and d")
    for f in fields(Recipe):
        add(f"--{f.name.replace('_', '-')}", type=f.type, help=f.metadata["help"])
    data.run_or_exit(parser, run, argv)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        # Not through the interpreter's own end: gloo's threads outlive destroy_process_group (torch
        # 2.13), and one that still holds a tensor would then abort the process.
        os._exit(0)
