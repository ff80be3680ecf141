# ruff: noqa: N802 - names and arguments are those of the generated servicer
"""The calls other than inference: health, metadata, configuration, statistics, shared memory."""

from __future__ import annotations

from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.lab.engine.kserve.answers import Answering
from sidecar.lab.engine.kserve.errors import Rejection
from sidecar.lab.engine.kserve.models import model_config, model_metadata
from sidecar.lab.engine.kserve.shared_memory import Regions

VERSION = "2.51.0"
"""The Triton version whose behaviour was measured."""
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
)


class Control(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The service except ModelInfer and ModelStreamInfer; calls that it does not offer are UNIMPLEMENTED."""

    def __init__(self, answering: Answering, regions: Regions) -> None:
        self._answering = answering
        self._regions = regions

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        try:
            self._answering.model(request.name, request.version)
        except Rejection as rejection:
            if rejection.code is not grpc.StatusCode.NOT_FOUND:
                await context.abort(rejection.code, rejection.text)
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="triton", version=VERSION, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        return model_metadata(await self._model(request, context))

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=model_config(await self._model(request, context)))

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        names = [request.name] if request.name else list(self._answering.statistics)
        if request.name and request.name not in self._answering.statistics:
            text = f"requested model '{request.name}' is not available"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        if request.name and request.version not in ("", "1"):
            text = f"requested model version is not available for model '{request.name}'"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        return service_pb2.ModelStatisticsResponse(model_stats=[self._answering.statistics[name] for name in names])

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        index = service_pb2.RepositoryIndexResponse()
        for name in self._answering.statistics:
            index.models.add(name=name, version="1", state="READY")
        return index

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        try:
            self._regions.register(request.name, request.key, request.offset, request.byte_size)
        except Rejection as rejection:
            await context.abort(rejection.code, rejection.text)
        return service_pb2.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        try:
            if request.name:
                self._regions.unregister(request.name)
            else:
                self._regions.unregister_all()
        except Rejection as rejection:
            await context.abort(rejection.code, rejection.text)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        status = service_pb2.SystemSharedMemoryStatusResponse()
        try:
            regions = self._regions.status(request.name)
        except Rejection as rejection:
            await context.abort(rejection.code, rejection.text)
        for region in regions:
            entry = status.regions[region.name]
            entry.name, entry.key = region.name, region.key
            entry.offset, entry.byte_size = region.offset, region.size_bytes
        return status

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await _not_offered(context, "explicit model control")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await _not_offered(context, "explicit model control")

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        await _not_offered(context, "CUDA shared memory")

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        await _not_offered(context, "CUDA shared memory")

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        await _not_offered(context, "CUDA shared memory")

    async def TraceSetting(self, request: Any, context: Any) -> Any:
        await _not_offered(context, "tracing")

    async def LogSettings(self, request: Any, context: Any) -> Any:
        await _not_offered(context, "log settings")

    async def _model(self, request: Any, context: Any) -> Any:
        try:
            return self._answering.model(request.name, request.version)
        except Rejection as rejection:
            return await context.abort(rejection.code, rejection.text)


async def _not_offered(context: Any, what: str) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the emulated server does not offer {what}")
