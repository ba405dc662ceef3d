"""Ways to damage a file: bytes, the fields of a GGUF head, JSON. Pure: dice in, damage out.

Each returns what it made and a few words on what it did, which a failure's report shows.
"""

import copy
import json
import math
import random
import struct
from dataclasses import dataclass
from typing import Any

LENGTHS = (0, 1, 2, 7, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**61, 2**63)
DEPTHS = (20, 200, 900, 5_000, 100_000)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "\0", "\ud800", "é" * 3, "x" * 100_000, [], {}, [None], [[]],
    {"": {}},
    0, 1, 2, 3, -1, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, math.nan, math.inf,
    2**31, 2**32, 2**53 + 1, 10**9, 10**12, 2**63, 2**64, 10**30, 10**400, "1", "nan", "../x", "/",
)  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Flips, cuts and splices that know nothing of the format."""
    kind = rng.choice(("flip", "flip", "cut", "splice", "repeat", "zeros", "length", "insert"))
    # Heads are where formats are: half of all damage is done there.
    end = len(data) if rng.random() < 0.5 else min(len(data), 512)
    at = rng.randrange(end + 1)
    if kind == "flip":
        flipped = bytearray(data)
        places = [rng.randrange(max(1, end)) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
        for place in places if data else ():
            flipped[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
        return bytes(flipped), f"flipped bytes {places[:8]}"
    if kind == "cut":
        return data[:at], f"cut to {at} bytes"
    if kind == "length":
        code, value = rng.choice(("<I", "<Q", ">Q")), rng.choice(LENGTHS)
        number = struct.pack(code, value & (2 ** (8 * struct.calcsize(code)) - 1))
        return data[:at] + number + data[at + len(number) :], f"{value} as {code} at {at}"
    size = rng.choice((1, 4, 8, 100, 5_000))
    origin = rng.randrange(len(data) + 1)
    piece = {"zeros": bytes(size), "insert": rng.randbytes(size)}.get(kind, data[origin:][:size])
    if kind == "repeat":
        return data[:at] + piece * 50 + data[at:], f"bytes {origin}+{size} 50 times at {at}"
    rest = at if kind == "insert" else at + len(piece)
    return data[:at] + piece + data[rest:], f"{kind} of {len(piece)} bytes at {at}"


@dataclass(frozen=True, slots=True)
class Field:
    """One number in the head of a GGUF file."""

    name: str
    offset: int
    code: str  # of struct


def gguf_fields(data: bytes) -> list[Field]:
    """Every count, length, type, dimension, offset and scalar of a sound GGUF file."""
    fields: list[Field] = []
    at = 4

    def take(name: str, code: str) -> Any:
        nonlocal at
        fields.append(Field(name, at, code))
        (value,) = struct.unpack_from(code, data, at)
        at += struct.calcsize(code)
        return value

    def string(name: str) -> str:
        nonlocal at
        size = take(f"length of {name}", "<Q")
        at += size
        return data[at - size : at].decode()

    def value(name: str, kind: int) -> None:
        if kind == 8:
            string(name)
        elif kind == 9:
            inner, count = take(f"array type of {name}", "<I"), take(f"count of {name}", "<Q")
            for index in range(count):
                value(f"{name}[{index}]", inner)
        else:
            take(name, "<" + ("BbHhIifBxxQqd"[kind]))

    take("version", "<I")
    num_tensors, num_entries = take("number of tensors", "<Q"), take("number of entries", "<Q")
    for _ in range(num_entries):
        key = string("a key")
        value(key, take(f"type of {key}", "<I"))
    for _ in range(num_tensors):
        name = string("a tensor's name")
        for axis in range(take(f"dimensions of {name}", "<I")):
            take(f"size {axis} of {name}", "<Q")
        take(f"type of {name}", "<I")
        take(f"offset of {name}", "<Q")
    return fields


def mutate_gguf(rng: random.Random, data: bytes, fields: list[Field]) -> tuple[bytes, str]:
    """One to three numbers of the head, set to what no writer would write."""
    changed, notes = bytearray(data), []
    # Arrays have thousands of elements; the numbers that steer a reader must not drown in them.
    steering = [field for field in fields if "[" not in field.name]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        field = rng.choice(steering if rng.random() < 0.9 else fields)
        (old,) = struct.unpack_from(field.code, data, field.offset)
        if field.code in ("<f", "<d"):
            value: Any = rng.choice((0.0, -1.0, math.nan, math.inf, 1e-38, 1e38, 0.5))
        else:
            near = old + rng.choice((-32, -8, -1, 1, 8, 32))
            value = rng.choice((near, near, old * 2, rng.randrange(16), *LENGTHS, -1))
            value &= 2 ** (8 * struct.calcsize(field.code)) - 1
        struct.pack_into(
            field.code.upper() if field.code != "<f" else "<f", changed, field.offset, value
        )
        notes.append(f"{field.name} is {value}, not {old}")
    return bytes(changed), "; ".join(notes)


def mutate_json(rng: random.Random, value: Any) -> tuple[bytes, str]:
    """Some edits of the tree, written out; now and then a duplicate key or damage to the text."""
    value, notes = copy.deepcopy(value), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parent, key = _place(rng, value)
        if parent is None:
            break
        notes.append(_edit(rng, parent, key))
    text = json.dumps(value)
    if rng.random() < 0.05:
        at = text.find("{", rng.randrange(len(text)))
        name = rng.choice(notes or ["x"]).split("'")[1:2] or ["model"]
        text = f"{text[:at]}{{{json.dumps(name[0])}: {_odd_text(rng)}, {text[at + 1 :]}"
        notes.append(f"{name[0]!r} twice at {at}")
    if rng.random() < 0.05:
        depth = rng.choice(DEPTHS)
        opening, closing = rng.choice((("[", "]"), ('{"x":', "}")))
        deep = opening * depth + "0" + closing * depth
        at = text.find(":", rng.randrange(len(text))) + 1
        text = f"{text[:at]} {deep}, {json.dumps('y')}: {text[at:]}"
        notes.append(f"{depth} deep at {at}")
    if rng.random() < 0.05:
        data, note = mutate_bytes(rng, text.encode())
        return data, "; ".join([*notes, note])
    return text.encode(), "; ".join(notes)


def _place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A random container of the tree, and a key in it; (None, None) where nothing has any."""
    parent: Any = None
    key: Any = None
    while isinstance(value, dict | list) and value:
        parent = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = parent[key]
        if rng.random() < 0.3:
            break
    return parent, key


