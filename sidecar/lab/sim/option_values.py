"""The valid values of each option of a simulation: ranges of numbers, lists in one word, and exclusions.

A wrong one raises Misused, which names the option as on the command line, the value and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from sidecar.errors import Misused, Reason
from sidecar.lab.sim.workloads import TOKENS_MAX

T = TypeVar("T")

SECONDS_MAX = 1e9
COUNT = "a whole number, 1 or more"
VARIATION = "a coefficient of variation, 0 (all alike) to 100"
TOKENS = f"1 to {TOKENS_MAX:,} tokens"

EXPECTED: dict[str, tuple[float, float, str]] = {
    "adapters": (1, 10_000_000, "1 to 10,000,000"),
    "input_tokens": (1, TOKENS_MAX, TOKENS),
    "output_tokens": (1, TOKENS_MAX, TOKENS),
    "max_tokens": (1, TOKENS_MAX, TOKENS),
    "input_cv": (0, 100, VARIATION),
    "output_cv": (0, 100, VARIATION),
    "arrival_cv": (0, 100, VARIATION),
    "skew": (0.001, 100, "0.001 to 100"),
    "drift": (0, 1e12, "0 (never) or after how many requests"),
    "tenants": (0, 1e12, "weights of 0 or more, as 20,1,1"),
    "requests": (1, 1e12, COUNT),
    "rate": (1e-6, 1e9, "arrivals per second, 0.000001 to 1,000,000,000"),
    "load": (1e-6, 1e6, "a share of the all-resident capacity above 0, as 0.8"),
    "in_flight": (1, 1e9, COUNT),
    "seeds": (-(2**63), 2**63, "whole numbers, as 1,2,3"),
    "backends": (1, 1024, "1 to 1,024"),
    "seats": (1, 65_536, "1 to 65,536"),
    "slots": (1, 1_000_000, "1 to 1,000,000"),
    "host_slots": (1, 10_000_000, "1 to 10,000,000"),
    "rank": (1, 65_536, "1 to 65,536"),
    "ranks": (1, 65_536, "ranks of 1 to 65,536, as 8,16,64"),
    "load_ms": (0, 3_600_000, "milliseconds, 0 to 3,600,000"),
    "store_bytes": (1, 2**60, "bytes, 1 or more"),
    "wait_limit": (1e-3, SECONDS_MAX, "seconds above 0"),
    "patience": (0, SECONDS_MAX, "seconds, 0 or more"),
}
"""The least and the most of each option, and the range as text. NaN is in none."""


FLAGS = {"order": "ordering", "route": "routing", "store": "eviction"}
"""Options of the command line that are called otherwise than the field."""


def option(name: str) -> str:
    """Return an option as it is written on the command line."""
    return f"--{FLAGS.get(name, name).replace('_', '-')}"


def wrong(name: str, value: object, expected: str) -> Misused:
    """Return the error for an option's value."""
    return Misused(Reason.CONFIG_INVALID, f"{option(name)} {value}: expected {expected}")


def check_ranges(given: Mapping[str, Any]) -> None:
    """Raise Misused for the first number out of its range; other options are skipped."""
    for name, (low, high, expected) in EXPECTED.items():
        value = given.get(name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(each is None or low <= each <= high for each in values):
            raise wrong(name, ",".join(map(str, values)), expected)


def check_together(given: Mapping[str, Any], one: str, others: Iterable[str], why: str) -> None:
    """Raise Misused if an option was given together with one that it excludes."""
    for other in others:
        if given.get(one) is not None and given.get(other) is not None:
            raise Misused(Reason.CONFIG_INVALID, f"{option(one)} and {option(other)} exclude each other: {why}")


def check_known(name: str, value: str | None, known: Iterable[str]) -> None:
    """Raise Misused, with the known names, for an unknown name."""
    names = list(known)
    if value is not None and value not in names:
        raise Misused(Reason.CONFIG_INVALID, f'{option(name)}: there is no "{value}"; there are {", ".join(names)}')


def listed(name: str, text: str | None, kind: Callable[[str], T]) -> tuple[T, ...] | None:
    """Return the values of a list in one word, `8,16,64`; None if it was not given. Raises Misused."""
    if text is None:
        return None
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise wrong(name, text, EXPECTED[name][2]) from error


def names_listed(name: str, text: str | None) -> tuple[str, ...] | None:
    """Return the names of a list in one word. Raises Misused for an empty one."""
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise wrong(name, f'"{text}"', "names with commas between them, as none,skip")
    return names


def check_once(given: Mapping[str, Any], *names: str) -> None:
    """Raise Misused for a list with a duplicate."""
    for name in names:
        values = given.get(name, ())
        for place, value in enumerate(values):
            if value in values[:place]:
                raise Misused(Reason.CONFIG_INVALID, f"{option(name)} names {value} twice; once is enough")
