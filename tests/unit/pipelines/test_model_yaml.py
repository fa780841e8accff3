from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.model_yaml import MAX_BYTES, ModelYaml
from schemas.errors import InvalidModel

GOOD = """\
name: tiny
version: 1
modality: text
engines:
  main: {file: model.onnx}
  other:
    file: other.onnx
preprocess:
  - decode_text
  - tokenize: {max_tokens: 16}
postprocess:
  - softmax: {output: logits}
  - top_k
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.yaml"


def refusal(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidModel) as caught:
        ModelYaml(path)
    assert caught.value.code == "model_yaml_invalid"
    return caught.value.message


def test_a_good_file_becomes_a_config_with_its_defaults(path: Path) -> None:
    path.write_text("\ufeff" + GOOD)
    config = ModelYaml(path).config
    assert (config.name, config.version, config.run, config.tier) == (
        "tiny",
        1,
        "forward",
        "standard",
    )
    assert config.preprocess == ["decode_text", {"tokenize": {"max_tokens": 16}}]
    assert config.batch.buckets == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("good", "bad", "line", "words"),
    [
        ("name: tiny", "name: Tiny!", 1, "matching regex"),
        ("name: tiny", "name: 'tiny\n'", 1, "matching regex"),
        ("name: tiny", "title: tiny", 1, "unknown field `title`"),
        ("version: 1\n", "", 1, "missing required field `version`"),
        ("version: 1", "version: 0", 2, ">= 1"),
        ("version: 1", "version: one", 2, "Expected `int`, got `str`"),
        ("modality: text", "modality: smell", 3, "Invalid enum value 'smell'"),
        ("{file: model.onnx}", "{file: model.onnx, device: gpu}", 5, "unknown field `device`"),
        ("{file: model.onnx}", "{}", 5, "missing required field `file`"),
        ("    file: other.onnx", "    file: 3", 7, "put it in quotes"),
        ("  - top_k", "  - top_k: 5", 13, "Expected `object`, got `int`"),
        ("  - top_k", "  - 5", 13, "`$.postprocess[1]`"),
        ("  - decode_text\n  - tokenize: {max_tokens: 16}", "  []", 8, "length >= 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(
    path: Path, good: str, bad: str, line: int, words: str
) -> None:
    assert good in GOOD
    message = refusal(path, GOOD.replace(good, bad, 1))
    assert message.startswith(f"{path}:{line}: ")
    assert words in message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("batch: {buckets: [4, 2]}", "ascending"),
        ("batch: {buckets: []}", "length >= 1"),
        ("batch: {buckets: [0, 1]}", ">= 1"),
        ("batch: {max_jobs: 0}", ">= 1"),
        ("batch: {max_delay_ms: -1}", ">= 0"),
        ("limits: {max_run_s: 0}", "> 0"),
        ("limits: {max_attempts: 0}", ">= 1"),
        ("labels: [yes, no]", "put it in quotes"),
        ("labels: 2024-13-45", "month must be in 1..12"),
        ("labels: " + "9" * 5000, "integer"),
        ("tier: gold", "Invalid enum value"),
        ("version: 2", "`version` is given in line 2 already"),
        ("batch: {pad: true, pad: false}", "`pad` is given in line 14 already"),
        ("labels: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("labels: [a", "expected ',' or ']'"),
        ("labels: 'a", "found unexpected end of stream"),
        ("labels: *nothing", "undefined alias"),
        ("{[1]: 2}: 3", "expected a name before the colon"),
        ("? [1]\n: 3", "expected a name before the colon"),
        ("\tlabels: 3", "cannot start any token"),
    ],
)
def test_a_mistake_in_the_last_line_is_named_with_its_line(
    path: Path, more: str, words: str
) -> None:
    message = refusal(path, GOOD + more)
    assert message.startswith((f"{path}:14: ", f"{path}:15: ")), message
    assert words in message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "found neither"),
        ("- a", 1, "found neither"),
        ("just words", 1, "found neither"),
        (b"name: tiny\nversion: \xff", 2, "not UTF-8"),
        ("name: tiny\nversion: 1\x07", 2, "control character"),
        ("[" * 20_000, 1, "nested too deeply"),
        ("x: " + "a" * MAX_BYTES, 1, "over 1048576 bytes"),
        ("a: 1\n---\nb: 2", 2, "but found another document"),
    ],
)
def test_what_is_no_mapping_is_refused(
    path: Path, text: str | bytes, line: int, words: str
) -> None:
    message = refusal(path, text)
    assert message.startswith(f"{path}:{line}: ")
    assert words in message


@pytest.mark.parametrize("merge", ["*", "<<: *"])
def test_an_alias_bomb_is_refused_before_it_is_built(path: Path, merge: str) -> None:
    lines = ["a0: &a0 {k: 1}"]
    for i in range(40):
        values = f"[*a{i}, *a{i}]" if merge == "*" else f"{{<<: [*a{i}, *a{i}]}}"
        lines.append(f"a{i + 1}: &a{i + 1} {values}")
    assert "aliases expand" in refusal(path, "\n".join(lines))


def test_an_alias_of_itself_is_refused(path: Path) -> None:
    assert "aliases expand" in refusal(path, "labels: &a [*a]")


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(InvalidModel, match="No such file") as caught:
        ModelYaml(path)
    assert caught.value.code == "model_yaml_missing"


@pytest.mark.parametrize(
    ("at", "line"),
    [
        ("$.name", 1),
        ("$.engines.other.file", 7),
        ("$.preprocess[1]", 10),
        ("$.preprocess[1].tokenize", 10),
        ("$.postprocess[9]", 11),
        ("$.engines[...].file", 4),
        ("$.absent", 1),
    ],
)
def test_a_path_leads_to_its_line_or_the_last_one_on_the_way(
    path: Path, at: str, line: int
) -> None:
    path.write_text(GOOD)
    assert ModelYaml(path).where(at) == f"{path}:{line}"
