"""Checkpoints by name, tokenizers, chat templates: ids against transformers' apply_chat_template.

The chat templates here are those of the families' tokenizer_config.json, cut to what renders
system, user and assistant turns.
"""

import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
from conftest import MINI, jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import bipo
import eval as evaluation
from data import ALIASES, TEMPLATES, Chat, Pair, Tokenizer, find_model, load_vector, open_chat

QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
YI = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT = (
    "{%% if messages[0]['role'] != 'system' %%}"
    "{{ '<|im_start|>system\\n%s<|im_end|>\\n' }}{%% endif %%}"
)
LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_31 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: "
    "December 2023\\nToday Date: 26 Jul 2024\\n\\n' + s + '<|eot_id|>' }}"
) + LLAMA_3.replace("{% if loop.first %}{{ bos_token }}{% endif %}", "")
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\\n' + messages[0]['content'] + "
    "'\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "(s if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (s if loop.last else '') + "
    "m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + "
    "eos_token }}{% elif m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + eos_token }}"
    "{% else %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}{{ '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
USER_ASSISTANT = (  # FastChat's, for Vicuna brings none
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

LLAMA_3_TOKENS = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
)
CHATML_TOKENS = "<|endoftext|> <|im_start|> <|im_end|>"
FAMILIES = {  # chat_template, special tokens, BOS, EOS, is BOS put before a text; template, system
    "qwen2.5": (DEFAULT % QWEN + YI, CHATML_TOKENS, None, "<|im_end|>", False, "chatml", QWEN),
    "smollm2": (
        DEFAULT % SMOLLM + YI, CHATML_TOKENS, "<|im_start|>", "<|im_end|>", False, "chatml", SMOLLM,
    ),
    "llama-3": (
        LLAMA_3, LLAMA_3_TOKENS, "<|begin_of_text|>", "<|eot_id|>", True, "llama-3", "",
    ),
}  # fmt: skip
WORDS = (  # Llama-3's, and but for digits Qwen2.5's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = "Would you like to lead the crew? Yes, gladly. No, I'd rather not. Be brief and honest."


def write_tokenizer_json(folder, chat_template, tokens, bos, eos, bos_before):
    """A byte-level BPE tokenizer.json and its tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([TEXTS, "x\n\n\nx"], trainer)
    bpe.add_special_tokens(tokens.split())
    if bos_before:
        special = [(bos, bpe.token_to_id(bos))]
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", None, special)
    bpe.enable_truncation(4)  # as some files do
    bpe.save(str(folder / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": {"content": eos}, "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=oracle, bos_token=bos, eos_token=eos, chat_template=chat_template
    )


def write_tokenizer_model(folder, source=MINI, **config):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def model_config(family="llama", vocab_size=1000):
    return SimpleNamespace(family=family, vocab_size=vocab_size)


ONE = (("user", "Would you lead?"),)
MORE = (*ONE, ("assistant", "Yes, gladly."), ("user", "And now?"))
SYSTEM_TURN = ("system", "Be brief.")
PROMPTS = [ONE, MORE, (SYSTEM_TURN, *ONE), (SYSTEM_TURN, *MORE)]


def expected(oracle, turns, answer=None):
    """transformers' ids of a prompt, or of it and the answer."""
    turns = [*turns, ("assistant", answer)] if answer else turns
    messages = [{"role": role, "content": text} for role, text in turns]
    return oracle.apply_chat_template(messages, add_generation_prompt=not answer, return_dict=False)


@pytest.fixture(scope="module", params=FAMILIES)
def byte_level(request, tmp_path_factory):
    """(our Chat by default, transformers' tokenizer, the row) of a family with tokenizer.json."""
    row, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    oracle = write_tokenizer_json(folder, *row[:5])
    return open_chat(folder, model_config()), oracle, row


@pytest.mark.parametrize("turns", PROMPTS)
def test_byte_level_ids(byte_level, turns):
    chat, oracle, (*_, template, system) = byte_level
    assert chat[1:] == (template, system)
    ids = expected(oracle, turns)
    assert chat.encode_prompt(turns) == ids and len(ids) > 10
    pair = chat.encode_pair(Pair(turns, "Yes, gladly.", "No, I'd rather not."))
    for response, text in ((pair.chosen, "Yes, gladly."), (pair.rejected, "No, I'd rather not.")):
        full = expected(oracle, turns, text)
        ours = pair.prompt + response
        assert full[: len(ours)] == ours and oracle.decode(full[len(ours) :]).strip() == ""
        assert oracle.convert_ids_to_tokens(response[-1]) in ("<|im_end|>", "<|eot_id|>")
    assert pair.chosen[-1] == chat.eos_id
    if len(turns) == 1:
        assert chat.encode_prompt(turns[0][1]) == ids
    if turns[0] == SYSTEM_TURN:
        assert chat._replace(system="Be brief.").encode_prompt(turns[1:]) == ids


def test_a_text_stays_text(byte_level):
    chat, oracle, row = byte_level
    text = row[1] + "</s>{content}{system}{setting}"
    special = oracle.convert_tokens_to_ids(row[1].split())
    plain, ids = chat.encode_prompt("x"), chat.encode_prompt(text)
    assert [i for i in ids if i in special] == [i for i in plain if i in special] != []
    assert text in oracle.decode(ids)


def test_llama_3_strips_texts_and_takes_the_date_as_a_system_prompt(tmp_path):
    row = FAMILIES["llama-3"]
    oracle = write_tokenizer_json(tmp_path, LLAMA_31, *row[1:5])
    chat = open_chat(tmp_path, model_config(), system=DATE + "Be brief.\n")
    assert chat.template == "llama-3"
    turns = (SYSTEM_TURN, ("user", "  Would you lead?\n"))
    assert chat.encode_prompt(turns[1:]) == expected(oracle, turns)
    pair = chat.encode_pair(Pair("Lead?", "\n Yes. ", "No"))
    assert pair.chosen == [*oracle("Yes.", add_special_tokens=False).input_ids, chat.eos_id]


def test_a_response_that_begins_with_a_newline_does_not_touch_the_prompt(byte_level):
    chat, oracle, _ = byte_level
    ids = chat.encode_pair(Pair("Lead?", "\n\nYes.", "No."))
    assert ids.prompt == chat.encode_prompt("Lead?")
    assert len(oracle.tokenize("\n\n")) == 1  # one that could reach across


# Templates of sentencepiece tokenizers. legacy: a text after a control token begins with a space,
# as in the tokenizer.json that came with Llama-2, TinyLlama, Zephyr.
SENTENCEPIECE = {
    "llama-2": LLAMA_2,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "vicuna": USER_ASSISTANT,
    "mistral-v3": MISTRAL_V3,
}


@pytest.fixture(scope="module")
def v3_folder(tmp_path_factory):
    """A sentencepiece tokenizer with Mistral v0.3's control tokens."""
    folder = tmp_path_factory.mktemp("v3")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXTS] * 20), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=320, byte_fallback=True, control_symbols="[INST],[/INST]",
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("turns", PROMPTS)
@pytest.mark.parametrize("template", SENTENCEPIECE)
def test_sentencepiece_ids(template, turns, v3_folder, tmp_path):
    source, more = MINI, {"legacy": True}
    if template == "mistral-v3":
        source, more = v3_folder, {"additional_special_tokens": ["[INST]", "[/INST]"]}
    chat_template = SENTENCEPIECE[template]
    folder = write_tokenizer_model(tmp_path / "x", source, chat_template=chat_template)
    oracle = LlamaTokenizer.from_pretrained(source, chat_template=chat_template, **more)
    chat = open_chat(folder, model_config())._replace(system="")
    assert chat.template == template
    theirs = list(turns)
    if template == "mistral" and turns[0] == SYSTEM_TURN:  # the recipe's way, Mistral has none
        theirs = [("user", f"Be brief.\n{turns[1][1]}"), *turns[2:]]
    ids = expected(oracle, theirs)
    if template == "zephyr":  # its chat_template leaves BOS to the tokenizer
        ids = [oracle.bos_token_id, *ids]
    assert chat.encode_prompt(turns) == ids
    pair = chat.encode_pair(Pair(turns, "Yes, gladly.", "No."))
    assert pair.prompt == ids and pair.chosen[-1] == oracle.eos_token_id == chat.eos_id
    # Llama-2's own has a space before EOS, the recipe has not; Mistral v0.3's own loses the system
    # prompt when an answer is last
    if template != "llama-2" and (template, turns[0]) != ("mistral-v3", SYSTEM_TURN):
        full = expected(oracle, theirs, "Yes, gladly.")
        full = [1] * (template == "zephyr") + full
        ours = pair.prompt + pair.chosen
        assert full[: len(ours)] == ours and oracle.decode(full[len(ours) :]).strip() == ""


