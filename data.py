"""What comes from disk: models by name, preference pairs to packed token ids, vector files.

    chat = Chat(Tokenizer("path/to/checkpoint"), "llama-2", "You are a helpful assistant.")
    pairs = read_pairs("pairs.jsonl")
    batch = pack([chat.encode_pair(pair) for pair in pairs[:4]])

    python data.py convert runs/pairs-layer15 vector.gguf

Pair files: FORMATS, among them the CSV of the official BiPO code,
https://github.com/CaoYuanpu/BiPO; chat templates: TEMPLATES; vector files: VECTOR_FORMATS. Token
ids equal those of the official trainer (tests/golden). Needs torch, numpy, safetensors,
sentencepiece, and for checkpoints without tokenizer.model the package tokenizers; MIT licence.

One pair becomes one sequence, `prompt | chosen | rejected`, in which both responses see the prompt
and themselves and count positions from the prompt's end; a batch is its pairs behind one another:

    tokens         p0 p1 p2   c0 c1   r0 r1 r2 | next pair's p0 ...
    positions       0  1  2    3  4    3  4  5 | 0 ...
    predicted by              p2 c0   p2 r0 r1 |
"""

import argparse
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import sentencepiece
import torch

from llama import PairIds

# ---- Models by name ------------------------------------------------------------------------------

HUB_IDS = [  # alias, hub id, what {} may be in either
    ("llama2-{}-chat", "meta-llama/Llama-2-{}-chat-hf", "7b 13b 70b"),
    ("codellama-{}-instruct", "codellama/CodeLlama-{}-Instruct-hf", "7b 13b 34b"),
    ("vicuna-{}", "lmsys/vicuna-{}-v1.5", "7b 13b"),
    ("tinyllama-{}-chat", "TinyLlama/TinyLlama-{}-Chat-v1.0", "1.1B"),
    ("mistral-7b-instruct-{}", "mistralai/Mistral-7B-Instruct-{}", "v0.1 v0.2 v0.3"),
    ("zephyr-{}", "HuggingFaceH4/zephyr-{}", "7b-alpha 7b-beta"),
    ("yi-{}-chat", "01-ai/Yi-{}-Chat", "6B 34B"),
    ("llama3-{}-instruct", "meta-llama/Meta-Llama-3-{}-Instruct", "8B 70B"),
    ("llama3.1-{}-instruct", "meta-llama/Llama-3.1-{}-Instruct", "8B 70B"),
    ("llama3.2-{}-instruct", "meta-llama/Llama-3.2-{}-Instruct", "1B 3B"),
    ("smollm2-{}-instruct", "HuggingFaceTB/SmolLM2-{}-Instruct", "135M 360M 1.7B"),
    ("qwen2.5-{}-instruct", "Qwen/Qwen2.5-{}-Instruct", "0.5B 1.5B 3B 7B 14B 32B 72B"),
]
ALIASES = {
    alias.format(x).lower(): hub_id.format(x) for alias, hub_id, xs in HUB_IDS for x in xs.split()
} | {"mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.2"}  # the paper's


def find_model(name):
    """(folder, name) of a checkpoint given by folder, alias or hub id. The latter two are looked up
    in the local Hugging Face cache, whose own folders may be given too; nothing is downloaded.
    Raises ValueError if it isn't there."""
    hub_id = ALIASES.get(str(name).lower(), str(name))
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    home = os.environ.get("HF_HOME") or home
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    folder = Path(name)
    if not folder.is_dir():
        folder = cache / ("models--" + hub_id.replace("/", "--"))
    if (folder / "snapshots").is_dir():
        folder = find_revision(folder)
    if folder.is_dir():
        return folder, model_name(folder)
    advice = f"to download it: hf download {hub_id}"
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_id):
        advice = f"aliases are {', '.join(ALIASES)}"
    raise ValueError(f"no model {name!r}: no such folder, and not in the cache {cache}; {advice}")


def find_revision(repo):
    """The folder of files (links, in fact) in a cached repository, `models--ORG--NAME`: the one of
    snapshots/ that refs/main names, or the only one. Raises ValueError if there is none."""
    main = repo / "refs" / "main"
    name = main.read_text().strip() if main.is_file() else "*"
    folders = [folder for folder in (repo / "snapshots").glob(name) if folder.is_dir()]
    if len(folders) != 1:
        raise ValueError(
            f"{repo}: {len(folders)} folders are snapshots/{name}, not one; give --model one that "
            f"is complete, or: hf download {model_name(repo)}"
        )
    return folders[0]


def model_name(folder):
    """The hub id that a folder of the cache is named for; any other folder's own name."""
    path = Path(folder).resolve()
    found = re.search(r"/models--([^/]+)(/snapshots/[^/]+)?$", path.as_posix())
    return found[1].replace("--", "/") if found else path.name


# ---- Pairs ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    prompt: str | tuple  # what the user says; or turns ((role, content), ...), a user's the last
    chosen: str  # r_T, the response that shows the target behaviour
    rejected: str  # r_O, the opposite
    source: str = ""  # "file:line", for messages


class Pairs(list):
    """Pairs in the order of their file. `report` is a line that says how they were read."""

    report = ""


def read_pairs(path, letters=False, best=False):
    """The Pairs of a file: a container of CONTAINERS, maybe with .gz, of records in one of FORMATS.

    letters: answers to multiple choice are the letters; best: of the correct answers, the best one.
    Duplicates, pairs of identical answers and broken records are dropped and counted in the report.
    A prompt may be empty: some in the official files are. Raises ValueError with file and line for
    a record that is no pair or of another format than those before, and if two columns could be
    the one that is needed.
    """
    path = Path(path)
    kind, records = open_records(path, "pair", CONTAINERS)
    flags = [flag for flag, is_set in (("letters", letters), ("best", best)) if is_set]
    pairs, seen, name = Pairs(), set(), None
    dropped = {"duplicates": 0, "identical answers": 0, "broken records": 0}
    for place, record in records:
        source = f"{path}{place}"
        try:
            form, convert, values = recognise(record, flags)
            name = name or form
            if form != name:
                raise ValueError(f"a record of {form} after records of {name}")
            found = [checked(record, *pair) for pair in convert(*values)]
        except ValueError as e:
            raise ValueError(f"{source}: {e}") from None
        dropped["broken records"] += not found
        for pair in found:
            if pair in seen or pair[1] == pair[2]:
                dropped["duplicates" if pair in seen else "identical answers"] += 1
            else:
                pairs.append(Pair(*pair, source))
                seen.add(pair)
    counts = ", ".join(f"{count} {what}" for what, count in dropped.items() if count)
    counts = f", dropped {sum(dropped.values())}: {counts}" if counts else ""
    if not pairs:
        raise ValueError(f"{path} holds no pairs{counts}")
    pairs.report = f"read {len(pairs)} pairs from {path} as {name} {kind}{counts}"
    return pairs


