"""Views of the core and the shell as messages of the admin API."""

from __future__ import annotations

from typing import Any

from sidecar.core import queries, waiting
from sidecar.core.enums import void_told
from sidecar.proto import admin_pb2
from sidecar.shell.open_requests import OpenRequest


def backend_message(view: queries.BackendView) -> Any:
    """Return a backend as the API shows it, without its address."""
    return admin_pb2.Backend(
        id=view.id,
        kind=view.kind,
        state=view.state,
        base_model=view.base_model,
        dtype=view.dtype,
        rank_max=view.rank_max,
        running=view.running,
        queued=view.queued,
        seats=view.seats,
        host_pages=view.host_pages,
        host_pages_assumed=view.host_pages_assumed,
        pages_assumed=view.pages_assumed,
        device_pages=view.device_pages,
        kv_tokens=view.kv_tokens,
        kv_reserved=view.kv_reserved,
        page_limit=view.page_limit,
        open=[_open_message(version) for version in view.open],
        heals=[
            admin_pb2.HealNote(age_s=heal.age_ns / 1e9, reason=heal.reason, adapter=heal.adapter) for heal in view.heals
        ],
        resident=view.resident,
        detail="; ".join(view.notes),
        pace=view.pace,
        predicted_wait_s=None if view.predicted_wait_ns is None else view.predicted_wait_ns / 1e9,
        draining=view.draining,
        seats_assumed=view.seats_assumed,
    )


def names_in(only: Any) -> dict[str, str]:
    """Return the names of a RequestNames that are set, empty ones included."""
    return {field.name: value for field, value in only.ListFields()}


def _open_message(view: queries.OpenView) -> Any:
    return admin_pb2.OpenVersion(
        name=view.name,
        digest=view.digest,
        age_s=view.age_ns / 1e9,
        pages=view.pages,
        running=view.running,
        queued=view.queued,
        pinned_by=view.pinned_by,
    )


def queue_message(view: waiting.QueueView) -> Any:
    """Return the queue as the API shows it."""
    return admin_pb2.QueueResponse(
        verdict=view.verdict,
        waiting=view.waiting,
        running=view.running,
        requests=map(waiting_message, view.requests),
        why=[admin_pb2.WhyCount(why=why.value, count=count) for why, count in view.why],
        groups=map(group_message, view.groups),
        groups_total=view.groups_total,
    )


def group_message(group: waiting.GroupView) -> Any:
    return admin_pb2.QueueGroup(
        adapter=group.adapter,
        tenant=group.tenant,
        backend=group.backend,
        waiting=group.waiting,
        running=group.running,
        tokens=group.tokens,
        oldest=None if group.oldest is None else waiting_message(group.oldest),
    )


def waiting_message(item: waiting.WaitingView) -> Any:
    fields = {"class": item.klass}  # a keyword of Python's
    return admin_pb2.WaitingRequest(
        request=item.request,
        request_id=item.client_id,
        adapter=item.adapter,
        tenant=item.tenant,
        backend=item.backend,
        waited_s=item.waited_ns / 1e9,
        bound_s=(item.bound_ns or 0) / 1e9,
        expires_s=item.expires_ns / 1e9,
        voided=void_told(item.voided),
        why=item.why.value,
        **fields,
    )


def open_request_message(request: OpenRequest) -> Any:
    fields = {"class": request.klass}  # a keyword of Python's
    return admin_pb2.OpenRequest(
        request=request.request,
        request_id=request.client_id,
        adapter=request.adapter,
        version=request.version,
        tenant=request.tenant,
        backend=request.backend,
        state=request.state,
        age_s=request.age_s,
        input_tokens=request.input_tokens,
        output_tokens_max=request.output_tokens_max,
        **fields,
    )
