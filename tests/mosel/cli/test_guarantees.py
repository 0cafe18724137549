"""How the commands show what is guaranteed."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from mosel import Assurance, ModelInfo, Prediction, SetInfo, Weakness
from mosel.cli.models import _table
from mosel.cli.predict import _items, _sentence
from mosel.cli.profile import _guaranteed
from mosel.config import load_settings, reference_models
from mosel.packages.model_package import load_package

WORST = Weakness("person 7", 0.8125, 64)


def prediction_of(assurance: Assurance, *sets: str) -> Prediction:
    return Prediction("0" * 32, np.zeros((len(sets), 2)), (), sets, 0.9, 0.0, 0.0, 0.0, assurance=assurance)


@pytest.mark.parametrize(
    ("assurance", "sets", "said"),
    [
        (
            Assurance("calibrated", guaranteed_accuracy=0.951, confidence=0.95, saved=0.68, floor_source="caller"),
            ["image+pen"] * 2,
            "guaranteed at least 0.951 (95 %); ran image and pen; saved 68 %",
        ),
        (
            Assurance("calibrated", guaranteed_loss=0.02, confidence=0.95, saved=0.5, floor_source="model"),
            ["pen", "a+pen", "pen"],
            (
                "guaranteed at most 0.020 worse than everything (95 %); ran pen for 2, a and pen for 1; "
                "saved 50 %; floor of the model"
            ),
        ),
        (
            Assurance("none", guaranteed_accuracy=0.9, confidence=0.95, note="0.9 can be guaranteed"),
            ["pen"],
            "the floor is not guaranteed, only at least 0.900 (95 %); ran pen; saved 0 %; 0.9 can be guaranteed",
        ),
        (Assurance(), ["pen"], "expected, not guaranteed; ran pen; saved 0 %"),
    ],
)
def test_predict_says_what_an_answer_stands_on(assurance: Assurance, sets: list[str], said: str) -> None:
    assert _sentence(prediction_of(assurance, *sets)) == said


def lines_of(**sets: SetInfo) -> list[str]:
    model = ModelInfo("digits", "1", "", True, {}, sets, ())
    console = Console(width=160)
    with console.capture() as captured:
        console.print(_table(model))
    return captured.get().splitlines()


def test_models_show_bounds_beside_what_is_expected_and_where_sets_are_weak() -> None:
    info = SetInfo(0.95, 1.5, True, guaranteed_accuracy=0.9319, guaranteed_loss=0.0201, worst_label=WORST)
    first, *rest = lines_of(pen=info, both=SetInfo(0.97, 3.0, False))[1:]
    assert [cell.strip() for cell in first.strip("┃").split("┃")] == [
        *("modality set", "expected", "at least", "worse by at most", "worst label", "ms for one item", "available"),
    ]
    row = next(line for line in rest if "pen" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        *("pen", "0.9500", "0.931", "0.021", "person 7: 0.81", "1.50", "yes"),
    ]


def test_labels_that_look_like_markup_are_shown_as_they_are() -> None:
    weak = SetInfo(0.95, 1.5, True, worst_label=Weakness("label [UNK]", 0.5, 64), worst_group=Weakness("[/]", 0.5, 64))
    (shown,) = (line for line in lines_of(pen=weak) if "0.9500" in line)
    assert "label [UNK]: 0.50" in shown
    assert "[/]: 0.50" in shown
    prediction = replace(prediction_of(Assurance(), "pen", "pen"), labels=("[UNK]", "[/]"))
    console = Console(width=160)
    with console.capture() as captured:
        console.print(_items(prediction))
    assert "[UNK]" in captured.get()
    assert "[/]" in captured.get()


def test_models_without_calibration_rows_have_no_columns_for_them() -> None:
    header = lines_of(pen=SetInfo(0.95, 1.5, True))[1]
    assert "expected" in header
    assert "at least" not in header
    assert "worst" not in header


def test_a_profile_shows_what_calibration_rows_tell_of_each_set() -> None:
    package = load_package(reference_models() / "har")
    assert package.accuracy is not None
    known = _guaranteed(package, load_settings())
    assert len(known) == 7
    for name, accuracy in package.accuracy.sets.items():
        at_least, label, group = known["+".join(sorted(name))]
        assert 0.5 < float(at_least) < accuracy
        assert label.startswith("label ")
        assert group.startswith("person ")
    unsure = _guaranteed(package, load_settings(selector={"floor_confidence": 0.5}))
    assert {at_least for at_least, _, _ in unsure.values()} == {""}


def test_a_profile_without_calibration_rows_has_nothing_of_them() -> None:
    assert _guaranteed(load_package(reference_models() / "tvlt"), load_settings()) == {}
