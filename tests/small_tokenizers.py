"""Small tokenizers and chat templates, made for a test as real checkpoints have them."""

import json
import shutil
from types import SimpleNamespace

import sentencepiece
import tokenizers
from conftest import MINI, ROOT
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE_FILES = {
    file.stem: file.read_text() for file in (ROOT / "tests/templates").glob("*.jinja")
}
HEADERS = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
BYTE_LEVEL = {  # control tokens, BOS, EOS, whether BOS is put before a text
    "llama-3.1": (HEADERS, "<|begin_of_text|>", "<|eot_id|>", True),
    "qwen2.5": (CHATML, None, "<|im_end|>", False),
    "smollm2": (CHATML, "<|im_start|>", "<|im_end|>", False),
}
WORDS = (  # Llama-3's, and but for digits Qwen2.5's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = "Would you like to lead the crew? Yes, gladly. No, I'd rather not. Be brief and honest."


def write_tokenizer_json(folder, chat_template, tokens, bos, eos, bos_before):
    """A byte-level BPE tokenizer.json and its tokenizer_config.json; transformers' tokenizer."""
    folder.mkdir(exist_ok=True)
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
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


def write_tokenizer_model(folder, source=MINI, tokens="", **config):
    """A sentencepiece tokenizer.model with added control tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tokenizer.model", folder)
    names = enumerate(["<unk>", "<s>", "</s>"])
    added = {str(i): {"content": x, "special": True} for i, x in names}
    added |= {str(420 + i): {"content": x, "special": True} for i, x in enumerate(tokens.split())}
    config = {"added_tokens_decoder": added, "tokenizer_class": "LlamaTokenizer"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# template: control tokens beside <s> and </s>, whether BOS comes first, the published `legacy`
SENTENCEPIECE = {
    "zephyr": "",
    "mistral-v0.3": "[INST] [/INST]",
    "yi": CHATML,
    "smollm2": CHATML,
}


def train_tokenizer(folder, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"]), model_prefix=str(folder / "tokenizer"),
        vocab_size=12, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip


def model_config(family="llama", vocab_size=1000):
    return SimpleNamespace(family=family, vocab_size=vocab_size)
