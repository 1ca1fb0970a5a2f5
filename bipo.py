"""BiPO: learn one steering vector from preference pairs, for a frozen Llama.

    python bipo.py --model llama2-7b-chat --data pairs.jsonl --layer 15

Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through
Bi-directional Preference Optimization", NeurIPS 2024, https://arxiv.org/abs/2406.00045; official
code https://github.com/CaoYuanpu/BiPO (@cef1d00). Their symbols: v is `v`, the direction d is `d`,
L is `layer`, the responses r_T and r_O are `chosen` and `rejected`.

What the model computes without v never changes: the residual stream up to block L, and the
reference log-probabilities. The first pass computes both once. Training then runs only the blocks
above L, on batches without padding (see Packing in llama.py).

Where this code departs from the paper (P) and the official code (C), whose numbers tests/golden
holds:
 1. weight decay. P: 0.05. C: 0, because the flag is parsed and never used. Here: the presets.
 2. cosine schedule. P: over the epochs run. C: over 100, of which 5-20 are run. Here: the presets.
 3. gradient clipping. P: not mentioned. C: norm 1.0, an inherited default. Here: 1.0.
 4. d and the pairs' order. P: d per batch. C: d per micro-batch, from Python's global generator.
    Here: per batch, from the run's seed, logged. Given C's draws and order we give C's numbers.
 5. precision. P: not mentioned. C: fp32, two models. Here: any, one model; v and loss in fp32.

Everything above the heading "Command line" needs llama.py beside this file and no other file of
this project, also as modules of a package. The command line needs data.py too. MIT licence.
"""

import json
import math
import os
import random
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __package__:  # this file was copied into a package
    from .llama import Batch, Checkpoint, PairIds, add_vector, check_fit, length, pack, wide
else:
    from llama import Batch, Checkpoint, PairIds, add_vector, check_fit, length, pack, wide

# ---- The objective -------------------------------------------------------------------------------


def bipo_loss(logps: Tensor, ref_logps: Tensor, d: int, beta: float) -> tuple[Tensor, Tensor]:
    """Equation 3 of the paper: losses (P,), and margins (P,) in nats, from log-probs (P, 2) of the
    chosen and the rejected response. Under d = -1 the model, steered by -v, is asked to prefer the
    rejected one."""
    gain = logps - ref_logps
    margin = gain[:, 0] - gain[:, 1]
    return -F.logsigmoid(d * beta * margin), margin


class CachedPair(NamedTuple):
    """A pair after the first pass."""

    ids: PairIds
    h: Tensor  # (T, dim), residual stream after block `layer` at `prompt | chosen | rejected`
    ref_logps: Tensor  # (2,) log-probs of chosen and rejected without v, in nats
    layer: int  # -1: the stream is the embedding


def steered_logps(model, layer, v, d, pairs: list[CachedPair]) -> Tensor:
    """`response_logps` of the pairs, (P, 2) nats, under steering by d * v at every position. v:
    (dim,), or one for each token of the pairs, (T, dim)."""
    batch = pack([pair.ids for pair in pairs], model.device)
    h = torch.cat([pair.h for pair in pairs])[None].to(model.device)  # (1, T, dim)
    return response_logps(model, layer, add_vector(h, d * v), batch)


def response_logps(model, layer, h: Tensor, batch: Batch, steer=None) -> Tensor:
    """log p(response | prompt), summed over the response's tokens with EOS, (P, 2) nats: chosen and
    rejected of each pair, from the residual stream after block `layer`, (1, T, dim).

    steer: {layer: vector} for blocks above `layer`.
    """
    h = model.blocks(h, layer + 1, model.config.n_layers, batch.positions, batch.masks, steer=steer)
    logits = model.head(h[0, batch.predictors])  # (R, vocab_size)
    logps = -F.cross_entropy(logits, batch.targets, reduction="none")  # (R,)
    sums = [response.sum() for response in logps.split(batch.lengths)]
    return torch.stack(sums).view(len(batch.masks), -1)


def pair_gradients(model, layer, pairs: list[CachedPair]) -> Tensor:
    """g of each pair, (N, dim) in nats per unit of v, see `preference_gradient`. Raises ValueError
    for no pairs."""
    if not pairs:
        raise ValueError("there are no pairs to differentiate")
    found = []
    for part in parts([pair.ids for pair in pairs]):
        n_tokens = torch.tensor([len(pair.h) for pair in pairs[part]])
        v = torch.zeros(len(n_tokens), model.config.dim, dtype=wide(pairs[0].h.dtype))
        v = v.to(model.device).requires_grad_()  # a vector for each pair
        v_of_token = v.repeat_interleave(n_tokens.to(model.device), dim=0)  # (T, dim)
        logps = steered_logps(model, layer, v_of_token, 1, pairs[part])
        found += torch.autograd.grad((logps[:, 0] - logps[:, 1]).sum(), v)
    return torch.cat(found)


