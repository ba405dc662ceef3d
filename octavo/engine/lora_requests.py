"""What callers of `LLM` write as adapters, loaded when they are first asked for. Knows no prompts.

Full, the registry gives up what was used longest ago.
"""

from collections import OrderedDict
from collections.abc import Sequence

from octavo.core import Adapter
from octavo.engine.adapters import AdapterRegistry, LoRARequest
from octavo.errors import RequestError

Asked = LoRARequest | Sequence[LoRARequest | None] | None


class LoRARequests:
    """The adapters of one `LLM`. Sole writer: its calls, of which one runs at a time."""

    def __init__(self, registry: AdapterRegistry, max_cpu_loras: int):
        self._registry = registry
        self._most = max_cpu_loras
        self._loaded: OrderedDict[LoRARequest, Adapter] = OrderedDict()  # used last at the end

    def adapters(self, asked: Asked, count: int) -> list[Adapter | None]:
        """One for each of `count` prompts.

        Raises:
            RequestError: there are not as many, or one cannot be loaded.
        """
        if asked is None or isinstance(asked, LoRARequest):
            asked = [asked] * count
        if len(asked) != count:
            raise RequestError(
                f"{count} prompts but {len(asked)} LoRA requests", param="lora_request"
            )
        wanted = dict.fromkeys(one for one in asked if one is not None)
        if len({one.lora_name for one in wanted}) < len(wanted):
            raise RequestError("two adapters of one call have the same name", param="lora_request")
        found = {one: self._adapter(one, wanted) for one in wanted}
        return [None if one is None else found[one] for one in asked]

    def _adapter(self, request: LoRARequest, wanted: dict[LoRARequest, None]) -> Adapter:
        known = self._loaded.get(request)
        if known is None or known not in self._registry.loaded:
            self._make_room(wanted)
            name, path = request.lora_name, request.lora_path
            known = self._loaded[request] = self._registry.load(name, path, replace=True)
        self._loaded.move_to_end(request)
        return known

    def _make_room(self, wanted: dict[LoRARequest, None]) -> None:
        for request, adapter in list(self._loaded.items()):
            if len(self._registry.loaded) < self._most:
                return
            if request not in wanted:
                del self._loaded[request]
                if adapter in self._registry.loaded:
                    self._registry.unload(adapter.name)
