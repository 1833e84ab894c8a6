"""A full-precision network as a NIR file (Pedersen et al., Nature Communications 15,
8122 (2024)), in the one encoding that spikingjelly, snnTorch and norse read alike.

NIR's neuron is τ·dv/dt = v_leak - v + r·I, fires above v_threshold and is then set to v_reset. With
r = 1 and a timestep dt = (1 - leak)·τ its v is (1 - leak)·u. Of the three readers norse takes any r
for 1, snnTorch has dt = 1e-4 built in, and spikingjelly fires at the threshold too.
"""

import io
import math

import nir
import numpy as np

from runtime.errors import UserError

from .description import Description, Operation

DT = 1e-4  # seconds

NOTES = """\
# {file}

A spiking network in NIR. What the file itself does not say:

- **The mean over time is yours**: the output is one timestep's, the logits are the mean of {T}.
- {input}
- **dt is {dt:g} s**, also where a reader's default is another (norse's is 1e-3).
- A neuron **fires above** its threshold. Some readers fire at it too, so v_threshold is a little
  more than (1 - leak) · threshold.
- The **state** after a timestep goes into the next; a new batch begins without one.
- Edges that end in one node are a sum of values of the **same timestep**.
- The classes are {classes}.
"""

Sides = tuple[int, int]


def nir_file(description: Description) -> bytes:
    """The contents of the file. Raises UserError for what NIR has no word for."""
    refuse(description)
    nodes: dict[str, nir.NIRNode] = {}
    edges: list[tuple[str, str]] = []
    names: dict[str, str] = {}  # of an operation, the node with its value
    for operation in description.operations:
        if operation.kind == "repeat":
            names[operation.name] = names[operation.reads[0]]
            continue
        names[operation.name] = at = operation.name
        nodes[at] = nir_node(operation, description)
        reads = [names[name] for name in operation.reads]
        if operation.kind == "pool":  # the largest of spikes: whether their sum is above none
            nodes[f"{at}.sum"] = sum_of_windows(**operation.numbers)
            edges.append((reads[0], f"{at}.sum"))
            reads = [f"{at}.sum"]
        edges += [(name, at) for name in reads]
    nodes["output"] = nir.Output({"output": np.array([*operation.shape, 1, 1])})
    buffer = io.BytesIO()
    nir.write(buffer, nir.NIRGraph(nodes, [*edges, (at, "output")]))
    return buffer.getvalue()


def nir_notes(description: Description, file: str) -> str:
    """What has to stand beside the file."""
    image = "The input is the same image at every timestep, pixels from 0 to 1."
    frame = "The input of timestep t is frame t, as 8-bit codes of its counts."
    return NOTES.format(
        file=file,
        T=description.time_window,
        input=frame if description.takes_frames else image,
        dt=DT,
        classes=", ".join(description.about["class_names"]),
    )


def refuse(description: Description) -> None:
    """Raises UserError where NIR cannot say what the network does, or its readers differ."""
    neuron = description.neuron
    if description.is_quantized:
        raise UserError(
            "--to nir: NIR has no word for membranes of a few bits, and without their rounding it "
            "is another network: take --to onnx or integers, or its full-precision teacher"
        )
    if neuron.reset != "hard":
        raise UserError(
            "--to nir: a NIR neuron is set to a value when it fires, a soft reset is not"
        )
    if not 0 < neuron.leak < 1:
        raise UserError(
            f"--to nir: of neurons with a leak of {neuron.leak:g} its readers have no common "
            "encoding: it must lie between 0 and 1"
        )
    for operation in description.operations:
        if operation.kind == "pool" and any(operation.numbers["padding"]):
            plane = "{}x{}".format(*description.read_by(operation).shape[1:])
            raise UserError(
                f"--to nir: {operation.name} reads beyond its plane of {plane}, and the readers of "
                "NIR leave that out: take images whose sides can be halved"
            )


def nir_node(operation: Operation, description: Description) -> nir.NIRNode:
    numbers, shape, neuron = operation.numbers, operation.shape, description.neuron
    match operation.kind:
        case "image":
            return nir.Input({"input": np.array(shape)})
        case "conv":
            return convolution(description.read_by(operation).shape, **numbers)
        case "add":  # several edges into one node are its sum
            return sum_of_windows((1, 1), (1, 1), (0, 0))
        case "lif":
            return lif(shape, neuron.leak, neuron.threshold)
        case "pool":
            return lif(shape, neuron.leak, 0.5)
    # The head: Flatten is another in each reader, a convolution over the whole plane is not.
    plane = description.read_by(operation).shape
    weight = numbers["weight"][:, :, None, None] / np.float32(math.prod(plane[1:]))
    weight = np.broadcast_to(weight, (len(weight), *plane)).copy()
    return convolution(plane, weight, (1, 1), (0, 0), numbers["bias"])


def sum_of_windows(kernel: Sides, stride: Sides, padding: tuple[int, ...]) -> nir.SumPool2d:
    return nir.SumPool2d(*(np.array(sides) for sides in (kernel, stride, padding[:2])))


def convolution(
    reads: tuple[int, ...],
    weight: np.ndarray,
    stride: Sides,
    padding: tuple[int, ...],
    bias: np.ndarray,
) -> nir.Conv2d:
    return nir.Conv2d(reads[1:], weight, stride, padding[:2], (1, 1), 1, bias)


def lif(shape: tuple[int, ...], leak: float, threshold: float) -> nir.LIF:
    """Neurons with v = (1 - leak)·u, and a threshold that is, as float32, the next number above
    theirs and, divided by 1 - leak as snnTorch does, their own."""

    def filled(value: float) -> np.ndarray:
        return np.full(shape, value)

    at = (1 - leak) * threshold
    above = at + 0.6 * float(np.spacing(np.float32(at)))
    time, zero = filled(DT / (1 - leak)), filled(0.0)
    return nir.LIF(tau=time, r=filled(1.0), v_leak=zero, v_threshold=filled(above), v_reset=zero)
