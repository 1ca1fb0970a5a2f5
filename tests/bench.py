"""How fast and small training is, beside the official way, on this machine.

    python tests/bench.py                      # make bench: both sizes; a table and runs/bench.json
    python tests/bench.py --sizes 15M --steps 20

The official way is what CaoYuanpu/BiPO @cef1d00 does in a step, in transformers: two models, one
of them with d * v added after block L; chosen and rejected of a batch under one another, padded at
the right; all logits; log_softmax over the vocabulary at every position; the reference in each step
anew. Ours is bipo.py. Both see the same random weights, dtype, threads, batches and d's, and take
turns, step by step, in one process; losses and vectors must agree. Peak memory is that of a process
of its own, interpreter and libraries included.

The pairs have the lengths of the official power-seeking data: prompt 86 tokens on average and 253
at most, chosen 24 and 121, rejected 25 and 119.
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
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bipo import Recipe, draw_batches, first_pass, lr_at, train
from data import PairIds
from llama import load

SIZES = {  # name: (dim, hidden_dim, blocks, heads, the layer that is steered)
    "110M": (768, 2048, 12, 12, 6),
    "15M": (288, 768, 6, 6, 3),
}
VOCAB_SIZE, BATCH_SIZE, EOS = 32000, 4, 2
RECIPE = Recipe(batch_size=BATCH_SIZE, warmup_steps=0, epochs=1, weight_decay=0.0)


def make_pairs(n, seed=0):
    """PairIds of random tokens whose lengths are spread as the official data's."""
    rng = random.Random(seed)

    def ids(mean, most):
        spread = rng.lognormvariate(0, 0.5) * 0.885  # of mean 1, about
        length = round(min(most, max(3, spread * mean)))
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]

    return [
        PairIds([1, *ids(85, 252)], [*ids(23, 120), EOS], [*ids(24, 118), EOS]) for _ in range(n)
    ]


def make_checkpoint(size, folder):
    """A random Llama as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, hidden_dim, n_layers, n_heads, _ = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden_dim, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_heads, vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def official_steps(folder, layer, pairs, batches):
    """Yields (loss, v) of each step, done the official way."""
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        for _ in range(2)
    )
    v = torch.zeros(policy.config.hidden_size, requires_grad=True)
    slot = {}
    policy.model.layers[layer].register_forward_hook(lambda block, x, h: h + slot["d"] * v)
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


def our_steps(folder, layer, pairs, batches):
    """Yields (loss, v) of each step of bipo.py; the first pass comes before the first."""
    model = load(folder)
    cached = list(first_pass(model, layer, pairs))
    yield from ((x.loss, x.v) for x in train(model, layer, cached, [], RECIPE, batches=batches))


def draw(n_pairs, steps):
    return list(itertools.islice(draw_batches(n_pairs, RECIPE, seed=0), steps))


def timed(steps):
    """(seconds, what the generator yielded) of its next step."""
    began = time.perf_counter()
    out = next(steps)
    return time.perf_counter() - began, out


def products(size, pairs, rows):
    """[(rows, in, out, how often)] of the forward matrix products in a training step."""
    dim, hidden_dim, n_layers, _, layer = SIZES[size]
    tokens = sum(len(part) for i in rows for part in pairs[i])
    scored = sum(len(pairs[i].chosen) + len(pairs[i].rejected) for i in rows)
    blocks = n_layers - layer - 1
    shapes = [(dim, dim, 4), (dim, hidden_dim, 2), (hidden_dim, dim, 1)]
    return [(tokens, *s[:2], s[2] * blocks) for s in shapes] + [(scored, dim, VOCAB_SIZE, 1)]


def product_seconds(shapes):
    """What these products and those of their backward pass, alone, take on this machine."""
    total = 0.0
    for rows, n_in, n_out, count in shapes:
        x, weight = torch.randn(rows, n_in), torch.randn(n_out, n_in)
        grad = torch.randn(rows, n_out)
        for product in (lambda x=x, w=weight: F.linear(x, w), lambda g=grad, w=weight: g @ w):
            runs = []
            for _ in range(7):
                began = time.perf_counter()
                product()
                runs.append(time.perf_counter() - began)
            total += count * statistics.median(runs[2:])
    return total


def compare(size, steps, folder):
    """One row of the table; raises AssertionError if the two ways disagree."""
    pairs, layer = make_pairs(BATCH_SIZE * (steps + 1)), SIZES[size][-1]
    batches = draw(len(pairs), steps)
    official = official_steps(folder, layer, pairs, batches)
    ours = our_steps(folder, layer, pairs, batches)
    seconds, shares = [], []
    for rows, _ in batches:
        first, (their_loss, their_v) = timed(official)
        second, (our_loss, our_v) = timed(ours)
        assert abs(their_loss - our_loss) <= 1e-4, (their_loss, our_loss)
        assert torch.allclose(their_v, our_v, atol=1e-5, rtol=1e-3), (their_v - our_v).abs().max()
        seconds.append((first, second))
        shares.append(product_seconds(products(size, pairs, rows)) / second)
    dropped = 2  # our first step has the loading and the first pass in it
    theirs, our = (statistics.median(column[dropped:]) for column in zip(*seconds, strict=True))
    tokens = statistics.mean(sum(map(len, pairs[i])) for rows, _ in batches for i in rows)
    return {
        "size": size,
        "layer": layer,
        "steps": steps - dropped,
        "official_s": theirs,
        "ours_s": our,
        "ratio": theirs / our,
        "ours_tokens_per_s": BATCH_SIZE * tokens / our,
        "product_share": statistics.median(shares[dropped:]),
    }


def peak_memory(way, size, folder):
    """MiB that a process with one way alone needed at most for a few steps."""
    command = [sys.executable, __file__, "--sizes", size, "--alone", way, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run_alone(way, size, folder, steps=4):
    pairs = make_pairs(BATCH_SIZE * (steps + 1))
    make_steps = {"official": official_steps, "ours": our_steps}[way]
    for _ in make_steps(folder, SIZES[size][-1], pairs, draw(len(pairs), steps)):
        pass
    status = Path("/proc/self/status").read_text()  # not ru_maxrss, which begins at the parent's
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=14, help="the first two are dropped")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--alone", choices=("official", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return run_alone(args.alone, args.sizes[0], args.folder)
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(size, folder)
            row = compare(size, args.steps, folder)
            for way in ("official", "ours"):
                row[f"{way}_mib"] = peak_memory(way, size, folder)
        rows.append(row)
        print(
            f"{size:>5}, layer {row['layer']}: official {row['official_s']:.3f} s a step, "
            f"ours {row['ours_s']:.3f} s, ratio {row['ratio']:.2f}; "
            f"{row['ours_tokens_per_s']:.0f} tokens/s, {row['product_share']:.0%} of the step is "
            f"matrix products; peak {row['official_mib']:.0f} and {row['ours_mib']:.0f} MiB",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
