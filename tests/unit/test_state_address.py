"""What the configuration says about a shared state: its URLs, its keys, and no password anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.config import parse
from sidecar.config.redis_address import Address, parse_address, without_users
from sidecar.errors import Misused

UNDERSTOOD = {
    "redis://h": Address("single", (("h", 6379),)),
    "redis://h:1/3": Address("single", (("h", 1),), database=3),
    "rediss://me@[::1]:1": Address("single", (("::1", 1),), user="me", tls=True),
    "redis+sentinel://a:1,b/main": Address("sentinel", (("a", 1), ("b", 26379)), "main"),
    "rediss+sentinel://a:1/main/2": Address("sentinel", (("a", 1),), "main", 2, tls=True),
    "redis+cluster://a:1,b:2": Address("cluster", (("a", 1), ("b", 2))),
}
REFUSED = {
    "redis:/h": "must be of the form",
    "http://h": "must be of the form",
    "redis://a:1,b:2": "takes one host",
    "redis://h/x": "not a database",
    "redis://h:port": "HOST:PORT",
    "redis://": "HOST:PORT",
    "redis+sentinel://h:1": "master's name",
    "redis+cluster://h:1/2": "a cluster has none",
    "redis://h?db=1": "keys of state",
    "redis://me:s3cret@h": "put it into a file",
}


@pytest.mark.parametrize("url", UNDERSTOOD)
def test_urls_that_are_understood(url: str) -> None:
    """Each form gives its hosts, its master, its database and its user."""
    assert parse_address(url) == UNDERSTOOD[url]


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_are_refused(url: str) -> None:
    """The configuration's error says what is wrong, names the key, and repeats no password."""
    with pytest.raises(Misused, match=REFUSED[url]) as caught:
        parse({"state": {"url": url}}, "the test")
    assert "state.url" in caught.value.message
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize("password", ["s3cret", "s3@cret", "s3/cret", "s3'cret", 's3"cret', "s3 cret", "s3\ncret"])
def test_no_password_is_shown_whatever_is_in_it(password: str) -> None:
    """Everything in front of a host is left out, also when the URL cannot be understood."""
    assert without_users(f"redis://me:{password}@h:1/0") == "redis://(hidden)@h:1/0"
    with pytest.raises(Misused) as caught:
        parse({"state": {"url": f"redis+nothing://me:{password}@h"}}, "the test")
    assert "cret" not in caught.value.message


def test_an_address_is_shown_without_its_user() -> None:
    """People are told the hosts; of Sentinels also which master they are asked for."""
    assert str(parse_address("redis://me@h:1/2")) == "h:1"
    assert str(parse_address("redis+sentinel://a:1,b:2/main")) == 'the master "main" of the Sentinels at a:1,b:2'


def test_keys_of_state() -> None:
    """TLS goes with rediss, files are a pair, and without a url nothing may be set."""
    place = parse(
        {"state": {"url": "rediss://h", "tls": {"ca": "/ca.pem"}, "key_prefix": "a:b"}}, "the test"
    ).state.location
    assert (place.address.tls, place.ca, place.key_prefix) == (True, Path("/ca.pem"), "a:b")
    for record, problem in (
        ({"key_prefix": "mine"}, "without a url"),
        ({"url": "redis://h", "tls": {"ca": "/ca.pem"}}, "begin with rediss"),
        ({"url": "rediss://h", "tls": {"key": "/key.pem"}}, "certificate and key"),
        ({"url": "redis://h", "key_prefix": "a{b}"}, "key_prefix"),
        ({"url": "redis://h", "keyprefix": "a"}, "did you mean key_prefix"),
    ):
        with pytest.raises(Misused, match=problem):
            parse({"state": record}, "the test")