def test_ids_that_transformers_changed_its_mind_about():
    """A line break behind a control token: ids 29871 13 with Llama-2's tokenizer, not 13 alone."""
    chat = Chat(Tokenizer(MINI), "zephyr", "")
    space, newline = chat.tokenizer.encode("\n")
    ids = chat.encode_prompt((SYSTEM_TURN, *MORE))
    after = [ids[i + 1 : i + 3] for i, x in enumerate(ids) if x == 2]
    assert after == [[space, newline]] * 4


def test_plain_adds_nothing_but_what_the_tokenizer_does(tmp_path, byte_level):
    chat, oracle, row = byte_level
    plain = chat._replace(template="plain", system="")
    before = [oracle.bos_token_id] if row[4] else []
    text = oracle("A: b", add_special_tokens=False).input_ids
    assert plain.encode_prompt("A: b") == before + text
    pair = plain.encode_pair(Pair("A:", " b", " c"))
    assert pair.prompt + pair.chosen == before + text + [oracle.eos_token_id]
    for config, ids in (({}, [1]), ({"add_bos_token": False}, [])):
        folder = write_tokenizer_model(tmp_path / "x", **config)
        chat = open_chat(folder, model_config(), "plain")
        assert chat.encode_prompt("A: b") == ids + chat.tokenizer.encode("A: b")
        assert open_chat(folder, model_config(), "llama-2").encode_prompt("A")[0] == 1


