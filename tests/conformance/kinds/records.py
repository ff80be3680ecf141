"""What the record of a kind must say."""

from __future__ import annotations

from dataclasses import fields

from sidecar.backends.checks.finding import Target
from sidecar.backends.kind import Kind, Native
from sidecar.backends.registry import kinds
from sidecar.core.facts import EngineFacts
from tests.conformance.kinds.sections import entry_of


def others(kind: Kind) -> list[Kind]:
    """Return the kinds that there are beside one."""
    return [other for other in kinds() if other is not kind]


def names_are_its_own(kind: Kind) -> None:
    """Its name, its schemes and its models' names are nobody else's."""
    schemes = list(kind.section.SCHEMES)
    assert schemes, f"{kind.section.__name__}.SCHEMES is empty: no URL names the kind"
    assert schemes[0] == kind.name, f"the first of {kind.section.__name__}.SCHEMES must be {kind.name}, the kind's name"
    assert kind.models, "models is empty: a kind has at least one model"
    names = [model.name for model in kind.models]
    assert len(set(names)) == len(names), f"two of its models have one name: {names}"
    for other in others(kind):
        assert other.name != kind.name, f"another kind is called {kind.name}"
        shared = set(schemes) & set(other.section.SCHEMES)
        assert not shared, f"{other.name} has the URL schemes {shared} too"
        shared = set(names) & {model.name for model in other.models}
        assert not shared, f"{other.name} has models of these names too: {shared}"


def models_say_what_they_are(kind: Kind) -> None:
    """Every model has a title and words for its pages, and can be asked by some API."""
    for model in kind.models:
        assert model.title, f"{model.name}: title is empty; errors name the engine by it"
        assert model.native or model.asking, f"{model.name} has neither native nor asking: nobody could ask it"
        said = model.pages.format(host="HOST-PAGES", device="DEVICE-PAGES")
        assert "{" not in said, f"{model.name}: pages may have {{host}} and {{device}} in it: {said}"
        prompts = model.asking.prompts if model.asking is not None else {None}
        assert prompts, f"{model.name}: asking.prompts is empty: nothing can be asked"


def recognises_its_own_requests_only(kind: Kind) -> None:
    """`recognises` is for KServe, and does not take a request without inputs for its own."""
    for model in kind.models:
        if model.recognises is not None:
            assert model.native is Native.KSERVE, f"{model.name}: recognises is for models that are native to KServe"
            assert not model.recognises(lambda name: None), f"{model.name} takes a request without inputs for its own"


def knows_nothing_and_says_so(kind: Kind) -> None:
    """With nothing declared of its engine it still says which model to expect, and what it needs."""
    entry = entry_of(kind)
    declared = kind.declare(entry, EngineFacts(), [entry])
    expected = {model.name: model for model in kind.models}
    assert declared.kind in expected, f"declare gives the kind of model {declared.kind}; it has {list(expected)}"
    assert declared.reads_files == expected[declared.kind].reads_files, "declare contradicts the model's reads_files"
    assert all(isinstance(note, str) and note for note in kind.notes(entry, declared)), "notes yields sentences"
    if kind.unchecked is not None:
        assert "backend-7" in kind.unchecked(["backend-7"]), "unchecked must name the backends"


def checks_rest_on_earlier_ones(kind: Kind) -> None:
    """The checks of a live engine have names of their own, and need only what was looked at before."""
    if kind.checks is None:
        return
    checks, models = kind.checks(), [model.name for model in kind.models]
    for step in checks.steps:
        assert step.kind is None or step.kind in models, f'the check "{step.name}" is for {step.kind}; it has {models}'
        assert step.limit_s > 0, f'the check "{step.name}" has no time'
    for model in models:
        seen: set[str] = set()
        for step in checks.steps:
            if step.kind in (None, model):
                assert step.name not in seen, f"two checks of {model} are called {step.name}"
                later = set(step.needs) - seen
                assert not later, f'the check "{step.name}" of {model} needs {later}, which come later or never'
                seen.add(step.name)
    target, known = checks.target(entry_of(kind)), {field.name for field in fields(Target)}
    assert target.keys() <= known, f"checks.target gives what a Target has not: {target.keys() - known}"
