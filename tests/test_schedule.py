"""When layers run: the pipeline's formula against a simulation that moves pixel after pixel."""

import heapq
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikesim_eval.chip import Chip
from spikesim_eval.estimate import estimate
from spikesim_eval.layer_list import Layer, LayerList
from spikesim_eval.schedule import critical_path, schedule
from test_spikesim import conv, net


def simulated(
    network: LayerList, pixel_time: dict[str, float], images: int = 1
) -> list[dict[str, tuple[float, float]]]:
    """(first start, last finish) of each layer, for each of `images` that come one behind the
    other, by events: a pixel is done, a row has arrived, a waiting row may start.

    Strides and paddings are said by the network's own names for them, not worked out of its sizes.
    """
    layers = {layer.name: layer for layer in network.layers}
    steps = {name: network.time_steps_of(layer) for name, layer in layers.items()}
    heights = {name: layer.out_size[0] * layer.runs for name, layer in layers.items()}
    done: dict[str, int] = dict.fromkeys(layers, 0)  # rows, over all timesteps and images
    pixel = dict.fromkeys(layers, 0)  # of the row that a layer works on
    busy = dict.fromkeys(layers, False)
    found = [{name: [None, 0.0] for name in layers} for _ in range(images)]
    events: list[tuple[float, str]] = []

    def may_start(name: str) -> bool:
        layer, height = layers[name], layers[name].out_size[0]
        image, at = divmod(done[name], steps[name] * heights[name])
        step, at = divmod(at, heights[name])
        run, row = divmod(at, height)
        if image == images:
            return False
        for before in layer.after:
            rows, runs = layers[before].out_size[0], layers[before].runs
            if layer.linear:
                needed = steps[before] * heights[before]
            else:
                stride, padding = GEOMETRY[layer.kernel, layer.in_size[0], height]
                read = min(max(row * stride + layer.kernel - padding, 1), layer.in_size[0])
                while read * rows % layer.in_size[0]:  # a pooled row needs all of its window
                    read += 1
                behind = (
                    (layer.runs - 1 - run) * runs // layer.runs
                )  # runs of it that may be missing
                needed = min(step, steps[before] - 1) * heights[before]
                needed += (runs - 1 - behind) * rows + read * rows // layer.in_size[0]
            if done[before] - image * steps[before] * heights[before] < needed:
                return False
        return True

    def start_what_may(now: float) -> None:
        for name in layers:
            if not busy[name] and may_start(name):
                image = done[name] // (steps[name] * heights[name])
                if found[image][name][0] is None:
                    found[image][name][0] = now
                busy[name] = True
                heapq.heappush(events, (now + pixel_time[name], name))

    start_what_may(0.0)
    while events:
        now, name = heapq.heappop(events)
        pixel[name] += 1
        if pixel[name] < layers[name].out_size[1]:
            heapq.heappush(events, (now + pixel_time[name], name))
            continue
        image = done[name] // (steps[name] * heights[name])
        found[image][name][1] = now
        pixel[name], busy[name] = 0, False
        done[name] += 1
        start_what_may(now)
    return [{name: tuple(times) for name, times in of_image.items()} for of_image in found]


