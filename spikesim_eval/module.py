"""Any torch module of a user's as the layer list that the estimate reads.

What its layers read is measured (watch.py); here it is put in the estimate's words, or refused.
"""

import importlib
import sys
from collections import Counter
from math import prod
from pathlib import Path
from textwrap import shorten

from torch import Tensor, nn

from models.neuron import LIF
from runtime.errors import UserError

from .codes import code_bits, share_of_ones
from .layer_list import IMAGE_BITS, MAX_BITS, Layer, LayerList, Subject, check_int
from .watch import BY_HAND, Neuron, Read, Watcher, by, geometry, made_by_hand

MOST_TEXT = 300  # characters of a message


def dynamics(module: nn.Module) -> tuple[float | None, str | None]:
    """(leak, reset) of a neuron of this project, or of the (leaky) integrate-and-fire neurons of
    spikingjelly and snntorch, as it says of itself; (None, None) of others, of a membrane that is
    reset to anything but 0, and where neurons of a module have several."""
    if isinstance(module, LIF):
        return module.neuron.leak, module.neuron.reset
    leak, reset = None, None
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if hasattr(module, "v_reset"):  # spikingjelly: None subtracts the threshold
        reset = {None: "soft", 0.0: "hard"}.get(module.v_reset)
        if kinds & {"LIFNode", "SimpleLIFNode"}:
            leak = 1 - 1 / module.tau if isinstance(module.tau, float | int) else None
        elif "ParametricLIFNode" in kinds:
            leak = 1 - module.w.sigmoid().item()
        elif kinds & {"IFNode", "SimpleIFNode"}:
            leak = 1.0
    elif hasattr(module, "reset_mechanism"):  # snntorch
        reset = {"subtract": "soft", "zero": "hard"}.get(module.reset_mechanism)
        if "Leaky" in kinds and module.beta.numel() == 1:
            leak = module.beta.item()
        elif "Lapicque" in kinds and module.R.numel() == module.C.numel() == 1:
            leak = 1 - (module.time_step / (module.R * module.C)).item()
    is_known = leak is not None and 0 <= leak <= 1 and reset is not None
    return (leak, reset) if is_known else (None, None)


