"""Who may ask: other sites' pages may not, nobody without the key, nothing that is too large.

A server on this machine can be reached by every page that its user opens: pages of other sites are told by `Origin`,
and by `Host` where a name of theirs leads here (DNS rebinding). Bodies must say that they are JSON, which a page cannot
send to another site without asking first.
"""

import hmac
import ipaddress
import json
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxtune.serving.protocol import ApiError

_OPEN = ('/', '/health')  # hold nothing that a key would be needed for


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == 'localhost' or ipaddress.ip_address(host.strip('[]')).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests before anything of their bodies is read.

    Args:
      app: what answers the others.
      local: the server is reached from this machine alone, under its names alone.
      api_key: what requests must bring; '' = nothing.
      max_body: bytes of a body at most.
    """

    def __init__(self, app: ASGIApp, *, local: bool, api_key: str, max_body: int) -> None:
        self._app, self._local, self._key, self._max_body = app, local, api_key.encode(), max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or lets it pass."""
        if scope['type'] != 'http':
            return
        try:
            self.check(scope['method'], scope['path'], Headers(scope=scope))
        except ApiError as error:
            await refusal(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raises `ApiError` if a request may not pass."""
        host, origin = headers.get('host', ''), headers.get('origin')
        if self._local and not _names_this_machine(host):
            raise ApiError(403, f'Host: {host[:80]}: expected localhost or its address', code='wrong_host')
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, f'Origin: {origin[:80]}: pages of other sites may not ask', code='wrong_origin')
        if headers.get('sec-fetch-site', 'none') not in ('none', 'same-origin') and path != '/':
            raise ApiError(403, 'pages of other sites may not ask', code='wrong_origin')
        length = headers.get('content-length', '0')
        if not length.isdecimal() or int(length) > self._max_body:
            raise too_large(self._max_body)
        if self._key and path not in _OPEN:
            scheme, _, key = headers.get('authorization', '').partition(' ')
            if scheme.lower() != 'bearer' or not hmac.compare_digest(key.strip().encode('latin-1'), self._key):
                raise ApiError(401, 'expected the header Authorization: Bearer KEY', code='invalid_api_key')
        kind = headers.get('content-type', '').partition(';')[0].strip().lower()
        if method not in ('GET', 'HEAD', 'OPTIONS') and kind != 'application/json':
            raise ApiError(415, f'Content-Type: {kind[:80]}: expected application/json')


def _names_this_machine(host: str) -> bool:
    try:
        return is_local(urlsplit(f'//{host}').hostname or '')
    except ValueError:
        return False


def too_large(most: int) -> ApiError:
    """What is said of a body of more bytes."""
    return ApiError(413, f'the body is too large; expected at most {most:,} bytes', code='body_too_large')


def refusal(error: ApiError) -> Response:
    """The answer to a request that is refused; what is left of its body is not read."""
    headers = {'connection': 'close'} if error.status in (401, 403, 408, 413, 415) else {}
    if error.status == 401:
        headers['www-authenticate'] = 'Bearer'
    if error.status == 429:
        headers['retry-after'] = '1'
    return Response(json.dumps(error.body), error.status, headers, 'application/json')
