"""The step loop, the engine process, `LLM` and the asynchronous client. Knows no HTTP.

`LLM` and `build_engine` bring torch in, so they are imported when first asked for: a front-end
process never needs them.
"""

from typing import TYPE_CHECKING, Any

from octavo.engine.async_engine import AsyncEngine, EngineProcess
from octavo.engine.core import EngineCore
from octavo.engine.interface import ServedModel, ServingEngine, TextDelta
from octavo.engine.outputs import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from octavo.engine.build import BuiltEngine, build_engine
    from octavo.engine.llm import LLM

__all__ = [
    "LLM",
    "AsyncEngine",
    "BuiltEngine",
    "CompletionOutput",
    "EngineCore",
    "EngineProcess",
    "RequestOutput",
    "ServedModel",
    "ServingEngine",
    "TextDelta",
    "build_engine",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from octavo.engine.llm import LLM

        return LLM
    if name in ("BuiltEngine", "build_engine"):
        from octavo.engine import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
