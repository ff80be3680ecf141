"""The budgets of a process: requests reserve from all that match them, and settle by what they have taken.

Nobody knows before what an engine will generate. To reserve the most that a client allows would leave budgets partly
unused at the end of each window, and to reserve nothing would overdraw them. So each budget reserves what its requests
take on average: what all that are under way have reserved is then what they will take, and the error is that of a few
hundred requests' mean. What is generated beyond it is a debt in the next window, so no tenant gains by it.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from sidecar.access.budgets.charges import Budget, Charge, Demand, Place, Rule, Words, which, words_of
from sidecar.access.budgets.expected import Expected
from sidecar.access.budgets.meters import Alone, Sharing
from sidecar.config.access import Limit

NUMBERED = frozenset(Limit.model_fields) - {"tenant", "class_name", "adapter", "tokens"}
BUDGETS_MAX = 50_000
"""The most budgets that are kept. Of more, the oldest without an open request is forgotten."""


@dataclass(frozen=True, slots=True)
class Level:
    """A limit, what remains of it, and the seconds until it is whole again."""

    limit: int
    remaining: int
    resets_s: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Of the limits of requests and of tokens those of which least remains; None if there is none."""

    requests: Level | None = None
    tokens: Level | None = None


class Reservation:
    """What one request has reserved of its budgets."""

    __slots__ = ("_asked", "_charges", "_clock", "_expected", "input_tokens", "is_estimated", "is_settled")

    def __init__(self, asked: Demand, charges: list[Charge], expected: Expected, clock: Callable[[], float]) -> None:
        self._asked = asked
        self._charges = charges
        self._expected = expected
        self._clock = clock
        self.input_tokens = asked.inputs(expected)
        """The prompt's tokens as far as they are known, and whether that is only an estimate."""
        self.is_estimated = asked.is_estimated
        self.is_settled = False

    def dispatched(self) -> None:
        """Note that the request went to an engine: its tokens no longer wait. Further calls do nothing."""
        for charge in self._charges:
            charge.dispatched(self._clock())

    def settle(self, input_tokens: int | None, output_tokens: int, ran: bool) -> None:
        """Charge what was taken instead of what was reserved. Further calls do nothing.

        `input_tokens` are the prompt's as an engine or a tokenizer has counted them, None if none has. A request that
        never `ran` costs nothing.
        """
        if self.is_settled:
            return
        self.is_settled = True
        if input_tokens is not None:
            self.input_tokens, self.is_estimated = input_tokens, False
        now_s, took_s = self._clock(), 0.0
        for charge in self._charges:
            took_s = charge.settle(input_tokens, output_tokens, ran, now_s)
            if ran:
                for expected in (charge.budget.expected, charge.budget.rule.expected):
                    self._asked.learn(expected, input_tokens, output_tokens, took_s)
        if ran:
            self._asked.learn(self._expected, input_tokens, output_tokens, took_s)


@dataclass(frozen=True, slots=True)
class Completed:
    """A limit, those for each that it takes the place of, and what is in force of them."""

    limit: Limit
    defaults: tuple[Limit, ...]
    whole: Limit


