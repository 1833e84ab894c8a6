"""Forward passes of any torch module, watched: what each layer reads, and what that was made of.

Forward hooks measure at the layers' inputs; a dispatch mode follows every tensor, operation by
operation, and meets weights that are used outside of a layer.
"""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from models.neuron import LIF
from runtime.errors import UserError

from .codes import Levels, Rows

LAYERS = (nn.Conv2d, nn.Linear, nn.Conv1d)
PRODUCTS = re.compile(  # names of aten functions that compute sums of products
    r"mm(_|$)|mv_?$|^v?dot$|conv|attention|rnn|lstm|gru(_|$)|trilinear$|(^|_)q?linear(_|$)"
    r"|transformer|einsum|cdist"
)
RESETS = ("reset", "reset_state", "reset_states", "reset_mem", "reset_hidden")
BY_HAND = "or write a layer list by hand (docs/layer_list.md)"
ROUNDINGS = {"sign", "sgn", "heaviside", "round", "floor", "ceil", "trunc"}
SEED = 0x5EED_0F_7415  # none that a user's sample was drawn with: an encoder's noise would equal it
MOST_FIRED = 255  # spikes of one neuron at one timestep; a neuron that gives more has no bound
PASSES = ("sample", "origins", "low", "high", "random", "random")  # counts may all be even once


@dataclass(frozen=True)
class Origin:
    """What a tensor was computed from: the image, the nearest layers (name, number of its call),
    the nearest spiking modules, whether a layer's sums that no neuron has turned into spikes are in
    it, and whether all of those were rounded outside of a module. Of a constant, the weights it was
    computed from."""

    image: bool = False
    layers: frozenset[tuple[str, int]] = frozenset()
    populations: frozenset[str] = frozenset()
    real: bool = False
    rounded: bool = False
    weights: frozenset[str] = frozenset()

    @property
    def is_constant(self) -> bool:
        return not (self.image or self.layers or self.populations)

    @property
    def layer_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.layers)

    def join(self, other: "Origin") -> "Origin":
        return Origin(
            self.image or other.image,
            self.layers | other.layers,
            self.populations | other.populations,
            self.real or other.real,
            self.real + other.real > 0 and self.rounded + other.rounded == self.real + other.real,
            self.weights | other.weights,
        )


class Origins(TorchDispatchMode):
    """Follows every tensor of a forward pass back to where it comes from.

    Kept per storage, so that views and writes into views are followed too. `see` is told of every
    operation, its name, operands and results, and says whether its rounding is to be followed.
    """

    def __init__(self, see: Callable[[str, list[Tensor], list[Tensor]], bool]):
        super().__init__()
        self.see, self.paused = see, False
        self._origins: dict[int, Origin] = {}
        self._alive: list[Tensor] = []  # a freed storage's key could come back as another's

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.paused:
            return result
        operands, results = _tensors((args, kwargs)), _tensors(result)
        name = function.overloadpacket.__name__
        followed = self.see(name, operands, results)
        origin = reduce(Origin.join, map(self.of, operands), Origin())
        if not origin.is_constant:
            origin = replace(origin, weights=frozenset())
        written = [
            value
            for argument, value in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for x in (*results, *_tensors(written)):
            rounds = followed and origin.real and (name in ROUNDINGS or not x.is_floating_point())
            self.start(x, replace(origin, rounded=origin.rounded or rounds).join(self.of(x)))
        return result

    def of(self, x: Tensor) -> Origin:
        return self._origins.get(x.untyped_storage()._cdata, Origin())

    def start(self, x: Tensor, origin: Origin) -> None:
        self._origins[x.untyped_storage()._cdata] = origin
        self._alive.append(x)


def _tensors(tree: object) -> list[Tensor]:
    """All but oneDNN's packed weights, which have no storage to follow."""
    leaves = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return [x for x in leaves if x.layout == torch.strided]


@dataclass
class Read:
    """A layer, and everything it read: `rows` images or tokens in `calls` calls."""

    module: nn.Module
    sizes: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)
    rows: int = 0
    outputs: int = 0  # values that it gave
    calls: int = 0
    met: int = 0  # calls of which the origin is known
    patches: Rows | None = None  # of a convolution: which of them have nothing but zeros
    origin: Origin = Origin()
    levels: Levels = field(default_factory=Levels)  # with the sample's spikes
    possible: Levels = field(default_factory=Levels)  # with whatever the neurons could fire

    def silence(self) -> float | None:
        """Share of its patches that are silent; None where nobody has looked."""
        return None if self.patches is None else self.patches.found()["silent_patches"]


