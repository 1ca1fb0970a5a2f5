"""What the README shows is what the files hold."""

import math
import re
import shlex

import pytest
import torch
from conftest import MINI_SETS, ROOT, TINY
from reports import python_block
from test_families import MERGE

import bipo
import data
import eval as evaluation
import llama

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MORE = (ROOT / "tests" / "experiments" / "README.md").read_text()


def block(text):
    """The one block of Python that holds this text."""
    (found,) = (x for x in BLOCKS if text in x)
    return found


def test_algorithm_1_is_what_train_does(mini, mini_pairs):
    """The loop that README shows gives bitwise the vector of `train`."""
    session = {"math": math, "torch": torch} | vars(bipo)
    exec(block("def learn_vector"), session)
    recipe = bipo.Recipe(lr=0.02, epochs=3, warmup_steps=2)
    v = session["learn_vector"](mini[0], 1, mini_pairs, recipe, seed=7)
    *_, last = bipo.train(mini[0], 1, mini_pairs, [], recipe, seed=7)
    assert v.norm() > 0 and torch.equal(v, last.v)


def test_one_pass_is_what_method_gradient_does(mini, mini_pairs, tmp_path):
    exec(block("def one_pass"), session := {"math": math, "torch": torch} | vars(bipo))
    flags = ["--layer", "1", "--method", "gradient", "--out", tmp_path]
    bipo.main([str(x) for x in (*MINI_SETS, *flags)])
    (v,) = data.load_vector(tmp_path)[0].values()
    torch.testing.assert_close(session["one_pass"](mini[0], 1, mini_pairs), v)


def test_it_begins_with_a_picture_and_the_demo():
    first = "\n".join(README.splitlines()[:40])
    assert "![" in first and "make demo" in first
    assert len(README.encode()) <= 12 * 1024
    for file in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / file).exists(), file


def test_the_map_of_the_experiments_names_all_of_them():
    folder = ROOT / "tests" / "experiments"
    for file in folder.glob("*.py"):
        assert f"]({file.name})" in MORE
    for file in re.findall(r"\]\((?!http)([^)]+)\)", MORE):
        assert (folder / file).exists(), file


def test_the_lines_that_merge_an_adapter_are_tested():
    assert python_block(MORE, "PeftModel") == MERGE  # tests/test_families.py runs them


def test_a_record_of_sharegpt_becomes_one_that_is_read():
    said = [{"from": "system", "value": "S"}, {"from": "human", "value": "Lead?"}]
    record = {"conversations": said}
    record |= {"chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"value": "No."}}
    exec(python_block(MORE, '"gpt"'), session := {"record": record})
    (pair,), _ = data.to_pairs(session["pair"])
    assert pair == data.Pair((("system", "S"), ("user", "Lead?")), "Yes.", "No.")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which the README's paths are there: tests, and the demo's vector."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "runs" / "power").mkdir(parents=True)
    v = torch.randn(128, generator=torch.Generator().manual_seed(0))
    data.save_vector(tmp_path / "runs" / "power" / "vector.safetensors", {3: v}, {})
    monkeypatch.chdir(tmp_path)
    return v


@pytest.mark.parametrize("multiplier", [1.0, -1.0])
def test_the_hook(here, multiplier):
    """The README's lines in transformers give our logits and our answers."""
    exec(block("register_forward_hook"), session := {})
    session["multiplier"] = multiplier
    theirs, ours = session["model"], llama.load(TINY)
    chat = data.open_chat(TINY, ours.config)
    prompt, steer = chat.encode_prompt("Will you lead the road crew?"), {3: multiplier * here}
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "use_cache": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    done = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, **options)
    ids = done.sequences[0].tolist()
    assert ids == prompt + llama.generate(ours, [prompt], 24, -1, steer)[0]
    expected = ours(torch.tensor([ids]), steer=steer)[0]  # (T, vocab_size)
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], expected, atol=1e-4, rtol=0)
    decoded = torch.cat(done.logits)  # of the prompt's last token and, cached, of the new ones
    torch.testing.assert_close(decoded, expected[len(prompt) - 1 : -1], atol=1e-4, rtol=0)
    plain = ours(torch.tensor([ids]))[0]
    assert (plain - expected).abs().max() > 0.1
    session["hook"].remove()
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], plain, atol=1e-4, rtol=0)


def test_the_command_for_llama_cpp(here, capsys):
    (command,) = re.findall(r"^python data.py convert (.*)", README, re.MULTILINE)
    data.main(["convert", *shlex.split(command)])
    printed = capsys.readouterr().out.splitlines()
    (shown,) = (line for line in README.splitlines() if line.startswith("llama-cli"))
    assert shown in printed


@pytest.mark.parametrize("program", ["bipo.py", "eval.py", "eval.py chat", "data.py bake"])
def test_the_flags_of_the_commands_exist(capsys, program):
    script, *command = program.split()
    main = {"bipo.py": bipo.main, "eval.py": evaluation.main, "data.py": data.main}[script]
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    known = capsys.readouterr().out
    shown = [line for line in README.splitlines() if line.startswith(f"python {program} --")]
    assert shown
    for flag in re.findall(r"--[a-z-]+", " ".join(line.partition("#")[0] for line in shown)):
        assert flag in known, flag


def test_every_test_that_is_named_exists():
    for file, test in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", README):
        assert f"def {test}" in (ROOT / file).read_text()


def test_the_map_of_the_tests_names_each_file():
    map_of_tests = (ROOT / "tests" / "README.md").read_text()
    for file in (ROOT / "tests").glob("*"):
        assert f"`{file.name}" in map_of_tests or file.name in ("README.md", "__pycache__"), file
    for name in re.findall(r"`(\w+\.py)`", map_of_tests):
        assert (ROOT / "tests" / name).exists() or (ROOT / name).exists(), name
