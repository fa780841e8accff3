from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.bundle import Bundle
from pipelines.modalities import build_steps
from schemas.errors import InvalidModel

MakeBundle = Callable[..., Bundle]

CUSTOM = """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.bundle import Bundle

def shout(bundle: "Bundle", *, mark: str = "!"):
    return lambda text: {"type": "shout", "text": text.upper() + mark}

class Counter:
    def __init__(self, bundle, start: int):
        self.count = start
    def __call__(self, value):
        self.count += 1
        return self.count
"""


@pytest.fixture
def custom_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with two steps."""
    site = tmp_path / "site"
    info = site / "foo-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "foo_steps.py").write_text(CUSTOM)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[headrace.steps]\nshout = foo_steps:shout\ncounter = foo_steps:Counter\n"
        "absent = foo_steps:absent\nbroken = no_such_module:step\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "foo_steps", raising=False)


def refusal(bundle: Bundle) -> InvalidModel:
    with pytest.raises(InvalidModel) as caught:
        build_steps(bundle)
    return caught.value


def test_steps_are_made_in_the_order_of_the_yaml(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(
        preprocess="[decode_image, {resize: {size: 8}}, {to_tensor: {input: x}}]",
        postprocess="[{softmax: {output: y}}, top_k]",
    )
    steps = build_steps(bundle)
    assert [len(part) for part in (steps.preprocess, steps.postprocess)] == [3, 2]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{resize: {}}", "resize: needs the parameter `size`; it takes size, filter ("),
        ("{resize: {size: big}}", "size: Expected `int | array`, got `str`; it takes"),
        ("{resize: {size: 0}}", ">= 1"),
        ("{resize: {size: [8]}}", "length >= 2"),
        ("{resize: {size: 8, filter: sharp}}", "'sharp'; it takes size, filter (nearest | box | "),
        ("{resize: {size: 8, mode: fit}}", "has no parameter `mode`; it takes size, filter ("),
        ("{center_crop: {fraction: 1.5}}", "<= 1"),
        ("{to_tensor: {input: x, scale: 0}}", "scale must not be 0"),
        ("{tokenize: {max_tokens: 8}}", "expected `tokenizer: tokenizer.json`"),
        ("{decode_image: {}, resize: {size: 8}}", "a dash of its own"),
        ("{}", "came 0 names"),
    ],
)
def test_a_wrong_parameter_names_line_step_and_what_it_takes(
    make_bundle: MakeBundle, step: str, words: str
) -> None:
    bundle = make_bundle(preprocess=f"\n  - decode_image\n  - {step}")
    error = refusal(bundle)
    assert error.code == "model_step_invalid"
    assert error.message.startswith(f"{bundle.folder}/model.yaml:8: ")
    assert words in error.message


def test_an_unknown_step_names_line_and_those_that_exist(make_bundle: MakeBundle) -> None:
    error = refusal(make_bundle(postprocess="[smell]"))
    assert error.code == "model_step_unknown"
    assert "model.yaml:7: no postprocess step is called `smell`; there are" in error.message
    assert "top_k" in error.message
    assert "decode_image" not in error.message


def test_a_step_in_the_wrong_place_is_unknown_there(make_bundle: MakeBundle) -> None:
    assert refusal(make_bundle(preprocess="[top_k]")).code == "model_step_unknown"


@pytest.mark.usefixtures("custom_steps")
def test_custom_steps_come_by_entry_point(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(
        preprocess="[decode_text, {counter: {start: 3}}]", postprocess="[{shout: {mark: '?'}}]"
    )
    steps = build_steps(bundle)
    assert steps.preprocess[1]("x") == 4
    assert steps.postprocess[0]("oh") == {"type": "shout", "text": "OH?"}


@pytest.mark.usefixtures("custom_steps")
@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{counter: {start: soon}}", "Expected `int`, got `str`"),
        ("{shout: {loud: 3}}", "has no parameter `loud`; it takes mark = !"),
    ],
)
def test_parameters_of_custom_steps_are_checked_too(
    make_bundle: MakeBundle, step: str, words: str
) -> None:
    assert words in refusal(make_bundle(preprocess=f"[{step}]")).message


@pytest.mark.usefixtures("custom_steps")
def test_an_unknown_step_names_the_installed_ones(make_bundle: MakeBundle) -> None:
    assert (
        "by entry point: absent, broken, counter, shout"
        in refusal(make_bundle(preprocess="[smell]")).message
    )


@pytest.mark.usefixtures("custom_steps")
@pytest.mark.parametrize("name", ["absent", "broken"])
def test_a_custom_step_that_cannot_be_imported_is_named(make_bundle: MakeBundle, name: str) -> None:
    error = refusal(make_bundle(preprocess=f"[{name}]"))
    assert error.code == "model_step_unknown"
    assert "model.yaml:6: " + name in error.message
    assert "cannot be imported" in error.message


def test_forward_wants_one_engine(make_bundle: MakeBundle, bundle_folder: Path) -> None:
    make_bundle()
    yaml = bundle_folder / "model.yaml"
    yaml.write_text(yaml.read_text().replace("  main:", "  other: {file: model.onnx}\n  main:", 1))
    assert "expected one engine, came 2" in refusal(Bundle.open(bundle_folder)).message
