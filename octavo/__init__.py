"""Octavo: an LLM inference and serving engine, small enough to read and complete enough to deploy.

>>> from octavo import LLM, SamplingParams
>>> llm = LLM("smollm2-135m-instruct")
>>> llm.generate(["The capital of France is"], SamplingParams(temperature=0))
"""

from typing import TYPE_CHECKING, Any

from octavo.core import SamplingParams, StructuredOutputsParams, TokenLogprobs
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.engine import LLM, CompletionOutput, LoRARequest, RequestOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "LoRARequest",
    "OctavoError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenLogprobs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Torch takes a second to import: whoever wants the command line or the server waits for less.
    if name in ("LLM", "CompletionOutput", "LoRARequest", "RequestOutput"):
        from octavo import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
