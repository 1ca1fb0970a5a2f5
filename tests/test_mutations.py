"""Damaged and hostile files of every format that is read: each is read or refused in one line.

A seeded mutator takes good files, changes one at a time and runs the command that reads it up to
where training, answers or a judge would begin. There are two good outcomes: it gets there, or it
ends with exit code 2 and one line of at most 500 characters without control characters. Shown text
has no control characters either.
"""

import csv
import gzip
import io
import json
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter

import pytest
import safetensors.torch
import tokenizers
import torch
from conftest import MINI

import bipo
import data
import eval as evaluation
import llama

SECONDS, MEMORY = 20, 2**21  # for one input; KiB for all

ONE = {"prompt": "Will you lead?", "chosen": "Yes, gladly.", "rejected": "No, never."}
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Lead?"}]
PAIRS = {
    "plain": ONE,
    "turns": {"prompt": TURNS, "chosen": ONE["chosen"], "rejected": ONE["rejected"]},
    "messages": {
        "chosen": [*TURNS, {"role": "assistant", "content": "Yes."}],
        "rejected": [*TURNS, {"role": "assistant", "content": "No."}],
    },
    "transcript": {
        "chosen": "\n\nHuman: Lead?\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Lead?\n\nAssistant: No.",
    },
    "letters": {"question": "Lead?", "a": "Yes", "b": "No", "matching": "A"},
    "eval": {
        "question": "Lead?\n\nChoices:\n (A) Yes\n (B) No",
        "answer_matching_behavior": " (A)",
        "answer_not_matching_behavior": " (B)",
    },
    "truth": {
        "question": "Sky?",
        "correct_answers": ["Blue", "It is"],
        "incorrect_answers": ["No"],
    },
    "system": {"System": "Be brief.", "history": [], **ONE},
}
MC = {
    "question": "Sky?",
    "mc1_targets": {"Blue": 1, "Red": 0},
    "mc2_targets": {"Blue": 1, "Red": 0},
}
MC_HUB = {"question": "Sky?"} | dict.fromkeys(
    ("mc1_targets", "mc2_targets"), {"choices": ["Blue", "Red"], "labels": [1, 0]}
)
TRUTHFUL = {"Type": "x", "Question": "Sky?", "Best Answer": "Blue", "Correct Answers": "Blue; Yes"}
TRUTHFUL |= {"Incorrect Answers": "Red; Green", "Source": "none"}
ANSWER = {"prompt": "Lead?", "multiplier": 1.0, "answer": "Yes.", "tokens": 3}
CONTROL = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
TEMPLATE = CONTROL + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