class Budgets:
    """The budgets of this process. `clock` returns Unix seconds; `sharing` says what other replicas leave."""

    def __init__(self, limits: Sequence[Limit], clock: Callable[[], float], sharing: Sharing | None = None) -> None:
        self._clock = clock
        self._sharing = sharing or Alone()
        self._rules: dict[Words, list[Rule]] = {}
        self._completed: dict[tuple[Words, str], Completed] = {}
        self._patterns: tuple[Words, ...] = ()
        self._budgets: OrderedDict[Place, Budget] = OrderedDict()
        self._expected = Expected()
        self.set_limits(limits)

    def __len__(self) -> int:
        """Return how many budgets are kept."""
        return len(self._budgets)

    @property
    def count_tokens(self) -> bool:
        """True if a limit is of tokens over a time."""
        limits = (rule.limit for rules in self._rules.values() for rule in rules)
        return any(limit.tokens_per_minute or limit.tokens_per_hour or limit.tokens_per_day for limit in limits)

    def set_limits(self, limits: Sequence[Limit]) -> None:
        """Replace the limits, at once and without forgetting what is taken.

        Of two with the same tenant, class, adapter and `tokens`, the later one counts. A limit with a name has the
        numbers of one for each ("*") that it does not set itself, and takes its place.

        Budgets take their new numbers when they are used next (`_budget`): with tens of thousands of them, all at once
        would keep requests waiting.
        """
        former = {which(rule.limit): rule for rules in self._rules.values() for rule in rules}
        in_force: dict[tuple[Words, str], Rule] = {}
        by_words: dict[tuple[Words, str], list[tuple[int, Limit]]] = {}
        for number, limit in enumerate(limits):
            by_words.setdefault(which(limit), []).append((number, limit))
        completed: dict[tuple[Words, str], Completed] = {}
        for limit in limits:
            own, defaults = which(limit), _defaults_of(limit, by_words)
            known = self._completed.get(own)
            if known is None or known.limit is not limit or known.defaults != defaults:
                known = Completed(limit, defaults, _completed(limit, defaults))
            completed[own] = known
            rule = former.get(own) or in_force.get(own) or Rule(known.whole, self._expected.heir())
            rule.limit = known.whole
            in_force[own] = rule
        self._completed = completed
        self._rules = {}
        for (words, _), rule in in_force.items():
            self._rules.setdefault(words, []).append(rule)
        self._patterns = tuple({_pattern(words): None for words in self._rules})

    def reserve(
        self,
        tenant: str,
        klass: str,
        adapter: str,
        input_tokens: int,
        output_tokens_max: int | None = None,
        *,
        is_estimated: bool = False,
        sequences: int = 1,
    ) -> Reservation:
        """Take from all budgets of a request, or from none.

        `output_tokens_max` is the length that the client named, over all `sequences`; None if it named none. With
        `is_estimated`, `input_tokens` are the bytes of a text whose tokens nothing has counted. Raises
        Refused(INVALID_REQUEST) for a request that no window can hold, Refused(RATE_LIMITED) for one that must wait.
        """
        asked = Demand(input_tokens, output_tokens_max, is_estimated, sequences)
        now_s = self._clock()
        charges = [Charge(budget, asked) for budget in self._of(tenant, klass, adapter, now_s)]
        for charge in charges:
            charge.check(asked)
        refusals = [refused for charge in charges for refused in charge.refusals(now_s)]
        if refusals:
            raise max(refusals, key=lambda refused: refused.retry_after_s or math.inf)
        for charge in charges:
            charge.take()
        return Reservation(asked, charges, self._expected, self._clock)

    def check(self, words: tuple[str, str, str], asked: Demand, requests: int) -> None:
        """Raise Refused(INVALID_REQUEST) for requests that come together and never fit; `asked` is their sum."""
        for budget in self._of(*words, self._clock()):
            Charge(budget, asked).check(asked, requests)

    def standing(self, tenant: str, klass: str, adapter: str) -> Standing:
        """Return what remains for requests like this one."""
        now_s = self._clock()
        least: dict[str, Level] = {}
        for budget in self._of(tenant, klass, adapter, now_s):
            for meter in budget.meters.values():
                unit, level = meter.number.unit, Level(meter.limit, meter.remaining, meter.resets_s(now_s))
                if unit not in least or level.remaining < least[unit].remaining:
                    least[unit] = level
        return Standing(least.get("requests"), least.get("tokens"))

    def default_max_tokens(self, tenant: str, klass: str, adapter: str) -> int | None:
        """Return the length of a request that names none, or None if no limit says one."""
        limits = [rule.limit for rule, _ in self._matching((tenant, klass, adapter))]
        bounds = [bound for limit in limits for bound in (limit.default_max_tokens, limit.max_tokens)]
        return min((bound for bound in bounds if bound is not None), default=None)

    def taken(self, limit: Limit, tenant: str = "") -> dict[str, int]:
        """Return what is taken now of each number of a limit, and of one for each tenant ("*") what `tenant` has taken.

        {} of a limit for each class or adapter, which has no single budget, and of a budget that nobody uses.
        """
        now_s = self._clock()
        for place, rule in self._of_limit(limit, tenant):
            if place in self._budgets:
                budget = self._budget(place, rule, now_s)
                budget.turn(now_s)
                return budget.taken()
        return {}

    def look(self, limit: Limit, tenant: str = "") -> None:
        """Have `sharing` ask what other replicas have taken of the budget that `taken` tells of."""
        for place, rule in self._of_limit(limit, tenant):
            if "*" in place[0]:
                continue
            for meter in self._budget(place, rule, self._clock()).meters.values():
                self._sharing.touched(meter)

    def _of_limit(self, limit: Limit, tenant: str) -> list[tuple[Place, Rule]]:
        """Return the place of a limit's budget, or of the one that a tenant has, and the limit that governs it."""
        words = words_of(limit)
        own = (tenant or "*" if words[0] == "*" else words[0], *words[1:])
        places = self._places(own, limit.tokens)
        return [(place, rule) for place, rule in places if len(places) == 1 or rule.words == words]

    def _places(self, own: Words, tokens: str) -> list[tuple[Place, Rule]]:
        """Return the places of all budgets with these words, and their limits."""
        found: list[Rule] = []
        for pattern in self._patterns:
            fits = [
                (how is None) == (word is None) and (how, word) != ("", "*")
                for how, word in zip(pattern, own, strict=True)
            ]
            if all(fits):
                named = tuple(word if how == "" else how for how, word in zip(pattern, own, strict=True))
                rules = self._rules.get((named[0], named[1], named[2]), ())
                found += [rule for rule in rules if rule.limit.tokens == tokens]
        return _placed([(rule, own) for rule in found if not _is_replaced(rule, found)])

    def _matching(self, words: Words) -> Iterator[tuple[Rule, Words]]:
        """Yield the limits that match a request, and the words of the budgets that it takes from."""
        fitting = list(self._fitting(words))
        rules = [rule for rule, _ in fitting]
        for rule, own in fitting:
            if not _is_replaced(rule, rules):
                yield rule, own

    def _fitting(self, words: Words) -> Iterator[tuple[Rule, Words]]:
        for pattern in self._patterns:
            # Limits of a pattern differ in their names only, so that a request finds its own among thousands at once.
            named, own = [], []
            for how, word in zip(pattern, words, strict=True):
                named.append(word if how == "" else how)
                own.append(None if how is None else word)
            for rule in self._rules.get((named[0], named[1], named[2]), ()):
                yield rule, (own[0], own[1], own[2])

    def _of(self, tenant: str, klass: str, adapter: str, now_s: float) -> list[Budget]:
        places = _placed(list(self._matching((tenant, klass, adapter))))
        new = sum(place not in self._budgets for place, _ in places)
        if new:  # before any is made: one that is new looks idle
            self._forget_idle(2 * new, now_s)
        found = []
        for place, rule in places:
            budget = self._budget(place, rule, now_s)
            budget.turn(now_s)
            found.append(budget)
        return found

    def _budget(self, place: Place, rule: Rule, now_s: float) -> Budget:
        """Return the budget of a place, a new one if there is none, with the numbers of the limit that governs it."""
        budget = self._budgets.get(place)
        if budget is None:
            budget = self._budgets[place] = Budget(rule, place, self._sharing, now_s)
        elif budget.rule is not rule or budget.fits is not rule.limit:
            budget.rule = rule
            budget.turn(now_s)
            budget.fit(now_s)
        return budget

    def _forget_idle(self, count: int, now_s: float) -> None:
        """Look at two old budgets for each new one, so that what is kept follows what is used."""
        for _ in range(min(count, len(self._budgets))):
            place, budget = next(iter(self._budgets.items()))
            if budget.is_idle(now_s) or (len(self._budgets) >= BUDGETS_MAX and not budget.running):
                del self._budgets[place]
            else:
                self._budgets.move_to_end(place)


