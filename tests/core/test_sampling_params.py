import math

import msgspec
import pytest

from octavo.core import SamplingParams
from octavo.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("top_k", -2),
        ("top_k", 1.5),
        ("presence_penalty", 1e308),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("n", 0),
        ("n", 10**9),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", 2**63),
        ("seed", 2**63),
        ("logprobs", 10**6),
        ("logprobs", -1),
        ("stop", ["ok", ""]),
        ("stop", ["x"] * 10_000),
        ("stop", "x" * 1_000_000),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("allowed_token_ids", []),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in str(caught.value) or "stop string" in str(caught.value)


def test_min_tokens_cannot_exceed_max_tokens():
    with pytest.raises(RequestError, match="max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_stop_may_be_one_string_or_several():
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


def test_it_survives_the_wire():
    params = SamplingParams(
        n=2, temperature=0.5, stop=["a"], logit_bias={3: -1.5}, allowed_token_ids=[1, 2], seed=-7
    )
    wire = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(wire, type=SamplingParams) == params