# ---- which template, which tokenizer


def test_template_by_the_checkpoints_own_files(tmp_path):
    def chosen(name, own=None, family="llama", tokens="", jinja="", **config):
        folder = tmp_path / name
        added = {str(420 + i): {"content": x} for i, x in enumerate(tokens.split())}
        write_tokenizer_model(
            folder, chat_template=own, added_tokens_decoder=added, add_bos_token=False
        )
        if jinja:
            (folder / "chat_template.jinja").write_text(jinja)
        return open_chat(folder, model_config(family))[1:]

    recipe = "You are a helpful, honest and concise assistant."
    assert chosen("llama2", LLAMA_2, "mistral") == ("llama-2", recipe)
    assert chosen("mistral-v2", MISTRAL) == ("mistral", recipe)
    assert chosen("zephyr", ZEPHYR, "mistral") == ("zephyr", "")
    assert chosen("vicuna-as-zephyr", ZEPHYR) == ("zephyr", "")
    assert chosen("in-a-file", LLAMA_2, jinja=ZEPHYR) == ("zephyr", "")
    assert chosen("several", [{"name": "default", "template": LLAMA_2}])[0] == "llama-2"
    assert chosen("Yi", YI, tokens=CHATML_TOKENS) == ("chatml", "")
    assert chosen("Qwen", DEFAULT % QWEN + YI, tokens=CHATML_TOKENS) == ("chatml", QWEN)
    assert chosen("Mistral-v3", MISTRAL_V3, "mistral", "[INST] [/INST]")[0] == "mistral-v3"
    # no chat_template: a name, a control token, the family
    assert (
        chosen("Vicuna-7b") == chosen("models--lmsys--vicuna-7b/snapshots/0") == ("vicuna", VICUNA)
    )
    assert chosen("base", tokens=LLAMA_3_TOKENS)[0] == "llama-3"
    assert chosen("llama2-base") == ("llama-2", recipe)
    assert chosen("mistral-base", family="mistral") == ("mistral", recipe)
    assert chosen("other", family="other") == ("plain", "")
    with pytest.raises(ValueError, match="chatml' needs <|im_end|>, which tokenizer.mod"):
        chosen("qwen-base", family="qwen2")
    with pytest.raises(
        ValueError, match="unknown: unknown chat_template; try --template llama-2, "
    ):
        chosen("unknown", "{{ '### User:' + messages[0]['content'] }}")


