"""`octavo chat`: a conversation in the terminal."""

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from octavo.cli.adapters import add_adapter_flag, chosen_adapter
from octavo.cli.flags import add_engine_flags, add_sampling_flags, engine_values, sampling_params
from octavo.core import SamplingParams
from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.engine import LLM, LoRARequest

HELP = "talk with a model in the terminal"
COMMANDS = "/reset starts afresh, /stats shows figures, /exit leaves; Ctrl-C stops an answer"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_sampling_flags(parser, temperature=0.7, top_p=0.95, max_tokens=1024)
    add_adapter_flag(parser)
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    from octavo.engine import LLM

    sampling, adapter = sampling_params(arguments), chosen_adapter(arguments)
    llm = LLM(arguments.model, **engine_values(arguments))
    talk = Talk(llm, sampling, arguments.system, adapter=adapter)
    print(f"{arguments.model} · {COMMANDS}")
    while True:
        try:
            text = input("\n> ").strip()
        except KeyboardInterrupt:  # at the prompt it drops the line, as in a shell
            continue
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            talk.reset()
            print("a new conversation")
        elif text == "/stats":
            print(talk.stats())
        elif text.startswith("/"):
            print(COMMANDS)
        elif text:
            talk.answer(text)


class Talk:
    """One conversation and the figures of its last answer."""

    def __init__(
        self,
        llm: "LLM",
        sampling: SamplingParams,
        system: str | None,
        *,
        adapter: "LoRARequest | None" = None,
    ):
        self._llm = llm
        self._adapter = adapter
        self._sampling = sampling
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self._num_tokens = 0
        self._ttft_s = self._total_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = list(self._beginning)

    def answer(self, text: str) -> None:
        """Say something; print the answer as it comes. A Ctrl-C keeps what came so far."""
        messages = [*self._messages, {"role": "user", "content": text}]
        said = ""
        with _interruptible() as interrupted:
            try:
                token_ids = self._llm.get_tokenizer().encode_chat(messages)
                for piece in self._timed(token_ids):
                    print(piece, end="", flush=True)
                    said += piece
                    if interrupted:
                        print(" [stopped]", end="")
                        break
            except RequestError as error:
                print(f"[{error}; /reset starts a new conversation]")
                return
        print()
        self._messages = [*messages, {"role": "assistant", "content": said}]

    def _timed(self, token_ids: list[int]) -> Iterator[str]:
        """Pieces of the answer; leaving early ends the request."""
        start = time.perf_counter()
        self._num_tokens = 0
        answer = self._llm.stream(token_ids, self._sampling, lora_request=self._adapter)
        with closing(answer) as deltas:
            for delta in deltas:
                self._total_s = time.perf_counter() - start
                if self._num_tokens == 0:
                    self._ttft_s = self._total_s
                self._num_tokens += len(delta.token_ids)
                yield delta.text

    def stats(self) -> str:
        """Figures of the last answer, and how full the KV cache is."""
        stats = self._llm.stats()
        used = stats.num_blocks - stats.num_free_blocks
        decode_s = self._total_s - self._ttft_s
        speed = (self._num_tokens - 1) / decode_s if self._num_tokens > 1 and decode_s > 0 else 0.0
        return (
            f"{len(self._messages)} messages · last answer: {self._num_tokens} tokens, first after "
            f"{self._ttft_s * 1e3:.0f} ms, then {speed:.1f} tokens/s · KV blocks in use: {used} of "
            f"{stats.num_blocks}"
        )


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """A list that is not empty after a Ctrl-C: an answer ends between two steps, never in one."""
    seen: list[bool] = []

    def note(signum: int, frame: FrameType | None) -> None:
        seen.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
