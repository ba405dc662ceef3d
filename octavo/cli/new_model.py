"""`octavo new-model`: a package for an architecture that Octavo lacks, made from one that it has.

The package works as it is written: its model is the one that it starts from, under another name,
and its tests pass. From there on each difference is a change that the tests hold to transformers.
"""

import argparse
import re
from pathlib import Path
from string import Template

import octavo
from octavo.cli import new_model_templates as templates
from octavo.config import Architecture, architectures
from octavo.errors import ConfigError

HELP = "write a package for an architecture of your own, with its parity test"

NAME = re.compile(r"[a-z][a-z0-9_]*[a-z0-9]")
HF_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LIKE = "llama"
DECODERS = ("ForCausalLM", "LMHeadModel")  # the ends of transformers' classes that make text


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("name", metavar="NAME", help="its name: small letters, digits, _")
    parser.add_argument(
        "--like",
        default=LIKE,
        metavar="NAME",
        help=f"the architecture to start from (default: {LIKE}); `octavo inspect MODEL` says "
        "which is nearest",
    )
    parser.add_argument(
        "--class",
        dest="hf_name",
        metavar="CLASS",
        help="what a config.json calls it in 'architectures' (default: made from NAME)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write (default: octavo-NAME here; with --in-tree, Octavo's own sources)",
    )
    parser.add_argument(
        "--in-tree",
        action="store_true",
        help="for a change to Octavo itself: write its two files, and print the rows to add",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the files, each of them new, and say what to do next."""
    names = _names(arguments.name, _template(arguments.like), arguments.hf_name)
    if arguments.in_tree:
        folder = arguments.out or Path(octavo.__file__).parent
        files = in_tree_files(names)
        then = in_tree_steps(names)
    else:
        folder = arguments.out or Path(names["distribution"])
        files = package_files(names)
        then = (
            f"next: pip install --no-deps -e {folder}, pytest {folder}; then make it yours: "
            "docs/adding-a-model.md"
        )
    for path in files:
        if (folder / path).exists():
            raise ConfigError(f"{folder / path} is there already; name another --out, or move it")
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
            print(folder / path)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    print(f"\n{then}")
    return 0


def package_files(names: dict[str, str]) -> dict[Path, str]:
    """The files of a package of its own."""
    package = Path(names["package"])
    made = names | {"model_path": f"{package}.model"}
    made["row"] = _fill(templates.ROW, made)
    return {
        Path("pyproject.toml"): _fill(templates.PYPROJECT, made),
        Path("README.md"): _fill(templates.README, made),
        package / "__init__.py": _fill(templates.INIT, made),
        package / "config.py": _fill(templates.CONFIG, made),
        package / "model.py": _fill(templates.MODEL, made),
        Path("tests/test_parity.py"): _fill(templates.TEST, made),
    }


def in_tree_files(names: dict[str, str]) -> dict[Path, str]:
    """The two files of an architecture within Octavo."""
    file = f"{names['name']}.py"
    return {
        Path("config/families") / file: _fill(templates.CONFIG, names),
        Path("models") / file: _fill(templates.MODEL, names),
    }


def in_tree_steps(names: dict[str, str]) -> str:
    """What is left to add by hand, within Octavo."""
    made = names | {"model_path": f"octavo.models.{names['name']}"}
    row = _fill(templates.ROW, made).replace("\n", "\n    ")
    return (
        f"next, in octavo/config/architectures.py, an import and a row of BUILT_IN:\n"
        f"    from octavo.config.families.{names['name']} import read_{names['name']}\n"
        f"    {row},\n"
        f"in octavo/testing/tiny_models.py, an entry of TINY_MODELS:\n"
        f'    "{names["name"]}": its fields, as those of "{names["like"]}",\n'
        f"then pytest tests/models/test_every_architecture.py -k {names['name']}"
    )


def _template(name: str) -> Architecture:
    known = architectures()
    decoders = [one for one in known.values() if one.hf_name.endswith(DECODERS)]
    for one in decoders:
        if one.name == name:
            return one
    raise ConfigError(f"--like {name!r}: known are {', '.join(one.name for one in decoders)}")


def _names(name: str, like: Architecture, hf_name: str | None) -> dict[str, str]:
    """All that the templates have places for."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"the name {name!r} must be small letters, digits and _, as a Python module's"
        )
    class_name = "".join(part.capitalize() for part in name.split("_"))
    hf_name = hf_name or f"{class_name}ForCausalLM"
    if not HF_NAME.fullmatch(hf_name):
        raise ConfigError(f"--class {hf_name!r} is no name of a class")
    for one in architectures().values():
        if name == one.name or hf_name == one.hf_name:
            raise ConfigError(
                f"{one.package} has {one.name!r} for {one.hf_name} already; choose another name"
            )
    model_module, model_class = like.model.split(":")
    return {
        "name": name,
        "title": class_name,
        "class_name": class_name,
        "hf_name": hf_name,
        "model_type": name,
        "package": f"octavo_{name}",
        "distribution": f"octavo-{name.replace('_', '-')}",
        "like": like.name,
        "like_model_type": like.model_type,
        "read_module": like.read.__module__,
        "read_name": like.read.__qualname__,
        "model_module": model_module,
        "model_class": model_class,
    }


def _fill(template: str, names: dict[str, str]) -> str:
    return Template(template).substitute(names)
