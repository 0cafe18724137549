"""What an answer stands on, in a sentence."""

import pytest

from mosel import Assurance
from mosel.client.answers import plan_from
from mosel.client.assurance import assurance_from
from mosel.v1 import gateway_pb2


@pytest.mark.parametrize(
    ("bound", "said"), [(0.951, "0.951"), (0.95199, "0.951"), (0.95, "0.950"), (1.0, "1.000"), (0.0, "0.000")]
)
def test_what_is_guaranteed_is_never_rounded_up(bound: float, said: str) -> None:
    assurance = Assurance("calibrated", guaranteed_accuracy=bound, confidence=0.95)
    assert str(assurance) == f"guaranteed at least {said} (95 %)"


@pytest.mark.parametrize(("bound", "said"), [(0.02, "0.020"), (0.0201, "0.021"), (0.029, "0.029"), (0.0, "0.000")])
def test_what_is_lost_is_never_rounded_down(bound: float, said: str) -> None:
    assurance = Assurance("live", guaranteed_loss=bound, confidence=0.975)
    assert str(assurance) == f"guaranteed at most {said} worse than everything (97.5 %)"


def test_what_is_not_guaranteed_says_so() -> None:
    assert str(Assurance()) == str(Assurance("none", note="0.93 can be")) == "expected, not guaranteed"


def test_a_bound_that_is_not_what_was_asked_for_says_so() -> None:
    missed = Assurance("none", guaranteed_accuracy=0.905, confidence=0.95, note="0.905 can be guaranteed")
    assert str(missed) == "the floor is not guaranteed, only at least 0.905 (95 %)"


@pytest.mark.parametrize("guarantee", [name.lower() for name in gateway_pb2.Guarantee.keys()][1:])  # noqa: SIM118
@pytest.mark.parametrize("source", [name.lower() for name in gateway_pb2.FloorSource.keys()][1:])  # noqa: SIM118
def test_every_word_of_the_protocol_comes_through(guarantee: str, source: str) -> None:
    message = gateway_pb2.Assurance(
        guarantee=gateway_pb2.Guarantee.Value(guarantee.upper()),
        floor_source=gateway_pb2.FloorSource.Value(source.upper()),
        saved=0.5,
        note="approximate",
    )
    found = assurance_from(message)
    assert (found.guarantee, found.floor_source, found.saved, found.note) == (guarantee, source, 0.5, "approximate")
    assert (found.guaranteed_accuracy, found.guaranteed_loss, found.confidence) == (None, None, 0.0)


def test_a_message_that_says_nothing_guarantees_nothing() -> None:
    assert assurance_from(gateway_pb2.Assurance()) == Assurance()


def test_a_plan_says_what_its_answer_would_stand_on() -> None:
    assurance = gateway_pb2.Assurance(guarantee=gateway_pb2.CALIBRATED, guaranteed_loss=0.01, confidence=0.95)
    assert plan_from(gateway_pb2.PlanReply(assurance=assurance)).assurance == assurance_from(assurance)
    assert plan_from(gateway_pb2.PlanReply(refusal="no")).assurance is None
