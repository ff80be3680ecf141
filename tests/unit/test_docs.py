"""What README and docs say is so: commands, options, targets, links, files, and the pages that are made from code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sidecar.errors import needs_extra
from tools.docs import checks, configuration, generate
from tools.docs.commands import problems_of_block, problems_of_span, simple_commands
from tools.docs.pages import ROOT, Block, anchors, blocks, inline_code, pages
from tools.docs.run import run


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_nothing_that_is_not_so(page: Path) -> None:
    """Its command lines are ours, its links lead somewhere, and what it calls a file is one."""
    assert list(checks.problems([page])) == []


def test_pages_made_from_code_are_current() -> None:
    """Configuration keys, metrics and errors are what the code says; `python -m tools.docs generate` writes them."""
    assert list(generate.outdated()) == []


def test_every_key_has_a_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that nobody explained, and a meaning whose key is gone, are both named."""
    meanings = {section: dict(names) for section, names in configuration._meanings().items()}
    del meanings["store"]["memory_bytes"]
    meanings["store"]["memory"] = "Gone."
    monkeypatch.setattr(configuration, "_meanings", lambda: meanings)
    with pytest.raises(ValueError, match=r"store: memory, store: memory_bytes"):
        configuration.page()


def test_nobody_is_sent_to_a_package_that_is_not_ours() -> None:
    """No index has our package: whoever registers its name there would be installed."""
    suffixes = (".py", ".md", ".yaml", ".tpl", ".sh", ".txt", ".toml")
    folders = ("sidecar", "policies", "docs", "examples", "deploy", "tools")
    files = [ROOT / "README.md", *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    names = re.compile(r"lora[-_]sidecar\[|pip install (-U |--upgrade )?['\"]?lora[-_]sidecar\b(?!-)")
    found = [str(path) for path in files if path.suffix in suffixes and names.search(path.read_text())]
    assert found == []


def test_what_is_told_of_an_extra_is_one() -> None:
    told = needs_extra("this", "lab")
    assert "'.[lab]'" in told
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "start.md").read_text().split("## Extras")[1], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == extras.keys() - {"build", "release", "dev"}
    sources = [path.read_text() for path in (ROOT / "sidecar").rglob("*.py")]
    assert {name for text in sources for name in re.findall(r'needs_extra\(.*, "(\w+)"\)', text)} <= extras.keys()


def test_blocks_that_run_need_no_extra_of_the_lab() -> None:
    """A reader runs them in a clone after `make .venv`."""
    running = [block for page in pages() for block in blocks(page) if block.runs]
    assert [block.at for block in running if re.search(r"--(report|plot)\b", block.commands)] == []


def test_the_readme_is_short() -> None:
    """It leads to the pages and does not become one."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("sidecar queue --wach", "sidecar queue --wach: there is no such option"),
        ("sidecar adapter list", "sidecar adapter: there is no such command"),
        ("sidecar adapters lst", "sidecar adapters lst: there is no such command"),
        ("sidecar adapters show", "sidecar adapters show: 0 arguments, and it needs 1"),
        ("sidecar adapters show a b", "sidecar adapters show: 2 arguments, and it takes 1"),
        ("sidecar config check", "sidecar config check: 0 arguments, and it needs 1"),
        ("until .venv/bin/sidecar ready 2>/dev/null; do sleep 1; done", "sidecar ready: there is no such command"),
        ("A=b python -m sidecar frob | cat", "sidecar frob: there is no such command"),
        ("make tset && true", "make tset: there is no such target"),
        ("make chaos ONLI=poison", "make ONLI=poison: the Makefile has no variable ONLI"),
        ("python -m tests.bech openai", "python -m tests.bech: there is no such module"),
    ],
)
def test_a_wrong_command_line_is_found(script: str, problem: str) -> None:
    """In a block of commands, behind whatever the shell has before it."""
    block = Block(ROOT / "docs" / "start.md", 1, "sh", f"{script}\n")
    assert list(problems_of_block(block)) == [problem]


@pytest.mark.parametrize(
    "script",
    [
        "sidecar generate sql 'a | b' --stats > out 2>&1 &",
        "sidecar adapters rollback sql --hold",
        "sidecar serve --backend triton://gpu-1:8001 \\\n  --set 'adapters.roots=[/loras]'",
        "cd /tmp && sidecar --version; helm install pool chart",
    ],
)
def test_a_right_command_line_is_none(script: str) -> None:
    """Quotations, redirections, continued lines and other programs are no problem."""
    assert list(problems_of_block(Block(ROOT / "README.md", 1, "sh", f"{script}\n"))) == []


def test_commands_in_prose_may_leave_arguments_out() -> None:
    """`sidecar adapters show` is a command's name, `sidecar adapters shw` is nobody's."""
    assert list(problems_of_span("sidecar adapters show")) == []
    assert list(problems_of_span("sidecar adapters shw")) == ["sidecar adapters shw: there is no such command"]
    assert list(problems_of_span("make … ONLY=poison")) == []


def test_commands_of_a_console_are_what_is_typed() -> None:
    """Output is no command; a typed line may go on in the next."""
    text = "$ sidecar queue \\\n  --watch\nnobody waits\n$ make test\n"
    block = Block(ROOT / "README.md", 1, "console", text)
    assert list(simple_commands(block.commands)) == [["sidecar", "queue", "--watch"], ["make", "test"]]


PAGE = """# A page

## A heading: with `code`!

<!-- not run: a reason -->
```sh
false
```

