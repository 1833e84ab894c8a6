"""Arguments, layer lists and checkpoints as a stranger, a broken disk or a cat would write them.

Each function tries many and lets everything through but the one line for the user, so that whatever
else happens (a traceback, in the end) stops it. test_faults.py tries some of each.
"""

import copy
import io
import json
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import build_network, load_checkpoint
from engine.run import Run
from load_settings import build_optimizer, load_network, parse_settings
from runtime.errors import UserError
from settings import OPTIONS as DECLARED
from spikesim_eval.layer_list import load_layer_list

OPTIONS = (*(f"--{name}" for name in DECLARED), "--config", "--no_amp", "--local-rank")
OPTIONS += ("--help", "--", "-", "--no_such")
VALUES = (
    *("digits", "CIFAR10", "original", "student", "qamd", "CLK", "cosine", "cpu", "auto", "18"),
    *("folder", "digits-dvs", "48x32", "none"),
    *("0", "1", "2", "4", "-1", "1e400", "nan", "inf", "1" * 5000, "9" * 20, "0x10", "", " ", "/"),
    *("../x", "a\0b", "a\nb", "/dev/null", "/proc/self/mem", "ü", "\udcff", "%s%n", "a" * 5000),
)
LAYER_LIST = {
    "time_steps": 4,
    "weight_bits": 4,
    "membrane_bits": 4,
    "layers": [
        {
            **{"name": "stem", "kernel": 3, "in_channels": 3, "out_channels": 8},
            **{"in_size": [8, 8], "out_size": [8, 8], "input_bits": 8, "after": []},
        },
        {
            **{"name": "fc", "kernel": 1, "in_channels": 8, "out_channels": 10},
            **{"in_size": [8, 8], "out_size": [1, 1], "linear": True, "after": ["stem"]},
        },
    ],
    "lif": [[8, 8, 8]],
}


def junk() -> list[Any]:
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    nan = float("nan")
    numbers = [True, -1, 0, 3, 10**30, 10**400, 0.5, nan, float("inf")]
    others = [None, "", "text", "a\nb", b"\x80", [], {}, (), [1, 2], [[]], {"a": 1}, deep]
    return [*numbers, *others, {1: {"momentum_buffer": 2}}]


def tensors() -> list[torch.Tensor]:
    return [
        *(torch.zeros(()), torch.zeros(3), torch.full((2, 2), float("nan")), torch.ones(0)),
        *(torch.zeros(3, dtype=torch.uint8), torch.zeros(5056, dtype=torch.uint8)),
        *(torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64)),
        *(torch.zeros(1, 1, 3, 3, dtype=torch.float64), torch.full((1, 1, 3, 3), float("inf"))),
    ]


class Disguised(dict):
    """Pickled, an OrderedDict with numbers in the place of methods."""

    def __reduce__(self):
        methods = dict.fromkeys(("items", "keys", "get", "values"), 5)
        return OrderedDict, (), methods, None, iter(self.items())


def disguised() -> list[Any]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.isfinite = 5
    return [Disguised(a=1), parameter]


def replaced(content: Any, steps: list[int], value: Any) -> Any:
    """A copy of nested dictionaries and lists in which one thing is another. `steps` say which."""
    step, *further = steps
    if isinstance(content, dict) and content:
        key = list(content)[step % len(content)]
        inner = replaced(content[key], further, value) if further else value
        return content | {key: inner}
    if isinstance(content, list | tuple) and content:
        items = list(content)
        place = step % len(items)
        items[place] = replaced(items[place], further, value) if further else value
        return type(content)(items)
    return value


def damaged(content: bytes, place: int, with_what: bytes, cut: bool) -> bytes:
    """Other bytes from `place` on, or nothing behind it."""
    place %= len(content) + 1
    return (
        content[:place] if cut else content[:place] + with_what + content[place + len(with_what) :]
    )


def tries(count: int):
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=health,
    )


place = st.lists(st.integers(0, 1000), min_size=1, max_size=5)
damage = st.tuples(st.integers(0, 10**7), st.binary(min_size=1, max_size=20), st.booleans())


def try_arguments(count: int) -> None:
    word = st.one_of(
        st.sampled_from(OPTIONS),
        st.sampled_from(VALUES),
        st.text(max_size=10),
        st.floats().map(str),
        st.integers().map(str),
        st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES)).map("=".join),
    )

    @tries(count)
    @given(st.lists(word, max_size=12))
    def check(arguments: list[str]) -> None:
        with suppress(UserError, SystemExit), redirect_stdout(io.StringIO()):  # --help exits
            parse_settings(arguments)

    check()


def try_layer_lists(count: int, folder: Path) -> None:
    def read(path: Path) -> None:
        with suppress(UserError):
            load_layer_list(path)

    try_json(count, folder / "net.json", LAYER_LIST, read)


def try_configs(count: int, folder: Path) -> None:
    settings = parse_settings(["--data", "digits", "--paper_setting", "student", "--bits", "4"])

    def read(path: Path) -> None:
        with suppress(UserError), redirect_stderr(io.StringIO()):  # warnings
            parse_settings(["--config", str(path), "--data", "digits"])

    try_json(count, folder / "config.json", asdict(settings), read)


def try_json(count: int, path: Path, whole: dict, read: Callable[[Path], None]) -> None:
    """Read files that differ from a good one in bytes or values, or have nothing to do with it."""
    text = json.dumps(whole).encode()
    deep = b"[" * 100_000, b'{"layers":' * 50_000, b"[" * 900 + b"]" * 900
    changed = st.tuples(place, st.sampled_from(junk()).filter(lambda x: type(x) is not bytes))

    @tries(count)
    @given(
        st.one_of(
            damage.map(lambda how: damaged(text, *how)),
            changed.map(lambda how: json.dumps(replaced(whole, *how)).encode()),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            ).map(lambda value: json.dumps(value).encode()),
            st.binary(max_size=100),
            st.sampled_from(deep),
        )
    )
    def check(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    check()


def try_checkpoints(count: int, run: list[str], checkpoint: Path) -> None:
    """Change the last checkpoint of a run with these arguments, evaluate it and resume the run."""
    whole = checkpoint.read_bytes()
    content = torch.load(checkpoint, weights_only=True)
    resume = parse_settings([*run, "--resume"])
    network = build_network(resume)
    optimizer = build_optimizer(network, resume)
    images = content["training_images"]

    def serialized(changed: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(changed, buffer)
        return buffer.getvalue()

    anything = st.sampled_from([*junk(), *tensors(), *disguised()])

    @tries(count)
    @given(
        st.one_of(
            st.tuples(place, anything).map(lambda how: serialized(replaced(content, *how))),
            damage.map(lambda how: damaged(whole, *how)),
        )
    )
    def check(changed: bytes) -> None:
        checkpoint.write_bytes(changed)
        with warnings.catch_warnings(action="error"):  # they would be lines for the user
            with suppress(UserError):
                load_network(load_checkpoint(checkpoint))
            with suppress(UserError), Run(resume, network, optimizer, images, steps_per_epoch=5):
                pass

    states = copy.deepcopy(random.getstate()), torch.get_rng_state()
    try:
        check()
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        checkpoint.write_bytes(whole)