def preference_gradient(model, layer, pairs: list[CachedPair]) -> Tensor:
    """g, (dim,) in nats per unit of v: the mean over pairs of the gradient, at v = 0, of
    log p(chosen | prompt; h + v) - log p(rejected | prompt; h + v).

    At v = 0 the margin of equation 3 is 0 and its gradient is g. The loss of d * v there has the
    gradient -(beta / 2) * d * d * g, which is the same for d = +1 and d = -1. While the margin is
    nearly linear in v, g hardly changes, so BiPO's steps all go along it, rescaled by AdamW. To
    first order m * v has the mean margin m * (g . v): one nat at m = 1 for v = g / |g|^2.
    """
    return pair_gradients(model, layer, pairs).mean(0)


# ---- The first pass: what does not depend on v ---------------------------------------------------

MAX_TOKENS = 1024  # that run at a time; it bounds the memory and changes results by rounding only


def parts(ids: list[PairIds]):
    """Slices of a list of PairIds, each of at most MAX_TOKENS tokens, or of one longer pair."""
    start = n_tokens = 0
    for i, pair in enumerate(ids):
        if n_tokens + length(pair) > MAX_TOKENS and i > start:
            yield slice(start, i)
            start = i
            n_tokens = 0
        n_tokens += length(pair)
    if ids:
        yield slice(start, len(ids))


@torch.no_grad()
def first_pass(model, layer, ids, hold=nullcontext, progress=lambda done, total: None):
    """A list, the CachedPair of each PairIds. Each block runs over all pairs before the next does.

    layer: -1 stands for the embedding.
    hold: a context in which block i is in memory, -1 being the embedding, for a model that lacks
        its lower blocks; see `Checkpoint.hold`.
    progress: called after each part of the work with the share of it that is done, in pairs.
    Raises ValueError for a layer that is not there and for an empty prompt or response.
    """
    if layer != -1:
        check_fit(model.config, [layer], 0)
    for number, pair in enumerate(ids):
        if not all(pair):
            raise ValueError(f"pair {number} has an empty prompt or an empty response")
    groups = [ids[part] for part in parts(ids)]
    n_stages = layer + 2  # the blocks 0 .. layer, and the reference
    done = 0

    # 1. The embedding. `streams` holds the residual stream of each group, (1, T, dim), on the CPU.
    streams = []
    with hold(-1):
        for group in groups:
            batch = pack(group, model.device)
            streams.append(model.embed(batch.tokens).cpu())

    # 2. The blocks up to the vector, one at a time over all groups.
    for block in range(layer + 1):
        with hold(block):
            for g, group in enumerate(groups):
                batch = pack(group, model.device)
                h = streams[g].to(model.device)
                h = model.blocks(h, block, block + 1, batch.positions, batch.masks)
                streams[g] = h.cpu()
                done += len(group)
                progress(math.ceil(done / n_stages), len(ids))

    # 3. The reference: the blocks above, without v.
    cached = []
    for group, h in zip(groups, streams, strict=True):
        batch = pack(group, model.device)
        ref_logps = response_logps(model, layer, h.to(model.device), batch)  # (P, 2)
        stream_of_pair = h[0].split([length(pair) for pair in group])  # each (T, dim)
        for pair, stream, ref in zip(group, stream_of_pair, ref_logps, strict=True):
            cached.append(CachedPair(pair, stream, ref, layer))
        done += len(group)
        progress(math.ceil(done / n_stages), len(ids))
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


PAPER = Recipe()
PRESETS = {"paper": PAPER, "official": Recipe(weight_decay=0.0, schedule_epochs=100)}


def lr_at(step: int, peak: float, warmup: int, horizon: int) -> float:
    """The official schedule's rate at a 0-based step; the first step's is 0."""
    if step < warmup:  # 1. rise
        return peak * step / warmup
    if step < horizon:  # 2. half a cosine down to 0
        return peak * (1 + math.cos(math.pi * (step - warmup) / (horizon - warmup))) / 2
    return 0.0  # 3. past the horizon


def draw_batches(n_pairs, recipe, seed, directions=(-1, 1)):
    """(row numbers, d) of every step: each epoch in a new order, its short last batch kept."""
    rng = random.Random(seed)
    for _ in range(recipe.epochs):
        order = rng.sample(range(n_pairs), n_pairs)
        for i in range(0, n_pairs, recipe.batch_size):
            yield order[i : i + recipe.batch_size], rng.choice(directions)


