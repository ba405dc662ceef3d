"""The one place that opens a connection to an address that a client named. Off unless allowed.

A host must be on the operator's list, at every redirect anew. Its name is looked up once, what the
answer says must be a public address, and the connection goes to that very address: a name server
that changes its mind in between changes nothing. Size and time are bounded as a whole.
"""

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from octavo.errors import InvalidImageError
from octavo.vision.data_urls import NOT_ALLOWED

MAX_URL_CHARS = 2048
PIECE_BYTES = 64 * 2**10
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)

# Threads of their own: those that turn texts to tokens must not wait for somebody else's server.
_THREADS = ThreadPoolExecutor(8, "octavo-fetch")

# Of a host and a port, its addresses.
LookUp = Callable[[str, int], list[str]]


def look_up(host: str, port: int) -> list[str]:
    """The machine's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Gets files from hosts of a list.

    allowed: hosts as clients write them, "host" or "host:port" where the port is not the scheme's.
        A host that is written as an address may be any address, private ones included: to name it
        is to mean it. A name must lead to public ones.
    max_bytes: of a file.
    timeout_s: of a file, redirects included, whatever trickles in meanwhile.
    """

    allowed: Collection[str]
    max_bytes: int
    timeout_s: float = 10.0
    max_redirects: int = 3
    resolve: LookUp = look_up

    async def fetch(self, url: str) -> bytes:
        """The file behind a URL.

        Raises:
            InvalidImageError: a host that is not allowed, an address inside, a file that is too
                large, does not come in time or does not come at all.
        """
        loop, deadline_s = asyncio.get_running_loop(), time.monotonic() + self.timeout_s
        work = loop.run_in_executor(_THREADS, self._fetch, url, deadline_s)
        try:
            # The thread keeps to the deadline by itself, but for a name server that hangs.
            return await asyncio.wait_for(work, self.timeout_s)
        except TimeoutError as error:
            raise self._too_slow() from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._left(deadline_s)
            raise InvalidImageError("the file's address does not answer as it should") from error

    def check(self, url: str) -> None:
        """Refuse a URL that would not be asked for. Raises as `fetch` does."""
        self._checked(url)

    def _fetch(self, url: str, deadline_s: float) -> bytes:
        for _ in range(self.max_redirects + 1):
            parts, port = self._checked(url)
            found = self._get(parts, port, deadline_s)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise InvalidImageError(f"the file's address leads on more than {self.max_redirects} times")

    def _checked(self, url: str) -> tuple[SplitResult, int]:
        """The parts of a URL whose host is on the list, and its port."""
        if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable():
            raise _not_allowed("the file's address is no plain URL of http or https")
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError as error:
            raise _not_allowed("the file's address is no URL") from error
        if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
            raise _not_allowed("the file's address is no plain URL of http or https")
        host = parts.hostname
        name = host if port == PORTS[parts.scheme] else f"{host}:{port}"
        if name not in self.allowed:
            raise _not_allowed(
                f"files are not fetched from {name[:200]}: send a data URL, or have the operator "
                "add it to --allowed-media-domains"
            )
        return parts, port

    def _address(self, host: str, port: int) -> str:
        """The address to connect to."""
        try:
            return str(ipaddress.ip_address(host))  # it is on the list as it stands there
        except ValueError:
            addresses = self.resolve(host, port)
        for address in addresses:
            if not ipaddress.ip_address(address.partition("%")[0]).is_global:
                raise _not_allowed("the file's host leads to an address inside of a network")
        if not addresses:
            raise InvalidImageError("the file's host has no address")
        return addresses[0]

    def _get(self, parts: SplitResult, port: int, deadline_s: float) -> bytes | str:
        """A file, or the address of where it is now."""
        host = parts.hostname or ""
        address = self._address(host, port)
        # Nobody but us chooses the address: the connection is opened here, and handed over.
        connection = http.client.HTTPConnection(host, port)
        opened = socket.create_connection((address, port), timeout=self._left(deadline_s))
        if parts.scheme == "https":
            context = ssl.create_default_context()
            opened = context.wrap_socket(
                opened, server_hostname=host, do_handshake_on_connect=False
            )
        connection.sock = opened
        with contextlib.closing(connection), _cut_after(self._left(deadline_s), opened):
            if isinstance(opened, ssl.SSLSocket):
                opened.do_handshake()
            target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
            connection.request("GET", target, headers={"Accept": "image/*, video/*"})
            with contextlib.closing(connection.getresponse()) as response:
                found = self._body(response)
        self._left(deadline_s)  # what was cut off looks like an end
        return found

    def _body(self, response: http.client.HTTPResponse) -> bytes | str:
        if response.status in REDIRECTS and (place := response.getheader("Location")):
            return place
        if response.status != http.client.OK:
            raise InvalidImageError(f"the file's address answers with status {response.status}")
        data = bytearray()
        while True:
            piece = response.read1(PIECE_BYTES)
            data += piece
            if len(data) > self.max_bytes:
                raise InvalidImageError(f"the file has more than {self.max_bytes} bytes")
            if not piece:
                return bytes(data)

    def _left(self, deadline_s: float) -> float:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise self._too_slow()
        return left_s

    def _too_slow(self) -> InvalidImageError:
        message = f"the file did not come within {self.timeout_s:g} s"
        return InvalidImageError(message, code="media_timeout")


def _not_allowed(message: str) -> InvalidImageError:
    return InvalidImageError(message, code=NOT_ALLOWED)


@contextmanager
def _cut_after(seconds: float, opened: socket.socket) -> Iterator[None]:
    """Break a connection off after that time: a byte now and then would keep any timeout away."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            opened.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
