"""How log lines look, in both processes: text for people, JSON for machines.

A line holds what happened and to which request; never a prompt, never an answer.
"""

import json
import logging
import time
from contextvars import ContextVar

LOG_FORMATS = ("text", "json")

# Of the HTTP request that a task works for; a record made there carries it.
REQUEST_ID: ContextVar[str | None] = ContextVar("octavo_request_id", default=None)

# What callers may add to a record, with `extra=`, for machines to read.
_EXTRA_FIELDS = (
    "method",
    "route",
    "status",
    "duration_s",
    "num_prompt_tokens",
    "num_output_tokens",
    "state",
)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what the record adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "time": f"{_utc(record.created)}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = record.__dict__.get("request_id", REQUEST_ID.get())
        if request_id is not None:
            line["request_id"] = request_id
        line |= {name: record.__dict__[name] for name in _EXTRA_FIELDS if name in record.__dict__}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def configure_logs(log_format: str, level: int) -> None:
    """Send all records of this process to standard error, in that format."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else logging.Formatter("%(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level, handlers=[handler])
