"""Chat templates: prompts and answers as ids, against transformers' apply_chat_template.

tests/templates holds the chat templates of real checkpoints; the tokenizers are small ones."""

import hashlib
import json

import pytest
from conftest import MINI, messages, refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    BYTE_LEVEL,
    CHATML,
    HEADERS,
    SENTENCEPIECE,
    TEMPLATE_FILES,
    model_config,
    write_tokenizer_json,
    write_tokenizer_model,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from data import RECIPES, SYSTEM, Chat, Pair, Tokenizer, encode_pairs, open_chat, read_pairs

ONE = (("user", "Would you lead?"),)
MORE = (*ONE, ("assistant", "Yes, gladly."), ("user", "And now?"))
BRIEF = ("system", "Be brief.")
PADDED = (
    ("system", " Be\nbrief.\n"),
    ("user", "\n Would you  lead? "),
    *MORE[1:2],
    ("user", " So?\n\n"),
)
PROMPTS = [ONE, MORE, (BRIEF, *ONE), (BRIEF, *MORE), PADDED, (("system", ""), *ONE)]
ANSWERS = ("Yes, gladly.", " No, I'd rather not.\n", "\ue0000\ue001 \ue000")


def render(chat, prompt):
    """The text of a prompt as the template writes it."""
    return "".join(chat.split(prompt))


def assert_ids_are_transformers(chat, oracle, turns, spans=False):
    """Of the prompt, and of the prompt, an answer and the token that ends it."""
    prompt = oracle.apply_chat_template(
        messages(turns), add_generation_prompt=True, return_dict=False
    )
    assert chat.encode_prompt(turns) == prompt and len(prompt) > 8
    ours, responses = chat.encode_responses(turns, ANSWERS)
    assert ours == prompt
    for response, text in zip(responses, ANSWERS, strict=True):
        both = messages([*turns, ("assistant", text)])
        full = oracle.apply_chat_template(both, return_dict=False)
        rest = full[len(prompt + response) :]
        assert full == prompt + response + rest
        assert response[-1] == chat.eos_id and oracle.decode(rest).strip() == ""


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def byte_level(request, tmp_path_factory):
    """(our Chat by default, transformers' tokenizer, the control tokens) of a checkpoint with a
    byte-level tokenizer.json."""
    row, folder = BYTE_LEVEL[request.param], tmp_path_factory.mktemp(request.param)
    oracle = write_tokenizer_json(folder, TEMPLATE_FILES[request.param], *row)
    return open_chat(folder, model_config()), oracle, row[0]


# ---- the same ids as transformers


@pytest.mark.parametrize("turns", PROMPTS)
def test_byte_level_ids(byte_level, turns):
    chat, oracle, _ = byte_level
    assert chat.template.startswith("own ") and chat.system is None
    assert_ids_are_transformers(chat, oracle, turns)
    if len(turns) == 1:
        assert chat.encode_prompt(turns[0][1]) == chat.encode_prompt(turns)
    if turns[0][0] == "system":  # the flag is the same as a turn, and a turn wins
        system = turns[0][1]
        assert chat._replace(system=system).encode_prompt(turns[1:]) == chat.encode_prompt(turns)
        assert chat._replace(system="x").encode_prompt(turns) == chat.encode_prompt(turns)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("template", SENTENCEPIECE)
def test_sentencepiece_ids(template, kind, legacy, tmp_path):
    """Before a text after a control token the tokenizer puts a space if it is `legacy`; the answer
    is tokenised jointly with what the template writes before it."""
    folder = write_tokenizer_model(
        tmp_path, MINI, SENTENCEPIECE[template], legacy=legacy,
        chat_template=TEMPLATE_FILES[template],
    )  # fmt: skip
    oracle = LlamaTokenizer.from_pretrained(folder)
    if kind == "tokenizer.json":  # with Metaspace's prepend_scheme, always or first
        oracle.save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
        assert f'"{"always" if legacy else "first"}"' in (folder / kind).read_text()
    chat = open_chat(folder, model_config())
    assert chat.tokenizer.name.startswith(kind) and chat.template.startswith("own ")
    assert chat.encode_prompt("A")[:1] == [1] or template != "mistral-v0.3"
    for turns in PROMPTS:
        if (template, turns[0][0]) != ("mistral-v0.3", "system"):
            assert_ids_are_transformers(chat, oracle, turns)
            continue
        # with an answer the template loses the system prompt; alone it is what it should be
        theirs = oracle.apply_chat_template(
            messages(turns), add_generation_prompt=True, return_dict=False
        )
        prompt, (response,) = chat.encode_responses(turns, [" Yes, gladly.\n"])
        assert prompt == theirs
        assert response == chat.encode_responses("Hi", ["Yes, gladly."])[1][0]