@dataclass
class Neuron:
    """A module that turns sums into spikes, or keeps them in a membrane, or both."""

    module: nn.Module
    step_mode: str | None  # spikingjelly's
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # of the input of one call
    keeps_membrane: bool = False
    calls: int = 0
    rows: dict[int, frozenset[int]] = field(default_factory=dict)  # see _rows_behind_the_first
    layers: frozenset[str] = frozenset()  # whose sums it is given
    spikes: bool = True  # its output is whole numbers, or zero and few multiples of a unit
    low: float = 0.0
    high: float = 0.0
    unit: float | None = 1.0
    levels: Levels = field(default_factory=Levels)

    def add(self, spikes: Tensor) -> None:
        self.levels.add(spikes)
        low, high = spikes.double().aminmax()
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        self.unit = self.levels.step()
        self.spikes &= self.unit is not None


@dataclass
class _Frame:
    """A module that is running."""

    name: str
    module: nn.Module
    call: tuple[tuple, dict]  # its arguments
    state: list[tuple[Tensor, int]]
    has_neuron: bool = False  # that keeps a membrane
    activations: list[str] = field(default_factory=list)
    products: int = 0


class Watcher:
    """Runs a network on a sample, and keeps what there is to know of its layers and neurons.

    Several passes: for what the layers read of the sample, with nothing else going on; for what it
    was made of, where modules are tried out; then with every neuron at its lowest output, at its
    highest and at random, for what a layer could read. Raises UserError for weights and products
    outside of layers.
    """

    def __init__(self, network: nn.Module, sample: Tensor, time_steps: int):
        self.network, self.sample, self.time_steps = network, sample, time_steps
        self.reads: dict[str, Read] = {}
        self.neurons: dict[str, Neuron] = {}
        self._origins = Origins(self._see)
        self._stack: list[_Frame] = []
        self._calls: Counter[str] = Counter()  # of modules, in one pass
        self._outer: set[int] = set()  # storages of outer products of two such tensors
        self._given: dict[str, set[int]] = {}  # and of what modules gave beside their output
        self._remembering: dict[str, bool] = {}
        self._depending: dict[str, dict[int, frozenset[int]]] = {}
        self._pass, self._paused = PASSES[0], False
        self._random = torch.Generator().manual_seed(0)

    def run(self) -> None:
        self._make_lazy_weights()
        for name, module in self.network.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UserError(
                    f"module {name or 'itself'} is TorchScript, which cannot be watched: give it "
                    "as it was before torch.jit"
                )
        untouched = _left_as_it_was(self.network), torch.random.fork_rng(devices=[])
        with untouched[0], untouched[1], torch.no_grad(), torch.compiler.set_stance("force_eager"):
            self.network.eval()
            self._find()
            handles = []
            for name, module in self.network.named_modules():
                enter = partial(self._enter, name)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            try:
                for self._pass in PASSES:
                    torch.manual_seed(SEED)
                    reset(self.network)
                    with self._origins if self._pass == "origins" else nullcontext():
                        result = self.network(self.sample)
                    if self._pass == "origins":
                        self._check_output(result)
            finally:
                for handle in handles:
                    handle.remove()

    def _make_lazy_weights(self) -> None:
        if any(isinstance(p, UninitializedParameter) for p in self.network.parameters()):
            modes = [(module, module.training) for module in self.network.modules()]
            self.network.eval()
            with torch.no_grad():
                self.network(self.sample)
            reset(self.network)
            for module, training in modes:
                module.training = training

    def _find(self) -> None:
        """Which modules are layers, which may be neurons, and whose the weights are."""
        modules = dict(self.network.named_modules())
        self.weights = {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if not isinstance(parameter, UninitializedParameter)  # of an unused part
        }
        names: dict[int, str] = {}
        for name, parameter in self.weights.items():
            if parameter.dim() > 1:
                names[id(parameter)] = name
                self._origins.start(parameter, Origin(weights=frozenset({name})))
        self._origins.start(self.sample, Origin(image=True))
        self._owned = {
            name: {names[id(p)] for p in module.parameters() if id(p) in names}
            for name, module in modules.items()
        }
        first: dict[int | str, str] = {}  # layers that share a weight are one
        self._layers = {
            name: first.setdefault(name if weight is None else id(weight), name)
            for name, module in modules.items()
            if isinstance(module, LAYERS)
            for weight in [module._parameters.get("weight")]
        }
        self._known = {name for name, module in modules.items() if is_known_neuron(module)}
        holders = {above for name in (*self._layers, *self._known) for above in _above(name)}
        self._maybe_neurons = self._known | {
            name
            for name in modules.keys() - holders - self._layers.keys()
            if not any(is_matrix(self.weights[weight]) for weight in self._owned[name])
            and not self._known.intersection(_above(name))
        }

    # Hooks.

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self._paused:
            return None
        call, x = (args, kwargs), _first((args, kwargs))
        watched = self._pass == "origins" and name in self._maybe_neurons
        self._stack.append(_Frame(name, module, call, _state(module) if watched else []))
        if self._pass in ("low", "high") and name in self.neurons and self.neurons[name].spikes:
            far = 1e4 + 1e3 * x.double().abs().max().item()
            if x.is_floating_point():
                far = min(far, torch.finfo(x.dtype).max / 2)
            driven = torch.full_like(x, far if self._pass == "high" else -far)
            return _with_first(call, driven)
        return None

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, result: object) -> object:
        if self._paused:
            return None
        frame = self._stack.pop()
        self._origins.paused = True
        x, y = _first(frame.call), _first(result)
        replaced = None
        if x is not None and y is not None:
            if frame.name in self._layers:
                self._after_layer(frame, x, y)
            elif self._pass == "sample":
                self._calls[frame.name] += 1
            elif self._pass == "origins" and frame.name in self._maybe_neurons:
                self._after_module(frame, result)
            elif frame.name in self.neurons and self.neurons[frame.name].spikes:
                replaced = _with_first(result, self._fired(self.neurons[frame.name], y))
        if self._stack:
            self._stack[-1].has_neuron |= frame.has_neuron
            self._stack[-1].activations += frame.activations
        self._origins.paused = False
        return replaced

    def _after_layer(self, frame: _Frame, x: Tensor, y: Tensor) -> None:
        name, module = self._layers[frame.name], frame.module
        read = self.reads.setdefault(name, Read(module))
        read.possible.add(x)
        if self._pass == "sample":
            self._measure(name, read, x, y)
        if self._pass != "origins":
            return
        origin = self._origins.of(x)
        if frame.products != 1 and not origin.is_constant:
            raise UserError(
                f"layer {frame.name} computes {frame.products or 'no'} products that can be seen: "
                "a layer of the estimate computes one"
            )
        read.origin = read.origin.join(origin)
        read.met += 1
        self._origins.start(y, Origin(layers=frozenset({(name, read.met)}), real=True))

    def _measure(self, name: str, read: Read, x: Tensor, y: Tensor) -> None:
        module = read.module
        if not x.isfinite().all():
            raise UserError(
                f"layer {name} reads values that are not finite: the sample, "
                "or weights before it, hold NaN or infinity"
            )
        read.levels.add(x)
        read.outputs += y.numel()
        read.calls += 1
        if isinstance(module, nn.Linear):
            read.sizes.add(((1, 1), (1, 1)))
            read.rows += x.numel() // module.in_features
        else:
            planes = len(module.kernel_size)
            sizes = ((1,) * (2 - planes) + tuple(z.shape[-planes:]) for z in (x, y))
            read.sizes.add(tuple(sizes))
            read.rows += prod(x.shape[: -planes - 1])
            self._measure_silence(read, x)

    def _measure_silence(self, read: Read, x: Tensor) -> None:
        where = geometry(read.module)
        if where:
            if read.patches is None:
                kernel = read.module.kernel_size
                read.patches = Rows(kernel, 1, where["stride"], where["padding"])
            read.patches.add(
                (x != 0).long().flatten(0, -4) if x.dim() > 3 else (x != 0).long()[None]
            )

    def _check_output(self, result: object) -> None:
        for x in _tensors(result):
            origin = self._origins.of(x)
            if x.is_floating_point() and origin.rounded:
                raise UserError(f"the network gives {made_by_hand(origin)}")

    def _after_module(self, frame: _Frame, result: object) -> None:
        """Sees whether the module is a neuron, by what it does."""
        name, x, y = frame.name, _first(frame.call), _first(result)
        beside = self._beside(frame, x, y, result)
        if x.is_complex() or y.is_complex() or not y.numel():
            return
        given = [self._origins.of(z) for z in _tensors(frame.call)]
        reads, gives = reduce(Origin.join, given, Origin()), self._origins.of(y)
        if reads.is_constant:
            return  # a weight's quantizer
        x_is_whole, largest = _is_whole(x), y.double().abs().max().item()
        spikes = _are_spikes(y)
        membrane = name in self._known
        if not membrane:
            if frame.has_neuron:
                return
            kept = _kept(frame, x, y, result if spikes else None) + beside
            is_real = reads.real or not x_is_whole or not all(map(_is_whole, kept))
            if kept and not is_real:
                return  # it delays spikes, or masks them
            membrane = bool(kept or (gives.layers - reads.layers and x.shape == y.shape))
        is_fed_back = False
        if not membrane:
            if spikes:
                self._refuse_encoder(frame, x, y)
            if x_is_whole or x.shape != y.shape:
                return
            is_fed_back = name in gives.populations
            membrane = is_fed_back or self._remembers(frame, y)
            if not membrane and not largest:
                self._origins.start(y, replace(gives, real=False))
                return
            if not membrane and (frame.activations or not spikes):
                return
        spikes = spikes or (membrane and x.shape == y.shape and _are_rounded(x, y))
        for inner in frame.activations:
            self.neurons.pop(inner, None)
        mode = getattr(frame.module, "step_mode", "m" if name in self._known else None)
        neuron = self.neurons.setdefault(name, Neuron(frame.module, mode))
        neuron.shapes.add(tuple(x.shape))
        neuron.keeps_membrane |= membrane
        neuron.calls = self._calls[name]
        if neuron.calls == 1 and mode is None:
            neuron.rows = self._rows_behind_the_first(frame, y)
        neuron.layers |= gives.layer_names | reads.layer_names
        neuron.spikes &= spikes
        # What feeds a threshold back is a membrane around it: perhaps that of the module it is in.
        if not spikes:
            old = gives.populations.intersection(frame.activations)
            if old:
                populations = gives.populations - old | {name}
                self._origins.start(y, replace(gives, populations=populations))
        frame.has_neuron = membrane and not is_fed_back
        frame.activations = [] if frame.has_neuron else [name]
        if spikes:
            neuron.add(y)
            self._origins.start(y, Origin(layers=gives.layers, populations=frozenset({name})))

    def _beside(self, frame: _Frame, x: Tensor, y: Tensor, result: object) -> list[Tensor]:
        """Its state: what a module is given that it gave before, beside its output."""
        sizes = (x.numel(), x[0].numel() if x.dim() else 1)
        given, gave = (
            [z for z in _tensors(tree)[1:] if z.is_floating_point() and z.numel() in sizes]
            for tree in (frame.call, result)
        )
        passed = {z.untyped_storage()._cdata for z in _tensors(frame.call)}
        gave = [z for z in gave if z.untyped_storage()._cdata not in passed]
        if self.time_steps == 1 and gave and not _are_spikes(y):
            raise UserError(
                f"module {frame.name} gives values beside its output: at one timestep nothing says "
                "whether they are a membrane; give two timesteps or more"
            )
        before = self._given.setdefault(frame.name, set())
        known = [z for z in given if z.untyped_storage()._cdata in before]
        before |= {z.untyped_storage()._cdata for z in gave}
        return known

    def _refuse_encoder(self, frame: _Frame, x: Tensor, y: Tensor) -> None:
        """Refuses what makes different timesteps of a single image, and not by chance."""
        steps = self.time_steps
        shapes = [(steps, *x.shape), (*x.shape[:1], steps, *x.shape[1:])]
        if tuple(y.shape) not in shapes:
            return
        axis = shapes.index(tuple(y.shape))
        args, kwargs = frame.call
        with self._unwatched(), _left_as_it_was(frame.module):
            torch.manual_seed(SEED + 1)
            is_random = not torch.equal(_first(frame.module.forward(*args, **kwargs)), y)
        if not is_random and (y != y.narrow(axis, 0, 1)).any():
            raise UserError(
                f"module {frame.name} gives spikes of {steps} timesteps for one, and "
                "nothing says whether it has a membrane: give the sample as it encodes it, or run "
                "a neuron that is a torch module at every timestep"
            )

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _remembers(self, frame: _Frame, y: Tensor) -> bool:
        """Whether what a module returns for one timestep depends on the timesteps before it: those
        of the same call, or those of calls before, of which it may keep what nobody can see."""
        name = frame.name
        if name not in self._remembering:
            self._remembering[name] = bool(self._rows_behind_the_first(frame, y))
            for run, z, far in self._trials(frame, y):
                if self._remembering[name]:
                    break
                after = []
                for before in (far, -far, 0.0):
                    with _left_as_it_was(frame.module):
                        run(torch.full_like(z, before))
                        after.append(run(z))
                self._remembering[name] = not all(torch.equal(after[0], other) for other in after)
        return self._remembering[name]

    def _rows_behind_the_first(self, frame: _Frame, y: Tensor) -> dict[int, frozenset[int]]:
        """Of each of the first two axes along which a call goes through time, the rows of its
        output that depend on the first row of its input."""
        name = frame.name
        if name not in self._depending:
            rows: dict[int, frozenset[int]] = {}
            for run, z, far in self._trials(frame, y):
                for axis in range(min(2, z.dim())):
                    results = []
                    for first in (far, -far, 0.0):
                        changed = z.clone()
                        changed.select(axis, 0).fill_(first)
                        with _left_as_it_was(frame.module):
                            results.append(run(changed).movedim(axis, 0).flatten(1))
                    differ = sum((results[0] != other).any(1) for other in results)
                    found = frozenset(differ.nonzero().flatten().tolist()) - {0}
                    if found:
                        rows[axis] = rows.get(axis, frozenset()) | found
            self._depending[name] = rows
        return self._depending[name]

    def _trials(
        self, frame: _Frame, y: Tensor
    ) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, float]]:
        """(the module as a function, an input to try, a value far above it): the sample's input,
        large ones and random ones, since the sample may leave it silent. Where the module is to be
        tried at all; the caller puts back what it shows of its state."""
        x = _first(frame.call)
        in_place = x.untyped_storage()._cdata == y.untyped_storage()._cdata
        if not x.is_floating_point() or x.shape != y.shape or not x.dim() or in_place:
            return

        def run(z: Tensor) -> Tensor:
            args, kwargs = _with_first(frame.call, z.clone())
            torch.manual_seed(0)  # noise is no memory
            return _first(frame.module.forward(*args, **kwargs)).clone()

        size = min(1 + x.abs().max().item(), torch.finfo(x.dtype).max / 2e5)
        noise = torch.randn(x.shape, generator=self._random).to(x)
        with self._unwatched():
            for z in (x, torch.full_like(x, 100 * size), 100 * size * noise):
                yield run, z, 1e5 * size

    def _fired(self, neuron: Neuron, y: Tensor) -> Tensor:
        """What the neuron would give at its lowest, at its highest, or at random."""
        if self._pass != "random":
            values = y.double()
            seen, extreme = copy(neuron.levels), values.abs().max().item()
            seen.add(y)
            unit = seen.step()
            if unit is not None and extreme <= MOST_FIRED * unit:
                neuron.levels, neuron.unit = seen, unit
                neuron.low = min(neuron.low, values.min().item())
                neuron.high = max(neuron.high, values.max().item())
            if neuron.low == neuron.high == 0:
                neuron.high = neuron.unit
            return torch.full_like(y, neuron.low if self._pass == "low" else neuron.high)
        count = round((neuron.high - neuron.low) / neuron.unit)
        fired = torch.randint(0, count + 1, y.shape, generator=self._random)
        return (neuron.low + neuron.unit * fired).to(y)

    # Operations.

    def _see(self, name: str, tensors: list[Tensor], results: list[Tensor]) -> bool:
        """Whether what an operation rounds was made by nothing that is looked at as a whole."""
        operands = [self._origins.of(x) for x in tensors]
        self._refuse_products(name, operands)
        varying = [x for x, origin in zip(tensors, operands, strict=True) if not origin.is_constant]
        if name == "mul" and len(varying) == 2:
            if results[0].numel() > max(x.numel() for x in varying):
                self._outer.add(results[0].untyped_storage()._cdata)
        elif name in ("sum", "mean") and tensors[0].untyped_storage()._cdata in self._outer:
            self._refuse_attention()
        known = self._layers.keys() | self._maybe_neurons
        return not any(frame.name in known for frame in self._stack)

    def _refuse_attention(self) -> None:
        raise UserError(
            f"{_place(self._where())} multiplies two tensors that both depend on the sample, as "
            "attention does: a crossbar holds one of them as weights; write a layer list without "
            "this product (docs/layer_list.md)"
        )

    def _where(self) -> str:
        return self._stack[-1].name if self._stack else ""

    def _refuse_products(self, name: str, operands: list[Origin]) -> None:
        inner = next((f for f in reversed(self._stack) if f.name in self._layers), None)
        is_product = bool(PRODUCTS.search(name)) and "upsample" not in name
        if all(origin.is_constant for origin in operands):
            return
        owned = self._owned[inner.name] if inner else set()
        constants = [origin for origin in operands if origin.is_constant]
        foreign = {
            weight
            for origin in constants
            for weight in origin.weights - owned
            if is_product or is_matrix(self.weights[weight])
        }
        for weight in self.weights:
            if weight in foreign:
                raise UserError(
                    f"{weight} ({by(self.weights[weight].shape)}) used outside of Conv2d and "
                    "Linear modules, where the estimate would miss it: use such modules, "
                    f"{BY_HAND}"
                )
        if not is_product:
            return
        factors = operands[1:] if name.startswith(("add", "badd")) else operands
        if sum(not origin.is_constant for origin in factors[:2]) == 2:
            self._refuse_attention()
        if inner is None:
            raise UserError(
                f"{_place(self._where())} computes a product ({name}) outside of Conv2d and Linear "
                "modules that the estimate would miss: make its matrix the weight of one"
            )
        inner.products += 1