def outcomes(model, layer, v, d, pairs, beta):
    """Log-probs (P, 2), losses (P,) and margins (P,) of the pairs under d * v, part by part."""
    for part in parts([pair.ids for pair in pairs]):  # there is mostly one part
        logps = steered_logps(model, layer, v, d, pairs[part])
        ref_logps = torch.stack([pair.ref_logps for pair in pairs[part]])
        losses, margins = bipo_loss(logps, ref_logps, d, beta)
        yield logps, losses, margins


def summed(x, split):
    """x; if the pairs are split among processes, plus the x of all others, by one all_reduce.
    Raises ValueError if one of them has ended."""
    if split:
        try:
            torch.distributed.all_reduce(x)
        except RuntimeError as e:
            raise ValueError(f"another process has ended: {e}") from None
    return x


@torch.no_grad()
def evaluate(model, layer, v, pairs, beta, split=False):
    """{d: {loss, margin, accuracy}} for d = +1 and d = -1: the mean loss, the mean margin in nats,
    and the share of margins with d's sign. pairs, split: as in `train`. Raises ValueError if a
    loss is not finite."""
    pairs_here = [pair for pair in pairs if pair]
    report = {}
    for d in (1, -1):
        sums = v.new_zeros(3)
        for _, losses, margins in outcomes(model, layer, v, d, pairs_here, beta):
            sums += torch.stack([losses.sum(), margins.sum(), (d * margins > 0).sum()])
        loss, margin, accuracy = (summed(sums, split) / len(pairs)).tolist()
        if not math.isfinite(loss):
            raise ValueError(f"held-out loss {loss} at d {d:+d}; try another dtype or lr")
        report[d] = {"loss": loss, "margin": margin, "accuracy": accuracy}
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
    logps: Tensor  # (P, 2), before the step, of the pairs that this process holds
    v: Tensor  # (dim,), after the step
    state: Tensor  # (3, dim), v and AdamW's running means of its gradient and the square


def start(model, recipe, after):
    """(v, its AdamW, steps done): from zero, or as a Step's (step, state) says."""
    steps_done, state = after or (0, torch.zeros(3, model.config.dim, dtype=torch.float32))
    state = state.to(model.device, copy=True)
    v = state[0].requires_grad_()
    adam = torch.optim.AdamW([v], betas=(0.9, 0.999), eps=1e-8, weight_decay=recipe.weight_decay)
    adam.state[v] = {
        "step": torch.tensor(float(steps_done), dtype=torch.float32),
        "exp_avg": state[1],
        "exp_avg_sq": state[2],
    }
    return v, adam, steps_done


def backward(model, layer, v, d, batch, beta, split):
    """The batch's mean loss under d * v, its mean margin in nats, and the log-probs (P, 2) of the
    pairs that this process holds. v.grad becomes the gradient of the loss.

    The batch runs in parts of at most MAX_TOKENS, and each process runs the pairs that it holds;
    the sums over parts and processes are those of the whole batch.
    """
    pairs_here = [pair for pair in batch if pair]
    v.grad = torch.zeros_like(v)
    sums = v.new_zeros(2)  # of the losses and of the margins, over the size of the batch
    all_logps = [v.new_zeros(0, 2)]
    for logps, losses, margins in outcomes(model, layer, v, d, pairs_here, beta):
        (losses.sum() / len(batch)).backward()  # adds to v.grad
        sums += torch.stack([losses.sum(), margins.sum()]).detach() / len(batch)
        all_logps.append(logps.detach())

    totals = summed(torch.cat([v.grad, sums]), split)  # (dim + 2,)
    v.grad = totals[:-2]
    loss, margin = totals[-2:].tolist()
    return loss, margin, torch.cat(all_logps)