def test_the_longest_control_token_is_taken(tmp_path):
    folder = write_tokenizer_model(
        tmp_path, tokens="<|im <|im_start|> <|im_end|> |>", chat_template=TEMPLATE_FILES["yi"]
    )
    oracle = LlamaTokenizer.from_pretrained(folder, legacy=True)
    chat = open_chat(folder, model_config())
    assert_ids_are_transformers(chat, oracle, MORE)
    assert 421 in chat.encode_prompt("Hi") and 420 not in chat.encode_prompt("Hi")


def test_normalizer_that_puts_a_space_before_each_text(tmp_path):
    """As in the tokenizer.json of Llama-2, TinyLlama and Zephyr."""
    folder = write_tokenizer_model(tmp_path, legacy=True, chat_template=TEMPLATE_FILES["zephyr"])
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    file = json.loads((folder / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace]
    file |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATE_FILES["zephyr"],
    )  # fmt: skip
    chat = open_chat(folder, model_config())
    for turns in PROMPTS:
        assert_ids_are_transformers(chat, oracle, turns)


def test_the_environment_is_transformers(tmp_path):
    """Blocks for a trainer's mask, loop controls, tojson, special tokens; no tools."""
    template = (
        "{{ {'b': '<é>', 'a': [1]} | tojson }}{{ [tools, documents] | tojson(indent=1) }}"
        "{%- for m in messages %}\n    {%- if loop.index > 3 %}{% break %}{% endif %}\n"
        "  {% if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}\n{% else %}\n{{ pad_token + unk_token + m.content }}\n  {% endif %}"
        "{% endfor %}"
    )
    folder = write_tokenizer_model(
        tmp_path, tokens="[PAD]", chat_template=template, pad_token="[PAD]",
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", legacy=True,
    )  # fmt: skip
    oracle = LlamaTokenizer.from_pretrained(folder)
    chat = open_chat(folder, model_config("other"), "own")
    theirs = oracle.apply_chat_template(
        messages(MORE), add_generation_prompt=True, return_dict=False
    )
    assert chat.encode_prompt(MORE) == theirs and "<é>" in oracle.decode(theirs)


# ---- the same ids as the official trainer

TOKENIZER = Tokenizer(MINI)


def test_ids_are_the_official_trainers():
    rows = json.loads((MINI / "trace.json").read_text())["rows"]
    chat, pairs = Chat(TOKENIZER), read_pairs(MINI / "train.csv")
    assert len(rows) == len(pairs) == 11
    for i, pair in enumerate(pairs):
        row, ids = rows[str(i)], chat.encode_pair(pair)
        assert "".join(chat.split(pair.prompt)) == "<s>" + row["prompt"]
        assert ids.prompt == row["prompt_ids"]
        assert ids.prompt + ids.chosen == row["chosen_ids"]
        assert ids.prompt + ids.rejected == row["rejected_ids"]
        assert len(ids.prompt) == row["chosen_start"] == row["rejected_start"]


