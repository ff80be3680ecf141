"""How a kind must read its entries of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sidecar.backends import registry
from sidecar.backends.kind import Kind
from sidecar.config import parse
from sidecar.config.backends import Backend as Entry
from sidecar.errors import Misused

POOL = {"discover": {"dns": "engines.example:9000"}}


def entry_of(kind: Kind, record: Mapping[str, Any] = MappingProxyType({})) -> Entry:
    """Return an entry as the registry reads it. Raises Misused."""
    place = {} if "discover" in record else {"url": f"{kind.name}://host:9000"}
    (entry,) = registry.entries_of(parse({"backends": [place | dict(record)]}, "the check"))
    return entry


def reads_a_url_of_each_scheme(kind: Kind) -> None:
    """An entry with nothing but a URL is this kind's, and has TLS where its scheme means that."""
    for scheme, has_tls in kind.section.SCHEMES.items():
        entry = entry_of(kind, {"url": f"{scheme}://host:9000"})
        assert type(entry) is kind.section, f"{scheme}://host:9000 is read as {type(entry).__name__}"
        assert (entry.address, entry.identity) == ("host:9000", "host:9000"), f"{scheme}: address and identity are off"
        assert entry.kind_name == kind.name, f"the kind of {scheme}://host:9000 is {entry.kind_name}"
        assert (entry.tls_files is not None) == has_tls, f"{scheme}: tls_files is {entry.tls_files}"
        assert entry.shared_memory in ("never", "auto", "must"), f"shared_memory is {entry.shared_memory}"
        for name, file in entry.files().items():
            assert file is None, f"{name} names a file though nobody has: {file}"


def is_the_same_after_a_dump(kind: Kind) -> None:
    """An entry in full, as `config show` prints it, is read as the same entry."""
    for record in ({}, {"kind": kind.name, "id": "one"}, {"kind": kind.name, **POOL}):
        entry = entry_of(kind, record)
        again = entry_of(kind, entry.model_dump(mode="json"))
        assert again == entry, f"{record}: dumped and read again it differs: {again!r} was {entry!r}"
        config = parse({"backends": [entry.model_dump(mode="json")]}, "the check")
        (shown,) = registry.full_record(config)["backends"]
        assert shown == entry.model_dump(mode="json"), f"{record}: shown in full it differs"


def refuses_keys_of_other_kinds(kind: Kind) -> None:
    """A key that only another kind has is refused by its name."""
    for other in registry.kinds():
        for key in other.section.model_fields.keys() - kind.section.model_fields.keys():
            said = _refusal(kind, {key: "something"})
            assert key in said, f"{key} is {other.name}'s, and refused without its name: {said}"


def gives_reasons_for_keys_that_it_lacks(kind: Kind) -> None:
    """Keys of `ELSEWHERE` are refused with the reason, and belong to URLs that there are ("a:// and b://")."""
    schemes = {scheme for other in registry.kinds() for scheme in other.section.SCHEMES}
    for owner, keys in kind.section.ELSEWHERE.items():
        owners = {each.removesuffix("://") for each in owner.split(" and ")}
        assert owners <= schemes, f"ELSEWHERE: there are no {owner} backends"
        for key, reason in keys.items():
            outer, _, inner = key.rpartition(".")
            said = _refusal(kind, {outer: {inner: "something"}} if outer else {inner: "something"})
            assert reason in said, f"{key} is refused without the reason of ELSEWHERE: {said}"


def makes_entries_of_found_engines(kind: Kind) -> None:
    """The entry of an engine that was found in a pool is as one that is written out, with a URL and an id."""
    pool = entry_of(kind, {"kind": kind.name, **POOL})
    found, same = pool.at("pod-1", "10.0.0.1:9000"), pool.at("pod-1", "10.0.0.2:9000")
    assert found.url == f"{kind.name}://10.0.0.1:9000", f"the URL of a found engine is {found.url}"
    assert found.discover is None, "an engine that was found is no pool"
    assert found.identity.startswith(f"{pool.identity}-"), f"{found.identity} does not begin with {pool.identity}-"
    assert found.identity == same.identity, "one name, two ids: replicas would not agree"
    assert entry_of(kind, found.model_dump(mode="json")) == found, "an entry of a found engine cannot be written out"
    for scheme, has_tls in kind.section.SCHEMES.items():
        if has_tls:
            url = entry_of(kind, {"kind": kind.name, "tls": {}, **POOL}).at("pod-1", "10.0.0.1:9000").url
            assert url == f"{scheme}://10.0.0.1:9000", f"with tls the URL of a found engine is {url}"


def _refusal(kind: Kind, record: dict[str, Any]) -> str:
    """Return why an entry is not taken."""
    try:
        entry_of(kind, record)
    except Misused as refused:
        return refused.message
    raise AssertionError(f"{record} is taken, and is for other kinds only")
