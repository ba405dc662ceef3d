"""docs/reliability.md: every fault and promise has its row, and every test that it names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import octavo

ROOT = Path(octavo.__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def names_in(file: str) -> set[str]:
    """The names of a file's tests."""
    tree = ast.parse((ROOT / file).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions)}


def rows(letter: str) -> list[tuple[str, str]]:
    """The rows of a table: number and last cell."""
    found = re.findall(rf"^\| ({letter}\d+) \|.*\| ([^|]+) \|$", PAGE, re.M)
    return [(number, proof) for number, proof in found]


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 60
    assert [f"{file}::{name}" for file, name in named if name not in names_in(file)] == []


def test_every_fault_is_there_once_and_proved_or_put_off_with_a_reason() -> None:
    faults = rows("F")
    assert [number for number, _ in faults] == [f"F{i:02}" for i in range(1, 51)]
    for number, proof in faults:
        assert NAMED.search(proof) or re.match(r"not yet: needs \w+", proof), number


def test_every_promise_is_shown_by_a_test() -> None:
    promises = rows("P")
    assert [number for number, _ in promises] == [f"P{i}" for i in range(1, 13)]
    assert [number for number, proof in promises if not NAMED.search(proof)] == []


def test_tests_that_are_named_after_a_row_are_in_the_table() -> None:
    named = {name for _, name in NAMED.findall(PAGE)}
    for file in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        ours = {n for n in names_in(f"tests/faults/{file.name}") if re.match(r"test_[FP]\d", n)}
        assert ours <= named, file.name