def test_templates():
    def render(template, system):
        return "".join(Chat(TOKENIZER, template, system).split("Hi {there}"))

    s = "<<SYS>>\nS {x}\n<</SYS>>\n\n"
    assert render("llama-2", "S {x}") == f"<s>[INST] {s}Hi {{there}} [/INST]"
    assert render("mistral", "S {x}") == "<s>[INST] S {x}\nHi {there} [/INST]"
    assert render("llama-2", "") == render("mistral", "") == "<s>[INST] Hi {there} [/INST]"


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_recipes_with_more_turns():
    """As FastChat renders them, with the system prompt in the first turn and BOS as ids."""
    turns, pieces = (BRIEF, *MORE), Tokenizer(MINI).encode
    rendered = {
        "llama-2": [
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWould you lead? [/INST] Yes, gladly. ",
            2, 1, "[INST] And now? [/INST]",
        ],
        "mistral": [
            "[INST] Be brief.\nWould you lead? [/INST] Yes, gladly.", 2, "[INST] And now? [/INST]"
        ],
        "vicuna": [
            "Be brief. USER: Would you lead? ASSISTANT: Yes, gladly.",
            2, "USER: And now? ASSISTANT:"
        ],
        "plain": ["Be brief.\n\nWould you lead?Yes, gladly.\n\nAnd now?"],
    }  # fmt: skip
    for name in RECIPES:
        ids = [1]
        for piece in rendered[name]:
            ids += [piece] if isinstance(piece, int) else pieces(piece)
        assert Chat(Tokenizer(MINI), name, "x").encode_prompt(turns) == ids
        prompt, (response,) = Chat(Tokenizer(MINI), name, "").encode_responses(MORE, ["Yes. "])
        last = rendered[name][-1] if name != "plain" else "Would you lead?Yes, gladly.\n\nAnd now?"
        joint = pieces(last + " " * (name != "plain") + "Yes. ")[len(pieces(last)) :]
        assert response == [*joint, 2]
        assert Chat(Tokenizer(MINI), name, "").eos_id == 2


def test_the_recipes_ids_do_not_depend_on_legacy(tmp_path):
    """The official trainer tokenised the text behind BOS on its own."""
    llama_2 = TEMPLATE_FILES["llama-2"]
    folder = write_tokenizer_model(tmp_path, legacy=False, chat_template=llama_2)
    chat = open_chat(folder, model_config())
    assert chat.template == "llama-2"
    pair = Pair((BRIEF, *MORE), "Yes.", "No.")
    assert chat.encode_pair(pair) == Chat(Tokenizer(MINI)).encode_pair(pair)


def test_plain_adds_nothing_but_bos(tmp_path, byte_level):
    chat, oracle, tokens = byte_level
    plain = Chat(chat.tokenizer, "plain", "")
    before = [oracle.bos_token_id] if oracle.bos_token else []
    text = oracle("A: b", add_special_tokens=False).input_ids
    assert plain.encode_prompt("A: b") == before + text
    pair = plain.encode_pair(Pair("A:", " b", " c"))
    assert pair.prompt + pair.chosen == before + text + [oracle.eos_token_id]
    chat = open_chat(write_tokenizer_model(tmp_path / "x"), model_config(), "plain")
    assert chat.encode_prompt("A: b") == [1, *chat.tokenizer.encode("A: b")]


# ---- where a prompt ends and an answer begins

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(deadline=None, max_examples=200)
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT, template=st.sampled_from(["llama-2", "mistral"]))
def test_training_and_generation_see_the_same_prompt_ids(prompt, chosen, rejected, template):
    chat = Chat(TOKENIZER, template)
    assume(TOKENIZER.encode(" " + chosen) != TOKENIZER.encode(" " + rejected))
    ids = chat.encode_pair(Pair(prompt, chosen, rejected))
    assert ids.prompt == chat.encode_prompt(prompt)
    for response, text in ((ids.chosen, chosen), (ids.rejected, rejected)):
        assert response[-1] == chat.eos_id == TOKENIZER.controls["</s>"]
        joint = TOKENIZER.encode("".join(chat.split(prompt)).removeprefix("<s>") + " " + text)
        assert ids.prompt[1:] + response[:-1] == joint


