"""A registration from an address that is not of the internet: what IANA lists, and what stands for it.

The expected values are IANA's special-purpose registries of IPv4 and IPv6 addresses (RFC 6890 and later), its list of
IPv6 blocks and of multicast, copied by hand with their column "Globally Reachable". Where IANA says N/A, or leaves a
choice, a comment says why.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import pytest

from sidecar.adapters.origins.addresses import is_public

NOT_GLOBAL_4 = (
    "0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.170/32", "192.0.0.171/32", "192.0.2.0/24",
    "192.88.99.0/24", "192.88.99.2/32", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "240.0.0.0/4", "255.255.255.255/32", "224.0.0.0/4",
)  # fmt: skip
NOT_GLOBAL_6 = (
    "::1/128", "::/128", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23", "2001::/32",
    "2001:2::/48", "2001:10::/28", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10",
    # Not in the special-purpose registry, and not global unicast in IANA's list of IPv6 blocks either:
    "::/96", "fec0::/10", "ff00::/8", "::/8", "100::/8", "200::/7", "400::/6", "800::/5", "1000::/4", "4000::/3",
    "6000::/3", "8000::/3", "a000::/3", "c000::/3", "e000::/4", "f000::/5", "f800::/6", "fe00::/9",
)  # fmt: skip
GLOBAL = (
    # AS112, AMT and the like are reachable from everywhere. 192.0.0.9, 192.0.0.10 and the anycast addresses of
    # 2001::/23 are too, and are refused by choice: they lead to the nearest NAT or relay, which is a neighbour.
    "192.31.196.0/24", "192.52.193.0/24", "192.175.48.0/24", "2620:4f:8000::/48",
    "1.1.1.0/24", "8.8.8.0/24", "9.0.0.0/8", "11.0.0.0/8", "100.63.0.0/16", "100.128.0.0/16", "126.0.0.0/8",
    "128.0.0.0/16", "169.253.0.0/16", "169.255.0.0/16", "172.15.0.0/16", "172.32.0.0/16", "192.0.1.0/24",
    "192.0.3.0/24", "192.88.98.0/24", "192.88.100.0/24", "192.167.0.0/16", "192.169.0.0/16", "198.17.0.0/16",
    "198.20.0.0/16", "198.51.99.0/24", "198.51.101.0/24", "203.0.112.0/24", "203.0.114.0/24", "223.255.255.0/24",
    "2001:200::/23", "2001:4860::/32", "2001:db7::/32", "2001:db9::/32", "2003::/16", "2400::/12", "2606:4700::/32",
    "2a00::/12", "3ffe::/16", "3fff:1000::/20",
)  # fmt: skip


def ends(block: str) -> list[str]:
    """Return the first, a middle and the last address of a block."""
    network = ip_network(block)
    first, last = int(network[0]), int(network[-1])
    return [str(type(network[0])(number)) for number in (first, (first + last) // 2, last)]


@pytest.mark.parametrize("block", [*NOT_GLOBAL_4, *NOT_GLOBAL_6])
def test_no_block_that_is_not_global_is_public(block: str) -> None:
    """First, middle and last address; with a zone as well, and in capitals and full length."""
    exempt = IPv6Network("64:ff9b::/96")  # inside ::/8, and global by IANA's own line
    for text in ends(block):
        address = IPv6Address(text) if ":" in text else IPv4Address(text)
        if isinstance(address, IPv6Address) and address in exempt:
            continue
        assert not is_public(text)
        assert not is_public(f"{text}%eth0")
        assert not is_public(address.exploded.upper())


@pytest.mark.parametrize("block", GLOBAL)
def test_blocks_of_the_internet_are_public(block: str) -> None:
    """Also right beside those that are not. A zone is a link's, so an address with one is not."""
    for text in ends(block):
        assert is_public(text)
        assert not is_public(f"{text}%2")


@pytest.mark.parametrize("block", NOT_GLOBAL_4)
def test_ipv6_that_stands_for_a_private_address_is_not_public(block: str) -> None:
    """IPv4-mapped, IPv4-compatible, 6to4, Teredo (server and client), both NAT64 prefixes."""
    for text in ends(block):
        inner, public = int(IPv4Address(text)), int(IPv4Address("8.8.8.8"))
        forms = {
            "mapped": 0xFFFF << 32 | inner,
            "compatible": inner,
            "6to4": 0x2002 << 112 | inner << 80 | 1,
            "Teredo's server": 0x20010000 << 96 | inner << 64 | public ^ 0xFFFFFFFF,
            "Teredo's client": 0x20010000 << 96 | public << 64 | inner ^ 0xFFFFFFFF,
            "NAT64": 0x64FF9B << 96 | inner,
            "local NAT64": 0x64FF9B0001 << 80 | inner,
        }
        assert [name for name, number in forms.items() if is_public(str(IPv6Address(number)))] == []


@pytest.mark.parametrize("text", ["64:ff9b::8.8.8.8", "64:ff9b::808:808", "0064:FF9B:0:0:0:0:8.8.8.8"])
def test_public_addresses_behind_nat64_are_public(text: str) -> None:
    """A host without IPv4 reaches all of it so."""
    assert is_public(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "%", "8.8.8.8%", "8.8.8", "010.8.8.8", "0x8.8.8.8", "134744072", "8.8.8.8 ", "[2a00::1]", "2a00::1%",
     "::ffff:8.8.8.8", "localhost", "８.８.８.８", "8.8.8.8\x00", "2a00::1::"],
)  # fmt: skip
def test_other_spellings_are_no_addresses(text: str) -> None:
    """What the system's resolver never prints is not looked into."""
    assert not is_public(text)


def test_the_list_names_each_block_once() -> None:
    """A slip of the pen would test one block twice and another never."""
    blocks = [*map(IPv4Network, NOT_GLOBAL_4), *map(IPv6Network, NOT_GLOBAL_6), *map(ip_network, GLOBAL)]
    assert len(blocks) == len(dict.fromkeys(blocks))
