"""`adapters verify` asks as its caller: whose limits it takes, whose class it waits in, to whom it is booked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.core.effects import Dispatch
from sidecar.core.events import Received
from sidecar.fronts.admin.verify import VERIFICATIONS_MAX
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from sidecar.shell.catalogue import Wanted
from tests.attack.test_asked_again_at_the_write import OPERATOR, Metadata, bearer, enforced
from tests.kit.emulated import running_engine
from tests.kit.faults import ENDLESS, LONG
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until

DUMMY = {"compute": "none", "shape": "tiny"}


@asynccontextmanager
async def house(folder: Path, engine: dict[str, Any] | None = None, **record: Any) -> AsyncIterator[Serving]:
    """Run a sidecar with an adapter that several tenants may use."""
    config = enforced(folder)
    config["access"] |= record.pop("access", {})
    async with (
        running_engine(**DUMMY, **(engine or {})) as running,
        serving([running], roots=[folder], **config | record) as served,
    ):
        wanted = Wanted(allow=("blue", "acme"))
        await served.sidecar.gateway.catalogue.register("sql", str(write_adapter(folder / "sql")), wanted)
        yield served


async def key_of(served: Serving, tenant: str, klass: str = "", role: str = "publisher") -> tuple[Metadata, str]:
    """Return a tenant's credential, and its key's id."""
    access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
    wanted = pb.CreateKeyRequest(tenant=tenant, roles=[role], **{"class": klass})
    made = await access.CreateKey(wanted, metadata=bearer(OPERATOR))
    return bearer(made.secret), made.key.id


def asked(count: int, **fields: Any) -> Any:
    prompts = [pb.VerifyPrompt(token_ids=[1, number]) for number in range(2, count + 2)]
    return pb.VerifyRequest(name="sql", prompts=prompts, **{"max_tokens": 2} | fields)


async def verified(served: Serving, metadata: Metadata, request: Any) -> list[Any]:
    return [finding async for finding in served.adapters.Verify(request, metadata=metadata)]


async def rows_of(served: Serving) -> dict[str, int]:
    """Return the requests of each tenant in usage."""
    access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
    answer = await access.GetUsage(pb.UsageRequest(by=["tenant"]), metadata=bearer(OPERATOR))
    return {row.tenant: row.requests for row in answer.rows if row.requests}


async def test_a_verification_takes_its_callers_limits_and_is_booked_to_it(tmp_path: Path) -> None:
    """Of 32 prompts one is asked, which is what the tenant has for today; nobody else pays for any."""
    limits = {"limits": [{"tenant": "acme", "requests_per_day": 1}]}
    async with house(tmp_path, access=limits) as served:
        acme, _ = await key_of(served, "acme")
        findings = await verified(served, acme, asked(32))
        assert served.recorder.count(Dispatch) == 1
        errors = [reply.error for each in findings if each.HasField("answer") for reply in (each.answer.adapter,)]
        assert errors
        assert all("requests" in error and "acme" in error for error in errors)
        received = [event for event in served.recorder.events if isinstance(event, Received)]
        assert {event.tenant for event in received} == {"acme"}
        await until(lambda: not served.state.requests)
        assert set(await rows_of(served)) == {"acme"}


async def test_a_verification_waits_in_its_callers_class(tmp_path: Path) -> None:
    classes = {"batch": {"queue_wait_s_max": 60}, "default": {}}
    async with house(tmp_path, queue={"classes": classes}) as served:
        acme, _ = await key_of(served, "acme", "batch")
        await verified(served, acme, asked(1))
        received = [event for event in served.recorder.events if isinstance(event, Received)]
        assert {(event.tenant, event.klass) for event in received} == {("acme", "batch")}


async def test_what_is_refused_is_told_as_a_verification_and_names_no_backends(tmp_path: Path) -> None:
    async with house(tmp_path) as served:
        for role, said in (("publisher", 'no backend is called "trt-9"; leave it out'), ("viewer", 'not verify "sql"')):
            caller, _ = await key_of(served, "acme", role=role)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await verified(served, caller, asked(1, backends=["trt-9"]))
            assert said in (words := refused.value.details() or "")
            assert "trt-0" not in words


async def test_a_caller_without_a_tenant_is_booked_to_nobody(tmp_path: Path) -> None:
    """An operator at the machine verifies what is for others, and none of them pays for it."""
    async with house(tmp_path, identity={"mode": "off"}) as served:
        findings = await verified(served, (), asked(2))
        assert all(not each.answer.adapter.error for each in findings if each.HasField("answer"))
        assert {event.tenant for event in served.recorder.events if isinstance(event, Received)} == {"verify"}


async def test_observing_counts_a_verification_once(tmp_path: Path) -> None:
    """However many questions it has asked."""
    identity = {"mode": "observe", "local_admin": False}
    async with house(tmp_path, identity=identity) as served:
        denials = served.sidecar.gateway.access.denials
        before = sum(denials.values())
        assert len(await verified(served, (), asked(8))) > 8
        assert sum(denials.values()) == before + 1


async def test_a_verification_ends_with_its_key(tmp_path: Path) -> None:
    """What it asks next is refused, and it says so."""
    async with house(tmp_path) as served:
        acme, key = await key_of(served, "acme")
        access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        call = aiter(served.adapters.Verify(asked(32), metadata=acme))
        assert (await anext(call)).HasField("plan")
        await access.RevokeKey(pb.RevokeKeyRequest(id=key), metadata=bearer(OPERATOR))
        findings = [finding async for finding in call]
        answers = [finding.answer for finding in findings if finding.HasField("answer")]
        assert len(answers) < 32
        assert "was revoked" in answers[-1].adapter.error


async def test_verifications_at_once_are_bounded_by_tenant(tmp_path: Path) -> None:
    """One more of a tenant is refused, to be asked again; another tenant's is not."""
    async with house(tmp_path, ENDLESS) as served:
        (acme, _), (blue, _) = await key_of(served, "acme"), await key_of(served, "blue")
        long = asked(1, max_tokens=512, timeout_s=LONG)
        calls = [served.adapters.Verify(long, metadata=who) for who in [acme] * VERIFICATIONS_MAX]
        for call in calls:
            assert (await call.read()).HasField("plan")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verified(served, acme, long)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "acme" in (caught.value.details() or "")
        calls.append(served.adapters.Verify(long, metadata=blue))
        assert (await calls[-1].read()).HasField("plan")
        calls[0].cancel()
        left = VERIFICATIONS_MAX - 1
        await until(lambda: sum(request.view.tenant == "acme" for request in served.state.requests.values()) == left)
        again = served.adapters.Verify(long, metadata=acme)
        assert (await again.read()).HasField("plan")
        for call in (*calls, again):
            call.cancel()
        await asyncio.gather(*(until(call.done) for call in (*calls, again)))
