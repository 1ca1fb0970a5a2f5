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
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bipo import Recipe, draw_batches, first_pass, lr_at, train
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
VOCAB_SIZE, BATCH_SIZE, EOS = 32000, 4, 2
RECIPE = Recipe(batch_size=BATCH_SIZE, warmup_steps=0, epochs=1, weight_decay=0.0)
MULTIPLIERS = [-2.0, -1.0, 0.0, 1.0, 2.0]
RESULTS = Path(__file__).with_name("RESULTS.md")


# ---- random pairs and models


def random_ids(rng, n):
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(n)]


def make_pairs(n, seed=0):
    """PairIds of random tokens whose lengths are spread as the official data's."""
    rng = random.Random(seed)

    def ids(mean, most):
        spread = rng.lognormvariate(0, 0.5) * 0.885  # of mean 1, about
        return random_ids(rng, round(min(most, max(3, spread * mean))))

    return [
        PairIds([1, *ids(85, 252)], [*ids(23, 120), EOS], [*ids(24, 118), EOS]) for _ in range(n)
    ]


def make_checkpoint(size, folder, dtype=torch.float32):
    """A random Llama as a Hugging Face folder: shards of eight blocks and their index."""
    s, folder = SIZES[size], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=VOCAB_SIZE,
        hidden_size=s.dim, intermediate_size=s.hidden_dim, num_hidden_layers=s.n_layers,
        num_attention_heads=s.n_heads, rms_norm_eps=1e-5, max_position_embeddings=4096,
        torch_dtype=str(dtype).removeprefix("torch."), bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in Llama(read_config(folder)).state_dict().items()}
    shards = {}  # {file: names of its weights}
    for name in shapes:
        block = int(name.split(".")[1]) if name.startswith("layers.") else 0
        shards.setdefault(f"{block // 8}.safetensors", []).append(name)
    torch.manual_seed(0)
    weight_map = {}
    for file, names in shards.items():
        shard = {}
        for name in names:
            weight = torch.empty(shapes[name], dtype=dtype)
            shard[hf_name(name)] = weight.fill_(1) if "norm" in name else weight.normal_(0, 0.02)
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def theirs(folder, dtype, device):
    """The checkpoint in transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


# ---- training, both ways


def official_steps(folder, layer, pairs, batches, dtype=torch.float32, device="cpu"):
    """Yields (loss, v) of each step, done the official way."""
    policy, reference = theirs(folder, dtype, device), theirs(folder, dtype, device)
    v = torch.zeros(policy.config.hidden_size, device=device, requires_grad=True)
    slot = {}
    policy.model.layers[layer].register_forward_hook(
        lambda block, x, h: (h + slot["d"] * v).type_as(h)
    )
    optimizer = torch.optim.AdamW([v], lr=RECIPE.lr, weight_decay=0.0)
    for step, (rows, d) in enumerate(batches):
        slot["d"] = d
        batch = [pairs[i] for i in rows]
        both = [(p.prompt, p.chosen) for p in batch] + [(p.prompt, p.rejected) for p in batch]
        width = max(len(prompt) + len(response) for prompt, response in both)
        tokens = torch.full((len(both), width), EOS)
        seen, scored = torch.zeros_like(tokens), torch.zeros(tokens.shape, dtype=torch.bool)
        for i, (prompt, response) in enumerate(both):
            n, end = len(prompt), len(prompt) + len(response)
            tokens[i, :end] = torch.tensor(prompt + response)
            seen[i, :end], scored[i, n:end] = 1, True
        tokens, seen, scored = tokens.to(device), seen.to(device), scored.to(device)

        def logps(model, tokens=tokens, seen=seen, scored=scored):
            logits = model(tokens, attention_mask=seen, use_cache=False).logits[:, :-1]
            each = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
            return (each * scored[:, 1:]).sum(-1)

        with torch.no_grad():
            ref_logps = logps(reference)
        gain = logps(policy) - ref_logps
        margin = gain[: len(batch)] - gain[len(batch) :]
        loss = -F.logsigmoid(d * RECIPE.beta * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(v, RECIPE.clip_norm)
        optimizer.param_groups[0]["lr"] = lr_at(step, RECIPE.lr, 0, len(pairs) // BATCH_SIZE)
        optimizer.step()
        yield loss.item(), v.detach()


def streamed(folder, layer, pairs, dtype=torch.float32, device="cpu"):
    """(model, CachedPairs, {phase: seconds}): the first pass as bipo.py does it."""
    began = time.perf_counter()
    checkpoint = Checkpoint(folder, dtype, device)
    model = checkpoint.model
    checkpoint.read(layer + 1, model.config.n_layers)
    read = time.perf_counter()
    cached = first_pass(model, layer, pairs, checkpoint.hold)
    seconds = {"read upper blocks": read - began, "first pass": time.perf_counter() - read}
    return model, cached, seconds


def our_steps(folder, layer, pairs, batches, dtype=torch.float32, device="cpu"):
    """Yields the first pass's seconds and then, like `official_steps`, (loss, v) of each step."""
    model, cached, seconds = streamed(folder, layer, pairs, dtype, device)
    yield seconds["first pass"]
    yield from ((x.loss, x.v) for x in train(model, layer, cached, [], RECIPE, batches=batches))


