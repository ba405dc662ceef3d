"""The HTTP front end: OpenAI's surfaces over any `ServingEngine`. Knows no tensors."""

from octavo.server.app import create_app
from octavo.server.config import ServerConfig
from octavo.server.limits import Limits
from octavo.server.memory import return_large_blocks
from octavo.server.serve import OctavoServer, serve

__all__ = ["Limits", "OctavoServer", "ServerConfig", "create_app", "return_large_blocks", "serve"]
