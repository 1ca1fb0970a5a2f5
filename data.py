"""Pairs in, token ids out, steering vectors in and out, and what the command lines share.

    pairs = read_pairs("pairs.jsonl")
    chat = open_chat("path/to/checkpoint", read_config("path/to/checkpoint"))
    ids = [chat.encode_pair(pair) for pair in pairs]

    python data.py convert runs/pairs-layer15 vector.gguf

Pair files: the forms in to_pairs, among them the CSV of the official BiPO code,
https://github.com/CaoYuanpu/BiPO. Prompts: the checkpoint's own chat_template or, for the models of
the paper, the official recipe's (RECIPES). Vector files: ours, the official .pt, llama.cpp's GGUF.
Needs torch, safetensors, sentencepiece and jinja2; for what not everybody has, the packages
tokenizers, gguf and huggingface_hub. MIT licence.
"""

import argparse
import csv
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from contextlib import closing, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import sentencepiece
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama import (
    Checkpoint,
    PairIds,
    check_fit,
    check_vectors,
    open_weights,
    parse_json,
    read_config,
    read_json,
    regular,
)

# ---- Errors that a user reads --------------------------------------------------------------------


def require(condition, message):
    if not condition:
        raise ValueError(message)


@contextmanager
def named(what, kinds=ValueError):
    """An error of these kinds inside becomes a ValueError: `what` and its first sentence."""
    try:
        yield
    except kinds as e:
        reason = " ".join(str(e).split()).partition(". ")[0] or type(e).__name__
        raise ValueError(f"{what}: {reason}") from None


