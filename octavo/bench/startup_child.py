"""The process that `octavo.bench.startup` times: one engine, one token, one line of JSON.

Imports nothing at its head that an engine would not need, since imports are part of what is timed.
"""

import sys
import time


def main() -> None:
    """Build the engine that standard input orders, draw one token, tell when what happened."""
    begun_s = time.monotonic()
    from octavo.engine.llm import LLM

    imported_s = time.monotonic()
    import msgspec

    from octavo.bench.draws import Draws
    from octavo.bench.offline import run_work, vocab_size_of
    from octavo.bench.startup import Marks, Order

    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    phases: list[tuple[str, float]] = []
    llm = LLM(
        order.model, **order.options, on_phase=lambda name, seconds: phases.append((name, seconds))
    )
    ready_s = time.monotonic()
    run_work(llm, Draws(vocab_size_of(llm)).warm_up().with_output(1))
    marks = Marks(
        begun_s=begun_s,
        imported_s=imported_s,
        ready_s=ready_s,
        first_token_s=time.monotonic(),
        phases=phases,
    )
    print(msgspec.json.encode(marks).decode(), flush=True)


if __name__ == "__main__":
    main()
