"""Views of the core and the shell as messages of the admin API."""

from __future__ import annotations

from typing import Any

from sidecar.core import queries, waiting
from sidecar.core.enums import void_told
from sidecar.proto import admin_pb2
from sidecar.proto.filling import filled


def backend_message(view: queries.BackendView) -> Any:
    """Return a backend as the API shows it, without its address."""
    return filled(
        admin_pb2.Backend,
        view,
        *("address", "owner", "epoch", "refused"),
        open=[filled(admin_pb2.OpenVersion, version, age_s=version.age_ns / 1e9) for version in view.open],
        heals=[filled(admin_pb2.HealNote, heal, age_s=heal.age_ns / 1e9) for heal in view.heals],
        detail="; ".join(view.notes),
        predicted_wait_s=None if view.predicted_wait_ns is None else view.predicted_wait_ns / 1e9,
    )


def names_in(only: Any) -> dict[str, str]:
    """Return the names of a RequestNames that are set, empty ones included."""
    return {field.name: value for field, value in only.ListFields()}


def queue_message(view: waiting.QueueView) -> Any:
    """Return the queue as the API shows it."""
    return filled(
        admin_pb2.QueueResponse,
        view,
        "runs",
        requests=map(waiting_message, view.requests),
        why=[admin_pb2.WhyCount(why=why.value, count=count) for why, count in view.why],
        groups=map(group_message, view.groups),
    )


def group_message(group: waiting.GroupView) -> Any:
    oldest = None if group.oldest is None else waiting_message(group.oldest)
    return filled(admin_pb2.QueueGroup, group, oldest=oldest)


def waiting_message(item: waiting.WaitingView) -> Any:
    return filled(
        admin_pb2.WaitingRequest,
        item,
        request_id=item.client_id,
        waited_s=item.waited_ns / 1e9,
        bound_s=(item.bound_ns or 0) / 1e9,
        expires_s=item.expires_ns / 1e9,
        voided=void_told(item.voided),
        why=item.why.value,
        **{"class": item.klass},  # a keyword of Python's
    )