def printable(text):
    """The text without control characters but line breaks: they are shown as escape sequences."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def optional(name):
    """An optional package. Raises ValueError if it is not installed."""
    with named(f"this needs a package, pip install {name}", ImportError):
        return __import__(name)


# ---- Models by name ------------------------------------------------------------------------------

ALIASES = {  # the paper's models
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.2",
}


def find_model(name):
    """(folder, name) of a checkpoint given by folder, alias or hub id. The latter two are looked up
    in the local Hugging Face cache by the package huggingface_hub; nothing is downloaded. Raises
    ValueError if it is not there."""
    if Path(name).exists():
        return Path(name), Path(name).resolve().name
    hub_id = ALIASES.get(name.lower(), name)
    missing = f"no model {name!r}: no folder, nor in the cache; hf download {hub_id}"
    with named(missing, Exception):
        # Only this file: others of the repository may have been left out on purpose.
        config = optional("huggingface_hub").try_to_load_from_cache(hub_id, "config.json")
    require(isinstance(config, str), missing)
    return Path(config).parent, hub_id


# ---- Pairs ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    prompt: str | tuple  # what the user says; or turns ((role, content), ...), a user's the last
    chosen: str  # r_T, the response that shows the target behaviour
    rejected: str  # r_O, the opposite
    source: str = ""  # "file:line", for messages
    ids: PairIds | None = None  # what the model sees, if it was read for a Chat


def read_pairs(path, skip_bad=False, chat=None, max_seq_len=10**9):
    """The Pairs of a .csv, .json or .jsonl file, maybe with .gz, whose records `to_pairs` knows;
    chat: a Chat, which gives them `ids`, see Chat.encode_pair.

    Prints what was read, what was dropped (duplicates, identical answers), and which columns were
    not used. A prompt may be empty: some in the official files are. Raises ValueError with file and
    line for records that cannot be read, hold no pair, or hold one that has no ids within
    max_seq_len tokens, unless skip_bad: then they are dropped, counted by reason.
    """
    pairs, faults, dropped, unused = {}, [], Counter(), {}
    for place, record in all_records(Path(path)):
        source = f"{path}{place}"
        try:
            if isinstance(record, ValueError):
                raise record
            found, others = to_pairs(record)
            unused |= dict.fromkeys(others)
            new = [Pair(*texts, source) for texts in found if texts[1] != texts[2]]
            ids = [chat.encode_pair(pair, max_seq_len) if chat else None for pair in new]
            for pair, each in zip(new, ids, strict=True):
                dropped["duplicate"] += pair[:3] in pairs
                pairs.setdefault(pair[:3], pair._replace(ids=each))
            dropped["identical answers"] += len(found) - len(new)
        except ValueError as e:
            reason = str(e).removeprefix(f"{source}: ")
            faults.append(f"{source}: {reason}")
            dropped[reason.partition(":")[0]] += 1
    if faults and not skip_bad:
        raise ValueError(f"{faults[0]} (bad records: {len(faults)}; --skip-bad drops them)")
    pairs = list(pairs.values())
    ends = [re.search(ENDING, x.rstrip()[-30:]) for pair in pairs for x in pair[1:3]]
    if pairs and all(ends):
        raise ValueError(f"{path}: each answer ends in {ends[0][0]} or the like: remove it")
    counts = ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "nothing"
    report = f"read {len(pairs)} pairs from {path}, dropped {counts}; columns not used: {[*unused]}"
    require(pairs, f"no pairs: {report}")
    print(printable(report))
    return pairs


def split_pairs(pairs, seed):
    """(training, held-out) pairs: a tenth of the prompts is held out, each with all its pairs."""
    prompts = sorted({pair.prompt for pair in pairs}, key=str)
    require(len(prompts) > 1, "one prompt cannot be split into training and held out; give --val")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: (len(prompts) + 9) // 10])
    return [x for x in pairs if x.prompt not in held], [x for x in pairs if x.prompt in held]


def note_shortcuts(pairs):
    """Print a note if something cheap tells chosen from rejected in more than 90% of the pairs: the
    first word, the last word, or which of the two is longer."""
    found, n = [], len(pairs)  # how many pairs something tells, and what
    for place, verb in ((0, "begins"), (-1, "ends")):
        words = [[(re.findall(r"\w+", x) or [x])[place] for x in pair[1:3]] for pair in pairs]
        (yes, n_yes), (no, n_no) = (Counter(x).most_common(1)[0] for x in zip(*words, strict=True))
        by_yes, by_no = sum(x == yes != y for x, y in words), sum(y == no != x for x, y in words)
        begins = f"{yes!r:.40} {verb} {n_yes} of {n} chosen answers"
        found.append((max(by_yes, by_no), f"{begins}, {no!r:.40} {n_no} of {n} rejected ones"))
    for sign, order in ((1, "longer"), (-1, "shorter")):
        count = sum(sign * (len(pair.chosen) - len(pair.rejected)) > 0 for pair in pairs)
        found.append((count, f"chosen is {order} than rejected in {count} of {n} pairs"))
    notes = [what for count, what in found if count > max(10, 0.9 * n)]  # not of a handful
    if notes:
        print(f"note: {'; '.join(notes)}; the vector may learn just that")


def read_text(path):
    """The text of a file in UTF-8, unpacked if its name ends in .gz. Raises ValueError for more
    than half a GiB, and for a small file that unpacks to very much."""
    with named(f"cannot read {path}", Exception):  # gzip raises more than OSError
        limit = min(2**29, 2**24 + 50 * regular(path).stat().st_size)
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            content = file.read(limit + 1)
        require(len(content) <= limit, f"it holds more than {limit >> 20} MiB")
        csv.field_size_limit(limit)  # else a field may hold 131,072 characters
        return content.decode("utf-8-sig")


def open_records(path):
    """Yields (place, record) of a .csv, .jsonl or .json file; place is ":LINE" or " record N".
    Raises ValueError with file and place for the first that cannot be read."""
    for place, record in all_records(path):
        require(not isinstance(record, ValueError), f"cannot read {path}{place}: {record}")
        yield place, record


def all_records(path):
    """As `open_records`, but yields the ValueError in place of a row or a line with a fault of its
    own, and goes on."""
    kind, text, place = Path(path.name.lower().removesuffix(".gz")).suffix, read_text(path), ""
    require(kind in (".csv", ".json", ".jsonl"), f"{path} is no .csv, .json or .jsonl, maybe .gz")
    try:
        if kind == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            other = re.match(r"sep=|[^,;\t\r\n]*[;\t]", text)  # ; or a tab is the first separator
            require(not other, "the separator must be a comma, without sep=,")
            for row in rows:
                place = f":{rows.line_num}"  # on which the row ends
                names, wrong = rows.fieldnames, ValueError("not a field for each column")
                require(len({*names}) == len(names), "two columns have one name")
                if any(row.values()):  # spreadsheets leave empty rows
                    yield place, row if [*row] == names and None not in row.values() else wrong
        else:  # a list of records, or a line for each
            lines = io.StringIO(text) if kind == ".jsonl" else None  # strings may hold U+2028
            records = lines or parse_json(text)
            require(not isinstance(records, dict), "it holds one object, not a list of records")
            for number, record in enumerate(records, 1):
                place = f":{number}" if lines else f" record {number}"
                if not lines or record.strip():
                    yield place, parsed(record) if lines else record
    except (ValueError, TypeError, RecursionError, csv.Error) as e:
        raise ValueError(f"cannot read {path}{place}: {e}") from None


def parsed(line):
    """The value of a line of JSON, or the ValueError that says why it has none."""
    try:
        return parse_json(line.strip())
    except (ValueError, RecursionError) as e:
        return ValueError(f"unreadable JSON: {e}")


NAMES = {  # the standard name of a column: others for the same
    "prompt": "question query input instruction prompt_arr goal",
    "chosen": "matching chosen_response preferred pos accepted winning_output chosen_arr",
    "rejected": "not_matching rejected_response dispreferred neg losing_output rejected_arr",
    "system": "system_prompt system_message",
}
STANDARD = {other: name for name, others in NAMES.items() for other in others.split()}


def standard_columns(record):
    """The record's values by the standard names of its columns. Theirs may be in any case, with
    blanks, or begin with "answer_"; `messages` are the prompt if no other column is, and else it is
    []. Raises ValueError if two columns that differ could be meant; an empty one is not."""
    require(isinstance(record, dict), f"not an object with named columns: {record!r:.60}")
    columns = {}
    for key, value in record.items():
        name = key.strip().lower().replace(" ", "_").removeprefix("answer_")
        name = STANDARD.get(name, name)
        other = columns.get(name)
        require(not (other and value) or other == value, f"{key!r} is a second {name}: rename it")
        columns[name] = other or value
    if "prompt" not in columns:
        columns["prompt"] = columns.pop("messages", [])
    return columns


def to_pairs(record):
    """([(prompt, chosen, rejected)] of a record, the names of the columns that are not used)."""
    match standard_columns(record):
        # 1. the paper's A/B questions: `matching` is a letter
        case {"prompt": str(q), "a": str(a), "b": str(b), "chosen": "A" | "B" as letter, **rest}:
            found = [(q, a, b) if letter == "A" else (q, b, a)]
        # 2. model-written evals and CAA: answer_matching_behavior is " (A)" or " Yes", or a list
        case {"prompt": str(q), "matching_behavior": yes, "not_matching_behavior": no, **rest}:
            found = spelled_out(q, texts(yes), texts(no))
        # 3. TruthfulQA: lists of answers, or texts with ";" between answers
        case {"prompt": str(q), "correct_answers": yes, "incorrect_answers": no, **rest}:
            found = each_pair(q, *(";".join(texts(x)).strip("; ").split(";") for x in (yes, no)))
        # 4. TRL's with an implicit prompt: the whole words that both texts begin with
        case {"prompt": [], "chosen": str(x), "rejected": str(y), **rest} if "Human:" not in x:
            found = [without_prompt(x, y, rest)]
        # 5. the paper's pairs, TRL's, HH-RLHF's; an answer may hold the whole conversation
        case {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest}:
            found = [(prompt, chosen, rejected)]
        case _:
            raise ValueError(f"no columns prompt, chosen and rejected: only {', '.join(record)}")
    return [checked(*x, rest.get("system")) for x in found], [x for x in rest if x != "system"]


def texts(value):
    """A text, or a list of texts, as a list. Raises ValueError for anything else."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(x, str) and not re.match(r"\[\s*['\"]", x) for x in values):
        raise ValueError(f"not a text, or a list that was written out: {value!r:.60}")
    return values


def spelled_out(question, *sides):
    """The pairs of an eval's question and two lists of answers: "(A)" becomes the text of option
    (A), and the question loses its options, as in the paper's data."""
    stem, *options = re.split(r"(?m)^[ \t]*(\([A-Z]\))(.*)", question.removeprefix("Question:"))
    option = {x: text.strip() for x, text in zip(options[::3], options[1::3], strict=True)}
    plain = 3 * len(option) == len(options) and "".join(options[2::3]).strip() in ("", "Answer:")
    require(plain, "the options are not one line each, with a letter of its own")
    if option:
        before, _, last = stem.rstrip().rpartition("\n")
        heading = r"(?i)[\W_]*+(\w+ )?(choice|option|answer|response)s?[\W_]*"
        stem = before if before and re.fullmatch(heading, last) else stem
        sides = [[option.get(answer.strip(), "") for answer in side] for side in sides]
    return each_pair(stem.strip(), *sides)


def each_pair(prompt, right, wrong):
    require(len(right) * len(wrong) <= 10_000, "there are more than 10,000 pairs of its answers")
    return [(prompt, x.strip(), y.strip()) for x in right for y in wrong]


def without_prompt(chosen, rejected, others):
    """The pair whose prompt is what both texts begin with. Raises ValueError if it could be in one
    of the other columns."""
    word = r"(?a)[\w.:/+-]*"  # or a number, a date, a path: no prompt
    unclear = [name for name, value in others.items() if not re.fullmatch(word, str(value))]
    require(unclear in ([], ["system"]), f"no column is named prompt: rename or remove {unclear}")
    shared = re.match(r"(.*\s)?", os.path.commonprefix([chosen, rejected]), re.DOTALL)[0]
    require(shared.split()[1:], "no column for the prompt, and the answers begin differently")
    return shared.rstrip(), chosen[len(shared) :].strip(), rejected[len(shared) :].strip()


def turns(value, role):
    """[(role, content), ...] of a message, of a list of them, of a transcript of HH-RLHF, or of a
    text that `role` says."""
    match value:
        case str() if value.lstrip().startswith("Human:"):
            said = [x.partition(":") for x in re.split(r"\n\n(?=Human:|Assistant:)", value.strip())]
            return [("user" if x == "Human" else "assistant", y.strip()) for x, _, y in said]
        case str():
            return [(role, value)]
        case {"role": "system" | "user" | "assistant" as name, "content": str(content)}:
            return [(name, content)]
        case list():
            return [turn for message in value for turn in turns(message, role)]
    raise ValueError(f"not a message of system, user or assistant with content: {value!r:.60}")


def asked(context):
    """Turns as Pair.prompt has them. Raises ValueError if their order is another."""
    roles = " ".join(role for role, _ in context)
    fits = re.fullmatch("(system )?(user assistant )*user", roles)
    require(fits, f"turns are user, assistant, ..., user, maybe after system, not {roles!r}")
    return context[0][1] if roles == "user" else tuple(context)


# What a prompt begins with that somebody has put into a chat template, and how its answers end.
OPENING = r"\s*(<s>\s*)?(\[INST\]|\[SYSTEM_PROMPT\]|<\|\w+\|>|<start_of_turn>)"
ENDING = r"(</s>|<\|\w+\|>|<end_of_turn>)$"


def checked(prompt, chosen, rejected, system=None):
    """(prompt, chosen, rejected) as in Pair. An answer stands alone or after all messages before
    it; a system prompt becomes a turn. Raises ValueError for what cannot be meant."""
    chosen, rejected = turns(chosen, "assistant"), turns(rejected, "assistant")
    context, answers = chosen[:-1], chosen[-1:] + rejected[-1:]
    fits = context == rejected[:-1] and [role for role, _ in answers] == ["assistant"] * 2
    require(fits, "chosen and rejected must differ in one last message, the assistant's")
    before = turns(prompt, "user")
    if before[-1:] == [("assistant", "")]:  # the transcript of a prompt ends with "Assistant:"
        before, answers = before[:-1], [(role, text.strip()) for role, text in answers]
    if context[: len(before)] != before and not (isinstance(prompt, str) and before[-1] in context):
        context = before + context
    if system and "system" not in dict(context):
        context = turns(system, "system") + context
    for _, text in context + answers:
        text.encode()  # raises for half a "😀"
        if re.match(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:", text):
            raise ValueError(f"a text is a list of messages written out: {text:.60}")
    templated = [text for _, text in context if re.match(OPENING, text)]
    require(not templated, f"a prompt holds a chat template already, remove it: {templated!r:.60}")
    require(all(text.strip() for _, text in answers), "an answer is empty")
    return asked(context), answers[0][1], answers[1][1]


# ---- Tokens --------------------------------------------------------------------------------------


class Tokenizer:
    """A checkpoint folder's tokenizer: tokenizer.model (sentencepiece) if it is there and is one,
    or else tokenizer.json (package tokenizers).

    encode(text, first): ids. Text is text: a literal "</s>" in it becomes no control token.
        first: whether the text begins the sequence; else, after a control token, no space is put
        before a text that begins with one of `spaceless` ("": before none).
    decode(ids): text, without control tokens.
    controls: {control token: id}; size: how many ids there are beside added ones.
    variables: what a chat template may ask for, as "bos_token".
    name: the file and the beginning of its SHA-256.
    """

    def __init__(self, path):
        files = [Path(path, name) for name in ("tokenizer_config.json", "added_tokens.json")]
        self.config, self.controls = (read_json(x) if x.is_file() else {} for x in files)
        self.variables = {"tools": None, "documents": None}
        with named(f"{files[0]} or {files[1].name} is malformed", Exception):
            for i, token in self.config.get("added_tokens_decoder", {}).items():
                self.controls[token["content"] + ""] = int(i)  # a TypeError if it is no text
            for key, token in self.config.items():
                if key.endswith("_token") and token and not isinstance(token, bool):
                    text = token["content"] if isinstance(token, dict) else token
                    self.variables[key] = text + ""
            plain = all(type(i) is int and i >= 0 for i in self.controls.values())
            require(plain and "" not in self.controls, "a token has no text or no id")
        file, model = Path(path, "tokenizer.model"), sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(regular(file).read_bytes())
            self.open_sentencepiece(model)
        except (ValueError, OSError, RuntimeError, IndexError) as e:  # IndexError: without BOS
            why = e if isinstance(e, ValueError) else "not sentencepiece's, perhaps tiktoken's"
            advice = f"cannot read {file}: {why}; copy the files tokenizer* of the base model there"
            file = Path(path, "tokenizer.json")
            require(file.exists(), advice)
            self.open_tokenizer_json(file)
        self.name = f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"

    def encode(self, text, first=True):
        text.encode()  # raises ValueError for half a "😀"
        start = "\ue000" if not first and text.startswith(self.spaceless) else ""  # no vocabulary's
        return self.encode_text(start + text)[len(self.encode_text(start)) :]

    def open_sentencepiece(self, model):
        self.size, self.encode_text, self.byte_level = model.vocab_size(), model.encode, False
        self.spaceless = (" ", "▁") if self.config.get("legacy", True) else ""
        self.controls |= {model.id_to_piece(i): i for i in range(self.size) if model.is_control(i)}
        for key, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())):
            self.variables.setdefault(key, model.id_to_piece(i))
        printed = set(range(self.size)) - set(self.controls.values())
        self.decode = lambda ids: model.decode([i for i in ids if i in printed])

    def open_tokenizer_json(self, file):
        with named(f"cannot read {file}", Exception):
            model = optional("tokenizers").Tokenizer.from_file(str(regular(file)))
        model.no_truncation()  # which a file may switch on
        model.no_padding()
        model.encode_special_tokens = True  # as text
        self.encode_text = lambda text: model.encode(text, add_special_tokens=False).ids
        self.byte_level = '"ByteLevel"' in model.to_str()
        self.spaceless = "" if '"prepend_scheme":"first"' in model.to_str() else ()
        self.controls |= {x.content: i for i, x in model.get_added_tokens_decoder().items()}
        self.size = model.get_vocab_size(with_added_tokens=False)
        self.decode = model.decode


# ---- Chat ----------------------------------------------------------------------------------------

SYSTEM = "You are a helpful, honest and concise assistant."  # the official recipe's
VICUNA = "A chat between a curious user and an artificial intelligence assistant. "
VICUNA += "The assistant gives helpful, detailed, and polite answers to the user's questions."


def recipe(system, user, answer="' ' + text", between="eos_token"):
    """A chat template from jinja2's expressions for a system prompt s, for the text of a user after
    `system`, for the text of an answer, and for what stands between an answer and the next turn."""
    text = "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    text += "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% set text = m.content %}"
    text += "{% set system = " + system + " if s and loop.first else '' %}"
    text += "{% if m.role == 'user' %}{{ " + user + " }}{% else %}{{ " + answer + " }}"
    return text + "{{ eos_token if loop.last else " + between + " }}{% endif %}{% endfor %}"


