#!/usr/bin/env python3
"""Run the steps of the Dockerfile without a container builder, then what it makes, confined as in a pod.

Each stage has a root of its own in a clean directory; this machine's /usr stands in for the base image's, with its
Python as `python`. In the end the entry point serves, as the image's user, on a read-only root and a network of its
own, until the health check says yes; SIGTERM must end it with 0. Needs Linux and root. Exit codes: 1 a step failed,
2 it cannot be tried here.

    deploy/try_dockerfile.py [DIRECTORY]     default: a temporary one, removed afterwards
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTEXT = HERE.parent
PYTHONS = ("python3.11", "python3.12", "python3.13")
"""What may stand in for the base image's, the first that /usr/bin has."""
OF_THE_HOST = ("bin", "sbin", "lib", "lib64")
"""Links into /usr."""
PASSED_ON = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT", "REQUESTS_CA")
"""Of this machine's variables: what a builder would be told to reach a package index."""
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
HEALTHY_S = 60
TOLD_ONLY = ("LABEL", "EXPOSE", "STOPSIGNAL")
"""Instructions that change nothing in the files."""


class Failed(Exception):
    """A step did not work; the text says which."""


@dataclass
class Stage:
    """One stage: its root, and what its instructions have set."""

    root: Path
    directory: str = "/"
    user: str = "0:0"
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def run(self, command: list[str], *, confined: bool = False) -> int:
        """Run a command in the stage, as its user, and return its exit code.

        `confined` is with a read-only root and no network but its own.
        """
        mount = "mount --bind"
        steps = [
            "mount --make-rprivate /",
            f"{mount} $ROOT $ROOT",
            f"{mount} /usr $ROOT/usr && mount -o remount,bind,ro $ROOT/usr",
            f"{mount} $ROOT/.local $ROOT/usr/local",
            "mount --rbind /dev $ROOT/dev && mount -t proc proc $ROOT/proc",
        ]
        if confined:
            steps += ["ip link set lo up", "mount -t tmpfs tmpfs $ROOT/tmp && chmod 1777 $ROOT/tmp"]
            steps += ["mount -o remount,bind,ro $ROOT"]
        steps.append(f'exec chroot --userspec={self.user} $ROOT /usr/bin/env -i "$@"')
        spaces = ["--mount", "--pid", "--fork", "--kill-child", *(["--net"] if confined else [])]
        kept = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        settings = [f"{name}={value}" for name, value in {**kept, **self.variables}.items()]
        inside = ["/bin/sh", "-ec", 'cd "$0"; exec "$@"', self.directory, *command]
        command = ["unshare", *spaces, "/bin/sh", "-ec", "; ".join(steps), "sh", *settings, *inside]
        return subprocess.run(command, env=os.environ | {"ROOT": str(self.root)}, check=False).returncode


def new_stage(root: Path) -> Stage:
    """Make a root like the base image's."""
    for name in ("usr", "dev", "proc", "tmp", "var/lib", "root", "opt", ".local/bin"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    for name in OF_THE_HOST:
        (root / name).symlink_to(f"usr/{name}")
    shutil.copytree("/etc", root / "etc", symlinks=True, ignore_dangling_symlinks=True)
    python = next((path for name in PYTHONS if (path := Path("/usr/bin") / name).exists()), None)
    if python is None:
        raise Failed(f"none of {', '.join(PYTHONS)} is in /usr/bin, where the base image's would be")
    for name in ("python", "python3"):
        (root / ".local/bin" / name).symlink_to(python)
    return Stage(root)


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions in order, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a file out of the context: the last pattern that matches decides."""
    out = False
    parents = ["/".join(path.split("/")[:count]) for count in range(1, path.count("/") + 2)]
    for pattern in patterns:
        wanted, bare = not pattern.startswith("!"), pattern.removeprefix("!").removeprefix("**/")
        anywhere = pattern.startswith("**/")
        if any(fnmatch.fnmatchcase(Path(parent).name if anywhere else parent, bare) for parent in parents):
            out = wanted
    return out


def context(folder: Path) -> Path:
    """Copy what a builder would be sent: the tracked files that .dockerignore lets through."""
    lines = (CONTEXT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line.strip() and not line.startswith("#")]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=CONTEXT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and not ignored(name, patterns) and (CONTEXT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CONTEXT / name, folder / name)
    return folder


def copy(stage: Stage, source_root: Path, arguments: list[str]) -> None:
    """COPY: files into a folder, a folder's contents into another."""
    *sources, target = arguments
    place = stage.root / (target if target.startswith("/") else f"{stage.directory}/{target}").lstrip("/")
    for source in sources:
        origin = source_root / source.lstrip("/")
        if origin.is_dir():
            shutil.copytree(origin, place, symlinks=True, dirs_exist_ok=True)
        elif origin.is_file():
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, place / origin.name)
        else:
            raise Failed(f"COPY {source}: it is not in the context; look at .dockerignore")


