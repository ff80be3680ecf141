"""Statistics of several servers, added up."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import service_pb2

from sidecar.fronts.kserve.front import summed


def reply(*models: dict[str, Any]) -> Any:
    return json_format.ParseDict({"model_stats": list(models)}, service_pb2.ModelStatisticsResponse())


def duration(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}


def model(name: str, scale: int, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": "1",
        "last_inference": 1000 - scale,
        "inference_count": scale,
        "execution_count": 2 * scale,
        "inference_stats": {"success": duration(scale, 10 * scale), "queue": duration(scale, 3)},
        **fields,
    }


def test_models_are_added_by_name_and_version() -> None:
    """Counts and times add up, the last inference is the latest, and a model that one server has stays as it is."""
    total = summed([reply(model("a", 2), model("b", 3)), reply(model("a", 5), model("a", 7, version="2"))])
    a, b, newer = total.model_stats
    assert (a.name, a.version, a.inference_count, a.execution_count, a.last_inference) == ("a", "1", 7, 14, 998)
    assert (a.inference_stats.success.count, a.inference_stats.success.ns) == (7, 70)
    assert (a.inference_stats.queue.count, a.inference_stats.queue.ns) == (7, 6)
    assert b == reply(model("b", 3)).model_stats[0]
    assert newer == reply(model("a", 7, version="2")).model_stats[0]


def test_batches_memory_and_responses_are_added_by_their_keys() -> None:
    """Batch sizes stay what they are; so do the ids of memories."""
    one = model(
        "a",
        1,
        batch_stats=[{"batch_size": 1, "compute_infer": duration(4, 40)}],
        memory_usage=[{"type": "CPU", "id": 0, "byte_size": 100}],
        response_stats={"0": {"success": duration(1, 5)}},
    )
    two = model(
        "a",
        1,
        batch_stats=[
            {"batch_size": 1, "compute_infer": duration(6, 60)},
            {"batch_size": 8, "compute_infer": duration(1, 1)},
        ],
        memory_usage=[{"type": "CPU", "id": 0, "byte_size": 11}, {"type": "GPU", "id": 1, "byte_size": 7}],
        response_stats={"0": {"success": duration(2, 6)}, "1": {"fail": duration(1, 1)}},
    )
    (total,) = summed([reply(one), reply(two)]).model_stats
    assert [(batch.batch_size, batch.compute_infer.count) for batch in total.batch_stats] == [(1, 10), (8, 1)]
    assert [(use.type, use.id, use.byte_size) for use in total.memory_usage] == [("CPU", 0, 111), ("GPU", 1, 7)]
    assert (total.response_stats["0"].success.count, total.response_stats["0"].success.ns) == (3, 11)
    assert total.response_stats["1"].fail.count == 1


def test_what_is_added_stays_as_it_was() -> None:
    """The replies are not changed, and nothing adds up to nothing."""
    one, two = reply(model("a", 1)), reply(model("a", 2))
    summed([one, two])
    assert (one, two) == (reply(model("a", 1)), reply(model("a", 2)))
    assert len(summed([]).model_stats) == 0
