"""Which tests `make check` runs for an edit."""

from __future__ import annotations

import grimp
import pytest

from tools import check


@pytest.fixture
def graph() -> grimp.ImportGraph:
    graph = grimp.ImportGraph()
    for importer, imported in (
        ("tests.unit.test_core_admission", "tests.kit.corekit"),
        ("tests.kit.corekit", "sidecar.core.core"),
        ("sidecar.core.core", "sidecar.core.lifecycle"),
        ("tests.unit.test_closed_sets", "sidecar.core.lifecycle"),
        ("tests.unit.test_docs", "tools.docs"),
        ("tests.integration.test_cli", "sidecar.core.lifecycle"),
    ):
        graph.add_import(importer=importer, imported=imported)
    return graph


def test_unit_tests_that_import_it_the_nearest_first(graph: grimp.ImportGraph) -> None:
    """By way of other modules too; tests of other folders are for `make test`."""
    assert check.tests_of(["sidecar/core/lifecycle.py"], graph) == [
        "tests/unit/test_closed_sets.py",
        "tests/unit/test_core_admission.py",
    ]


def test_a_name_brings_a_test_nearer(graph: grimp.ImportGraph) -> None:
    assert (
        check.tests_of(["sidecar/core/core.py", "sidecar/core/admission.py"], graph)[0]
        == "tests/unit/test_core_admission.py"
    )


def test_an_edited_test_of_any_folder_comes_first(graph: grimp.ImportGraph) -> None:
    edited = ["sidecar/core/lifecycle.py", "tests/integration/test_cli.py", "tests/e2e/vllm/test_face.py"]
    assert check.tests_of(edited, graph)[0] == "tests/integration/test_cli.py"
    assert not [file for file in check.tests_of(edited, graph) if "e2e" in file]


def test_what_is_not_imported_has_no_tests(graph: grimp.ImportGraph) -> None:
    assert check.tests_of(["sidecar/new.py", "tests/unit/test_deleted.py"], graph) == []
