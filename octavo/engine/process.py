"""The engine in a process of its own: `python -m octavo.engine.process SOCKET`.

Options come as one line of JSON on standard input, which stays open: when it closes, the front end
is gone and so is this process. Knows no HTTP and no text.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time

import msgspec
import zmq

from octavo.config import EngineOptions
from octavo.core import RequestEvent
from octavo.engine.core import EngineCore
from octavo.engine.messages import (
    AbortRequests,
    AddRequests,
    Explain,
    Explanation,
    Fatal,
    ListRequests,
    News,
    PhaseDone,
    Ready,
    Refused,
    RequestList,
    ResetPrefixCache,
    WasReset,
    decode_to_engine,
    encode,
)
from octavo.errors import EngineDeadError, OctavoError, OverloadedError, RequestError

logger = logging.getLogger("octavo.engine")


def main() -> None:
    """Entry point: build the engine, serve until the front end goes away."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("octavo.engine.memory_report").setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle
    options = msgspec.json.decode(sys.stdin.readline(), type=EngineOptions)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.connect(sys.argv[1])
        try:
            _run(options, socket)
        except Exception as error:
            # An error of ours says all in one line, which the front end prints.
            if not isinstance(error, OctavoError) or isinstance(error, EngineDeadError):
                logger.exception("the engine stops")
            socket.send(encode(Fatal(type(error).__name__, str(error))))
            sys.exit(1)


def _exit_with_parent() -> None:
    with contextlib.suppress(OSError):
        while sys.stdin.readline():
            pass
    os._exit(0)


def _run(options: EngineOptions, socket: "zmq.Socket[bytes]") -> None:
    start = time.perf_counter()
    from octavo.engine.build import build_engine  # imports torch, the slowest phase of all

    def tell(phase: str, seconds: float) -> None:
        socket.send(encode(PhaseDone(phase, seconds)))

    tell("import torch", time.perf_counter() - start)
    engine = build_engine(options, on_phase=tell)
    gc.freeze()  # what is here now stays: the collector need not look at a million objects again
    core, config = engine.core, engine.config
    socket.send(
        encode(
            Ready(
                max_model_len=config.max_model_len,
                vocab_size=config.model.vocab_size,
                eos_token_ids=config.model.eos_token_ids,
                max_num_seqs=config.max_num_seqs,
                stats=core.stats(),
                settings=[(s.name, str(s.value), s.source, s.why) for s in config.settings],
            )
        )
    )
    while True:
        events = _receive(core, socket)
        if core.has_work:
            events += core.step()
        socket.send(encode(News(events, core.stats())))


def _receive(core: EngineCore, socket: "zmq.Socket[bytes]") -> list[RequestEvent]:
    """Take all messages that are there; wait for one where there is nothing to compute."""
    events: list[RequestEvent] = []
    wait_ms = 0 if core.has_work else None
    while socket.poll(wait_ms):
        wait_ms = 0
        match decode_to_engine(socket.recv()):
            case AddRequests(requests):
                try:
                    core.add(*requests)
                except (RequestError, OverloadedError) as error:
                    socket.send(encode(_refusal(requests[0].request_id, error)))
            case AbortRequests(request_ids):
                events += core.abort(request_ids)
            case Explain(number, request_id):
                socket.send(encode(Explanation(number, core.why(request_id))))
            case ListRequests(number):
                socket.send(encode(RequestList(number, core.requests())))
            case ResetPrefixCache(number):
                core.reset_prefix_cache()
                socket.send(encode(WasReset(number)))
    return events


def _refusal(request_id: str, error: RequestError | OverloadedError) -> Refused:
    kind = type(error).__name__
    if isinstance(error, OverloadedError):
        return Refused(request_id, kind, str(error), retry_after_s=error.retry_after_s)
    return Refused(request_id, kind, str(error), error.param)


if __name__ == "__main__":
    main()
