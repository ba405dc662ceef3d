"""What `octavo new-model` writes: the files of a package, with places for names."""

CONFIG = '''\
"""$title: what its `config.json` says. Knows no torch."""

from dataclasses import replace

from $read_module import $read_name
from octavo.config.model import ModelConfig
from octavo.config.reading import Reader


def read_$name(read: Reader) -> ModelConfig:
    """`$hf_name`: so far all that $like's reader reads, and refuses."""
    return replace($read_name(read), architecture="$name")
'''

MODEL = '''\
"""$title: $like's decoder. Wiring and checkpoint names only: layers carry all else."""

from $model_module import $model_class


class $class_name($model_class):
    """Embedding, blocks, norm, head, as $like's."""
'''

ROW = """\
Architecture(
    "$name",
    "$hf_name",
    "$model_type",
    read_$name,
    "$model_path:$class_name",
)"""

INIT = '''\
"""$title for Octavo: what the entry point in `pyproject.toml` names. Needs no torch."""

from octavo.config import Architecture

from $package.config import read_$name

ARCHITECTURE = $row
'''

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "$title for Octavo"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["octavo"]

[project.optional-dependencies]
test = ["pytest>=8.3", "transformers>=5.0"]

# The name is the class in a model's config.json; Octavo imports the package when one needs it.
[project.entry-points."octavo.models"]
$hf_name = "$package:ARCHITECTURE"

[tool.setuptools.packages.find]
include = ["$package*"]

[tool.pytest.ini_options]
testpaths = ["tests"]

[tool.ruff]
line-length = 100
lint.select = ["E", "F", "I"]
"""

TEST = '''\
"""$title as transformers has it: a tiny random model, in every way that an engine runs it."""

import pytest
from octavo.config import architectures
from octavo.testing.parity import CHECKS, Parity, write_checkpoint
from octavo.testing.tiny_models import TINY_MODELS

from $package import ARCHITECTURE

# transformers' class that computes the same, and its config: your own, once your model differs.
MODEL_TYPE = "$like_model_type"
VARIANTS = {"plain": TINY_MODELS["$like"]}


@pytest.fixture(scope="module", params=VARIANTS)
def parity(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    fields = VARIANTS[request.param]
    reference = write_checkpoint(directory, MODEL_TYPE, fields, hf_name=ARCHITECTURE.hf_name)
    return Parity(directory, reference)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_answers_as_transformers_does(parity, check):
    check(parity)


def test_it_is_installed():
    assert architectures()["$name"].package == "$distribution"
'''

README = """\
# $title for Octavo

`pip install -e .` beside Octavo is all: `octavo serve DIRECTORY`, `LLM(...)`, `octavo plan` and
`octavo inspect` then take checkpoints whose `config.json` names `$hf_name`.

- `$package/config.py`: what is read of the config, and refused by name
- `$package/model.py`: the wiring, and the checkpoint's names
- `tests/test_parity.py`: held to transformers, token for token: `pytest`

The guide is `docs/adding-a-model.md` of Octavo.
"""