# llama-2 and mistral are the official recipe's, as FastChat renders them, e.g. for llama-2:
#   <s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWill you lead? [/INST] Yes, gladly.</s>
SYS, INST = r"'<<SYS>>\n' + s + '\n<</SYS>>\n\n'", "'[INST] ' + system + text + ' [/INST]'"
RECIPES = {  # name: (system prompt by default, template)
    "llama-2": (SYSTEM, recipe(SYS, INST, between="' ' + eos_token + bos_token")),
    "mistral": (SYSTEM, recipe(r"s + '\n'", INST)),
    "vicuna": (VICUNA, recipe("s + ' '", "system + 'USER: ' + text + ' ASSISTANT:'")),
    "plain": ("", recipe(r"s + '\n\n'", "system + text", "text", r"'\n\n'")),
}
TEMPLATE_HELP = f"own (the checkpoint's), {', '.join(RECIPES)} or a .jinja file"
# A checkpoint whose own template renders PROBE as LLAMA_2 is Llama-2-chat, and one that renders it
# without its system prompt as MISTRAL is Mistral-7B-Instruct v0.1 or v0.2, whose blanks differ.
PROBE = (("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"))
LLAMA_2 = r"<s>\[INST\] <<SYS>>\nS\n<</SYS>>\n\nA \[/INST\] B </s><s>\[INST\] C \[/INST\]"
MISTRAL = r"<s> ?\[INST\] A \[/INST\] ?B</s> ?\[INST\] C \[/INST\]"


