"""A description as an ONNX file of opset 18: T unrolled, any number of images, readable names.

Each value has the name of its layer, so that a reader can ask for the spikes of one.
"""

import json
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .description import Description, Operation

OPSET, IR = 18, 8  # of the same time: the newest IR, which onnx writes by itself, is often refused
NO_CONSTANTS = ("stride", "padding", "kernel", "reset")


def onnx_file(description: Description) -> bytes:
    """The contents of the file: `images` float32 as the network reads them, `logits` float64."""
    builder = _Builder(description)
    for operation in description.operations:
        builder.add(operation)
    read = {name for node in builder.nodes for name in node.input}
    shape, classes = description.input_shape, description.operations[-1].shape[0]
    graph = helper.make_graph(
        builder.nodes,
        "MD-SNN",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.DOUBLE, ["batch", classes])],
        [x for x in builder.constants if x.name in read],  # of others onnxruntime would tell
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="MD-SNN")
    helper.set_model_props(model, {"about": json.dumps(description.about)})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


class _Builder:
    """ONNX nodes of a description, which compute what `plain.Plain` does."""

    def __init__(self, description: Description):
        self.description, self.time_window = description, description.time_window
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.names = {"image": "images", "head": "logits"}  # of an operation's value

    def add(self, operation: Operation) -> None:
        # The products of batch norm and head are exact in float64 only.
        dtype = np.float64 if operation.kind in ("norm", "head") else np.float32
        for name, value in operation.numbers.items():
            if name not in NO_CONSTANTS:
                self.constant(f"{operation.name}.{name}", value, dtype)
        output = self.names.setdefault(operation.name, operation.name)
        reads = (self.names[name] for name in operation.reads)
        getattr(self, f"_{operation.kind}")(operation, output, *reads)

    def constant(self, name: str, value: Any, dtype: type) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, output: str | list[str], *inputs: str, **attributes: Any) -> str:
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def _image(self, operation: Operation, output: str) -> None:
        if self.description.takes_frames:
            by_time = self.op("Transpose", "images.by_time", "images", perm=[1, 0, 2, 3, 4])
            shape = self.constant("images.shape", [-1, *operation.shape], np.int64)
            self.names["image"] = self.op("Reshape", "images.frames", by_time, shape)

    def _codes(self, operation: Operation, output: str, x: str) -> None:
        step, low, high = (f"{operation.name}.{name}" for name in ("step", "low", "high"))
        divided = self.op("Div", f"{output}.divided", x, step)
        self.op("Clip", output, self.op("Round", f"{output}.whole", divided), low, high)

    def _conv(self, operation: Operation, output: str, x: str) -> None:
        stride, padding = operation.numbers["stride"], operation.numbers["padding"]
        names = [name for name in ("weight", "bias") if name in operation.numbers]
        constants = (f"{operation.name}.{name}" for name in names)
        self.op("Conv", output, x, *constants, strides=stride, pads=padding)

    def _norm(self, operation: Operation, output: str, x: str) -> None:
        scale, shift, divisor = (f"{operation.name}.{x}" for x in ("scale", "shift", "divisor"))
        x = self.op("Cast", f"{output}.wide", x, to=TensorProto.DOUBLE)
        x = self.op("Mul", f"{output}.scaled", x, scale)
        x = self.op("Add", f"{output}.shifted", x, shift)
        x = self.op("Div", f"{output}.divided", x, divisor)
        x = self.op("Round", f"{output}.whole", x)
        self.op("Cast", output, x, to=TensorProto.FLOAT)

    def _repeat(self, operation: Operation, output: str, x: str) -> None:
        self.op("Concat", output, *[x] * self.time_window, axis=0)

    def _add(self, operation: Operation, output: str, x: str, y: str) -> None:
        self.op("Add", output, x, y)

    def _pool(self, operation: Operation, output: str, x: str) -> None:
        kernel, stride, padding = (operation.numbers[x] for x in ("kernel", "stride", "padding"))
        how = {"kernel_shape": kernel, "strides": stride, "pads": padding}
        self.op("MaxPool", output, x, **how)

    def _lif(self, operation: Operation, output: str, x: str) -> None:
        step, leak, threshold = (f"{operation.name}.{x}" for x in ("step", "leak", "threshold"))
        one = self.constant(f"{operation.name}.one", 1, np.float32)
        currents = [f"{output}.x{t}" for t in range(1, self.time_window + 1)]
        self.op("Split", currents, x, axis=0, num_outputs=self.time_window)
        kept, fired = "", []
        for t, u in enumerate(currents, 1):
            at = f"{output}.t{t}"
            if fired and operation.numbers["reset"] == "hard":
                silent = self.op("Sub", f"{at}.silent", one, fired[-1])
                left = self.op("Mul", f"{at}.left", kept, silent)
            elif fired:
                taken = self.op("Mul", f"{at}.taken", fired[-1], threshold)
                left = self.op("Sub", f"{at}.left", kept, taken)
            if fired:
                u = self.op("Add", f"{at}.u", u, self.op("Mul", f"{at}.leaked", left, leak))
            if "step" in operation.numbers:
                self._codes(operation, f"{at}.code", u)
                u = self.op("Mul", f"{at}.rounded", f"{at}.code", step)
            above = self.op("Greater", f"{at}.above", u, threshold)
            fired.append(self.op("Cast", f"{at}.fired", above, to=TensorProto.FLOAT))
            kept = u
        self.op("Concat", output, *fired, axis=0)

    def _head(self, operation: Operation, output: str, spikes: str) -> None:
        channels, H, W = self.description.read_by(operation).shape
        # Not by Split: T and the pixels are summed up at once.
        shape = self.constant("head.shape", [self.time_window, -1, channels, H * W], np.int64)
        by_time = self.op("Reshape", "head.by_time", spikes, shape)
        axes = self.constant("head.axes", [0, 3], np.int64)
        counts = self.op("ReduceSum", "head.counts", by_time, axes, keepdims=0)
        x = self.op("Cast", "head.wide", counts, to=TensorProto.DOUBLE)
        x = self.op("Gemm", "head.products", x, "head.weight", transB=1)
        if "step" in operation.numbers:
            x = self.op("Mul", "head.scaled", x, "head.step")
        x = self.op("Div", "head.mean", x, "head.positions")
        self.op("Add", output, x, "head.bias")