def train(
    model, layer, pairs, held_out, recipe=PAPER, seed=0, batches=(), after=(), names=(), split=False
):
    """Algorithm 1: learn v on CachedPairs. Yields a Step after each step; the last one has the v.

    batches: [(row numbers, d)] to use instead of the seed's.
    after: (step, state) of the Step to go on after. What follows is bitwise what it would have been
        without the interruption.
    names: of the pairs, for the error; by default their row numbers.
    split: the pairs are split among the processes of torch.distributed. None stands for a pair that
        another process holds; the gradients and all numbers are summed over the processes, so that
        v is the same in each.
    Raises ValueError for no pairs, for pairs of another layer, and, with the batch's pairs, if the
    loss or its gradient is not finite.
    """
    if not pairs:
        raise ValueError("there are no pairs to train on")
    for pair in pairs + held_out:
        if pair and pair.layer != layer:
            raise ValueError(f"the pairs are of a first pass to layer {pair.layer}, not {layer}")
    v, adam, steps_done = start(model, recipe, after)
    steps_per_epoch = math.ceil(len(pairs) / recipe.batch_size)
    horizon = steps_per_epoch * (recipe.schedule_epochs or recipe.epochs)

    for step, (rows, d) in enumerate(batches or draw_batches(len(pairs), recipe, seed), start=1):
        if step <= steps_done:
            continue

        # 1. The loss of a batch of pairs under d * v, and its gradient.
        batch = [pairs[i] for i in rows]
        loss, margin, logps = backward(model, layer, v, d, batch, recipe.beta, split)
        grad_norm = torch.nn.utils.clip_grad_norm_(v, recipe.clip_norm).item()
        if not math.isfinite(loss + grad_norm):
            where = [names[i] for i in rows] if names else rows
            numbers = f"loss {loss}, gradient {grad_norm}"
            raise ValueError(f"step {step}, pairs {where}: {numbers}; try another dtype or lr")

        # 2. A step of AdamW.
        lr = lr_at(step - 1, recipe.lr, recipe.warmup_steps, horizon)
        adam.param_groups[0]["lr"] = lr
        adam.step()

        # 3. What was done; after an epoch, how v does on the held-out pairs.
        report = None
        if held_out and step % steps_per_epoch == 0:
            report = evaluate(model, layer, v, held_out, recipe.beta, split)
        state = torch.stack([v.detach(), adam.state[v]["exp_avg"], adam.state[v]["exp_avg_sq"]])
        yield Step(
            step=step,
            epoch=math.ceil(step / steps_per_epoch),
            rows=rows,
            d=d,
            lr=lr,
            loss=loss,
            margin=margin,
            grad_norm=grad_norm,
            held_out=report,
            logps=logps,
            v=state[0],
            state=state,
        )


# ---- Command line --------------------------------------------------------------------------------

# (+1, +1), not (+1,): both methods then draw equally often, so the order of the pairs is the same.
DIRECTIONS = {"bipo": (-1, 1), "positive": (1, 1)}
VECTOR = "vector.safetensors"  # the files in the folder of a run, beside one for each epoch
STATE = "state.safetensors"
LOG = "log.jsonl"
LAYER_HELP = "the block that v is added after, from 0; of --method gradient also several, or all"
METHOD_HELP = "positive: always d = +1; gradient: one backward pass instead of training"
SAVE_EVERY = 20  # steps between two saves of what --resume reads; an epoch's end saves it too
HELD_OUT_PAIRS = "held_out.jsonl"
PROGRESS = "loss {loss:.4f}  lr {lr:.1e}  |v| "
HELD_OUT = "d {:+d}: loss {loss:.4f}, margin {margin:+6.2f} nats, accuracy {accuracy:4.0%}"
ACCURACY = "accuracy: the share of held-out pairs that moved in the right direction, however little"


def join_torchrun(args):
    """(number of this process, number of processes), which is (0, 1) without torchrun. All
    processes do the same, each for its share of the pairs; the first alone prints, logs, saves."""
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes == 1:
        return 0, 1

    rank = int(os.environ["RANK"])
    if rank > 0:  # print to nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.distributed.init_process_group()  # gloo for the CPU, nccl for cards
    if args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return rank, n_processes


def recipe_of(args, n_pairs):
    """The preset, in which the flags that were given replace what it says. The warm-up of a short
    run is a tenth of its steps, unless it was given."""
    given = {}
    for f in fields(Recipe):
        value = getattr(args, f.name)
        if value is not None:
            given[f.name] = value

    recipe = replace(PRESETS[args.preset or "paper"], **given)
    if args.warmup_steps is None and args.preset != "official":
        tenth = steps_of(recipe, n_pairs) // 10
        if tenth < recipe.warmup_steps:
            print(f"note: {tenth} warm-up steps, a tenth of the run; the paper has 100")
            recipe = replace(recipe, warmup_steps=tenth)
    return recipe


def steps_of(recipe, n_pairs):
    return recipe.epochs * math.ceil(n_pairs / recipe.batch_size)


def check_flags(args):
    """Raises ValueError for flags that do not go together."""
    if args.method == "gradient":
        names = ["preset", *(f.name for f in fields(Recipe))]
        given = [name for name in names if getattr(args, name) is not None]
        if args.resume:
            given.append("resume")
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--method gradient does not train, so leave out {flags}")
    elif len(args.layer) > 1 or args.layer == ["all"]:
        raise ValueError("a training has one --layer; all or several need --method gradient")


def layer_or_all(text):
    return text if text == "all" else int(text)


def default_out(args):
    """runs/DATA-layerL[-METHOD]"""
    stem = Path(args.data.name.removesuffix(".gz")).stem
    method = "" if args.method == "bipo" else f"-{args.method}"
    layers = "-".join(str(layer) for layer in args.layer)
    return Path("runs", f"{stem}-layer{layers}{method}")