def draw(n_pairs, steps):
    return list(itertools.islice(draw_batches(n_pairs, RECIPE, seed=0), steps))


def timed(work, device="cpu"):
    """(seconds, result) of work(); on a GPU, until that has done it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def step_products(size, pairs):
    """[(rows, in, out, how often)] of the forward matrix products in a training step."""
    s, tokens = SIZES[size], sum(map(length, pairs))
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    shapes = block_products(s, tokens, s.n_layers - s.layer - 1)
    return [*shapes, (scored, s.dim, VOCAB_SIZE, 1)]


def block_products(s, tokens, blocks):
    shapes = [(s.dim, s.dim, 4), (s.dim, s.hidden_dim, 2), (s.hidden_dim, s.dim, 1)]
    return [(tokens, n_in, n_out, count * blocks) for n_in, n_out, count in shapes]


def product_seconds(shapes, backward, dtype=torch.float32, device="cpu"):
    """What these products, and those of their backward pass, take alone on this machine."""
    total, like = 0.0, {"dtype": dtype, "device": device}
    for rows, n_in, n_out, count in shapes:
        x, weight = torch.randn(rows, n_in, **like), torch.randn(n_out, n_in, **like)
        grad = torch.randn(rows, n_out, **like)
        products = [lambda x=x, w=weight: F.linear(x, w), lambda g=grad, w=weight: g @ w]
        for product in products[: 1 + backward]:
            runs = [timed(product, device)[0] for _ in range(7)]
            total += count * statistics.median(runs[2:])
    return total


def compare_steps(size, folder, dtype, device, steps=14, their_dtype=torch.float32):
    """A step of both ways; raises AssertionError if they disagree."""
    pairs, layer = make_pairs(BATCH_SIZE * (steps + 1)), SIZES[size].layer
    batches = draw(len(pairs), steps)
    official = official_steps(folder, layer, pairs, batches, their_dtype, device)
    ours = our_steps(folder, layer, pairs, batches, dtype, device)
    first_pass_s = next(ours)
    # bf16 keeps 8 bits of each number: a log-probability of 250 nats moves by a few tenths
    tolerance = 1e-4 if dtype == their_dtype == torch.float32 else 0.1
    seconds, shares = [], []
    for rows, _ in batches:
        theirs_s, (their_loss, their_v) = timed(lambda: next(official), device)
        ours_s, (our_loss, our_v) = timed(lambda: next(ours), device)
        assert abs(their_loss - our_loss) <= tolerance, (their_loss, our_loss)
        if tolerance == 1e-4:
            assert torch.allclose(their_v, our_v, atol=1e-5, rtol=1e-3), (their_v - our_v).abs()
        seconds.append((theirs_s, ours_s))
        products = step_products(size, [pairs[i] for i in rows])
        shares.append(product_seconds(products, True, dtype, device) / ours_s)
    dropped = 2  # warm-up
    theirs_s, ours_s = (statistics.median(x[dropped:]) for x in zip(*seconds, strict=True))
    return {
        "size": size,
        "layer": layer,
        "steps": steps - dropped,
        "official_dtype": str(their_dtype),
        "official_s": theirs_s,
        "ours_s": ours_s,
        "ratio": theirs_s / ours_s,
        "ours_tokens_per_s": BATCH_SIZE * sum(map(length, pairs)) / len(pairs) / ours_s,
        "product_share": statistics.median(shares[dropped:]),
        "first_pass_in_steps_a_batch": first_pass_s / (len(pairs) / BATCH_SIZE) / ours_s,
    }


# ---- peak memory, phases


def alone(way, size, folder, steps, n_pairs, dtype, device):
    """What a process of its own reports of one way: phases in seconds, peak memory in MiB."""
    command = [sys.executable, __file__, "--alone", way, "--sizes", size, "--folder", folder]
    command += ["--steps", steps, "--pairs", n_pairs, "--dtype", dtype, "--device", device]
    command = [str(x).removeprefix("torch.") for x in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(way, size, folder, steps, n_pairs, dtype, device):
    pairs, layer = make_pairs(n_pairs), SIZES[size].layer
    batches, report = draw(n_pairs, steps), {}
    if way == "official":
        run = official_steps(folder, layer, pairs, batches, dtype, device)
    else:
        model, cached, report = streamed(folder, layer, pairs, dtype, device)
        run = train(model, layer, cached, [], RECIPE, batches=batches)
    report["step"] = statistics.median(timed(lambda: next(run), device)[0] for _ in batches)
    if device == "cpu":
        status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the parent's
        report["peak_mib"] = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    else:
        report["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(report))


def full_run(size, folder, dtype, device, n_pairs=642, epochs=20):
    """Seconds of the first pass and of all epochs, streamed from the checkpoint."""
    recipe, layer = replace(RECIPE, epochs=epochs), SIZES[size].layer
    pairs = make_pairs(n_pairs)
    first_s, (model, cached, _) = timed(
        lambda: streamed(folder, layer, pairs, dtype, device), device
    )
    training_s, steps = timed(lambda: list(train(model, layer, cached, [], recipe)), device)
    return {"size": size, "steps": len(steps), "first_pass_s": first_s, "training_s": training_s}


# ---- generation


def compare_generation(size, folder, dtype, device, n_prompts=32, new_tokens=64):
    """A sweep of multipliers, ours and transformers'; AssertionError if the greedy ids differ."""
    layer, n = SIZES[size].layer, n_prompts * len(MULTIPLIERS)
    different = [pair.prompt for pair in make_pairs(n_prompts)]
    prompts = [prompt for prompt in different for _ in MULTIPLIERS]
    v = torch.randn(SIZES[size].dim, generator=torch.Generator().manual_seed(0)).to(device)
    vectors = torch.tensor(MULTIPLIERS * n_prompts, device=device)[:, None, None] * v  # (B, 1, dim)
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    their_model, model = theirs(folder, dtype, device), load(folder, dtype, device)
    their_model.model.layers[layer].register_forward_hook(
        lambda block, x, h: (h + vectors).type_as(h)
    )
    their_options = dict(
        attention_mask=seen, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    theirs_s, their_ids = timed(lambda: their_model.generate(tokens, **their_options), device)
    ours_s, our_ids = timed(
        lambda: generate(model, prompts, new_tokens, -1, {layer: vectors}), device
    )
    same = sum(a == b for a, b in zip(their_ids[:, width:].tolist(), our_ids, strict=True))
    assert same == n or dtype != torch.float32, f"{n - same} of {n} answers differ"
    s, once, every = SIZES[size], sum(map(len, different)), sum(map(len, prompts))
    products = block_products(s, once, layer + 1) + block_products(s, every, s.n_layers - layer - 1)
    products += block_products(s, n, s.n_layers * (new_tokens - 1))
    products += [(n, s.dim, VOCAB_SIZE, new_tokens)]
    return {
        "size": size,
        "transformers_tokens_per_s": n * new_tokens / theirs_s,
        "ours_tokens_per_s": n * new_tokens / ours_s,
        "ratio": theirs_s / ours_s,
        "same_answers": same / n,
        "product_share": product_seconds(products, False, dtype, device) / ours_s,
    }


# ---- complexity


def step_flops(size, layer, pairs):
    """Floating-point operations of a training step, a product and its sum being two:

        4 T B W + 12 B D sum(t^2) + 4 R D V

    T tokens of the batch in B = n_layers - layer - 1 blocks of W = 4 D^2 + 3 D F weights, width D,
    feed-forward width F; t tokens of each pair, which attend to each other; R response tokens,
    vocabulary V. Forward is 2 a weight, backward for activations alone as much again; attention has
    2 products forward and 4 backward.
    """
    s, blocks = SIZES[size], SIZES[size].n_layers - layer - 1
    weights = 4 * s.dim**2 + 3 * s.dim * s.hidden_dim
    tokens = sum(map(length, pairs))
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    squares = sum(length(pair) ** 2 for pair in pairs)
    return (
        4 * tokens * blocks * weights
        + 12 * blocks * s.dim * squares
        + 4 * scored * s.dim * VOCAB_SIZE
    )


def measure_complexity(size, model, layer, batch_size, response, steps=7):
    """A row of the table: batches of one pair, its prompt 86 tokens, each response `response`."""
    rng, device = random.Random(0), model.device
    pair = PairIds(*(random_ids(rng, n) for n in (86, response, response)))
    pairs = [pair] * batch_size
    first_s, cached = timed(lambda: first_pass(model, layer, pairs), device)
    run = train(model, layer, cached, [], replace(RECIPE, batch_size=batch_size, epochs=steps))
    seconds = statistics.median([timed(lambda: next(run), device)[0] for _ in range(steps)][2:])
    gflop = step_flops(size, layer, pairs) / 1e9
    return {
        "size": size,
        "layer": layer,
        "batch_size": batch_size,
        "response_tokens": response,
        "gflop": gflop,
        "step_s": seconds,
        "gflop_per_s": gflop / seconds,
        "first_pass_in_steps": first_s / seconds,
    }


# ---- tables


def cell(x):
    if not isinstance(x, float):
        return str(x)
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def table(rows):
    """A Markdown table of dicts with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [list(map(cell, row.values())) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_up(report):
    """Markdown: the machine and a table for each part."""
    machine = ", ".join(f"{name} {x}" for name, x in report.items() if name != "rows")
    blocks = [machine]
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["part"] == part]
        rows = [{name: x for name, x in row.items() if name != "part"} for row in rows]
        blocks.append(f"**{part}**\n\n{table(rows)}")
    return "\n\n".join(blocks)


def put(file, name, text):
    """Replace what stands in a file between the lines `<!-- NAME -->` and `<!-- end -->`."""
    before, mark, rest = file.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError(f"{file} has no lines <!-- {name} --> and <!-- end -->")
    file.write_text(f"{before}{mark}{text}\n{end}{after}")


# ---- command line


def steps_rows(size, folder, args, dtype):
    for their_dtype in (torch.float32, torch.bfloat16) if args.device != "cpu" else (dtype,):
        row = compare_steps(size, folder, dtype, args.device, args.steps, their_dtype)
        for way, kind in (("official", their_dtype), ("ours", dtype)):
            report = alone(way, size, folder, 4, 20, kind, args.device)
            row[f"{way}_peak_mib"] = report["peak_mib"]
        yield row


def generation_rows(size, folder, args, dtype):
    yield compare_generation(size, folder, dtype, args.device)


def complexity_rows(size, folder, args, dtype):
    model, usual = load(folder, dtype, args.device), (SIZES[size].layer, 4, 24)
    cells = [usual]
    if size == "110M":
        cells += [(layer, *usual[1:]) for layer in (0, 3, 9, 11)]
        cells += [(usual[0], n, usual[2]) for n in (1, 2, 8, 16)]
        cells += [(*usual[:2], response) for response in (6, 96, 384)]
    for cell in cells:
        yield measure_complexity(size, model, *cell)


def phases_rows(size, folder, args, dtype):
    report = alone("ours", size, folder, args.steps, args.pairs, dtype, args.device)
    yield {"size": size, "pairs": args.pairs, "steps": args.steps} | report


def full_rows(size, folder, args, dtype):
    yield full_run(size, folder, dtype, args.device)


PARTS = {
    "steps": steps_rows,
    "generation": generation_rows,
    "complexity": complexity_rows,
    "phases": phases_rows,
    "full": full_rows,
}
USUAL = {  # {device: {part: sizes}}
    "cpu": {
        "steps": ["15M", "110M"],
        "generation": ["15M", "110M"],
        "complexity": ["15M", "110M", "350M"],
    },
    "cuda": {"steps": ["7B"], "full": ["7B"], "generation": ["7B"], "phases": ["7B"]},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: those of USUAL")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: those of USUAL")
    parser.add_argument("--device", choices=USUAL, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by the device")
    parser.add_argument("--steps", type=int, default=14, help="two of --parts steps are dropped")
    parser.add_argument("--pairs", type=int, default=64, help="of --parts phases")
    parser.add_argument("--folder", type=Path, help="keep a checkpoint here, or use it from here")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--alone", choices=("official", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    dtype, usual = getattr(torch, dtype), USUAL[args.device]
    if args.alone:
        (size,), how = args.sizes, (dtype, args.device)
        return run_alone(args.alone, size, args.folder, args.steps, args.pairs, *how)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report = {"device": machine, "dtype": str(dtype), "threads": torch.get_num_threads()}
    report["rows"] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.parts or usual:
            for size in args.sizes or usual.get(part, ["7B"]):
                folder = args.folder or Path(temporary, size)
                if not (folder / "model.safetensors.index.json").exists():
                    make_checkpoint(size, folder, dtype)
                for row in PARTS[part](size, folder, args, dtype):
                    report["rows"].append({"part": part} | row)
                    print(f"{part}: {json.dumps(row)}", flush=True)
                    args.out.write_text(json.dumps(report, indent=2))
    print(write_up(report))
    if RESULTS.exists() and not (args.parts or args.sizes):
        put(RESULTS, "bench" if args.device == "cpu" else f"bench {args.device}", write_up(report))


if __name__ == "__main__":
    main()