See [there](#a-heading-with-code), [nowhere](#nowhere), [gone](gone.md), `sidecar/gone.py` and `sidecar
queue`.

```
no language
```
"""


def test_pages_are_read(tmp_path: Path) -> None:
    """Blocks with their markers, anchors, code that goes on in the next line, and what is wrong."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    first, second = blocks(page)
    assert (first.language, first.text, first.line) == ("sh", "false\n", 7)
    assert (first.marker, first.value) == ("not run", "a reason")
    assert (second.language, second.marker) == ("", "")
    assert anchors(page) == {"a-page", "a-heading-with-code"}
    assert [code for _, code in inline_code(page)] == ["code", "sidecar/gone.py", "sidecar queue"]
    assert list(checks.problems([page])) == [
        f"{page}:14: a block without a language; commands are sh or console, what is shown is text",
        f"{page}:10: #nowhere: {page} has no heading #nowhere",
        f"{page}:10: gone.md: there is no gone.md",
        f"{page}:10: there is no sidecar/gone.py",
    ]


def test_commands_of_a_page_are_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In order and in one shell; files are written, the first that fails ends the page, what is left is ended."""
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: said -->\n```text\nhello\n```\n\n```sh\nsleep 600 & WORD=there\ntest -f README.md\n```\n\n"
        '```sh\ntest "$(cat said) $WORD" = "hello there"\n```\n\n<!-- not run: needs a GPU -->\n```sh\nexit 9\n```\n\n'
        "```sh\nfalse\n```\n\n```sh\ntouch never\n```\n"
    )
    assert run([page]) == 1
    out, error = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"skipped  {page}:17: needs a GPU"
    assert [line.partition(" (")[0] for line in lines[1:3]] == [f"ran      {page}:7", f"ran      {page}:12"]
    assert lines[-1] == "2 blocks ran, 1 were skipped, 1 pages failed"
    assert error == f"FAILED   {page}:21: exit 1\n"


def an_empty_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pages run in a copy of a repository without files, which takes no time to copy."""
    (folder / "repository").mkdir()
    monkeypatch.setattr("tools.docs.run.ROOT", folder / "repository")


CONSOLE = """```console
$ echo one two
$ echo three \\
  four >&2
one
two three … four
```
"""


@pytest.mark.parametrize(
    ("shown", "ends"),
    [
        (CONSOLE.replace("…", ""), 0),
        (CONSOLE.replace("three … four", "thr…"), 0),
        (CONSOLE, 0),
        (CONSOLE.replace("two three", "two three three"), 1),
        (CONSOLE.replace("… four", ""), 1),
        (CONSOLE.replace("four\n```", "four five\n```"), 1),
    ],
)
def test_what_a_console_shows_is_what_is_printed(
    shown: str, ends: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folded or not, on stdout or stderr; "…" stands for any text. The block runs in the shell of the page."""
    an_empty_repository(tmp_path, monkeypatch)
    page = tmp_path / "page.md"
    page.write_text("```console\n$ WORD=there\n```\n\n" + shown + '\n```sh\ntest "$WORD" = there\n```\n')
    assert run([page]) == ends
    out, error = capfd.readouterr()
    assert error == ("" if ends == 0 else f"FAILED   {page}:6: it prints\none two\nthree four\n\n")
    assert out.splitlines()[-1] == f"{3 if ends == 0 else 1} blocks ran, 0 were skipped, {ends} pages failed"


@pytest.mark.parametrize(
    ("before", "fence", "told"),
    [
        ("<!-- not run: -->", "sh", "unknown comment before a block"),
        ("<!-- not run -->", "sh", "unknown comment before a block"),
        ("<!-- Not run: a reason -->", "sh", "unknown comment before a block"),
        ("<!-- not run\nin two lines -->", "sh", "unknown comment before a block"),
        ("<!-- Not run: a reason -->\n", "sh", "unknown comment before a block"),
        ("<!-- file: ../said -->", "text", "the name of a file is relative to the sandbox"),
        ("<!-- file: /said -->", "text", "the name of a file is relative to the sandbox"),
        ("", "bash", "commands are sh or console"),
        ("", "Shell", "commands are sh or console"),
    ],
)
def test_a_block_that_is_not_understood(
    before: str, fence: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is an error of the check, and its page is not run."""
    page = tmp_path / "page.md"
    page.write_text(f"{before}\n```{fence}\nexit 9\n```\n\n```sh\ntrue\n```\n")
    (problem,) = checks.problems([page])
    assert told in problem
    assert run([page]) == 1
    out, error = capfd.readouterr()
    assert error == f"FAILED   {problem}\n"
    assert out == "0 blocks ran, 0 were skipped, 1 pages failed\n"


def test_a_reason_may_have_a_blank_line_after_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: a reason -->\n\n```sh\nexit 9\n```\n")
    assert run([page]) == 0


def test_each_command_of_a_pipe_must_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    an_empty_repository(tmp_path, monkeypatch)
    page = tmp_path / "page.md"
    page.write_text("```sh\nfalse | cat\n```\n")
    assert run([page]) == 1


def test_pages_do_not_change_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a page writes, by a marker or by a command, is written into a copy."""
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    for name in ("README.md", "Makefile", "docs/start.md"):
        (root / name).write_text("ours\n")
    monkeypatch.setattr("tools.docs.run.ROOT", root)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: README.md -->\n```text\nwritten\n```\n\n```sh\ngrep written README.md\necho >> Makefile\n"
        "echo > docs/start.md\ntouch docs/new.md\n```\n"
    )
    assert run([page]) == 0
    assert {path.name for path in root.rglob("*.md")} == {"README.md", "start.md"}
    assert {path.read_text() for path in root.rglob("*") if path.is_file()} == {"ours\n"}


def test_a_page_that_is_missing_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([tmp_path / "gone.md"]) == 2
    assert run([tmp_path]) == 2
    out, error = capfd.readouterr()
    assert (out, error.splitlines()) == (
        "",
        [f"{tmp_path}/gone.md: there is no such page", f"{tmp_path}: there is no such page"],
    )
