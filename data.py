"""Pairs in, token ids out, steering vectors in and out, and what the command lines share.

    chat = open_chat("path/to/checkpoint", read_config("path/to/checkpoint"))
    pairs, ids = encode_pairs(chat, read_pairs("pairs.jsonl"), max_seq_len=4096)

    python data.py convert runs/pairs-layer15 vector.gguf

Pair files: the forms in to_pairs, among them the CSV of the official BiPO code,
https://github.com/CaoYuanpu/BiPO. Prompts: the checkpoint's own chat_template or, for the models of
the paper, the official recipe's (RECIPES). Vector files: ours, the official .pt, llama.cpp's GGUF.
Needs llama.py beside it, torch, safetensors, sentencepiece and jinja2; where a file or a name asks
for them also the packages tokenizers, gguf and huggingface_hub. MIT licence.
"""

import argparse
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jinja2
import safetensors.torch
import sentencepiece
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

if __package__:
    from . import llama
    from .llama import Config, PairIds, parse_json, read_config, read_eos_ids, read_json, regular
else:
    import llama
    from llama import Config, PairIds, parse_json, read_config, read_eos_ids, read_json, regular

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
        sentence, _, _ = " ".join(str(e).split()).partition(". ")
        raise ValueError(f"{what}: {sentence or type(e).__name__}") from None


def optional(name):
    """An optional package. Raises ValueError if it is not installed."""
    with named(f"this needs a package, pip install {name}", ImportError):
        return __import__(name)


def printable(text):
    """The text with escape sequences for its control characters; line breaks stay."""
    return "".join(c if (c == "\n" or c.isprintable()) else ascii(c)[1:-1] for c in text)


# ---- Pairs ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    prompt: str | tuple  # what the user says; or turns ((role, content), ...), a user's the last
    chosen: str  # r_T, the response that shows the target behaviour
    rejected: str  # r_O, the opposite
    source: str = ""  # "file:line", for messages


def as_turns(prompt):
    """The turns [(role, text), ...] of a prompt, which may be the text of a user alone."""
    return [("user", prompt)] if isinstance(prompt, str) else list(prompt)


def as_messages(turns):
    """Turns as files and chat templates hold them."""
    return [{"role": role, "content": text} for role, text in turns]


def record_of(pair):
    """The pair as a record that `read_pairs` reads."""
    prompt = as_messages(as_turns(pair.prompt))
    return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def digest(text, n=12):
    """The first n characters of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:n]


def pair_hash(pair):
    """What tells a pair from others, by its texts."""
    return digest(repr((pair.prompt, pair.chosen, pair.rejected)), 8)


def read_pairs(path: str | Path, skip_bad=False) -> list[Pair]:
    """The Pairs of a .csv, .json or .jsonl file whose records `to_pairs` knows.

    Prints what was read, what was dropped (duplicates, identical answers), and which columns were
    not used. A prompt may be empty: some in the official files are. Raises ValueError with file and
    line for records that hold no pair, unless skip_bad: then they are dropped, counted by reason.
    """
    pairs = {}  # {the Pair without its source: the Pair}
    dropped = Counter()  # {why: how many}
    faults = []  # (source, what is wrong there)
    unused = {}  # the names of columns, in their order
    for place, record in open_records(Path(path)):
        source = f"{path}{place}"
        try:
            found, unused_here = to_pairs(record)
        except ValueError as e:
            faults.append((source, str(e)))
            continue

        unused |= dict.fromkeys(unused_here)
        for pair in found:
            if pair.chosen == pair.rejected:
                dropped["identical answers"] += 1
            elif pair in pairs:
                dropped["duplicate"] += 1
            else:
                pairs[pair] = pair._replace(source=source)

    dropped.update(count_faults(faults, skip_bad))
    counts = f"read {len(pairs)} pairs from {path}, dropped {listed(dropped)}"
    report = f"{counts}; columns not used: {list(unused)}"
    require(pairs, f"no pairs: {report}")
    print(printable(report))
    return list(pairs.values())


def count_faults(faults, skip_bad):
    """{reason: how many} of faults, (source, reason: details). Raises ValueError for the first of
    them, unless skip_bad."""
    if faults and not skip_bad:
        source, reason = faults[0]
        raise ValueError(f"{source}: {reason} (bad records: {len(faults)}; --skip-bad drops them)")
    return Counter(reason.partition(":")[0] for _, reason in faults)


def listed(counts):
    return ", ".join(f"{n} {what}" for what, n in counts.items()) or "nothing"


def split_pairs(pairs, seed):
    """(training, held-out) pairs: a tenth of the prompts is held out, each with all its pairs."""
    prompts = sorted({pair.prompt for pair in pairs}, key=str)
    require(len(prompts) > 1, "one prompt cannot be split into training and held out; give --val")
    random.Random(seed).shuffle(prompts)
    held_out_prompts = set(prompts[: (len(prompts) + 9) // 10])
    training = [pair for pair in pairs if pair.prompt not in held_out_prompts]
    held_out = [pair for pair in pairs if pair.prompt in held_out_prompts]
    return training, held_out


def note_shortcuts(pairs):
    """Print a note if something cheap tells chosen from rejected in more than 90% of the pairs: the
    first word, or which of the two is longer."""
    shortcuts = [  # (in how many pairs, what)
        (sum(len(pair.chosen) > len(pair.rejected) for pair in pairs), "chosen is longer"),
        (sum(len(pair.chosen) < len(pair.rejected) for pair in pairs), "chosen is shorter"),
    ]
    chosen = [first_word(pair.chosen) for pair in pairs]
    rejected = [first_word(pair.rejected) for pair in pairs]
    for side, words, others in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        common = statistics.mode(words)
        n_told = sum(a == common and b != common for a, b in zip(words, others, strict=True))
        shortcuts.append((n_told, f"{common!r:.40} begins {side} alone"))

    enough = max(10, 0.9 * len(pairs))  # a handful of pairs says nothing
    notes = [f"{what} in {n} of {len(pairs)} pairs" for n, what in shortcuts if n > enough]
    if notes:
        print(f"note: {'; '.join(notes)}; the vector may learn just that")


def first_word(text):
    word = re.search(r"\w+", text)
    return word[0] if word else text


# ---- Pairs: the records of a file


def open_records(path):
    """Yields (place, record) of a .csv, .json or .jsonl file, maybe with .gz: what follows the
    file's name, ":LINE" or " record N", and {column: value}, or what else stands there. Raises
    ValueError if the file cannot be read."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    require(suffix in READERS, f"{path} is no .csv, .json or .jsonl, maybe with .gz")
    text = read_text(path)
    with named(f"cannot read {path}"):
        yield from READERS[suffix](text)


