"""Command-line flags made from dataclass fields, so that no default is written down twice."""

import argparse
import dataclasses
import types
import typing
from typing import Any

from octavo.config import ALIASES, DEFAULT_MODEL, GROUPS, EngineOptions
from octavo.core import SamplingParams

# The sampling flags that the command line offers: (field of SamplingParams, type, help).
SAMPLING_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "0 takes the likeliest token; higher is more random"),
    ("top_p", float, "keep the likeliest tokens that together reach this probability"),
    ("top_k", int, "keep this many likeliest tokens; 0 keeps all"),
    ("min_p", float, "keep tokens at least this fraction as likely as the likeliest"),
    ("presence_penalty", float, "subtracted once from tokens already generated"),
    ("frequency_penalty", float, "subtracted for each time a token was generated"),
    ("repetition_penalty", float, "divides the logits of tokens seen before"),
    ("seed", int, "the same seed gives the same text"),
    ("max_tokens", int, "most tokens to generate"),
)
# And those for a prompt that is to be answered more than once, or by search.
ANSWER_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("n", int, "answers to the prompt"),
    ("use_beam_search", bool, "keep the likeliest continuations instead of drawing tokens"),
    ("beam_width", int, "how many continuations a beam search keeps"),
    ("length_penalty", float, "a beam search prefers longer answers above 0, shorter ones below"),
)
SAMPLING_NAMES = (*(name for name, _, _ in (*SAMPLING_FLAGS, *ANSWER_FLAGS)), "stop")


def flag(name: str) -> str:
    """The flag of a field: max_model_len -> --max-model-len."""
    return "--" + name.replace("_", "-")


def add_dataclass(parser: argparse.ArgumentParser, kind: Any, title: str) -> None:
    """One flag for each field of a dataclass; flags that are not given leave no trace."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(kind):
        default = "" if field.default in (None, ()) else f" (default: {field.default})"
        common: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": (field.metadata["help"] + default).replace("%", "%%"),
        }
        hint = typing.get_type_hints(kind)[field.name]
        if typing.get_origin(hint) is tuple:
            group.add_argument(flag(field.name), nargs="+", metavar="NAME", **common)
        elif choices := field.metadata.get("choices"):
            group.add_argument(flag(field.name), choices=choices, **common)
        elif hint in (bool, bool | None):
            group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **common)
        else:
            scalar = _scalar_type(hint)
            metavar = scalar.__name__.upper()
            group.add_argument(flag(field.name), type=scalar, metavar=metavar, **common)


def _scalar_type(hint: Any) -> type:
    """int for `int | None`, and so on."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return typing.cast(type, hint)


def collect(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The fields of `kind` that were given as flags."""
    given = vars(arguments)
    values = {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL, and flags of every engine option."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="an alias, a Hugging Face directory, a .gguf file or a hub id "
        f"(default: {DEFAULT_MODEL}; aliases: {', '.join(ALIASES)})",
    )
    for title, kind in GROUPS.items():
        add_dataclass(parser, kind, title)


def engine_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given as flags, as `LLM` takes them."""
    values: dict[str, Any] = {}
    for kind in GROUPS.values():
        values |= collect(arguments, kind)
    return values


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """The engine options that the flags ask for; raises `ConfigError`."""
    return EngineOptions.from_flat(arguments.model, engine_values(arguments))


def add_sampling_flags(
    parser: argparse.ArgumentParser, *, several: bool = False, **defaults: Any
) -> None:
    """Flags of the sampling options; `defaults` replace those of `SamplingParams`.

    several: also those for more than one answer.
    """
    group = parser.add_argument_group("sampling")
    for name, kind, text in (*SAMPLING_FLAGS, *(ANSWER_FLAGS if several else ())):
        shown = f" (default: {defaults[name]})" if name in defaults else ""
        takes: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            takes = {"action": "store_true"}
        group.add_argument(
            flag(name),
            default=defaults.get(name, argparse.SUPPRESS),
            help=text + shown,
            **takes,
        )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="end the answer before this text; may be given several times",
    )


def sampling_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that the flags ask for."""
    return {name: value for name, value in vars(arguments).items() if name in SAMPLING_NAMES}


def sampling_params(arguments: argparse.Namespace, **changes: Any) -> SamplingParams:
    """`SamplingParams` from flags; raises `RequestError`."""
    return SamplingParams(**(sampling_values(arguments) | changes))
