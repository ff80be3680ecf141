"""Read the files that `identity` names, and find words of `identity` and `access` that have no effect.

A sidecar starts without an issuer's keys and with a limit that nothing matches; who writes a configuration wants to
know before.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sidecar.access.access import CLASS_DEFAULT, RESERVED_CLASSES
from sidecar.access.deciding import CachedPolicy
from sidecar.access.external import FORWARDED
from sidecar.access.jwks import keys_in, read_file
from sidecar.access.keys_file import KeysFile
from sidecar.access.policy import GROUP, READY, Roles
from sidecar.config import Config
from sidecar.config.access import Policies
from sidecar.config.identity import Identity, Issuer
from sidecar.errors import Misused, Reason, needs_extra

NEAR = 0.75
"""How much a word has to be like another one, by difflib, to be a misspelling of it."""


def check(config: Config) -> list[str]:
    """Return what deserves a second look, a sentence each. Raises Misused with everything that is wrong."""
    wrong, notes = [*_in_keys_file(config), *limits_of_nothing(config)], _of_roles(config.access.policies.roles)
    for number, issuer in enumerate(config.identity.issuers):
        if issuer.jwks_file is not None:
            is_wrong, problems = _in_jwks(issuer.jwks_file)
            (wrong if is_wrong else notes).extend(f"identity.issuers.{number}.jwks: {each}" for each in problems)
    if wrong:
        raise Misused(Reason.CONFIG_INVALID, "; ".join(wrong))
    notes += [*_of_groups(config), *_of_external(config.identity)]
    return [*notes, *_of_identity(config.identity, classes_of(config))]


def classes_of(config: Config) -> list[str]:
    """Return the classes that a credential may stand for."""
    return sorted(config.queue.classes.keys() - set(RESERVED_CLASSES))


def limited_classes_of(config: Config) -> list[str]:
    """Return the classes that a limit may be for: the sidecar's own, too."""
    return sorted(config.core().classes)


def unknown_class(klass: str, classes: Sequence[str]) -> str:
    """Return what is wrong with a class that the configuration does not have."""
    return f'there is no class "{klass}"; there are {", ".join(classes)} (queue.classes adds one)'


def _in_keys_file(config: Config) -> Iterator[str]:
    if config.identity.keys_file is None:
        return
    path, classes = Path(config.identity.keys_file).expanduser(), classes_of(config)
    try:
        keys = KeysFile(path).keys
    except Misused as error:
        yield error.message
        return
    for number, key in enumerate(keys, 1):
        if key.klass and key.klass not in classes:
            yield f"identity.keys_file: {path}: entry {number}: class: {unknown_class(key.klass, classes)}"


def limits_of_nothing(config: Config) -> Iterator[str]:
    """Yield what is wrong with limits for a class that the configuration does not have."""
    classes = limited_classes_of(config)
    for number, limit in enumerate(config.access.limits):
        if limit.class_name not in (None, "*", *classes):
            yield f"access.limits.{number}.class_name: {unknown_class(limit.class_name or '', classes)}"


def _in_jwks(path: Path) -> tuple[bool, list[str]]:
    """Return what is wrong with a file of keys, and whether it leaves no key to verify a token by."""
    try:
        keys, unusable = keys_in(read_file(path))
    except OSError as error:
        return True, [f"{path}: {error.strerror}"]
    except (ValueError, RecursionError) as error:
        return True, [f"{path}: it is no JWKS: {error}; put there what the issuer publishes at its jwks_uri"]
    problems = [f"{path}: key {number} cannot be used: {problem}" for number, problem in unusable]
    if keys:
        return False, problems
    return True, [*problems, f"{path}: it has no key that verifies signatures; every token of its issuer is refused"]


def _of_roles(roles: Mapping[str, Sequence[str]]) -> list[str]:
    notes = []
    for name in roles:
        head, colon, rest = name.partition(":")
        if colon and not name.startswith(GROUP) and difflib.get_close_matches(head.lower(), ["group"], 1, NEAR):
            notes.append(f'access.policies.roles.{name}: a tenant is called so; a group would be "{GROUP}{rest}"')
        elif "*" in name:
            notes.append(f"access.policies.roles.{name}: * stands for itself; list each tenant or group, or use Cedar")
    return notes


def _of_groups(config: Config) -> Iterator[str]:
    issuers = config.identity.issuers
    for name in config.access.policies.roles:
        if issuers and name.startswith(GROUP) and not any(issuer.groups for issuer in issuers):
            yield f"access.policies.roles.{name}: no issuer has groups, the name of the claim; only keys can have one"


def _of_identity(identity: Identity, classes: Sequence[str]) -> Iterator[str]:
    if identity.keys_file is not None and not identity.keys:
        yield "identity.keys_file: its keys are not taken while identity.keys is false"
    for number, issuer in enumerate(identity.issuers):
        where = f"identity.issuers.{number}"
        if issuer.class_claim is not None and list(classes) == [CLASS_DEFAULT]:
            yield (
                f"{where}.class_claim: queue.classes has no class but {CLASS_DEFAULT}: requests with any other in the "
                f"claim {issuer.class_claim} are refused"
            )
        for key, path in _beside(issuer):
            if not path.is_file():
                yield f"{where}.{key}: there is no file {path} here; without it no key is fetched"


def _of_external(identity: Identity) -> Iterator[str]:
    external = identity.external
    if external is None:
        return
    waits = f"waits for {external.address}, {external.timeout_s:g} s at most, and is refused without its consent"
    if identity.mode == "observe":
        waits = f"is told to {external.address}, and what that would deny is only recorded"
    yield f"identity.external: each call of a client {waits}"
    if external.proves and identity.mode == "observe":
        yield "identity.external.proves: calls wait for the check, although none is refused; it says whose they are"
    if FORWARDED in external.headers and identity.certificates.forwarded is None:
        yield (
            f"identity.external.headers: {FORWARDED} is not sent without identity.certificates.forwarded: any client "
            "could have written it"
        )
    for name, path in ({} if external.tls is None else external.tls.model_dump(exclude_none=True)).items():
        if not Path(path).is_file():
            yield f"identity.external.tls.{name}: there is no file {path} here; without it the sidecar does not start"


def _beside(issuer: Issuer) -> Iterator[tuple[str, Path]]:
    """Yield the files for a URL. In a cluster they are in the pod only, so that they may be missing elsewhere."""
    for key, path in (("jwks_ca", issuer.jwks_ca), ("jwks_token_file", issuer.jwks_token_file)):
        if path is not None:
            yield key, Path(path).expanduser()


def policy_of(config: Policies) -> CachedPolicy:
    """Return the policy that the configuration names; let a task run its `watch`.

    Raises Misused for a file of Cedar policies that cannot be read, parsed or checked.
    """
    roles = Roles(config.roles)
    if config.cedar is None:
        return CachedPolicy(READY[config.ready](roles, config.separator), config.ready)
    try:
        from sidecar.access.policy_file import FilePolicy
    except ImportError as error:
        raise Misused(Reason.CONFIG_INVALID, needs_extra("access.policies.cedar", "cedar")) from error
    return FilePolicy(Path(config.cedar).expanduser(), roles, config.separator)
