"""How fast and how small is this, beside the usual ways, on this machine?

    make bench                 # prints tables, writes runs/bench.json
    make bench DEVICE=cuda     # a 7B in bf16
    python tests/experiments/bench.py --parts steps --sizes 15M
    python tests/experiments/bench.py --parts phases --sizes 7B --dtype bfloat16 --folder runs/7b

The parts:

steps: training beside the official way, which is what CaoYuanpu/BiPO @cef1d00 does in a step, in
    transformers: two models, one of them with d * v added after block L; chosen and rejected of a
    batch under one another, padded at the right; all logits; log_softmax over the vocabulary at
    every position; the reference in each step anew. Ours is bipo.py. Both see the same random
    weights, threads, batches and d's, and take turns in one process; in fp32 losses and vectors
    must agree. Peak memory is that of a process of its own: all of it on a CPU, what torch
    allocated on a GPU.
vector: the whole way from 642 pairs to a vector: the official recipe of 20 epochs, ours by BiPO,
    and ours by one backward pass (`--method gradient`). The steps of the first two take turns with
    parts of the backward pass; their times are multiplied by the number of steps, which the table
    says. First pass and backward pass run over all pairs.
generation: a sweep, 32 prompts x 5 multipliers x 64 new tokens, beside transformers' `generate`
    with a forward hook; the greedy ids must agree.
complexity: seconds per step against layer, batch size, response length and model size, beside the
    floating-point operations by the formula in `step_flops`.
phases: what bipo.py does, streaming from the checkpoint: seconds of each phase, peak memory.
full: 20 epochs over 642 pairs, end to end.

The tables are printed. Unless only some parts or sizes are asked for, they are also put into
RESULTS.md, where it is there, between its lines `<!-- bench -->` (on a GPU `<!-- bench cuda -->`)
and `<!-- end -->`.

The checkpoints are random and made here. The pairs have the lengths of the official power-seeking
data: prompt 86 tokens on average and 253 at most, chosen 24 and 121, rejected 25 and 119.
"""

import argparse
import itertools
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from reports import markdown, put
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bipo import Recipe, draw_batches, first_pass, lr_at, pair_gradients, train
from llama import Checkpoint, Llama, PairIds, generate, hf_name, length, load, read_config


class Size(NamedTuple):
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    layer: int  # that is steered


SIZES = {
    "15M": Size(288, 768, 6, 6, 3),
    "110M": Size(768, 2048, 12, 12, 6),
    "350M": Size(1024, 2816, 24, 16, 12),
    "7B": Size(4096, 11008, 32, 32, 15),  # Llama-2-7b's shape
}
VOCAB_SIZE = 32000
BOS = 1
EOS = 2
BATCH_SIZE = 4
RECIPE = Recipe(batch_size=BATCH_SIZE, warmup_steps=0, epochs=1, weight_decay=0.0)
WARM_UP = 2  # steps of each measurement that are not counted
MULTIPLIERS = [-2.0, -1.0, 0.0, 1.0, 2.0]
VECTORS = {  # {way: what is said of it}
    "official": "official recipe (a step's time x steps)",
    "ours": "ours, BiPO (first pass + a step's time x steps)",
    "gradient": "ours, one backward pass (all measured)",
}
RESULTS = Path(__file__).with_name("RESULTS.md")


# ---- Random pairs and models ---------------------------------------------------------------------


def random_ids(rng, n):
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(n)]


def make_pairs(n, seed=0):
    """PairIds of random tokens whose lengths are spread as the official data's."""
    rng = random.Random(seed)

    def ids(mean, most):
        spread = rng.lognormvariate(0, 0.5) * 0.885  # its mean is about 1
        return random_ids(rng, round(min(most, max(3, spread * mean))))

    pairs = []
    for _ in range(n):
        prompt = [BOS, *ids(85, 252)]
        chosen = [*ids(23, 120), EOS]
        rejected = [*ids(24, 118), EOS]
        pairs.append(PairIds(prompt, chosen, rejected))
    return pairs


