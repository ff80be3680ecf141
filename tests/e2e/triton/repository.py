"""Writes Triton model repositories whose models are the emulated engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from sidecar.lab.engine.kserve.models import CORE, ENSEMBLE, Model, model_config, models_of
from tests.e2e.triton.models.settings import Settings

BLS = "tensorrt_llm_bls"
_PACKAGE = "tests.e2e.triton.models"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository to be written.

    `engine` are fields of `sidecar.lab.engine.kserve.Options`; time stands still by default (every step takes as long
    as it computes). `decoupled` is the models'
    transaction policy. `cores` are the names of the models that are engines;
    `instances` private engines stand behind each of them. With `texts` there are also `ensemble`, which asks the first
    of the engines, and `tensorrt_llm_bls`, which asks `tensorrt_llm`; `bls_instances` requests run in it at a time.
    """

    engine: Mapping[str, Any] = field(default_factory=dict)
    decoupled: bool = True
    cores: tuple[str, ...] = (CORE,)
    instances: int = 1
    texts: bool = False
    bls_instances: int = 1

    def write(self, folder: Path, served_log: Path) -> None:
        """Write all models into a folder that Triton serves."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.cores:
            self.write_core(folder, name, served_log)
        if self.texts:
            self._write_texts(folder, served_log)

    def write_core(self, folder: Path, name: str, served_log: Path, **engine: Any) -> None:
        """Write one engine's model, in place of what is there; `engine` are options that only this one has."""
        settings = Settings({**self._engine(served_log), **engine})
        model = replace(models_of(settings.engine_options())[CORE], name=name, instances=self.instances)
        write_model(folder / name, _python_config(model), f"{_PACKAGE}.core", settings)

    def _write_texts(self, folder: Path, served_log: Path) -> None:
        settings = Settings(self._engine(served_log))
        models = models_of(settings.engine_options())
        for name, model in models.items():
            if model.is_step:
                write_model(folder / name, _python_config(model), f"{_PACKAGE}.{name}")
        # It has the tensors of the ensemble.
        bls = replace(models[ENSEMBLE], name=BLS, instances=self.bls_instances)
        write_model(folder / BLS, _python_config(bls), f"{_PACKAGE}.bls", settings)
        ensemble = model_config(replace(models[ENSEMBLE], core=self.cores[0]))
        # Triton finds it from the steps.
        ensemble.ClearField("model_transaction_policy")
        write_model(folder / ENSEMBLE, text_format.MessageToString(ensemble))

    def _engine(self, served_log: Path) -> dict[str, Any]:
        fixed = {"decoupled": self.decoupled, "served_log": str(served_log), "metrics_port": None}
        return {"time_scale": 0.0, **self.engine, **fixed}


def write_model(folder: Path, config: str, module: str | None = None, settings: Settings | None = None) -> None:
    """Write a model, a Python one if it has a module; what polls the repository sees it complete or not at all."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "1").mkdir(parents=True)
    (fresh / "config.pbtxt").write_text(config)
    if module is not None:
        (fresh / "1" / "model.py").write_text(f"from {module} import TritonPythonModel  # noqa: F401\n")
    if settings is not None:
        settings.write(fresh / "1")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _python_config(model: Model) -> str:
    """Return a Python model's config.pbtxt."""
    config = model_config(model)
    config.backend, config.platform = "python", ""
    return text_format.MessageToString(config)
