"""The certificate that a mesh's proxy forwards in x-forwarded-client-cert."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.access.certificates import principal_of
from sidecar.access.principal import Proof
from sidecar.access.proving import Pair, elements_of, names_in
from sidecar.errors import Misused, Reason

BY = "By=spiffe://cluster.local/ns/gateway/sa/sidecar"
CLIENT = "spiffe://cluster.local/ns/acme/sa/client"
ADMIN = "spiffe://cluster.local/ns/globex/sa/admin"


def digest(letter: str) -> str:
    return f"Hash={letter * 64}"


ENVOY: dict[str, tuple[str, tuple[str, ...]]] = {
    "a service of Istio": (f'{BY};{digest("a")};Subject="";URI={CLIENT}', (CLIENT,)),
    "all kinds of names": (
        f'{BY};{digest("b")};Subject="CN=Test Client,O=Lyft\\, Inc.,C=US";URI={CLIENT};DNS=lyft.com;DNS=www.lyft.com',
        (CLIENT, "lyft.com", "www.lyft.com"),
    ),
    "two hosts": (
        f'{BY};{digest("c")};Subject="CN=unused";URI=;DNS=b.acme.com;DNS=a.acme.com',
        ("b.acme.com", "a.acme.com"),
    ),
    "a URI that is no SPIFFE id": (
        f'{BY};{digest("d")};Subject="CN=unused";URI=http://testclient.lyft.com',
        ("http://testclient.lyft.com",),
    ),
    "a common name": (f'{BY};{digest("e")};Subject="CN=acme,O=Acme";URI=', ("acme",)),
    "marks": (
        f'{BY};{digest("f")};Subject="CN=a\\"b\\, c\\\\d\\;e=f\\+g#\\<h\\>,O=CN=root\\, Inc.\\;x";URI=',
        ('a"b, c\\d;e=f+g#<h>',),
    ),
    "a backslash at the end": (f'{BY};{digest("0")};Subject="CN=\\ #acme\\\\";URI=', (" #acme\\",)),
    "letters of Europe": (
        f'{BY};{digest("1")};Subject="emailAddress=zoe@acme.com,CN=Zo\\C3\\AB M\\C3\\BCller";URI=',
        ("Zoë Müller",),
    ),
    "two common names": (f'{BY};{digest("2")};Subject="CN=globex,CN=acme";URI=', ()),
    "no name": (f'{BY};{digest("3")};Subject="O=Acme";URI=', ()),
    "what came before": (
        f'By=spiffe://x;{digest("0")};URI={ADMIN},{BY};{digest("4")};Subject="CN=Test,O=Lyft\\, Inc.";URI={CLIENT}',
        (CLIENT,),
    ),
    "what came before twice": (
        f"By=spiffe://x;{digest('0')};URI={ADMIN},By=spiffe://x;{digest('0')};URI={ADMIN},{BY};{digest('4')};URI={CLIENT}",
        (CLIENT,),
    ),
}
"""What Envoy 1.40 sent (APPEND_FORWARD; subject, uri and dns set) for certificates with these names, made with
`cryptography`; the digests are replaced."""


@pytest.mark.parametrize("name", ENVOY)
def test_envoy_is_understood(name: str) -> None:
    header, names = ENVOY[name]
    assert names_in([header]) == names


LYFT = "468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688"
DOCUMENTED = (
    "By=http://frontend.lyft.com;Hash=468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688;"
    "URI=http://testclient.lyft.com,By=http://backend.lyft.com;"
    "Hash=9ba61d6425303443c0748a02dd8de688468ed33be74eee6556d90c0149c1309e;URI=http://frontend.lyft.com"
)


def test_the_examples_of_envoys_documentation_are_of_the_nearest_peer() -> None:
    """In the second one two proxies were passed, and `frontend` asked the last of them."""
    assert names_in([DOCUMENTED]) == ("http://frontend.lyft.com",)
    subject = 'Subject="/C=US/ST=CA/L=San Francisco/OU=Lyft/CN=Test Client"'
    third = f"By=http://frontend.lyft.com;Hash={LYFT};{subject};URI=http://testclient.lyft.com;DNS=lyft.com;DNS=www.lyft.com"
    assert names_in([third]) == ("http://testclient.lyft.com", "lyft.com", "www.lyft.com")


def test_keys_are_in_any_letters_and_other_proxies_may_put_blanks_around_a_comma() -> None:
    assert names_in([f"hash={'a' * 64};uri={ADMIN} , HASH={'b' * 64};uRi={CLIENT}"]) == (CLIENT,)


ELEMENT = f'{BY};{digest("9")};Subject="CN=Test,O=Lyft\\, Inc.";URI={CLIENT};DNS=lyft.com'
FORGED = f"By=spiffe://x;{digest('0')};URI={ADMIN}"
REFUSED: dict[str, tuple[str, ...]] = {
    "no header": (),
    "two headers": (ELEMENT, ELEMENT),
    "an empty one": ("",),
    "a blank one": (" ",),
    # What Envoy 1.40 appended its element to, as a client had sent it.
    "an open quote": (f'{FORGED};DNS=",{ELEMENT}',),
    "an open quote and a backslash": (f'{FORGED};Subject="\\,{ELEMENT}',),
    "only an open quote": (f'URI=",{ELEMENT}',),
    "a comma": (f"{FORGED},,{ELEMENT}",),
    "a backslash": (f"{FORGED}\\,{ELEMENT}",),
    "a semicolon": (f"{FORGED};,{ELEMENT}",),
    # What Envoy 1.40 sent for certificates whose names have these marks: it does not quote names.
    "a host with a semicolon": (f'{BY};{digest("a")};Subject="";URI=;DNS=a.acme.com;URI={ADMIN}',),
    "a URI with a comma": (f'{BY};{digest("b")};Subject="";URI=spiffe://cluster.local/ns/acme/sa/a,URI={ADMIN}',),
    "a host with a quote": (f'{BY};{digest("c")};Subject="";URI=;DNS=a.acme.com";URI={ADMIN}',),
    # Other forms.
    "nothing after the last comma": (f"{ELEMENT},",),
    "nothing after the last semicolon": (f"{ELEMENT};",),
    "no digest": (f"{BY};URI={CLIENT}",),
    "two digests": (f"{digest('a')};{digest('b')};URI={CLIENT}",),
    "a digest that is none": (f"Hash=1;URI={CLIENT}",),
    "two subjects": (f'{digest("a")};Subject="CN=acme";Subject="CN=globex"',),
    "an unknown key": (f"{digest('a')};Name=acme;URI={CLIENT}",),
    "an element without a value": (f"{digest('a')};URI",),
    "text after a quote": (f'{digest("a")};URI="{CLIENT}"x',),
    "a quote within a value": (f'{digest("a")};URI={CLIENT}"',),
    "a quote in a name": (f'{digest("a")};URI="spiffe://a\\"b"',),
    "a backslash in a name": (f'{digest("a")};URI="spiffe://a\\\\b"',),
    "a blank in a value": (f"{digest('a')};URI={CLIENT} x",),
    "a blank before a semicolon": (f"{digest('a')} ;URI={CLIENT}",),
    "a tab": (f"{digest('a')},\t{digest('a')};URI={CLIENT}",),
    "a line end": (f"{ELEMENT}\n",),
    "a NUL": (f"{ELEMENT}\x00",),
    "another letter": (f"{ELEMENT},{digest('a')};URI=spiffe://ａ",),
    "a subject in the old form": (f'{digest("a")};Subject="/C=US/CN=acme"',),
    "a subject that is cut": (f'{digest("a")};Subject="CN=acme,O"',),
    "a subject with a name that is not known": (f'{digest("a")};Subject="CN=acme,XX=1"',),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_well_formed_is_refused(name: str) -> None:
    with pytest.raises(Misused, match="the header x-forwarded-client-cert is refused") as caught:
        names_in(REFUSED[name])
    assert caught.value.reason is Reason.UNAUTHENTICATED


def test_two_spiffe_ids_name_nobody() -> None:
    """A certificate with a semicolon in its URI looks so too."""
    names = names_in([f'{BY};{digest("a")};Subject="";URI={CLIENT};URI={ADMIN}'])
    with pytest.raises(Misused, match="it has more than one SPIFFE id"):
        principal_of(names, None, Proof.FORWARDED)


def read_by_letters(header: str) -> list[list[Pair]] | None:
    """Read a header letter by letter, after Envoy's documentation; None for one that is not well-formed.

    Written apart from the product's parser, which is a regular expression.
    """
    if not header.isascii() or any(not " " <= letter <= "~" for letter in header):
        return None
    elements: list[list[Pair]] = []
    rest = list(header)

    def blanks() -> None:
        while rest and rest[0] == " ":
            rest.pop(0)

    while True:
        element: list[Pair] = []
        elements.append(element)
        while True:
            key = ""
            while rest and rest[0].isalpha():
                key += rest.pop(0)
            if key.lower() not in ("by", "hash", "cert", "chain", "subject", "uri", "dns"):
                return None
            if not rest or rest.pop(0) != "=":
                return None
            value = ""
            if rest and rest[0] == '"':
                rest.pop(0)
                while rest and rest[0] != '"':
                    letter = rest.pop(0)
                    value += letter
                    if letter == "\\":
                        if not rest:
                            return None
                        value += rest.pop(0)
                if not rest:
                    return None
                rest.pop(0)
            else:
                while rest and rest[0] not in '",;\\ ':
                    value += rest.pop(0)
            element.append((key.lower(), value))
            if not rest:
                return elements
            if rest[0] == ";":
                rest.pop(0)
                continue
            blanks()
            if not rest or rest.pop(0) != ",":
                return None
            blanks()
            break


PIECES = st.sampled_from(
    [
        "By", "Hash", "uri", "DNS", "SUBJECT", "Cert", "chain", "x", "=", "=", "=", ";", ";", ",", ",", '"', '"', "\\",
        " ", "a", "spiffe://a", '""', '"a"', '\\"', "é", "\t", "\x00",
    ]
)  # fmt: skip


@given(st.lists(PIECES, max_size=24).map("".join))
@example('URI="a\\"b",DNS=c')
@example('URI="\\\\";DNS=c')
@example("URI=a,")
@example("URI=a ; DNS=b")
def test_a_header_reads_as_letter_by_letter(header: str) -> None:
    wanted = read_by_letters(header)
    try:
        found = elements_of(header)
    except Misused:
        found = None
    assert found == wanted


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12)
KEY = st.sampled_from(["By", "Hash", "Cert", "Chain", "Subject", "URI", "DNS"])
MADE = st.lists(st.lists(st.tuples(KEY, VALUE), min_size=1, max_size=4), min_size=1, max_size=4)


@given(MADE, st.data())
def test_what_a_proxy_writes_is_read_as_it_was(made: list[list[Pair]], data: st.DataObject) -> None:
    """Whatever its values hold: none of them becomes a pair or an element."""

    def written(value: str) -> str:
        is_plain = not set(value) & set('",;\\ ')
        return value if is_plain and data.draw(st.booleans()) else quoted(value)

    header = ",".join(";".join(f"{key}={written(value)}" for key, value in element) for element in made)
    plain = [[(key.lower(), quoted(value)[1:-1]) for key, value in element] for element in made]
    assert elements_of(header) == plain
