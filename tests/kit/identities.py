"""Identities (tenants, users, request ids) as real systems write them, and hostile ones that must be refused."""

from __future__ import annotations

REAL = (
    "acme",
    "42",
    "0b8ea2a4-4c7c-4c9e-9f57-0a4b5e0f6f11",
    "spiffe://cluster.local/ns/team-a/sa/inference-client",
    "system:serviceaccount:team-a:inference-client",
    "auth0|6123f5d9c0ffee0069a3b2c1",
    "google-oauth2|103547991597142817347",
    "jane.doe+loras@example.com",
    "CN=jane doe,OU=Research,O=Example Inc.,C=DE",
    "https://login.example.com/realms/main/users/7f3?x=1&y=%20#me",
    "arn:aws:iam::123456789012:role/Team/Inference",
    "projects/my-project/locations/eu/tenants/blue",
    "dGVuYW50LTE=",
    "Zoë Müller",
    "山田太郎",
    "Ольга",
    'o"neil\\{braces}',
    "a=b;c=d,e",
    "spiffe://" + "example.org/" * 28 + "sa/default",
)
"""Valid identities; tenants, users and request ids have the same form."""

HEADER_SAFE = tuple(word for word in REAL if word.isascii())
"""The identities that gRPC metadata accepts unchanged."""

HOSTILE = (
    "two\nlines",
    "carriage\rreturn",
    "nul\0byte",
    "\x1b[2Jwiped",
    "\x1b]0;title\x07",
    "bell\x07",
    "tab\there",
    "next\x85line",
    "line\u2028separator",
    "right\u202eto left",
    "zero\u200bwidth",
    "\ufeffbom",
    " before",
    "after ",
    "not\ufffdUTF-8",
    "x" * 513,
    "é" * 257,
    "🦙" * 129,
)
"""Hostile identities, which may never reach a label, a log line, a journal or a header."""