def split_pairs(pairs, seed, share=0.1):
    """(training, held-out) pairs: a share of the prompts is held out, each with all its pairs."""
    prompts = sorted({pair.prompt for pair in pairs}, key=str)
    if len(prompts) < 2:
        raise ValueError("one prompt cannot be split into training and held-out pairs; give --val")
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: math.ceil(share * len(prompts))])
    kept = [pair for pair in pairs if pair.prompt not in held_out]
    return kept, [pair for pair in pairs if pair.prompt in held_out]


# Containers: path, text -> (place, record) of each record; a record is a dict.


def open_records(path, what, containers):
    """(kind, (place, record) of each record) of a file by the end of its name, maybe with .gz.
    Raises ValueError for another end; what: kind of file it would be."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind not in containers:
        ends = ", .".join(containers)
        raise ValueError(f"{path}: a {what} file ends in .{ends} or that and .gz")
    return kind, containers[kind](path, read_text(path))


def read_text(path):
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as e:  # the latter two from .gz
        raise ValueError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 (byte {data[e.start]:#04x}); save it as UTF-8"
        ) from None


def jsonl_records(path, text):
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold U+2028
        if line.strip():
            try:
                yield f":{number}", json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}:{number}: not JSON: {e}") from None


def json_records(path, text):
    """An array of objects, an object that holds one array, or JSONL by another name."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as e:
        if "Extra data" not in str(e):
            raise ValueError(f"{path}: not JSON: {e}") from None
        yield from jsonl_records(path, text)
        return
    if isinstance(records, dict):
        arrays = [value for value in records.values() if isinstance(value, list)]
        records = arrays[0] if len(arrays) == 1 else [records]
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield f" record {number}", record


def csv_records(path, text):
    """Fields may hold newlines, so a record's line is the one it begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    try:
        header = next(reader, [])
        for name in filter(None, header):
            if header.count(name) != 1:
                raise ValueError(f"{path}:1: {header.count(name)} columns {name!r}; rename one")
        begins = reader.line_num + 1
        for row in reader:
            if any(row) and len(row) != len(header):
                raise ValueError(f"{path}:{begins}: {len(row)} fields, but {len(header)} columns")
            if any(row):  # spreadsheets leave empty ones
                yield f":{begins}", dict(zip(header, row, strict=True))
            begins = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{path}:{begins}: not CSV: {e}") from None


CONTAINERS = {"csv": csv_records, "jsonl": jsonl_records, "json": json_records}

# Formats: the values of a record's columns -> [(prompt, chosen, rejected)], none if it is broken.


def as_is(*pair):
    return [pair]


def every_pair(question, *answers):
    """Each answer that matches with each that does not, stripped; either is a text or a list."""
    lists = [[x.strip() for x in ([a] if isinstance(a, str) else a)] for a in answers]
    return [(question, *pair) for pair in itertools.product(*lists)]


def separated(question, *answers):
    """TruthfulQA's lists are texts separated by ';'."""
    return every_pair(question, *([x for x in a.split(";") if x.strip()] for a in answers))


def spelled_out(question, *answers):
    """' (A)' becomes the text of option (A), and the question loses its options, as in the paper's
    data. Without options, ' Yes' becomes 'Yes'."""
    pairs = every_pair(question, *answers)
    stem, *options = re.split(r"^[ \t]*(\([A-Z]\))", question, flags=re.MULTILINE)
    if not options:
        return pairs
    letters, texts = options[::2], [re.sub(r"\s*Answer:\s*$", "", x).strip() for x in options[1::2]]
    options = dict(zip(letters, texts, strict=True))
    asked = {letter for _, *pair in pairs for letter in pair}
    unclear = len(options) < len(letters) or "\n" in "".join(texts) or not all(texts)
    if unclear or not asked <= set(options):
        return []  # of those that a model wrote, some hold a second question or an empty option
    heading = r"\n[\W_]*(\w+ )?(choice|option|answer|response)s?[\W_]*$"
    stem = re.sub(heading, "", stem.removeprefix("Question:"), flags=re.IGNORECASE).strip()
    return [(stem, options[chosen], options[rejected]) for _, chosen, rejected in pairs]


def lettered(question, a, b, matching):
    return {"A": [(question, a, b)], "B": [(question, b, a)]}.get(matching, [])


def shared_beginning(chosen, rejected):
    """The prompt is what both texts begin with, up to the last whole word."""
    shared = os.path.commonprefix([chosen, rejected])
    prompt = re.match(r"(.*\s)?", shared, re.DOTALL)[0]
    if not prompt.strip():
        raise ValueError("no column for the prompt, and the answers begin with different words")
    return [(prompt.rstrip(), *(text[len(prompt) :].strip() for text in (chosen, rejected)))]


ROLES = dict(system="system", user="user", assistant="assistant", human="user", gpt="assistant")


def turns(messages):
    """((role, content), ...) of a message or a list of them; a text is the user's."""
    if isinstance(messages, str):
        return (("user", messages),)
    result = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict):
            raise ValueError(f"{message!r:.60} is not a message {{role, content}}")
        role = str(message.get("role", message.get("from"))).lower()  # from, value: ShareGPT
        content = message.get("content", message.get("value"))
        if role not in ROLES:
            raise ValueError(f"a message's role is {role!r}; it may be system, user or assistant")
        if not isinstance(content, str):
            raise ValueError(f"a message's content is {content!r:.60}, not text")
        result.append((ROLES[role], content))
    return tuple(result)