class PairSets(NamedTuple):
    """The pairs of a run."""

    training: list[PairIds]
    held_out: list[PairIds]
    sources: list[str]  # "file:line" of each training pair
    description: str  # for the vector's metadata
    hashes: str  # of the training pairs, for the metadata too
    split_off: list[dict]  # the records of the held-out pairs, if they are not from --val


def read_sets(args, chat, max_seq_len):
    """The PairSets of the command line's files. Without --val, a tenth of the prompts of --data is
    held out."""
    training = data.read_pairs(args.data, args.skip_bad)
    training, ids = data.encode_pairs(chat, training, max_seq_len, args.skip_bad)
    ids_of = dict(zip(training, ids, strict=True))
    if args.val:
        held_out = data.read_pairs(args.val, args.skip_bad)
        held_out, ids = data.encode_pairs(chat, held_out, max_seq_len, args.skip_bad)
        ids_of |= dict(zip(held_out, ids, strict=True))
        origin = f"of {args.val}"
    else:
        training, held_out = data.split_pairs(training, args.seed)
        origin = "split off by prompt"

    data.note_shortcuts(training)
    shared = {str(pair.prompt) for pair in training} & {str(pair.prompt) for pair in held_out}
    if shared:
        print(f"note: {len(shared)} held-out prompts are trained on, for example {min(shared)!r}")

    training_ids = [ids_of[pair] for pair in training]
    held_out_ids = [ids_of[pair] for pair in held_out]
    digest = data.digest(str(training_ids + held_out_ids))
    counts = f"{len(training)} pairs of {args.data}, held out {len(held_out)} {origin}"
    return PairSets(
        training=training_ids,
        held_out=held_out_ids,
        sources=[pair.source for pair in training],
        description=f"{counts}, ids {digest}",
        hashes=" ".join(data.pair_hash(pair) for pair in training),
        split_off=[] if args.val else [data.record_of(pair) for pair in held_out],
    )


@contextmanager
def locked(out):
    """Inside, the folder `out` is this process' own. Raises ValueError if another process has it.
    The lock ends with its process, however that ends."""
    import fcntl  # Windows has none, where the functions above work all the same

    data.check_output(out / LOG)  # makes the folder
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"--out {out} is in use by another process: name another folder") from None
    finally:
        os.close(folder)


def stream_norm(pairs):
    """|h|: the median norm of the residual stream over all tokens of CachedPairs but the first of
    each, whose norm is larger by orders of magnitude."""
    norms = [pair.h[1:].float().norm(dim=-1) for pair in pairs]
    return torch.cat(norms).median().item()


def scale_of(v, norm):
    """The length of v, alone and beside the residual stream's."""
    return f"{v.norm():.3f} ({v.norm() / norm:.2%} of |h|)"


def print_held_out(title, report):
    both = [HELD_OUT.format(d, **numbers) for d, numbers in report.items()]
    print(title, *both, sep="  ", flush=True)


class RunSoFar(NamedTuple):
    """What a run goes on after."""

    steps_done: int
    state: Tensor  # (3, dim), see Step
    log_rows: list[str]  # the settings, then a row for each step


def check_out(out, args):
    """Raises ValueError if `out` cannot be written, or holds a run that is neither resumed nor
    replaced."""
    for name in (VECTOR, STATE, LOG, HELD_OUT_PAIRS):
        data.check_output(out / name)
    holds_run = (out / VECTOR).exists() or (out / STATE).exists() or any(out.glob("epoch_*"))
    if holds_run and not (args.resume or args.overwrite):
        raise ValueError(f"--out {out} holds a run: name another folder, --resume or --overwrite")


def open_run(out, settings, dim, resume):
    """The RunSoFar of the run in folder `out` if it is resumed, else of a new run. Raises
    ValueError for a run with other settings."""
    if not (resume and (out / STATE).exists()):
        state = torch.zeros(3, dim, dtype=torch.float32)
        return RunSoFar(0, state, [json.dumps(settings)])

    state_rows, saved = data.load_vector(out / STATE)
    ours = settings | json.loads(settings["recipe"])
    theirs = saved | json.loads(saved.get("recipe", "{}"))
    names = [name for name in ours if ours[name] != theirs.get(name)]
    names = [name for name in names if name not in ("recipe", "pairs")]  # said by others of these
    if names:
        others = ", ".join(f"{name} {theirs.get(name)}, not {ours[name]}" for name in names)
        if names == ["epochs"]:
            others += f" (its schedule ends after {theirs['epochs']})"
        raise ValueError(f"{out} holds a run with {others}; --overwrite instead replaces it")
    steps_done = int(saved["step"])
    log_rows = (out / LOG).read_text(encoding="utf-8").splitlines()
    if len(log_rows) <= steps_done:
        raise ValueError(f"{out / LOG} ends before step {steps_done} of {STATE}")
    print(f"going on after step {steps_done}")
    return RunSoFar(steps_done, torch.stack([*state_rows.values()]), log_rows[: 1 + steps_done])


