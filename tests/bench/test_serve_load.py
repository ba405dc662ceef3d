"""The load generator: what it makes of the times it saw, and a server that is really started."""

import asyncio
import json
import math
import sys

import numpy as np
import pytest

from octavo.bench.serve import (
    Exchange,
    ServeSetup,
    check_loopback,
    measure_load,
    summarise,
)
from octavo.bench.server_process import flags_of, running_server
from octavo.cli import main
from octavo.errors import ConfigError, OctavoError
from octavo.testing.tiny_llama import TINY_CONFIG

OPTIONS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 2**23,
    "device": "cpu",
    "num_threads": 1,
}
SETUP = ServeSetup(random_input_len=12, random_output_len=5, num_prompts=6, max_token_id=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return str(folder)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://127.3.2.1:1", "http://[::1]:80/", "http://localhost:1"]
)
def test_this_machine_may_be_loaded(url):
    assert check_loopback(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:8000",
        "http://example.org",
        "http://0.0.0.0:80",
        "http://127.0.0.1.example.org",
        "http://localhost@example.org",
        "https://127.0.0.1",
        "127.0.0.1:8000",
        "",
    ],
)
def test_no_other_machine_is(url):
    with pytest.raises(ConfigError, match="on this machine only"):
        check_loopback(url)
    with pytest.raises(ConfigError, match="on this machine only"):
        measure_load(url, "m", SETUP, 1.0)


def test_a_rate_must_be_positive():
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="rate must be positive"):
            measure_load("http://127.0.0.1:1", "m", SETUP, rate)


def test_latencies_are_from_sending_to_the_first_chunk_and_between_chunks():
    exchanges = [
        Exchange(3, sent_s=1.0, times_s=[1.5, 1.6, 1.8]),
        Exchange(3, sent_s=2.0, times_s=[2.1, 2.2, 2.3]),
    ]
    load = summarise(exchanges, rate=2.0, duration_s=3.0)
    assert load.ttft_ms.p50 == pytest.approx(300)
    assert load.ttft_ms.p99 == pytest.approx(float(np.percentile([100, 500], 99)))
    assert load.tpot_ms.p50 == pytest.approx(125)
    assert load.itl_ms.p90 == pytest.approx(float(np.percentile([100, 200, 100, 100], 90)))
    assert load.output_tokens_per_s == pytest.approx(2.0)
    one = summarise([Exchange(1, sent_s=0.0, times_s=[1.0])], rate=math.inf, duration_s=1.0)
    assert one.tpot_ms.p50 == 0.0 and one.itl_ms.p50 == 0.0 and one.request_rate is None


def test_options_become_flags():
    options = {"enable_prefix_caching": False, "async_scheduling": True, "max_num_seqs": 4}
    assert flags_of(options | {"dtype": None}) == [
        "--no-enable-prefix-caching",
        "--async-scheduling",
        "--max-num-seqs",
        "4",
    ]


CHUNK = b'data: {"choices":[{"index":0,"text":"","finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'


def usage(num_tokens):
    return b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % num_tokens


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        (b"HTTP/1.1 429 Too Many Requests", b"full", "429: full"),
        (b"HTTP/1.1 200 OK", 5 * CHUNK + END, "without usage"),
        (b"HTTP/1.1 200 OK", 4 * CHUNK + END + usage(4), "4 tokens came, 5 were asked for"),
        (b"HTTP/1.1 200 OK", CHUNK + b'data: {"error":{"message":"x"}}\n\n', "without usage"),
        (b"HTTP/1.1 200 OK", usage(5), "no token came"),
    ],
)
async def test_an_answer_that_is_not_whole_fails_the_measurement(head, body, message):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + b"\r\nConnection: close\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(OctavoError, match=f"of 6 requests failed: .*{message}"):
            await asyncio.to_thread(measure_load, url, "m", SETUP, math.inf)


def test_without_the_client_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ConfigError, match=r"octavo\[bench\]"):
        measure_load("http://127.0.0.1:1", "m", SETUP, math.inf)


@pytest.mark.server
def test_a_server_is_started_loaded_and_stopped(model, tmp_path, capsys):
    file = tmp_path / "loads.json"
    flags = ["--model", model, "--output-json", str(file), "--request-rate", "50", "inf"]
    flags += ["--num-prompts", "6", "--random-input-len", "12", "--random-output-len", "5"]
    options = {name: value for name, value in OPTIONS.items() if name != "skip_tokenizer_init"}
    assert main(["bench", "serve", *flags, *flags_of(options)]) == 0
    assert "6 requests, all at once" in capsys.readouterr().out
    loads = json.loads(file.read_text())["result"]
    assert [load["request_rate"] for load in loads] == [50.0, None]
    for load in loads:
        assert 0 < load["ttft_ms"]["p50"] <= load["ttft_ms"]["p99"]
        assert load["itl_ms"]["p50"] > 0  # a chunk for each token, though none has a text


@pytest.mark.server
def test_a_running_server_is_loaded_through_its_url(model):
    name = "tiny"
    with running_server(model, OPTIONS) as url:
        load = measure_load(url, name, SETUP, math.inf)
        assert load.num_prompts == 6
        flags = ["--num-prompts", "2", "--random-input-len", "8", "--random-output-len", "3"]
        base = ["bench", "serve", "--base-url", url, "--model", name, *flags]
        base += ["--max-token-id", "300"]
        assert main(base) == 0
        assert main([*base, "--max-num-seqs", "4"]) == 1  # that server has its options already
        with pytest.raises(OctavoError, match="404"):
            measure_load(url, "another", SETUP, math.inf)


@pytest.mark.server
def test_a_server_that_does_not_start_is_an_error_with_its_last_words(model):
    with (
        pytest.raises(OctavoError, match=r"ended with code 1:(.|\n)*100000"),
        running_server(model, OPTIONS | {"max_model_len": 100_000}),
    ):
        pass