def conversation(*values):
    """chosen and rejected are the answer alone or all messages; a prompt beside all messages is a
    part of them."""
    *prompt, chosen, rejected = map(turns, values)
    prompt, context = sum(prompt, ()), chosen[:-1]
    last = [role for role, _ in chosen[-1:] + rejected[-1:]]
    if context != rejected[:-1] or last != ["assistant", "assistant"]:
        raise ValueError("chosen and rejected must differ in one last message, the assistant's")
    if context[: len(prompt)] != prompt and not (context and isinstance(values[0], str)):
        context = prompt + context
    return [(asked(context), chosen[-1][1], rejected[-1][1])]


def asked(context):
    """Turns as Pair.prompt has them. Raises ValueError if their order is another."""
    roles = [role for role, _ in context]
    if not re.fullmatch("s?(ua)*u", "".join(role[0] for role in roles)):
        raise ValueError(
            f"turns {roles}: wanted is user, or system, user, assistant, user and so on"
        )
    return context[0][1] if roles == ["user"] else context


def transcripts(*values):
    """HH-RLHF, with the prompt in the answers or apart. One or two in a hundred of its records are
    broken: they part before the last answer, lack it, or have one speak twice in a row."""
    *prompt, chosen, rejected = values
    sides = []
    for text in (chosen, rejected):
        text = text if are_transcripts([text]) else "".join(prompt) + text
        if not are_transcripts([text]):
            return []
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
        said = zip(parts[1::2], parts[2::2], strict=True)
        sides.append([{"role": role, "content": words.strip()} for role, words in said])
    try:
        pairs = conversation(*sides)
    except ValueError:
        return []
    return pairs if all(pairs[0][1:]) else []


def are_transcripts(values):
    """Judged by the first, which is a prompt or an answer with its prompt."""
    begins = r"\s*Human:.*\n\nAssistant:"
    return isinstance(values[0], str) and re.match(begins, values[0], re.DOTALL)


def are_messages(values):
    return isinstance(values[-1], list | dict)


def are_lists(values):
    """Of texts; a text is a list of one."""
    return all(isinstance(x, str) for v in values for x in (v if isinstance(v, list) else [v]))


PROMPT = "prompt question query input instruction prompt_arr conversations".split()
CHOSEN = """chosen chosen_response preferred pos accepted answer_chosen matching winning_output
    chosen_arr""".split()
REJECTED = """rejected rejected_response dispreferred neg answer_rejected not_matching losing_output
    rejected_arr""".split()
ALL, ANSWERS = (PROMPT, CHOSEN, REJECTED), (CHOSEN, REJECTED)
BIPO, TRL = (["question"], ["matching"], ["not_matching"]), (["prompt"], ["chosen"], ["rejected"])
EVALS = (["question"], ["answer_matching_behavior"], ["answer_not_matching_behavior"])
BEST = (["question"], ["best_answer"], ["incorrect_answers"])
CORRECT = (["question"], ["correct_answers"], ["incorrect_answers"])

# A record is of the first format whose columns it has and whose test its values pass; without a
# test they must be texts. A format with a flag is for that argument of read_pairs.
FORMATS = (  # name, names that each column may have, converter, test, flag
    ("HH-RLHF", ALL, transcripts, are_transcripts, None),
    ("HH-RLHF", ANSWERS, transcripts, are_transcripts, None),
    ("conversations", ALL, conversation, are_messages, None),
    ("conversations", ANSWERS, conversation, are_messages, None),
    ("BiPO", BIPO, as_is, None, None),
    ("TRL", TRL, as_is, None, None),
    ("prompt, chosen, rejected", ALL, as_is, None, None),
    ("TRL without prompt", ANSWERS, shared_beginning, None, None),
    ("BiPO A/B", (["question"], ["a"], ["b"], ["matching"]), lettered, None, None),
    ("model-written evals, letters", EVALS, every_pair, are_lists, "letters"),
    ("model-written evals", EVALS, spelled_out, are_lists, None),
    ("TruthfulQA, best answers", BEST, separated, None, "best"),
    ("TruthfulQA", CORRECT, separated, None, None),
)


def named_columns(record):
    """[(a column's name in lower case, "a b" being a_b; its key)]. Raises ValueError for a record
    that is no object."""
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {record!r:.60}")
    return [(key.strip().lower().replace(" ", "_"), key) for key in record]


def recognise(record, flags):
    """(name, converter, values) by FORMATS. Raises ValueError if there is none, or a doubt."""
    named = named_columns(record)

    def find(columns):
        return [[key for name, key in named if name in names] for names in columns]

    for names, keys in zip(ALL, find(ALL), strict=True):
        if len(keys) > 1:
            raise ValueError(f"{' and '.join(keys)} could each be the {names[0]}: rename some")
    near = ""
    for form, columns, convert, test, flag in FORMATS:
        keys = find(columns)
        if not all(keys) or (flag and flag not in flags):
            continue
        values = [record[key] for key, *_ in keys]
        if test is None:
            for (key, *_), value in zip(keys, values, strict=True):
                if not isinstance(value, str):
                    raise ValueError(f"{key!r} is {value!r:.60}, not text")
        if test is None or test(values):
            return form, convert, values
        near = f"the columns are those of {form}, the values are not: {values!r:.60}"
    missing = [names[0] for names, keys in zip(ALL, find(ALL), strict=True) if not keys]
    raise ValueError(near or f"no {' and no '.join(map(repr, missing))}, only {', '.join(record)}")


def checked(record, prompt, chosen, rejected):
    """The pair; a column `system` of the record becomes the prompt's system message. Raises
    ValueError for empty answers and for text that is not Unicode."""
    history = turns(prompt) if isinstance(prompt, str) else prompt
    if record.get("system") and history[0][0] != "system":
        history = prompt = turns([{"role": "system", "content": record["system"]}]) + history
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise ValueError(f"the {name} answer is empty")
    "".join([chosen, rejected, *(text for _, text in history)]).encode()  # raises for half a "😀"
    return prompt, chosen, rejected


