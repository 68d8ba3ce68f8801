"""Who may ask: API keys, and the management key that loading and unloading models takes. Nothing here shows a key."""

import hashlib
import hmac
from collections.abc import Iterable

from fastapi import Request
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import HANDLERS, ManagementOffError, UnauthorizedError
from app.settings import Settings, SettingsError
from model.contract import InterflowError

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""What needs no key: probes and Prometheus seldom bear one, and these tell nothing about an image. Nor does the page,
which asks for a key itself."""
OPEN_FILES = "/static/"
"""What the page is made of, open as well."""

KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""How a request bears a key, in OpenAPI's words."""
WITH_KEY: list[dict[str, list[str]]] = [{scheme: []} for scheme in KEY_SCHEMES]
"""OpenAPI's `security` of what takes one, by either."""


class Keys:
    """The keys that were set, as SHA-256 digests.

    Args:
        api: keys of clients; none: everybody may ask.
        management: key for loading and unloading; it also counts as a client's. None: nobody may load or unload.
    """

    def __init__(self, api: Iterable[str] = (), management: str | None = None) -> None:
        self._api = [_digest(key) for key in api]
        self._management = None if management is None else _digest(management)

    @property
    def needed(self) -> bool:
        """Requests need a key."""
        return bool(self._api)

    @property
    def managed(self) -> bool:
        """Models can be loaded and unloaded, with the management key."""
        return self._management is not None

    def admits(self, headers: Headers) -> bool:
        """Whether a request may ask."""
        return not self._api or _presents(headers, self._api) or self.admits_management(headers)

    def admits_management(self, headers: Headers) -> bool:
        """Whether a request may load and unload."""
        return self._management is not None and _presents(headers, [self._management])


def load_keys(settings: Settings) -> Keys:
    """The keys of the settings; the file is read here, once.

    Raises:
        SettingsError: a key that no header can bear, a variable or file without one, or a file that cannot be read.
    """
    api = []
    if settings.api_keys is not None:
        api += _checked("INTERFLOW_API_KEYS", settings.api_keys.get_secret_value().split(","))
    if settings.api_keys_file is not None:
        try:
            lines = settings.api_keys_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise SettingsError(
                f"INTERFLOW_API_KEYS_FILE is {settings.api_keys_file}, which cannot be read ({reason}); expected a "
                "text file with one key a line."
            ) from error
        api += _checked("INTERFLOW_API_KEYS_FILE", lines)
    return Keys(api, _only(settings.management_key))


def require_management(request: Request) -> None:
    """For routes that load and unload models.

    Raises:
        ManagementOffError: no management key is set.
        UnauthorizedError: the request does not bear it.
    """
    keys: Keys = request.app.state.keys
    if not keys.managed:
        raise ManagementOffError(
            "loading and unloading of models is off. Start the server with INTERFLOW_MANAGEMENT_KEY."
        )
    if not keys.admits_management(request.headers):
        raise UnauthorizedError(
            "loading and unloading of models takes the management key (INTERFLOW_MANAGEMENT_KEY). Send it as "
            "`Authorization: Bearer <key>` or `X-API-Key: <key>`."
        )


class KeyMiddleware:
    """Answers 401 to requests without a key, where keys are set, before a byte of the body is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HTTP passes through."""
        if scope["type"] == "http":
            keys: Keys = scope["app"].state.keys
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            is_open = path in OPEN_PATHS or path.startswith(OPEN_FILES)
            if keys.needed and not is_open and not keys.admits(Headers(scope=scope)):
                error = UnauthorizedError(
                    "this server takes requests with a key, and this one has none that it knows. Send it as "
                    "`Authorization: Bearer <key>` or `X-API-Key: <key>`."
                )
                response = await HANDLERS[InterflowError](Request(scope), error)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _presents(headers: Headers, known: list[bytes]) -> bool:
    """In constant time: digests are of one length, and every one is compared."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else []
    given += headers.getlist("x-api-key")
    matches = [hmac.compare_digest(_digest(key), digest) for key in given for digest in known]
    return any(matches)


def _only(secret: SecretStr | None) -> str | None:
    if secret is None:
        return None
    (key,) = _checked("INTERFLOW_MANAGEMENT_KEY", [secret.get_secret_value()])
    return key


def _checked(source: str, given: Iterable[str]) -> list[str]:
    keys = [key.strip() for key in given if key.strip()]
    if not keys:
        raise SettingsError(f"{source} holds no key; expected at least one, or leave it unset.")
    for number, key in enumerate(keys, 1):
        if not all("!" <= character <= "~" for character in key):
            raise SettingsError(
                f"{source}: key {number} of {len(keys)} holds a character that no header can bear; expected printable "
                "ASCII without spaces."
            )
    return keys
