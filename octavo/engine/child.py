"""The engine process as its parent holds it: start, messages both ways, a look from outside, end.

Sole writer of the socket. Knows no requests and no text.
"""

import asyncio
import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from octavo.config import EngineOptions
from octavo.engine.interface import Pulse
from octavo.engine.messages import FromEngine, ToEngine, decode_from_engine, encode
from octavo.engine.postmortem import cause_of_exit, cpu_seconds, process_state
from octavo.errors import EngineDeadError

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
LOADING_NEWS_S = 60.0  # the log hears so often of a start-up phase that takes long


class EngineProcess:
    """The child process and its socket. Started at once, so that it loads while others import."""

    def __init__(self, options: EngineOptions, *, log_format: str = "text"):
        # mkdtemp makes it readable by this user alone: the socket needs no other secret.
        self._directory = Path(tempfile.mkdtemp(prefix="octavo-"))
        address = f"ipc://{self._directory / 'engine'}"
        self.num_sent = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "octavo.engine.process", address, log_format],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is not for the child
        )
        if self.child.stdin is None:
            raise EngineDeadError("the engine process has no standard input")
        self.child.stdin.write(msgspec.json.encode(options) + b"\n")
        self.child.stdin.flush()  # and left open: when it closes, the child exits

    def connect(self) -> None:
        """Let messages go through the event loop that runs now."""
        self._messages = zmq.asyncio.Socket.shadow(self._socket)

    def send(self, message: ToEngine) -> None:
        """Hand a message over."""
        # ZeroMQ queues without bound and hands over in a thread of its own: this never waits.
        self._messages.send(encode(message))
        self.num_sent += 1

    async def receive(self) -> FromEngine:
        """The next message."""
        message: FromEngine = decode_from_engine(await self._messages.recv())
        return message

    async def receive_loading(self, watch: "asyncio.Task[None]", phase: str) -> FromEngine:
        """The same from a child that loads; the log hears of a phase that takes long.

        watch: is done when the child has ended.
        """
        receive = asyncio.ensure_future(self.receive())
        start_s = time.monotonic()
        while not (receive.done() or watch.done()):
            await asyncio.wait(
                [receive, watch],
                timeout=LOADING_NEWS_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            waited_s = time.monotonic() - start_s
            if waited_s >= LOADING_NEWS_S:
                state = process_state(self.child.pid)
                logger.warning(
                    "the engine loads: no news for %.0f s %s; its process %s",
                    waited_s,
                    phase,
                    state,
                )
        if receive.done():
            return receive.result()
        receive.cancel()
        raise self.death(phase)

    async def watch(self, on_exit: Callable[[], None]) -> None:
        """Notice within half a second that the child is gone."""
        while self.child.poll() is None:
            await asyncio.sleep(0.25)
        await asyncio.sleep(0.1)  # its last words may still be on the way
        on_exit()

    def death(self, phase: str) -> EngineDeadError:
        """Why a child ended that said nothing of it; `phase` is what it did before."""
        return EngineDeadError(cause_of_exit(self.child.returncode, self.child.pid, phase))

    def examine(self, *, on_cpu: bool) -> Pulse:
        """What it does now; it is asked for its stacks, too, on standard error."""
        cpu_s = cpu_seconds(self.child.pid) if on_cpu else 0.0
        pulse = Pulse(process_state(self.child.pid), cpu_s)
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGUSR1)
        return pulse

    def stop(self, patience_s: float = STOP_TIMEOUT_S) -> None:
        """End the child and remove the socket. A child that does not go in time is killed."""
        if self.child.stdin is not None:
            with contextlib.suppress(OSError):
                self.child.stdin.close()
        try:
            self.child.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.child.kill()
            # A call into a driver may not be interruptible: then the kernel ends it when it can.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(STOP_TIMEOUT_S)
        self._socket.close(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)
