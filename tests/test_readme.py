"""What the README shows is what the files hold."""

import io
import re
import tokenize
from ast import AsyncFunctionDef, ClassDef, FunctionDef, Module, get_docstring, parse, walk

import pytest
from conftest import ROOT
from make_tiny import side_shown

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_core_code_is_bipo_pys():
    source = (ROOT / "bipo.py").read_text()
    for part in BLOCKS[0].strip().split("\n\n\n"):
        assert part in source


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(BLOCKS[1], {})
    minus, _, plus = capsys.readouterr().out.splitlines()
    assert side_shown("power", minus) == "against" and side_shown("power", plus) == "for"


def code_lines(source):
    """Lines that hold code: no comments, docstrings, blanks."""
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*skip, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in walk(parse(source)):
        if isinstance(node, Module | ClassDef | FunctionDef | AsyncFunctionDef):
            if get_docstring(node) is not None:
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("name", ["llama.py", "data.py", "bipo.py", "eval.py"])
def test_code_line_counts(name):
    (count,) = re.findall(rf"^\| `{name}` \| (\d+) \|", README, re.MULTILINE)
    assert int(count) == code_lines((ROOT / name).read_text())


def test_every_test_that_is_named_exists():
    for file, test in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", README):
        assert f"def {test}" in (ROOT / file).read_text()
