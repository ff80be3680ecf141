"""What an origin may be called, what the allow list lets through, and which checksums are believed."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.adapters.origins.addresses import is_public
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.checksums import Checksum, of_headers
from sidecar.adapters.origins.files import shard_names
from sidecar.adapters.origins.origin import is_url, parse_origin, without_secrets
from sidecar.config import parse
from sidecar.errors import Invalid, Misused, Reason

MD5 = hashlib.md5(b"x", usedforsecurity=False)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("https://Models.Example.com:443/a/sql/", "https://models.example.com/a/sql"),
        ("http://example.com:8080/a?sig=secret", "http://example.com:8080/a"),
        ("http://[::1]:80/a", "http://[::1]/a"),
        ("s3://Bucket/loras/sql", "s3://Bucket/loras/sql"),
        ("hf://owner/name@main/folder", "hf://owner/name@main/folder"),
        ("hf://owner/name@refs%2Fpr%2F1", "hf://owner/name@refs%2Fpr%2F1"),
    ],
)
def test_urls_have_one_spelling(text: str, written: str) -> None:
    """The default port, the slash at the end and the query are not part of what is written down."""
    assert str(parse_origin(text)) == written


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://example.com/a", '"ftp" is not one of'),
        ("file:///etc/passwd", '"file" is not one of'),
        ("push://abc", '"push" is not one of'),
        ("https://user:pw@example.com/a", "user name"),
        ("https://example.com/a/../b", "segments"),
        ("https://example.com/a/%2e%2e/b", "segments"),
        ("https://example.com/a//b", "segments"),
        ("https://example.com/a%2fb", "encoded slashes"),
        ("https://example.com/a%5cb", "encoded slashes"),
        ("https://example.com\\@evil.example/a", "backslashes"),
        ("https://example.com/a b", "spaces"),
        ("https://example.com/\n", "spaces"),
        ("https:///a", "no host"),
        ("https://exämple.com/a", "xn--"),
        ("https://example.com:99999/a", "no host to connect to"),
        ("https://[::1/a", "not a URL"),
        ("https://example.com/" + "a" * 8192, "longer than 8192"),
        ("s3:///a", "no bucket"),
        ("s3://bucket/a::file:///etc", "'::'"),
        ("s3://bucket/../other", "segments"),
    ],
)
def test_urls_that_read_two_ways_are_refused(text: str, words: str) -> None:
    """Each has its reason, and no message repeats a password."""
    with pytest.raises(Invalid, match=words.replace("(", r"\(")) as caught:
        parse_origin(text)
    assert caught.value.reason is Reason.ORIGIN_NOT_ALLOWED
    assert "pw" not in caught.value.message


@given(st.one_of(st.text(), st.from_regex(r"(https?|s3|hf)://[!-~é]{0,40}(/[!-~ü]{0,20}){0,3}", fullmatch=True)))
def test_any_text_is_an_origin_or_refused(text: str) -> None:
    """There is no third ending; what passes is spelled the same when it is read again, and httpx can ask for it."""
    try:
        origin = parse_origin(text)
    except Invalid:
        return
    assert parse_origin(str(origin)) == replace(origin, query="")
    if origin.is_web:
        url = httpx.URL(str(origin.file("x")) + "?" + origin.query)
        assert url.netloc.decode() == origin.host
        assert url.raw_path.partition(b"?")[0].endswith(b"/x")


def test_the_configuration_says_which_prefix_is_wrong() -> None:
    """It is told before anything starts."""
    assert parse({"origins": {"allow": ["https://example.com/", "/models"]}}, "the test").origins.downloads_max == 4
    with pytest.raises(Misused, match=r'origins\.allow: .*"ftp" is not one of'):
        parse({"origins": {"allow": ["ftp://example.com"]}}, "the test")


def test_paths_are_no_urls() -> None:
    """A path may contain a colon; a URL has a scheme."""
    assert not is_url("/models/a:b")
    assert not is_url("models/sql")
    assert is_url("S3://bucket/x")


ALLOW = AllowList.of(
    ["https://models.example.com/loras", "http://10.0.0.7:8080/", "s3://bucket/pre", "hf://acme/sql", "https://"], []
)


@pytest.mark.parametrize(
    ("url", "allowed", "named"),
    [
        ("https://models.example.com/loras", True, True),
        ("https://models.example.com/loras/sql", True, True),
        ("https://models.example.com/loras-evil/sql", True, False),
        ("https://elsewhere.example/x", True, False),
        ("http://models.example.com/loras/sql", False, False),
        ("http://10.0.0.7:8080/x", True, True),
        ("http://10.0.0.7/x", False, False),
        ("s3://bucket/pre/x", True, True),
        ("s3://bucket/prefix", False, False),
        ("s3://bucket-2/pre/x", False, False),
        ("hf://acme/sql@main/x", True, True),
        ("hf://acme/sql2", False, False),
        ("gs://bucket/pre", False, False),
    ],
)
def test_prefixes_end_at_segments(url: str, allowed: bool, named: bool) -> None:
    """Scheme, host and port must be equal; the path must be the prefix or below it."""
    origin = parse_origin(url)
    assert ALLOW.names_host(origin) is named
    if allowed:
        ALLOW.check(origin)
    else:
        with pytest.raises(Invalid, match="outside the allowed origins"):
            ALLOW.check(origin)


def test_nothing_is_allowed_unless_it_is_named(tmp_path: Path) -> None:
    """By default only folders below the roots; a folder in the list counts as a root."""
    with pytest.raises(Invalid, match=r"no URL.*origins\.allow"):
        AllowList().check(parse_origin("https://example.com/a"))
    with pytest.raises(Invalid, match="none are configured"):
        AllowList().open("sql", str(tmp_path))
    (tmp_path / "sql").mkdir()
    with AllowList.of([str(tmp_path)]).open("sql", str(tmp_path / "sql")) as folder:
        assert folder.path == tmp_path.resolve() / "sql"
    with pytest.raises(Misused, match=r"origins\.allow.*ftp"):
        AllowList.of(["ftp://example.com"])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("not an address", False),
    ],
)
def test_addresses_of_the_internet_only(address: str, public: bool) -> None:
    """Loopback, private, link-local and reserved ones are not, nor IPv6 forms that stand for them."""
    assert is_public(address) is public


SHA256 = base64.b64encode(hashlib.sha256(b"x").digest()).decode()
OF_SHA256 = Checksum("sha256", hashlib.sha256(b"x").hexdigest())
OF_MD5 = Checksum("md5", MD5.hexdigest())


@pytest.mark.parametrize(
    ("headers", "checksum"),
    [
        ({"x-amz-checksum-sha256": SHA256}, OF_SHA256),
        ({"x-amz-checksum-sha256": f"{SHA256}-3", "x-amz-checksum-type": "COMPOSITE"}, None),
        ({"x-amz-checksum-sha256": f"{SHA256}-3"}, None),
        ({"Repr-Digest": f"sha-256=:{SHA256}:"}, OF_SHA256),
        ({"Digest": f"SHA-256={SHA256}".lower()[:8] + SHA256}, OF_SHA256),
        ({"X-Linked-ETag": f'"{OF_SHA256.value}"'}, OF_SHA256),
        ({"ETag": f'"{OF_MD5.value}"'}, None),
        ({"ETag": f'"{OF_MD5.value}"', "x-amz-request-id": "1"}, OF_MD5),
        ({"ETag": f'"{OF_MD5.value}-2"', "x-amz-request-id": "1"}, None),
        ({"ETag": f'"{OF_MD5.value}"', "x-amz-request-id": "1", "x-amz-server-side-encryption": "aws:kms"}, None),
        ({"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(MD5.digest()).decode()}"}, OF_MD5),
        ({"Content-MD5": base64.b64encode(MD5.digest()).decode()}, OF_MD5),
        ({"x-amz-checksum-crc32": "jNiMrQ=="}, Checksum("crc32", "8cd88cad")),
        ({"x-amz-checksum-crc32": "not base64"}, None),
        ({}, None),
    ],
)
def test_checksums_that_headers_give(headers: dict[str, str], checksum: Checksum | None) -> None:
    """An ETag is an MD5 at S3 only, for one part without a key of its own."""
    assert of_headers(httpx.Headers(headers)) == checksum


def test_secrets_are_cut_out_of_foreign_texts() -> None:
    """What follows a question mark and what precedes an @ goes."""
    text = "GET https://me:pw@example.com/a?sig=s3cret failed, see s3://b/c?versionId=1"
    assert without_secrets(text) == "GET https://example.com/a failed, see s3://b/c"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"[]", "not a JSON object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "not a plain file name"),
        (b'{"weight_map": {"a": "a.bin"}}', "not a plain file name"),
        (b'{"weight_map": {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors"}}', "names 3 files"),
    ],
)
def test_indexes_name_plain_files(index: bytes, words: str) -> None:
    """Nothing outside the folder, nothing else than weights, and not too many."""
    with pytest.raises(ValueError, match=words):
        shard_names(index, 2)