def build(text: str, folder: Path) -> Stage:
    """Run all instructions; return the last stage. Raises Failed."""
    files = context(folder / "context")
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for number, (word, rest) in enumerate(instructions(text)):
        print(f"{word} {rest[:100]}", flush=True)
        if word == "ARG":
            continue
        if word == "FROM":
            stage = new_stage(folder / f"stage-{number}")
            stages[rest.rpartition(" AS ")[2]] = stage
            continue
        if stage is None:
            raise Failed(f"{word} before FROM")
        step(stage, word, rest, files, stages)
    if stage is None:
        raise Failed("no FROM")
    return stage


def step(stage: Stage, word: str, rest: str, files: Path, stages: dict[str, Stage]) -> None:
    """Run one instruction of a stage. Raises Failed."""
    if word == "RUN":
        if stage.run(["/bin/sh", "-ec", rest]):
            raise Failed(f"RUN {rest}")
    elif word == "COPY":
        arguments = shlex.split(rest)
        origin = files
        if arguments[0].startswith("--from="):
            origin = stages[arguments.pop(0).removeprefix("--from=")].root
        copy(stage, origin, arguments)
    elif word == "WORKDIR":
        stage.directory = rest
        (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "ENV":
        stage.variables |= dict(part.split("=", 1) for part in shlex.split(rest))
    elif word == "USER":
        stage.user = rest
    elif word == "ENTRYPOINT":
        stage.entry = json.loads(rest)
    elif word == "CMD":
        stage.command = json.loads(rest)
    elif word == "HEALTHCHECK":
        stage.health = json.loads(rest[rest.index("CMD") + 3 :])
    elif word not in TOLD_ONLY:
        raise Failed(f"{word} is an instruction that this script does not know")


def serves(stage: Stage) -> None:
    """Start the image's command, wait for its health check, and end it as Kubernetes does. Raises Failed."""
    entry, command = shlex.join(stage.entry), shlex.join(stage.command)
    health = shlex.join(stage.health)
    checked = stage.run(["/bin/sh", "-ec", f"{entry} config check /dev/null >/dev/null"], confined=True)
    if checked:
        raise Failed("sidecar config check")
    script = f"""
        {entry} {command} & served=$!
        waited=0
        until {health} 2>/dev/null; do
          kill -0 $served || exit 3
          waited=$((waited + 1)); test $waited -lt {HEALTHY_S} || exit 4
          sleep 1
        done
        test "$(id -u)" != 0 || exit 5
        ! touch /opt/lora-sidecar/written 2>/dev/null || exit 6
        kill -TERM $served
        wait $served
    """
    why = {3: "it ended by itself", 4: "its health check never said yes", 5: "it is root", 6: "its root is writable"}
    code = stage.run(["/bin/sh", "-c", script], confined=True)
    if code:
        raise Failed(f"{entry} {command}: {why.get(code, f'it ended with {code}')}")


def main() -> int:
    missing = [name for name in ("unshare", "ip", "git") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        print(f"it needs root, util-linux, iproute2 and git; missing: {', '.join(missing) or 'root'}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="try-dockerfile-") as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        try:
            stage = build((HERE / "Dockerfile").read_text(), folder)
            serves(stage)
        except Failed as failed:
            print(f"failed: {failed}", file=sys.stderr)
            return 1
    print("every step works, and what they make serves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
