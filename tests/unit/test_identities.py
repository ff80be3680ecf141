"""What names, tenants and ids may look like, whatever front they come by."""

from __future__ import annotations

import pytest

from sidecar.access.access import Access, Caller
from sidecar.access.principal import Principal, Proof
from sidecar.config import identities, parse
from sidecar.config.identities import OWN_TENANTS, Shape, checked, session_of
from sidecar.config.openai import LOADS
from sidecar.errors import Misused, Reason, Refused
from sidecar.shell import asking
from tests.kit.identities import HOSTILE, REAL

SHAPES = (identities.ADAPTER, identities.TENANT, identities.CLASS, identities.SESSION, identities.REQUEST_ID)


@pytest.mark.parametrize("word", REAL)
def test_real_identities_pass_as_they_are(word: str) -> None:
    assert checked(identities.TENANT, word) == word


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_ones_are_refused_in_one_short_line(word: str) -> None:
    with pytest.raises(Refused, match=r"^the tenant ") as caught:
        checked(identities.TENANT, word)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.noun)
def test_each_is_taken_up_to_its_bound(shape: Shape) -> None:
    """In characters, and in bytes where those are more."""
    assert checked(shape, "x" * shape.characters_max)
    with pytest.raises(Refused, match=f"has {shape.characters_max + 1} characters .*; at most {shape.characters_max} "):
        checked(shape, "x" * (shape.characters_max + 1))
    wide = "🦙" * (shape.bytes_max // 4)
    assert checked(shape, wide)
    with pytest.raises(Refused):
        checked(shape, wide + "🦙")


@pytest.mark.parametrize("word", HOSTILE)
def test_nobody_configures_whom_no_request_can_be_of(word: str) -> None:
    """A weight or a class for it would be for nobody."""
    for queue in ({"tenant_weights": {word: 2}}, {"classes": {word: {}}}):
        with pytest.raises(Misused, match=r"the tenant|the class") as caught:
            parse({"queue": queue}, "the test")
        assert caught.value.reason is Reason.CONFIG_INVALID


def test_a_huge_one_is_not_shown() -> None:
    with pytest.raises(Refused) as caught:
        checked(identities.TENANT, "\x1b" * 20_000_000, 'the field "tenant"')
    assert caught.value.message.startswith('the field "tenant" has 20000000 characters')
    assert len(caught.value.message) < 300


def test_a_session_is_known_by_a_digest_only() -> None:
    """The same for the same session, and nothing of it in there."""
    assert session_of("") == ""
    assert session_of("jane@example.com") == session_of("jane@example.com") != session_of("joe@example.com")
    assert "jane" not in session_of("jane@example.com")
    assert session_of("\ud800")


def test_the_sidecar_s_own_tenants_are_known() -> None:
    """A client that could be one of them would see what is not published, or pass for a verification."""
    assert {LOADS, asking.TENANT} == set(OWN_TENANTS)


@pytest.mark.parametrize("tenant", OWN_TENANTS)
def test_a_client_that_is_believed_is_no_reserved_tenant(tenant: str) -> None:
    """Neither by what its request claims nor by its certificate's name."""
    access = Access.off(lambda name: None)
    claiming = Caller(Principal(proof=Proof.CLAIMED), is_believed=True)
    certified = Caller(Principal(tenant, Proof.CERTIFICATE, tenant))
    for caller, claims in ((claiming, [tenant]), (certified, [])):
        with pytest.raises(Refused, match="the sidecar's own; name another"):
            access.tenant_of(caller, claims)
