"""Read `x-forwarded-client-cert`, in which Envoy, the proxy of Istio, tells whose certificate it has verified.

    elements divided by commas   one for each proxy that the request passed, the nearest one last
    pairs divided by semicolons  By, Hash, Cert, Chain, Subject, URI, DNS; URI and DNS may be there several times
    "values in quotes"           where a backslash belongs to the letter after it, so that \\" does not end the value

**Only the last element counts.** The proxy beside this process wrote it about the peer whose certificate it verified,
in each of Envoy's modes that write the header: Istio's sidecars append (APPEND_FORWARD), others replace (SANITIZE_SET).
What precedes it came with the request, from a gateway or from a client that made it up. So whoever calls through a
gateway has the gateway's identity here, and needs a token or a key of its own.

The whole header is parsed nevertheless, and refused unless all of it is well-formed: an open quote sent by a client
would otherwise swallow the element that is appended to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from cryptography.x509 import Name
from cryptography.x509.oid import NameOID

from sidecar.access.certificates import names_of
from sidecar.errors import Misused, Reason

_KEYS = frozenset(("by", "hash", "cert", "chain", "subject", "uri", "dns"))
_PAIR = re.compile(r'([A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^",;\\ ]*))(;| *, *|\Z)')
_HASH = re.compile(r"[0-9a-f]{64}")
_ATTRIBUTES = {"emailAddress": NameOID.EMAIL_ADDRESS, "serialNumber": NameOID.SERIAL_NUMBER, "SN": NameOID.SURNAME}
"""The names of BoringSSL for attributes that are not in RFC 4514."""

Pair = tuple[str, str]


def names_in(headers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the nearest proxy's peer, as `certificates.names_of` has them; () if it has none.

    Raises Misused(UNAUTHENTICATED) for a header that is not well-formed, and for more than one.
    """
    if len(headers) != 1:
        raise _refused(f"there are {len(headers)} of them")
    last = elements_of(headers[0])[-1]
    found: dict[str, list[str]] = {}
    for key, value in last:
        found.setdefault(key, []).append(value)
    # Envoy never leaves out the digest. It does not quote names of the certificate, so a name with a comma or a
    # semicolon would look like more pairs or another element: one without a digest, or with a second URI.
    digests, subjects, uris = (found.get(key, []) for key in ("hash", "subject", "uri"))
    if len(digests) != 1 or not _HASH.fullmatch(digests[0]):
        raise _refused("its last element has no Hash of SHA-256")
    if len(subjects) > 1 or (len(uris) > 1 and "" in uris):
        raise _refused("its last element has two subjects, or an empty URI beside another")
    alternative = [value for key, value in last if key in ("uri", "dns") and value]
    if any('"' in name or "\\" in name for name in alternative):
        raise _refused("a name in it has a quote or a backslash")
    # Envoy writes the subject as RFC 2253 has it and adds no escapes of its own, so those in it are the subject's.
    return names_of(alternative, () if alternative else _common_names(*subjects))


def elements_of(header: str) -> list[list[Pair]]:
    """Return the elements of a header, each with its pairs: the key in small letters, and the value without its quotes
    but with its backslashes. Raises Misused(UNAUTHENTICATED).
    """
    if not header.isascii() or not header.isprintable():
        raise _refused("it has a letter that is not printable ASCII")
    elements: list[list[Pair]] = [[]]
    at, divider = 0, ""
    while at < len(header) or divider != "":
        pair = _PAIR.match(header, at)
        if pair is None or pair[1].lower() not in _KEYS:
            raise _refused(f"at {at} there is no pair of a known key and a value")
        elements[-1].append((pair[1].lower(), pair[3] if pair[2] is None else pair[2]))
        at, divider = pair.end(), pair[4]
        if "," in divider:
            elements.append([])
    if not elements[-1]:
        raise _refused("it is empty")
    return elements


@lru_cache(maxsize=1024)  # 50 µs each, and there are as many as certificates
def _common_names(subject: str = "") -> tuple[str, ...]:
    try:
        name = Name.from_rfc4514_string(subject, _ATTRIBUTES)
    except ValueError:
        raise _refused("its subject cannot be read") from None
    return tuple(str(attribute.value) for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME))


def _refused(what: str) -> Misused:
    return Misused(Reason.UNAUTHENTICATED, f"the header x-forwarded-client-cert is refused: {what}")
