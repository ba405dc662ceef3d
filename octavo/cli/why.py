"""`octavo why`: asks a running server what its scheduler decided about a request."""

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request

from octavo.errors import ConfigError

HELP = "ask a running server why a request waits or waited"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("request_id", metavar="REQUEST_ID", help="the id in the response")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a sentence for each phase of each answer."""
    request_id = urllib.parse.quote(arguments.request_id, safe="")
    request = urllib.request.Request(f"{arguments.url}/debug/requests/{request_id}")
    if key := os.environ.get("OCTAVO_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            found = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            detail = json.load(error)["error"]["message"]
        raise ConfigError(f"{arguments.url} answers {error.code}: {detail}") from error
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError(
            f"{arguments.url} cannot be reached: {reason}; --url names the server to ask"
        ) from error
    for name, sentences in found["answers"].items():
        print(name)
        for sentence in sentences:
            print(f"  {sentence}")
    return 0