def read_text(path):
    """The text of a file in UTF-8, unpacked if its name ends in .gz. Raises ValueError, with the
    file's name, if there is none, for more than 512 MiB, and for a small file that unpacks to very
    much."""
    with named(f"cannot read {path}", (OSError, EOFError, ValueError, zlib.error)):
        limit = min(2**29, 2**24 + 50 * regular(path).stat().st_size)
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rb") as file:
            content = file.read(limit + 1)
        require(len(content) <= limit, f"it holds more than {limit >> 20} MiB")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise ValueError(f"save it as UTF-8: {e}") from None


def csv_records(text):
    """A row's line is the one on which it ends."""
    csv.field_size_limit(2**29)  # the default refuses a long text
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(rows, [])
        require(len(set(names)) == len(names), "two columns have one name")
        for row in rows:
            if any(row):  # spreadsheets leave empty rows
                fits = len(row) == len(names)
                record = dict(zip(names, row, strict=True)) if fits else row
                yield f":{rows.line_num}", record
    except csv.Error as e:
        raise ValueError(f"line {rows.line_num}: {e}") from None


def json_records(text):
    """Of a list of records, or of a record a line: some programs mix up the suffixes."""
    if re.match(r"\s*\[\s*[{\]]", text):
        for number, record in enumerate(parse_json(text), 1):
            yield f" record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):  # a string may hold other line breaks
        if line.strip():
            with named(f"line {number} holds no whole record"):
                record = parse_json(line)
            yield f":{number}", record


READERS = {".csv": csv_records, ".json": json_records, ".jsonl": json_records}


# ---- Pairs: what a record means

NAMES = {  # the standard name of a column: others for the same
    "prompt": "question query input instruction prompt_arr goal",
    "chosen": "matching chosen_response preferred pos accepted winning_output chosen_arr",
    "rejected": "not_matching rejected_response dispreferred neg losing_output rejected_arr",
    "system": "system_prompt system_message",
}


def standard_name(column):
    """The standard name of a column, whose own may be in any case, with blanks, or begin with
    "answer_"."""
    name = column.strip().lower().replace(" ", "_").removeprefix("answer_")
    for standard, others in NAMES.items():
        if name in others.split():
            return standard
    return name


def standard_columns(record):
    """The record's values by the standard names of its columns. `messages` are the prompt if no
    other column is, and else it is []. Raises ValueError if two columns that differ could be meant;
    an empty one is not."""
    require(isinstance(record, dict), f"not a value for each named column: {record!r:.60}")
    columns = {}
    for column, value in record.items():
        name = standard_name(column)
        earlier = columns.get(name)
        if earlier and value and earlier != value:
            raise ValueError(f"{column!r} is a second {name}: rename it")
        columns[name] = earlier or value
    if "prompt" not in columns:
        columns["prompt"] = columns.pop("messages", [])
    return columns


def to_pairs(record):
    """(the Pairs of a record, without their source; the names of the columns that are not used)."""
    match standard_columns(record):
        # 1. the paper's A/B questions: `matching` is a letter
        case {"prompt": str(prompt), "a": str(a), "b": str(b), "chosen": "A", **rest}:
            right, wrong = [a], [b]
        case {"prompt": str(prompt), "a": str(a), "b": str(b), "chosen": "B", **rest}:
            right, wrong = [b], [a]
        # 2. model-written evals and CAA: answer_matching_behavior is " (A)" or " Yes", or a list
        case {"prompt": str(q), "matching_behavior": yes, "not_matching_behavior": no, **rest}:
            prompt, options = split_options(q)
            right = spelled_out(yes, options)
            wrong = spelled_out(no, options)
        # 3. TruthfulQA: lists of answers, or texts with ";" between answers
        case {"prompt": str(prompt), "correct_answers": yes, "incorrect_answers": no, **rest}:
            right = split_answers(yes)
            wrong = split_answers(no)
        # 4. the paper's pairs, TRL's, HH-RLHF's; an answer may hold the whole conversation
        case {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest}:
            right, wrong = [chosen], [rejected]
            names = ["0", "1", "2", *rest]
            points = len(rest) > 1 and chosen in names and rejected in names
            require(not points, f"the answers {chosen} and {rejected} are names, not texts")
        case _:
            raise ValueError(f"no columns prompt, chosen and rejected: only {', '.join(record)}")

    require(len(right) * len(wrong) <= 10_000, "there are more than 10,000 pairs of its answers")
    system = rest.pop("system", None)
    pairs = [checked(prompt, *answers, system) for answers in itertools.product(right, wrong)]
    return pairs, list(rest)


def list_of_texts(value):
    """A text, or a list of texts, as a list. Raises ValueError for anything else."""
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str) or re.match(r"\[\s*['\"]", text):
            raise ValueError(f"not a text, or a list that was written out: {value!r:.60}")
    return [text.strip() for text in texts]


def split_answers(value):
    """The answers of TruthfulQA: a list, or a text with ";" between them."""
    return [text.strip() for text in ";".join(list_of_texts(value)).strip("; ").split(";")]


def spelled_out(value, options):
    """The answers of an eval: of "(A)" the text, if the question has options."""
    texts = list_of_texts(value)
    return [options.get(text, "") for text in texts] if options else texts


HEADING = r"(?i)[\W_]*+(\w+ )?(choice|option|answer|response)s?[\W_]*"  # "Choices:"


