"""A certificate authority for tests, made with the openssl command line."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

NEEDS_OPENSSL = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by the openssl CLI")


KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
"""Made in a millisecond; an RSA key takes a hundred."""


@dataclass
class Authority:
    """A certificate authority, and the files that it signed."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    async def found(self) -> None:
        await openssl(
            self.folder, "req", "-x509", *KEY, "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
            "-subj", "/CN=test authority", "-days", "2",
        )  # fmt: skip

    async def sign(self, name: str, alternative: str = "", subject: str = "") -> tuple[Path, Path]:
        """Return key and certificate of a name; `alternative` becomes its subject alternative name.

        `subject` is the subject, if it is more than the name.
        """
        key, request, certificate = (f"{name}.{end}" for end in ("key", "csr", "pem"))
        await openssl(
            self.folder, "req", *KEY, "-nodes", "-keyout", key, "-out", request, "-subj", subject or f"/CN={name}"
        )
        extensions: tuple[str, ...] = ()
        if alternative:
            (self.folder / f"{name}.ext").write_text(f"subjectAltName={alternative}\n")
            extensions = ("-extfile", f"{name}.ext")
        await openssl(
            self.folder, "x509", "-req", "-in", request, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", certificate, "-days", "2", *extensions,
        )  # fmt: skip
        return self.folder / key, self.folder / certificate


async def openssl(folder: Path, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "openssl", *arguments, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, words = await process.communicate()
    assert process.returncode == 0, words.decode()
