"""JSON responses. Knows no content."""

import orjson
from starlette.responses import Response


def json_response(content: object, status: int = 200) -> Response:
    """A response with a JSON body."""
    return Response(orjson.dumps(content), status, media_type="application/json")