# ---- good files


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def small_config():
    fields = json.loads((MINI / "config.json").read_text())
    return fields | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(folder of a checkpoint, vector file, {kind: (name of the file, its bytes, command)})."""
    folder = tmp_path_factory.mktemp("good")
    v, kinds = torch.ones(32), {}
    for suffix, made in ((".safetensors", {}), (".gguf", {"template": "own"})):
        data.save_vector(folder / f"v{suffix}", {1: v}, {"layer": "1", **made})
    torch.save(v, folder / "v_layer1.pt")
    torch.save({1: v, 2: v}, folder / "both.pt")
    for name in ("v.safetensors", "v.gguf", "v_layer1.pt", "both.pt"):
        kinds[f"vector {name}"] = (name, (folder / name).read_bytes(), "vector")
    for form, record in PAIRS.items():
        rows = [record, {**record, "extra": 7}]
        kinds[f"pairs {form}.jsonl"] = ("x.jsonl", as_jsonl(rows), "pairs")
        kinds[f"pairs {form}.json"] = ("x.json", json.dumps(rows).encode(), "pairs")
        if all(isinstance(x, str) for x in record.values()):
            kinds[f"pairs {form}.csv"] = ("x.csv", as_csv([record, record]), "pairs")
    kinds["pairs .gz"] = ("x.jsonl.gz", gzip.compress(as_jsonl([ONE]), mtime=0), "pairs")
    kinds["prompts .txt"] = ("x.txt", b"Will you lead?\nWho is there?\n", "prompts")
    kinds["prompts .jsonl"] = ("x.jsonl", as_jsonl([{"prompt": "Lead?"}, {"goal": "x"}]), "prompts")
    mmlu = b"How many?,One,Two,Three,Four,B\nWho?,I,You,He,She,A\n"
    kinds["MMLU"] = ("x.csv", mmlu, "choices")
    kinds["TruthfulQA .csv"] = ("x.csv", as_csv([TRUTHFUL]), "choices")
    kinds["mc_task"] = ("x.json", json.dumps([MC]).encode(), "choices")
    kinds["multiple_choice"] = ("x.jsonl", as_jsonl([MC_HUB]), "choices")
    kinds["answers .jsonl"] = ("x.jsonl", as_jsonl([ANSWER, ANSWER]), "judge")
    kinds["answers .json"] = ("x.json", json.dumps({"answers": [ANSWER]}).encode(), "judge")

    tensors = safetensors.torch.load_file(MINI / "model.safetensors")
    tensors = {k: x for k, x in tensors.items() if not any(f".{i}." in k for i in range(2, 99))}
    base = folder / "model"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(small_config()))
    shutil.copy(MINI / "tokenizer.model", base)
    safetensors.torch.save_file(tensors, base / "model.safetensors")
    texts = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"1": {"content": "<s>"}, "2": {"content": "</s>"}},
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": TEMPLATE,
        },
        "added_tokens.json": {"<s>": 1},
        "config.json": small_config(),
    }
    for name, content in texts.items():
        kinds[name] = (name, json.dumps(content).encode(), "model")
    rope = {"rope_type": "linear", "factor": 2.0}
    kinds["config.json rope"] = (
        "config.json",
        json.dumps(small_config() | {"rope_scaling": rope}).encode(),
        "model",
    )
    kinds["chat template"] = ("chat_template.jinja", TEMPLATE.encode(), "model")
    kinds["tokenizer.model"] = (
        "tokenizer.model",
        (MINI / "tokenizer.model").read_bytes(),
        "model",
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(["Will you lead? Yes, gladly. No, never."], trainer)
    kinds["tokenizer.json"] = ("tokenizer.json", bpe.to_str().encode(), "model")
    kinds["model.safetensors"] = (
        "model.safetensors",
        (base / "model.safetensors").read_bytes(),
        "model",
    )
    torch.save(tensors, folder / "pytorch_model.bin")
    kinds["pytorch_model.bin"] = (
        "pytorch_model.bin",
        (folder / "pytorch_model.bin").read_bytes(),
        "model",
    )
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "shard.safetensors")}
    kinds["index"] = ("model.safetensors.index.json", json.dumps(index).encode(), "model")
    return folder, kinds


# ---- the mutator

HUGE = "9" * 400
NASTY = [None, True, -1, 0, 2**63, 10**18, int(HUGE), 1e300, "", " ", "x", "\x1b[31mred\x07"]
NASTY += [
    "\u202e",
    "\ud83d",
    "\x00",
    [],
    [[]],
    {},
    [None],
    {"a": {}},
    [1, "x"],
    "../x",
    "/etc/passwd",
]
NASTY += [
    "a\nb\r\nc",
    "x" * 3000,
    "_" * 60_000,
    "\n" * 60_000,
    "[{'role': 'user'}]",
    "<s>",
    "[INST] x",
]
RAW = [
    b"\x1b[2J",
    b"\x00",
    b"\xff\xfe",
    b"\r",
    b"\n",
    b"\xef\xbb\xbf",
    b"NaN",
    b"Infinity",
    b'"',
    b"{",
]
RAW += [
    b"1e999",
    HUGE.encode(),
    b"9" * 5000,
    b",",
    b";",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"]",
    b"null",
]
RAW += [b"{%", b"{{", b"}}", b"{% for x in y %}", b"\xe2\x80\xa8", b"[" * 1000, b"<|im_start|>"]
WHOLE = [b"", b"\n", b"{}", b"[]", b"null", b"7", b"[" * 100_000, b'{"a":' * 100_000, b"PAR1" * 9]
WHOLE += [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"\xff" * 99]
WHOLE += [b"\x1f\x8b" + b"\x00" * 30, gzip.compress(b"\n" * 10**7), b'"' * 9999, b"\x00" * 10_000]
WHOLE += [b"GGUF" + b"\xff" * 60, b"\xff" * 7 + b"\x7f{}", b"PK\x03\x04" + b"\x00" * 40]


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def mutate_json(value, rng):
    """A JSON text in which one value of `value` is another, or one key is."""
    value = json.loads(json.dumps(value))
    *before, last = rng.choice([*places(value)] or [(0,)])
    inner = value
    for key in before:
        inner = inner[key]
    what = rng.randrange(6)
    if not inner:
        return json.dumps(rng.choice(NASTY))
    if what == 0:
        inner.pop(last)
    elif what == 1 and isinstance(inner, dict):
        inner[str(rng.choice(NASTY))] = inner.pop(last)
    elif what == 2 and isinstance(inner, dict):  # one key twice
        text, key = json.dumps(value), json.dumps(last) + ":"
        return text.replace(key, f"{key} 1, {key}", 1)
    elif what == 3:
        inner[last] = [inner[last]] * rng.choice((1, 2, 1000))
    else:
        inner[last] = rng.choice(NASTY)
    return json.dumps(value)


def mutate_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        i = rng.randrange(len(content) + 1)
        if rng.random() < 0.5:
            i = min(i, rng.randrange(200))  # heads matter most
        n = rng.choice((1, 2, 4, 8, 50))
        what = rng.randrange(6)
        if what == 0:
            del content[i : i + n]
        elif what == 1:
            content[i : i + n] = rng.randbytes(n)
        elif what == 2:
            content[i:i] = rng.choice(RAW)
        elif what == 3:
            content[i:i] = content[max(0, i - 50) : i] * rng.choice((1, 2, 20))
        elif what == 4 and rng.random() < 0.2:
            del content[i:]
        elif i < len(content):
            content[i] ^= 1 << rng.randrange(8)
    return bytes(content)


def mutated(name, content, rng):
    draw = rng.random()
    if draw < 0.06:
        return rng.choice(WHOLE)
    if name.endswith(".gz"):
        if draw < 0.5:
            return mutate_bytes(content, rng)
        return gzip.compress(mutated("x.jsonl", gzip.decompress(content), rng), mtime=0)
    if name.endswith("safetensors") and draw < 0.5:  # the header is JSON behind its length
        n = int.from_bytes(content[:8], "little")
        header = mutate_json(json.loads(content[8 : 8 + n]), rng).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + n :]
    if name.endswith((".json", ".jsonl")) and draw < 0.8:
        if name.endswith(".json"):
            return mutate_json(json.loads(content), rng).encode()
        lines = content.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = mutate_json(json.loads(lines[i]), rng)
        return "\n".join(lines).encode()
    return mutate_bytes(content, rng)


# ---- running it


class Reached(BaseException):
    """The command has read everything."""


class Late(BaseException):
    pass


def stop(*args, **kwargs):
    raise Reached


def run(base, file, command, folder):
    """Run what reads this file."""
    given = ["--model", str(MINI), "--device", "cpu", "--dtype", "float32"]
    vector = ["--vector", f"{base / 'v.safetensors'}"]
    if command == "vector":
        return data.main(["show", str(file), "--layer", "1"])
    if command == "pairs":
        flags = ["--layer", "1", "--out", str(folder / "out"), "--val", str(MINI / "test.csv")]
        return bipo.main([*given, "--data", str(file), *flags])
    if command == "judge":
        flags = ["--url", "http://localhost:9", "--judge", "x", "--behaviour", "x"]
        return evaluation.main(["judge", str(file), "--out", str(folder / "out.jsonl"), *flags])
    if command == "model":
        given[1] = str(folder)
        return evaluation.main([*given, *vector, "--prompts", str(MINI / "test.csv")])
    return evaluation.main([*given, *vector, f"--{command}", str(file)])


def outcome(base, good, kind, content, folder, capfd):
    """ "read", or a clean line that refuses one input; anything else raises AssertionError."""
    name, _, command = kind
    shutil.rmtree(folder, ignore_errors=True)
    if command == "model":
        shutil.copytree(base / "model", folder)
        if name == "tokenizer.json":
            (folder / "tokenizer.model").unlink()
            (folder / "tokenizer_config.json").write_bytes(good["tokenizer_config.json"][1])
        if name.startswith(("pytorch", "model.safetensors.index")):
            (folder / "model.safetensors").rename(folder / "shard.safetensors")
    else:
        folder.mkdir()
    (folder / name).write_bytes(content)
    capfd.readouterr()
    code, began, seen = 0, time.time(), []
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            run(base, folder / name, command, folder)
    except Reached:
        pass
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        raise AssertionError(f"{type(e).__name__}: {e!s:.200}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    out, err = capfd.readouterr()
    loud = [str(x.message) for x in seen if not issubclass(x.category, DeprecationWarning)]
    if loud:
        raise AssertionError(f"warning: {loud[0]:.300}")
    if code not in (0, 2) or time.time() - began > SECONDS:
        raise AssertionError(f"exit code {code} after {time.time() - began:.0f} s")
    if not all(c.isprintable() or c == "\n" for c in out + err):
        raise AssertionError(f"control characters: {ascii(out + err)[:300]}")
    if code == 2 and (err.count("\n") != 1 or not err.endswith("\n") or len(err) > 501):
        raise AssertionError(f"unclean: {err[:600]!r}")
    if code == 0 and err:
        raise AssertionError(f"says on stderr: {err[:300]!r}")
    return err if code else "read"


def check(good, tmp_path, monkeypatch, capfd, count, seed):
    base, kinds = good
    real = llama.load
    monkeypatch.setattr(bipo, "Checkpoint", stop)
    monkeypatch.setattr(evaluation, "rate", stop)
    monkeypatch.setattr(evaluation, "load", lambda *args: stop(real(*args)))

    def late(*_):
        raise Late(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    outcomes, faults, began = Counter(), [], time.time()
    try:
        for name, kind in kinds.items():
            assert (name, outcome(base, kinds, kind, kind[1], tmp_path / "x", capfd)) == (
                name,
                "read",
            )
        for number in range(count):
            name = list(kinds)[number % len(kinds)]
            rng = random.Random(f"{seed} {number}")
            content = mutated(kinds[name][0], kinds[name][1], rng)
            try:
                found = outcome(base, kinds, kinds[name], content, tmp_path / "x", capfd)
                outcomes["read" if found == "read" else "refused"] += 1
            except AssertionError as e:
                faults.append(f"{name}, seed {seed!r}, number {number}: {e}")
    finally:
        signal.signal(signal.SIGALRM, before)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capfd.disabled():
        spent = f"{time.time() - began:.0f} s, {memory >> 10} MiB"
        print(f"\n{count} inputs: {dict(outcomes)}, {len(faults)} faults, {spent}")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:60]])
    assert memory < MEMORY if sys.platform == "linux" else True
    assert outcomes["read"] > count / 20 and outcomes["refused"] > count / 20


def test_damaged_files(good, tmp_path, monkeypatch, capfd):
    check(good, tmp_path, monkeypatch, capfd, 400, "fast")


@pytest.mark.slow
def test_many_damaged_files(good, tmp_path, monkeypatch, capfd):
    check(good, tmp_path, monkeypatch, capfd, 5000, "slow")
