"""API keys in a data directory: whose they are, when they end, and what is kept of them."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import subprocess
from pathlib import Path

import pytest

from sidecar.access.keys import new_secret
from sidecar.access.principal import Principal, Proof
from sidecar.errors import Misused, Reason, Refused
from tests.kit.access_stores import access_store, key_book, new_key
from tests.kit.serving import until

NOW = 1_800_000_000.0


def sha256sum(text: str) -> str:
    """Return a digest as another program computes it."""
    return subprocess.run(["sha256sum"], input=text.encode(), capture_output=True, check=True).stdout.decode()[:64]


def test_a_secret_has_its_form_and_256_random_bits() -> None:
    made = [new_secret() for _ in range(100)]
    for key_id, secret, digest in made:
        found = re.fullmatch(r"lsk_([0-9a-f]{12})_([0-9a-f]{64})", secret)
        assert found is not None
        assert found[1] == key_id
        assert digest == sha256sum(secret)
    assert len({secret for _, secret, _ in made}) == len({secret[-64:] for _, secret, _ in made}) == 100


def contents_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_a_key_stands_for_its_tenant_roles_groups_and_class() -> None:
    async with access_store() as store, key_book(store) as book:
        secret, key = new_key(
            "acme", roles=("publisher",), groups=("red", "blue"), klass="batch", expires_at=NOW + 10, note="of the CI"
        )
        await store.put(key)
        principal = book.find(secret, NOW)
        assert principal == Principal(
            "acme", Proof.KEY, key.id, ("red", "blue"), ("publisher",), "batch", expires_at=NOW + 10
        )
        book.check(principal, NOW)


async def test_a_key_ends_when_its_time_has_come() -> None:
    async with access_store() as store, key_book(store) as book:
        secret, key = new_key(expires_at=NOW)
        await store.put(key)
        principal = book.find(secret, NOW - 0.001)
        for ask in (lambda: book.find(secret, NOW), lambda: book.check(principal, NOW)):
            with pytest.raises(Misused, match=rf"{key.id} ended at 2027-01-15 08:00:00 UTC") as refused:
                ask()
            assert refused.value.reason is Reason.UNAUTHENTICATED


async def test_a_revoked_key_is_refused_at_once_and_stays_listed() -> None:
    async with access_store() as store, key_book(store) as book:
        secret, key = new_key()
        await store.put(key)
        principal = book.find(secret, NOW)
        revoked = await store.revoke(key.id)
        for ask in (lambda: book.find(secret, NOW), lambda: book.check(principal, NOW)):
            with pytest.raises(Misused, match=f"{key.id} was revoked at"):
                ask()
        assert store.keys() == [revoked] == [await store.revoke(key.id)]
        assert revoked.revoked_at is not None
        with pytest.raises(Refused, match="there is no key"):
            await store.revoke("000000000000")


async def test_unknown_and_malformed_keys_get_the_same_answer() -> None:
    async with access_store() as store, key_book(store) as book:
        secret, key = new_key()
        await store.put(key)
        other = secret[:-1] + ("0" if secret[-1] != "0" else "1")
        said = set()
        for wrong in (
            other,
            key.sha256,
            key.id,
            "",
            "x",
            "\ud800",
            secret + " ",
            secret.upper(),
            "é" * 40,
            "k" * 10**6,
        ):
            with pytest.raises(Misused) as refused:
                book.find(wrong, NOW)
            said.add((refused.value.reason, refused.value.message))
        assert len(said) == 1


async def test_keys_and_their_last_use_outlive_the_process_and_secrets_are_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret, key = new_key()
    async with access_store(tmp_path) as store, key_book(store) as book:
        await store.put(key)
        book.find(secret, NOW)
        assert await store.uses.all() == {key.id: NOW}
    async with access_store(tmp_path) as store, key_book(store) as book:
        assert await store.uses.all() == {key.id: NOW}
        book.find(secret, NOW - 5)
        assert await store.uses.all() == {key.id: NOW}
    written = contents_of(tmp_path)
    assert sha256sum(secret).encode() in written
    assert secret[-64:].encode() not in written
    assert secret[-64:] not in caplog.text


async def test_a_damaged_key_or_one_of_a_release_to_come_admits_nobody_and_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = [new_key() for _ in range(5)]
    async with access_store(tmp_path) as store:
        for _, key in made:
            await store.put(key)
    database = sqlite3.connect(tmp_path / "access" / "access.sqlite", isolation_level=None)
    texts = [text for (text,) in database.execute("SELECT record FROM entries ORDER BY name")]
    by_name = {key.name: secret for secret, key in made}
    names = sorted(by_name)
    bad = [
        texts[0][:-1],
        texts[1].replace('"tenant"', '"networks":["10.0.0.0/8"],"tenant"'),
        texts[2].replace('"acme"', '""'),
        texts[3],
    ]
    for name, text in zip(names, bad, strict=False):
        database.execute("UPDATE entries SET record = ? WHERE name = ?", (text, name))
    database.execute("UPDATE entries SET name = 'key/000000000000' WHERE name = ?", (names[3],))
    database.execute("INSERT INTO entries VALUES ('grant/x', '{}')")
    database.close()
    async with access_store(tmp_path) as store, key_book(store) as book:
        for name in names[:4]:
            with pytest.raises(Misused, match="not known"):
                book.find(by_name[name], NOW)
        assert book.find(by_name[names[4]], NOW).tenant == "acme"
        assert store.set_aside.keys() == {*names[:3], "key/000000000000", "grant/x"}
        assert "networks" in store.set_aside[names[1]]
        assert all(f"{name} cannot be read, is kept and has no effect" in caplog.text for name in store.set_aside)
    database = sqlite3.connect(tmp_path / "access" / "access.sqlite")
    assert {text for (text,) in database.execute("SELECT record FROM entries")} == {*bad, texts[4], "{}"}
    database.close()


async def test_keys_of_a_file_are_read_again_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    first, second = "the first of our keys", "the second of our keys"
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{tenant: acme, key: {first}, roles: [viewer], groups: [red], class: batch, note: old}}\n")
    async with access_store() as store, key_book(store, path) as book:
        held = book.find(first, NOW)
        assert (held.tenant, held.roles, held.groups, held.klass) == ("acme", ("viewer",), ("red",), "batch")
        assert held.subject == f"file-{sha256sum(first)[:12]}"
        path.write_text(f"- {{tenant: other, sha256: {sha256sum(second)}}}\n- {{tenant: acme, key: {first}}}\n")
        await until(lambda: book.find(first, NOW).roles == ())
        with pytest.raises(Misused, match="was changed; call again"):
            book.check(held, NOW)
        assert book.find(second, NOW).tenant == "other"
        path.write_text(f"- {{tenant: acme, key: {first}, rolls: [viewer]}}\n")
        await until(lambda: "rolls" in book.trouble)
        assert first not in book.trouble
        assert book.find(second, NOW).tenant == "other"
        path.write_text(f"- {{tenant: acme, key: {first}}}\n")
        await until(lambda: not book.trouble)
        with pytest.raises(Misused, match="not known"):
            book.find(second, NOW)


async def test_a_pipe_in_place_of_the_file_of_keys_keeps_no_later_file_from_being_read(tmp_path: Path) -> None:
    """Nobody writes to it: who waits for that would take a revoked key for ever, and would not end."""
    path, pipe = tmp_path / "keys.yaml", tmp_path / "pipe"
    path.write_text("- {tenant: acme, key: the first of our keys}\n")
    os.mkfifo(pipe)
    async with access_store() as store, key_book(store, path) as book:
        pipe.replace(path)
        await until(lambda: "it is no file" in book.trouble)
        assert book.find("the first of our keys", NOW).tenant == "acme"
        path.unlink()
        path.write_text("[]\n")
        await until(lambda: not book.trouble)
        with pytest.raises(Misused, match="not known"):
            book.find("the first of our keys", NOW)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tenant: acme", "must be a list"),
        ("- {tenant: acme}", "entry 1: it needs either key or sha256"),
        ("- {tenant: acme, key: 'a secret that is long enough', sha256: 'a secret that is long enough'}", "sha256"),
        ("- {tenant: acme, key: a secret}", "key: it must have at least 16 characters"),
        ("- {tenant: acme, sha256: a secret that is in the wrong place}", "sha256"),
        ("- {key: a secret that is long enough}", "tenant"),
        ("- {tenant: acme, key: a secret that is long enough, roles: [king]}", "roles"),
        ("- {tenant: a, key: a secret that is long}\n- {tenant: b, key: a secret that is long}", "same key"),
        ("- {tenant: a, key: [a secret", "line"),
        ("- {tenant: a, key: a secret that is läng enough}", "entry 1: key: it must be ASCII on one line"),
        ("- {tenant: a, key: 'a secret that has\n\n  two lines'}", "key: it must be ASCII on one line"),
        ("- {tenant: a, key: ' a secret after a blank'}", "key: it must be ASCII on one line without blanks around it"),
        ("- {tenant: a, note: a secret}\n" * 40_000, "it is larger than 1 MiB; make keys by sidecar keys"),
    ],
)  # fmt: skip
async def test_a_faulty_file_of_keys_keeps_the_process_from_starting(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    async with access_store() as store:
        with pytest.raises(Misused, match=says) as refused:
            async with key_book(store, path):
                pass
    assert refused.value.reason is Reason.CONFIG_INVALID
    assert str(path) in refused.value.message
    assert "secret" not in refused.value.message


async def test_a_missing_file_of_keys_keeps_the_process_from_starting(tmp_path: Path) -> None:
    async with access_store() as store:
        with pytest.raises(Misused, match="No such file"):
            async with key_book(store, tmp_path / "none.yaml"):
                pass
