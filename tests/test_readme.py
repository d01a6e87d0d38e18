"""README.md prints commands that .ci/run can find, and an example that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


def command(name: str) -> str:
    (block,) = re.findall(rf"^<!-- ci:{name} -->\n```sh\n(.*?)\n```$", README, re.M | re.S)
    return block


@pytest.mark.parametrize(("name", "last"), [("main", "python -m bench"), ("test", "pytest")])
def test_command_is_one_line_from_nothing(name, last):
    line = command(name)
    assert "\n" not in line
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    assert line.endswith(last)


def test_examples_run():
    examples = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    assert len(examples) == 2
    # The second goes on from the first.
    names: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
