"""What a steering vector does: held-out pairs scored and prompts answered at several multipliers.

    python eval.py --model llama2-7b-chat --vector runs/pairs-layer15 --data held_out.jsonl
    python eval.py chat --model llama2-7b-chat --vector runs/pairs-layer15

The vector file says its layer, chat template and system prompt. A pair's margin at multiplier m is
how much more the steered model prefers chosen to rejected than the model without v does, in nats:
(logp_m(chosen) - logp_0(chosen)) - (logp_m(rejected) - logp_0(rejected)), summed over the response
or, per token, each log-probability divided by its response's length. It should have m's sign.

Needs bipo.py, data.py and llama.py beside it; MIT licence.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bipo import Progress, add_model_flags, add_pair_flags, first_pass, pick_device, score
from data import LAYER_HELP, Parser, find_model, load_vector, open_chat, read_pairs, run_or_exit
from llama import check_length, check_steer, generate, load, read_config, stream


class Mean(NamedTuple):
    """A mean and its 95% interval; in JSON [value, low, high]."""

    value: float
    low: float
    high: float


def mean(values, groups=None):
    """The Mean of values (N,). The interval is the middle 95% of the means of 1,000 bootstrap
    samples, which draw whole groups: all pairs of a question, say. groups: a label for each value;
    by default each is on its own."""
    values = np.asarray(values, dtype=float)
    labels = range(len(values)) if groups is None else groups
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    group = [number[label] for label in labels]
    sums, sizes = np.bincount(group, values), np.bincount(group)
    rng, n = np.random.default_rng(0), len(sums)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=1000)  # how often each group is drawn
    means = (draws @ sums) / (draws @ sizes)
    return Mean(*map(float, (values.mean(), *np.quantile(means, (0.025, 0.975)))))


SPECS = {  # how a column's numbers are printed; others are shares
    "multiplier": "+g",
    "margin": "+.2f",
    "margin_per_token": "+.3f",
}


def print_table(title, rows):
    """Rows are dicts with the same keys, the column headings; values are Means, numbers, texts or
    None."""
    lines = [[key.replace("_", " ") for key in rows[0]]]
    lines += [[cell(value, SPECS.get(key, ".1%")) for key, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(map(str.rjust, line, widths)), flush=True)


def cell(value, spec):
    if isinstance(value, Mean):
        return f"{value.value:{spec}} [{value.low:{spec}}, {value.high:{spec}}]"
    return "-" if value is None else value if isinstance(value, str) else f"{value:{spec}}"


def pair_table(model, layer, v, pairs, multipliers):
    """One row a multiplier, means over CachedPairs:

    wins: share of pairs whose margin has the multiplier's sign; None at 0
    prefers_chosen: share of pairs whose chosen response is likelier than the rejected one
    margin: nats per response; margin_per_token: nats per token
    """
    ref_logps = torch.stack([pair.ref_logps for pair in pairs])  # (N, 2)
    lengths = [[len(pair.ids.chosen), len(pair.ids.rejected)] for pair in pairs]
    lengths = torch.tensor(lengths, device=v.device)
    rows = []
    for m in multipliers:
        logps = score(model, layer, v, m, pairs)  # (N, 2)
        gain = logps - ref_logps
        margin = gain[:, 0] - gain[:, 1]
        per_token = gain[:, 0] / lengths[:, 0] - gain[:, 1] / lengths[:, 1]
        rows.append(
            {
                "multiplier": m,
                "wins": (m * margin > 0).float().mean().item() if m else None,
                "prefers_chosen": (logps[:, 0] > logps[:, 1]).float().mean().item(),
                "margin": margin.mean().item(),
                "margin_per_token": per_token.mean().item(),
            }
        )
    return rows


MAX_CACHE = 16384  # tokens that answers in the making hold at a time: 8 GiB of a 7B in 16 bits


def answers(model, chat, steer, prompts, multipliers, max_new_tokens):
    """Greedy answers, [i][j] the new ids of the one to prompt i steered by multiplier j times
    `steer`, {layer: v}; as many at a time as MAX_CACHE allows."""
    ids = [chat.encode_prompt(prompt) for prompt in prompts]
    room = max(map(len, ids), default=0) + max_new_tokens
    size = max(1, MAX_CACHE // room // len(multipliers))
    found, progress = [], Progress("answers to prompt", len(prompts), quiet=True)
    for start in range(0, len(ids), size):
        rows = [row for row in ids[start : start + size] for _ in multipliers]
        m = torch.tensor(multipliers * (len(rows) // len(multipliers)))[:, None, None]  # (B, 1, 1)
        each = {layer: m.to(v.device) * v for layer, v in steer.items()}
        new = generate(model, rows, max_new_tokens, chat.eos_id, each)
        found += [new[i : i + len(multipliers)] for i in range(0, len(new), len(multipliers))]
        progress(len(found))
    return found


def open_vector(path, config, device="cpu", layer=None):
    """(layer, v, metadata) of a vector file that fits the model. ValueError if it does not."""
    vectors, metadata = load_vector(path, layer)
    if len(vectors) > 1:
        raise ValueError(f"{path} steers layers {sorted(vectors)}; choose one with --layer")
    ((layer, v),) = vectors.items()
    check_steer(vectors, config.n_layers)
    theirs, ours = metadata.get("n_layers"), str(config.n_layers)
    if len(v) != config.dim or theirs not in (None, ours):
        raise ValueError(
            f"{path} is for a model of width {len(v)} and {theirs or '?'} blocks, "
            f"not {config.dim} and {ours}"
        )
    return layer, v.to(device), metadata


def set_up(args):
    """(the arguments of `load`, config, chat, layer, v) of a command line; prints what they are."""
    path, base_model = find_model(args.model)
    config = read_config(path)
    device, dtype = pick_device(args.device, args.dtype)
    layer, v, metadata = open_vector(args.vector, config, device, args.layer)
    template = args.template or metadata.get("template")
    system = metadata.get("system") if args.system is None else args.system
    chat = open_chat(path, config, template, system)
    this = {"base_model": base_model, "lora": args.lora or "", "tokenizer": chat.tokenizer.name}
    for name, ours in this.items():
        if metadata.get(name, ours) != ours:
            print(f"note: the vector was trained on {name} {metadata[name]!r}, this is {ours!r}")
    print(f"{args.vector}: layer {layer}, |v| {v.norm():.3f}, on {base_model}, {dtype}, {device}")
    print(f"{chat.template} template, system {chat.system!r}")
    return (path, dtype, device, args.lora), config, chat, layer, v


def run(args):
    if args.max_new_tokens < 1 or args.samples < 0 or not all(map(math.isfinite, args.multipliers)):
        raise ValueError("needs --max-new-tokens >= 1, --samples >= 0 and finite --multipliers")
    checkpoint, config, chat, layer, v = set_up(args)
    pairs = read_pairs(args.data, args.letters, args.best)
    ids = [chat.encode_pair(pair, config.max_seq_len) for pair in pairs]
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: args.samples]
    longest = max((len(chat.encode_prompt(prompt)) for prompt in prompts), default=0)
    check_length(longest + args.max_new_tokens, config.max_seq_len)
    print(f"{pairs.report}\n")
    model = load(*checkpoint)
    cached = first_pass(model, layer, ids)
    print("multiplier    wins  prefers chosen  margin, nats/response  nats/token")
    for row in pair_table(model, layer, v, cached, args.multipliers):
        wins = "-" if row["wins"] is None else f"{row['wins']:.1%}"
        print(
            f"{row['multiplier']:+10g}  {wins:>6}  {row['prefers_chosen']:14.1%}  "
            f"{row['margin']:+21.2f}  {row['margin_per_token']:+10.3f}",
            flush=True,
        )
    if prompts:
        new = answers(model, chat, {layer: v}, prompts, args.multipliers, args.max_new_tokens)
        for prompt, row in zip(prompts, new, strict=True):
            turns = [prompt] if isinstance(prompt, str) else [f"{who}: {x}" for who, x in prompt]
            print("", *turns, sep="\n")
            for m, ids in zip(args.multipliers, row, strict=True):
                print(f"  {m:+g}: {chat.tokenizer.decode(ids)}")


# ---- Conversation --------------------------------------------------------------------------------

CHAT_HELP = "/m NUMBER sets the multiplier, /reset begins a new conversation, /quit ends"


def say(model, chat, prompt, steer, max_new_tokens):
    """The greedy answer to a prompt, printed token by token; it ends where the context is full."""
    ids, limit = chat.encode_prompt(prompt), model.config.max_seq_len
    check_length(len(ids) + 1, limit)
    n, text = min(max_new_tokens, limit - len(ids)), ""
    new = (row[0] for row in stream(model, [ids], n, chat.eos_id, steer))
    for piece in chat.tokenizer.stream(new):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def converse(args):
    """Each line is answered with m * v and, below, without. The conversation goes on with the
    steered answers, and each turn runs it all, so it knows of no other multiplier than its own."""
    if args.max_new_tokens < 1 or not math.isfinite(args.multiplier):
        raise ValueError("needs --max-new-tokens >= 1 and a finite --multiplier")
    checkpoint, _, chat, layer, v = set_up(args)
    model, m, turns = load(*checkpoint), args.multiplier, ()
    print(CHAT_HELP)
    while True:
        try:
            line = input(f"\n{m:+g}> ").strip()
        except EOFError:
            line = "/quit"
        command, _, value = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                turns = ()
            elif command == "/m" and math.isfinite(float(value)):
                m = float(value)
            elif command.startswith("/"):
                raise ValueError(f"not understood: {line}")
            elif line:
                asked, texts = (*turns, ("user", line)), []
                for steer in [{layer: m * v}, None] if m else [None]:
                    print(f"  {m if steer else 0:+g}: ", end="")
                    texts.append(say(model, chat, asked, steer, args.max_new_tokens))
                turns = (*asked, ("assistant", texts[0]))
        except ValueError as e:
            print(f"{e}; {CHAT_HELP}")
        except KeyboardInterrupt:
            print(" (stopped)")


# ---- Command line --------------------------------------------------------------------------------


def add_vector_flags(group, max_new_tokens):
    group.add_argument("--vector", type=Path, required=True, help="vector file, or folder of a run")
    group.add_argument("--layer", type=int, help=LAYER_HELP)
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        help=f"per answer (default: {max_new_tokens})",
    )


def add_flags(parser):
    add_model_flags(parser)
    add_pair_flags(parser)
    group = parser.add_argument_group("evaluation")
    add_vector_flags(group, 64)
    group.add_argument(
        "--multipliers",
        type=float,
        nargs="+",
        default=[-2, -1, 0, 1, 2],
        help="of the vector (default: -2 -1 0 1 2)",
    )
    group.add_argument("--samples", type=int, default=3, help="prompts to answer (default: 3)")


def add_chat_flags(parser):
    add_model_flags(parser)
    group = parser.add_argument_group("conversation")
    add_vector_flags(group, 256)
    group.add_argument("--multiplier", type=float, default=1.0, help="at first (default: 1)")


COMMANDS = {  # the first argument: what it does, its flags, its function
    "": ("Tables and answers for a steering vector.", add_flags, run),
    "chat": ("Talk to a steered model.", add_chat_flags, converse),
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv[:1] and argv[0] in COMMANDS else ""
    what, add, call = COMMANDS[name]
    others = ", ".join(f"eval.py {other}" for other in COMMANDS if other not in ("", name))
    parser = Parser(
        prog=f"eval.py {name}".strip(), description=what, epilog=f"See also {others} --help."
    )
    add(parser)
    run_or_exit(parser, call, argv[1:] if name else argv)


if __name__ == "__main__":
    main()
