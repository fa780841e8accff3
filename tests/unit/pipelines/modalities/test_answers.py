from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pipelines.bundle import Bundle
from pipelines.modalities.answers import embedding, sigmoid, softmax, tensor, top_k
from schemas.errors import InferenceFailed

MakeBundle = Callable[..., Bundle]


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Bundle:
    return make_bundle(more="labels: [cat, dog, cow]")


def test_softmax_and_top_k_make_a_classification(bundle: Bundle) -> None:
    probabilities = softmax(bundle, output="y")({"y": np.log(np.float32([1, 6, 3]))})
    answer = top_k(bundle, k=2)(probabilities)
    assert answer == {
        "type": "classification",
        "label": "dog",
        "probability": pytest.approx(0.6),
        "confidence": pytest.approx(0.3),
        "top": [
            {"label": "dog", "probability": pytest.approx(0.6)},
            {"label": "cow", "probability": pytest.approx(0.3)},
        ],
    }


def test_probabilities_that_the_graph_makes_are_taken_by_name(bundle: Bundle) -> None:
    assert top_k(bundle, output="p")({"p": np.array([0.1, 0.7, 0.2])})["label"] == "dog"


def test_confidence_is_the_margin_even_of_one_label(bundle: Bundle) -> None:
    answer = top_k(bundle, k=1)(np.array([0.5, 0.4, 0.1]))
    assert answer["confidence"] == pytest.approx(0.1)
    assert len(answer["top"]) == 1


def test_of_equal_probabilities_the_first_label_wins(bundle: Bundle) -> None:
    assert top_k(bundle, k=3)(np.full(3, 1 / 3))["label"] == "cat"


def test_a_single_probability_is_its_own_confidence(make_bundle: MakeBundle) -> None:
    answer = top_k(make_bundle(more="labels: [spam]"))(np.array([0.8]))
    assert (answer["label"], answer["confidence"]) == ("spam", 0.8)


def test_without_labels_numbers_are_given(make_bundle: MakeBundle) -> None:
    assert top_k(make_bundle())(np.array([0.1, 0.9]))["label"] == "1"


@pytest.mark.parametrize("width", [2, 4])
def test_as_many_labels_as_probabilities(bundle: Bundle, width: int) -> None:
    with pytest.raises(InferenceFailed, match=f"each of 3 labels, came {width}"):
        top_k(bundle)(np.full(width, 1 / width))


def test_scores_of_any_size_stay_finite(bundle: Bundle) -> None:
    row = {"y": np.array([-3e38, 0, 3e38], np.float32)}
    assert softmax(bundle, output="y")(row).tolist() == [0, 0, 1]
    assert sigmoid(bundle, output="y")(row) == pytest.approx([0, 0.5, 1])


def test_an_embedding_is_the_vector_itself(bundle: Bundle) -> None:
    answer = embedding(bundle, output="y")({"y": np.float32([0.5, -1])})
    assert answer == {"type": "embedding", "vector": [0.5, -1.0], "dimensions": 2}


def test_tensors_are_nested_lists(bundle: Bundle) -> None:
    row = {"y": np.arange(4).reshape(2, 2), "z": np.float32(1.5)}
    assert tensor(bundle)(row)["outputs"] == {"y": [[0, 1], [2, 3]], "z": 1.5}
    assert tensor(bundle, outputs=["z"])(row)["outputs"] == {"z": 1.5}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"x": np.zeros(3), "z": np.zeros(3)}, "an output 'y', came x, z"),
        ({"y": np.zeros((2, 3))}, r"one vector an item, came shape \[2, 3\]"),
        ({"y": np.zeros(0)}, r"came shape \[0\]"),
        ({"y": np.array([0, np.nan])}, "finite"),
        ({"y": np.array([0, np.inf])}, "finite"),
    ],
)
@pytest.mark.parametrize("step", [softmax, sigmoid, embedding])
def test_an_output_that_is_no_vector_of_numbers_is_a_failure(
    bundle: Bundle,
    step: Callable[..., Callable[..., object]],
    row: dict[str, np.ndarray],
    words: str,
) -> None:
    with pytest.raises(InferenceFailed, match=words) as caught:
        step(bundle, output="y")(row)
    assert caught.value.code == "bad_output"