def make_checkpoint(size, folder, dtype=torch.float32):
    """Write a random Llama as a Hugging Face folder: shards of eight blocks and their index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(SIZES[size], folder, dtype)

    # Only the shapes are made here: the whole model may not fit into memory.
    with torch.device("meta"):
        empty_weights = Llama(read_config(folder)).state_dict()
    shards = {}  # {file: names of its weights}
    for name in empty_weights:
        block = int(name.split(".")[1]) if name.startswith("layers.") else 0
        shards.setdefault(f"{block // 8}.safetensors", []).append(name)

    torch.manual_seed(0)
    weight_map = {}
    for file, names in shards.items():
        shard = {hf_name(x): random_weight(x, empty_weights[x].shape, dtype) for x in names}
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)

    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_config(size, folder, dtype):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": size.dim,
        "intermediate_size": size.hidden_dim,
        "num_hidden_layers": size.n_layers,
        "num_attention_heads": size.n_heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))


def random_weight(name, shape, dtype):
    weight = torch.empty(shape, dtype=dtype)
    if "norm" in name:
        return weight.fill_(1)
    return weight.normal_(0, 0.02)


def theirs(folder, dtype, device):
    """The checkpoint in transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


# ---- Training, both ways -------------------------------------------------------------------------


class Padded(NamedTuple):
    """A batch of P pairs as the official trainer lays it out: all chosen answers, each with its
    prompt, and below them all rejected ones."""

    tokens: torch.Tensor  # (2 P, T)
    seen: torch.Tensor  # (2 P, T), 0 where there is only padding
    scored: torch.Tensor  # (2 P, T), true where a token belongs to an answer


def pad(pairs, device):
    sequences = [(pair.prompt, pair.chosen) for pair in pairs]
    sequences += [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)

    tokens = torch.full((len(sequences), width), EOS)
    seen = torch.zeros_like(tokens)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        seen[row, :end] = 1
        scored[row, len(prompt) : end] = True
    return Padded(tokens.to(device), seen.to(device), scored.to(device))


def official_logps(model, batch):
    """Summed log-probabilities (2 P,) of the answers in a Padded batch."""
    output = model(batch.tokens, attention_mask=batch.seen, use_cache=False)
    logits = output.logits[:, :-1]  # those of the last token predict nothing
    following = batch.tokens[:, 1:, None]
    logps = logits.log_softmax(-1).gather(2, following)[..., 0]
    return (logps * batch.scored[:, 1:]).sum(-1)


def official_steps(folder, layer, pairs, batches, dtype=torch.float32, device="cpu"):
    """Yields (loss, v) of each step, done the official way."""
    policy = theirs(folder, dtype, device)
    reference = theirs(folder, dtype, device)
    v = torch.zeros(policy.config.hidden_size, device=device, requires_grad=True)
    direction = {}  # holds the step's d, which the hook reads

    def steer(block, inputs, h):
        return (h + direction["d"] * v).type_as(h)

    policy.model.layers[layer].register_forward_hook(steer)
    optimizer = torch.optim.AdamW([v], lr=RECIPE.lr, weight_decay=0.0)
    horizon = math.ceil(len(pairs) / BATCH_SIZE)

    for step, (rows, d) in enumerate(batches):
        direction["d"] = d
        batch = pad([pairs[row] for row in rows], device)

        # Equation 3: the reference runs anew in each step.
        with torch.no_grad():
            ref_logps = official_logps(reference, batch)
        chosen_gain, rejected_gain = (official_logps(policy, batch) - ref_logps).chunk(2)
        margin = chosen_gain - rejected_gain
        loss = -F.logsigmoid(d * RECIPE.beta * margin).mean()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(v, RECIPE.clip_norm)
        optimizer.param_groups[0]["lr"] = lr_at(step, RECIPE.lr, 0, horizon)
        optimizer.step()
        yield loss.item(), v.detach()


class Prepared(NamedTuple):
    """A model and its pairs after the first pass."""

    model: Llama  # only the blocks above the layer, the embedding and the head are in memory
    cached: list  # CachedPairs
    seconds: dict  # {phase: seconds}


