"""Backend kinds of other packages that are broken, or that claim what another kind has: refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import model_validator

from sidecar.backends import registry
from sidecar.backends.kind import Kind, ModelKind
from sidecar.config import Config, plugins
from sidecar.config.backends import Backend as Entry
from sidecar.errors import Misused
from sidecar.serve.pool import facts_of, make_backends


class MineEntry(Entry):
    SCHEMES: ClassVar = {"mine": False, "mines": True}


def _raises(*_: Any) -> Any:
    raise KeyError("boom")


MINE = Kind("mine", MineEntry, (ModelKind("mine_model"),), _raises)
ENTRY = {"kind": f"{__name__}:GIVEN", "url": "mine://127.0.0.1:1"}
GIVEN: Any = MINE


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_from_elsewhere", {})


def refusal(*entries: Mapping[str, Any]) -> str:
    with pytest.raises(Misused) as refused:
        facts_of(registry.entries_of(Config(backends=tuple(dict(entry) for entry in entries))))
    return refused.value.message


def offered(monkeypatch: pytest.MonkeyPatch, *offers: tuple[str, str, str]) -> None:
    """Install packages, each as its name, what it offers, and the target."""
    points = []
    for package, name, target in offers:
        point = EntryPoint(name, target, plugins.GROUP)
        vars(point)["dist"] = SimpleNamespace(name=package)
        points.append(point)
    monkeypatch.setattr(plugins, "_plugged_in", lambda: tuple(points))


def section(**attributes: Any) -> type[Entry]:
    return type("Section", (MineEntry,), {"__module__": __name__, **attributes})


CLAIMS = {
    'the name "triton" of a kind of model': replace(MINE, models=(ModelKind("triton"),)),
    "the scheme vllms://": replace(MINE, section=section(SCHEMES={"mine": False, "vllms": True})),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_what_our_kinds_have_is_not_taken_over(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for our engines would go to another's code."""
    monkeypatch.setitem(globals(), "GIVEN", CLAIMS[what])
    told = refusal(ENTRY, {"url": "triton://127.0.0.1:2"})
    assert told.startswith("backends.0.kind: ")
    assert f"it has {what} in common with the kind" in told


def test_two_kinds_of_other_packages_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In either order of the entries."""
    other = Kind("other", section(SCHEMES={"other": False}), MINE.models, _raises)
    monkeypatch.setitem(globals(), "OTHER", other)
    for entries in ([ENTRY, {"kind": f"{__name__}:OTHER", "url": "other://a:1"}],) * 2:
        monkeypatch.setattr(registry, "_from_elsewhere", {})
        assert 'the name "mine_model" of a kind of model in common' in refusal(*entries)
        entries.reverse()


UNUSABLE = {
    "it is not a backends.kind.Kind": "a kind",
    "its section is not a subclass": replace(MINE, section=dict),  # type: ignore[type-var]
    "must be its name ('mine')": replace(MINE, section=section(SCHEMES={"mines": True, "mine": False})),
    "must be its name (7)": replace(MINE, name=7),  # type: ignore[arg-type]
    "Section.SCHEMES must be": replace(MINE, section=section(SCHEMES=None)),
    "not a tuple of ModelKinds": replace(MINE, models=("mine",)),  # type: ignore[arg-type]
    "at least one": replace(MINE, models=()),
    "its connect cannot be called": replace(MINE, connect=None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_records_that_are_no_kinds(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GIVEN", UNUSABLE[why])
    assert why in refusal(ENTRY)


BROKEN = {
    "SyntaxError": "def",
    "RuntimeError: boom": "raise RuntimeError('boom')",
    "ValueError: boom": "raise ValueError('boom')",
    "SystemExit: 3": "raise SystemExit(3)",
    "No module named 'nowhere'": "import nowhere",
    "has no attribute 'KIND'": "",
}


@pytest.mark.parametrize("told", BROKEN)
def test_modules_that_cannot_be_imported(told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"broken_{list(BROKEN).index(told)}"
    (tmp_path / f"{name}.py").write_text(BROKEN[told])
    monkeypatch.syspath_prepend(tmp_path)
    said = refusal({"kind": f"{name}:KIND", "url": "mine://127.0.0.1:1"})
    assert said.startswith(f'backends.0.kind: the backend kind "{name}:KIND" cannot be loaded from')
    assert told in said


@pytest.mark.parametrize("target", [":X", ".a:X", "a.:X"])
def test_targets_that_are_no_modules(target: str) -> None:
    assert f'cannot be loaded from "{target}"' in refusal({"kind": target, "url": "mine://127.0.0.1:1"})


def test_a_section_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the kind, what was raised, and where."""
    broken = section(check=model_validator(mode="before")(lambda record: _raises()))
    monkeypatch.setitem(globals(), "GIVEN", replace(MINE, section=broken))
    told = refusal(ENTRY)
    assert told.startswith("backends.0: the backend kind \"mine\" has failed in model_validate: KeyError: 'boom', at ")
    assert Path(__file__).name in told