# ---- Prompts and questions -----------------------------------------------------------------------


def text_records(path, text):
    """A line is a prompt."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f":{number}", {"prompt": line.strip()}


def read_prompts(path):
    """The different prompts of a file, each as in Pair: the lines of .txt that are not blank, or in
    a container of CONTAINERS the column that PROMPT names, `system` before it if there is one; any
    maybe with .gz. Raises ValueError with file and line for a record that does not hold one."""
    path, prompts = Path(path), {}
    _, records = open_records(path, "prompt", {"txt": text_records, **CONTAINERS})
    for place, record in records:
        try:
            keys = [key for name, key in named_columns(record) if name in PROMPT]
            if len(keys) != 1:
                found = f"{' and '.join(keys) or 'none'} of {', '.join(record)}"
                raise ValueError(f"one column must be the prompt, named {PROMPT[0]}, not {found}")
            prompt = asked(turns(record[keys[0]]))
            prompts[checked(record, prompt, "-", "-")[0]] = None  # with answers that pass
        except ValueError as e:
            raise ValueError(f"{path}{place}: {e}") from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return list(prompts)


class Choice(NamedTuple):
    prompt: str
    answers: list[str]  # the right ones first
    n_right: int = 1


def mmlu(file):
    """Rows of question, options A to D, letter; a header is skipped."""
    for number, row in enumerate(csv.reader(io.StringIO(read_text(file), newline="")), 1):
        if number == 1 and row[-1:] in (["answer"], ["Answer"]):
            continue
        if len(row) != 6 or row[5] not in [*"ABCD"]:
            raise ValueError(
                f"{file}: row {number} is not a question, four options and a letter (MMLU), and "
                "there is no header with Best Answer (TruthfulQA)"
            )
        letters = sorted("ABCD", key=lambda x: x != row[5])
        prompt = with_options(row[0], row[1:5])
        yield {"MMLU": Choice(prompt, [f"({letter}" for letter in letters])}


def truthful_qa(file):
    """TruthfulQA.csv: MC1 sets the best answer, MC2 all correct ones against the incorrect ones."""
    names = "Question", "Best Answer", "Correct Answers", "Incorrect Answers"
    for place, record in csv_records(file, read_text(file)):
        if not all(record.get(name) for name in names):
            raise ValueError(f"{file}{place}: one of {', '.join(names)} is missing")
        question, best, *lists = (record[name].strip() for name in names)
        right, wrong = ([x.strip() for x in text.split(";") if x.strip()] for text in lists)
        if not wrong:
            raise ValueError(f"{file}{place}: Incorrect Answers holds none")
        right = list(dict.fromkeys([best, *right]))
        yield {
            "TruthfulQA MC1": Choice(question, [best, *wrong]),
            "TruthfulQA MC2": Choice(question, right + wrong, len(right)),
        }


def mc_task(file):
    """TruthfulQA's mc_task.json."""
    for place, record in json_records(file, read_text(file)):
        found = {}
        try:
            for name in ("mc1", "mc2"):
                targets = record[f"{name}_targets"]
                right, wrong = ([x for x in targets if targets[x] == y] for y in (1, 0))
                whole = len(right) + len(wrong) == len(targets) and all(map(str.strip, targets))
                if not (whole and right and wrong) or len(right) > 1 and name == "mc1":
                    raise TypeError
                choice = Choice(str.strip(record["question"]), right + wrong, len(right))
                found[f"TruthfulQA {name.upper()}"] = choice
        except (LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{file}{place}: not a question with mc1_targets and mc2_targets, which hold "
                "1 for right answers, one of them in mc1_targets, and 0 for wrong ones"
            ) from None
        yield found


def read_choices(path, first=None):
    """{measure: [Choice]} of a file, or of the .csv files in a folder: MMLU's CSV, TruthfulQA.csv
    or TruthfulQA's mc_task.json. first: how many questions of each file. Raises ValueError with
    file and row for anything else."""
    files, found = sorted(path.glob("*.csv")) if path.is_dir() else [path], {}
    for file in files:
        if file.suffix.lower() not in (".csv", ".json"):
            raise ValueError(
                f"{file}: multiple choice is a .csv, a folder of them, or mc_task.json"
            )
        read = mc_task
        if file.suffix.lower() == ".csv":
            read = truthful_qa if "Best Answer" in read_text(file).split("\n")[0] else mmlu
        for measures in itertools.islice(read(file), first):
            for name, choice in measures.items():
                found.setdefault(name, []).append(choice)
    if not found:
        raise ValueError(f"{path} holds no questions")
    return found


# ---- Tokens --------------------------------------------------------------------------------------

SYSTEM = "You are a helpful, honest and concise assistant."  # the official recipe's


class Control(str):
    """A control token in a rendered conversation, whose other parts are text; "" is none, but what
    stands on its two sides is tokenised apart."""


class Template(NamedTuple):
    """How a conversation becomes text and control tokens. Forms hold {content}, a turn's text, and
    {setting}: the form `system` in the first user turn, "" in the others."""

    marker: str  # a regex; a checkpoint whose chat_template it matches has this template
    controls: str  # control tokens of the forms, as Tokenizer names them; the last ends an answer
    system: str
    user: str  # up to where the answer begins
    assistant: str  # of an answer that is followed by another turn
    answer: str = ""  # between a prompt and the response that is trained or scored
    begin: str = "<s>"
    default: str = ""  # system prompt
    clean: Callable = str  # of a text
    late: bool = False  # {setting} is in the last user turn


