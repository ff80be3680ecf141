"""Prove who calls by the names in a client's certificate, which TLS or a mesh's proxy has verified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sidecar.access.patterns import tenant_in
from sidecar.access.principal import Principal, Proof
from sidecar.config.identities import TENANT, problem_of
from sidecar.errors import Misused, Reason

SPIFFE = "spiffe://"


def names_of(alternative: Sequence[str], common: Sequence[str]) -> tuple[str, ...]:
    """Return the names that can prove a certificate's owner: the alternative ones in their order, else the common one.

    A subject with several common names names nobody.
    """
    if not alternative:
        return tuple(common) if len(common) == 1 else ()
    return tuple(alternative)


def names_of_grpc(context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """Return the names in the certificate of a gRPC peer, from `auth_context()`; () if it has none."""
    alternative, common = (
        [name.decode(errors="replace") for name in context.get(key, ())]
        for key in ("x509_subject_alternative_name", "x509_common_name")
    )
    return names_of(alternative, common)


def names_of_tls(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names in the certificate of a TLS peer, from `ssl.SSLObject.getpeercert()`; () if it has none."""
    certificate = certificate or {}
    kinds = ("URI", "DNS", "email", "IP Address")
    alternative = [name for kind, name in certificate.get("subjectAltName", ()) if kind in kinds]
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    return names_of(alternative, [name for kind, name in subject if kind == "commonName"])


def principal_of(names: Sequence[str], pattern: str | None, proof: Proof) -> Principal:
    """Return whom a certificate's names name: a SPIFFE id, else the first counts. Raises Misused(UNAUTHENTICATED)."""
    if not names:
        raise _refused("it has no name")
    names = sorted(names, key=lambda name: not name.startswith(SPIFFE))
    if len(names) > 1 and names[1].startswith(SPIFFE):
        raise _refused("it has more than one SPIFFE id")
    try:
        tenant = tenant_in(names[0], pattern)
    except ValueError as error:
        raise _refused(f"its name {error}") from None
    if problem := problem_of(TENANT, names[0]):
        raise _refused(f"its name {problem}")
    return Principal(tenant=tenant, proof=proof, subject=names[0])


def _refused(what: str) -> Misused:
    return Misused(Reason.UNAUTHENTICATED, f"the client's certificate is refused: {what}")
