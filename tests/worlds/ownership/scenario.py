"""Draw a world of members from a seed: half of the worlds with a few kinds of related faults, half with any."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from sidecar.ownership.facts import SECOND_NS, Bounds

SIGHTINGS = "sightings"
"""Members consider backends gone, and find them again."""
KINDS = (
    "loss",
    "delay",
    "duplication",
    "drift",
    "pauses",
    "kills",
    "redis down",
    "redis emptied",
    "redis failed over",
    "members cut from redis",
    "members cut from each other",
    "islands",
    "joins",
    "drains",
    SIGHTINGS,
)
STORIES = (
    ("drift", "members cut from redis"),
    ("drift", "members cut from redis", "pauses"),
    ("members cut from redis", "members cut from each other"),
    ("members cut from redis", "redis failed over"),
    ("islands", "joins"),
    ("islands", "redis emptied"),
    ("redis down", "kills"),
    ("joins", "drains", "kills"),
    ("loss", "delay", "duplication", "redis failed over"),
)
"""Faults that show only together what a rule is for; with all faults at once, such a combination is rare."""
OTHERS_SHARE = 0.1
"""The share of the other kinds that are in a story too."""
MILLISECOND_NS = 1_000_000


@dataclass(frozen=True)
class Scenario:
    """The parameters of a world. Times are in ns of true time."""

    seed: int
    bounds: Bounds
    members: tuple[str, ...]
    backends: dict[str, str]
    kinds: tuple[str, ...]
    is_new: bool
    """Redis has never been used."""
    faults_ns: int
    """The duration of the faults."""
    every_ns: int
    """The mean time between two faults."""
    loss: float
    delay: float

    def has(self, kind: str) -> bool:
        return kind in self.kinds


def draw(seed: int) -> Scenario:
    random = Random(f"ownership {seed}")
    ttl_ns = random.choice((3, 10)) * SECOND_NS
    bounds = Bounds(
        ttl_ns=ttl_ns,
        drift=random.choice((0.01, 0.05)),
        margin_ns=random.choice((10, 200)) * MILLISECOND_NS,
        ask_ns=ttl_ns // 20,
        attempt_ns=ttl_ns // random.choice((1, 5)),
        alone_ns=ttl_ns * random.choice((1, 3, 6)),
    )
    members = tuple(f"replica-{index}" for index in range(random.randint(2, 5)))
    has_homes = random.random() < 0.2
    backends = {f"engine-{index}": random.choice(members) if has_homes else "" for index in range(random.randint(1, 6))}
    if random.random() < 0.5:
        story, share = random.choice(STORIES), OTHERS_SHARE
    else:
        story, share = (), random.choice((0.25, 0.5, 0.75))
    kinds = tuple(kind for kind in KINDS if kind != SIGHTINGS and (random.random() < share or kind in story))
    if Random(f"{SIGHTINGS} {seed}").random() < 0.4:  # apart, so that all other worlds stay what they were before it
        kinds += (SIGHTINGS,)
    return Scenario(
        seed,
        bounds,
        members,
        backends,
        kinds,
        is_new=random.random() < 0.3,
        faults_ns=bounds.alone_ns + random.randint(3, 15) * ttl_ns,
        every_ns=int(ttl_ns * random.choice((0.3, 1, 3))),
        loss=random.choice((0.02, 0.2)),
        delay=random.choice((0.02, 0.2)),
    )