# llama-2 and mistral are the official recipe's, as FastChat renders them: with a system prompt, and
# ' ' + response + EOS tokenised jointly with the prompt, e.g. for llama-2:
#   <s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWill you lead? [/INST] Yes, gladly.</s>
# The others are the models' own. The first that fits a checkpoint is taken. After a control token
# sentencepiece begins a text with a space, as after [INST] of mistral-v3.
# fmt: off
TEMPLATES = {
    "llama-2": Template(
        "<<SYS>>", "<s> </s>",
        "<<SYS>>\n{system}\n<</SYS>>\n\n", "[INST] {setting}{content} [/INST]",
        " {content} </s><s>", answer=" ", default=SYSTEM,
    ),
    "mistral-v3": Template(
        r"\[INST\]", "<s> [INST] [/INST] </s>",
        "{system}\n\n", "[INST]{setting}{content}[/INST]", "{content}</s>", late=True,
    ),
    "mistral": Template(
        r"\[INST\]", "<s> </s>",
        "{system}\n", "[INST] {setting}{content} [/INST]", " {content}</s>",
        answer=" ", default=SYSTEM,
    ),
    "vicuna": Template(
        "(?i:vicuna)|USER: ", "<s> </s>",
        "{system} ", "{setting}USER: {content} ASSISTANT:", " {content}</s>",
        answer=" ",
        default="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "zephyr": Template(
        r"<\|user\|>", "<s> </s>",
        "<|system|>\n{system}</s>\n",
        "{setting}<|user|>\n{content}</s>\n<|assistant|>\n", "{content}</s>\n",
    ),
    "chatml": Template(
        r"<\|im_start\|>", "<|im_start|> <|im_end|>",
        "<|im_start|>system\n{system}<|im_end|>\n",
        "{setting}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        "{content}<|im_end|>\n", answer=Control(""), begin="",
    ),
    "llama-3": Template(
        r"<\|start_header_id\|>",
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        "{setting}<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{content}<|eot_id|>", answer=Control(""), begin="<|begin_of_text|>", clean=str.strip,
    ),
    "plain": Template(
        "(?!)", "<s>? </s>",  # (?!) matches nothing
        "{system}\n\n", "{setting}{content}", "{content}\n\n", begin="<s>?",
    ),
}
# fmt: on
FAMILY_TEMPLATES = {"llama": "llama-2", "mistral": "mistral", "qwen2": "chatml"}


def read_json(path):
    """The object in a JSON file; {} if there is no such file."""
    try:
        value = json.loads(read_text(path)) if path.is_file() else {}
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


class Tokenizer:
    """A checkpoint folder's tokenizer: tokenizer.model (sentencepiece) if it is there, or else
    tokenizer.json (package `tokenizers`).

    encode: text -> ids. Text is text: a literal "</s>" in it does not become the control token.
    decode: ids -> text, without control tokens.
    controls: {control token: id}. Whatever their own names, BOS and EOS are <s> and </s>; BOS is
        <s>? too, if the tokenizer puts one before every text (Qwen2.5's and Yi's do not).
    name: the file and the beginning of its SHA-256.
    """

    def __init__(self, path):
        file = Path(path, "tokenizer.model")
        if not file.is_file() and file.with_suffix(".json").is_file():
            file = file.with_suffix(".json")
        read = open_sentencepiece if file.suffix == ".model" else open_tokenizer_json
        self.config = read_json(file.with_name("tokenizer_config.json"))
        try:
            content = file.read_bytes()
            self.encode, self.decode, self.size, self.controls = read(content, self.config)
        except Exception as e:  # the package `tokenizers` raises nothing narrower
            raise ValueError(f"cannot read {file}: {e}") from None
        self.name = f"{file.name} {hashlib.sha256(content).hexdigest()[:12]}"
        self.bos_id, self.eos_id = self.controls.get("<s>"), self.controls.get("</s>")

    def stream(self, ids):
        """The text of ids, an iterable, in pieces: each as soon as its characters are whole."""
        seen, text = [], ""
        for i in ids:
            seen.append(i)
            longer = self.decode(seen)  # as a whole, for the first word's space is dropped
            if not longer.endswith("\ufffd"):
                yield longer[len(text) :]
                text = longer
        yield self.decode(seen)[len(text) :]


def open_sentencepiece(content, config):
    """encode, decode, number of tokens, controls; config is tokenizer_config.json's."""
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    size, bos_id, eos_id = model.vocab_size(), model.bos_id(), model.eos_id()
    controls = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    controls |= {x["content"]: int(i) for i, x in config.get("added_tokens_decoder", {}).items()}
    controls |= {"<s>": bos_id, "</s>": eos_id}
    controls |= {"<s>?": bos_id} if config.get("add_bos_token", True) else {}
    unprinted = set(controls.values())

    def decode(ids):
        return model.decode([i for i in ids if i < size and i not in unprinted])

    return model.encode, decode, size, {token: i for token, i in controls.items() if i >= 0}


