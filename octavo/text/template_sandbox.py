"""The sandbox in which chat templates run: jinja2's immutable one, with a budget.

jinja2's sandbox keeps a template from Python's insides, not from the machine's time and memory.
Here whatever makes a value pays for it: loops for each turn, calls and filters for what they
return, operators, joins and formats for their result before it is made. Filters and methods that
pad without measure or take quadratic time are gone: no chat template has a use for them.
"""

from collections.abc import Callable
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from octavo.text.template_budget import (
    BYTES_OF_A_SHORT_STRING,
    MAX_INT_BITS,
    BudgetError,
    joined,
    paid_turns,
    pay,
    pay_for,
    pay_for_format,
    pay_for_power,
    pay_for_repetition,
    pay_for_replacement,
    pay_for_text,
    pay_for_tree,
)

REMOVED_FILTERS = (
    "center", "filesizeformat", "pprint", "random", "striptags", "urlencode", "urlize", "wordwrap",
    "xmlattr",
)  # fmt: skip
REMOVED_GLOBALS = ("lipsum",)
REMOVED_METHODS = ("encode", "expandtabs", "striptags", "to_bytes", "translate", "unescape")
PADDING_METHODS = ("center", "ljust", "rjust", "zfill")
SPLITTING_METHODS = ("rsplit", "split", "splitlines")
ITERATING_FILTERS = ("batch", "groupby", "list", "slice", "sort", "unique")
WRITING_FILTERS = ("e", "escape", "forceescape", "string", "tojson")
# The largest number that an argument of these filters may be.
MAX_ARGUMENTS = {"batch": 10_000, "indent": 64, "round": 64, "slice": 10_000, "tojson": 64}


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates can be rendered within `budgeted` only."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(joined)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.finalize = _written
        for name in REMOVED_FILTERS:
            del self.filters[name]
        for name in REMOVED_GLOBALS:
            del self.globals[name]
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.filters |= {"_turns": paid_turns, "_joined": joined, "_paid": pay_for_tree}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Offer a filter to templates; what it returns is paid for."""
        self.filters[name] = _paid_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Prices().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
                raise BudgetError("a number is too large")
        if operator == "*":
            pay_for_repetition(left, right)
        elif operator == "**":
            pay_for_power(left, right)
        elif operator == "+":
            pay_for(left), pay_for(right)
        elif isinstance(left, str):
            pay_for_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Bound methods of what is built in; `format` comes wrapped by jinja2.
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            name = getattr(method, "__name__", "")
            args = _paid_arguments(name, owner, args, kwargs)
        return pay_for(super().call(__context, __obj, *args, **kwargs))


@pass_context  # so that constants are not written at compile time, outside of any budget
def _written(context: Context, value: Any) -> Any:
    return pay_for_text(value)


class _Prices(NodeTransformer):
    """Puts what pays around loops, joins and literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_turns")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_flat(node.items) else _filtered(node, "_paid")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        is_target = node.ctx != "load"
        return node if is_target or _is_flat(node.items) else _filtered(node, "_paid")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        values = [pair.value for pair in node.items]
        return node if _is_flat(values) else _filtered(node, "_paid")


def _is_flat(items: list[nodes.Expr]) -> bool:
    return all(isinstance(item, nodes.Const) for item in items)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _paid_arguments(
    name: str, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a method of a string or number, once what it will make is paid for."""
    if name in REMOVED_METHODS:
        raise BudgetError(f"there is no {name} here")
    if not isinstance(owner, str):
        return args
    if name in PADDING_METHODS:
        pay(4 * max((abs(width) for width in args if isinstance(width, int)), default=0))
    elif name in SPLITTING_METHODS:
        separator = args[0] if args and isinstance(args[0], str) and args[0] else None
        num_pieces = owner.count(separator) if separator else sum(map(owner.count, " \t\n\r\v\f"))
        pay(num_pieces * BYTES_OF_A_SHORT_STRING)
    elif name == "replace" and len(args) > 1:
        pay_for_replacement(owner, args[0], args[1])
    elif name in ("format", "format_map"):
        pay_for_format(owner, [*args, kwargs])
    elif name == "join" and args:
        pieces = list(paid_turns(args[0]))
        pay_for_text(pieces)
        pay(len(owner) * len(pieces))
        return (pieces, *args[1:])
    return args


def _paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at its arguments before it runs, and pays for what it returns."""
    marked = getattr(function, "jinja_pass_arg", None)
    num_own = 0 if marked is None else 1  # what Jinja puts before the template's arguments

    def paid(*args: Any, **kwargs: Any) -> Any:
        own, (value, *rest) = args[:num_own], args[num_own:]
        _check_arguments(name, [*rest, *kwargs.values()])
        if name == "join":
            value = list(paid_turns(value))
            pay_for_text(value)
            pay_for_text(rest[0] if rest else kwargs.get("d", ""), times=len(value))
        elif name == "replace":
            new = rest[1] if len(rest) > 1 else kwargs.get("new", "")
            pay_for_replacement(str(pay_for_text(value)), rest[0] if rest else "", new)
        elif name == "format":
            pay_for_format(str(pay_for_text(value)), [*rest, kwargs])
        elif name == "indent":
            pay_for_text(rest[:1], times=str(pay_for_text(value)).count("\n") + 1)
        elif name in WRITING_FILTERS:
            pay_for_text(value)
        elif name in ITERATING_FILTERS and isinstance(value, str):
            pay(len(value) * BYTES_OF_A_SHORT_STRING)
        return pay_for(function(*own, value, *rest, **kwargs))

    if marked is not None:
        paid.jinja_pass_arg = marked  # type: ignore[attr-defined]
    return paid


def _check_arguments(name: str, arguments: list[Any]) -> None:
    limit = MAX_ARGUMENTS.get(name)
    for argument in arguments:
        if limit is not None and isinstance(argument, int) and abs(argument) > limit:
            raise BudgetError(f"{name} by {limit} is the most")
        # `sum` would add lists up, one by one.
        if name == "sum" and isinstance(argument, list | tuple | Namespace):
            raise BudgetError("sum adds numbers only")