def start_run(out, so_far):
    """Write the log so far. A new run first deletes the state and the epochs of an earlier one,
    whose last vector stays until the first epoch has another."""
    if so_far.steps_done == 0:
        for file in [out / STATE, *out.glob("epoch_*.safetensors")]:
            file.unlink(missing_ok=True)
    data.write_text(out / LOG, "".join(f"{row}\n" for row in so_far.log_rows))


def save_state(out, settings, steps_done, state):
    """Write what `open_run` reads."""
    data.save_vector(out / STATE, dict(enumerate(state)), settings | {"step": str(steps_done)})


def save_steps(steps, out, layer, settings, n_steps, so_far, norm):
    """Go through the Steps of `train`: log each, save v after each epoch, and save what --resume
    reads every SAVE_EVERY steps and when the run is interrupted. norm: |h|, see `stream_norm`."""
    progress = data.Progress("step", start=so_far.steps_done)
    last = (so_far.steps_done, so_far.state)
    try:
        for step in steps:
            row = {name: x for name, x in step._asdict().items() if not isinstance(x, Tensor)}
            row["v_norm"] = step.v.norm().item()
            with open(out / LOG, "a", encoding="utf-8") as log:
                print(json.dumps(row), file=log)
            progress(step.step, n_steps, PROGRESS.format(**row) + scale_of(step.v, norm))

            if step.held_out:
                data.clear_line()
                print_held_out(f"epoch {step.epoch:2}  held out", step.held_out)
                settings["epoch"] = str(step.epoch)
                for name in (f"epoch_{step.epoch:02}.safetensors", VECTOR):
                    data.save_vector(out / name, {layer: step.v}, settings)

            last = (step.step, step.state)  # only now: a step that is interrupted is done again
            if step.held_out or step.step % SAVE_EVERY == 0:
                save_state(out, settings, *last)
    except (KeyboardInterrupt, SystemExit) as e:
        save_state(out, settings, *last)
        e.add_note(f"the same command with --resume --out {out} goes on after step {last[0]}")
        raise
    print(ACCURACY)
    print(f"saved {VECTOR}, a file an epoch and {LOG} in {out}")


class Setup(NamedTuple):
    """What a run has before its long work."""

    layers: list[int]
    out: Path
    settings: dict[str, str]  # printed, and saved as the metadata of the vectors
    sets: PairSets
    recipe: Recipe | None  # None: --method gradient
    checkpoint: Checkpoint
    rank: int  # of this process
    n_processes: int


def set_up(args):
    """The Setup of a command line. Finds everything that can be wrong, before any long work."""
    check_flags(args)
    rank, n_processes = join_torchrun(args)
    device_names = (args.device or "").split(",")
    args.device = device_names[0]
    opened = data.open_model(args)
    more_devices = [data.pick_device(name, args.dtype)[0] for name in device_names[1:]]
    config = opened.config
    layers = list(range(config.n_layers)) if args.layer == ["all"] else args.layer
    check_fit(config, layers, 0)
    sets = read_sets(args, opened.chat, config.max_seq_len)
    checkpoint = Checkpoint(opened.path, opened.dtype, opened.device, more_devices)

    settings = {
        "base_model": opened.name,
        "model_type": config.family,
        "layer": " ".join(str(layer) for layer in layers),
        "n_layers": str(config.n_layers),
        "template": opened.chat.template,
        "system": opened.chat.system,
        "tokenizer": opened.chat.tokenizer.name,
        "method": args.method,
        "seed": str(args.seed),
        "data": sets.description,
        "device": opened.device.type,
        "dtype": str(opened.dtype).removeprefix("torch."),
    }
    recipe = None
    if args.method == "gradient":
        settings["unit"] = "multiplier 1 moves the mean margin by one nat, to first order"
    else:
        recipe = recipe_of(args, len(sets.training))
        settings["preset"] = args.preset or "paper"
        settings["recipe"] = json.dumps(asdict(recipe))
    for name, value in settings.items():
        print(f"{name:10}  {value}".rstrip())
    settings["pairs"] = sets.hashes
    out = args.out or default_out(args)
    return Setup(layers, out, settings, sets, recipe, checkpoint, rank, n_processes)


def run(args):
    setup = set_up(args)
    with locked(setup.out) if setup.rank == 0 else nullcontext():
        if setup.rank == 0:
            check_out(setup.out, args)
        if args.method == "gradient":
            layer = run_gradient(setup)
        else:
            layer = run_training(args, setup)
        if setup.rank == 0:
            say_what_next(args, setup, layer)


