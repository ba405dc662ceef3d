"""The responses that clients may ask for again: in memory, bounded, each owner's own.

Oldest go first, but none that still runs. Gone with the process. Knows no HTTP and no engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson

from octavo.errors import IntegrityError
from octavo.server.responses_protocol import RUNNING, InputItem


@dataclass(slots=True)
class StoredResponse:
    """A response, and the conversation that it answers.

    owner: whose it is; for all others it does not exist.
    items: of the whole conversation up to the answer, without instructions.
    """

    document: dict[str, Any]
    owner: str
    items: Sequence[InputItem]
    num_bytes: int = 0
    _num_item_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self._num_item_bytes = len(msgspec.json.encode(self.items))
        self.update(self.document)

    def update(self, document: dict[str, Any]) -> None:
        """The response has changed."""
        self.document = document
        self.num_bytes = self._num_item_bytes + len(orjson.dumps(document))

    @property
    def id(self) -> str:
        """The response's."""
        return str(self.document["id"])

    @property
    def is_running(self) -> bool:
        """Whether it will still change."""
        return self.document["status"] in RUNNING

    def conversation(self) -> list[InputItem]:
        """All that a next turn follows; calls that broke off are left out."""
        whole = [item for item in self.document["output"] if not _is_broken(item)]
        return [*self.items, *msgspec.convert(whole, list[InputItem])]


def _is_broken(item: Mapping[str, Any]) -> bool:
    return bool(item["type"] == "function_call" and item["status"] != "completed")


class ResponseStore:
    """All stored responses of one server. Sole writer of its table."""

    def __init__(self, *, max_responses: int, max_bytes: int):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: dict[str, StoredResponse] = {}  # by id, oldest first
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def keep(self, response: StoredResponse) -> None:
        """Keep a response; others may have to go, and it may itself be too large to stay."""
        self.delete(response.id)
        self._stored[response.id] = response
        self.num_bytes += response.num_bytes
        self._make_room()

    def update(self, response_id: str, document: dict[str, Any]) -> None:
        """Note a change of a response, unless it has been deleted."""
        response = self._stored.get(response_id)
        if response is not None:
            self.num_bytes -= response.num_bytes
            response.update(document)
            self.num_bytes += response.num_bytes
            self._make_room()

    def find(self, response_id: str, owner: str) -> StoredResponse | None:
        """The response, where it is the owner's."""
        response = self._stored.get(response_id)
        return response if response is not None and response.owner == owner else None

    def delete(self, response_id: str) -> None:
        """Forget a response."""
        response = self._stored.pop(response_id, None)
        if response is not None:
            self.num_bytes -= response.num_bytes

    def _make_room(self) -> None:
        for response in list(self._stored.values()) if self._is_too_full() else ():
            if not response.is_running:
                self.delete(response.id)
                if not self._is_too_full():
                    return

    def _is_too_full(self) -> bool:
        return len(self._stored) > self._max_responses or self.num_bytes > self._max_bytes

    def check_integrity(self) -> None:
        """Recount from scratch; raises `IntegrityError` where the books are wrong."""
        responses = self._stored.values()
        problems = {
            "a response under another id": any(n != r.id for n, r in self._stored.items()),
            "bytes": self.num_bytes != sum(response.num_bytes for response in responses),
            "too full": self._is_too_full() and not all(r.is_running for r in responses),
        }
        for what, is_so in problems.items():
            if is_so:
                raise IntegrityError(f"stored responses: {what}")
