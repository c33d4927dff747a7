"""Makes the data that `tidegate demo` ships: held-out digit images and two classifiers as ONNX files.

    pip install scikit-learn onnx onnxruntime
    python server/demo/make_data.py

Not part of the running product: scikit-learn is needed here and nowhere else. The images are the 1,797 handwritten
digits of UCI's "Optical Recognition of Handwritten Digits" test set, which scikit-learn carries (8x8 pixels, 0 to 16).
Half of them, drawn with a fixed seed and equally from each digit, is held out and shipped; the other half trains both
versions, and is not shipped:

- version 1: one hidden layer of 12 units, trained on the images as they are;
- version 2: hidden layers of 256 and 128 units, trained also on copies shifted by a pixel.

The predictions that the demo expects are those of ONNX Runtime on the exported files, not scikit-learn's. An image on
which the two best classes of a version lie closer than LEAST_MARGIN would be no test (another batch size changes the
last bits of a sum), so the script refuses to ship one.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import sklearn
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

Array = npt.NDArray[Any]

DATA = Path(__file__).parent / "data"
SEED = 20
SIDE = 8
BRIGHTEST = 16.0  # pixels count the black dots of a 4x4 cell
LEAST_MARGIN = 1e-4  # in probability; FP32 sums of this size differ by some 1e-6


def shifted(images: Array, labels: Array) -> tuple[Array, Array]:
    """The images [n, 64] and their copies moved by one pixel in each of four directions, with their labels."""
    padded = np.pad(images.reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)))
    offsets = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    copies = [padded[:, y : y + SIDE, x : x + SIDE].reshape(len(images), -1) for y, x in offsets]
    return np.concatenate(copies), np.tile(labels, len(offsets))


def as_onnx(classifier: MLPClassifier, version: int) -> onnx.ModelProto:
    """The trained network as a graph: image FP32 [batch, 64] -> label INT64 [batch], probabilities FP32 [batch, 10]."""
    weights = [numpy_helper.from_array(np.asarray(1 / BRIGHTEST, np.float32), "scale")]
    nodes = [helper.make_node("Mul", ["image", "scale"], ["x0"])]
    last = len(classifier.coefs_) - 1
    for i, (matrix, bias) in enumerate(zip(classifier.coefs_, classifier.intercepts_, strict=True)):
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"w{i}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"b{i}"))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"]))
        if i < last:
            nodes.append(helper.make_node("Relu", [f"a{i}"], [f"x{i + 1}"]))
    nodes.append(helper.make_node("Softmax", [f"a{last}"], ["probabilities"], axis=1))
    nodes.append(helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", SIDE * SIDE])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10]),
        ],
        weights,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="tidegate.demo",
        producer_version=str(version),
    )
    onnx.checker.check_model(model)
    return model


def predictions(model: onnx.ModelProto, images: Array) -> Array:
    """Labels uint8 [n] of ONNX Runtime for images uint8 [n, 64]. Raises ValueError where a label hangs on last bits."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels, probabilities = session.run(["label", "probabilities"], {"image": images.astype(np.float32)})
    best = np.sort(probabilities, axis=1)
    margin = float((best[:, -1] - best[:, -2]).min())
    if margin < LEAST_MARGIN:
        raise ValueError(f"the two best classes of an image lie {margin:.1e} apart; choose another SEED")
    return np.asarray(labels, np.uint8)


def main() -> None:
    """Writes digits.npz, digits_v1.onnx, digits_v2.onnx and facts.json under data/."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.5, random_state=SEED, stratify=labels
    )
    more_x, more_y = shifted(train_x, train_y)
    classifiers = {
        1: MLPClassifier((12,), max_iter=150, random_state=SEED).fit(train_x / BRIGHTEST, train_y),
        2: MLPClassifier((256, 128), max_iter=60, random_state=SEED).fit(more_x / BRIGHTEST, more_y),
    }
    test_x, test_y = test_x.astype(np.uint8), test_y.astype(np.uint8)

    DATA.mkdir(exist_ok=True)
    expected = {}
    for version, classifier in classifiers.items():
        model = as_onnx(classifier, version)
        (DATA / f"digits_v{version}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        expected[version] = predictions(model, test_x)
    np.savez_compressed(
        DATA / "digits.npz", images=test_x, labels=test_y, expected_1=expected[1], expected_2=expected[2]
    )
    facts = {
        "held_out_images": len(test_y),
        "training_images": len(train_y),
        "correct": {str(version): int((labels == test_y).sum()) for version, labels in expected.items()},
        "seed": SEED,
        "made_with": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
    (DATA / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
