"""`octavo new-model`: which files it writes and what it refuses. That they work is tested in
`tests/models/test_out_of_tree.py`.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import octavo
from octavo.cli import main
from octavo.config import architectures
from octavo.testing.tiny_llama import TINY_CONFIG


def write(folder, *arguments):
    return main(["new-model", "mine", "--out", str(folder), *arguments])


def test_the_entry_point_is_called_like_the_class(tmp_path):
    assert write(tmp_path, "--class", "MyOwnLM") == 0
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"octavo.models": {"MyOwnLM": "octavo_mine:ARCHITECTURE"}}
    assert '"MyOwnLM"' in (tmp_path / "octavo_mine" / "__init__.py").read_text()


@pytest.mark.parametrize(
    "like", [one.name for one in architectures().values() if one.hf_name.endswith("ForCausalLM")]
)
def test_what_it_writes_is_python_and_names_what_is_there(tmp_path, like):
    assert write(tmp_path, "--like", like) == 0
    row = architectures()[like]
    for path in tmp_path.rglob("*.py"):
        ast.parse(path.read_text())
        assert "$" not in path.read_text()
    model = (tmp_path / "octavo_mine" / "model.py").read_text()
    assert "from {} import {}\n".format(*row.model.split(":")) in model
    config = (tmp_path / "octavo_mine" / "config.py").read_text()
    assert f"from {row.read.__module__} import {row.read.__qualname__}\n" in config


def test_within_the_tree_two_files_and_the_rows_to_add(tmp_path, capsys):
    """What is printed is put where it says, in a copy of the tree; there the model is read."""
    tree = tmp_path / "octavo"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(octavo.__file__).parent, tree, ignore=ignored)
    before = set(tree.rglob("*.py"))
    assert write(tree, "--in-tree", "--like", "qwen3") == 0
    new = sorted(str(path.relative_to(tree)) for path in set(tree.rglob("*.py")) - before)
    assert new == ["config/families/mine.py", "models/mine.py"]
    printed = capsys.readouterr().out
    line, row = re.search(r"^    (from .*)\n((?:    .*\n)+)", printed, re.M).groups()
    table = tree / "config" / "architectures.py"
    text = table.read_text().replace("BUILT_IN = (\n", f"{line}\n\nBUILT_IN = (\n{row}", 1)
    table.write_text(text)
    code = (
        "import json, sys, torch; from octavo.config import model_config_from_hf;"
        "from octavo.layers import Build; from octavo.models import create_model;"
        "config = model_config_from_hf(json.loads(sys.argv[1]));"
        "model = create_model(config, Build('meta', torch.float32), max_positions=1);"
        "print(config.architecture, type(model).__module__)"
    )
    config = TINY_CONFIG | {"architectures": ["MineForCausalLM"], "model_type": "mine"}
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.split() == ["mine", "octavo.models.mine"], run.stderr


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text("mine")
    assert write(tmp_path) == 1
    assert "pyproject.toml is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]
    assert (tmp_path / "pyproject.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "octavo has 'llama' for LlamaForCausalLM already"),
        (["mine", "--class", "LlamaForCausalLM"], "has 'llama' for LlamaForCausalLM already"),
        (["Mine"], "small letters"),
        (["../mine"], "small letters"),
        (["mine", "--class", "a-b"], "no name of a class"),
        (["mine", "--like", "nothing"], "known are llama, "),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["new-model", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert write(tmp_path / "file") == 1
    assert "cannot be written" in capsys.readouterr().err
