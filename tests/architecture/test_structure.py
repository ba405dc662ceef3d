"""The architecture as rules that fail: layers, budgets, public surface, docs that are true."""

import argparse
import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import octavo
from octavo.cli import build_parser
from octavo.cli.reference import reference_page, with_model_table
from octavo.config import architectures
from octavo.config.plugins import OURS

ROOT = Path(octavo.__file__).parents[1]
PACKAGE = ROOT / "octavo"

# Lowest first: a package imports only from those before it. Later packages join when they come.
LAYERS = (
    "errors",
    "core",
    "config",
    "kernels",
    "quant",
    "parallel",
    "layers",
    "vision",
    "models",
    "weights",
    "kvcache",
    "scheduler",
    "runner",
    "text",
    "engine",
    "server",
    "sim",
    "testing",
    "bench",
    "cli",
)
WITHOUT_TORCH = ("errors", "core", "config", "kvcache", "scheduler", "text", "server", "sim", "cli")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_CLASS_METHODS = 20
MAX_PARAMETERS = 8
MAX_MODEL_FILE_LINES = 150
MAX_PACKAGE_LINES = 65_000
MAX_FILES_OF_A_REQUEST = 15

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def parsed(path):
    return ast.parse(path.read_text(), name_of(path))


def package_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(tree):
    """Modules that a file imports when it runs; those for type checkers alone do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_package_imports_only_from_those_below_it(path):
    package = package_of(path)
    if package == "__init__":
        return  # the public surface may name anything
    assert package in LAYERS, f"{package} has no place in the order of layers"
    allowed = set(LAYERS[: LAYERS.index(package) + 1])
    for module in imports(parsed(path)):
        top, _, rest = module.partition(".")
        target = rest.split(".")[0]
        if top == "octavo" and target and target != "__version__":
            assert target in allowed, f"{name_of(path)} imports {module}, which is above it"


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_what_must_not_know_torch_does_not_import_it(package):
    paths = [p for p in SOURCES if package_of(p) == package]
    assert paths
    for path in paths:
        found = [m for m in imports(parsed(path)) if m.split(".")[0] == "torch"]
        assert not found, f"{name_of(path)} imports {found}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_functions_and_classes_are_within_their_budgets(path):
    text = path.read_text()
    limit = MAX_FILE_LINES
    if package_of(path) == "models":
        limit = MAX_MODEL_FILE_LINES
    assert len(text.splitlines()) <= limit, f"{name_of(path)} is longer than {limit} lines"
    is_kernel = package_of(path) == "kernels"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, FUNCTIONS)]
            assert len(methods) <= MAX_CLASS_METHODS, f"{node.name} in {name_of(path)}"
        if isinstance(node, FUNCTIONS) and not is_kernel:
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{node.name} in {name_of(path)}: {num_lines}"
            arguments = node.args.posonlyargs + node.args.args
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            total = len(named) + len(node.args.kwonlyargs)
            assert total <= MAX_PARAMETERS, f"{node.name} in {name_of(path)}: {total} parameters"


def test_every_module_says_what_it_is():
    silent = [name_of(p) for p in SOURCES if not ast.get_docstring(parsed(p))]
    assert not silent


def test_the_package_is_within_its_budget():
    assert sum(len(p.read_text().splitlines()) for p in SOURCES) <= MAX_PACKAGE_LINES


def test_nothing_unpickles_evaluates_or_asserts_on_outside_data():
    for path in SOURCES:
        tree = parsed(path)
        banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
        assert not banned & {m.split(".")[0] for m in imports(tree)}, name_of(path)
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"{name_of(path)}:{node.lineno}: assert"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load"), f"{name_of(path)}: {called}"


def test_the_public_surface_is_what_it_says():
    assert octavo.__all__ == [
        "LLM",
        "CompletionOutput",
        "LoRARequest",
        "OctavoError",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputsParams",
        "TokenLogprobs",
        "__version__",
    ]
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    with pytest.raises(AttributeError):
        octavo.no_such_name  # noqa: B018


def test_every_export_exists():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            module = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
            for name in getattr(module, "__all__", ()):
                assert getattr(module, name) is not None, f"{module.__name__}.{name}"


def test_the_architecture_page_names_files_that_exist_and_a_request_passes_few():
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = re.findall(r"`(octavo/[\w/]+(?:\.py)?/?)`", text)
    assert len(paths) > 15
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    life = text.split("## The life of a streamed request")[1].split("\n## ")[0]
    files = dict.fromkeys(re.findall(r"`(octavo/[\w/]+\.py)`", life))
    assert 8 <= len(files) <= MAX_FILES_OF_A_REQUEST
    packages = {path.split("/")[1] for path in re.findall(r"\| `(octavo/\w+)", text)}
    assert {p.removesuffix(".py") for p in packages} >= set(LAYERS) - {"errors"}


def all_flags():
    def flags_of(parser):
        for action in parser._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from flags_of(command)

    return set(flags_of(build_parser()))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_flags_and_make_targets_in_the_docs_exist(document):
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M):
        assert target in targets, f"{document}: make {target}"
    for line in re.findall(r"octavo (?:serve|chat|generate|explain|why)[^\n`]*", text):
        for flag in re.findall(r"--[a-z][a-z-]+", line):
            assert flag in all_flags(), f"{document}: {flag}"


def test_the_reference_page_is_what_the_parser_says():
    assert (ROOT / "docs" / "flags.md").read_text() == reference_page(), "run: make docs"


def test_the_readme_shows_the_models_of_the_registry():
    text = (ROOT / "README.md").read_text()
    assert text == with_model_table(text), "run: make docs"
    for one in architectures().values():
        if one.package == OURS:
            assert one.family and one.features, f"{one.name}: say what it runs, for the README"
            assert (ROOT / one.parity).is_file(), f"{one.name}: {one.parity} is missing"


def test_the_readme_shows_the_committed_figures():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import cpu
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text()
    shown = text.split(cpu.TABLE_START)[1].split(cpu.TABLE_END)[0]
    assert shown == cpu.markdown(json.loads(cpu.RESULTS.read_text())), "run: make bench-cpu"
