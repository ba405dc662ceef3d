"""The step loop, the engine process, `LLM` and the asynchronous client. Knows no HTTP.

Each side is imported when first asked for. `LLM` and `build_engine` bring torch in, which a
front-end process never needs; the client brings sockets in, which `LLM` never needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from octavo.engine.adapters import LoRARequest
from octavo.engine.core import EngineCore
from octavo.engine.interface import Pulse, ServedModel, ServingEngine, TextDelta
from octavo.engine.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)
from octavo.engine.rest import Phase, Rest

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine
    from octavo.engine.build import BuiltEngine, build_engine
    from octavo.engine.child import EngineProcess
    from octavo.engine.llm import LLM

__all__ = [
    "LLM",
    "AsyncEngine",
    "BuiltEngine",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineCore",
    "EngineProcess",
    "LoRARequest",
    "Phase",
    "Pulse",
    "RequestOutput",
    "Rest",
    "ServedModel",
    "ServingEngine",
    "TextDelta",
    "build_engine",
]


_MODULES = {
    "LLM": "llm",
    "AsyncEngine": "async_engine",
    "EngineProcess": "child",
    "BuiltEngine": "build",
    "build_engine": "build",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