# (kernel, rows read, rows given): (stride, padding)
GEOMETRY = {
    **{(3, n, n): (1, 1) for n in (4, 8)},
    **{(1, n, n): (1, 0) for n in (4, 8)},
    **{(3, n, n // 2): (2, 1) for n in (4, 8)},
    **{(1, n, n // 2): (2, 0) for n in (4, 8)},
    (5, 8, 4): (1, 0),
    (3, 2, 2): (1, 1),
    (1, 2, 2): (1, 0),
    (1, 1, 1): (1, 0),
}


@st.composite
def graphs(draw) -> LayerList:
    """A stem, residual blocks with and without a smaller plane, pooling between, layers that run
    several times, a linear layer with or without others behind it."""
    static = draw(st.booleans())
    layers = [conv("stem", in_size=(8, 8), out_size=(8, 8), input_bits=8, static=static)]
    stream, side = ("stem",), 8
    for i in range(draw(st.integers(0, 3))):
        read = side
        if side > 2 and draw(st.booleans()):  # pooled on the way
            read = side // 2
        down = read > 2 and draw(st.booleans())
        side = read // 2 if down else read
        a, b = f"{i}a", f"{i}b"
        kernel = draw(st.sampled_from([1, 3]))
        sizes = {"in_size": (read, read), "out_size": (side, side)}
        runs = draw(st.tuples(*[st.sampled_from([1, 1, 1, 2, 3])] * 2))
        groups = draw(st.sampled_from([1, 64]))
        layers.append(conv(a, after=stream, kernel=kernel, runs=runs[0], groups=groups, **sizes))
        sides = {"in_size": (side, side), "out_size": (side, side)}
        layers.append(conv(b, after=(a,), runs=runs[1], **sides))
        if side != layers[-3].out_size[0] or draw(st.booleans()):
            layers.append(conv(f"{i}s", after=stream, kernel=1, input_bits=4, **sizes))
            stream = (b, f"{i}s")
        else:
            stream = (*stream, b)
    layers.append(
        conv(
            "linear",
            kernel=1,
            in_size=(side, side),
            out_size=(1, 1),
            linear=True,
            input_bits=None,
            after=stream,
        )
    )
    one = {"kernel": 1, "in_size": (1, 1), "out_size": (1, 1)}
    if draw(st.booleans()):
        layers.append(conv("behind", after=("linear",), **one))
    if draw(st.booleans()):
        before = layers[-1].name
        layers.append(conv("last", linear=True, input_bits=None, after=(before,), **one))
    return net(*layers, time_steps=draw(st.integers(1, 4)))


def row_times(network: LayerList, pixel_time: dict[str, float]) -> dict[str, float]:
    return {x.name: x.out_size[1] * pixel_time[x.name] for x in network.layers}


@settings(deadline=None, max_examples=150)
@given(graphs(), st.data())
def test_the_schedule_is_that_of_a_simulation_of_events(network, data):
    times = {x.name: float(data.draw(st.integers(1, 9))) for x in network.layers}
    found = schedule(network, row_times(network, times))
    (expected,) = simulated(network, times)
    assert {name: (x.start, x.finish) for name, x in found.items()} == expected


@settings(deadline=None, max_examples=50)
@given(graphs(), st.data())
def test_images_follow_as_soon_as_the_busiest_layer_is_free(network, data):
    times = {x.name: float(data.draw(st.integers(1, 9))) for x in network.layers}
    found = schedule(network, row_times(network, times))
    runs = simulated(network, times, images=40)
    ends = [max(finish for _, finish in run.values()) for run in runs]
    assert ends[-1] - ends[-2] == max(x.busy for x in found.values())


@settings(deadline=None, max_examples=100)
@given(graphs(), st.data())
def test_another_timestep_takes_time_but_no_more_than_all_layers_one_by_one(network, data):
    times = {x.name: float(data.draw(st.integers(1, 9))) for x in network.layers}
    ends = []
    for steps in (network.time_steps, network.time_steps + 1):
        found = schedule(replace(network, time_steps=steps), row_times(network, times))
        ends.append(max(x.finish for x in found.values()))
    rows = row_times(network, times)
    added = sum(x.out_size[0] * x.runs * rows[x.name] for x in network.layers)
    assert 0 <= ends[1] - ends[0] <= added


def test_a_layer_of_one_timestep_does_not_wait_for_the_whole_plane():
    found = schedule(chain(conv("a"), conv("b")), {"a": 4.0, "b": 1.0})
    assert found["b"].rows.tolist() == [9, 13, 17, 18]


def chain(*layers: Layer, **more) -> LayerList:
    named = [replace(x, after=(layers[i - 1].name,) if i else ()) for i, x in enumerate(layers)]
    return net(*named, **more)


def test_two_layers_by_hand():
    # Rows of a take 4, of b 1: b's row y waits for a's row y + 1, its last one for the last.
    network = chain(conv("a"), conv("b"), time_steps=2)
    found = schedule(network, {"a": 4.0, "b": 1.0})
    assert found["a"].rows.tolist() == [4, 8, 12, 16, 20, 24, 28, 32]
    assert found["b"].rows.tolist() == [9, 13, 17, 18, 25, 29, 33, 34]
    assert (found["b"].start, found["b"].finish, found["b"].busy) == (8, 34, 8)
    # The other way round b is never without work once it has begun.
    found = schedule(network, {"a": 1.0, "b": 4.0})
    assert found["b"].rows.tolist() == [2 + 4 * i for i in range(1, 9)]


def test_a_static_stem_is_computed_once_and_a_classifier_waits_for_all_timesteps():
    stem = conv("stem", input_bits=8, static=True)
    network = chain(stem, conv("a"), conv("c", linear=True, kernel=1, out_size=(1, 1)))
    found = schedule(replace(network, time_steps=3), {"stem": 2.0, "a": 1.0, "c": 1.0})
    assert found["stem"].busy == 8
    assert found["a"].rows.tolist() == [5, 7, 9, 10, *range(11, 19)]
    assert found["c"].start == 18


def test_the_critical_path_goes_through_the_branch_that_is_waited_for():
    stem, long, short = conv("stem"), conv("long", after=("stem",)), conv("short", after=("stem",))
    network = net(stem, long, short, conv("last", after=("long", "short")))
    of_rows = {"stem": 1.0, "long": 5.0, "short": 1.0, "last": 1.0}
    assert critical_path(network, schedule(network, of_rows)) == ("stem", "long", "last")
    of_rows |= {"long": 1.0, "short": 5.0}
    assert critical_path(network, schedule(network, of_rows)) == ("stem", "short", "last")


@pytest.mark.parametrize("clk_mhz", [100.0, 250.0])
def test_a_layers_time_is_its_pixels_bits_turns_and_adc_bits(clk_mhz):
    # 64 columns of 4-bit weights in 8 turns of an ADC of 6 bits, behind a clock of settling.
    network = net(conv("a", input_bits=2, out_size=(4, 2), in_size=(4, 2)), time_steps=3)
    found = estimate(network, Chip(adc_bits=6, clk_mhz=clk_mhz))
    assert found.layers[0]["busy_ns"] == pytest.approx(3 * 4 * 2 * 2 * (1 + 8 * 6) * 1000 / clk_mhz)
    assert found.total["frames_per_second"] == pytest.approx(1e9 / found.total["delay_ns"])
    # Of 10 output channels an ADC has at most two columns to read.
    few = net(conv("a", out_channels=10))
    assert estimate(few, Chip(clk_mhz=clk_mhz)).total["delay_ns"] == pytest.approx(
        16 * (1 + 2 * 5) * 1000 / clk_mhz
    )