def open_tokenizer_json(content, config):
    """As open_sentencepiece."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("it needs a package: pip install tokenizers") from None
    model = tokenizers.Tokenizer.from_buffer(content)
    model.no_truncation()  # which a file may switch on
    model.no_padding()
    model.encode_special_tokens = True  # as text
    controls = {x.content: i for i, x in model.get_added_tokens_decoder().items()}
    for name, token in (("<s>", config.get("bos_token")), ("</s>", config.get("eos_token"))):
        token = token["content"] if isinstance(token, dict) else token
        if token in controls:
            controls[name] = controls[token]
    before = [i for i in model.encode("").ids if i != controls.get("</s>")]
    if before:
        controls["<s>?"] = before[0]

    def encode(text):
        return model.encode(text, add_special_tokens=False).ids

    return encode, model.decode, model.get_vocab_size(), controls


class Chat(NamedTuple):
    """How text becomes ids: the one rendering for training, scoring and generation. A prompt is a
    text, or a conversation: turns (role, content), at first perhaps the "system" one, which then
    wins over `system`, then "user" and "assistant" in turn, at last a "user" turn."""

    tokenizer: Tokenizer
    template: str = "llama-2"  # a key of TEMPLATES
    system: str = SYSTEM  # "" for none

    @property
    def eos_id(self):
        """The token that ends an answer."""
        return self.tokenizer.controls[TEMPLATES[self.template].controls.split()[-1]]

    def pieces(self, prompt):
        """A prompt as texts and Controls. Raises ValueError for turns in another order."""
        row = TEMPLATES[self.template]
        turns = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else self.system
        roles = [role for role, _ in turns]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            raise ValueError(
                f"a conversation's turns are user, assistant, ..., user, perhaps after a system "
                f"turn, not {', '.join(map(str, roles)) or 'none'}"
            )
        controls, pieces = row.controls.split(), [Control(row.begin)]
        parts = "|".join([r"\{\w+\}", *map(re.escape, controls)])
        place = len(turns) - 1 if row.late else 0
        for i, (role, content) in enumerate(turns):
            setting = row.system if system and i == place else ""
            form = getattr(row, role).replace("{setting}", setting)
            texts = {"{system}": row.clean(system), "{content}": row.clean(content)}
            for part in re.split(f"({parts})", form):
                pieces.append(Control(part) if part in controls else texts.get(part, part))
        return pieces

    def encode(self, pieces):
        """Texts and Controls -> ids; texts beside one another are tokenised jointly."""
        ids, controls = [], self.tokenizer.controls
        for kind, group in itertools.groupby(pieces, type):
            if kind is Control:
                new = [controls[x] for x in group if x in controls or x not in ("", "<s>?")]
            else:
                new = self.tokenizer.encode("".join(group))
                for token in TEMPLATES[self.template].controls.split():
                    if controls.get(token) in new:  # a file may declare it an ordinary token
                        raise ValueError(f"{token} in a text would become the control token")
            ids += new
        return ids

    def render(self, prompt):
        """The text that is tokenised for a prompt, with its control tokens but without BOS."""
        return "".join(self.pieces(prompt)).removeprefix(TEMPLATES[self.template].begin)

    def encode_prompt(self, prompt):
        """Token ids with BOS, ready for generation."""
        return self.encode(self.pieces(prompt))

    def encode_responses(self, prompt, responses, max_seq_len=None):
        """(prompt ids, [ids of each response, with EOS]): prompt and response tokenised jointly and
        split at the prompt's length, as the official trainer does, or apart if the template says
        so. Raises ValueError for more than max_seq_len tokens, and where a token spans the split
        (the official trainer then moves it)."""
        row, found = TEMPLATES[self.template], []
        pieces = self.pieces(prompt)
        prompt = self.encode(pieces)
        for text in map(row.clean, responses):
            ids = [*self.encode([*pieces, row.answer, text]), self.eos_id]
            if ids[: len(prompt)] != prompt:
                raise ValueError(f"a token spans the end of the prompt: {text[:60]!r}")
            if max_seq_len and len(ids) > max_seq_len:
                raise ValueError(f"{len(ids)} tokens, but the model's context is {max_seq_len}")
            found.append(ids[len(prompt) :])
        return prompt, found

    def encode_pair(self, pair, max_seq_len=None):
        """PairIds, see `encode_responses`. Raises ValueError with the pair's source, also for
        responses of the same ids."""
        try:
            responses = pair.chosen, pair.rejected
            prompt, (chosen, rejected) = self.encode_responses(pair.prompt, responses, max_seq_len)
            if chosen == rejected:
                raise ValueError("chosen and rejected are the same tokens")
        except ValueError as e:
            raise ValueError(f"{pair.source}: {e}") from None
        return PairIds(prompt, chosen, rejected)


def with_options(prompt, options):
    """The prompt, a text or a conversation, whose last turn ends with the options as (A), (B)..."""
    if not isinstance(prompt, str):
        *before, (role, content) = prompt
        return (*before, (role, with_options(content, options)))
    lines = [f"\n ({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]
    return f"{prompt}\n\nChoices:{''.join(lines)}"


def letter_pairs(chat, pair, max_seq_len=None):
    """PairIds of the pair as two questions with options, chosen as (A) and chosen as (B). Answers
    are "(A" and "(B" without EOS, so a response's last token holds the letter. A pair whose answers
    are letters already is one question, its own. Raises ValueError as `Chat.encode_pair` does."""
    _, chosen, rejected, source = pair
    if all(re.fullmatch(r"\([A-Z]\)", answer.strip()) for answer in (chosen, rejected)):
        asked = [(pair.prompt, chosen.strip()[:2], rejected.strip()[:2])]
    else:
        asked = [
            (with_options(pair.prompt, (chosen, rejected)), "(A", "(B"),
            (with_options(pair.prompt, (rejected, chosen)), "(B", "(A"),
        ]
    ids = [chat.encode_pair(Pair(*each, source), max_seq_len) for each in asked]
    return [PairIds(prompt, *(x[:-1] for x in responses)) for prompt, *responses in ids]


def open_chat(path, config, template=None, system=None):
    """The Chat of the checkpoint in folder `path`. By default its template is the one that its
    chat_template looks like; if it has none, the folder's name or a control token tells, or else
    the model's family. Raises ValueError if that remains unclear, for a template that is unknown or
    impossible with the tokenizer, and for a tokenizer that does not fit the model."""
    tokenizer, file = Tokenizer(path), Path(path, "chat_template.jinja")
    own = read_text(file) if file.is_file() else str(tokenizer.config.get("chat_template") or "")
    needs = {name: {*row.controls.split()} - {"<s>?"} for name, row in TEMPLATES.items()}
    possible = [name for name in TEMPLATES if needs[name] <= tokenizer.controls.keys()]
    if not template:
        clues = own or " ".join([model_name(path), *tokenizer.controls])
        found = [name for name in possible if re.search(TEMPLATES[name].marker, clues)]
        if own and not found:
            raise ValueError(f"{path}: unknown chat_template; try --template {', '.join(possible)}")
        template = found[0] if found else FAMILY_TEMPLATES.get(config.family, "plain")
    if template not in possible:
        fault = f"unknown template {template!r}"
        if template in TEMPLATES:
            lacks = min(needs[template] - tokenizer.controls.keys())
            fault = f"template {template!r} needs {lacks}, which {tokenizer.name} lacks"
        raise ValueError(f"{fault}; possible: {', '.join(possible)}")
    size = max(tokenizer.size, *(1 + tokenizer.controls[x] for x in needs[template]))
    if size > config.vocab_size:
        raise ValueError(
            f"{path}: {size} tokens in {tokenizer.name}, {config.vocab_size} in the model"
        )
    if system is None:
        found = re.search(r"<\|im_start\|>system(?:\n|\\+n)([^<{}']+)<\|im_end\|>", own)
        system = found[1] if found and template == "chatml" else TEMPLATES[template].default
    return Chat(tokenizer, template, system)


# ---- Vector files --------------------------------------------------------------------------------


def read_safetensors(data):
    tensors, (size,) = safetensors.torch.load(data), struct.unpack_from("<Q", data)
    return tensors, json.loads(data[8 : 8 + size]).get("__metadata__", {})


def write_safetensors(vectors, metadata):
    return safetensors.torch.save({f"direction.{i}": v for i, v in vectors.items()}, metadata)


GGUF_TEXT, GGUF_ARRAY = 8, 9
GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type: struct's code
GGUF_HINT = "controlvector.model_hint"  # the one key of ours that others have too


def read_gguf(data):
    """A llama.cpp control vector; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has the
    layout. Of its metadata, what `write_gguf` puts there."""
    at = 0

    def take(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def value(kind):
        if kind == GGUF_TEXT:
            return take(f"{take('Q')}s").decode()
        if kind == GGUF_ARRAY:
            kind, length = take("I"), take("Q")
            return [value(kind) for _ in range(length)]
        return take(GGUF_NUMBERS[kind])

    if take("4s") != b"GGUF" or take("I") not in (2, 3):
        raise ValueError("not GGUF version 2 or 3")
    n_tensors, n_keys = take("Q"), take("Q")
    keys = {value(GGUF_TEXT): value(take("I")) for _ in range(n_keys)}
    infos = []
    for _ in range(n_tensors):
        name, shape = value(GGUF_TEXT), [take("Q") for _ in range(take("I"))]
        infos.append((name, shape, take("I"), take("Q")))
    start, tensors = at + -at % keys.get("general.alignment", 32), {}
    for name, shape, kind, offset in infos:
        if len(shape) != 1 or kind != 0:
            raise ValueError(f"{name} is {shape} of GGUF's type {kind}, not 1-D of type 0, F32")
        tensors[name] = torch.from_numpy(np.frombuffer(data, "<f4", *shape, start + offset).copy())
    keys = {key.replace(GGUF_HINT, "bipo.model_type"): str(x) for key, x in keys.items()}
    return tensors, {key[5:]: x for key, x in keys.items() if key.startswith("bipo.")}


def write_gguf(vectors, metadata):
    """Tensors `direction.L`, which llama.cpp adds where we do, and our metadata, which it ignores.
    Raises ValueError for layer 0, for which it has no place."""
    if 0 in vectors:
        raise ValueError("llama.cpp cannot steer layer 0; its control vectors begin at layer 1")

    def text(x):
        return struct.pack("<Q", len(x.encode())) + x.encode()

    keys = {f"bipo.{key}".replace("bipo.model_type", GGUF_HINT): x for key, x in metadata.items()}
    data = struct.pack("<4sIQQ", b"GGUF", 3, len(vectors), len(keys) + 2)
    data += text("controlvector.layer_count") + struct.pack("<II", 4, len(vectors))
    for key, x in {"general.architecture": "controlvector", **keys}.items():
        data += text(key) + struct.pack("<I", GGUF_TEXT) + text(x)
    offset = 0
    for layer, v in vectors.items():
        data += text(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(v), 0, offset)
        offset += 4 * len(v) + -4 * len(v) % 32
    for x in [*(v.numpy().astype("<f4").tobytes() for v in vectors.values()), b""]:
        data += bytes(-len(data) % 32) + x  # each begins, and the file ends, at a multiple of 32
    return data


def read_pt(data):
    try:
        with warnings.catch_warnings(action="ignore"):
            return {None: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)}, {}
    except pickle.UnpicklingError:  # its text advises to run what is in there
        raise ValueError("cut short, or with objects or code, which are not loaded") from None


def write_pt(vectors, metadata):
    torch.save(*vectors.values(), file := io.BytesIO())
    return file.getvalue()


def read_npy(data):
    return {None: torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))}, {}


def write_npy(vectors, metadata):
    np.save(file := io.BytesIO(), *vectors.values())
    return file.getvalue()


# suffix: (bytes -> {name: tensor}, metadata; {layer: v}, metadata -> bytes). A bare tensor has the
# name None: its layer stands in the file's name, if anywhere.
VECTOR_FORMATS = {
    ".safetensors": (read_safetensors, write_safetensors),
    ".gguf": (read_gguf, write_gguf),  # llama.cpp
    ".pt": (read_pt, write_pt),  # the official code, CAA
    ".npy": (read_npy, write_npy),
}
BARE = (".pt", ".npy")


def vector_format(path):
    if path.suffix.lower() not in VECTOR_FORMATS:
        known = ", ".join(VECTOR_FORMATS)
        raise ValueError(f"{path}: a vector file ends in {known}, not {path.suffix!r}")
    return VECTOR_FORMATS[path.suffix.lower()]


def layer_in_name(path):
    """15 of vec_ep20_layer15.pt (the official code) and vec_layer_15_Model.pt (CAA), or None."""
    found = {int(layer) for layer in re.findall(r"(?<![a-z])layer_?(\d+)", path.name)}
    return found.pop() if len(found) == 1 else None


def save_vector(path, vectors, metadata):
    """Write {layer: v (dim,)} in the format of the path's suffix: as safetensors, fp32 tensors
    named `direction.LAYER` and metadata, a dict of strings. The file appears whole or not at all.
    Raises ValueError for what the format cannot hold: .pt and .npy hold one vector, whose layer the
    file's name must say, and no metadata."""
    path = Path(path)
    _, write = vector_format(path)
    if path.suffix.lower() in BARE and list(vectors) != [layer_in_name(path)]:
        name = f"vec_ep{metadata.get('epoch', 'E')}_layer{min(vectors)}{path.suffix}"
        raise ValueError(f"{path}: one vector goes in there, and its layer in the name, as {name}")
    vectors = {layer: v.detach().float().cpu().clone() for layer, v in sorted(vectors.items())}
    if not all(v.norm().isfinite() for v in vectors.values()):
        raise ValueError(f"{path} is not written, for it would hold NaN or infinity")
    write_whole(path, write(vectors, metadata))


