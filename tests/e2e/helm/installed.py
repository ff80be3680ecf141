"""The environment that holds Helm 3, Helm 4, kubectl and what checks the chart's output."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import ClassVar

from tests.e2e.installed import ROOT, Installed, NotInstalled

CHART = ROOT / "deploy" / "helm" / "lora-sidecar"
HELMS = ("helm3", "helm4")
PROGRAMS = (*HELMS, "kubectl", "kubernetes-validate", "checkov", "hadolint")
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class HelmInstalled(Installed):
    """A virtual environment whose bin has the programs."""

    FOLDER: ClassVar[str] = ".venv-helm"
    VARIABLE: ClassVar[str] = "HELM_VENV"

    def run(self, program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one to its end and return what it printed; whether it liked what it saw is for the caller to say."""
        command = [str(self.venv / "bin" / program), *arguments]
        environment = self.environment(**variables)
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False)

    def _check(self) -> None:
        missing = [program for program in PROGRAMS if not (self.venv / "bin" / program).exists()]
        if missing:
            raise NotInstalled(f"no {', '.join(missing)} in {self.venv}: make .venv-helm, or set HELM_VENV")