def _edit(rng: random.Random, parent: Any, key: Any) -> str:
    kind = rng.choice(("odd", "odd", "odd", "drop", "wrap", "swap", "scale", "rename", "copy"))
    old = parent[key]
    if kind == "drop":
        del parent[key]
    elif kind == "wrap":
        again = copy.deepcopy(old)
        parent[key] = rng.choice(([old], {"x": old}, [old, again], str(old)[:1000]))
    elif kind == "swap":
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], old
    elif kind == "scale" and type(old) in (int, float):
        parent[key] = rng.choice((old + 1, old - 1, old * 2, old * 10**6, -old, old // 3, 0.5))
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice(("", "x", key.upper(), f"{key}.weight", *parent))] = parent.pop(key)
    elif kind == "copy" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(old))
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        return f"{key!r} is {repr(parent[key])[:40]}"
    return f"{kind} of {key!r}"


def _odd_text(rng: random.Random) -> str:
    return json.dumps(rng.choice(ODD_VALUES))


def safetensors_parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a sound safetensors file."""
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def mutate_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A header that lies plausibly: shapes, types, offsets, names, or its own length."""
    header, body = safetensors_parts(data)
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.choice(
        ("shape", "shape", "dtype", "offset", "name", "more", "json", "json", "length", "body")
    )
    note = f"{kind} of {name!r}"
    if kind == "shape":
        entry["shape"] = _lying_shape(rng, entry["shape"])
        note += f": {str(entry['shape'])[:60]}"
    elif kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
        note += f": {entry['dtype']}"
    elif kind == "offset":
        start, end = entry["data_offsets"]
        lies = (start + 1, end - 4, 0, -1, len(body), len(body) + 8, 2**63, 2**64 - 1)
        entry["data_offsets"] = rng.choice(
            ([rng.choice(lies), end], [start, rng.choice(lies)], [end, start], [start], start)
        )
    elif kind == "name":
        header[rng.choice(NAMES)] = header.pop(name)
    elif kind == "more":
        header[rng.choice(NAMES)] = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    elif kind == "body":
        body = body[: rng.randrange(len(body))] if rng.random() < 0.5 else body + bytes(64)
    if kind == "json":
        text, note = mutate_json(rng, header)
    else:
        text = json.dumps(header).encode()
    size = rng.choice((len(text) + 1, *LENGTHS, 2**64 - 1)) if kind == "length" else len(text)
    return struct.pack("<Q", size) + text + body, note


DTYPES = (
    "F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "C64",
    "F8_E8M0", "U64", "f32", "", "X", 1, None,
)  # fmt: skip
NAMES = (
    "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "model.layers.99.x.weight",
    "", "\n", "x" * 10_000, "model.layers.-1.mlp.up_proj.weight", "\ud800", "__metadata__",
)  # fmt: skip


def _lying_shape(rng: random.Random, shape: list[int]) -> Any:
    size = math.prod(shape)
    return rng.choice(
        (
            [], [size], shape[::-1], [*shape, 1], [0, *shape], [2**40, 2**40], [size, 2**62],
            [-1, *shape], [2**63], [2**64], [1] * 5_000, [0.5], None, "x", [2**32, 2**32, 0],
            [shape[0] * 2, *shape[1:]],
        )
    )  # fmt: skip