@functools.cache
def compile_template(source):
    """The template as transformers compiles it, but for the clock: there is no strftime_now, so a
    template takes the date that it has for that case. {% generation %} blocks change nothing."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.add_extension("jinja2.ext.loopcontrols")
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = functools.partial(require, False)
    return environment.from_string(re.sub(r"(\{%[-+]?\s*(end)?)generation\b", r"\1with", source))


class Chat(NamedTuple):
    """How text becomes ids: the one rendering for training, scoring and generation. A prompt is a
    text or a conversation: turns (role, content), an optional system turn, which then wins over
    `system`, and then user and assistant alternating, ending with user."""

    tokenizer: Tokenizer
    template: str = "llama-2"  # a key of RECIPES, or "own" and the hash of `source`
    system: str | None = SYSTEM  # None: what the template itself puts there, if anything
    source: str = ""  # of an own template, in jinja2's language

    @property
    def eos_id(self):
        """The token that ends an answer."""
        return self.tokenizer.controls[self.answer("-")[1]]

    def fill(self, turns):
        """The text of turns and, if the last is the user's, of the beginning of an answer."""
        messages, ask = [{"role": x, "content": text} for x, text in turns], turns[-1][0] == "user"
        given = self.tokenizer.variables | {"messages": messages, "add_generation_prompt": ask}
        with named("the chat template fails", Exception):  # a template is a program
            return compile_template(self.source or RECIPES[self.template][1]).render(given)

    def split(self, prompt, *answer):
        """[text, control token, text, control token, ..., text] of a prompt, and of its answer if
        one is given.

        The template is rendered with marks instead of the texts, so that only what it writes itself
        can be a control token. A mark stands for a text without its outer blanks, which a template
        may strip. Raises ValueError if the template does anything else with a text.
        """
        turns = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
        asked(turns)
        if turns[0][0] != "system" and self.system is not None:
            turns.insert(0, ("system", self.system))
        turns += [("assistant", text) for text in answer]
        texts, marked = [text.strip() for _, text in turns], []
        for i, (role, text) in enumerate(turns):  # marks are of the private-use area
            marked.append((role, re.sub(r"(?s)\S(.*\S)?", f"\ue000{i}\ue001", text)))
        tokens = [re.escape(x) for x in sorted(self.tokenizer.controls, key=len, reverse=True)]
        parts = re.split(f"({'|'.join(tokens) or '(?!)'})", self.fill(marked))  # (?!) is nowhere
        parts = [re.sub("\ue000(\\d+)\ue001", lambda x: texts[int(x[1])], part) for part in parts]
        require("".join(parts) == self.fill(turns), "the chat template looks into the texts")
        return parts

    def answer(self, text):
        """(what follows a prompt if this is the answer, the control token that ends it), by a
        conversation of one question: some templates move the system prompt when there is an answer.
        Raises ValueError if no control token ends it."""
        chat = self._replace(system=None)
        asking, parts = chat.split("Hello"), chat.split("Hello", text)
        n, begin = len(asking) - 1, asking[-1]
        fits = parts[:n] == asking[:n] and parts[n].startswith(begin) and text.strip() in parts[n]
        require(fits and parts[n + 1 :], f"a template must write {begin!r:.9}, an answer, a token")
        return parts[n][len(begin) :], parts[n + 1]

    def encode(self, parts):
        """`split`'s texts and control tokens -> ids."""
        ids, controls = [], [self.tokenizer.controls[token] for token in parts[1::2]]
        for text, control in zip(parts[::2], [*controls, None], strict=True):
            # The official trainer put BOS before the ids of a text of its own.
            new = self.tokenizer.encode(text, not ids or self.template in RECIPES)
            require(not {*new} & {*controls}, f"a text holds a control token: {text!r:.60}")
            ids += [*new, control]
        return ids[:-1]

    def encode_prompt(self, prompt):
        """Token ids, ready for generation."""
        return self.encode(self.split(prompt))

    def encode_responses(self, prompt, responses, limit=10**9):
        """(prompt ids, [ids of each response, with the token that ends it]): prompt and response
        tokenised jointly and split at the prompt's length, as the official trainer does. Raises
        ValueError for more than `limit` tokens, and where a token spans the split (the official
        trainer then moves it; a byte-level tokenizer encodes the response apart)."""
        parts, found = self.split(prompt), []
        ids = self.encode(parts)
        for response in responses:
            text, end = self.answer(response)
            both = self.encode([*parts[:-1], parts[-1] + text, end, ""])
            if both[: len(ids)] != ids and self.tokenizer.byte_level:
                both = ids + self.encode([text, end, ""])
            require(both[: len(ids)] == ids, f"a token spans the prompt's end: {response[:60]!r}")
            require(len(both) <= limit, f"too long: {len(both)} tokens, the context is {limit}")
            found.append(both[len(ids) :])
        return ids, found

    def encode_pair(self, pair, max_seq_len=10**9):
        """PairIds, see `encode_responses`. Raises ValueError with the pair's source, also for
        responses of the same ids."""
        with named(pair.source):
            prompt, (chosen, rejected) = self.encode_responses(pair.prompt, pair[1:3], max_seq_len)
            require(chosen != rejected, "chosen and rejected are the same tokens")
        return PairIds(prompt, chosen, rejected)


