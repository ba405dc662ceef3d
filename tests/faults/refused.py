"""Rows of the fault table that one bad request plays: what is sent, and how it is refused."""

import json
from typing import Any

import httpx
from faults.processes import PROMPT, Server

Row = tuple[str, bytes, int, str | None, str | None]  # path, body, status, code, param

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def field(**fields: Any) -> bytes:
    """A completion with these fields; JSON, but with the numbers that JSON has not."""
    return json.dumps({"prompt": PROMPT, "max_tokens": 2} | fields).encode()


REFUSED: dict[str, Row] = {
    "F01-truncated": (COMPLETIONS, b'{"prompt": "a"', 400, "invalid_json", None),
    "F02-too-large": (COMPLETIONS, field(user="x" * 2**24), 413, "request_too_large", None),
    "F05-deep": (COMPLETIONS, b'{"user": ' + b"[" * 10_000, 400, "invalid_json", None),
    "F05-digits": (COMPLETIONS, b'{"n": ' + b"9" * 1_000_000 + b"}", 400, None, "n"),
    "F06-no-prompt": (COMPLETIONS, b"{}", 400, None, "prompt"),
    "F06-null-content": (
        CHAT,
        b'{"messages": [{"role": "user", "content": null}]}',
        400,
        None,
        "messages[0].content",
    ),
    "F07-empty": (COMPLETIONS, field(prompt=[]), 400, None, "prompt"),
    "F08-unknown-model": (COMPLETIONS, field(model="gpt-9"), 404, "model_not_found", "model"),
    "F09-context": (
        COMPLETIONS,
        field(max_tokens=512),
        400,
        "context_length_exceeded",
        "max_tokens",
    ),
    "F10-long-text": (
        COMPLETIONS,
        field(prompt="a" * 2**23),
        400,
        "context_length_exceeded",
        "prompt",
    ),
    "F12-nan": (COMPLETIONS, field(temperature=float("nan")), 400, "invalid_json", None),
    "F12-huge": (COMPLETIONS, field(top_p=1e308), 400, None, "top_p"),
    "F13-n": (COMPLETIONS, field(n=10**9), 400, None, "n"),
    "F14-logprobs": (COMPLETIONS, field(logprobs=10**6), 400, None, "logprobs"),
    "F15-max-tokens": (COMPLETIONS, field(max_tokens=2**63), 400, None, "max_tokens"),
    "F16-vocabulary": (COMPLETIONS, field(prompt=[301]), 400, None, "prompt"),
    "F16-negative": (COMPLETIONS, field(prompt=[-1]), 400, None, "prompt"),
    "F18-stops": (COMPLETIONS, field(stop=["x"] * 10_000), 400, None, "stop"),
    "F19-bias": (COMPLETIONS, field(logit_bias={"301": 1}), 400, None, "logit_bias"),
    "F20-seed": (COMPLETIONS, field(seed=2**63), 400, None, "seed"),
    "F24-template": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}',
        400,
        None,
        "chat_template",
    ),
    "F21-schema": (
        CHAT,
        json.dumps(
            {
                "messages": [{"role": "user", "content": "a"}],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "nothing"}},
                },
            }
        ).encode(),
        400,
        "invalid_grammar",
        "response_format",
    ),
    "F22-invalid": (COMPLETIONS, field(structured_outputs={"regex": "("}), 400, None, None),
    "F22-large": (COMPLETIONS, field(structured_outputs={"regex": "a" * 2**20}), 400, None, None),
    "F25-tools": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}',
        400,
        None,
        "tools",
    ),
    "F27-address": (
        CHAT,
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", '
        b'"image_url": {"url": "http://169.254.169.254/"}}]}]}',
        400,
        None,
        None,
    ),
    "F32-embeddings": (COMPLETIONS, field(prompt_embeds="AAAA"), 400, None, "prompt_embeds"),
    "F34-no-such-route": ("/v1/nope", b"{}", 404, None, None),
    "F34-method": ("/v1/models", b"{}", 405, None, None),
}


def ask(server: Server, row: Row) -> httpx.Response:
    """Send what the row says."""
    path, body, *_ = row
    headers = {"content-type": "application/json"}
    return server.client.post(f"{server.url}{path}", content=body, headers=headers)


def ask_for_shape(server: Server, number: int) -> httpx.Response:
    """A request that is good: each number has a shape of its own."""
    schema = {"type": "object", "properties": {f"name{number}": {"type": "integer"}}}
    return server.complete(structured_outputs={"json": schema}, ignore_eos=False, max_tokens=2)