class _Description:
    """The layer list of a watched network.

    Raises UserError where the estimate has no words for it.
    """

    def __init__(self, watcher: Watcher, bits: int):
        self.bits, self.time_steps = bits, watcher.time_steps
        self.reads, self.neurons = watcher.reads, watcher.neurons
        self._check()
        self.upstream: dict[str, set[str]] = {}
        self.behind_spikes: set[str] = set()
        for name, read in self.reads.items():
            self._connect(name, read)
        self.samples, self.shapes = self._populations()
        self.updating = self._layers_that_update()

    def network(self) -> LayerList:
        layers = tuple(self._layer(name, read) for name, read in self.reads.items())
        said = {dynamics(x.module) for x in self.neurons.values() if x.keeps_membrane}
        leak, reset = said.pop() if len(said) == 1 else (None, None)
        return LayerList(
            time_steps=self.time_steps,
            weight_bits=self.bits,
            membrane_bits=self.bits,
            layers=layers,
            lif=tuple(self.shapes.values()),
            streams=self._streams(layers),
            **{} if leak is None else {"leak": leak, "reset": reset},
        )

    def _streams(self, layers: tuple[Layer, ...]) -> tuple[tuple[int, int, int], ...]:
        """Shapes of the sums that wait: those that two read, or that are part of a later one. Those
        of a static stem are kept anyway."""
        readers = [(self.neurons[name].layers, shape) for name, shape in self.shapes.items()]
        readers += [
            (frozenset(layer.after), (layer.in_channels, *layer.in_size))
            for layer in layers
            if self._reads_stream(layer.name)
        ]
        times = Counter(names for names, _ in readers)
        static = {layer.name for layer in layers if layer.static}
        found: dict[frozenset[str], tuple[int, int, int]] = {}
        for names, shape in readers:
            waits = times[names] > 1 or any(names < later for later in times)
            if waits and not names <= static:
                found.setdefault(names, shape)
        return tuple(found.values())

    # What is refused before anything is described.

    def _check(self) -> None:
        for name, read in self.reads.items():
            if read.origin.is_constant:
                raise UserError(
                    f"layer {name} reads something that was not computed from the sample by torch: "
                    "numbers that are the same for every sample, or that went through numpy"
                )
        if self.time_steps == 1:
            for name, neuron in self.neurons.items():
                if not neuron.keeps_membrane and neuron.low >= 0 < neuron.high:
                    raise UserError(
                        f"module {name} gives spikes and keeps no state that can be seen: at one "
                        "timestep nothing says whether it has a membrane; give two timesteps or "
                        "more"
                    )
        if not any(neuron.keeps_membrane for neuron in self.neurons.values()):
            raise UserError(
                "no LIF population found: no module keeps a membrane of its own; make the neuron "
                f"a torch module, {BY_HAND}"
            )

    def _populations(self) -> tuple[int, dict[str, tuple[int, int, int]]]:
        """(samples of the batch, the shape of each population with a membrane)"""
        possible: dict[str, dict[int, tuple[int, ...]]] = {}  # samples: shape
        for name, neuron in self.neurons.items():
            if not neuron.keeps_membrane:
                continue
            if len(neuron.shapes) > 1:
                raise UserError(
                    f"spiking module {name} runs at several places, on inputs of "
                    f"{' and '.join(map(by, sorted(neuron.shapes)))}: give each population a "
                    "module of its own"
                )
            possible[name] = self._readings(neuron)
            if not possible[name]:
                self._refuse_timesteps(name, neuron)
        common = set.intersection(*map(set, possible.values()))
        if not common:
            several = sorted(set().union(*possible.values()))
            raise UserError(
                f"spiking modules ran on {' and '.join(map(str, several))} samples: "
                "timesteps and samples cannot be told apart"
            )
        # (T, N, C, ...) could also be (T, C, ...) of one sample: then a layer runs N times for it.
        fitting = [n for n in common if not any(read.rows % n for read in self.reads.values())]
        samples = max(fitting or common)
        shapes = {name: (*readings[samples], 1, 1) for name, readings in possible.items()}
        return samples, {name: (C, H, prod(rest)) for name, (C, H, *rest) in shapes.items()}

    def _refuse_timesteps(self, name: str, neuron: Neuron) -> None:
        (shape,) = neuron.shapes
        if neuron.rows:
            raise UserError(
                f"LIF {name}, called once on {by(shape)}, does not run {self.time_steps} timesteps"
            )
        steps = shape[0] * neuron.calls if neuron.step_mode == "m" else neuron.calls
        times = "1 timestep" if steps == 1 else f"{steps} timesteps"
        raise UserError(f"LIF {name} ran {times}, not {self.time_steps}")

    def _readings(self, neuron: Neuron) -> dict[int, tuple[int, ...]]:
        """For each number of samples that the inputs of a module with a membrane could be of, the
        shape of one sample's input at one timestep.

        Inputs are (N, ...) in a loop; in one call (T, N, ...), (N, T, ...), or these two flattened.
        """
        T, (shape,) = self.time_steps, neuron.shapes
        folded, rest = divmod(shape[0], T)
        if isinstance(neuron.module, LIF):
            return {} if rest else {folded: shape[1:]}
        if neuron.step_mode == "m":
            return {shape[1]: shape[2:]} if shape[0] * neuron.calls == T else {}
        found = {}
        if neuron.calls == T:
            found[shape[0]] = shape[1:]
        if neuron.step_mode == "s" or neuron.calls > 1 or len(shape) < 2:
            return found
        rows = neuron.rows if T > 1 else dict.fromkeys((0, 1), frozenset())
        if 0 in rows and not rest:
            steps = set(range(folded, shape[0], folded)), set(range(T))
            if any(rows[0] <= step for step in steps):
                found[folded] = shape[1:]
        if 1 in rows and shape[1] == T:
            found[shape[0]] = shape[2:]
        if 0 in rows and shape[0] == T:
            found[shape[1]] = shape[2:]
        return found

    # The graph.

    def _connect(self, name: str, read: Read) -> None:
        before = read.origin.layer_names
        self.upstream[name] = before.union(*(self.upstream.get(x, ()) for x in before))
        if name in self.upstream[name]:
            raise UserError(
                f"layer {name} runs in several places of the network, one behind the other, or "
                f"feeds back: the estimate knows no such layers; make it several, {BY_HAND}"
            )
        for x in read.origin.populations:
            before = before | self.neurons[x].layers
            if self.neurons[x].keeps_membrane:
                self.behind_spikes.add(name)
        if before & self.behind_spikes:
            self.behind_spikes.add(name)

    def _layers_that_update(self) -> set[str]:
        """Of the layers that are added in front of a membrane one pays for its update: the deepest
        that does not read the residual stream. Of those whose outputs lie side by side, each."""
        depth: dict[str, int] = {}
        for name, read in self.reads.items():
            before = [depth.get(x, 0) for x in read.origin.layer_names]
            depth[name] = 1 + max(before, default=0)
        order = list(self.reads)
        taken: set[str] = set()
        for name, shape in self.shapes.items():
            free = [x for x in order if x in self.neurons[name].layers and x not in taken]
            free.sort(key=lambda x: (self._reads_stream(x), -depth[x], -order.index(x)))
            missing = prod(shape)
            for layer in free:
                if missing > 0:
                    taken.add(layer)
                    missing -= self.reads[layer].outputs // (self.samples * self.time_steps)
        return taken

    def _reads_stream(self, name: str) -> bool:
        origin = self.reads[name].origin
        return bool(origin.layers) and (origin.real or self._reads_codes(name))

    def _reads_codes(self, name: str) -> bool:
        """Whether it reads what a module without a membrane has rounded."""
        populations = self.reads[name].origin.populations
        return bool(populations) and not any(self.neurons[x].keeps_membrane for x in populations)

    # A layer.

    def _check_spikes(self, name: str, read: Read) -> None:
        """Refuses spikes, or averages of them, that no module has made."""
        values = read.possible.values
        step = read.possible.step() if read.origin.real else None
        if not read.origin.rounded:
            if step is None or not values.any():
                return
            largest, is_signed = values.abs().max().item(), values.min() < 0
            is_average = largest <= 1 and abs(1 / step - round(1 / step)) < 1e-3 and not is_signed
            if not is_average and (round(largest / step) > 1 or values.min() > 0):
                return
        raise UserError(f"layer {name} reads {made_by_hand(read.origin)}")

    def _layer(self, name: str, read: Read) -> Layer:
        self._check_spikes(name, read)
        module = read.module
        is_linear = isinstance(module, nn.Linear)
        groups, sides = getattr(module, "groups", 1), getattr(module, "kernel_size", (1, 1))
        kernel = sides[0]
        if set(sides) != {kernel} or (len(sides) == 1 and kernel != 1):
            raise UserError(
                f"layer {name}: its kernel is {by(sides)}, and the estimate knows 2-d "
                f"convolutions with square kernels; use such, {BY_HAND}"
            )
        common = {
            "name": name,
            "in_channels": module.weight.shape[1] * groups,
            "out_channels": module.weight.shape[0],
            "groups": groups,
            "after": tuple(sorted(read.origin.layer_names)),
            "lif": name in self.updating,
        }
        if len(read.sizes) > 1:
            sizes = " and ".join(sorted(by(size) for size, _ in read.sizes))
            raise UserError(
                f"layer {name} runs on inputs of different sizes, {sizes}: the estimate knows one "
                f"size a layer; make it several, {BY_HAND}"
            )
        ((in_size, out_size),) = read.sizes
        runs, counts = self._runs(name, read)
        if counts or (is_linear and self.time_steps == 1 and self._is_averaged(read)):
            if kernel != 1 or groups != 1:
                raise UserError(
                    f"layer {name} does not run at every timestep: of such layers the estimate "
                    f"knows linear ones and 1×1 convolutions; use one, {BY_HAND}"
                )
            return self._counting(name, read, runs * prod(out_size), common)
        if is_linear:
            runs, tokens = self._tokens(read, runs)
            in_size = out_size = (1, tokens)
        bits, rate = self._bits_and_rate(name, read)
        return Layer(
            kernel=kernel,
            in_size=in_size,
            out_size=out_size,
            input_bits=bits,
            spike_rate=rate,
            silent_patches=None if rate is None or bits > 1 else read.silence(),
            static=self._runs_once(read) and not read.origin.layers,
            runs=runs,
            **geometry(module),
            **common,
        )

    def _runs_once(self, read: Read) -> bool:
        """Whether it runs for a sample and not for each of its timesteps."""
        return read.rows % (self.samples * self.time_steps) != 0

    def _runs(self, name: str, read: Read) -> tuple[int, bool]:
        """(how often it runs for one sample, whether that is all, and not of every timestep)

        In front of the first spikes what runs once serves every timestep. That of the image is
        static; other layers are charged at each.
        """
        total, rest = divmod(read.rows, self.samples)
        if rest or not total:
            raise UserError(
                f"layer {name} ran on {read.rows} images or tokens for {self.samples} samples: the "
                f"estimate needs as many for each; use a batch that is not reshaped, {BY_HAND}"
            )
        if total % self.time_steps == 0:
            return total // self.time_steps, False
        return total, name in self.behind_spikes

    def _tokens(self, read: Read, rows: int) -> tuple[int, int]:
        """(runs, tokens of one run) of `rows` tokens at a timestep."""
        runs = read.calls // self.time_steps if read.calls % self.time_steps == 0 else read.calls
        return (runs, rows // runs) if rows % runs == 0 else (1, rows)

    def _is_averaged(self, read: Read) -> bool:
        """Whether it reads spikes that have been averaged."""
        origin, levels = read.origin, read.possible
        if not origin.populations or origin.real or origin.image or levels.is_whole:
            return False
        return levels.step() is not None and bool(levels.values.min() >= 0)

    def _counting(self, name: str, read: Read, runs: int, common: dict) -> Layer:
        """A layer that runs once on spikes averaged or summed over time (and a plane): its input
        counts up to T·H·W."""
        T, origin = self.time_steps, read.origin
        plane = self._pooled_plane(common["in_channels"], read)
        values = read.possible.values
        step = read.possible.step() or read.possible.step((1 / (T * prod(plane)),))
        if origin.real or origin.image or step is None or values.min() < 0:
            raise UserError(
                f"layer {name} runs once for all timesteps on what is no average of spikes over "
                f"time: the estimate knows no such layers; run it at every timestep, {BY_HAND}"
            )
        most = round(values.max().item() / step) or T * prod(plane)  # of nothing that fires
        if (T * prod(plane)).bit_length() != most.bit_length():  # added or pooled more than once
            added, rest = divmod(most, T * prod(plane))
            plane = (plane[0], plane[1] * added) if added and not rest else (1, -(-most // T))
        if (T * prod(plane)).bit_length() != most.bit_length():
            raise UserError(
                f"layer {name} runs once for all timesteps and reads counts up to {most}, not of "
                f"{T} timesteps: the estimate knows averages over all of them; use one, {BY_HAND}"
            )
        return Layer(
            kernel=1,
            in_size=plane,
            out_size=(1, 1),
            input_bits=None,
            linear=True,
            spike_rate=share_of_ones(read.levels, step, (T * prod(plane)).bit_length()),
            runs=runs,
            **common,
        )

    def _pooled_plane(self, features: int, read: Read) -> tuple[int, int]:
        """What a classifier's inputs are averages over, beside time."""
        shapes = [self.shapes[x] for x in sorted(read.origin.populations) if x in self.shapes]
        return shapes[0][1:] if shapes and shapes[0][0] == features else (1, 1)

    def _bits_and_rate(self, name: str, read: Read) -> tuple[int, float | None]:
        """(bits of an input value, share of ones among them or None where it is not known)"""
        origin, possible = read.origin, read.possible
        from_spikes = bool(origin.populations) and not origin.real
        widest = max(
            IMAGE_BITS if origin.image else 1,
            self.bits if origin.real or not (origin.image or origin.populations) else 1,
        )
        if possible.is_zero:
            return widest, share_of_ones(read.levels, 1.0, 1) if from_spikes else None
        # An image's own step is not its codes': it is read in 8 bits.
        step = possible.step() if not origin.image or possible.is_whole else None
        if step is None:
            return max(widest, 1 if origin.image and not origin.real else self.bits), None
        low, high = (
            round(x / step) for x in (possible.values.min().item(), possible.values.max().item())
        )
        bits = code_bits(low, high)
        if not (origin.image and (low, high) == (0, 1)):
            bits = max(bits, widest)
        return bits, share_of_ones(read.levels, step, bits)


def trace_network(network: nn.Module, sample: Tensor, bits: int, time_steps: int) -> LayerList:
    """Layer list of a spiking network, from forward passes of `sample`; the network stays as is.

    `bits` is the width of its weights and membranes. Spike rates are those of the sample, measured
    where a layer reads them. A layer reads 1 bit where its input is spikes, more where it is counts
    of them: as many as if every neuron fired; 8 bits where it is the image, and `bits` where it is
    anything else that is real, like the residual stream. A linear layer that runs once, on averages
    over time, is the classifier; one that runs at every timestep is a 1×1 convolution, of as many
    pixels as it runs for tokens. Raises UserError for what the estimate does not know.
    """
    watcher = Watcher(network, sample, time_steps)
    watcher.run()
    return _Description(watcher, bits).network()


def trace_module(spec: str, time_steps: int, bits: int) -> Subject:
    """The network that a user's function gives: `spec` is "package.module:function".

    The function takes nothing and returns (network, sample): a torch module and an input as the
    module takes it. Spike rates are those of the sample, so it should be real data.
    The module must run all timesteps in one forward pass, in a loop or in spikingjelly's step mode
    "m"; T and bits are the caller's to say. Raises UserError for whatever is wrong with it.
    """
    check_int(time_steps, "time_steps", 10**6)
    check_int(bits, "bits", MAX_BITS)
    module_name, _, function_name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        returned = getattr(importlib.import_module(module_name), function_name)()
        match returned:
            case (nn.Module() as network, Tensor() as sample) if sample.numel():
                return Subject(spec, trace_network(network, sample, bits, time_steps))
        fault = "the function must return (torch module, tensor of samples)"
    except UserError as error:
        fault = str(error)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        fault = f"{type(error).__name__}: {error}"
    finally:
        sys.path.pop(0)
    raise UserError(shorten(f"--module {spec}: {fault}", MOST_TEXT, placeholder=" ..."))
