"""Folders on web servers.

This module follows redirects itself. Each hop is checked against the allow list, its host is resolved, the addresses
are checked, and the connection goes to a checked address under the host's own name (SNI, certificate, Host), so
nothing can change between the check and the connection. Proxies from the environment are not used: a proxy would
connect to an address of its own choice.
"""

from __future__ import annotations

import logging
import netrc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx

from sidecar.adapters.origins.addresses import is_public
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.checksums import Checksum, of_headers
from sidecar.adapters.origins.failures import Missing, Transient, unreadable
from sidecar.adapters.origins.limits import Limits, Surroundings
from sidecar.adapters.origins.origin import Origin, parse_origin
from sidecar.adapters.origins.remote import Body, Resume
from sidecar.errors import Invalid, Reason

# They log each request's whole URL, and a query may be a signature.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

REDIRECTS_MAX = 5
CONNECT_TIMEOUT_S_MAX = 10.0
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})\Z", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}\Z", re.ASCII)
_VALIDATOR_LENGTH_MAX = 256


@dataclass(frozen=True)
class _Answer:
    """The last hop's response. `checksum` may come from any hop: Hugging Face sends it with the redirect."""

    response: httpx.Response
    hop: Origin
    checksum: Checksum | None


class WebFolder:
    """A folder behind http or https; each request has a connection of its own."""

    def __init__(self, origin: Origin, allow: AllowList, limits: Limits, surroundings: Surroundings) -> None:
        self._origin = origin
        self._allow = allow
        self._surroundings = surroundings
        connect_s = min(CONNECT_TIMEOUT_S_MAX, limits.timeout_s)
        self._timeout = httpx.Timeout(limits.timeout_s, connect=connect_s)
        self._clients: dict[str, httpx.Client] = {}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def _client(self, scheme: str) -> httpx.Client:
        client = self._clients.get(scheme)
        if client is None:
            # A kept connection could serve another host at the same address under the first host's certificate.
            none_kept = httpx.Limits(max_keepalive_connections=0)
            # Loading the authorities' certificates takes a while and is useless without TLS.
            transport = httpx.HTTPTransport(verify=scheme == "https", limits=none_kept)
            client = httpx.Client(transport=transport, timeout=self._timeout, follow_redirects=False)
            self._clients[scheme] = client
        return client

    @contextmanager
    def open(self, file_name: str, resume: Resume | None, attempt: int) -> Iterator[Body]:
        """Request a file. Raises Missing, Transient or Invalid, also while its chunks are read."""
        answer: _Answer | None = None
        try:
            answer = self._follow(self._origin.file(file_name), _headers(resume), attempt)
            yield _body(answer, resume)
        except httpx.HTTPError as error:
            raise Transient(_describe(error)) from error
        finally:
            if answer is not None:
                answer.response.close()

    def _follow(self, hop: Origin, headers: Mapping[str, str], attempt: int) -> _Answer:
        checksum: Checksum | None = None
        how = "is"
        for _ in range(REDIRECTS_MAX + 1):
            self._allow.check(hop, how)
            response = self._send(hop, headers, attempt)
            checksum = of_headers(response.headers) or checksum
            if response.status_code not in _REDIRECTS:
                return _Answer(response, hop, checksum)
            response.close()
            hop, how = _redirected(hop, response), "is where the origin redirects to, and"
        raise unreadable(self._origin, f"it redirects more than {REDIRECTS_MAX} times")

    def _send(self, hop: Origin, headers: Mapping[str, str], attempt: int) -> httpx.Response:
        url = httpx.URL(f"{hop}" + (f"?{hop.query}" if hop.query else ""))
        address = self._address(hop, url, attempt)
        client = self._client(hop.scheme)
        request = client.build_request(
            "GET",
            url.copy_with(host=address),
            headers={**headers, "Host": hop.host},
            extensions={"sni_hostname": url.host},
        )
        return client.send(request, stream=True, auth=_netrc(url.host))

    def _address(self, hop: Origin, url: httpx.URL, attempt: int) -> str:
        """Return an address of the host, a different one for each attempt.

        Raises Invalid if any address is not public and no prefix names the host.
        """
        try:
            addresses = self._surroundings.resolve(url.host, url.port or (443 if url.scheme == "https" else 80))
        except (OSError, UnicodeError) as error:
            raise Transient(f"the host {url.host} is not found ({error})") from error
        if not addresses:
            raise Transient(f"the host {url.host} has no address")
        private = [address for address in addresses if not is_public(address)]
        if private and not self._allow.names_host(hop):
            raise Invalid(
                Reason.ORIGIN_NOT_ALLOWED,
                f"{hop}: {url.host} has the address {private[0]}, which is not public; if it is meant to be reached, "
                f"name the host in origins.allow ({hop.scheme}://{hop.host}/)",
            )
        return addresses[attempt % len(addresses)]


