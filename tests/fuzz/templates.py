"""Chat templates as an enemy would write them: known attacks, and a small grammar of Jinja."""

import random

ATTACKS = (
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__ }}{{ messages.append(1) }}{{ messages.clear() }}",
    "{{ ''['__class__'] }}{{ ''|attr('__class__') }}",
    "{{ raise_exception.__globals__ }}{{ strftime_now.__globals__['datetime'] }}",
    "{{ range(10**9)|list|length }}",
    "{{ range(99999)|list|string|length * 10**9 }}",
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'y' in 'x' * 999999 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{{ 9**9**9 }}",
    "{{ 2**99999999|length }}",
    "{{ 10**1000000 * 10**1000000 }}",
    "{{ 'x' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 'x'.ljust(10**10) }}{{ 'x'|center(10**10) }}",
    "{{ 'x'.zfill(10**10) }}{{ '\\t'.expandtabs(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}{{ '%.*f' % (10**9, 1) }}",
    "{{ '{:>10000000000}'.format(1) }}{{ '{:{}}'.format(1, 10**10) }}",
    "{{ '%10000000000s'|format(1) }}",
    "{{ 'x'|indent(10**10, true) }}",
    "{{ messages|tojson(indent=10**10) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ 1.5|round(10**9, 'ceil') }}",
    "{{ ('<!--' * 99999)|striptags }}",
    "{{ 'x y '|wordwrap(1, wrapstring='z' * 10**8) }}",
    "{{ [1]|batch(10**10, 'x')|list }}{{ [1]|slice(10**10)|list }}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s|replace('x', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(9) %}"
    "{% set ns.s = ns.s|join(ns.s) %}{% endfor %}",
    "{% set s = 'x' * 999999 %}{% set x %}{% for i in range(99999) %}"
    "{{ s }}{% endfor %}{% endset %}",
    "{% set s = 'x' * 999999 %}{{ ([s] * 99999)|join }}{{ ''.join([s] * 99999) }}",
    "{% set s = 'x' * 999999 %}{{ ([s] * 99999)|string }}{{ [s] * 99999 }}",
    "{% set s = 'x' * 999999 %}{{ ([s] * 99999)|tojson }}",
    "{% set ns = namespace() %}{% set ns.n = ns %}{{ ns }}{{ ns|tojson }}",
    "{{ ('a' * 30 + '!')|urlize }}",
    "{{ [1, 'a', none]|sort }}{{ messages|groupby('role')|list }}{{ messages|sum }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}{{ y }}",
    "{% for i in messages %}" * 30 + "{% endfor %}" * 30,
    "{% if true %}" * 150 + "{% endif %}" * 150,
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "[" * 90 + "x" + "]" * 90 + " }}",
    "{{ " + "-" * 99 + "1 }}",
    "{{ " + "1" * 5000 + " }}",
    "{{ 1e999 }}{{ -1e999 }}",
    "{{ x }}" * 20_000,
    "x" * 2_000_000,
    "{# " * 1000,
    "{% raw %}" * 1000,
    "\0{{ '\ud800' }}",
    "{{ strftime_now('%Y' * 99999) }}{{ strftime_now('\ud800') }}{{ strftime_now('%') }}",
    "{{ raise_exception('x' * 10**7) }}",
    "{{ raise_exception(messages) }}",
    "{{ messages[10**30] }}{{ messages[::0] }}{{ messages[-1]['x'].y }}",
    "{{ dict(a=1).update(b=2) }}{% set messages.x = 1 %}",
    "{% call f() %}{% endcall %}{% filter upper %}x{% endfilter %}",
    "{% generation %}{% generation %}{% endgeneration %}",
    "{% break %}{% continue %}",
    "{% set loop = 1 %}{% set range = 2 %}{% set true = 3 %}{% set self = 1 %}{{ range }}",
    "{% macro caller(caller) %}{% endmacro %}{{ caller() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% autoescape true %}{{ '<' ~ messages }}{% endautoescape %}",
)

