"""What the OpenAPI document says of all routes at once: the keys that they take, and bodies that come too slowly."""

from typing import Any

from fastapi import FastAPI

from app.errors import problem_responses, protocol_responses
from app.security import KEY_SCHEMES, OPEN_PATHS, WITH_KEY


class DocumentedApp(FastAPI):
    """FastAPI, whose document also has what middleware answers, which FastAPI does not see."""

    def openapi(self) -> dict[str, Any]:
        """The document; FastAPI keeps it and makes it anew where routes were added."""
        document = super().openapi()
        if "securitySchemes" not in document["components"]:
            _complete(document)
        return document


def _complete(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = KEY_SCHEMES
    for path, operations in document["paths"].items():
        if path in OPEN_PATHS:  # they take no body, either
            continue
        describe = protocol_responses if path.startswith("/v2") else problem_responses
        for operation in operations.values():
            operation.setdefault("security", [{}, *WITH_KEY])  # {}: none, where the server has no keys
            added = describe(401, 408) if "requestBody" in operation else describe(401)
            responses = operation["responses"] | {str(status): response for status, response in added.items()}
            operation["responses"] = dict(sorted(responses.items()))
