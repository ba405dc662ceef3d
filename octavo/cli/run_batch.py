"""`octavo run-batch`: answers an OpenAI batch file with an engine of its own."""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from octavo.cli.flags import add_engine_flags, engine_options
from octavo.config import locate
from octavo.engine import AsyncEngine, EngineProcess
from octavo.errors import ConfigError
from octavo.text import load_tokenizer
from octavo.vision.prompts import load_image_reader

HELP = "answer a file of requests in OpenAI's batch format"
CONCURRENCY = 512


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, JSON lines"
    )
    parser.add_argument(
        "-o", "--output-file", type=Path, required=True, metavar="FILE", help="answers, JSON lines"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="add to the output file, and pass over what it answers already",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=CONCURRENCY,
        metavar="N",
        help="requests in the engine at once, waiting ones included (default: %(default)s)",
    )
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer every line; the status is 1 where some line got no answer but an error."""
    source, target = arguments.input_file, arguments.output_file
    if arguments.concurrency < 1:
        raise ConfigError("--concurrency must be a positive integer")
    if not source.is_file():
        raise ConfigError(f"there is no file {source}")
    if target.exists() and not arguments.resume:
        raise ConfigError(f"{target} exists: choose another file, or go on with --resume")
    options = engine_options(arguments)
    checkpoint = locate(options.model, weights=options.loading.reads_weights)
    done = frozenset(_answered(target)) if arguments.resume else frozenset[str]()
    process = EngineProcess(options)
    try:
        engine = AsyncEngine(
            process,
            load_tokenizer(checkpoint),
            model_name=checkpoint.name,
            max_num_queued_reqs=arguments.concurrency,
            images=load_image_reader(checkpoint, model_impl=options.loading.model_impl),
        )
        num_answers, num_failed = asyncio.run(
            _answer_all(engine, source, target, done, arguments.concurrency)
        )
    finally:
        process.stop()
    print(f"{num_answers} answers, {num_failed} of them errors, in {target}", file=sys.stderr)
    return 1 if num_failed else 0


async def _answer_all(
    engine: AsyncEngine, source: Path, target: Path, done: frozenset[str], concurrency: int
) -> tuple[int, int]:
    """The number of answers, and of errors among them."""
    from octavo.server import ServerConfig, create_app
    from octavo.server.batch_file import answers_to

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    app = create_app(engine, ServerConfig(), lifespan=lifespan)
    num_answers = num_failed = 0
    with source.open(encoding="utf-8") as lines, target.open("a", encoding="utf-8") as out:
        async with app.router.lifespan_context(app):
            async for answer in answers_to(app, lines, done=done, concurrency=concurrency):
                out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                out.flush()  # what was answered stays answered, whatever comes
                num_answers += 1
                response = answer["response"]
                num_failed += response is None or response["status_code"] != 200
    return num_answers, num_failed


def _answered(path: Path) -> Iterator[str]:
    """The ids that an output file has good answers to. A last line that was cut counts for none."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if (answer.get("response") or {}).get("status_code") == 200:
            yield answer["custom_id"]