def prepare(folder, layer, pairs, dtype=torch.float32, device="cpu"):
    """Stream the checkpoint through the first pass, as bipo.py does."""
    began = time.perf_counter()
    checkpoint = Checkpoint(folder, dtype, device)
    model = checkpoint.model
    checkpoint.read(layer + 1, model.config.n_layers)
    was_read = time.perf_counter()
    cached = first_pass(model, layer, pairs, checkpoint.hold)
    ended = time.perf_counter()
    seconds = {"read upper blocks": was_read - began, "first pass": ended - was_read}
    return Prepared(model, cached, seconds)


def backward_pass(model, layer, pairs, device):
    """(seconds, g of each pair) of CachedPairs, as --method gradient computes them."""
    return timed(lambda: pair_gradients(model, layer, pairs), device)


def draw(n_pairs, steps):
    """The first batches of an epoch, [(row numbers, d)]."""
    return list(itertools.islice(draw_batches(n_pairs, RECIPE, seed=0), steps))


def timed(work, device="cpu"):
    """(seconds, result) of work(); on a GPU, until that has done it."""
    wait_for(device)
    began = time.perf_counter()
    result = work()
    wait_for(device)
    return time.perf_counter() - began, result


def wait_for(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def compare_steps(size, folder, dtype, device, steps=14, their_dtype=torch.float32):
    """A step of both ways, a row of the table. Raises AssertionError if they disagree."""
    layer = SIZES[size].layer
    pairs = make_pairs(BATCH_SIZE * (steps + 1))
    batches = draw(len(pairs), steps)
    official = official_steps(folder, layer, pairs, batches, their_dtype, device)
    prepared = prepare(folder, layer, pairs, dtype, device)
    ours = train(prepared.model, layer, prepared.cached, [], RECIPE, batches=batches)
    exact = dtype == their_dtype == torch.float32

    their_seconds = []
    our_seconds = []
    product_shares = []
    for rows, their_time, our_time in in_turns(official, ours, batches, exact, device):
        products = step_products(size, [pairs[row] for row in rows])
        product_time = product_seconds(products, True, dtype, device)
        their_seconds.append(their_time)
        our_seconds.append(our_time)
        product_shares.append(product_time / our_time)

    their_median = statistics.median(their_seconds[WARM_UP:])
    our_median = statistics.median(our_seconds[WARM_UP:])
    n_batches = len(pairs) / BATCH_SIZE
    tokens_a_batch = sum(map(length, pairs)) / n_batches
    return {
        "size": size,
        "layer": layer,
        "steps": steps - WARM_UP,
        "official_dtype": str(their_dtype),
        "official_s": their_median,
        "ours_s": our_median,
        "ratio": their_median / our_median,
        "ours_tokens_per_s": tokens_a_batch / our_median,
        "product_share": statistics.median(product_shares[WARM_UP:]),
        "first_pass_in_steps_a_batch": prepared.seconds["first pass"] / n_batches / our_median,
    }


def in_turns(official, ours, batches, exact, device):
    """Yields (row numbers, seconds of the official step, seconds of ours) for each batch. The steps
    take turns, so that a moment in which the machine is slow slows both. Raises AssertionError if
    they disagree."""
    for rows, _ in batches:
        their_time, (their_loss, their_v) = timed(lambda: next(official), device)
        our_time, our_step = timed(lambda: next(ours), device)
        check_equal(their_loss, their_v, our_step, exact)
        yield rows, their_time, our_time


def check_equal(their_loss, their_v, our_step, exact):
    """Raises AssertionError if the losses of a step differ or, where both ways are in fp32 and so
    exact, the vectors."""
    # bf16 keeps 8 bits of each number: a log-probability of 250 nats moves by a few tenths
    tolerance = 1e-4 if exact else 0.1
    assert abs(their_loss - our_step.loss) <= tolerance, (their_loss, our_step.loss)
    if exact:
        close = torch.allclose(their_v, our_step.v, atol=1e-5, rtol=1e-3)
        assert close, (their_v - our_step.v).abs()


# ---- What matrix products alone take -------------------------------------------------------------


class Products(NamedTuple):
    """Equal matrix products: x (rows, n_in) with a weight (n_out, n_in)."""

    rows: int
    n_in: int
    n_out: int
    count: int


def block_products(shape, tokens, n_blocks):
    """Those of some blocks in a forward pass over this many tokens; shape: a Size."""
    return [
        Products(tokens, shape.dim, shape.dim, 4 * n_blocks),
        Products(tokens, shape.dim, shape.hidden_dim, 2 * n_blocks),
        Products(tokens, shape.hidden_dim, shape.dim, n_blocks),
    ]


def step_products(size, pairs):
    """Those of a training step's forward pass."""
    shape = SIZES[size]
    tokens = sum(map(length, pairs))
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    of_blocks = block_products(shape, tokens, shape.n_layers - shape.layer - 1)
    return [*of_blocks, Products(scored, shape.dim, VOCAB_SIZE, 1)]


def product_seconds(products, backward, dtype=torch.float32, device="cpu"):
    """What these products take alone on this machine; backward: with those of the gradient with
    respect to x."""
    total = 0.0
    for rows, n_in, n_out, count in products:
        x = torch.randn(rows, n_in, dtype=dtype, device=device)
        weight = torch.randn(n_out, n_in, dtype=dtype, device=device)
        grad = torch.randn(rows, n_out, dtype=dtype, device=device)
        total += count * median_seconds(F.linear, x, weight, device)
        if backward:
            total += count * median_seconds(torch.matmul, grad, weight, device)
    return total


def median_seconds(product, left, right, device):
    seconds = [timed(lambda: product(left, right), device)[0] for _ in range(WARM_UP + 5)]
    return statistics.median(seconds[WARM_UP:])


# ---- Peak memory, phases, a whole run ------------------------------------------------------------


def alone(way, size, folder, steps, n_pairs, dtype, device):
    """What a process of its own reports of one way: phases in seconds, peak memory in MiB."""
    flags = {
        "--alone": way,
        "--sizes": size,
        "--folder": folder,
        "--steps": steps,
        "--pairs": n_pairs,
        "--dtype": str(dtype).removeprefix("torch."),
        "--device": device,
    }
    command = [sys.executable, __file__]
    for flag, value in flags.items():
        command += [flag, str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(way, size, folder, steps, n_pairs, dtype, device):
    """Print what `alone` returns, in the process that it starts."""
    layer = SIZES[size].layer
    pairs = make_pairs(n_pairs)
    batches = draw(n_pairs, steps)

    report = {}
    if way == "official":
        run = official_steps(folder, layer, pairs, batches, dtype, device)
    else:
        prepared = prepare(folder, layer, pairs, dtype, device)
        report |= prepared.seconds
        run = train(prepared.model, layer, prepared.cached, [], RECIPE, batches=batches)

    if way == "gradient":
        report["backward pass"], _ = backward_pass(prepared.model, layer, prepared.cached, device)
    else:
        report["step"] = statistics.median(timed(lambda: next(run), device)[0] for _ in batches)
    report["peak_mib"] = peak_mib(device)
    print(json.dumps(report))


def peak_mib(device):
    """Of this process: all its memory on a CPU, what torch allocated on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def full_run(size, folder, dtype, device, n_pairs=642, epochs=20):
    """Seconds of the first pass and of all epochs, streamed from the checkpoint."""
    layer = SIZES[size].layer
    pairs = make_pairs(n_pairs)
    recipe = replace(RECIPE, epochs=epochs)

    first_pass_s, prepared = timed(lambda: prepare(folder, layer, pairs, dtype, device), device)
    run = train(prepared.model, layer, prepared.cached, [], recipe)
    training_s, steps = timed(lambda: list(run), device)
    return {
        "size": size,
        "steps": len(steps),
        "first_pass_s": first_pass_s,
        "training_s": training_s,
    }


class Phases(NamedTuple):
    """The seconds of a way from pairs to a vector; of what it does not do, 0."""

    first_pass_s: float = 0.0
    step_s: float = 0.0
    steps: int = 0
    backward_pass_s: float = 0.0

    def total(self):
        return self.first_pass_s + self.step_s * self.steps + self.backward_pass_s


def compare_vectors(size, folder, dtype, device, turns=14, n_pairs=642, epochs=20):
    """Rows of the table: the whole way from pairs to a vector, by the official recipe, by ours and
    by one backward pass. Raises AssertionError if the steps of the first two disagree."""
    layer = SIZES[size].layer
    pairs = make_pairs(n_pairs)
    batches = draw(n_pairs, turns)
    prepared = prepare(folder, layer, pairs, dtype, device)
    official = official_steps(folder, layer, pairs, batches, dtype, device)
    ours = train(prepared.model, layer, prepared.cached, [], RECIPE, batches=batches)

    # After each two steps, the backward pass goes on by its share of the pairs.
    their_seconds = []
    our_seconds = []
    backward_seconds = 0.0
    exact = dtype == torch.float32
    for turn, steps in enumerate(in_turns(official, ours, batches, exact, device)):
        _, their_time, our_time = steps
        their_seconds.append(their_time)
        our_seconds.append(our_time)
        share = prepared.cached[turn::turns]
        seconds, _ = backward_pass(prepared.model, layer, share, device)
        backward_seconds += seconds

    # The mean, not the median, because batches differ in length.
    n_steps = epochs * math.ceil(n_pairs / BATCH_SIZE)
    their_s = statistics.mean(their_seconds[WARM_UP:])
    ours_s = statistics.mean(our_seconds[WARM_UP:])
    first_pass_s = sum(prepared.seconds.values())
    ways = {
        "official": Phases(step_s=their_s, steps=n_steps),
        "ours": Phases(first_pass_s=first_pass_s, step_s=ours_s, steps=n_steps),
        "gradient": Phases(first_pass_s=first_pass_s, backward_pass_s=backward_seconds),
    }
    rows = []
    for way, phases in ways.items():
        row = {"size": size, "pairs": n_pairs, "vector": VECTORS[way], **phases._asdict()}
        row["total_s"] = phases.total()
        row["times_as_fast"] = ways["official"].total() / phases.total()
        rows.append(row)
    return rows


# ---- Generation ----------------------------------------------------------------------------------


def compare_generation(size, folder, dtype, device, n_prompts=32, new_tokens=64):
    """A sweep of multipliers, ours and transformers'. Raises AssertionError if the greedy ids
    differ in fp32."""
    shape = SIZES[size]
    prompts = [pair.prompt for pair in make_pairs(n_prompts)]
    v = torch.randn(shape.dim, generator=torch.Generator().manual_seed(0)).to(device)

    # A row of the batch is one prompt at one multiplier.
    row_prompts = [prompt for prompt in prompts for _ in MULTIPLIERS]
    row_multipliers = torch.tensor(MULTIPLIERS * n_prompts, device=device)
    row_vectors = row_multipliers[:, None, None] * v  # (B, 1, dim)
    n_rows = len(row_prompts)

    their_model = theirs(folder, dtype, device)
    model = load(folder, dtype, device)
    steer = {shape.layer: row_vectors}
    their_s, their_ids = timed(
        lambda: their_answers(their_model, shape.layer, row_vectors, row_prompts, new_tokens),
        device,
    )
    ours_s, our_ids = timed(lambda: generate(model, row_prompts, new_tokens, -1, steer), device)

    n_same = sum(a == b for a, b in zip(their_ids, our_ids, strict=True))
    everything_same = n_same == n_rows
    assert everything_same or dtype != torch.float32, (
        f"{n_rows - n_same} of {n_rows} answers differ"
    )

    products = sweep_products(shape, prompts, row_prompts, new_tokens)
    return {
        "size": size,
        "transformers_tokens_per_s": n_rows * new_tokens / their_s,
        "ours_tokens_per_s": n_rows * new_tokens / ours_s,
        "ratio": their_s / ours_s,
        "same_answers": n_same / n_rows,
        "product_share": product_seconds(products, False, dtype, device) / ours_s,
    }


def their_answers(model, layer, vectors, prompts, new_tokens):
    """The new ids of transformers' `generate`, steered by a hook. It pads prompts at the left."""
    width = max(map(len, prompts))
    tokens = [[0] * (width - len(ids)) + ids for ids in prompts]
    seen = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]

    def steer(block, inputs, h):
        return (h + vectors).type_as(h)

    model.model.layers[layer].register_forward_hook(steer)
    ids = model.generate(
        torch.tensor(tokens, device=vectors.device),
        attention_mask=torch.tensor(seen, device=vectors.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[:, width:].tolist()


def sweep_products(shape, prompts, row_prompts, new_tokens):
    """The matrix products of our sweep: below the vector each prompt runs once, not once a row."""
    n_rows = len(row_prompts)
    upper_blocks = shape.n_layers - shape.layer - 1
    return [
        *block_products(shape, sum(map(len, prompts)), shape.layer + 1),
        *block_products(shape, sum(map(len, row_prompts)), upper_blocks),
        *block_products(shape, n_rows, shape.n_layers * (new_tokens - 1)),
        Products(n_rows, shape.dim, VOCAB_SIZE, new_tokens),
    ]


# ---- Complexity ----------------------------------------------------------------------------------


def step_flops(size, layer, pairs):
    """Floating-point operations of a training step, a product and its sum being two:

        4 T B W + 12 B D sum(t^2) + 4 R D V

    T tokens of the batch in B = n_layers - layer - 1 blocks of W = 4 D^2 + 3 D F weights, width D,
    feed-forward width F; t tokens of each pair, which attend to each other; R response tokens,
    vocabulary V. Forward is 2 a weight, backward for activations alone as much again; attention has
    2 products forward and 4 backward.
    """
    shape = SIZES[size]
    n_blocks = shape.n_layers - layer - 1
    weights = 4 * shape.dim**2 + 3 * shape.dim * shape.hidden_dim
    tokens = sum(map(length, pairs))
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    squares = sum(length(pair) ** 2 for pair in pairs)

    of_weights = 4 * tokens * n_blocks * weights
    of_attention = 12 * n_blocks * shape.dim * squares
    of_head = 4 * scored * shape.dim * VOCAB_SIZE
    return of_weights + of_attention + of_head


class Cell(NamedTuple):
    """What is varied: a batch of equal pairs, their prompt 86 tokens long."""

    layer: int
    batch_size: int = BATCH_SIZE
    response_tokens: int = 24  # of each answer


def complexity_cells(size):
    """The usual case of a size and, for one of them, each of its numbers varied alone."""
    usual = Cell(SIZES[size].layer)
    cells = [usual]
    if size == "110M":
        cells += [usual._replace(layer=layer) for layer in (0, 3, 9, 11)]
        cells += [usual._replace(batch_size=n) for n in (1, 2, 8, 16)]
        cells += [usual._replace(response_tokens=n) for n in (6, 96, 384)]
    return cells


def measure_complexity(size, model, cell, steps=7):
    """A row of the table."""
    rng = random.Random(0)
    prompt = random_ids(rng, 86)
    chosen = random_ids(rng, cell.response_tokens)
    rejected = random_ids(rng, cell.response_tokens)
    pairs = [PairIds(prompt, chosen, rejected)] * cell.batch_size
    recipe = replace(RECIPE, batch_size=cell.batch_size, epochs=steps)

    first_pass_s, cached = timed(lambda: first_pass(model, cell.layer, pairs), model.device)
    run = train(model, cell.layer, cached, [], recipe)
    seconds = [timed(lambda: next(run), model.device)[0] for _ in range(steps)]
    step_s = statistics.median(seconds[WARM_UP:])

    gflop = step_flops(size, cell.layer, pairs) / 1e9
    return {
        "size": size,
        **cell._asdict(),
        "gflop": gflop,
        "step_s": step_s,
        "gflop_per_s": gflop / step_s,
        "first_pass_in_steps": first_pass_s / step_s,
    }


# ---- Tables --------------------------------------------------------------------------------------


def rounded(x):
    """How a number, or a text, is printed."""
    if not isinstance(x, float):
        return str(x)
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def table(rows):
    """A Markdown table of dicts with the same keys."""
    lines = []
    for row in rows:
        lines.append([rounded(x) for x in row.values()])
    return markdown(list(rows[0]), lines)


def write_up(report):
    """Markdown: the machine and a table for each part."""
    blocks = [", ".join(f"{name} {x}" for name, x in report.items() if name != "rows")]
    tables = {}  # {part: its rows, without the part}
    for row in report["rows"]:
        own = dict(row)
        tables.setdefault(own.pop("part"), []).append(own)
    for part, rows in tables.items():
        blocks.append(f"**{part}**\n\n{table(rows)}")
    return "\n\n".join(blocks)


# ---- Command line --------------------------------------------------------------------------------


def steps_rows(size, folder, args, dtype):
    their_dtypes = [dtype] if args.device == "cpu" else [torch.float32, torch.bfloat16]
    for their_dtype in their_dtypes:
        row = compare_steps(size, folder, dtype, args.device, args.steps, their_dtype)
        for way, way_dtype in (("official", their_dtype), ("ours", dtype)):
            report = alone(way, size, folder, 4, 20, way_dtype, args.device)
            row[f"{way}_peak_mib"] = report["peak_mib"]
        yield row


def vector_rows(size, folder, args, dtype):
    rows = compare_vectors(size, folder, dtype, args.device, args.steps)
    for way, row in zip(VECTORS, rows, strict=True):
        n_pairs = 20 if way == "official" else row["pairs"]  # it keeps nothing of a pair
        report = alone(way, size, folder, 4, n_pairs, dtype, args.device)
        yield row | {"peak_mib": report["peak_mib"]}


def generation_rows(size, folder, args, dtype):
    yield compare_generation(size, folder, dtype, args.device)


def complexity_rows(size, folder, args, dtype):
    model = load(folder, dtype, args.device)
    for cell in complexity_cells(size):
        yield measure_complexity(size, model, cell)


def phases_rows(size, folder, args, dtype):
    report = alone("ours", size, folder, args.steps, args.pairs, dtype, args.device)
    yield {"size": size, "pairs": args.pairs, "steps": args.steps} | report


def full_rows(size, folder, args, dtype):
    yield full_run(size, folder, dtype, args.device)


PARTS = {
    "steps": steps_rows,
    "vector": vector_rows,
    "generation": generation_rows,
    "complexity": complexity_rows,
    "phases": phases_rows,
    "full": full_rows,
}
USUAL = {  # {device: {part: sizes}}
    "cpu": {
        "steps": ["15M", "110M"],
        "vector": ["15M", "110M"],
        "generation": ["15M", "110M"],
        "complexity": ["15M", "110M", "350M"],
    },
    "cuda": {"steps": ["7B"], "full": ["7B"], "generation": ["7B"], "phases": ["7B"]},
}


def measure(args, dtype):
    """Yields the rows of all parts and sizes that are asked for."""
    usual = USUAL[args.device]
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.parts or usual:
            for size in args.sizes or usual.get(part, ["7B"]):
                folder = args.folder or Path(temporary, size)
                if not (folder / "model.safetensors.index.json").exists():
                    make_checkpoint(size, folder, dtype)
                for row in PARTS[part](size, folder, args, dtype):
                    print(f"{part}: {json.dumps(row)}", flush=True)
                    yield {"part": part} | row


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: those of USUAL")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: those of USUAL")
    parser.add_argument("--device", choices=USUAL, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by the device")
    parser.add_argument(
        "--steps", type=int, default=14, help="of --parts steps and vector, less two"
    )
    parser.add_argument("--pairs", type=int, default=64, help="of --parts phases")
    parser.add_argument("--folder", type=Path, help="keep a checkpoint here, or use it from here")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--alone", choices=VECTORS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    on_cpu = args.device == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    if args.alone:
        (size,) = args.sizes
        run_alone(args.alone, size, args.folder, args.steps, args.pairs, dtype, args.device)
        return

    # The file is written after each row, so that an interrupted run leaves what it measured.
    report = {
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "rows": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for row in measure(args, dtype):
        report["rows"].append(row)
        args.out.write_text(json.dumps(report, indent=2))

    tables = write_up(report)
    print(tables)
    if RESULTS.exists() and not (args.parts or args.sizes):
        place = "bench" if on_cpu else f"bench {args.device}"
        RESULTS.write_text(put(RESULTS.read_text(), place, tables))


if __name__ == "__main__":
    main()