def split_options(question):
    """(an eval's question without its options, as in the paper's data, {"(A)": text of option})."""
    stem = []  # the lines before the options
    options = {}
    fault = "the options are not one line each, with a letter of its own"
    for line in question.removeprefix("Question:").split("\n"):
        option = re.match(r"[ \t]*(\([A-Z]\))(.*)", line)
        if option:
            require(option[1] not in options, fault)
            options[option[1]] = option[2].strip()
        elif options:
            require(line.strip() in ("", "Answer:"), fault)
        else:
            stem.append(line)

    if options:
        stem = [line for line in stem if not re.fullmatch(HEADING, line)]
    return "\n".join(stem).strip(), options


ROLES = {"system": "system", "prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def to_turns(value, column):
    """[(role, content), ...] of the value of a column: a text, a transcript as in HH-RLHF, a
    message or a list of messages."""
    if isinstance(value, str) and value.lstrip().startswith("Human:"):
        return transcript_turns(value)
    if isinstance(value, str):
        return [(ROLES[column], value)]
    messages = value if isinstance(value, list) else [value]
    return [message_turn(message, column) for message in messages]


def transcript_turns(text):
    """The turns of a text like "Human: Hi!\\n\\nAssistant: Hello.\\n\\nHuman: Will you lead?", or
    with one line break or a blank between them."""
    text = text.strip().replace("\r\n", "\n")
    kinds = ("\n\n", "\n", " ")
    separator = next((kind for kind in kinds if f"{kind}Assistant:" in text), "\n\n")
    turns = []
    for part in re.split(f"{separator}(?=Human:|Assistant:)", text):
        speaker, _, content = part.partition(":")
        require("Assistant:" not in content, f"a turn of a transcript holds another: {part!r:.60}")
        turns.append(("user" if speaker == "Human" else "assistant", content.strip()))
    return turns


def message_turn(message, column):
    match message:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content), **more}:
            unknown = [key for key, value in more.items() if value]
            require(not unknown, f"a message holds more than role and content: {unknown}")
            return role, content
        case str(text):
            raise ValueError(f"{column} is a list of texts, not one text: {text!r:.60}")
    raise ValueError(f"{column} is no text, nor a message of a known role: {message!r:.60}")


# How texts begin and end that somebody has put into a chat template, how a list of messages begins
# that somebody has written out as text, and what programs write for a value that is missing.
TEMPLATED = r"\s*(<s>\s*)?(\[INST\]|\[SYSTEM_PROMPT\]|<\|\w+\|>|<start_of_turn>)"
END_TOKEN = r"(</s>|<\|\w+\|>|<end_of_turn>)\s*$"
WRITTEN_OUT = r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:"
MISSING = r"(?i)\s*(nan|none|null|n/a|<na>|\\n)\s*"


def checked(prompt, chosen, rejected, system=None):
    """The Pair, without its source, of a record's values. An answer stands alone or after all
    messages before it; a system prompt becomes a turn. Raises ValueError for what cannot be meant.
    """
    require(chosen != [] and rejected != [], "an answer is empty")
    *context, (role, yes) = to_turns(chosen, "chosen")
    *other_context, (other_role, no) = to_turns(rejected, "rejected")
    fits = context == other_context and role == other_role == "assistant"
    require(fits, "chosen and rejected must differ in one last message, the assistant's")

    turns = to_turns(prompt, "prompt")
    if turns[-1:] == [("assistant", "")]:  # the transcript of a prompt ends with "Assistant:"
        turns.pop()
        yes = yes.strip()
        no = no.strip()
    if context:
        known = all(turn in context for turn in turns)
        require(known, "the messages before the answer do not hold the prompt")
        turns = context
    require(turns, "no column is the prompt, and there are no messages before the answers")
    if system and "system" not in dict(turns):
        turns = to_turns(system, "system") + turns
    check_order(turns)
    check_texts(turns, yes, no)
    return Pair(turns[0][1] if len(turns) == 1 else tuple(turns), yes, no)


def check_texts(turns, yes, no):
    """Raises ValueError for texts that hold what is no part of them, or nothing."""
    contents = [content for _, content in turns]
    for text in (*contents, yes, no):
        text.encode()  # raises ValueError for half a "😀"
        found = re.match(TEMPLATED, text)
        require(not found, f"a text holds a chat template already, remove it: {text!r:.60}")
        found = re.match(WRITTEN_OUT, text)
        require(not found, f"a text is a list of messages written out: {text!r:.60}")
    for text in (yes, no, dict(turns).get("system", "")):
        require(not re.fullmatch(MISSING, text), f"a value is missing: {text!r}")

    require(yes.strip() and no.strip(), "an answer is empty")
    both_end = re.search(END_TOKEN, yes) and re.search(END_TOKEN, no)
    require(not both_end, f"both answers end in a control token, remove it: {yes[-30:]!r}")
    question = contents[-1].strip()
    repeated = yes.strip().startswith(question) and no.strip().startswith(question)
    repeated = repeated and len(question.split()) > 2  # "Hi!" may well be answered by "Hi!"
    require(not repeated, "both answers begin with the whole prompt, remove it")


def check_order(turns):
    """Raises ValueError for turns that are no prompt."""
    roles = " ".join(role for role, _ in turns)
    fits = re.fullmatch("(system )?(user assistant )*user", roles)
    require(fits, f"turns are user, assistant, ..., user, maybe after system, not {roles!r}")


# ---- Tokens --------------------------------------------------------------------------------------


LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # of its class


