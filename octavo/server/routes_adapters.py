"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM names them and their bodies.

Knows what may be asked; which files may be read is the engine's to say.
"""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import Adapter
from octavo.server.body import decode, read_json
from octavo.server.errors import bad_request
from octavo.server.keys import Scope
from octavo.server.replies import json_response
from octavo.server.state import Route, ServerState


class LoadAdapterRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter to be served.

    lora_name: what requests will put in the field `model`.
    lora_path: its directory, below the server's --lora-dir.
    load_inplace: it may take the name of one that is loaded, whose running requests finish with it.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter that no further request may name."""

    lora_name: str


_load_decoder = msgspec.json.Decoder(LoadAdapterRequest)
_unload_decoder = msgspec.json.Decoder(UnloadAdapterRequest)


class AdapterRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        load, unload = LoadAdapterRequest, UnloadAdapterRequest
        admin = Scope.ADMIN
        return [
            Route("POST", "/v1/load_lora_adapter", self.load, admin, load, queues=False),
            Route("POST", "/v1/unload_lora_adapter", self.unload, admin, unload, queues=False),
        ]

    async def load(self, request: Request) -> Response:
        """Read an adapter from disk; requests may name it once this is answered."""
        state = self._state
        fields = decode(await read_json(request, state.limits), _load_decoder)
        if fields.lora_name in state.base_names:
            raise bad_request("the model itself has this name", param="lora_name")
        adapter = await state.engine.operations.load_adapter(
            fields.lora_name, fields.lora_path, replace=fields.load_inplace
        )
        return json_response(_facts(adapter))

    async def unload(self, request: Request) -> Response:
        """Let no further request name an adapter; those that run finish with it."""
        fields = decode(await read_json(request, self._state.limits), _unload_decoder)
        return json_response(
            _facts(await self._state.engine.operations.unload_adapter(fields.lora_name))
        )


def _facts(adapter: Adapter) -> dict[str, str]:
    return {"status": "ok", "lora_name": adapter.name, "version": adapter.digest}
