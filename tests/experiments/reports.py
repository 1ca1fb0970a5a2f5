"""Markdown tables, and their places in RESULTS.md and REAL.md: what the other programs share."""

import re


def markdown(headings, rows):
    """A table of cells that are texts; the numbers in all columns but the first stand right."""
    alignment = [":---"] + ["---:"] * (len(headings) - 1)
    lines = [headings, alignment, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_block(commands):
    """A block of Markdown that shows how commands of ours are called."""
    lines = "\n".join(f"python {command}" for command in commands)
    return f"```\n{lines}\n```"


def put(report, name, text):
    """The report with a text in the place between its lines `<!-- NAME -->` and `<!-- end -->`.
    Raises ValueError if it has no such place."""
    before, mark, rest = report.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError(f"the report has no lines <!-- {name} --> and <!-- end -->")
    return f"{before}{mark}{text}\n{end}{after}"


def python_block(document, part):
    """The one block of Python in a Markdown text that holds this part."""
    blocks = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (block,) = (block for block in blocks if part in block)
    return block