def test_functions_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GIVEN", replace(MINE, declare=_raises))
    assert "127.0.0.1:1: the backend kind \"mine\" has failed in _raises: KeyError: 'boom', at " in refusal(ENTRY)
    monkeypatch.setitem(globals(), "GIVEN", MINE)
    monkeypatch.setattr(registry, "_from_elsewhere", {})
    entries = registry.entries_of(Config(backends=(ENTRY,)))
    with pytest.raises(Misused, match=r'"mine" has failed in _raises: KeyError'):
        make_backends(entries, None)  # type: ignore[arg-type]


def test_a_name_that_two_packages_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which was installed first must not decide; either can still be named by its module."""
    offered(monkeypatch, ("one", "backend.mine", f"{__name__}:MINE"), ("two", "backend.mine", "two.kind:MINE"))
    told = refusal({"url": "mine://127.0.0.1:1"})
    assert f'the backend "mine" is offered by one ({__name__}:MINE) and two (two.kind:MINE); uninstall one' in told
    assert facts_of(registry.entries_of(Config(backends=(ENTRY,))))


def test_a_kind_that_is_offered_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, ("one", "backend.fast", f"{__name__}:MINE"))
    told = refusal({"kind": "fast", "url": "mine://127.0.0.1:1"})
    assert 'its name is "mine", and its package offers it as "fast"' in told


def test_one_kind_by_several_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its URL, its name, and its module: one kind all the same."""
    offered(monkeypatch, ("one", "backend.mine", f"{__name__}:MINE"))
    records = [{"url": "mine://a:1"}, {"kind": "mine", "url": "mines://a:2"}, {**ENTRY, "url": "mine://a:3"}]
    entries = registry.entries_of(Config(backends=tuple(records)))
    assert {registry.kind_named(entry.kind_name) for entry in entries} == {MINE}
    assert [entry.tls is None for entry in entries] == [True, False, True]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"kind": "triton", "url": "vllms://a:1"}, "it must be of the form triton://HOST:PORT"),
        ({"kind": "vllm", "url": "triton://a:1"}, "it must be of the form vllm://HOST:PORT or vllms://HOST:PORT"),
        ({"url": "triton://a:99999"}, "triton://HOST:PORT"),
        ({"url": "triton://a:0"}, "triton://HOST:PORT"),
        ({"url": "triton://a:²"}, "triton://HOST:PORT"),
        ({"url": "triton://a b:1"}, "triton://HOST:PORT"),
        ({"url": "triton://::1:1"}, "triton://HOST:PORT"),
        ({"kind": "triton", "discover": {"dns": "a:99999"}}, "it must be HOST:PORT"),
        ({"kind": "triton", "discover": {"endpoint_slices": {"service": "", "port": -1}}}, "service"),
        ({"url": "triton://a:1", "id": " "}, "1 to 253 characters"),
        ({"url": "triton://a:1", "id": "a\nb"}, "1 to 253 characters"),
    ],
)
def test_addresses_and_ids_that_are_none(entry: dict[str, Any], told: str) -> None:
    assert told in refusal(entry)


@pytest.mark.parametrize("url", ["vllm://user:hunter2@a:1", "foo://user:hunter2@a:1", "vllm://user:hun@ter2@a:1"])
def test_a_password_in_a_url_is_refused_and_not_told(url: str) -> None:
    told = refusal({"url": url})
    assert "backends.0.url: it " in told
    assert "hun" not in told


def test_an_address_of_version_6() -> None:
    (entry,) = registry.entries_of(Config(backends=({"url": "triton://[::1]:8001"},)))
    assert entry.address == "[::1]:8001"
