"""`octavo keys`: makes API keys for the file that `octavo serve --api-key-file` reads."""

import argparse
import os
import sys
from pathlib import Path

from octavo.errors import ConfigError

HELP = "make an API key with scopes, a tenant and limits"
SCOPES = ("inference", "metrics", "admin")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("name", metavar="NAME", help="what the key is called in logs and metrics")
    parser.add_argument(
        "--file",
        type=Path,
        default=Path("keys.toml"),
        help="where its entry is added; take the entry out to revoke it (default: %(default)s)",
    )
    parser.add_argument(
        "--scope",
        nargs="+",
        choices=SCOPES,
        default=["inference"],
        help="what it is good for (default: inference)",
    )
    parser.add_argument("--tenant", help="whose share of the engine its requests use")
    for flag, meaning in (
        ("--requests-per-minute", "requests at most"),
        ("--tokens-per-minute", "tokens of prompts and answers at most"),
        ("--max-tokens", "tokens of prompts and answers in all"),
    ):
        parser.add_argument(flag, type=int, metavar="N", help=f"{meaning} (default: no bound)")


def run(arguments: argparse.Namespace) -> int:
    """Add an entry to the file and print the key, once."""
    from octavo.server.keys import new_key, read_key_file  # FastAPI comes along, and takes a while

    path: Path = arguments.file
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    key, digest = new_key()
    entry = {
        "name": arguments.name,
        "sha256": digest,
        "scopes": arguments.scope,
        "tenant": arguments.tenant,
        "requests_per_minute": arguments.requests_per_minute,
        "tokens_per_minute": arguments.tokens_per_minute,
        "max_tokens": arguments.max_tokens,
    }
    lines = [f"{name} = {_toml(value)}" for name, value in entry.items() if value is not None]
    beside = path.with_name(f"{path.name}.new")
    try:
        beside.write_text(f"{before}\n[[keys]]\n" + "\n".join(lines) + "\n", encoding="utf-8")
        beside.chmod(0o600)
        read_key_file(beside)
        os.replace(beside, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
    print(key)
    print(
        f"{path} has its hash, and nothing has the key itself: keep it. "
        f"octavo serve --api-key-file {path} takes it",
        file=sys.stderr,
    )
    return 0


def _toml(value: str | int | list[str]) -> str:
    """As TOML has it; what is in a string that would need escapes, the file's reader refuses."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
