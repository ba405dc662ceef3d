"""Hostile requests, each sent to a server with a fake engine; owns what every answer must be.

PYTHONPATH=tests python -m fuzz.http_play --seed N         one request, with its answer
PYTHONPATH=tests python -m fuzz.http_play --seeds A B      those of the seeds A to B-1

A request is answered within two seconds, never by a 500; an error is JSON in OpenAI's shape, and
tells nothing of the machine. The server works afterwards, and holds nothing.
"""

import argparse
import http.client
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.http_cases import MAX_BODY_BYTES, HttpCase, draw_http_case
from server.helpers import LiveServer, eventually, serving
from server.templates import HERMES, engine_of

from octavo.engine import ServedModel
from octavo.server import ServerConfig

CONFIG = ServerConfig(
    max_request_bytes=MAX_BODY_BYTES,
    max_prompts=4,
    max_stored_responses=100,
    read_timeout_s=0.1,
    write_timeout_s=0.5,
)
MAX_MODEL_LEN = 400
MAX_ANSWER_S = 2.0
MAX_MESSAGE_CHARS = 1000
GOOD_EVERY = 25
REPLY = "Well."
ROOT = Path(__file__).parents[2]
TELLING = re.compile(
    "|".join(map(re.escape, (str(ROOT), sys.prefix, sys.base_prefix)))
    + r"|Traceback|site-packages|\b0x[0-9a-f]{6,}| object at |<class |octavo\.\w+\.|\.py\b"
)
# Of what is no HTTP the application never hears: h11 and uvicorn answer in their own words.
BELOW = (b"Invalid HTTP request received.", b"")


class BrokenPromise(Exception):
    """An answer that should not have been."""


@dataclass
class HttpReport:
    """What became of a range of seeds."""

    num_cases: int = 0
    slowest_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)  # by seed


@contextmanager
def target() -> Iterator[LiveServer]:
    """A server that is worth attacking: it takes tools and answers every prompt."""
    engine = engine_of(HERMES, REPLY)
    engine.max_model_len = MAX_MODEL_LEN
    model = engine.model
    engine.model = ServedModel(model.name, MAX_MODEL_LEN, model.vocab_size, model.tokenizer)
    with serving(engine, CONFIG) as live:
        yield live


def fuzz_http(first: int, last: int, *, progress: bool = False) -> HttpReport:
    """Send the requests of the seeds from `first` to `last` - 1."""
    report = HttpReport()
    with target() as live:
        for seed in range(first, last):
            case = draw_http_case(seed)
            start_s = time.monotonic()
            try:
                outcome = play(live, case)
                wake(live)
                if seed % GOOD_EVERY == 0 or seed == last - 1:
                    check_good(live)
            except BrokenPromise as broken:
                outcome = "FAILED"
                report.failures[seed] = f"{case.note}: {broken}"
                if progress:
                    print(f"seed {seed}: {report.failures[seed]}", flush=True)
            report.slowest_s = max(report.slowest_s, time.monotonic() - start_s)
            report.outcomes[outcome] += 1
            report.num_cases += 1
        with suppress(AssertionError):
            eventually(lambda: not live.engine.live)
        if live.engine.live:
            report.failures[last] = f"the engine works for nobody: {sorted(live.engine.live)}"
    return report


def play(live: LiveServer, case: HttpCase) -> str:
    """Send one request and look at the answer; returns its status and, of an error, its code."""
    start_s = time.monotonic()
    status, content_type, body = _exchange(live, case)
    seconds = time.monotonic() - start_s
    if seconds > MAX_ANSWER_S:
        raise BrokenPromise(f"took {seconds:.1f} s")
    if status == 0:
        return "closed"
    if status >= 500 and status not in (503, 504):
        raise BrokenPromise(f"{status}: {body[:500]!r}")
    if content_type.startswith("text/event-stream"):
        _check_events(body)
        return f"{status} stream"
    if status < 400:
        return str(status)
    if case.method == "HEAD" or (not content_type.startswith("application/json") and body in BELOW):
        return f"{status} below"
    return f"{status} {_check_error(body)}"


