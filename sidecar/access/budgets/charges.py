"""One limit, one of its budgets, and what one request takes from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from sidecar.access.budgets.expected import Expected, UnderWay
from sidecar.access.budgets.meters import NUMBERS, Meter, Number, Sharing
from sidecar.config.access import Limit
from sidecar.errors import Reason, Refused

SOON_S = 1.0
"""When to try again for what does not wait for a window to turn."""
LEASED_S = 0.2
"""When to try again for what another replica could use: by then this one has asked for it."""

Words = tuple[str | None, str | None, str | None]
"""A tenant, a class and an adapter; None stands for all of them, and in a limit "*" for each."""
Place = tuple[Words, str, Words | None]
"""What identifies a budget: its own words, which tokens it counts, and None.

A limit with a name has the budget of the one for each ("*") whose place it takes: what was taken counts. The limit's
words stand in the place of None where two limits have budgets with the same words, as one for acme and each adapter and
one for each tenant and sql.
"""


@dataclass(slots=True)
class Rule:
    """A limit in force, and what the requests that match it are expected to take."""

    limit: Limit
    expected: Expected

    @property
    def words(self) -> Words:
        return words_of(self.limit)

    def numbers(self) -> Iterator[tuple[Number, int]]:
        """Yield the numbers that it limits by window."""
        for number in NUMBERS:
            most = getattr(self.limit, number.name)
            if most is not None:
                yield number, most


def words_of(limit: Limit) -> Words:
    return limit.tenant, limit.class_name, limit.adapter


def which(limit: Limit) -> tuple[Words, str]:
    """Return what identifies a limit: its words, and which tokens it counts."""
    return words_of(limit), limit.tokens


@dataclass(frozen=True, slots=True)
class Demand:
    """What is known of a request when it comes. See `Budgets.reserve`."""

    input_tokens: int
    output_tokens_max: int | None
    is_estimated: bool
    sequences: int

    def inputs(self, expected: Expected) -> int:
        return expected.texts.expect(self.input_tokens) if self.is_estimated else self.input_tokens

    def outputs(self, expected: Expected, default: int | None) -> int:
        """Return what it will generate: its mean. A length that the client did not name only bounds it."""
        if self.output_tokens_max is not None:
            return expected.shares.expect(self.output_tokens_max)
        mean = expected.outputs.expect(self.sequences)
        return mean if default is None else min(mean, default * self.sequences)

    def learn(self, expected: Expected, input_tokens: int | None, output_tokens: int, took_s: float) -> None:
        """Note what it has taken, and in what time."""
        if took_s > 0:
            # Twice, because at a random moment an answer is half done. Weighted, because long ones are then more often
            # met. By what is expected now: what was reserved when nothing was known says nothing of later answers.
            expected.growth.learn(2 * (output_tokens - self.outputs(expected, None)), took_s, took_s)
        if self.is_estimated and input_tokens is not None and self.input_tokens:
            expected.texts.learn(input_tokens, self.input_tokens)
        if self.output_tokens_max is None:
            expected.outputs.learn(output_tokens, self.sequences)
        elif self.output_tokens_max:
            expected.shares.learn(output_tokens, self.output_tokens_max)


class Budget:
    """What the requests of one scope may take by one limit, and take now."""

    __slots__ = (
        "_key",
        "_sharing",
        "beyond",
        "expected",
        "fits",
        "meters",
        "queued_tokens",
        "rule",
        "running",
        "under_way",
        "words",
    )

    def __init__(self, rule: Rule, place: Place, sharing: Sharing, now_s: float) -> None:
        self.rule = rule
        self.words = place[0]
        self._sharing = sharing
        named = json.dumps(place)
        self._key = blake2b(named.encode(), digest_size=12).hexdigest()
        self.expected = rule.expected.heir()
        self.running = self.queued_tokens = 0
        self.under_way = UnderWay()
        self.beyond: Counter[str] = Counter()
        """By number, what answers under way with a length may take beyond what they have reserved."""
        self.meters: dict[str, Meter] = {}
        self.fit(now_s)

    def fit(self, now_s: float) -> None:
        """Have a meter for each number of the limit as it is now, with what is taken already."""
        self.fits = self.rule.limit
        former, self.meters = self.meters, {}
        for number, most in self.rule.numbers():
            meter = former.get(number.name) or Meter(number, f"{self._key}:{number.name}", most, self._sharing, now_s)
            meter.set(most)
            self.meters[number.name] = meter

    def turn(self, now_s: float) -> None:
        """Bring its meters to this time."""
        counts_outputs = self.rule.limit.tokens != "input"
        excess = self.under_way.excess(self.expected, now_s) if counts_outputs else 0
        for meter in self.meters.values():
            meter.turn(now_s)
            if meter.number.unit == "tokens":
                meter.pending = excess

    def is_idle(self, now_s: float) -> bool:
        """Return True if forgetting the budget changes nothing."""
        self.turn(now_s)
        return not self.running and not any(meter.taken_by_all for meter in self.meters.values())

    def taken(self) -> dict[str, int]:
        """Return what is taken of each number of the limit."""
        taken = {name: meter.taken_by_all for name, meter in self.meters.items()}
        if self.rule.limit.concurrent is not None:
            taken["concurrent"] = self.running
        if self.rule.limit.queued_tokens is not None:
            taken["queued_tokens"] = self.queued_tokens
        return taken

    @property
    def replicas(self) -> int:
        return self._sharing.replicas

    def own_part(self, most: int) -> int:
        """Return this replica's part of a number that is not counted in windows, and so not leased."""
        return max(1, most // self.replicas)

    @property
    def scope(self) -> str:
        """The budget's owner, in words."""
        tenant, klass, adapter = self.words
        parts = [f"class {klass}"] if klass is not None else []
        if adapter is not None:
            parts.append(f"adapter {adapter}" if adapter != "base" else "the base model")
        if tenant is not None:
            parts.insert(0, f"tenant {tenant}" if tenant else "requests without a tenant")
        return ", ".join(parts) or "all requests together"


class Charge:
    """What one request takes from one budget."""

    __slots__ = ("_amounts", "_began_s", "_input_tokens", "_length", "_most", "_sequences", "budget", "tokens")

    def __init__(self, budget: Budget, asked: Demand) -> None:
        self.budget = budget
        limit = budget.rule.limit
        self._input_tokens = asked.inputs(budget.expected)
        default = min((each for each in (limit.default_max_tokens, limit.max_tokens) if each), default=None)
        self.tokens = self._counted(self._input_tokens, asked.outputs(budget.expected, default))
        self._sequences = asked.sequences
        self._length = length = asked.output_tokens_max
        self._most = None if length is None else self._counted(self._input_tokens, length)
        self._amounts: list[tuple[Meter, int, int]] = []
        self._began_s: float | None = None

    def _counted(self, input_tokens: int, output_tokens: int) -> int:
        """Return the tokens that the limit counts."""
        counts = self.budget.rule.limit.tokens
        return (counts != "output") * input_tokens + (counts != "input") * output_tokens

    def check(self, asked: Demand, requests: int = 1) -> None:
        """Raise Refused(INVALID_REQUEST) for what this limit never lets pass: a request, or the sum of so many."""
        limit, length = self.budget.rule.limit, asked.output_tokens_max
        if limit.max_tokens is not None and length is not None and length > limit.max_tokens * asked.sequences:
            each = f" for each of {asked.sequences} answers" if asked.sequences > 1 else ""
            raise self._refused(
                "max_tokens",
                f"may ask for {limit.max_tokens:,} tokens of answer{each} (max_tokens), and this request asks "
                f"for {length // asked.sequences:,}; ask for fewer, or have your operator raise the limit",
            )
        if limit.max_tokens is not None and length is None:  # of KServe tensors, which pass as they come
            raise self._refused(
                "max_tokens",
                f"may ask for {limit.max_tokens:,} tokens of answer (max_tokens), and this request names no "
                "length; send the input request_output_len, or max_tokens where the model has that, in the message",
            )
        if limit.concurrent is not None and asked.sequences > self.budget.own_part(limit.concurrent):
            at_once = f"at once{self._part(limit.concurrent).removesuffix(',')}"
            raise self._too_many("concurrent", limit.concurrent, at_once, asked.sequences)
        least = self._counted(self._input_tokens, 0)
        for meter in self.budget.meters.values():
            name, word = meter.number.name, meter.number.word
            if meter.number.unit == "requests" and requests > meter.limit:
                raise self._too_many(name, meter.limit, f"a {word}", requests)
            if meter.number.unit == "tokens" and least > meter.limit:
                about = "about " if asked.is_estimated else ""
                has = "prompt alone has" if requests == 1 else f"{requests} prompts alone have"
                raise self._refused(
                    name,
                    f"may use {meter.limit:,} tokens a {word}, and this request's {has} {about}{least:,}; send a "
                    f"shorter one, or have your operator raise {name}",
                )

    def _too_many(self, name: str, most: int, when: str, count: int) -> Refused:
        return self._refused(
            name,
            f"may have {most:,} request{'s' if most > 1 else ''} {when} ({name}), and this one counts as {count:,}, as "
            "many as its prompts and answers; send fewer, or have your operator raise the limit",
        )

    def refusals(self, now_s: float) -> Iterator[Refused]:
        """Yield why the budget has no room for the request now."""
        budget, limit = self.budget, self.budget.rule.limit
        if limit.concurrent is not None and budget.running + self._sequences > budget.own_part(limit.concurrent):
            and_this = f", and this one counts as {self._sequences:,}" if self._sequences > 1 else ""
            yield self._refused(
                "concurrent", f"may have {limit.concurrent:,} request{'s' if limit.concurrent > 1 else ''} at once"
                f"{self._part(limit.concurrent)} and has {budget.running:,}{and_this}; send it again when one has "
                "ended", SOON_S,
            )  # fmt: skip
        queued_max = None if limit.queued_tokens is None else budget.own_part(limit.queued_tokens)
        if queued_max is not None and budget.queued_tokens and budget.queued_tokens + self.tokens > queued_max:
            yield self._refused(
                "queued_tokens", f"may have {limit.queued_tokens:,} tokens waiting{self._part(queued_max)} and has "
                f"{budget.queued_tokens:,}, and this request has about {self.tokens:,}; send it again when engines "
                "have taken some", SOON_S,
            )  # fmt: skip
        for meter in budget.meters.values():
            amount = self._amount(meter)
            if meter.taken + meter.pending + amount <= meter.allowance:
                if self._may_overdraw(meter):
                    yield self._refused(
                        meter.number.name, f"may use {meter.limit:,} tokens a {meter.number.word}, and the requests "
                        f"under way could overdraw it by more than as much again: this one asks for answers of "
                        f"{self._length:,} tokens; ask for a smaller max_tokens, or send it again when others have "
                        "ended", SOON_S,
                    )  # fmt: skip
                continue
            remains = meter.taken_by_all + amount <= meter.limit
            meter.sharing.touched(meter, amount if remains else 0)
            yield self._used_up(meter, amount, remains, now_s)

    def _may_overdraw(self, meter: Meter) -> bool:
        """Return True if answers as long as they may be would take more than twice the limit of the window.

        What is reserved is a mean that a client can teach: short answers to great lengths, and then long ones. One
        request is always let in. Each replica has its part of the room, for it knows no other's answers.
        """
        if self._most is None or meter.number.unit != "tokens" or not self.budget.running:
            return False
        room = (2 * meter.limit - meter.taken_by_all + meter.pending) // self.budget.replicas
        return self.budget.beyond[meter.number.name] + self._most > room

    def _used_up(self, meter: Meter, amount: int, remains: bool, now_s: float) -> Refused:
        number, resets_s = meter.number, meter.resets_s(now_s)
        verb = "send" if number.unit == "requests" else "use"
        may = f"may {verb} {meter.limit:,} {number.unit if meter.limit > 1 else number.unit[:-1]} a {number.word}"
        if remains and meter.sharing.gets_more:
            text = f"{may}; some of them are left, but not yet at this replica; send it again"
            return self._refused(number.name, text, min(LEASED_S, resets_s))
        so_far = f"{'sent' if number.unit == 'requests' else 'used'} so far: {meter.taken_by_all:,}"
        if remains:
            so_far += f", and this one of {self.budget.replicas} replicas has given its share, for Redis is away"
        needs = f"; this request needs about {amount:,}" if number.unit == "tokens" else ""
        text = (
            f"{may}; {so_far}{needs}; send it again in {_in_words(resets_s)}, when the next {number.word} begins, "
            f"or have your operator raise {number.name}"
        )
        return self._refused(number.name, text, resets_s)

    def _refused(self, name: str, text: str, after_s: float | None = None) -> Refused:
        """Return the error for a request that may come again after some time; without one, never as it is."""
        scope, reason = self.budget.scope, Reason.INVALID_REQUEST if after_s is None else Reason.RATE_LIMITED
        return Refused(reason, f"{scope} {text}", retry_after_s=after_s, limit=name, scope=scope)

    def _part(self, most: int) -> str:
        replicas = self.budget.replicas
        return f", {self.budget.own_part(most):,} at each of {replicas} replicas," if replicas > 1 else ""

    def _amount(self, meter: Meter) -> int:
        """Return what is reserved of a meter. A window's whole limit is enough for any answer: the rest is a debt."""
        return 1 if meter.number.unit == "requests" else min(self.tokens, meter.limit)

    def take(self) -> None:
        self.budget.running += self._sequences
        self.budget.queued_tokens += self.tokens
        for meter in self.budget.meters.values():
            amount = self._amount(meter)
            meter.take(amount)
            self._amounts.append((meter, meter.window, amount))
            self.budget.beyond[meter.number.name] += self._beyond(meter, amount)

    def _beyond(self, meter: Meter, amount: int) -> int:
        return 0 if self._most is None or meter.number.unit != "tokens" else self._most - amount

    def dispatched(self, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = now_s
            self.budget.queued_tokens -= self.tokens
            self.budget.under_way.begin(self.tokens, now_s)

    def settle(self, input_tokens: int | None, output_tokens: int, ran: bool, now_s: float) -> float:
        """Charge what was taken. Return how long it was under way, in seconds."""
        self.dispatched(now_s)
        assert self._began_s is not None
        self.budget.running -= self._sequences
        self.budget.under_way.end(self.tokens, self._began_s)
        known = self._input_tokens if input_tokens is None else input_tokens
        tokens = self._counted(known, output_tokens)
        for meter, window, amount in self._amounts:
            meter.turn(now_s)
            self.budget.beyond[meter.number.name] -= self._beyond(meter, amount)
            took = 0 if not ran else 1 if meter.number.unit == "requests" else tokens
            meter.correct(window, took - amount)
        return now_s - self._began_s


def _in_words(seconds: float) -> str:
    for unit, each_s in (("h", 3600), ("min", 60)):
        if seconds >= 2 * each_s:
            return f"{seconds / each_s:.0f} {unit}"
    return f"{max(1, seconds):.0f} s"
