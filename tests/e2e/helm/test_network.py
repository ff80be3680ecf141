"""Who reaches which listener: clients the data, operators the admin, replicas each other, and nobody more than that."""

from __future__ import annotations

import yaml

from sidecar.config import parse
from tests.e2e.helm.rendering import RELEASE, Object, Renderer, configuration, one

DATA, ADMIN, HTTP, REPLICAS, PROBES = 9000, 9001, 9002, 9003, 9005
NAME = f"{RELEASE}-lora-sidecar"
CLIENTS = [{"namespaceSelector": {"matchLabels": {"team": "app"}}}]
OPERATORS = [{"podSelector": {"matchLabels": {"role": "operator"}}}]
WATCHING = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def allowed(policy: Object) -> dict[int, list[Object]]:
    """Return who may come, by port."""
    found: dict[int, list[Object]] = {}
    for rule in policy["spec"]["ingress"]:
        for port in rule["ports"]:
            found.setdefault(port["port"], []).extend(rule["from"])
    return found


def test_data_is_apart_from_admin(newest: Renderer) -> None:
    """Clients do not reach the admin listener nor the replicas' port, operators not the data."""
    values = {
        "redis": {"bundled": {"enabled": True}},
        "replicaCount": 2,
        "identity": {"mode": "observe"},
        "admin": {"tokenSecret": {"name": "token"}},
        "tls": {"admin": {"secretName": "admin"}},
        "networkPolicy": {"clients": CLIENTS, "operators": OPERATORS},
    }
    objects = newest.objects(values)
    policy = one(objects, "NetworkPolicy", "lora-sidecar")
    own = [{"podSelector": {"matchLabels": policy["spec"]["podSelector"]["matchLabels"]}}]
    assert allowed(policy) == {
        DATA: CLIENTS, HTTP: CLIENTS + WATCHING, PROBES: WATCHING, ADMIN: OPERATORS, REPLICAS: own
    }  # fmt: skip
    redis = one(objects, "NetworkPolicy", "-redis")
    assert allowed(redis) == {6379: own}


def test_admin_is_this_pods_unless_it_asks_who_comes(newest: Renderer) -> None:
    """Without a token or certificates the admin listener has no port, no Service and no way in."""
    objects = newest.objects({"networkPolicy": {"operators": OPERATORS}})
    assert yaml.safe_load(configuration(objects))["listeners"]["admin"] == {"address": "127.0.0.1:9001"}
    assert ADMIN not in allowed(one(objects, "NetworkPolicy", "lora-sidecar"))
    assert not [found for found in objects if found["metadata"]["name"].endswith("-admin")]


def test_clients_are_pods_with_a_label(newest: Renderer) -> None:
    """Not the whole namespace; the pod of `helm test` has the label."""
    objects = newest.objects({})
    client = {"lora-sidecar.io/client": "true"}
    assert allowed(one(objects, "NetworkPolicy", "lora-sidecar"))[DATA] == [{"podSelector": {"matchLabels": client}}]
    assert one(objects, "Pod")["metadata"]["labels"].items() >= client.items()


def test_metrics_are_not_where_clients_are(newest: Renderer) -> None:
    """Their Service is another, whatever kind the clients' is, and is scraped under the clients' name."""
    values = {"service": {"type": "LoadBalancer"}, "monitoring": {"serviceMonitor": {"enabled": True}}}
    objects = newest.objects(values)
    services = {found["metadata"]["name"]: found for found in objects if found["kind"] == "Service"}
    ports = {name: [port["targetPort"] for port in found["spec"]["ports"]] for name, found in services.items()}
    assert ports == {NAME: [DATA, HTTP], f"{NAME}-metrics": [PROBES]}
    assert services[f"{NAME}-metrics"]["spec"]["clusterIP"] == "None"
    monitor = one(objects, "ServiceMonitor")["spec"]
    chosen = [
        name
        for name, found in services.items()
        if monitor["selector"]["matchLabels"].items() <= found["metadata"]["labels"].items()
    ]
    assert chosen == [f"{NAME}-metrics"]
    assert monitor["endpoints"][0]["port"] == services[chosen[0]]["spec"]["ports"][0]["name"]
    labels = {each["targetLabel"]: each["replacement"] for each in monitor["endpoints"][0]["relabelings"]}
    assert labels == {"service": NAME, "job": NAME}


def test_a_token_goes_by_tls(newest: Renderer) -> None:
    """Or in clear text where somebody says so."""
    for values, expected in (
        ({"tls": {"admin": {"secretName": "admin"}}}, False),
        ({"admin": {"allowCleartext": True}}, True),
    ):
        objects = newest.objects({"admin": {"tokenSecret": {"name": "token"}}}, values)
        admin = yaml.safe_load(configuration(objects))["listeners"]["admin"]
        assert ("tls" in admin, admin.get("allow_cleartext", False)) == (not expected, expected)
        parse({"listeners": {"admin": admin}}, "the chart")


def test_nobody_is_let_in_by_an_empty_list(newest: Renderer) -> None:
    """No clients means none: an empty `from` would mean everybody."""
    policy = one(newest.objects({"networkPolicy": {"clients": [], "monitoring": []}}), "NetworkPolicy", "lora-sidecar")
    assert not policy["spec"].get("ingress")
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_ways_out(newest: Renderer) -> None:
    """Ways out are closed only where some are named; names, replicas and the bundled Redis stay open then."""
    egress = [{"to": [{"namespaceSelector": {}}], "ports": [{"port": 8001}]}]
    values = {"networkPolicy": {"egress": egress}, "redis": {"bundled": {"enabled": True}}}
    values["identity"] = {"mode": "observe"}
    policy = one(newest.objects(values), "NetworkPolicy", "lora-sidecar")
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, REPLICAS, 6379, 8001]
    assert "egress" not in one(newest.objects({}), "NetworkPolicy", "lora-sidecar")["spec"]


def test_services_find_the_pods(rendered: dict[str, list[Object]]) -> None:
    """Every selector of a release matches pods of the release, where it has any."""
    for name, objects in rendered.items():
        labels = [
            found["spec"]["template"]["metadata"]["labels"]
            for found in objects
            if found["kind"] in ("Deployment", "StatefulSet", "Job")
        ]
        selectors = [found["spec"]["selector"] for found in objects if found["kind"] == "Service"]
        selectors += [
            found["spec"]["podSelector"]["matchLabels"] for found in objects if found["kind"] == "NetworkPolicy"
        ]
        if any(found.get("app.kubernetes.io/component") in ("gateway", "sidecar") for found in labels):
            for selector in selectors:
                assert any(selector.items() <= each.items() for each in labels), f"{name}: {selector}"