class Tokenizer:
    """A checkpoint folder's tokenizer: tokenizer.json (package tokenizers) or, if there is none or
    both hold the same tokens, tokenizer.model (sentencepiece).

    controls: {added token, which a template may write: id}
    specials: the ids of those that no text must become.
    spliced: are texts encoded apart from the control tokens around them, as sentencepiece has to?
    size: how many ids there are beside added ones.
    variables: what a chat template may ask for, as "bos_token".
    decode(ids): text, without control tokens.
    name: the file and the beginning of its SHA-256.
    """

    def __init__(self, path):
        path = Path(path)
        self.read_settings(path)
        file = path / "tokenizer.model"
        json_file = path / "tokenizer.json"
        try:
            model = read_sentencepiece(file)
        except ValueError as e:
            advice = f"cannot read {file}: {e}; copy the files tokenizer* of the base model there"
            require(json_file.exists(), advice)
            model = None

        self.spliced = model is not None and self.is_enough(model, json_file)
        if self.spliced:
            self.open_sentencepiece(model)
        else:
            file = json_file
            self.open_tokenizer_json(file)
        self.name = f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"

    def read_settings(self, path):
        """What the files beside the tokenizer say, if they are there, as transformers reads them.

        added: the added tokens, with their flags; named: the special tokens that have a name.
        """
        self.config = read_beside(path / "tokenizer_config.json")
        with named(f"{path}/tokenizer_config.json or a file beside it is no use", Exception):
            if "added_tokens_decoder" in self.config:
                tokens = self.config["added_tokens_decoder"].items()
                self.added = {int(number): token for number, token in tokens}
            else:  # as before transformers 4.34
                self.config |= read_beside(path / "special_tokens_map.json")
                numbers = read_beside(path / "added_tokens.json").items()
                self.added = {number: {"content": text} for text, number in numbers}
            for number, token in self.added.items():
                plain = token["content"].encode() and type(number) is int and number >= 0
                require(plain, f"{token!r:.60} with the id {number!r}")

            require(not self.config.get("split_special_tokens"), "split_special_tokens is set")
            self.variables = {}
            self.named = []
            for key, value in self.config.items():
                if key.endswith("_tokens") and isinstance(value, list):
                    self.named += [text_of_token(token) for token in value]
                elif key.endswith("_token") and value is None:  # a template writes nothing
                    self.variables[key] = jinja2.Undefined(name=key)
                elif key.endswith("_token") and not isinstance(value, bool):
                    self.variables[key] = text_of_token(value)
            self.named += [text for text in self.variables.values() if text]

    def is_enough(self, model, json_file):
        """Does tokenizer.model give transformers' ids? Raises ValueError if it does not, and there
        is no tokenizer.json."""
        pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
        self.controls = {token["content"]: number for number, token in self.added.items()}
        for piece, number in pieces.items():
            if model.is_control(number) or model.is_unknown(number):
                self.controls[piece] = number
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
        usual = all({**flags, **token} == {**token, **flags} for token in self.added.values())
        usual = usual and self.config.get("add_prefix_space") is not False

        if not json_file.is_file():
            kinds = "added words, tokens that strip blanks or add_prefix_space"
            fault = f"tokenizer.model alone does not say what transformers makes of {kinds}"
            advice = "it wants a tokenizer.json, as transformers' save_pretrained writes it"
            require(usual, f"{fault}: {advice}")
            return True
        with named(f"cannot read {json_file}", Exception):
            content = read_json(json_file)
            added = {token["content"]: token["id"] for token in content["added_tokens"]}
            return usual and added == self.controls and content["model"]["vocab"] == pieces

    def open_sentencepiece(self, model):
        self.size = model.vocab_size()
        self.specials = set()  # no text becomes one
        self.encode_text = model.encode
        self.byte_level = False
        legacy = self.config.get("legacy", True)
        self.spaceless = (" ", "▁") if legacy else ("",)  # every text begins with ""

        self.variables.setdefault("bos_token", model.id_to_piece(model.bos_id()))
        self.variables.setdefault("eos_token", model.id_to_piece(model.eos_id()))
        printed = set(range(self.size)) - set(self.controls.values())
        self.decode = lambda ids: model.decode([number for number in ids if number in printed])

    def open_tokenizer_json(self, file):
        with named(f"cannot read {file}", Exception):
            tokenizers = optional("tokenizers")
            model = tokenizers.Tokenizer.from_file(str(regular(file)))
            for token in self.added.values():  # their flags win, as in transformers
                model.add_tokens([tokenizers.AddedToken(**token)])
            known = {token.content for token in model.get_added_tokens_decoder().values()}
            model.add_special_tokens([text for text in self.named if text not in known])
        model.no_truncation()  # which a file may switch on
        model.no_padding()
        for chance in ("dropout", "alpha", "nbest_size"):
            if hasattr(model.model, chance):
                setattr(model.model, chance, None)

        added = model.get_added_tokens_decoder()
        self.controls = {token.content: number for number, token in added.items()}
        self.specials = {number for number, token in added.items() if token.special}
        self.size = model.get_vocab_size(with_added_tokens=False)
        self.encode_text = lambda text: model.encode(text, add_special_tokens=False).ids
        self.byte_level = '"ByteLevel"' in model.to_str()
        if "Llama" in str(self.config.get("tokenizer_class")) and not self.byte_level:
            self.variables = LLAMA_TOKENS | self.variables
        self.spaceless = ()
        self.decode = model.decode

    def encode(self, text, first=True):
        """The ids of a text; in tokenizer.json's, a literal "</s>" is one of the specials.

        first: whether the text begins the sequence. If it follows a control token, no space is put
            before a text that begins with one of `spaceless`.
        """
        text.encode()  # raises ValueError for half a "😀"
        if first or not text.startswith(self.spaceless):
            return self.encode_text(text)
        start = "\ue000"  # which no vocabulary has
        return self.encode_text(start + text)[len(self.encode_text(start)) :]


def read_beside(file):
    return read_json(file) if file.is_file() else {}


def read_sentencepiece(file):
    """The model in a tokenizer.model. Raises ValueError if there is none."""
    model = sentencepiece.SentencePieceProcessor()
    fault = "not sentencepiece's, perhaps tiktoken's"
    try:
        model.LoadFromSerializedProto(regular(file).read_bytes())
    except RuntimeError:
        raise ValueError(fault) from None
    require(model.bos_id() >= 0 and model.eos_id() >= 0, fault)
    return model