def say_what_next(args, setup, layer):
    """Write the pairs that were held out, and print the command that measures v on them."""
    held_out = args.val
    if not held_out:
        held_out = setup.out / HELD_OUT_PAIRS
        lines = [json.dumps(record, ensure_ascii=False) for record in setup.sets.split_off]
        data.write_text(held_out, "".join(f"{line}\n" for line in lines))
        print(f"saved the held-out pairs: {held_out}")

    command = ["python", "eval.py", "--model", args.model, "--vector", setup.out]
    if len(setup.layers) > 1:
        command += ["--layer", layer]
    command += ["--data", held_out, "--pairs", args.data, "--baseline", "gradient"]
    data.say_next(command)


def cache_pairs(setup):
    """The CachedPairs (of the training pairs, of the held-out ones) of a run with one layer. None
    stands for those of other processes."""
    (layer,) = setup.layers
    checkpoint = setup.checkpoint
    checkpoint.read(layer + 1, checkpoint.model.config.n_layers)
    ids = setup.sets.training + setup.sets.held_out
    share = slice(setup.rank, None, setup.n_processes)
    progress = data.Progress("first pass")
    cached = [None] * len(ids)
    cached[share] = first_pass(checkpoint.model, layer, ids[share], checkpoint.hold, progress)
    n_training = len(setup.sets.training)
    return cached[:n_training], cached[n_training:]


# ---- Training: --method bipo and positive


def run_training(args, setup):
    """Learn the vector as Algorithm 1 does, and save it after each epoch. Returns its layer."""
    (layer,) = setup.layers
    recipe = setup.recipe
    n_steps = steps_of(recipe, len(setup.sets.training))
    if recipe.warmup_steps >= n_steps:
        print(f"note: all {n_steps} steps are warm-up; lower --warmup-steps below that")
    model = setup.checkpoint.model
    so_far = open_run(setup.out, setup.settings, model.config.dim, args.resume)
    pairs, held_out = cache_pairs(setup)
    pairs_here = [pair for pair in pairs if pair]
    norm = stream_norm(pairs_here)
    print(f"|h| {norm:.2f}, the median norm of the residual stream after block {layer}")
    seconds = step_seconds(model, layer, pairs_here, recipe.batch_size / setup.n_processes)
    print(f"{n_steps} steps, about {data.duration(seconds * (n_steps - so_far.steps_done))}")

    steps = train(
        model,
        layer,
        pairs,
        held_out,
        recipe,
        batches=draw_batches(len(pairs), recipe, args.seed, DIRECTIONS[args.method]),
        after=(so_far.steps_done, so_far.state),
        names=setup.sets.sources,
        split=setup.n_processes > 1,
    )
    if setup.rank == 0:
        start_run(setup.out, so_far)  # under --overwrite the old vector stays until here
        settings = setup.settings | {"stream_norms": json.dumps({layer: norm})}
        save_steps(steps, setup.out, layer, settings, n_steps, so_far, norm)
    else:
        for _ in steps:
            pass
    return layer


def step_seconds(model, layer, pairs, batch_size):
    """How long a step takes, by the second of two that are thrown away."""
    v = torch.zeros(model.config.dim, device=model.device, requires_grad=True)
    batch = pairs[: math.ceil(batch_size)]
    for _ in range(2):
        began = time.time()
        backward(model, layer, v, 1, batch, PAPER.beta, split=False)
    return time.time() - began


# ---- One backward pass: --method gradient


class OnePass(NamedTuple):
    """What one forward and one backward pass over pairs say of some layers."""

    gradients: Tensor  # (layers, N, dim), g of each pair, see `preference_gradient`
    stream_norms: list[float]  # the median of |h| after each layer


def pass_at_one_layer(model, layer, pairs):
    """The OnePass of CachedPairs, through the blocks above the layer."""
    progress = data.Progress("backward pass")
    gradients = [torch.zeros(0, model.config.dim, device=model.device)]
    for part in parts([pair.ids for pair in pairs]):
        gradients.append(pair_gradients(model, layer, pairs[part]))
        progress(part.stop, len(pairs))
    return OnePass(torch.cat(gradients)[None], [stream_norm(pairs)])


