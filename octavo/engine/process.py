"""The engine in a process of its own: `python -m octavo.engine.process SOCKET LOG_FORMAT`.

Options come as one line of JSON on standard input, which stays open: when it closes, the front end
is gone and so is this process. Knows no HTTP and no text.
"""

import contextlib
import faulthandler
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
from octavo.engine.logs import configure_logs
from octavo.engine.messages import (
    AbortRequests,
    AdapterLoaded,
    AdapterUnloaded,
    AddRequests,
    ExpertTokens,
    Explain,
    Explanation,
    Fatal,
    ListExpertTokens,
    ListRequests,
    LoadAdapter,
    News,
    PhaseDone,
    Ready,
    Refused,
    RequestList,
    ResetPrefixCache,
    Sleep,
    Slept,
    Told,
    Unable,
    UnloadAdapter,
    WakeUp,
    WasReset,
    WokenUp,
    decode_to_engine,
    encode,
)
from octavo.engine.tasks import tasks_of
from octavo.errors import EngineDeadError, OctavoError, OverloadedError, RequestError

logger = logging.getLogger("octavo.engine")

# Where requests wait and none may run, steps are empty: do not flood the front end with their news.
NOBODY_RUNS_MS = 1


def main() -> None:
    """Entry point: build the engine, serve until the front end goes away."""
    configure_logs(sys.argv[2], logging.WARNING)
    for name in ("memory_report", "sleep"):
        logging.getLogger(f"octavo.engine.{name}").setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle
    faulthandler.enable()  # a crash in native code shows where
    faulthandler.register(signal.SIGUSR1)  # and so does a step that hangs, when it is asked
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
                tasks=tasks_of(config.model),
                adapters=core.adapters.loaded,
            )
        )
    )
    num_read = 0
    while True:
        events, num_new = _receive(core, socket)
        num_read += num_new
        if core.has_work:
            events += core.step()
        stats = core.stats()
        socket.send(encode(News(events, stats, num_read)))
        if stats.num_waiting and not stats.num_running:
            socket.poll(NOBODY_RUNS_MS)


def _receive(core: EngineCore, socket: "zmq.Socket[bytes]") -> tuple[list[RequestEvent], int]:
    """Take all messages that are there; wait for one where there is nothing to compute.

    Returns what came of them, and how many they were.
    """
    events: list[RequestEvent] = []
    num_new = 0
    wait_ms = 0 if core.has_work else None
    while socket.poll(wait_ms):
        wait_ms = 0
        num_new += 1
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
            case ListExpertTokens(number):
                socket.send(encode(ExpertTokens(number, core.expert_tokens())))
            case ResetPrefixCache(number):
                socket.send(encode(_reset(core, number)))
            case LoadAdapter() | UnloadAdapter() as change:
                socket.send(encode(_change_adapters(core, change)))
            case Sleep(number, level):
                socket.send(encode(_sleep(core, number, level)))
            case WakeUp(number):
                socket.send(encode(_wake_up(core, number)))
    return events, num_new


def _reset(core: EngineCore, number: int) -> WasReset | Unable:
    try:
        core.reset_prefix_cache()
    except OSError as error:
        return _unable(number, "cannot empty its KV file", error)
    return WasReset(number)


def _change_adapters(core: EngineCore, change: LoadAdapter | UnloadAdapter) -> Told | Unable:
    try:
        match change:
            case LoadAdapter(number, name, path, replace):
                adapter = core.adapters.load(name, path, replace=replace, from_outside=True)
                return AdapterLoaded(number, adapter)
            case UnloadAdapter(number, name):
                core.adapters.unload(name)
                return AdapterUnloaded(number)
    except RequestError as error:
        return Unable(change.number, str(error), type(error).__name__, error.param)
    except Exception as error:  # no memory, say: nothing has changed
        return _unable(change.number, "cannot load an adapter", error)


def _sleep(core: EngineCore, number: int, level: int) -> Told | Unable:
    gc.unfreeze()  # what is given up must not stay for a cycle that nobody looks for
    try:
        return Slept(number, core.sleep(level))
    except Exception as error:  # of whatever kind: the engine is what it was before
        return _unable(number, "cannot sleep", error)


def _wake_up(core: EngineCore, number: int) -> Told | Unable:
    try:
        core.wake_up()
    except Exception as error:  # memory or a file may be there again when it is next asked
        return _unable(number, "cannot wake up", error)
    gc.freeze()
    return WokenUp(number)


def _unable(number: int, what: str, error: Exception) -> Unable:
    logger.error("the engine %s", what, exc_info=error)
    return Unable(number, f"the engine {what}: {type(error).__name__}: {error}")


def _refusal(request_id: str, error: RequestError | OverloadedError) -> Refused:
    kind = type(error).__name__
    if isinstance(error, OverloadedError):
        return Refused(request_id, kind, str(error), retry_after_s=error.retry_after_s)
    return Refused(request_id, kind, str(error), error.param)


if __name__ == "__main__":
    main()