def text_of_token(token):
    """The text of a token in tokenizer_config.json, which may stand in an object."""
    text = token["content"] if isinstance(token, dict) else token
    require(isinstance(text, str), f"no token: {token!r:.60}")
    return text


# ---- Chat ----------------------------------------------------------------------------------------

# The templates of the official recipe (llama-2 and mistral, as FastChat renders them) and two more.
# The system prompt "Be brief." and the turns "Lead?", "Yes." and "Sure?" become
#  llama-2  <s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nLead? [/INST] Yes. </s><s>[INST] Sure? [/INST]
#  mistral  <s>[INST] Be brief.\nLead? [/INST] Yes.</s>[INST] Sure? [/INST]
#  vicuna   <s>Be brief. USER: Lead? ASSISTANT: Yes.</s>USER: Sure? ASSISTANT:
#  plain    <s>Be brief.\n\nLead?Yes.\n\nSure?
# An answer that ends the conversation ends in </s>; an empty system prompt leaves no trace.

LLAMA_2 = r"""
{{- bos_token + '[INST] ' }}
{%- for m in messages if m.role != 'system' or m.content %}
{%- if m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}
{%- elif m.role == 'user' %}{{ m.content + ' [/INST]' }}
{%- elif loop.last %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ ' ' + m.content + ' ' + eos_token + bos_token + '[INST] ' }}
{%- endif %}{% endfor %}"""

MISTRAL = r"""
{{- bos_token + '[INST] ' }}
{%- for m in messages if m.role != 'system' or m.content %}
{%- if m.role == 'system' %}{{ m.content + '\n' }}
{%- elif m.role == 'user' %}{{ m.content + ' [/INST]' }}
{%- elif loop.last %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ ' ' + m.content + eos_token + '[INST] ' }}
{%- endif %}{% endfor %}"""

VICUNA = r"""
{{- bos_token }}
{%- for m in messages if m.role != 'system' or m.content %}
{%- if m.role == 'system' %}{{ m.content + ' ' }}
{%- elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}
{%- else %}{{ ' ' + m.content + eos_token }}
{%- endif %}{% endfor %}"""

PLAIN = r"""
{{- bos_token }}
{%- for m in messages if m.role != 'system' or m.content %}
{%- if m.role == 'system' %}{{ m.content + '\n\n' }}
{%- elif m.role == 'user' %}{{ m.content }}
{%- elif loop.last %}{{ m.content + eos_token }}
{%- else %}{{ m.content + '\n\n' }}
{%- endif %}{% endfor %}"""

SYSTEM = "You are a helpful, honest and concise assistant."  # the official recipe's
VICUNA_SYSTEM = """A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions."""
RECIPES = {"llama-2": LLAMA_2, "mistral": MISTRAL, "vicuna": VICUNA, "plain": PLAIN}
SYSTEM_PROMPTS = {"llama-2": SYSTEM, "mistral": SYSTEM, "vicuna": VICUNA_SYSTEM, "plain": ""}
TEMPLATE_HELP = f"own (the checkpoint's), {', '.join(RECIPES)} or a .jinja file"


CONSTANTS = {"tools": None, "documents": None, "enable_thinking": False}


class Unknown(jinja2.Undefined):
    """A name that nobody defines: a template may ask whether it is there, but not write it."""

    __str__ = jinja2.StrictUndefined.__str__