def pass_at_layers(model, layers, ids, what):
    """The OnePass of PairIds, through the whole model. A vector that is added after a block has as
    its gradient the sum of the residual stream's gradients there, so that one pass gives all."""
    progress = data.Progress(what)
    gradients = [torch.zeros(len(layers), 0, model.config.dim, device=model.device)]
    norms = {layer: [] for layer in layers}  # of the tokens
    for part in parts(ids):
        batch = pack(ids[part], model.device)
        n_tokens = torch.tensor([length(pair) for pair in ids[part]], device=model.device)
        v = torch.zeros(len(layers), len(n_tokens), model.config.dim, device=model.device)
        v.requires_grad_()

        h = model.embed(batch.tokens)
        block = 0
        for v_of_pair, layer in zip(v, layers, strict=True):
            h = model.blocks(h, block, layer + 1, batch.positions, batch.masks)
            norms[layer].append(h[batch.positions > 0].detach().float().norm(dim=-1))
            h = add_vector(h, v_of_pair.repeat_interleave(n_tokens, dim=0))
            block = layer + 1
        logps = response_logps(model, layers[-1], h, batch)
        gradients += torch.autograd.grad((logps[:, 0] - logps[:, 1]).sum(), v)
        progress(part.stop, len(ids))
    medians = [torch.cat(norms[layer]).median().item() for layer in layers]
    return OnePass(torch.cat(gradients, dim=1), medians)


def run_gradient(setup):
    """Save v = g / |g|^2 at each layer, and print how it does on the held-out pairs. Returns the
    layer, of several the one to try first."""
    model = setup.checkpoint.model
    layers = setup.layers
    split = setup.n_processes > 1
    share = slice(setup.rank, None, setup.n_processes)
    if len(layers) == 1:
        pairs, held_out = cache_pairs(setup)
        one_pass = pass_at_one_layer(model, layers[0], pairs[share])
    else:
        setup.checkpoint.read(-1, model.config.n_layers)
        one_pass = pass_at_layers(model, layers, setup.sets.training[share], "backward pass")

    # The sums over all pairs, also those of other processes.
    n_pairs = len(setup.sets.training)
    total = summed(one_pass.gradients.sum(1), split)  # (layers, dim)
    of_others = total[:, None] - one_pass.gradients  # (layers, N, dim)
    pulls = (one_pass.gradients * of_others).sum(-1) > 0  # (layers, N)
    agreement = (summed(pulls.sum(1), split) / n_pairs).tolist()
    g = total / n_pairs
    v = g / g.square().sum(-1, keepdim=True)
    if not v.isfinite().all():
        raise ValueError("the gradient is 0 or not finite; try another dtype or other pairs")

    norms = dict(zip(layers, one_pass.stream_norms, strict=True))
    if len(layers) == 1:
        best = layers[0]
        print(f"|g| {g.norm():.3f} nats per unit  |v| {scale_of(v[0], norms[best])}")
        print(f"{agreement[0]:.0%} of the pairs pull in the direction of the others")
        print_held_out("held out", evaluate(model, best, v[0], held_out, PAPER.beta, split))
        print(ACCURACY)
    else:
        held_out = pass_at_layers(model, layers, setup.sets.held_out[share], "held-out pairs")
        margins = (held_out.gradients * v[:, None]).sum(-1)  # (layers, N), to first order
        sums = torch.stack([margins.sum(1), (margins > 0).sum(1)])
        sums = summed(sums, split) / len(setup.sets.held_out)
        best = print_layers(layers, v, norms, agreement, sums)

    if setup.rank == 0:
        more = {"stream_norms": json.dumps(norms)}
        if len(layers) > 1:
            more["alternatives"] = "a vector for each layer, of which --layer takes one"
        data.save_vector(
            setup.out / VECTOR, dict(zip(layers, v, strict=True)), setup.settings | more
        )
        print(f"saved {setup.out / VECTOR}")
    return best


def print_layers(layers, v, norms, agreement, held_out):
    """Print one row a layer, and which layer to try first, which is returned.

    held_out: (2, layers), the mean margin in nats at multiplier 1 and the share of pairs that v
        moves the right way, both to first order.
    """
    print("layer      |v|      |h|  |v|/|h|  agreement  held-out margin  moved right")
    ratios = {}
    for i, layer in enumerate(layers):
        ratios[layer] = (v[i].norm() / norms[layer]).item()
        sizes = f"{layer:5} {v[i].norm():8.3f} {norms[layer]:8.2f} {ratios[layer]:8.2%}"
        margin, moved_right = held_out[:, i].tolist()
        print(f"{sizes} {agreement[i]:10.0%} {margin:+16.2f} {moved_right:12.0%}")
    best = min(ratios, key=ratios.get)
    print(f"layer {best} has the smallest |v|/|h|: try it first")
    return best


def main(argv=None):
    global data  # the one module that only the command line needs
    if __package__:
        from . import data
    else:
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
    add("--layer", type=layer_or_all, nargs="+", required=True, help=LAYER_HELP)
    add("--method", choices=[*DIRECTIONS, "gradient"], default="bipo", help=METHOD_HELP)
    add("--preset", choices=PRESETS, help="default: paper")
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
