"""Check the documentation's command lines against the commands, the Makefile and the modules."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from typer.main import get_command

from sidecar.cli import app, with_times
from tools.docs.pages import ROOT, Block

_SEPARATORS = re.compile(r"[;&|()<>\n]+")
_BEFORE = {"until", "while", "if", "do", "then", "else", "!", "time", "nice", "exec", "env", "sudo", "$"}
"""Shell words that may precede a command."""
_REDIRECTION = re.compile(r"\d*(?:>>?|<)\s*(?:&\d|[^\s;&|]+)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_TARGET = re.compile(r"^([\w.-]+(?: [\w.-]+)*):(?!=)", re.MULTILINE)


def problems_of_block(block: Block) -> Iterator[str]:
    """Yield the faults of a block's command lines."""
    for words in simple_commands(block.commands):
        yield from problems_of(words, whole=True)


def problems_of_span(code: str) -> Iterator[str]:
    """Yield the faults of a command in prose, such as `sidecar queue`, which may omit arguments."""
    if code.startswith(("sidecar ", "make ", "python -m ")):
        for words in simple_commands(code.partition("…")[0]):
            yield from problems_of(words, whole=False)


def simple_commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each command in a shell script, without redirections and words that precede a command."""
    for line in script.replace("\\\n", " ").replace("$(", " ; ").splitlines():
        lexer = shlex.shlex(_REDIRECTION.sub("", line), posix=True, punctuation_chars=";&|()<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*_tokens(lexer), ";"]:
            if not _SEPARATORS.fullmatch(token):
                words.append(token)
                continue
            if words:
                yield _without_shell(words)
            words = []


def problems_of(words: Sequence[str], whole: bool) -> Iterator[str]:
    """Yield the faults of one command; a `whole` one must have its required arguments."""
    if not words:
        return
    program, rest = words[0].removeprefix(".venv/bin/"), list(words[1:])
    if program in ("python", "python3") and rest[:1] == ["-m"] and len(rest) > 1:
        program, rest = ("sidecar", rest[2:]) if rest[1] == "sidecar" else ("-m", rest[1:])
    if program == "sidecar":
        yield from _of_sidecar(rest, whole)
    elif program == "make":
        yield from _of_make(rest)
    elif program == "-m" and rest[0].split(".")[0] in ("tests", "tools", "sidecar"):
        path = ROOT / rest[0].replace(".", "/")
        if not (path / "__main__.py").is_file() and not path.with_suffix(".py").is_file():
            yield f"python -m {rest[0]}: there is no such module"


def _tokens(lexer: shlex.shlex) -> list[str]:
    try:
        return list(lexer)
    except ValueError:  # a quotation that goes on in the next line: its end is no command
        return []


def _without_shell(words: list[str]) -> list[str]:
    while words and (words[0] in _BEFORE or _ASSIGNMENT.match(words[0])):
        words = words[1:]
    return words


@cache
def _tree() -> Any:
    return get_command(app)


def _of_sidecar(words: list[str], whole: bool) -> Iterator[str]:
    command, path = _tree(), "sidecar"
    while getattr(command, "commands", None) is not None and words and not words[0].startswith("-"):
        found = command.get_command(None, words[0])
        if found is None:
            if words[0].isupper() or not re.fullmatch(r"[a-z-]+", words[0]):
                return
            yield f"{path} {words[0]}: there is no such command"
            return
        command, path, words = found, f"{path} {words[0]}", words[1:]
    yield from _of_arguments(command, path, with_times(["", *words])[1:] if words else [], whole)


def _of_arguments(command: Any, path: str, words: list[str], whole: bool) -> Iterator[str]:
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    given = 0
    while words:
        word = words.pop(0)
        if word == "--help":
            return
        if not word.startswith("-") or word == "-":
            given += 1
            continue
        name, equals, _ = word.partition("=")
        option = options.get(name)
        if option is None:
            yield f"{path} {name}: there is no such option"
            return
        if option.is_flag or equals:
            continue
        if words:
            words.pop(0)
        elif whole:
            yield f"{path} {name}: its value is missing"
    if getattr(command, "commands", None) is not None:
        return
    if not any(argument.nargs == -1 for argument in arguments) and given > len(arguments):
        yield f"{path}: {given} arguments, and it takes {len(arguments)}"
    needed = sum(argument.required for argument in arguments)
    if whole and given < needed:
        yield f"{path}: {given} arguments, and it needs {needed}"


@cache
def _makefile() -> tuple[frozenset[str], str]:
    text = (ROOT / "Makefile").read_text()
    return frozenset(target for names in _TARGET.findall(text) for target in names.split()), text


def _of_make(words: Sequence[str]) -> Iterator[str]:
    targets, text = _makefile()
    for word in words:
        variable, equals, _ = word.partition("=")
        if equals:
            if f"$({variable})" not in text:
                yield f"make {word}: the Makefile has no variable {variable}"
        elif re.fullmatch(r"[a-z.][\w.-]*", word) and word not in targets:
            yield f"make {word}: there is no such target"