def geometry(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Stride and padding of a convolution; nothing where they do not say alone what it reads."""
    if not isinstance(module, nn.Conv2d) or module.dilation != (1, 1):
        return {}
    kernel, padding = module.kernel_size, module.padding
    if isinstance(padding, str):
        padding = tuple((k - 1) // 2 if padding == "same" else 0 for k in kernel)
    if any(p >= k for p, k in zip(padding, kernel, strict=True)):
        return {}
    return {"stride": module.stride, "padding": padding}


def made_by_hand(origin: Origin) -> str:
    """What is wrong with spikes of this origin."""
    sources = ", ".join(sorted(origin.layer_names)[:3])
    return (
        f"spikes that were made of the sums of {sources} outside of a module of their own, so that "
        f"their membrane is not seen: make the neuron a torch module, {BY_HAND}"
    )


def is_known_neuron(module: nn.Module) -> bool:
    """This project's neurons and spikingjelly's; others are known by what they do."""
    base = sys.modules.get("spikingjelly.activation_based.neuron.base_node")
    return isinstance(module, LIF) or (
        base is not None
        and isinstance(module, base.BaseNode | base.SimpleBaseNode | base.NonSpikingBaseNode)
    )


def is_matrix(weight: Tensor) -> bool:
    """Whether it has two dimensions or more, beside those of size 1."""
    return sum(size > 1 for size in weight.shape) > 1


def reset(network: nn.Module) -> None:
    """Forget what earlier samples left in membranes."""
    for module in network.modules():
        if method := _reset_of(module):
            method()


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    for name in RESETS:
        method = getattr(module, name, None)
        with suppress(TypeError, ValueError):  # it is no function, or takes arguments
            inspect.signature(method).bind()
            return method
    return None


@contextmanager
def _left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Puts back every module's attributes, mode and buffers, whatever a forward pass changes."""
    modules = list(network.modules())
    attributes = [
        {k: v.copy() if isinstance(v, dict | list) else v for k, v in vars(module).items()}
        for module in modules
    ]
    tensors = [(x, version, x.detach().clone()) for x, version in _state(network)]
    try:
        yield
    finally:
        for module, before in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(before)
        with torch.no_grad():
            for x, version, before in tensors:
                if _version(x) != version:
                    x.copy_(before)


def _state(module: nn.Module) -> list[tuple[Tensor, int]]:
    """The tensors that a module keeps beside its parameters, each with its version."""
    found = []
    for part in module.modules():
        kept = {k: v for k, v in vars(part).items() if k not in ("_parameters", "_modules")}
        found += [(x, _version(x)) for x in tree_leaves(kept) if isinstance(x, Tensor)]
    return found


def _version(x: Tensor) -> int:
    """How often it was written to."""
    return 0 if x.is_inference() else x._version


def _kept(frame: _Frame, x: Tensor, y: Tensor, result: object) -> list[Tensor]:
    """Values for each neuron that a call has changed in the module, or gave beside its spikes."""
    before = {(id(tensor), version) for tensor, version in frame.state}
    found = [z for z, version in _state(frame.module) if (id(z), version) not in before]
    found += [z for z in tree_leaves(result) if isinstance(z, Tensor)]
    shown = {z.untyped_storage()._cdata for z in (x, y)}  # merely stored, to be looked at
    sizes = (x.numel(), x[0].numel() if x.dim() else 1)
    return [
        z
        for z in found
        if z.is_floating_point() and z.numel() in sizes and z.untyped_storage()._cdata not in shown
    ]


def _is_whole(x: Tensor) -> bool:
    return not x.is_floating_point() or torch.equal(x, x.round())


def _are_spikes(x: Tensor) -> bool:
    """Whether all are whole numbers, or zero and one other size."""
    sizes = x.double().abs()
    two_sizes = (sizes == 0) | (sizes == sizes.max())
    return _is_whole(x) or bool((sizes == 0).any() and two_sizes.all())


def _are_rounded(x: Tensor, y: Tensor) -> bool:
    """Whether real numbers `x` have become zeros and few multiples of a unit."""
    before, after = Levels(), Levels()
    before.add(x)
    after.add(y)
    unit = after.step()
    if unit is None or before.step() is not None:
        return False
    return bool((y == 0).any() and y.abs().max() <= MOST_FIRED * unit)


def _first(tree: object) -> Tensor | None:
    return next((x for x in tree_leaves(tree) if isinstance(x, Tensor)), None)


def _with_first(tree: object, new: Tensor) -> object:
    """The same containers with the first tensor replaced."""
    leaves, shape = tree_flatten(tree)
    first = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
    return tree_unflatten([*leaves[:first], new, *leaves[first + 1 :]], shape)


def _above(name: str) -> list[str]:
    """Of the modules that hold the one of this name."""
    if not name:
        return []
    parts = name.split(".")
    return ["", *(".".join(parts[:i]) for i in range(1, len(parts)))]


def by(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes))


def _place(where: str) -> str:
    return f"module {where}" if where else "the network's forward"