def _headers(resume: Resume | None) -> dict[str, str]:
    # Sizes, ranges and checksums must be those of the file, not of a compressed form.
    headers = {"Accept-Encoding": "identity", "Accept": "*/*"}
    if resume is not None:
        headers |= {"Range": f"bytes={resume.offset}-", "If-Range": resume.validator}
    return headers


def _netrc(host: str) -> httpx.Auth | None:
    """Return the credentials that the user's .netrc holds for a host. Each hop looks up its own."""
    with suppress(OSError, netrc.NetrcParseError):
        found = netrc.netrc().hosts.get(host)  # no default entry: it would send credentials to any host
        if found is not None:
            return httpx.BasicAuth(found[0], found[2])
    return None


def _redirected(hop: Origin, response: httpx.Response) -> Origin:
    location = response.headers.get("location", "")
    try:
        target = httpx.URL(f"{hop}").join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise unreadable(hop, "it redirects to a location that is not a URL") from error
    if target.scheme not in ("http", "https"):
        raise Invalid(Reason.ORIGIN_NOT_ALLOWED, f"{hop} redirects to {target.scheme[:20]}://, which is never followed")
    return parse_origin(str(target))


def _body(answer: _Answer, resume: Resume | None) -> Body:
    response, headers = answer.response, answer.response.headers
    _check_status(answer)
    if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise unreadable(answer.hop, "it sends the file compressed although the request forbids it")
    offset, size_bytes = _extent(answer, resume)
    return Body(offset, size_bytes, _validator(headers), answer.checksum, response.iter_raw())


def _validator(headers: httpx.Headers) -> str:
    """Return the value that If-Range takes to check that the file is unchanged, or "" if there is none."""
    tag = headers.get("etag", "")
    if not tag or tag.startswith("W/"):  # a weak tag does not promise the same bytes
        tag = headers.get("last-modified", "")
    return tag if tag.isascii() and len(tag) <= _VALIDATOR_LENGTH_MAX else ""


def _check_status(answer: _Answer) -> None:
    status = answer.response.status_code
    if status in (200, 206):
        return
    if status in (404, 410):
        raise Missing(str(answer.hop))
    if status in _BUSY:
        raise Transient(f"the server answers {status}", _retry_after_s(answer.response))
    if status in (412, 416):
        raise Transient("the file was changed while it was fetched", restart=True)
    if status in (401, 403):
        raise unreadable(
            answer.hop, f"the server answers {status}: it wants credentials (put them into ~/.netrc) or a signed URL"
        )
    raise unreadable(answer.hop, f"the server answers {status}")


def _extent(answer: _Answer, resume: Resume | None) -> tuple[int, int | None]:
    """Return where the body begins and how large the whole file is."""
    headers = answer.response.headers
    if answer.response.status_code == 206:
        found = _CONTENT_RANGE.match(headers.get("content-range", ""))
        if found is None or resume is None or int(found[1]) != resume.offset:
            raise Transient("the server sends another part than requested", restart=True)
        return resume.offset, int(found[2])
    length = headers.get("content-length", "")
    if _NUMBER.match(length):
        return 0, int(length)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return 0, None
    raise unreadable(answer.hop, "the server does not give the file's size, so a cut-off file could not be detected")


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if _NUMBER.match(text) else 0.0


def _describe(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "the server was silent for too long"
    return str(error) or type(error).__name__