@functools.cache
def compile_template(source):
    """The template as transformers compiles it, except that there is no clock, strftime_now: a
    template takes the date that it has for that case. {% generation %} blocks change nothing. A
    template can read nothing but the texts, but it is trusted to come to an end."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=Unknown
    )
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
    listed_ends: tuple = ()  # the ids at which generation ends, says the checkpoint

    @property
    def eos_id(self):
        """The token that ends an answer in training."""
        _, end = self.answer("Hello", "-")
        return self.tokenizer.controls[end]

    @property
    def end_ids(self):
        """The tokens at which generation ends."""
        return {self.eos_id, *self.listed_ends}

    def fill(self, turns):
        """The text of turns and, if the last is the user's, of the beginning of an answer."""
        asks = turns[-1][0] == "user"
        more = {"messages": as_messages(turns), "add_generation_prompt": asks}
        with named("the chat template fails", Exception):  # a template is a program
            template = compile_template(self.source or RECIPES[self.template])
            return template.render(self.tokenizer.variables | CONSTANTS | more)

    def turns(self, prompt):
        """The turns of a prompt, with the system prompt."""
        turns = as_turns(prompt)
        check_order(turns)
        if turns[0][0] != "system" and self.system is not None:
            turns.insert(0, ("system", self.system))
        return turns

    def cut(self, text):
        """The text as a list in which every second part is a control token."""
        tokens = sorted(self.tokenizer.controls, key=len, reverse=True)  # one may begin another
        any_token = "|".join(re.escape(token) for token in tokens) or "(?!)"  # (?!) is nowhere
        return re.split(f"({any_token})", text)

    def split(self, prompt):
        """The text of a prompt, cut at the control tokens that the template writes:

            ["", "<s>", "[INST] Lead? [/INST]"]

        The template is filled with marks instead of the texts, so that a text can be no control
        token. The outer blanks of a text stay outside its mark, where the template may strip them.
        Raises ValueError if it does anything else with a text.
        """
        turns = self.turns(prompt)
        marked = []
        texts = {}
        for i, (role, text) in enumerate(turns):
            mark = f"\ue000{i}\ue001"  # of Unicode's private-use area
            marked.append((role, re.sub(r"(?s)\S(.*\S)?", mark, text)))
            texts[mark] = text.strip()
        filled = self.fill(marked)

        parts = []
        for part in self.cut(filled):
            parts.append(re.sub("\ue000\\d+\ue001", lambda m: texts.get(m[0], m[0]), part))
        require("".join(parts) == self.fill(turns), "the chat template looks into the texts")
        for mark, (role, _) in zip(texts, turns, strict=True):
            there = mark in filled or not texts[mark]
            require(there, f"this chat template has no {role} turn: it leaves out the text")
        return parts

    def answer(self, prompt, text):
        """(what follows a prompt if this is the answer, the control token that ends it), for
        example " Yes." and "</s>". Raises ValueError if there is no such token.

        Where a template moves the system prompt when there is an answer, any other prompt will do.
        """
        for turns in (self.turns(prompt), [("user", "Hello")]):
            before = self.fill(turns)
            whole = self.fill([*turns, ("assistant", text)])
            if whole.startswith(before):
                break
        rest = whole.removeprefix(before)
        require(rest != whole, f"the chat template writes no answer after its {before[-60:]!r}")

        begin = rest.find(text.strip())
        kept = begin >= 0 and len(self.cut(rest[:begin])) == 1
        require(
            kept, f"the chat template looks into the texts, or begins {text!r:.30} with a token"
        )
        end = begin + len(text.strip())
        behind, *tokens = self.cut(rest[end:])
        advice = "give --template a .jinja file that writes {{ eos_token }} there"
        require(tokens, f"the chat template ends an answer with no control token: {advice}")
        return rest[:end] + behind, tokens[0]

    def encode(self, prompt, answer="", end=""):
        """The ids of a prompt and, if given, of an answer and its end, as `answer` returns them.

        With tokenizer.json, and an own template, they are transformers': of the whole text at once.
        Raises ValueError if a text becomes a control token.
        """
        tokenizer = self.tokenizer
        official = self.template in RECIPES
        parts = self.split(prompt)
        parts[-1] += answer
        if end:
            parts.append(end)

        written = [tokenizer.controls[token] for token in parts[1::2]]
        guarded = tokenizer.specials.union(written)
        ids = []
        for i, part in enumerate(parts):
            if i % 2 == 1:
                ids.append(tokenizer.controls[part])
            else:  # a text; the official trainer put BOS before the ids of a text of its own
                text_ids = tokenizer.encode(part, not ids or official)
                require(guarded.isdisjoint(text_ids), f"a text holds a control token: {part!r:.60}")
                ids += text_ids
        if tokenizer.spliced or official:
            return ids

        ids = tokenizer.encode("".join(parts))
        found = [number for number in ids if number in guarded]
        require(found == written, f"the tokenizer does not find all of {parts[1::2]!r:.60}")
        return ids

    def encode_prompt(self, prompt: str | tuple) -> list[int]:
        """Token ids, ready for generation."""
        return self.encode(prompt)

    def encode_responses(self, prompt, responses, limit=10**9):
        """(prompt ids, [ids of each response, with the token that ends it]): prompt and response
        are tokenised jointly and split at the prompt's length, as the official trainer does. Raises
        ValueError for more than `limit` tokens, and where a token spans the split (the official
        trainer then moves it; a byte-level tokenizer encodes the response apart)."""
        prompt_ids = self.encode(prompt)
        n = len(prompt_ids)
        found = []
        for response in responses:
            answer, end = self.answer(prompt, response)
            ids = self.encode(prompt, answer, end)
            if ids[:n] != prompt_ids and self.tokenizer.byte_level:
                ids = prompt_ids + self.tokenizer.encode(answer + end)
            require(ids[:n] == prompt_ids, f"a token spans the prompt's end: {response[:60]!r}")
            require(len(ids) <= limit, f"too long: {len(ids)} tokens, the context is {limit}")
            found.append(ids[n:])
        return prompt_ids, found

    def encode_pair(self, pair: Pair, max_seq_len=10**9) -> PairIds:
        """See `encode_responses`. Raises ValueError with the pair's source, also for responses of
        the same ids."""
        with named(pair.source):
            responses = (pair.chosen, pair.rejected)
            prompt, (chosen, rejected) = self.encode_responses(pair.prompt, responses, max_seq_len)
            require(chosen != rejected, "chosen and rejected are the same tokens")
        return PairIds(prompt, chosen, rejected)


def encode_pairs(chat, pairs, max_seq_len, skip_bad=False):
    """(the Pairs that have ids, the PairIds of each). Raises ValueError with the source of a pair
    for which `Chat.encode_pair` does, unless skip_bad: then it is dropped, and a line counts such
    pairs by reason."""
    encoded = []
    ids = []
    faults = []  # (source, what is wrong there)
    for pair in pairs:
        try:
            ids.append(chat.encode_pair(pair, max_seq_len))
            encoded.append(pair)
        except ValueError as e:
            faults.append((pair.source, str(e).removeprefix(f"{pair.source}: ")))

    dropped = count_faults(faults, skip_bad)
    report = f"dropped {listed(dropped)}, {len(encoded)} pairs are left"
    require(encoded, f"no pairs: {report}")
    if dropped:
        print(report)
    return encoded, ids


# A checkpoint whose own template renders PROBE so is Llama-2-chat, and one that renders it without
# its system prompt so is Mistral-7B-Instruct v0.1 or v0.2, whose blanks differ.
PROBE = (("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"))
AS_LLAMA_2 = re.escape("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]")
AS_MISTRAL = r"<s> ?\[INST\] A \[/INST\] ?B</s> ?\[INST\] C \[/INST\]"


def choose_template(path, family, own):
    """The name of the template if the user gives none; own: a Chat with the checkpoint's."""
    for name, turns, text in (("llama-2", PROBE, AS_LLAMA_2), ("mistral", PROBE[1:], AS_MISTRAL)):
        with suppress(ValueError):  # the template fails, if there is one
            if own.source and re.fullmatch(text, own.fill(turns)):
                note = f"note: {path} gets the recipe {name}, with its system prompt; "
                print(printable(f"{note}--template own takes the model's"))
                return name
    if own.source:
        return "own"

    # From before there were templates: Llama-2 and Vicuna, whose tokenizers have no other tokens.
    usual = r"<s>|</s>|<unk>|\W*pad\W*"
    others = [x for x in own.tokenizer.controls if not re.fullmatch(usual, x, re.IGNORECASE)]
    plain = family == "llama" and not others and not own.tokenizer.byte_level
    require(plain, f"{path} has no chat template; --template takes {TEMPLATE_HELP}")
    name = "vicuna" if "vicuna" in str(path).lower() else "llama-2"
    note = f"note: {path} has no chat template, so {name} is taken; --template names another"
    print(printable(note))
    return name