def _placed(matching: Sequence[tuple[Rule, Words]]) -> list[tuple[Place, Rule]]:
    """Return the places of the budgets of limits, each given with the words of its budget."""
    if len(matching) <= 1:  # mostly
        return [((own, rule.limit.tokens, None), rule) for rule, own in matching]
    shared = Counter((own, rule.limit.tokens) for rule, own in matching)
    return [
        ((own, rule.limit.tokens, rule.words if shared[own, rule.limit.tokens] > 1 else None), rule)
        for rule, own in matching
    ]


def _is_replaced(rule: Rule, rules: Sequence[Rule]) -> bool:
    """Return True if another of the limits that match has a name where this one is for each."""
    return len(rules) > 1 and "*" in rule.words and any(_names(other.limit, rule.limit) for other in rules)


def _names(one: Limit, other: Limit) -> bool:
    """Return True if a limit has names where the other one is for each ("*"), and is equal else."""
    pairs = list(zip(words_of(one), words_of(other), strict=True))
    fits = all(word == each or (each == "*" and word is not None) for word, each in pairs)
    return fits and words_of(one) != words_of(other) and one.tokens == other.tokens


def _defaults_of(
    limit: Limit, all_limits: Mapping[tuple[Words, str], Sequence[tuple[int, Limit]]]
) -> tuple[Limit, ...]:
    """Return the limits for each that a limit takes the place of, the nearest first.

    They are looked up by their words: with a look at each, thousands of limits would stop the process for a minute.
    """
    own = words_of(limit)
    tenants, klasses, adapters = ((word,) if word in (None, "*") else (word, "*") for word in own)
    found = [
        (words.count("*"), number, default)
        for words in product(tenants, klasses, adapters)
        if words != own
        for number, default in all_limits.get((words, limit.tokens), ())
    ]
    return tuple(default for _, _, default in sorted(found, key=lambda each: each[:2]))


def _completed(limit: Limit, defaults: Sequence[Limit]) -> Limit:
    """Return a limit with what it does not set from its defaults, the nearest first."""
    for default in defaults:
        missing = {name: value for name, value in default if getattr(limit, name) is None and name in NUMBERED}
        limit = limit.model_copy(update=missing)
    return limit


def _pattern(words: Words) -> Words:
    """Return a limit's words with "" for those that are names."""
    tenant, klass, adapter = (word if word in (None, "*") else "" for word in words)
    return tenant, klass, adapter