ATOMS = (
    "messages", "messages[0]", "message.content", "1", "-1", "2**40", "0.5", "''", "'x'", "[]",
    "{}",
    "none", "true", "range(9)", "range(99999)", "loop", "loop.index", "bos_token", "tools", "self",
    "ns", "ns.x", "namespace(x=1)", "cycler", "joiner", "dict", "undefined_name", "x", "9999999999",
    "1e308", "''.__class__", "m", "caller", "'<|im_end|>'", "'%s'", "'{}'", "'\\t'",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "if")
METHODS = (
    "upper()", "split('x')", "replace('x', {0})", "join({0})", "format({0})", "center({0})",
    "items()", "keys()", "get({0})", "append({0})", "count({0})", "encode()", "x", "__class__",
    "ljust({0})", "zfill({0})", "expandtabs({0})", "format_map({0})", "translate({0})",
    "partition({0})",
    "splitlines()", "index({0})", "real", "to_bytes({0})", "bit_length()", "mro()", "gi_frame",
)  # fmt: skip
FILTERS = (
    "list", "string", "tojson", "length", "join({0})", "replace('x', {0})", "center({0})", "int",
    "indent({0})", "format({0})", "batch({0})", "slice({0})", "sort", "unique", "sum", "round({0})",
    "map('upper')", "select", "selectattr('x')", "groupby('role')", "reverse", "first", "last",
    "random",
    "default({0})", "items", "dictsort", "trim", "title", "truncate({0})", "wordcount", "escape",
    "safe",
    "attr({0})", "xmlattr", "urlize", "pprint", "filesizeformat", "abs", "float", "min", "max",
    "nope",
    "map(attribute='x')", "rejectattr('role', 'equalto', 'user')", "striptags", "wordwrap({0})",
)  # fmt: skip


def hostile_template(rng: random.Random) -> str:
    """A known attack, several of them, or sentences of the grammar."""
    if rng.random() < 0.4:
        return "".join(rng.choice(ATTACKS) for _ in range(rng.choice((1, 1, 1, 2))))
    return _body(rng, rng.choice((1, 2, 3, 5)))


def _body(rng: random.Random, depth: int) -> str:
    return "".join(_statement(rng, depth) for _ in range(rng.randint(1, 3)))


def _statement(rng: random.Random, depth: int) -> str:
    kind = rng.randrange(8) if depth > 0 else 0
    if kind <= 1:
        return f"{{{{ {_expression(rng, depth)} }}}}"
    body = _body(rng, depth - 1)
    value = _expression(rng, depth - 2)
    if kind == 2:
        name, recursive = rng.choice(("m", "message", "x")), rng.choice(("", "", " recursive"))
        return f"{{% for {name} in {value}{recursive} %}}{body}{{% endfor %}}"
    if kind == 3:
        return f"{{% if {value} %}}{body}{{% endif %}}"
    if kind == 4:
        return f"{{% set {rng.choice(('x', 'm'))} = {value} %}}{body}"
    if kind == 5:
        loop = f"{{% for i in range({rng.choice((3, 40, 99999))}) %}}"
        return (
            f"{{% set ns = namespace(x={value}) %}}{loop}"
            f"{{% set ns.x = {_expression(rng, depth)} %}}{{% endfor %}}{{{{ ns.x }}}}"
        )
    if kind == 6:
        return f"{{% macro m(x) %}}{body}{{% endmacro %}}{{{{ m({value}) }}}}"
    return f"{{% set x %}}{body}{{% endset %}}{{{{ x }}}}"


def _expression(rng: random.Random, depth: int) -> str:
    if depth <= 0 or rng.random() < 0.2:
        return rng.choice(ATOMS)
    kind = rng.randrange(5)
    left, right = _expression(rng, depth - 1), _expression(rng, depth - 2)
    if kind <= 1:
        return f"({left} {rng.choice(OPERATORS)} {right})"
    if kind == 2:
        return f"({left}).{rng.choice(METHODS).format(right)}"
    if kind == 3:
        return f"({left})|{rng.choice(FILTERS).format(right)}"
    return rng.choice(
        (f"[{left}, {left}]", f"({left})[{right}]", f"({left})({right})", f"-({left})")
    )
