"""From what the selector says to what the caller gets, without any service."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.jobs.answers import answer_from, predict_reply, results_event, sets_of, summary_event
from gateway.jobs.checks import CheckedJob
from gateway.jobs.job import Job
from mosel.errors import InternalError
from mosel.packages.model_package import ModelPackage
from mosel.tensors import from_proto, to_proto
from mosel.v1 import gateway_pb2, selector_pb2

ROWS = np.array([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], np.float32)
RESULT = selector_pb2.JobResult(
    job_id=bytes(range(16)),
    expected_accuracy=0.9,
    queue_us=1500,
    compute_us=250,
    unavailable_modalities=["smell"],
)


def job_of(package: ModelPackage, size: int) -> CheckedJob:
    return CheckedJob(package, size, ("photo", "scent"), None, None, False, gateway_pb2.BEST, False)


def group(modality_set: str, items: Sequence[int], rows: NDArray[np.float32]) -> selector_pb2.ItemGroup:
    return selector_pb2.ItemGroup(modality_set=modality_set, items=items, output=to_proto(rows[list(items)]))


def test_groups_are_put_in_the_order_of_the_items(fruit: ModelPackage) -> None:
    groups = [group("scent", [1], ROWS), group("photo", [0, 2], ROWS)]
    reply = predict_reply(answer_from(job_of(fruit, 3), groups, RESULT, slack_ms=-4.0))
    assert reply.job_id == "000102030405060708090a0b0c0d0e0f"
    np.testing.assert_array_equal(from_proto(reply.output, "output"), ROWS)
    assert list(reply.labels) == ["plum", "apple", "lemon"]
    assert list(reply.modality_sets) == ["photo", "scent", "photo"]
    assert (reply.expected_accuracy, reply.queue_ms, reply.compute_ms) == (0.9, 1.5, 0.25)
    assert reply.deadline_slack_ms == -4.0
    assert list(reply.unavailable_modalities) == ["smell"]


@given(sets=st.lists(st.sampled_from(["photo", "scent", "photo+scent"]), min_size=1, max_size=40))
def test_every_item_gets_its_own_row_and_set(fruit: ModelPackage, sets: list[str]) -> None:
    rows = np.random.default_rng(len(sets)).normal(size=(len(sets), 3)).astype(np.float32)
    items = {name: [i for i, own in enumerate(sets) if own == name] for name in sets}
    groups = [group(name, chosen, rows) for name, chosen in items.items()]
    answer = answer_from(job_of(fruit, len(sets)), groups, RESULT, 0.0)
    np.testing.assert_array_equal(answer.output, rows)
    assert answer.modality_sets == sets
    job = Job(bytes(16))
    job.answered(sets_of(job_of(fruit, len(sets)), groups), RESULT)
    summary = summary_event(job).summary
    assert list(summary.unavailable_modalities) == ["smell"]
    assert dict(summary.strategy) == {name: len(chosen) for name, chosen in items.items()}


def test_items_that_are_missing_are_a_bug_and_no_answer(fruit: ModelPackage) -> None:
    with pytest.raises(InternalError, match="answered 2 items; expected the 3 of the job"):
        answer_from(job_of(fruit, 3), [group("photo", [0, 2], ROWS)], RESULT, 0.0)
    with pytest.raises(InternalError, match="answered 1 items; expected the 3 of the job"):
        sets_of(job_of(fruit, 3), [group("photo", [1], ROWS)])


def test_results_carry_their_items_and_labels(fruit: ModelPackage) -> None:
    results = results_event(job_of(fruit, 3), group("scent", [0, 2], ROWS), items_done=2).results
    assert (results.modality_set, list(results.items), results.items_done) == ("scent", [0, 2], 2)
    np.testing.assert_array_equal(from_proto(results.output, "output"), ROWS[[0, 2]])
    assert list(results.labels) == ["plum", "lemon"]


def test_a_model_without_labels_names_none(fruit: ModelPackage) -> None:
    unnamed = replace(fruit, output=replace(fruit.output, labels=()))
    groups = [group("photo", [0, 1, 2], ROWS)]
    assert list(predict_reply(answer_from(job_of(unnamed, 3), groups, RESULT, 0.0)).labels) == []
    assert list(results_event(job_of(unnamed, 3), groups[0], 3).results.labels) == []
