"""What every kind of backend must keep, as checks for the tests of whoever writes one.

The checks of `RECORD` take a `Kind` and need no engine: its section of the configuration, its models, how requests are
written. Those of `LIVE` take a `Stage`, which has a real engine that the check may load, kill and start again. Each
raises AssertionError with a message for the kind's author.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sidecar.backends.kind import Kind
from tests.conformance.kinds import asking, life, records, runs, sections
from tests.conformance.kinds.stage import Engine as Engine
from tests.conformance.kinds.stage import Stage as Stage

RECORD: tuple[Callable[[Kind], None], ...] = (
    records.names_are_its_own,
    records.models_say_what_they_are,
    records.recognises_its_own_requests_only,
    records.knows_nothing_and_says_so,
    records.checks_rest_on_earlier_ones,
    sections.reads_a_url_of_each_scheme,
    sections.is_the_same_after_a_dump,
    sections.refuses_keys_of_other_kinds,
    sections.gives_reasons_for_keys_that_it_lacks,
    sections.makes_entries_of_found_engines,
    asking.answers_the_prompts_that_it_claims,
    asking.passes_on_what_it_does_not_refuse,
)
LIVE: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    runs.answers_alike_whole_and_streamed,
    runs.answers_with_the_adapter_that_is_loaded,
    runs.never_answers_for_an_adapter_that_is_gone,
    runs.loads_again_what_was_forgotten,
    runs.cancels_a_run_and_frees_its_seat,
    life.answers_a_probe,
    life.is_lost_and_comes_up_again,
    life.takes_nothing_while_it_is_down,
    life.stops_and_leaves_nothing,
)