def write_whole(path, data):
    """Write bytes to a file, which appears whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def load_vector(path, layer=None):
    """({layer: v (dim,) fp32}, metadata) of a file in any of VECTOR_FORMATS, or of
    DIR/vector.safetensors.

    layer: the one to take from a file with several; the one of a file that does not say it. Raises
    ValueError for anything but vectors, and for values that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "vector.safetensors"
    if not path.is_file():
        raise ValueError(f"cannot read {path}: there is no such file")
    read, _ = vector_format(path)
    try:
        tensors, metadata = read(path.read_bytes())
    except Exception as e:  # what a damaged file makes the libraries raise has no common type
        reason = str(e).split("\n")[0] or type(e).__name__
        raise ValueError(f"cannot read {path} as a vector file: {reason}") from None
    if None in tensors:
        bare = layer_in_name(path) if layer is None else layer
        if bare is None:
            raise ValueError(f"{path} does not say its layer: give --layer, or name it ..._layerL")
        tensors = {f"direction.{bare}": tensors[None]}
    vectors = {}
    for name, v in tensors.items():
        match = re.fullmatch(r"direction\.(0|[1-9]\d*)", name)
        plain = isinstance(v, torch.Tensor) and v.layout == torch.strided and not v.is_meta
        if not match or not plain or v.dim() != 1 or not v.is_floating_point():
            what = f"{v.dtype} {tuple(v.shape)}" if plain else type(v).__name__
            raise ValueError(f"{path}: {name} {what} is no vector direction.LAYER")
        vectors[int(match[1])] = v = v.detach().float()
        if not v.norm().isfinite():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    if not vectors:
        raise ValueError(f"{path} holds no vector")
    if layer not in (None, *vectors):
        raise ValueError(f"{path} holds no vector for layer {layer}, only {sorted(vectors)}")
    return {i: v for i, v in vectors.items() if layer in (None, i)}, metadata