def own_template(path, config):
    """The source of the checkpoint's own chat template, or "" if it has none."""
    file = Path(path, "chat_template.jinja")
    if file.is_file():
        return read_text(file)
    source = config.get("chat_template") or ""
    with named(f"{path} has a malformed chat_template", (LookupError, TypeError, ValueError)):
        if isinstance(source, list):  # several, each with its name
            source = {item["name"]: item["template"] for item in source}.get("default", "")
        require(isinstance(source, str), f"no text: {source!r:.60}")
    return source


def open_chat(path, config: Config, template: str | None = None, system: str | None = None) -> Chat:
    """The Chat of the checkpoint in folder `path`.

    template: "own", a key of RECIPES, a .jinja file, or `Chat.template` of an earlier run. By
        default the checkpoint's own is taken, except that the official recipe's is for the models
        that the recipe is for.
    system: the system prompt; by default the recipe's, or whatever an own template puts there
        itself (`Chat.system` is None then).
    Raises ValueError if no template is known, for one that is impossible with the tokenizer, and
    for a tokenizer that does not fit the model.
    """
    tokenizer = Tokenizer(path)
    ends = tuple(read_eos_ids(path))
    own = Chat(tokenizer, "own", None, own_template(path, tokenizer.config), ends)
    name = template or choose_template(path, config.family, own)
    if name.endswith(".jinja"):
        own = own._replace(source=read_text(Path(name)))
        indented = re.search(r"(?m)^(  |\t)", own.fill(PROBE[1:]))
        require(not indented, f"{name} writes the blanks that indent it: use {{{{- and -}}}}")
        name = "own"

    if name in RECIPES:
        chat = Chat(tokenizer, name, SYSTEM_PROMPTS[name], "", ends)
    else:
        known = own.source and name.split(" ")[0] == "own"
        require(known, f"no template {name!r} but {TEMPLATE_HELP}")
        chat = own._replace(template=f"own {digest(own.source)}")
    if system is not None:
        chat = chat._replace(system=system)

    # A tokenizer may add more ids than the template uses.
    n_ids = max(tokenizer.size, 1 + chat.eos_id, 1 + max(chat.encode_prompt(PROBE[1:])))
    fault = f"{n_ids} tokens in {tokenizer.name}, more than in the model"
    require(n_ids <= config.vocab_size, fault)
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
        require(n_layers, f"{rows}, which only a model tells: eval.py and data.py bake read it")
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


def save_vector(path: str | Path, vectors: dict, metadata: dict):
    """Write {layer: v (dim,)} in the format of the path's suffix: as safetensors, fp32 tensors
    named `direction.LAYER` and metadata, a dict of strings, of which None is left out. The file
    appears whole or not at all. Raises ValueError for what the format cannot hold: .pt holds one
    vector, whose layer the file's name must say, and no metadata."""
    path = Path(path)
    formats = (".safetensors", ".pt", ".gguf")
    require(path.suffix in formats, f"{path}: a vector file's name ends in {', '.join(formats)}")
    tensors = {}
    for layer in sorted(vectors):
        v = vectors[layer].detach().float().cpu().clone()
        require(v.norm().isfinite(), f"{path} is not written, it would hold NaN or infinity")
        tensors[f"direction.{layer}"] = v
    metadata = {key: text for key, text in sorted(metadata.items()) if text is not None}

    with whole_file(path) as part:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, part, metadata)
        elif path.suffix == ".pt":
            wanted = f"{path}: a .pt file holds one vector, and its name the layer: vec_layer15.pt"
            require(list(vectors) == [layer_in_name(path)], wanted)
            torch.save(v, part)
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


# ---- What the command lines share: files to write ------------------------------------------------


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


# ---- What the command lines share: a program from its flags to its end ---------------------------


class Parser(argparse.ArgumentParser):
    """Prints an error as one line of at most 500 characters; its exit code is 2. Under torchrun the
    first process prints at once, and torchrun ends the others; they wait, and so print only what is
    not its error too."""

    def parse_args(self, args=None, namespace=None):
        # An unknown flag is named before what is missing, which it may have been meant for.
        words = sys.argv[1:] if args is None else args
        for word in words:
            flag, _, _ = word.partition("=")
            known = any(option.startswith(flag) for option in self._option_string_actions)
            if flag.startswith("--") and not (known or self._subparsers):
                self.error(f"unknown flag {flag}: see --help")
        return super().parse_args(args, namespace)

    def error(self, message):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        clear_line()
        line = f"{self.prog}: {printable(' '.join(message.split()))}"
        self.exit(2, f"{line:.500}\n")


def run_or_exit(parser, run, argv):
    """Call run(args); an error that the user can mend becomes one line and exit code 2.

    Ctrl-C raises KeyboardInterrupt in run, and SIGTERM raises SystemExit: one line, exit code 130
    or 143. The line holds what the exception's add_note was given. If the reader of the output
    leaves, as in `| head -1`, the program ends without a word, with exit code 141.
    """
    args = parser.parse_args(argv)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it may be closed: >&-
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console may lack a character
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python writes what is left when it ends, and must not fail at that again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    except RecursionError as e:
        parser.error(f"what is read is nested too deeply: {e}")
    except (MemoryError, torch.OutOfMemoryError) as e:
        parser.error(f"out of memory; try --dtype bfloat16, or less data at a time ({e})")
    except (KeyboardInterrupt, SystemExit) as e:
        clear_line()
        notes = "; ".join(["interrupted", *getattr(e, "__notes__", [])])
        parser.exit(getattr(e, "code", 130), f"{parser.prog}: {notes}\n")


def clear_line():
    """Take away the line of a Progress, at whose start the terminal's cursor then is."""
    if sys.stdout.isatty():
        print("\x1b[K", end="", flush=True)


