"""Random JSON schemas of many kinds, all of which some document satisfies, and none for ever."""

import random


def random_schemas(count, seed=0):
    """`count` schemas that are objects at the top."""
    rng = random.Random(seed)
    return [_object(rng, depth=rng.randint(1, 3)) for _ in range(count)]


def _schema(rng, depth):
    kinds = [_string, _integer, _number, _constant, _enum, _pattern, _format, _nullable]
    if depth > 0:
        kinds += [_array, _array, _object, _object, _any_of, _tuple, _by_reference]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng, depth):
    shortest = rng.randint(0, 3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 8)}


def _integer(rng, depth):
    least = rng.choice((-1000, -1, 0, 1, 17, 10**6))
    return {"type": "integer", "minimum": least, "maximum": least + rng.choice((0, 1, 9, 12345))}


def _number(rng, depth):
    return {"type": "number", "minimum": rng.choice((-1, 0)), "maximum": rng.choice((1, 99))}


def _constant(rng, depth):
    return {"const": rng.choice((None, True, 3, 'a "quoted" word\n', [1, "two"], {"a": {}}))}


def _enum(rng, depth):
    return {"enum": rng.sample(["red", "grün", "", 0, -1.5, None, False, [1]], rng.randint(1, 5))}


def _pattern(rng, depth):
    patterns = (r"^[a-f]{2,5}$", r"^\d{3}-\d{2}$", r"^(yes|no)$", r"^\w+@x\.(de|com)$")
    return {"type": "string", "pattern": rng.choice(patterns), "maxLength": 12}


def _format(rng, depth):
    return {"type": "string", "format": rng.choice(("date", "uuid", "ipv4"))}


def _nullable(rng, depth):
    return {"type": ["boolean", "null"]}


def _array(rng, depth):
    least = rng.randint(0, 2)
    items = _schema(rng, depth)
    return {
        "type": "array",
        "items": items,
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def _tuple(rng, depth):
    parts = [_schema(rng, depth) for _ in range(rng.randint(1, 3))]
    count = len(parts)
    return {
        "type": "array",
        "prefixItems": parts,
        "items": False,
        "minItems": count,
        "maxItems": count,
    }


def _object(rng, depth):
    names = rng.sample(["name", "id", "größe", "a b", "tags", "x"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _any_of(rng, depth):
    return {"anyOf": [_schema(rng, depth) for _ in range(rng.randint(2, 3))]}


def _by_reference(rng, depth):
    """A document within the document, with definitions of its own."""
    place = f"part-{rng.randrange(10**6)}"
    return {
        "$id": f"https://example.com/{place}",
        "$defs": {"it": _schema(rng, 0)},
        "$ref": "#/$defs/it",
    }