# ---- Command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Prints an error as one line; its exit code is 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def run_or_exit(parser, run, argv):
    """Call run(args); an error that the user can mend becomes one line and exit code 2."""
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and "memory" not in str(e):
            raise
        parser.error(
            f"out of memory; try --dtype bfloat16, or less data at a time ({e})".split("\n")[0]
        )
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def add_model_flags(parser):
    """What bipo.py and eval.py have in common."""
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="checkpoint folder, alias or hub id")
    add("--template", choices=TEMPLATES, help="of the chat (default: a vector's or the model's)")
    add("--system", help="'' for none (default: a vector's or the template's)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the weights (default: bfloat16, but float32 on a CPU)")
    add("--lora", help="folder of a PEFT adapter to merge into the weights")


def add_pair_flags(parser, several=False):
    """Likewise; `several` files, or none, or else one."""
    add = parser.add_argument_group("pairs").add_argument
    number = {"nargs": "+", "default": []} if several else {"required": True}
    add("--data", type=Path, help=".csv, .json, .jsonl, .gz; formats: README", **number)
    add("--letters", action="store_true", help="answer '(B)' to multiple choice, not its text")
    add("--best", action="store_true", help="TruthfulQA: the best answers only")


def pick_device(device, dtype):
    """(torch.device, torch.dtype) from --device and --dtype, which may be None. Raises ValueError
    for a device that is not there."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cuda", *(f"cuda:{i}" for i in range(n_gpus))] if n_gpus else []
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = device or there[0]
    if device not in there:
        raise ValueError(f"--device {device} is not there; this machine has {', '.join(there)}")
    device = torch.device(device)
    return device, getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))


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
        line = f"{self.what} {done:{len(str(self.total))}}/{self.total}  {1000 * each:.1f} ms each"
        print(f"{line}, {clock(each * (self.total - done))} left  {more}".rstrip(), flush=True)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


LAYER_HELP = "of a vector file that holds several layers, or does not say its own"
LLAMA_CPP = """\
llama.cpp steers with it, 1.0 being any multiplier, by
  llama-cli -m MODEL.gguf --control-vector-scaled {0}:1.0 --control-vector-layer-range {1} {2}
and builds from before its pull request 18056 by
  llama-cli -m MODEL.gguf --control-vector-scaled {0} 1.0 --control-vector-layer-range {1} {2}"""


def run(args):
    if (args.command == "convert") != bool(args.out):
        raise ValueError("either show IN, or convert IN OUT")
    file = args.out or args.vector
    vectors, metadata = load_vector(args.vector, args.layer)
    if args.out:
        if args.scale != 1:
            vectors = {layer: args.scale * v for layer, v in vectors.items()}
            metadata["scale"] = f"{args.scale * float(metadata.get('scale', 1)):g}"
        save_vector(file, vectors, metadata)
        vectors, metadata = load_vector(file)
    for layer, v in vectors.items():
        print(f"{file}: layer {layer}, width {len(v)}, |v| {v.norm():.3f}")
    for key in sorted(metadata) or ["no metadata"]:
        print(f"  {key:10}  {metadata.get(key, '')}".rstrip())
    if args.out and file.suffix.lower() == ".gguf":
        print(LLAMA_CPP.format(file, min(vectors), max(vectors)))


def main(argv=None):
    parser = Parser(prog="data.py", description="A vector file: its content, or another format.")
    parser.add_argument("command", choices=("show", "convert"), help="show IN, or convert IN OUT")
    parser.add_argument("vector", metavar="IN", type=Path, help=", ".join(VECTOR_FORMATS))
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="by its suffix as IN")
    parser.add_argument("--layer", type=int, help=LAYER_HELP)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the vector in OUT")
    run_or_exit(parser, run, argv)


if __name__ == "__main__":
    main()