def test_a_template_that_the_tokenizer_cannot_render_is_refused(tmp_path, fails):
    for name in ("chatml", "llama-3", "mistral-v3"):
        args = "--model", MINI, "--data", MINI / "train.csv", "--layer", 1, "--out", tmp_path / "x"
        fails(bipo.main, (*args, "--template", name), f"{name!r} needs", "possible: llama-2")
    write_tokenizer_json(tmp_path, *FAMILIES["qwen2.5"][:5])
    with pytest.raises(ValueError, match="'llama-2' needs <s>, .*possible: chatml, plain"):
        open_chat(tmp_path, model_config(), "llama-2")
    assert open_chat(tmp_path, model_config(), "plain").system == ""
    with pytest.raises(
        ValueError, match=r"3\d\d tokens in tokenizer.json \w{12}, 300 in the model"
    ):
        open_chat(tmp_path, model_config(vocab_size=300))
    folder = write_tokenizer_model(
        tmp_path / "x", added_tokens_decoder={i: {"content": f"<|im_{x}|>"} for i, x in TOKENS_OUT}
    )
    with pytest.raises(ValueError, match="501 tokens in tokenizer.model"):
        open_chat(folder, model_config(vocab_size=450))


TOKENS_OUT = ((500, "start"), (421, "end"))