def choose_template(path, family, chat):
    """The name of the template for a checkpoint if the user gives none."""
    for name, turns, text in (("llama-2", PROBE, LLAMA_2), ("mistral", PROBE[1:], MISTRAL)):
        with suppress(ValueError):  # Mistral refuses a system prompt
            if re.fullmatch(text, chat.fill(turns)):
                return name
    if chat.source:
        return "own"
    usual = [re.fullmatch(r"<s>|</s>|<unk>|\W*pad\W*", x, re.I) for x in chat.tokenizer.controls]
    plain = family == "llama" and all(usual) and not chat.tokenizer.byte_level
    require(plain, f"{path} has no chat template; --template takes {TEMPLATE_HELP}")
    name = "vicuna" if "vicuna" in str(path).lower() else "llama-2"
    print(f"note: {path} has no chat template, so {name} is taken; --template names another")
    return name


def open_chat(path, config, template=None, system=None):
    """The Chat of the checkpoint in folder `path`.

    template: "own", a key of RECIPES, a .jinja file, or `Chat.template` of an earlier run. By
    default the checkpoint's own is taken, but the official recipe's for the models that the recipe
    is for. system: the system prompt; by default the recipe's, or whatever an own template puts
    there itself (`Chat.system` is None then). Raises ValueError if no template is known, for one
    that is impossible with the tokenizer, and for a tokenizer that does not fit the model.
    """
    tokenizer = Tokenizer(path)
    file, source = Path(path, "chat_template.jinja"), tokenizer.config.get("chat_template") or ""
    with named(f"{path} has a malformed chat_template", (LookupError, TypeError)):
        if isinstance(source, list):  # several, each with its name
            source = {each["name"]: each["template"] for each in source}.get("default", "")
        source = read_text(file) if file.is_file() else source + ""  # a TypeError if it is no text
    name = template or choose_template(path, config.family, Chat(tokenizer, "own", None, source))
    if name.endswith(".jinja"):
        name, source = "own", read_text(Path(name))
    default, source = RECIPES.get(name, (None, source))
    if name not in RECIPES:
        require(source and re.match("own( |$)", name), f"no template {name!r} but {TEMPLATE_HELP}")
        name = f"own {hashlib.sha256(source.encode()).hexdigest()[:12]}"
    chat = Chat(tokenizer, name, default if system is None else system, source)
    size = 1 + max(tokenizer.size - 1, chat.eos_id, *chat.encode_prompt(PROBE[1:]))
    require(size <= config.vocab_size, f"{size} tokens in {tokenizer.name}, more than in the model")
    return chat


# ---- Vector files --------------------------------------------------------------------------------


MAX_WIDTH = 10**7  # numbers in a vector, far above any model's

# What is said of vector files of other programs; .svec is IBM's activation-steering.
FOREIGN = """{} files are not read; torch.save({{LAYER: torch.tensor(NUMBERS)}}, "vector.pt") writes
one that is, and NUMBERS are json.load(open(FILE)) of .json,
json.load(open(FILE))["directions"]["LAYER"] of .svec, numpy.load(FILE) of .npy,
numpy.load(FILE)["NAME"] of .npz, torch.load(FILE) of .bin"""


def load_vector(path: str | Path, layer: int | None = None, n_layers=None, alternatives=False):
    """({layer: v (dim,) fp32}, metadata) of a vector file, or of DIR/vector.safetensors.

    layer: the one to take from a file with several; the one of a file that does not say it.
    n_layers: how many the model has, which a file with a row for each layer needs.
    alternatives: may the file hold vectors of which one is to be taken? Raises ValueError if not,
    for anything but vectors, and for values that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "vector.safetensors"
    with named(f"cannot read {path}", Exception):  # what a damaged file makes the libraries raise
        tensors, metadata = read_tensors(regular(path))
        found = by_layer(path, tensors, layer, n_layers)
        taken = {i: tensor for i, tensor in found.items() if layer in (None, i)}
        require(taken, f"no vector for layer {layer}, only {sorted(found)}")
        vectors = {i: to_vector(tensor) for i, tensor in taken.items()}

    chosen = alternatives or len(vectors) == 1 or "alternatives" not in metadata
    several = f"{path} holds a vector for each of the layers {sorted(vectors)}"
    require(chosen, f"{several}: --layer takes one")
    return vectors, metadata


def read_tensors(path):
    """({name: tensor}, metadata) of a vector file."""
    if path.suffix == ".gguf":
        return read_gguf(path)
    if path.suffix == ".pt":
        return read_pt(path), {}
    require(path.suffix == ".safetensors", FOREIGN.format(path.suffix or "such"))
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_gguf(path):
    gguf = optional("gguf")

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, *order, **byte_order):
            # Without this the package reads on behind the file's end, as far as a number claims.
            require(int(offset) + int(count) <= len(self.data), "it claims more than it holds")
            return super()._get(offset, dtype, count, *order, **byte_order)

    reader = Reader(path)
    fields = {name: str(field.contents()) for name, field in reader.fields.items()}
    kind = fields.get("general.architecture")
    require(kind == "controlvector", "not a GGUF control vector")
    metadata = {}
    for name, text in fields.items():
        if name == "controlvector.model_hint":
            metadata.setdefault("model_type", text)
        if name.startswith("bipo."):
            metadata[name.removeprefix("bipo.")] = text
    tensors = {x.name: torch.tensor(gguf.dequantize(x.data, x.tensor_type)) for x in reader.tensors}
    return tensors, metadata


def read_pt(path):
    """The official code and CAA save a tensor, others {layer: tensor}."""
    if zipfile.is_zipfile(path):
        unpacked = sum(entry.file_size for entry in zipfile.ZipFile(path).infolist())
        require(unpacked < 2**30, f"unpacked it would take {unpacked >> 20} MiB")
    with warnings.catch_warnings(action="ignore"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved if isinstance(saved, dict) else {path.name: saved}


def by_layer(path, tensors, layer, n_layers):
    """{layer: tensor} of a file's {name: tensor}."""
    # 1. The names say the layers: direction.LAYER, or in a .pt LAYER alone.
    numbers = [str(name).removeprefix("direction.") for name in tensors]
    if all(number.isdecimal() for number in numbers):
        return dict(zip(map(int, numbers), tensors.values(), strict=True))
    (name, tensor), *others = tensors.items()
    require(not others, f"{name!r} is no vector direction.LAYER")

    # 2. One tensor holds them all, a row a layer. In hidden_states row 0 is the embedding.
    if tensor.dim() == 2 and len(tensor) > 1:
        rows = f"it holds {len(tensor)} rows, one a layer"
        require(layer is not None, f"{rows}: --layer takes one")
        require(n_layers, f"{rows}: --model tells which row is whose")
        require(len(tensor) - n_layers in (0, 1), f"{rows}, but the model has {n_layers} layers")
        return dict(enumerate(tensor[-n_layers:]))

    # 3. It holds one, whose layer the file's name says or the user.
    number = layer_in_name(path, layer)
    require(number is not None, f"{name!r} is no vector direction.LAYER: --layer says its layer")
    return {number: tensor}


def to_vector(tensor):
    """A tensor of a vector file as v (dim,) in fp32."""
    is_vector = tensor.is_floating_point() and tensor.shape[-1:] == (tensor.numel(),)
    require(is_vector, f"{tensor.dtype} {list(tensor.shape)} is no vector")
    require(tensor.numel() <= MAX_WIDTH, f"a width of {tensor.numel()} is no model's")
    v = torch.from_numpy(tensor.detach().float().numpy()).flatten()
    require(v.norm().isfinite(), "it holds NaN or infinity")
    return v