ODD_TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    [
        "</s>",
        "<|im_end|>\n",
        " \n<|eot_id|>",
        "[/INST]",
        "\n\n",
        "{{ x }}",
        "\ufffd",
        "\ue0000\ue001",
    ]
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Every kind of template, with a tokenizer that can render it."""
    result = [Chat(Tokenizer(MINI), name) for name in RECIPES]
    for name, tokens in SENTENCEPIECE.items():
        folder = write_tokenizer_model(
            tmp_path_factory.mktemp(name), tokens=tokens, chat_template=TEMPLATE_FILES[name]
        )
        result.append(open_chat(folder, model_config()))
    for name, row in BYTE_LEVEL.items():
        folder = tmp_path_factory.mktemp(name)
        write_tokenizer_json(folder, TEMPLATE_FILES[name], *row)
        result.append(open_chat(folder, model_config()))
    return result


@settings(deadline=None, max_examples=60)
@given(prompt=ODD_TEXT, chosen=ODD_TEXT, rejected=ODD_TEXT, turns=st.booleans(), data=st.data())
def test_the_prompts_ids_begin_the_pairs(chats, prompt, chosen, rejected, turns, data):
    chat = data.draw(st.sampled_from(chats))
    prompt = (("user", "Hi."), ("assistant", "Hello."), ("user", prompt)) if turns else prompt
    try:
        ids = chat.encode_pair(Pair(prompt, chosen, rejected))
    except ValueError as e:
        refused_text = "holds a control token" in str(e) and not chat.tokenizer.spliced
        assert refused_text or "same tokens" in str(e) or "spans the prompt's end" in str(e)
        return
    assert ids.prompt == chat.encode_prompt(prompt)
    controls = set(chat.tokenizer.controls.values())
    assert [i for i in ids.chosen if i in controls] == ids.chosen[-1:] == [chat.eos_id]
    text = chat.tokenizer.decode(chat.tokenizer.encode("x" + chosen))
    assert chat.tokenizer.decode(ids.chosen).strip() == text[1:].strip()


def test_a_system_prompt_that_the_template_moves_is_no_part_of_the_response(tmp_path):
    """Mistral v0.3's stands in the last turn, if that is the user's."""
    template = TEMPLATE_FILES["mistral-v0.3"]
    folder = write_tokenizer_model(tmp_path, tokens="[INST] [/INST]", chat_template=template)
    chat = open_chat(folder, model_config(), system="Be brief.")
    assert render(chat, "Lead?") == "<s>[INST] Be brief.\n\nLead?[/INST]"
    bare = chat._replace(system=None)
    assert chat.encode_responses("Lead?", ["Yes"])[1] == bare.encode_responses("Lead?", ["Yes"])[1]


def test_chatml_on_sentencepiece_keeps_the_line_break_and_the_answer_together(tmp_path):
    """Not ▁Yes, which the model never writes after a line break; and the tokens may stand in
    added_tokens.json only."""
    folder = write_tokenizer_model(tmp_path, tokens=CHATML, chat_template=TEMPLATE_FILES["yi"])
    chat = open_chat(folder, model_config())
    prompt, (response,) = chat.encode_responses("Lead?", ["Yes"])
    joint = chat.tokenizer.encode("assistant\nYes")
    alone = chat.tokenizer.encode("assistant\n")
    assert prompt[-len(alone) :] == alone and response == joint[len(alone) :] + [422]
    assert response[:-1] != chat.tokenizer.encode("Yes")
    added = {token: 420 + i for i, token in enumerate(CHATML.split())}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = {"chat_template": TEMPLATE_FILES["yi"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_chat(folder, model_config()).encode_responses("Lead?", ["Yes"]) == (
        prompt,
        [response],
    )


def test_a_response_that_begins_with_a_newline_does_not_touch_the_prompt(byte_level):
    """Byte-level tokens could reach across; the response is then encoded apart."""
    chat, oracle, _ = byte_level
    ids = chat.encode_pair(Pair("Lead?", "\n\nYes.", "No."))
    assert ids.prompt == chat.encode_prompt("Lead?")
    assert len(oracle.tokenize("\n\n")) == 1
    text = "Yes." if "header" in chat.source else "\n\nYes."  # Llama-3's strips
    assert ids.chosen == [*oracle(text, add_special_tokens=False).input_ids, chat.eos_id]


def test_pair_longer_than_the_context_is_named():
    pair = Pair("word " * 50, "Yes.", "No.", "x.jsonl:7")
    n = len(Chat(TOKENIZER).encode_prompt(pair.prompt)) + 1
    with pytest.raises(ValueError, match=rf"x.jsonl:7: too long: {n + 2} tokens"):
        Chat(TOKENIZER).encode_pair(pair, max_seq_len=n)


def test_a_text_becomes_no_control_token(byte_level, tmp_path):
    """With tokenizer.json one that spells such a token is refused, with tokenizer.model it stays
    text; and so do marks like those that stand for texts."""
    chat, oracle, tokens = byte_level
    for token in tokens.split():
        for prompt in (
            f"Say {token}.",
            (("system", token), *ONE),
            (*ONE, ("assistant", token), *ONE),
        ):
            refused(
                lambda prompt=prompt: chat.encode_prompt(prompt), "a text holds a control token"
            )
        pair = Pair("Lead?", "Yes.", f"No.{token}", "x.jsonl:3")
        refused(lambda pair=pair: chat.encode_pair(pair), "x.jsonl:3: a text holds a control token")
        kept, _ = encode_pairs(chat, [pair, pair._replace(rejected="No.")], 512, skip_bad=True)
        assert [pair.rejected for pair in kept] == ["No."]

    text = "</s>{{ x }}{content} \ue0000\ue001\ue0001\ue001\ue000999\ue001"
    assert text in oracle.decode(chat.encode_prompt(text))
    spm = open_chat(write_tokenizer_model(tmp_path), model_config())
    assert [i for i in spm.encode_prompt("</s>[INST]<s>") if i < 3] == [1]
    assert spm.encode_responses("x", ["</s>"])[1][0].count(2) == 1


# ---- templates that are refused

PARTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}",
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}A:{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }", "template fails: unexpected '}'"),
        ("{{ raise_exception('no\nsystem') }}", "template fails: no system$"),
        ("{{ messages.__class__.__mro__ }}", "template fails: access to attribute '__class__'"),
        (
            PARTS[0] + "A:{{ m.content }}" + PARTS[1] + PARTS[2],
            "ends an answer with no control token: give --template a .jinja",
        ),
        (
            PARTS[0] + "B:{{ m.content + eos_token }}" + PARTS[1] + PARTS[2],
            "the chat template writes no answer after its 'HelloA:'",
        ),
        (
            PARTS[0] + "A:{{ bos_token + m.content + eos_token }}" + PARTS[1] + PARTS[2],
            "looks into the texts, or begins '-' with a token",
        ),
        (
            PARTS[0] + "A:{{ m.content.upper() + eos_token }}" + PARTS[1] + PARTS[2],
            "looks into the texts",
        ),
        ("{{ messages[0].content[:2] + eos_token }}", "looks into the texts"),
        ("{{ sep_token }}{{ messages[0].content }}", "template fails: 'sep_token' is undefined"),
        ("{{ '\ue0000\ue001' }}{{ messages[0].content }}", "looks into the texts"),
    ],
)
def test_templates_that_are_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        folder = write_tokenizer_model(tmp_path, chat_template=template)
        open_chat(folder, model_config()).answer("Hello", "Hi")


def test_a_system_prompt_that_the_template_leaves_out_is_refused(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "{% elif m.role == 'assistant' %} {{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    folder = write_tokenizer_model(tmp_path, chat_template=template)
    chat = open_chat(folder, model_config())
    reason = "this chat template has no system turn: it leaves out the text"
    refused(lambda: open_chat(folder, model_config(), system="Be brief."), reason)
    refused(lambda: chat.encode_pair(Pair((BRIEF, *ONE), "a", "b", "x:1")), f"x:1: {reason}")
    assert chat.encode_prompt((("system", " "), *ONE)) == chat.encode_prompt(ONE)


def test_a_template_file_that_writes_its_indentation_is_refused(tmp_path):
    """As people lay one out for reading; transformers would write the blanks too."""
    file = tmp_path / "pretty.jinja"
    file.write_text("{% for m in messages %}\n    {{ m.content + eos_token }}\n{% endfor %}")
    refused(
        lambda: open_chat(MINI, model_config(), str(file)),
        f"{file} writes the blanks that indent it: use {{{{- and -}}}}",
    )
    file.write_text("{% for m in messages %}\n    {{- m.content + eos_token -}}\n{% endfor %}")
    assert render(open_chat(MINI, model_config(), str(file)), "Lead?") == "Lead?</s>"


def test_a_template_may_end_an_answer_only_if_it_asks_for_none(tmp_path):
    template = (
        PARTS[0] + "A:{{ m.content }}" + PARTS[1]
        + "{% if add_generation_prompt %}A:{% else %}{{ eos_token }}{% endif %}"
    )  # fmt: skip
    chat = open_chat(write_tokenizer_model(tmp_path, chat_template=template), model_config())
    assert chat.split("Q") == ["QA:"] and chat.answer("Q", "Yes.") == ("Yes.", "</s>")


def test_a_template_that_cuts_an_answer_is_refused_where_it_does(tmp_path):
    """As of models that think: nothing before </think> is kept."""
    template = (
        PARTS[0] + "A:{{ m.content.split('</think>')[-1] + eos_token }}" + PARTS[1] + PARTS[2]
    )
    chat = open_chat(write_tokenizer_model(tmp_path, chat_template=template), model_config())
    assert chat.encode_pair(Pair("Q", "Yes.", "No."))
    with pytest.raises(ValueError, match="x:1: the chat template looks into the texts"):
        chat.encode_pair(Pair("Q", "Well.</think>Yes.", "No.", "x:1"))


ORDERS = [
    "",
    "assistant",
    "user assistant",
    "system",
    "user user",
    "user system user",
    "user tool user",
]


@pytest.mark.parametrize("roles", ORDERS)
@pytest.mark.parametrize("template", RECIPES)
def test_conversations_in_another_order_are_refused(template, roles):
    chat = Chat(Tokenizer(MINI), template)
    turns = tuple((role, "x") for role in roles.split())
    message = f"turns are user, assistant, .*, not {roles!r}$"
    with pytest.raises(ValueError, match=message):
        chat.encode_prompt(turns)
    with pytest.raises(ValueError, match="^x.jsonl:3: turns are user, "):
        chat.encode_pair(Pair(turns, "Yes.", "No.", "x.jsonl:3"))


def test_the_clock_is_never_asked(tmp_path):
    """A template takes the date that it has for want of a clock."""
    row = BYTE_LEVEL["llama-3.1"]
    write_tokenizer_json(tmp_path / "a", TEMPLATE_FILES["llama-3.2"], *row)
    write_tokenizer_json(tmp_path / "b", TEMPLATE_FILES["llama-3.1"], *row)
    new, old = (open_chat(tmp_path / name, model_config()) for name in "ab")
    assert new.encode_prompt(MORE) == old.encode_prompt(MORE)
    assert "Today Date: 26 Jul 2024\n" in render(new, "x")
    write_tokenizer_json(tmp_path / "c", "{{ strftime_now('%d') }}{{ eos_token }}", *row)
    with pytest.raises(ValueError, match="template fails: 'strftime_now' is undefined"):
        open_chat(tmp_path / "c", model_config())


# ---- which template


def test_template_by_the_checkpoints_own_files(tmp_path, capsys):
    def chosen(name, own=None, family="llama", jinja="", tokens="", **config):
        folder = write_tokenizer_model(tmp_path / name, MINI, tokens, chat_template=own, **config)
        if jinja:
            (folder / "chat_template.jinja").write_text(jinja)
        return open_chat(folder, model_config(family))[1:3]

    def own(template):
        return "own " + hashlib.sha256(template.encode()).hexdigest()[:12], None

    files = TEMPLATE_FILES
    assert chosen("llama2", files["llama-2"], "mistral") == ("llama-2", SYSTEM)
    for name in ("mistral-v0.1", "mistral-v0.2", "mistral-v0.2-2024"):
        assert chosen(name, files[name]) == ("mistral", SYSTEM)
    for name in ("zephyr", "mistral-v0.3", "yi", "llama-3.1"):
        assert chosen("vicuna-as-" + name, files[name], tokens=f"{CHATML} {HEADERS}") == own(
            files[name]
        )
    tulu = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + (eos_token if " \
        "m.role == 'assistant' else '\n') }}{% endfor %}" \
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"  # fmt: skip
    assert chosen("tulu", tulu) == own(tulu)
    llama_2_without_bos = files["llama-2"].replace("bos_token + ", "")
    assert chosen("no-bos", llama_2_without_bos) == own(llama_2_without_bos)
    one_bos = files["llama-2"].replace("bos_token + ", "(bos_token if loop.first else '') + ")
    assert chosen("one-bos", one_bos) == own(one_bos)
    assert chosen("in-a-file", files["llama-2"], jinja=files["zephyr"]) == own(files["zephyr"])
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": files["yi"]}]
    assert chosen("several", several, tokens=CHATML) == own(files["yi"])
    notes = capsys.readouterr().out
    assert notes.count("note: ") == notes.count(" gets the recipe ") == 4
    assert notes.count("its system prompt; --template own takes the model's") == 4
    # no chat_template: a plain Llama, or Vicuna by its name, or refused
    assert chosen("llama2-base") == ("llama-2", SYSTEM)
    assert "note: " in (out := capsys.readouterr().out) and "so llama-2 is taken" in out
    assert chosen("padded", tokens="<pad>") == ("llama-2", SYSTEM)
    vicuna = chosen("models--lmsys--vicuna-7b/snapshots/0")
    assert chosen("Vicuna-7b") == vicuna == ("vicuna", VICUNA)
    assert "so vicuna is taken" in capsys.readouterr().out
    for row in (("mistral-base", None, "mistral"), ("other", None, "other")):
        with pytest.raises(
            ValueError, match=f"{row[0]} has no chat template; --template takes own .* llama-2"
        ):
            chosen(*row)
    with pytest.raises(ValueError, match="has no chat template"):
        chosen("chatml-base", tokens=CHATML)
    with pytest.raises(ValueError, match="has no chat template"):  # none of them is the default
        chosen("only-tools", several[:1], "other")
    write_tokenizer_json(tmp_path / "gpt", None, "<s> </s>", "<s>", "</s>", True)
    with pytest.raises(ValueError, match="gpt has no chat template"):
        open_chat(tmp_path / "gpt", model_config())
    write_tokenizer_json(tmp_path / "base", None, *BYTE_LEVEL["llama-3.1"])
    with pytest.raises(ValueError, match="has no chat template; .* or a .jinja file"):
        open_chat(tmp_path / "base", model_config())


def test_a_template_that_the_user_names(tmp_path, capsys):
    yi, zephyr = TEMPLATE_FILES["yi"], TEMPLATE_FILES["zephyr"]
    folder = write_tokenizer_model(tmp_path / "x", tokens=CHATML, chat_template=yi)
    config, own = model_config(), open_chat(tmp_path / "x", model_config())
    for name in ("own", own.template):  # what the metadata of a vector say
        assert open_chat(folder, config, name)[1:] == own[1:]
    assert open_chat(folder, config, "own", "Be brief.").system == "Be brief."
    assert open_chat(folder, config, "mistral")[1:3] == ("mistral", SYSTEM)
    assert open_chat(folder, config, "llama-2", "")[1:3] == ("llama-2", "")
    file = tmp_path / "my template.jinja"
    file.write_text(zephyr)
    chat = open_chat(folder, config, str(file))
    assert chat.source == zephyr and render(chat, "Hi") == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert open_chat(folder, config, chat.template).template == own.template != chat.template
    assert capsys.readouterr().out == ""  # eval.py says how a vector's template differs
    for name in ("tpyo", " ", "chatml", "ownx"):
        with pytest.raises(ValueError, match=f"no template '{name}' but own .*, llama-2, .*jinja"):
            open_chat(folder, config, name)
    with pytest.raises(ValueError, match="no template 'own' but own .the checkpoint's., llama-2"):
        open_chat(MINI, config, "own")
    with pytest.raises(ValueError, match="cannot read none.jinja: .*No such file"):
        open_chat(MINI, config, "none.jinja")