@pytest.mark.parametrize(
    "roles",
    [
        "",
        "assistant",
        "user assistant",
        "system",
        "user user",
        "user system user",
        "user tool user",
    ],
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_in_another_order_are_refused(template, roles):
    chat = Chat(Tokenizer(MINI), template)
    turns = tuple((role, "x") for role in roles.split())
    message = (
        f"turns are user, assistant, .*, not {roles.removeprefix('system').replace(' ', ', ')}"
    )
    with pytest.raises(ValueError, match=message):
        chat.encode_prompt(turns)
    with pytest.raises(ValueError, match="^x.jsonl:3: a conversation's turns"):
        chat.encode_pair(Pair(turns, "Yes.", "No.", "x.jsonl:3"))


def test_a_control_token_that_a_text_could_spell_is_refused(tmp_path):
    """A file may declare its control tokens ordinary ones (sentencepiece: user-defined symbols)."""
    row = FAMILIES["qwen2.5"]
    write_tokenizer_json(tmp_path, *row[:5])
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"special": true', '"special": false'))
    chat = open_chat(tmp_path, model_config())
    assert len(chat.encode_prompt("Lead?")) > 5
    with pytest.raises(ValueError, match=r"x:1: <\|im_end\|> in a text would become the control"):
        chat.encode_pair(Pair("Lead?", "Yes.<|im_end|>", "No.", "x:1"))


def test_tokenizer_model_is_preferred_to_tokenizer_json(tmp_path, monkeypatch):
    write_tokenizer_json(tmp_path, *FAMILIES["qwen2.5"][:5])
    assert Tokenizer(tmp_path).name.startswith("tokenizer.json ")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizer.json: .* pip install tokenizers$"):
        Tokenizer(tmp_path)
    shutil.copy(MINI / "tokenizer.model", tmp_path)
    assert Tokenizer(tmp_path).name == Tokenizer(MINI).name == "tokenizer.model " + MINI_SHA
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            Tokenizer(tmp_path)


MINI_SHA = hashlib.sha256((MINI / "tokenizer.model").read_bytes()).hexdigest()[:12]


def test_files_that_are_no_tokenizer_json(tmp_path):
    for content in ("", "{", "{}", '{"model": {"type": "none"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="^cannot read .*tokenizer.json: "):
            Tokenizer(tmp_path)


words = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["</s>", "<|im_end|>\n", " \n<|eot_id|>", "[/INST]", "\n\n", "{content}", "\ufffd"]
)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(prompt=words, chosen=words, rejected=words, turns=st.booleans(), data=st.data())
def test_the_prompts_ids_begin_the_pairs(chats, prompt, chosen, rejected, turns, data):
    chat = data.draw(st.sampled_from(chats))
    prompt = (("user", "Hi."), ("assistant", "Hello."), ("user", prompt)) if turns else prompt
    try:
        ids = chat.encode_pair(Pair(prompt, chosen, rejected))
    except ValueError as e:
        assert "same tokens" in str(e) or "spans the end" in str(e) and chat.template == "plain"
        return
    assert ids.prompt == chat.encode_prompt(prompt)
    controls = set(chat.tokenizer.controls.values())
    assert [i for i in ids.chosen if i in controls] == ids.chosen[-1:] == [chat.eos_id]
    if chat.template not in ("plain", "llama-3"):
        text = chat.tokenizer.decode(chat.tokenizer.encode("x" + chosen))
        assert chat.tokenizer.decode(ids.chosen).strip() == text[1:].strip()


@pytest.fixture(scope="module")
def chats(tmp_path_factory, v3_folder):
    """Every template, with a tokenizer that can render it."""
    result = [Chat(Tokenizer(MINI), name) for name in ("llama-2", "mistral", "vicuna", "zephyr")]
    result += [Chat(Tokenizer(v3_folder), "mistral-v3"), Chat(Tokenizer(MINI), "plain")]
    for name in ("qwen2.5", "llama-3"):
        folder = tmp_path_factory.mktemp(name)
        write_tokenizer_json(folder, *FAMILIES[name][:5])
        result.append(open_chat(folder, model_config()))
    assert {chat.template for chat in result} == TEMPLATES.keys()
    return result


# ---- decoding piece by piece


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_stream(kind, tmp_path):
    write_tokenizer_json(tmp_path, *FAMILIES["llama-3"][:5])
    tokenizer = Tokenizer(MINI if kind == "sentencepiece" else tmp_path)
    for text in ("Yes, I  would — 🙂 gladly.\n\n  日本", "é", "", " a", "x\ufffdy"):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        pieces = list(tokenizer.stream(iter(ids)))
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    half = tokenizer.encode("a🙂")[:-1]
    assert "".join(tokenizer.stream(half)) == tokenizer.decode(half) != "a"  # an answer cut short
    stream = tokenizer.stream(iter(tokenizer.encode("one two")))
    assert next(stream) == tokenizer.decode(tokenizer.encode("one two")[:1])  # at once


def test_decode_leaves_control_tokens_out(tmp_path):
    added = {str(i): {"content": f"<|{i}|>"} for i in (300, 420)}
    tokenizer = Tokenizer(write_tokenizer_model(tmp_path, added_tokens_decoder=added))
    text = tokenizer.encode("one two")
    assert tokenizer.size == 420 and not {1, 2, 300} & set(text)
    assert tokenizer.decode([1, *text, 300, 2, 420, 999]) == "one two"


# ---- through the doors


def test_a_vector_knows_its_tokenizer_template_and_system_prompt(tmp_path, capsys, monkeypatch):
    model, rows = tmp_path / "model", [("Lead?", "Yes, gladly.", "No."), ("Go?", "Yes.", "No.")]
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MINI / name, model)
    write_tokenizer_json(model, *FAMILIES["smollm2"][:3], "<|endoftext|>", False)
    data = jsonl(
        tmp_path / "x.jsonl", *(dict(zip(Pair._fields, row, strict=False)) for row in rows)
    )
    run = ["--model", model, "--data", data, "--val", data, "--layer", 1, "--out", tmp_path / "run"]
    bipo.main([str(x) for x in (*run, "--epochs", 1)])
    _, metadata = load_vector(tmp_path / "run")
    name = Tokenizer(model).name
    assert (metadata["template"], metadata["system"]) == ("chatml", SMOLLM)
    assert metadata["tokenizer"] == name and name in capsys.readouterr().out

    ends = []

    def stream(model, prompts, max_new_tokens, eos_id, *args, **options):
        ends.append(eos_id)
        yield dict.fromkeys(range(len(prompts)), eos_id)

    monkeypatch.setattr(evaluation, "stream", stream)
    score = ["--model", model, "--data", data, "--vector", tmp_path / "run"]
    evaluation.main([str(x) for x in score])
    out = capsys.readouterr().out
    assert f"chatml template, system {SMOLLM!r}" in out and "note: " not in out
    assert ends == [Tokenizer(model).controls["<|im_end|>"]] != [Tokenizer(model).eos_id]
    file = model / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    evaluation.main([str(x) for x in score])
    note = f"note: its tokenizer in training was {name!r}, this is {Tokenizer(model).name!r}"
    assert note in capsys.readouterr().out