def _exchange(live: LiveServer, case: HttpCase) -> tuple[int, str, bytes]:
    """(status, content type, body); zero where the server closed without a word, as it may.

    It may, after it has refused a body for its size and while that is still being sent.
    """
    with live.connect() as connection:
        connection.settimeout(2 * MAX_ANSWER_S)
        response = http.client.HTTPResponse(connection, method=case.method)
        try:
            # Where the server has stopped to listen, its answer may be there nevertheless.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(case.wire)
            response.begin()
            body = response.read()
        except TimeoutError:
            raise BrokenPromise("no answer") from None
        except (ConnectionResetError, http.client.RemoteDisconnected) as error:
            if len(case.wire) > MAX_BODY_BYTES:
                return 0, "", b""
            raise BrokenPromise(f"closed without an answer: {error!r}") from None
        except http.client.IncompleteRead:
            raise BrokenPromise("an answer that breaks off") from None
        finally:
            response.close()
        return response.status, response.getheader("content-type", ""), body


def _check_error(body: bytes) -> str:
    """Of one error of ours, its code."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        raise BrokenPromise(f"no error object: {body[:500]!r}") from None
    if error.keys() != {"message", "type", "param", "code"}:
        raise BrokenPromise(f"another error object: {body[:500]!r}")
    message = error["message"]
    if not isinstance(message, str) or not 0 < len(message) <= MAX_MESSAGE_CHARS:
        raise BrokenPromise(f"a message of {len(message)} characters: {message[:500]}")
    if TELLING.search(message):
        raise BrokenPromise(f"it tells too much: {message[:500]}")
    return str(error["code"] or error["type"])


def _check_events(body: bytes) -> None:
    for frame in body.split(b"\n\n"):
        data = frame.partition(b"data: ")[2]
        if not data.startswith(b"{"):
            continue
        event = json.loads(data)
        failed = event.get("response", {}) if isinstance(event.get("response"), dict) else {}
        error = event.get("error") or failed.get("error")
        if error is not None and TELLING.search(error["message"]):
            raise BrokenPromise(f"it tells too much: {error['message'][:500]}")


def wake(live: LiveServer) -> None:
    """Undo what an operator may do, and on a server without keys, anybody."""
    if not live.engine.rest.is_awake:
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=2 * MAX_ANSWER_S)
        try:
            connection.request("POST", "/wake_up")
            connection.getresponse().read()
        finally:
            connection.close()


def check_good(live: LiveServer) -> None:
    """The server still answers who asks properly."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=2 * MAX_ANSWER_S)
    try:
        body = json.dumps({"prompt": "Hi"})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        if answer.get("choices", [{}])[0].get("text") != REPLY:
            raise BrokenPromise(f"a good request went wrong afterwards: {answer}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise BrokenPromise(f"a good request went wrong afterwards: {error!r}") from None
    finally:
        connection.close()


def replay(seed: int) -> str:
    """The line that sends one request again."""
    return f"PYTHONPATH=tests {Path(sys.executable).name} -m fuzz.http_play --seed {seed}"


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.http_play", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="send one request")
    which.add_argument("--seeds", type=int, nargs=2, metavar=("A", "B"))
    options = parser.parse_args()
    if options.seeds is None:
        case = draw_http_case(options.seed)
        print(case.note, case.wire[:2000], sep="\n", flush=True)
        options.seeds = options.seed, options.seed + 1
    start_s = time.monotonic()
    report = fuzz_http(*options.seeds, progress=True)
    seconds = time.monotonic() - start_s
    print(
        f"{report.num_cases} requests in {seconds:.0f} s, {len(report.failures)} failed; "
        f"the slowest took {report.slowest_s:.2f} s"
    )
    for outcome, count in report.outcomes.most_common(40):
        print(f"  {count:7} {outcome}")
    for seed in report.failures:
        print(f"replay: {replay(seed)}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
