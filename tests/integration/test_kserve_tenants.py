"""Who a Triton client is: by what it says, by its certificate, or nobody; and what that opens to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.utils import InferenceServerException

from sidecar.core.effects import Settle
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import core_request, running_engine
from tests.kit.kserve_clients import (
    CORE,
    DUMMY,
    Told,
    aio_client,
    ask,
    core_inputs,
    in_thread,
    restrict,
    sync_stream,
    sync_told,
)
from tests.kit.serving import serving, write_adapters
from tests.kit.tokens import TokenMaker

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


async def test_a_tenant_by_its_own_word(tmp_path: Path) -> None:
    """From the request's parameter or the call's metadata; an allow list turns the others away, on every front."""
    write_adapters(tmp_path, 2)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        await restrict(served, tmp_path / "a00", "blue")
        told = await ask(client, name="a00", parameters={"lora_tenant": "blue"})
        assert told.tokens() == served.expected("a00", 4)
        told = await ask(client, name="a00", headers={"lora-tenant": "blue"})
        assert told.tokens() == served.expected("a00", 4)
        for refused in (
            await ask(client, name="a00"),
            await ask(client, name="a00", parameters={"lora_tenant": "red"}),
        ):
            assert '[UNKNOWN_ADAPTER] unknown adapter "a00"' in refused.errors[0]
        assert (await ask(client, name="a01")).tokens() == served.expected("a01", 4)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.ask("a00")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert (await served.ask("a00", tenant="blue")).tokens == served.expected("a00", 4)
        outcomes = [(settle.tenant, settle.outcome.value) for settle in served.recorder.of(Settle)]
        assert outcomes.count(("blue", "ok")) == 3


async def test_an_engines_counts_are_for_who_may_see_all_tenants(tmp_path: Path) -> None:
    """They are of all tenants together. Where identity is only observed, a tenant is told, and the denial counted."""
    maker = TokenMaker(tmp_path)
    policies = {"ready": "tenant_prefix", "roles": {"group:ops": ["operator"]}}
    for mode in ("off", "observe", "enforce"):
        async with (
            running_engine(**DUMMY) as engine,
            serving(
                [engine], identity={"mode": mode, "issuers": [maker.entry]}, access={"policies": policies}
            ) as served,
            aio_client(served.sidecar.data_address) as client,
        ):
            tenant, operator = ({"authorization": maker.bearer("acme", groups=groups)} for groups in ([], ["ops"]))
            assert (await client.get_inference_statistics(CORE, headers=operator)).model_stats
            denials = served.sidecar.gateway.access.denials
            assert not sum(denials.values())
            if mode != "enforce":
                assert (await client.get_inference_statistics(CORE, headers=tenant)).model_stats
            else:
                with pytest.raises(InferenceServerException, match="may not see what is of all tenants") as refused:
                    await client.get_inference_statistics(CORE, headers=tenant)
                assert refused.value.status() == "StatusCode.PERMISSION_DENIED"
            assert sum(denials.values()) == (mode != "off")


async def test_no_tenants_at_all(tmp_path: Path) -> None:
    """`tenant_from: none` ignores what clients say of themselves."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, tenant_from="none") as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        told = await ask(client, name="a00", parameters={"lora_tenant": "blue"}, headers={"lora-tenant": "red"})
        assert told.tokens() == served.expected("a00", 4)
        assert [settle.tenant for settle in served.recorder.of(Settle)] == [""]


@NEEDS_OPENSSL
async def test_a_tenant_by_its_certificate(tmp_path: Path) -> None:
    """On a TLS listener with a client CA the certificate's name decides, whatever the client says; both clients."""
    write_adapters(tmp_path, 2)
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("server", "IP:127.0.0.1")
    tls = {"certificate": str(certificate), "key": str(key), "ca": str(authority.ca)}
    blue, red = await authority.sign("blue"), await authority.sign("red", "DNS:red.example,DNS:blue")
    async with (
        running_engine(**DUMMY) as engine,
        serving(
            [engine],
            tmp_path,
            tenant_from="certificate",
            listeners={
                "data": {"address": "127.0.0.1:0", "tls": tls},
                "admin": {"address": "127.0.0.1:0"},
                "http": {"address": "127.0.0.1:0"},
            },
        ) as served,
    ):
        await restrict(served, tmp_path / "a00", "blue")
        address = served.sidecar.data_address
        async with aio_client(address, **certificates(authority, blue)) as client:
            told = await ask(client, name="a00", parameters={"lora_tenant": "red"})
            assert (told.errors, told.tokens()) == ([], served.expected("a00", 4))
        async with aio_client(address, **certificates(authority, red)) as client:
            told = await ask(client, name="a00", parameters={"lora_tenant": "blue"}, headers={"lora-tenant": "blue"})
            assert 'unknown adapter "a00"' in told.errors[0]

        def program() -> Told:
            with sync_stream(address, **certificates(authority, blue)) as (client, answers):
                client.async_stream_infer(CORE, core_inputs(), parameters={"lora_name": "a00"})
                return sync_told(answers, 1)

        assert (await in_thread(program)).tokens() == served.expected("a00", 4)

        root = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        async with grpc.aio.secure_channel(address, root) as channel:
            call: Any = channel.stream_stream(STREAM)(iter([core_request().SerializeToString()]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [settle.tenant for settle in served.recorder.of(Settle)] == ["blue", "red.example", "blue"]


def certificates(authority: Authority, pair: tuple[Path, Path]) -> dict[str, Any]:
    """Return the options of a Triton client that shows a certificate."""
    key, certificate = pair
    return {
        "ssl": True,
        "root_certificates": str(authority.ca),
        "private_key": str(key),
        "certificate_chain": str(certificate),
    }