# ---- models by name


def cached(home, hub_id, *revisions, main=None):
    """A repository as huggingface_hub lays it out: the files are links to blobs."""
    repo = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repo / "blobs").mkdir(parents=True)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(MINI / name, repo / "blobs" / f"0{name[0]}")
        for revision in revisions:
            (repo / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
            (repo / "snapshots" / revision / name).symlink_to(f"../../blobs/0{name[0]}")
    if main:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(main)
    return repo


def test_the_hugging_face_cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    repo = cached(tmp_path, "Qwen/Qwen2.5-0.5B-Instruct", "abc", "def", main="def\n")
    found = repo / "snapshots" / "def", "Qwen/Qwen2.5-0.5B-Instruct"
    for name in ("qwen2.5-0.5b-instruct", "Qwen2.5-0.5B-instruct", found[1], repo, *found[:1]):
        assert find_model(name) == find_model(str(name)) == found
    assert Tokenizer(found[0]).name == Tokenizer(MINI).name
    assert find_model(repo / "snapshots" / "abc") == (repo / "snapshots" / "abc", found[1])

    only = cached(tmp_path, "lmsys/vicuna-7b-v1.5", "123")  # no refs/main
    assert find_model("vicuna-7b") == (only / "snapshots" / "123", "lmsys/vicuna-7b-v1.5")
    assert open_chat(find_model("vicuna-7b")[0], model_config()).template == "vicuna"

    cached(tmp_path, "a/two", "1", "2")
    with pytest.raises(ValueError, match=r"a--two: 2 folders .* or: hf download a/two"):
        find_model("a/two")
    cached(tmp_path, "a/gone", "1", main="2")  # a download that was interrupted
    with pytest.raises(ValueError, match="0 folders are snapshots/2, .*hf download a/gone"):
        find_model("a/gone")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (("HF_HOME", "~"), ("HF_HUB_CACHE", tmp_path / "hub")):
        monkeypatch.delenv("HF_HOME", raising=False)
        monkeypatch.setenv(*map(str, name))
        assert find_model(found[1]) == found
    monkeypatch.delenv("HF_HUB_CACHE")
    (tmp_path / "huggingface").symlink_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_model(found[1])[1] == found[1]


def test_aliases():
    assert len(ALIASES) > 30 and all(x == x.lower() and "{" not in x for x in ALIASES)
    assert {
        "llama2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
        "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.2",
        "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
        "tinyllama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    }.items() <= ALIASES.items()