def say_next(command):
    """Print a command to go on with, as it can be pasted into a shell."""
    print(f"next: {shlex.join(str(word) for word in command)}")


def duration(seconds):
    """45 s, 12 min or 3.1 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Progress:
    """Prints 'step 40/160  12.5 ms each, 2 s left' and more: on a terminal in one line that is
    rewritten, else in a line now and then, ever more seldom, and at the end. Call `clear_line`
    before other output in between.

    quiet: at the end nothing is printed, and the line goes. start: what was done before.
    """

    def __init__(self, what, quiet=False, start=0):
        self.what = what
        self.quiet = quiet
        self.start = start
        self.began = time.time()
        self.printed = self.began

    def __call__(self, done, total, more=""):
        if done == total and self.quiet:
            clear_line()
            return
        now = time.time()
        terminal = sys.stdout.isatty()
        wait = 0.2 if terminal else max(2, (now - self.began) / 10)
        if now - self.printed < wait and done < total:
            return

        self.printed = now
        seconds_each = (now - self.began) / (done - self.start)
        left = duration(seconds_each * (total - done))
        times = f"{1000 * seconds_each:.1f} ms each, {left} left"
        line = f"{self.what} {done}/{total}  {times}  {more}".rstrip()
        if terminal:
            clear_line()
            line = line[: shutil.get_terminal_size().columns - 1]
        print(line, end="\r" if terminal and done < total else "\n", flush=True)


# ---- What the command lines share: flags ---------------------------------------------------------

ALIASES = {  # the paper's models
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.2",
}
LAYER_HELP = "of a vector file that holds several layers, or does not say its own"


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
    add("--data", type=Path, help=".csv, .json, .jsonl, also .gz; columns: see README", **number)
    add("--skip-bad", action="store_true", help="drop and count records that are bad or too long")


class OpenModel(NamedTuple):
    """A checkpoint of which everything is open but the weights."""

    path: Path
    name: str  # its folder's, or its id on the hub
    config: Config
    chat: Chat
    device: torch.device
    dtype: torch.dtype


def open_model(args) -> OpenModel:
    """The model of a command line's flags."""
    path, name = find_model(args.model)
    config = read_config(path)
    chat = open_chat(path, config, args.template, args.system)
    return OpenModel(path, name, config, chat, *pick_device(args.device, args.dtype))


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


def pick_device(device_name, dtype_name):
    """(torch.device, torch.dtype) from --device and --dtype, which may be None. Raises ValueError
    for a device that is not there."""
    with named(f"--device {device_name} is not there", (RuntimeError, AssertionError)):
        device = torch.device(device_name or torch.accelerator.current_accelerator() or "cpu")
        torch.empty(0, device=device)
    if dtype_name is None:
        dtype_name = "float32" if device.type == "cpu" else "bfloat16"
    native = dtype_name == "bfloat16" and torch.backends.mkldnn.is_available()
    native = native and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cpu" and dtype_name != "float32" and not native:
        print(f"note: this CPU has no {dtype_name} arithmetic and is much faster in float32")
    return device, getattr(torch, dtype_name)


# ---- Command line --------------------------------------------------------------------------------


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


def show(args):
    """Print what a vector file holds."""
    vectors, metadata = load_vector(args.vector, args.layer, alternatives=True)
    print("\n".join(described(vectors, metadata)))


def convert(args):
    """Write a vector file, or the sum of several, in another format."""
    free = args.overwrite or not args.out.exists()
    require(free, f"{args.out} is there: --overwrite replaces it")
    vectors, metadata = load_sum(args.vectors, args.layer)
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
    checkpoint = llama.Checkpoint(path)
    config = checkpoint.model.config
    reason = "its MLP has no biases, and Llama, whose MLP has, lacks its norms of q and k"
    require(not config.qk_norm, f"{config.family} cannot be baked: {reason}")
    steer, metadata = load_sum(args.vector, args.layer, config.n_layers)
    llama.check_fit(config, steer, 0)
    llama.check_vectors(config, steer)

    lines = described(steer, metadata)
    fields = llama_fields(read_json(path / "config.json"), config)
    with whole_folder(args.out) as part:
        write_weights(part, checkpoint.files, baked_biases(checkpoint, steer))
        write_text(part / "config.json", json.dumps(fields, indent=2) + "\n")
        write_text(part / "README.md", model_card(name, args, lines))
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

    # The older name of rope_parameters, and what our Config knows of the length.
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
                biases[name] += llama.open_weights(checkpoint.files[name])[name]
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


def model_card(name, args, lines):
    """The README.md of a baked model."""
    vectors = " ".join(args.vector)
    what = "\n".join(f"    {line}" for line in lines)
    return f"""# {name}, steered by {vectors}

Written by `python data.py bake`: each vector is a bias of its layer's `mlp.down_proj`, so its sign
and multiplier are fixed. Some programs ignore such biases (SGLang 0.5.23 does) and serve the
unsteered model: compare an answer with
`python eval.py chat --model {args.model} --vector {vectors}`.

{what}
"""


def main(argv=None):
    parser = Parser(prog="data.py", description="Vector files, and checkpoints made with them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(run):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--layer", type=int, help=LAYER_HELP)
        return command.add_argument

    add = add_command(show)
    add("vector", metavar="FILE", type=Path, help=".safetensors, .pt or .gguf")

    add = add_command(convert)
    add("vectors", metavar="FILE[:M]", nargs="+", help="to be added up")
    add("out", metavar="OUT", type=Path, help="new .safetensors, .pt or .gguf")
    add("--scale", type=float, default=1.0, help="multiply the vector in OUT")
    add("--overwrite", action="store_true", help="replace OUT")

    add = add_command(bake)
    add("--model", required=True, help="checkpoint folder, alias or hub id")
    add("--vector", nargs="+", required=True, metavar="FILE[:M]", help="to be added up")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")
    run_or_exit(parser, lambda args: args.run(args), argv)


if __name__ == "__main__":
    main()
