"""Conclusions from a verification's answers: does the adapter change them, do backends agree, are they right?

An engine can accept an adapter and compute without it, or hold other weights under its id, without an error. Only
answers show that: the base model's beside the adapter's, one engine's beside another's, and known ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.backends.openai.paths import generates
from sidecar.core.facts import EngineFacts
from sidecar.model.reference import Reference
from sidecar.shell.evidence import Answers, Evidence, difference_position, quoted

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
PBTXT_TYPES = {"float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float32": "TYPE_FP32"}


@dataclass(frozen=True)
class Check:
    """One conclusion: `check` is "answered", "changes", "agreement" or "expectations"."""

    check: str
    result: str
    sentence: str
    advice: str = ""
    backends: tuple[str, ...] = ()


def checks_of(evidence: Evidence) -> list[Check]:
    """Return all conclusions, in the best order for reading."""
    return [*_answered(evidence), *_changes(evidence), *_agreement(evidence), *_expectations(evidence)]


def _answered(evidence: Evidence) -> list[Check]:
    checks = []
    for backend in evidence.facts:
        asked = evidence.of(backend)
        failed = [error for each in asked if (error := _error(each, not evidence.no_base))]
        if failed:
            sentence = f"{len(failed)} of {len(asked)} prompts were not answered on {backend}: {failed[0]}"
            advice = f'look at "sidecar backends show {backend}" and at the sidecar\'s log'
            checks.append(Check("answered", FAILED, sentence, advice, (backend,)))
        else:
            sentence = f"all {len(asked)} prompts were answered on {backend}"
            checks.append(Check("answered", PASSED, sentence, backends=(backend,)))
    return checks


def _error(asked: Answers, with_base: bool) -> str:
    replies = (asked.adapter, *asked.again, *((asked.base,) if with_base else ()))
    return next((reply.error for reply in replies if reply.error), "")


def _changes(evidence: Evidence) -> list[Check]:
    if evidence.no_base:
        sentence = f"whether it changes the base model's answers was not asked: {evidence.no_base}"
        return [Check("changes", SKIPPED, sentence, backends=tuple(evidence.facts))]
    if evidence.weightless and evidence.changes_nowhere:
        sentence = f"{evidence.version} changes nothing: A or B is zero in all of its modules"
        advice = "the engines are right; it was saved before it was trained, so register the checkpoint that is meant"
        return [Check("changes", FAILED, sentence, advice, tuple(evidence.facts))]
    return [
        _changes_on(evidence, backend) for backend in evidence.facts if any(a.compared for a in evidence.of(backend))
    ]


def _changes_on(evidence: Evidence, backend: str) -> Check:
    compared = [asked for asked in evidence.of(backend) if asked.compared]
    changed = sum(asked.changed for asked in compared)
    if changed:
        sentence = f"{evidence.version} changes the answer to {changed} of {len(compared)} prompts on {backend}"
        return Check("changes", PASSED, sentence, backends=(backend,))
    sentence = (
        f"{evidence.version} changes nothing on {backend}: it answers all {len(compared)} prompts as the base model"
    )
    advice = _silence_advice(evidence.facts[backend])
    if evidence.changes_nowhere:
        advice += (
            "; or its effect is too small to show in these answers: ask what it was trained for with --prompt, or for "
            "more --tokens"
        )
    return Check("changes", FAILED, sentence, advice, (backend,))


def _silence_advice(facts: EngineFacts) -> str:
    if facts.reads_files:
        return "its engine takes the adapter and computes without it: check that it was started with LoRA turned on"
    sent = facts.dtype or "float16"
    return (
        "its engine takes the weights and computes without them, which it does when its LoRA plugin is of another type "
        f"than the weights: they are sent as {sent}, as {PBTXT_TYPES.get(sent, sent)} of lora_weights in its "
        f"config.pbtxt says; build the engine with --lora_plugin {sent}, or let config.pbtxt say what the plugin was "
        "built for, start it again, and verify again"
    )


def _agreement(evidence: Evidence) -> list[Check]:
    divided = [_division(evidence, backend) for backend in evidence.facts]
    return [*(check for check in divided if check is not None), *_agreement_of_backends(evidence)]


def _division(evidence: Evidence, backend: str) -> Check | None:
    """Return a check if a backend disagrees with itself, as instances with separate caches may."""
    asked = evidence.of(backend)
    divided = [(each, other) for each in asked if (other := each.other_answer) is not None]
    if not divided:
        return None
    first, other = divided[0]
    sentence = (
        f"{backend} answers {len(divided)} of {len(asked)} prompts in more than one way, {first.prompt} with "
        f"{first.adapter} and with {other}: its {evidence.facts[backend].caches} instances do not hold the same"
    )
    return Check("agreement", FAILED, sentence, _refresh_advice(evidence), (backend,))


def _agreement_of_backends(evidence: Evidence) -> list[Check]:
    answering = [b for b in evidence.facts if any(not asked.adapter.error for asked in evidence.of(b))]
    # What a pooler makes is no text to compare with an answer.
    alike = [[b for b in answering if generates(evidence.facts[b].paths) is sort] for sort in (True, False)]
    if all(len(group) < 2 for group in alike):
        sentence = "one backend only was asked, so there is none to compare it with"
        if len(answering) > 1:
            sentence = f"{' and '.join(answering)} are not compared: one answers with tokens, the other pools"
        return [Check("agreement", SKIPPED, sentence, backends=tuple(answering))]
    return [check for group in alike if len(group) > 1 for check in _agreement_within(evidence, group)]


def _agreement_within(evidence: Evidence, answering: Sequence[str]) -> list[Check]:
    reference = min(answering, key=lambda backend: _distrust(evidence, backend, answering))
    others = [(backend, _parted(evidence, reference, backend)) for backend in answering if backend != reference]
    differing = [_disagreement(evidence, reference, other, parted, answering) for other, parted in others if parted]
    if differing:
        return differing
    sentence = f"{', '.join(answering)} answer alike"
    return [Check("agreement", PASSED, sentence, backends=tuple(answering))]


def _distrust(evidence: Evidence, backend: str, answering: Sequence[str]) -> tuple[bool, int, int]:
    """Return the rank of a backend as a reference: first not silent, then right as far as known, then most agreed."""
    wrong = sum(asked.expected and not asked.matches for asked in evidence.of(backend))
    apart = sum(len(_parted(evidence, backend, other)) for other in answering if other != backend)
    return evidence.is_silent(backend), wrong, apart


def _parted(evidence: Evidence, first: str, second: str) -> list[tuple[Answers, Answers]]:
    """Return the pairs of answers in which two backends differ as the adapter."""
    seconds = {asked.prompt: asked for asked in evidence.of(second) if not asked.adapter.error}
    pairs = [
        (asked, seconds[asked.prompt])
        for asked in evidence.of(first)
        if asked.prompt in seconds and not asked.adapter.error
    ]
    return [(a, b) for a, b in pairs if a.adapter.content != b.adapter.content]


def _disagreement(
    evidence: Evidence, reference: str, other: str, parted: list[tuple[Answers, Answers]], answering: Sequence[str]
) -> Check:
    right, wrong = parted[0]
    sentence = (
        f"{other} differs from {reference} on {len(parted)} of {len(evidence.of(other))} prompts, first on "
        f"{right.prompt} {difference_position(right.adapter, wrong.adapter)}: {other} says {wrong.adapter}, "
        f"{reference} {right.adapter}"
    )
    known = _distrust(evidence, reference, answering) < _distrust(evidence, other, answering)
    if evidence.is_silent(other):
        advice = f"{other} answers as the base model; mend that first"
    elif any(a.base.content != b.base.content for a, b in parted if a.compared and b.compared):
        advice = (
            "their base models answer differently as well: they are other models, of other types or other builds; "
            f'compare "sidecar backends show {reference}" and "{other}"'
        )
    else:
        advice = (
            f"{_refresh_advice(evidence)}; where answers part only after many equal words, rounding on another kind of "
            "GPU does that too: ask for fewer --tokens"
        )
        if not known:
            advice += "; which of the two is right only known answers tell: put some into a probe.jsonl"
    return Check("agreement", FAILED, sentence, advice, (other, reference))


def _refresh_advice(evidence: Evidence) -> str:
    name = Reference.of(evidence.version).name
    return (
        f'an engine may hold other content under its id: "sidecar adapters refresh {name}" has each take a fresh copy '
        "under a new one; then verify again"
    )


def _expectations(evidence: Evidence) -> list[Check]:
    if evidence.probes:
        return [Check("expectations", FAILED if evidence.probes_wrong else SKIPPED, evidence.probes)]
    checks = []
    for backend in evidence.facts:
        expected = [asked for asked in evidence.of(backend) if asked.expected]
        mismatches = [asked for asked in expected if not asked.matches]
        if not expected:
            continue
        sentence = f"{len(expected) - len(mismatches)} of {len(expected)} lines of probe.jsonl match on {backend}"
        if not mismatches:
            checks.append(Check("expectations", PASSED, sentence, backends=(backend,)))
            continue
        first = mismatches[0]
        sentence += f"; {first.prompt} is answered with {first.adapter} and not {quoted(first.prompt.expect)}"
        checks.append(Check("expectations", FAILED, sentence, _mismatch_advice(evidence, backend), (backend,)))
    return checks or [Check("expectations", SKIPPED, "no line of probe.jsonl was answered")]


def _mismatch_advice(evidence: Evidence, backend: str) -> str:
    if evidence.is_silent(backend):
        return f"{backend} answers as the base model; mend that first"
    return (
        f"{_refresh_advice(evidence)}; if it stays so on every backend, probe.jsonl was written for another version, "
        "another base model, or not from greedy answers"
    )