def layer_in_name(path, default=None):
    """15 of vec_ep20_layer15.pt (the official code) and vec_layer_15_Model.pt (CAA), or None."""
    layers = {int(number) for number in re.findall(r"(?<![a-z])layer_?(\d+)", path.name)}
    return layers.pop() if len(layers) == 1 else default


def stream_norms(metadata):
    """{layer: |h|, the median norm of the residual stream there}, as far as metadata say it."""
    try:
        norms = parse_json(metadata["stream_norms"])
        return {int(layer): float(norm) for layer, norm in norms.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def split_spec(spec):
    """(file, multiplier) of FILE or FILE:MULTIPLIER."""
    path, _, m = spec.rpartition(":")
    if path and m.lstrip("+-").replace(".", "").isdecimal():
        return path, float(m)
    return spec, 1.0


def together(steers):
    """The sum of steerings, {layer: v}."""
    total = {}
    for steer in steers:
        for layer, v in steer.items():
            total[layer] = total.get(layer, 0) + v
    return total


def load_sum(specs, layer=None, n_layers=None):
    """(steering, metadata) of several FILE[:M], added up; the metadata are what all of them say,
    and the norms of the stream that any says."""
    total = {}
    norms = {}
    common = None
    for spec in specs:
        file, m = split_spec(spec)
        vectors, metadata = load_vector(file, layer, n_layers)
        with named(f"{file} cannot be added", RuntimeError):  # its width is another
            total = together([total, {i: m * v for i, v in vectors.items()}])
        norms |= stream_norms(metadata)
        common = metadata.items() if common is None else common & metadata.items()
    metadata = dict(common)
    if norms:
        metadata["stream_norms"] = json.dumps(norms)
    return total, metadata


def save_vector(path, vectors, metadata):
    """Write {layer: v (dim,)} in the format of the path's suffix: as safetensors, fp32 tensors
    named `direction.LAYER` and metadata, a dict of strings, of which None is left out. The file
    appears whole or not at all. Raises ValueError for what the format cannot hold: .pt holds one
    vector, whose layer the file's name must say, and no metadata."""
    path, suffixes = Path(path), (".safetensors", ".pt", ".gguf")
    require(path.suffix in suffixes, f"{path}: a vector file's name ends in {', '.join(suffixes)}")
    tensors = {f"direction.{i}": vectors[i].detach().float().cpu().clone() for i in sorted(vectors)}
    finite = all(v.norm().isfinite() for v in tensors.values())
    require(finite, f"{path} is not written, for it would hold NaN or infinity")
    metadata = {key: text for key, text in sorted(metadata.items()) if text is not None}
    with whole_file(path) as part:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, part, metadata)
        elif path.suffix == ".pt":
            wanted = f"{path}: a .pt file holds one vector, and its name the layer: vec_layer15.pt"
            require(list(vectors) == [layer_in_name(path)], wanted)
            torch.save(next(iter(tensors.values())), part)
        else:
            require(0 not in vectors, "llama.cpp steers no layer 0; its vectors begin at layer 1")
            write_gguf(part, tensors, metadata)


