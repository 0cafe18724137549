"""Answers as the Open Inference Protocol gives them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gateway.inference.responses import output_tensors, raw_of, respond
from gateway.inference.words import InferRequest, OutputTensor
from gateway.jobs.answers import Answer
from gateway.jobs.checks import check_spec
from mosel.packages.model_package import ModelPackage
from mosel.v1 import gateway_pb2

ROWS = np.array([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32)


def answer_of(package: ModelPackage, away: Sequence[str] = ()) -> Answer:
    job = check_spec(gateway_pb2.JobSpec(model="fruit", size=3), {"fruit": package}, 9)
    sets = ["photo+scent", "scent", "photo+scent"]
    return Answer(job, b"0123456789abcdef", ROWS, sets, Counter(sets), 0.875, 1.5, 2.5, -3.5, away)


def outputs_of(package: ModelPackage, *outputs: str, **fields: Any) -> list[OutputTensor]:
    return list(respond(InferRequest("fruit", outputs=outputs, **fields), answer_of(package)).outputs)


def test_an_answer_says_what_was_run_and_how_long_it_took(fruit: ModelPackage) -> None:
    response = respond(InferRequest("fruit", id="mine"), answer_of(fruit))
    assert (response.model, response.version, response.id) == ("fruit", fruit.version, "mine")
    assert response.parameters == {
        "job_id": b"0123456789abcdef".hex(),
        "modalities_used": "photo+scent,scent",
        "expected_accuracy": 0.875,
        "queue_ms": 1.5,
        "compute_ms": 2.5,
        "deadline_slack_ms": -3.5,
    }


def test_an_answer_says_what_was_away(fruit: ModelPackage) -> None:
    response = respond(InferRequest("fruit"), answer_of(fruit, ("photo", "smell")))
    assert response.parameters["modalities_unavailable"] == "photo,smell"


def test_the_model_s_output_alone_unless_more_is_asked_for(fruit: ModelPackage) -> None:
    (output,) = outputs_of(fruit)
    assert (output.name, output.datatype) == ("probabilities", "FP32")
    np.testing.assert_array_equal(output.array, ROWS)


def test_outputs_come_in_the_order_in_which_they_are_asked_for(fruit: ModelPackage) -> None:
    modalities, own, labels = outputs_of(fruit, "modalities", "probabilities", "labels")
    assert (modalities.name, modalities.datatype) == ("modalities", "BYTES")
    assert modalities.array.tolist() == [b"photo+scent", b"scent", b"photo+scent"]
    assert own.name == "probabilities"
    names = [fruit.output.labels[index].encode() for index in (1, 0, 2)]
    assert (labels.name, labels.datatype, labels.array.tolist()) == ("labels", "BYTES", names)


def test_the_largest_values_as_text(fruit: ModelPackage) -> None:
    largest = {"output_parameters": {"probabilities": {"classification": 2}}, "outputs": ["probabilities"]}
    (output,) = respond(InferRequest("fruit", **largest), answer_of(fruit)).outputs  # type: ignore[arg-type]
    a, b, c = fruit.output.labels
    assert (output.datatype, output.array.shape) == ("BYTES", (3, 2))
    assert output.array[0].tolist() == [f"0.700000:1:{b}".encode(), f"0.200000:0:{a}".encode()]
    assert output.array[2, 0] == f"0.800000:2:{c}".encode()
    unnamed = replace(fruit, output=replace(fruit.output, labels=()))
    (output,) = respond(InferRequest("fruit", **largest), answer_of(unnamed)).outputs  # type: ignore[arg-type]
    assert output.array[0].tolist() == [b"0.700000:1", b"0.200000:0"]


def test_there_are_no_more_classes_than_values(fruit: ModelPackage) -> None:
    (output,) = outputs_of(fruit, "probabilities", output_parameters={"probabilities": {"classification": 2**62}})
    assert output.array.shape == (3, 3)


def test_a_model_without_labels_offers_none(fruit: ModelPackage) -> None:
    assert list(output_tensors(fruit)) == ["probabilities", "labels", "modalities"]
    assert list(output_tensors(replace(fruit, output=replace(fruit.output, labels=())))) == [
        "probabilities",
        "modalities",
    ]


def test_the_model_s_own_output_wins_over_one_of_every_model(fruit: ModelPackage) -> None:
    taken = replace(fruit, output=replace(fruit.output, name="modalities"))
    assert output_tensors(taken) == {"modalities": ("FP32", (3,)), "labels": ("BYTES", ())}
    (output,) = outputs_of(taken, "modalities")
    np.testing.assert_array_equal(output.array, ROWS)


@pytest.mark.parametrize("array", [np.arange(3, dtype="<u2"), ROWS[:, ::2]])
def test_bytes_are_row_major(array: Any) -> None:
    assert raw_of(OutputTensor("x", "any", array)) == np.ascontiguousarray(array).tobytes()
