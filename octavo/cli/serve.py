"""`octavo serve`: the OpenAI-compatible server, with the engine in a process of its own."""

import argparse
import gc
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from octavo.cli.flags import add_dataclass, add_engine_flags, collect, engine_options
from octavo.config import locate
from octavo.config.lora import parse_modules
from octavo.engine import AsyncEngine, EngineProcess
from octavo.engine.logs import configure_logs
from octavo.errors import ConfigError, OctavoError
from octavo.server.config import ServerConfig
from octavo.text import NoTokenizer, load_tokenizer
from octavo.vision.prompts import load_image_reader

logger = logging.getLogger(__name__)

HELP = "serve a model over HTTP with the OpenAI API"

LOOPBACK = ("127.0.0.1", "::1", "localhost")

CURL = """\
curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}],
       "temperature": 0}}'"""
CURL_OF_ENCODER = """\
curl {url}/rerank -H 'Content-Type: application/json' \\
  -d '{{"query": "What is a dog?", "documents": ["stocks fell", "a puppy is a young dog"]}}'"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_dataclass(parser, ServerConfig, "server")
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    values = collect(arguments, ServerConfig)
    config = ServerConfig(**{"api_key": os.environ.get("OCTAVO_API_KEY")} | values)
    configure_logs(config.log_format, logging.INFO)
    if config.log_format == "text":
        return _run(arguments, config)
    try:
        return _run(arguments, config)
    except OctavoError as error:  # the last line is for machines, too
        logger.critical("%s", error)
        return 1


def _run(arguments: argparse.Namespace, config: ServerConfig) -> int:
    options = engine_options(arguments)
    if config.is_open and config.host not in LOOPBACK:
        logger.warning("whoever reaches %s may use this server: give --api-key-file", config.host)
    checkpoint = locate(options.model, weights=options.loading.reads_weights)
    for name, _ in parse_modules(options.lora.lora_modules):
        if name in (checkpoint.name, *config.served_model_name):
            raise ConfigError(f"lora_modules: the model itself is called {name!r}; choose another")
    listener = listen(config)
    url = f"{config.scheme}://{config.host}:{listener.getsockname()[1]}"
    print(f"Octavo serves {checkpoint.name}", flush=True)
    # Loads the model while this process imports the server.
    process = EngineProcess(options, log_format=config.log_format)
    try:
        from octavo.server import create_app, return_large_blocks, serve

        return_large_blocks()
        engine = AsyncEngine(
            process,
            NoTokenizer() if options.loading.skip_tokenizer_init else load_tokenizer(checkpoint),
            model_name=checkpoint.name,
            max_num_queued_reqs=options.scheduler.max_num_queued_reqs,
            images=load_image_reader(
                checkpoint,
                model_impl=options.loading.model_impl,
                max_video_frames=config.max_video_frames,
            ),
        )

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            await engine.start(print_phase)
            gc.freeze()  # to look at all that is here now would hold every stream up for 0.1 s
            print(f"  {'ready after':<28}{seconds_since_start():6.2f} s")
            example = CURL if engine.model.tasks.generates else CURL_OF_ENCODER
            print(f"\nListening on {url}\nTry it:\n  {example.format(url=url)}\n", flush=True)
            yield
            await engine.stop()

        serve(create_app(engine, config, lifespan=lifespan), config, sockets=[listener])
    finally:
        process.stop()
    return 0


def listen(config: ServerConfig) -> socket.socket:
    """The listening socket, bound before the model loads, so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another "
            "with --port"
        ) from error
    return listener


def print_phase(phase: str, seconds: float) -> None:
    """One line for a phase of the start-up."""
    print(f"  {phase:<28}{seconds:6.2f} s", flush=True)


def seconds_since_start() -> float:
    """Seconds since this process began, imports included."""
    start_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return since_boot - start_ticks / os.sysconf("SC_CLK_TCK")