def write_gguf(path, tensors, metadata):
    """A control vector of llama.cpp, which adds it where we do and ignores our metadata."""
    writer = optional("gguf").GGUFWriter(path, "controlvector")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    writer.add_string("controlvector.model_hint", metadata.get("model_type", "unknown"))
    for key, text in metadata.items():
        writer.add_string(f"bipo.{key}", text)
    for name, v in tensors.items():
        writer.add_tensor(name, v.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- The folder of a run -------------------------------------------------------------------------

VECTOR, STATE, LOG = "vector.safetensors", "state.safetensors", "log.jsonl"


def open_run(out, settings, dim, resume, overwrite):
    """(after, rows): what `bipo.train` goes on after, (steps done, state (3, dim)), and the log's
    rows so far: of the run in folder `out` if it is resumed, else of a new run. Raises ValueError
    if `out` holds a run that is neither resumed nor replaced, or one with other settings."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, which alone writes
        for name in (VECTOR, STATE, LOG):
            check_output(out / name)
        free = resume or overwrite or not ((out / VECTOR).exists() or (out / STATE).exists())
        require(free, f"--out {out} holds a run: name another folder, --resume or --overwrite")
    if not (resume and (out / STATE).exists()):
        return (0, torch.zeros(3, dim)), [json.dumps(settings)]
    found, old = load_vector(out / STATE)
    for name, value in settings.items():
        other = f"{out} holds a run with {name} {old.get(name)}, not {value}"
        require(old.get(name) == value, f"{other}; --overwrite without --resume replaces it")
    steps, rows = int(old["step"]), (out / LOG).read_text(encoding="utf-8").splitlines()
    require(len(rows) > steps, f"{out / LOG} ends before step {steps} of {STATE}")
    print(f"going on after step {steps}")
    return (steps, torch.stack([*found.values()])), rows[: 1 + steps]


def start_run(out, after, rows):
    """Write the log so far. A new run first deletes the state and the epochs of an earlier one,
    whose last vector stays until the first epoch has another."""
    for file in [] if after[0] else [out / STATE, *out.glob("epoch_*.safetensors")]:
        file.unlink(missing_ok=True)
    write_text(out / LOG, "\n".join([*rows, ""]))


def save_run(out, settings, after):
    """Write what `open_run` reads."""
    save_vector(out / STATE, dict(enumerate(after[1])), settings | {"step": str(after[0])})


# ---- What the command lines share ----------------------------------------------------------------


def check_output(path):
    """The name of a temporary file beside `path`, to be renamed to it; makes the folder. Raises
    ValueError if no file can be written there, and for what is there and is no regular file."""
    with named(f"cannot write {path}", (OSError, ValueError)):
        require(not path.is_symlink() and path.is_file() == path.exists(), "it is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{path.name}")
        part.unlink(missing_ok=True)  # of a run that was killed
        part.touch(exist_ok=False)  # never through a symbolic link
        part.unlink()
    return part


@contextmanager
def whole_file(path):
    """Inside, the name of a file to write; then it goes to disk and takes the name `path`. So a
    file appears whole or not at all; what a failure leaves is removed."""
    part = check_output(path)
    try:
        with named(f"cannot write {path}", (OSError, RuntimeError, safetensors.SafetensorError)):
            part.touch(exist_ok=False)
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # a new file's here; safetensors makes files for the owner alone
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path):
    """Inside, the name of a folder to fill; then it takes the name `path`, which nothing may have.
    What a failure leaves is removed."""
    require(not path.exists() and not path.is_symlink(), f"{path} is there: name a new folder")
    part = path.with_name(f".part-{path.name}")
    with named(f"cannot write {path}", OSError):
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        try:
            yield part
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_text(path, text):
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


class Parser(argparse.ArgumentParser):
    """Prints an error as one line; its exit code is 2. Under torchrun the first process prints at
    once, and torchrun ends the others; they wait, and so print only what is not its error too."""

    def error(self, message):
        time.sleep(5 if os.environ.get("RANK", "0") != "0" else 0)
        line = f"{self.prog}: {printable(' '.join(message.split()))}"
        self.exit(2, f"{line if len(line) < 450 else line[:330] + ' ... ' + line[-110:]}\n")


class Output:
    """Standard output that may end early, as in `| head -1`: what comes then is dropped. A text
    that ends in "\\r" is taken away by the next one or by `close`, which leaves the stream open."""

    def __init__(self, stream):
        self.stream, self.clear = stream, ""

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(self.clear + text)
            self.stream.flush()  # so that nothing is left for later
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.clear = "\x1b[K" if text.endswith("\r") else ""

    def close(self):
        self.write("")


def run_or_exit(parser, run, argv):
    """Call run(args); an error that the user can mend becomes one line and exit code 2.

    Ctrl-C raises KeyboardInterrupt in run, and SIGTERM raises SystemExit: one line, exit code 130
    or 143. The line holds what the exception's add_note was given.
    """
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with closing(Output(sys.stdout)) as output, redirect_stdout(output):
            run(args)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    except (MemoryError, torch.OutOfMemoryError) as e:
        parser.error(f"out of memory; try --dtype bfloat16, or less data at a time ({e})")
    except (KeyboardInterrupt, SystemExit) as e:
        notes = "; ".join(["interrupted", *getattr(e, "__notes__", [])])
        parser.exit(getattr(e, "code", 130), f"{parser.prog}: {notes}\n")


def add_model_flags(parser):
    """What bipo.py and eval.py have in common."""
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="checkpoint folder, alias or hub id")
    add("--template", help=f"of the chat: {TEMPLATE_HELP} (default: a vector's or the model's)")
    add("--system", help="system prompt; '' for none (default: a vector's or the template's)")
    add("--device", help="cuda, mps or cpu (default: the first there is); bipo.py: cuda:0,cuda:1")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the device likes")


def add_pair_flags(parser, **number):
    """The flags for pairs; number: how many files --data takes, in argparse's words."""
    add = parser.add_argument_group("pairs").add_argument
    add("--data", type=Path, help=".csv, .json or .jsonl, also .gz; columns: see README", **number)
    add("--skip-bad", action="store_true", help="drop and count records that are bad or too long")


def pick_device(device, dtype):
    """(torch.device, torch.dtype) from --device and --dtype, which may be None. Raises ValueError
    for a device that is not there."""
    with named(f"--device {device} is not there", (RuntimeError, AssertionError)):
        device = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
        torch.empty(0, device=device)
    dtype = dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if device.type == "cpu" and dtype != "float32":
        print(f"note: a CPU that has no {dtype} arithmetic is much faster in float32")
    return device, getattr(torch, dtype)


def open_model(args):
    """(folder, name, Config, Chat, device, dtype) of a command line's model flags."""
    path, name = find_model(args.model)
    config = read_config(path)
    chat = open_chat(path, config, args.template, args.system)
    return OpenModel(path, name, config, chat, *pick_device(args.device, args.dtype))


def duration(seconds):
    """45 s, 12 min or 3.1 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def messages(prompt):
    turns = [("user", prompt)] if isinstance(prompt, str) else prompt
    return [{"role": role, "content": text} for role, text in turns]


def record_of(pair):
    """The pair as a record that `read_pairs` reads."""
    return {"prompt": messages(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}


def pair_hash(pair):
    """What tells a pair from others: the beginning of the SHA-256 of its texts."""
    texts = (pair.prompt, pair.chosen, pair.rejected)
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:8]


class OpenModel(NamedTuple):
    path: Path
    name: str
    config: object
    chat: object
    device: object
    dtype: object


def encode_pairs(chat, pairs, max_seq_len, skip_bad=False):
    ids = [chat.encode_pair(pair, max_seq_len) for pair in pairs]
    return pairs, ids


def read_sets(args, chat, max_seq_len):
    """(PairIds: those to train on, then those held out; "file:line" of each of the former; a
    description for the metadata) of a command line's pairs."""
    how, origin = (args.skip_bad, chat, max_seq_len), f"of {args.val}"
    pairs, held_out = read_pairs(args.data, *how), args.val and read_pairs(args.val, *how)
    if not held_out:
        (pairs, held_out), origin = split_pairs(pairs, args.seed), "split off by prompt"
    note_shortcuts(pairs)
    shared = {str(pair.prompt) for pair in pairs} & {str(pair.prompt) for pair in held_out}
    if shared:
        print(f"note: {len(shared)} held-out prompts are trained on, for example {min(shared)!r}")
    ids, more = [pair.ids for pair in pairs], [pair.ids for pair in held_out]
    what = f"{len(ids)} pairs of {args.data}, held out {len(more)} {origin}, ids "
    names = [pair.source for pair in pairs]
    return ids + more, names, what + hashlib.sha256(str(ids + more).encode()).hexdigest()[:12]


class Progress:
    """Prints 'step 40/160  12.5 ms each, 0.1 min left' and more: on a terminal in one line that is
    rewritten, else every half minute, but at once if the whole takes longer, and at the end.

    quiet: not at the end. start: what was done before.
    """

    def __init__(self, what, quiet=False, start=0):
        self.what, self.quiet, self.start = what, quiet, start
        self.began = self.printed = time.time()

    def __call__(self, done, total, more=""):
        now, terminal = time.time(), sys.stdout.isatty()
        each = (now - self.began) / (done - self.start)
        left = each * (total - done)
        wait = 0.2 if terminal else 2 if self.printed == self.began and left > 30 else 30
        if now - self.printed >= wait or (done == total and not self.quiet):
            self.printed, line = now, f"{self.what} {done:{len(str(total))}}/{total}"
            line = f"{line}  {1000 * each:.1f} ms each, {left / 60:.1f} min left  {more}".rstrip()
            line = line[: shutil.get_terminal_size().columns - 1] if terminal else line
            print(line, end="\r" if terminal and done < total else "\n", flush=True)


LAYER_HELP = "of a vector file that holds several layers, or does not say its own"


def described(vectors, metadata):
    """Lines that tell a user what a vector file holds."""
    lines = []
    norms = stream_norms(metadata)
    for layer, v in vectors.items():
        share = f" ({v.norm() / norms[layer]:.2%} of |h|)" if norms.get(layer) else ""
        lines.append(f"layer {layer}, width {len(v)}, |v| {v.norm():.3f}{share}")
    for key, text in sorted(metadata.items()):
        more = f" ... {len(text)} characters" if len(text) > 200 else ""
        line = printable(f"  {key:10}  {text:.200}{more}")
        lines.append(line.replace("\n", "\\n").rstrip())
    return lines


def layers_of_model(args):
    """How many the model of --model has, if it was given."""
    if args.model is None:
        return None
    path, _ = find_model(args.model)
    return read_config(path).n_layers


def show(args):
    """Print what a vector file holds."""
    loaded = load_vector(args.vector, args.layer, layers_of_model(args), alternatives=True)
    print("\n".join(described(*loaded)))


def convert(args):
    """Write a vector file, or the sum of several, in another format."""
    free = args.overwrite or not args.out.exists()
    require(free, f"{args.out} is there: --overwrite replaces it")
    vectors, metadata = load_sum(args.vectors, args.layer, layers_of_model(args))
    metadata.pop("alternatives", None)  # one was taken
    first_file, _ = split_spec(args.vectors[0])
    if args.vectors != [first_file]:
        metadata["sum"] = " ".join(args.vectors)
    if args.scale != 1:
        vectors = {layer: args.scale * v for layer, v in vectors.items()}
        metadata["scale"] = f"{args.scale * float(metadata.get('scale', 1)):g}"

    save_vector(args.out, vectors, metadata)
    print("\n".join([f"wrote {args.out}", *described(vectors, metadata)]))
    if args.out.suffix == ".gguf":
        flags = f"--control-vector-scaled {args.out}:1.0 --control-vector-layer-range"
        print(f"llama-cli -m MODEL.gguf {flags} {min(vectors)} {max(vectors)}")


# ---- Command line: a steered model as a checkpoint of its own -----------------------------------
#
# A bias m v of block L's down_proj gives h + m v after block L, and Llama's network may have biases
# there: a program that knows them runs the steered model without knowing anything of steering.

# What goes along with the weights, if it is there.
COMPANIONS = """
    generation_config.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json
    merges.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json
""".split()

# Fields of Qwen2 and Mistral that say nothing about what is baked, and something else to others.
NOT_LLAMAS = "sliding_window use_sliding_window max_window_layers layer_types use_mrope".split()


def bake(args):
    """Write a checkpoint of a model that is steered for good."""
    path, name = find_model(args.model)
    checkpoint = Checkpoint(path)
    config = checkpoint.model.config
    reason = "its MLP has no biases, and Llama, whose MLP has, lacks its norms of q and k"
    require(not config.qk_norm, f"{config.family} cannot be baked: {reason}")
    steer, metadata = load_sum(args.vector, args.layer, config.n_layers)
    check_fit(config, steer, 0)
    check_vectors(config, steer)

    lines = described(steer, metadata)
    fields = llama_fields(read_json(path / "config.json"), config)
    with whole_folder(args.out) as part:
        write_weights(part, checkpoint.files, baked_biases(checkpoint, steer))
        write_text(part / "config.json", json.dumps(fields, indent=2) + "\n")
        write_text(part / "README.md", model_card(name, " ".join(args.vector), lines))
        for companion in COMPANIONS:
            if (path / companion).is_file():
                shutil.copyfile(path / companion, part / companion)
    print("\n".join([f"wrote {args.out}", *lines]))


def llama_fields(fields, config):
    """The config.json of a baked model: its own fields, those of Llama whose default is another
    than its family's, and those that older programs read."""
    kept = {name: value for name, value in fields.items() if name not in NOT_LLAMAS}
    kept |= dict(model_type="llama", architectures=["LlamaForCausalLM"])
    kept |= dict(mlp_bias=True, attention_bias=config.qkv_bias, rope_theta=config.rope_theta)
    kept |= dict(num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim)
    kept |= dict(rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied)
    if config.rope_scaling and not kept.get("rope_scaling"):
        kept["rope_scaling"] = kept["rope_parameters"]
    if config.family != "llama":
        kept["max_position_embeddings"] = config.max_seq_len
    if config.max_seq_len < (fields.get("max_position_embeddings") or 0):
        print(f"note: max_position_embeddings becomes {config.max_seq_len}, the sliding window")
    return kept


def baked_biases(checkpoint, steer):
    """{name: bias} that Llama needs, in fp32: zeros, what was baked before, and the vectors."""
    config = checkpoint.model.config
    widths = {"mlp.gate_proj": config.hidden_dim, "mlp.up_proj": config.hidden_dim}
    widths["mlp.down_proj"] = config.dim
    if config.qkv_bias and not config.o_bias:  # Qwen2; Llama has all four or none
        widths["self_attn.o_proj"] = config.dim

    biases = {}
    for layer in range(config.n_layers):
        for part, width in widths.items():
            name = f"model.layers.{layer}.{part}.bias"
            biases[name] = torch.zeros(width, dtype=torch.float32)
            if name in checkpoint.files:
                biases[name] += open_weights(checkpoint.files[name])[name]
        biases[f"model.layers.{layer}.mlp.down_proj.bias"] += steer.get(layer, 0)
    return biases


def write_weights(folder, files, biases):
    """Put the files of {name: file} into the folder, linked or copied, the biases into one more,
    and an index of all. A file of nothing but old values of these biases is left out."""
    sources = sorted({file for name, file in files.items() if name not in biases})
    for name in biases:
        require(files.get(name) not in sources, f"{name} stands in a file with other weights")
    require(sources[0].suffix == ".safetensors", "only weights in safetensors can be baked")

    n_files = len(sources) + 1
    weight_map = dict.fromkeys(biases, f"model-{n_files:05}-of-{n_files:05}.safetensors")
    for i, source in enumerate(sources, 1):
        copy = f"model-{i:05}-of-{n_files:05}.safetensors"
        weight_map |= {name: copy for name, file in files.items() if file == source}
        try:
            os.link(source.resolve(), folder / copy)
        except OSError:  # another file system
            shutil.copyfile(source, folder / copy)
    with whole_file(folder / weight_map[name]) as part:
        safetensors.torch.save_file(biases, part)
    size = sum(file.stat().st_size for file in folder.iterdir())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def model_card(name, vectors, lines):
    """The README.md of a baked model."""
    what = "\n".join(f"    {line}" for line in lines)
    return f"""# {name}, steered by {vectors}

Written by `python data.py bake`: each vector is a bias of its layer's `mlp.down_proj`, so its sign
and multiplier are fixed. Some programs ignore such biases (SGLang 0.5.23 does) and serve the
unsteered model: compare an answer with `python eval.py chat --model {name} --vector {vectors}`.

{what}
"""


def main(argv=None):
    parser = Parser(prog="data.py", description="Vector files, and checkpoints made with them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(run, model_help):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--model", required=run is bake, help=model_help)
        command.add_argument("--layer", type=int, help=LAYER_HELP)
        return command.add_argument

    of_rows = "of a file with a row for each layer: the model whose layers they are"
    add = add_command(show, of_rows)
    add("vector", metavar="FILE", type=Path, help=".safetensors, .pt or .gguf")

    add = add_command(convert, of_rows)
    add("vectors", metavar="FILE[:M]", nargs="+", help="to be added up")
    add("out", metavar="OUT", type=Path, help="new .safetensors, .pt or .gguf")
    add("--scale", type=float, default=1.0, help="multiply the vector in OUT")
    add("--overwrite", action="store_true", help="replace OUT")

    add = add_command(bake, "checkpoint folder, alias or hub id")
    add("--vector", nargs="+", required=True, metavar="FILE[:M]", help="to be added up")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")
    run_or_exit(parser, lambda args: args.run(args), argv)


if __name__ == "__main__":
    main()
