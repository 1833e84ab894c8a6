"""What cells conduct: each law against its closed form, and a device against the model published of
it."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import refused
from runtime.errors import UserError
from spikesim_eval.__main__ import main
from spikesim_eval.cells import Cells
from spikesim_eval.chip import TIMES, Chip, options_of, seconds
from spikesim_eval.crossbar import CrossbarLayer, Images
from spikesim_eval.layer_list import Layer, LayerList
from spikesim_eval.technology import DEFAULT, load_technology
from test_nonideal import exact, random_layer

PCM = load_technology("spikesim-65nm-pcm")
MANY = 200_000  # cells of a level: their mean is known to a 450th of their deviation


def drifting(mean, deviation=0.0, start=1.0):
    """The default technology with this law of drift and no 1/f noise."""
    law = {"drift": mean, "drift_deviation": deviation, "drift_start_s": start}
    return DEFAULT.with_values({f"device.{key}": value for key, value in law.items()})


def flickering(law: str, reading: float = 1e-6):
    """A technology that drifts the same everywhere, with this law of 1/f noise."""
    return drifting(0.05).with_values({"device.flicker": law, "device.flicker_read_s": reading})


def written(level: int, chip: Chip, seed: int = 0, many: int = MANY) -> torch.Tensor:
    """So many cells of this level, of weights of 5 bits: 16 levels in a cell of 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    return Cells(5, chip).programmed(torch.full((many,), level), generator).double()


def check_moments(cells: torch.Tensor, mean: float, deviation: float) -> None:
    """Within five of a sample's own deviations, of normal numbers."""
    assert cells.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(len(cells)))
    assert cells.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * len(cells)))


NOTHING = {
    "written and read": {
        "programming": "0",
        "read_noise": 1e-9,
        "read_floor": 1e-9,
        "level_conductances": "0,1",
    },
    "aged": {"technology": drifting(0.0), "after": "100y"},
    "many levels": {"level_conductances": ",".join(str(i / 15) for i in range(16))},
}


@pytest.mark.parametrize("columns", ["differential", "offset"])
@pytest.mark.parametrize("what", NOTHING)
def test_laws_without_strength_give_the_integer_convolution_bit_for_bit(what, columns):
    chip = Chip(xbar_size=8, adc_bits=8, columns=columns, **NOTHING[what])
    for case in ({}, {"weight_bits": 5, "shape": (5, 20, 3, 3)}, {"weight_bits": 8}):
        layer, codes, x = random_layer(chip, **case)
        assert torch.equal(layer(x), exact(codes, x))


@pytest.mark.parametrize("level", [0, 7, 15])
def test_cells_are_stuck_whatever_their_level_as_often_as_said(level):
    options = {"stuck_on": 0.09, "stuck_off": 0.02, "on_off_ratio": 10.0, "sigma": 0.1}
    cells = written(level, Chip(technology=drifting(0.1), after="1y", **options))
    for at, share in ((15 + 15 / 9, 0.09), (15 / 9, 0.02)):  # neither off target nor drifted
        found = (cells == torch.tensor(at).float()).double().mean().item()
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / MANY))
    assert torch.equal(cells, written(level, Chip(technology=drifting(0.1), after="1y", **options)))


def test_all_cells_stuck_are_a_crossbar_of_one_level():
    for options, level in (({"stuck_on": 1.0}, 15), ({"stuck_off": 1.0}, 0)):
        assert set(written(5, Chip(**options), many=1000).tolist()) == {level}


@pytest.mark.parametrize("adc_bits", [None, 8])
@pytest.mark.parametrize("options", [{"stuck_on": 1.0}, {"stuck_off": 1.0}])
def test_a_layer_of_stuck_cells_forgets_its_weights(options, adc_bits):
    """Also where what the cells conduct is whole and no ADC clips: differences of equal columns are
    0, an offset is subtracted from one and the same weight everywhere."""
    same = {"xbar_size": 8, "adc_bits": adc_bits} | options
    layer, _, x = random_layer(Chip(**same))
    assert not layer(x).any()
    layer, codes, x = random_layer(Chip(columns="offset", **same), weight_bits=4)
    weight = (15 if "stuck_on" in options else 0) - 7
    assert torch.equal(layer(x), exact(torch.full_like(codes, weight), x))


def test_whole_conductances_at_other_levels_are_no_weights():
    chip = Chip(xbar_size=8, cell_bits=2, level_conductances="0,0.3333333333333333,1,1")
    layer, codes, x = random_layer(chip, weight_bits=3)
    assert codes.abs().max() == 3
    moved = torch.where(codes.abs() == 2, codes.sign() * 3, codes)
    assert torch.equal(layer(x), exact(moved, x))


@pytest.mark.parametrize("level", [0, 1, 8, 15])
def test_the_error_of_writing_is_the_polynomial_of_the_target(level):
    law = (0.002, 0.03, -0.01)
    chip = Chip(programming=",".join(map(str, law)), on_off_ratio=4.0)
    highest = 15 + 5
    target, g = level + 5, (level + 5) / highest
    check_moments(written(level, chip), target, highest * (law[0] + law[1] * g + law[2] * g * g))


def test_what_writing_would_make_negative_is_0():
    """Half of a normal variable around 0: mean s/sqrt(2 pi), second moment s^2/2."""
    cells = written(0, Chip(programming="0.1"))
    assert cells.min() == 0
    spread = 1.5 * math.sqrt(1 / 2 - 1 / (2 * math.pi))
    assert cells.mean().item() == pytest.approx(
        1.5 / math.sqrt(2 * math.pi), abs=5 * spread / math.sqrt(MANY)
    )
    assert cells.square().mean().item() == pytest.approx(1.5**2 / 2, rel=0.02)


@pytest.mark.parametrize("after", ["20s", "1h", "1y"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.06, 0.0), (0.05, 0.02), (0.01, 0.03)])
def test_drift_has_the_mean_of_a_folded_normal_exponent(after, mean, deviation):
    """E[r^-|n|] of n ~ N(m, s^2), with L = ln r: the moment generating function of a folded normal
    distribution at -L."""
    ratio = math.log((seconds(after) + 20) / 20)
    chip = Chip(technology=drifting(mean, deviation, 20.0), after=after)
    found = written(12, chip) / 12
    if not deviation:
        torch.testing.assert_close(found, torch.full_like(found, math.exp(-mean * ratio)))
        return

    def moment(power: float) -> float:
        below = torch.special.ndtr(torch.tensor([x / deviation for x in (mean, -mean)]).double())
        half = (deviation * ratio * power) ** 2 / 2
        shift = deviation * ratio * power
        ends = torch.special.ndtr(torch.tensor([mean, -mean]).double() / deviation - shift)
        assert below.sum().item() == pytest.approx(1)
        up, down = (math.exp(half + sign * mean * ratio * power) for sign in (-1, 1))
        return (up * ends[0] + down * ends[1]).item()

    spread = math.sqrt(moment(2) - moment(1) ** 2)
    assert found.mean().item() == pytest.approx(moment(1), abs=5 * spread / math.sqrt(MANY))
    assert found.std().item() == pytest.approx(spread, rel=0.03)


def test_drift_begins_with_what_was_written_and_only_goes_on():
    chips = [Chip(technology=drifting(0.05, 0.02, 20.0), after=x) for x in ("1e-6s", "1h", "1y")]
    first, hour, year = (written(9, chip, many=1000) for chip in chips)
    at_once = written(9, Chip(technology=drifting(0.05, 0.02, 20.0), after="0s"), many=1000)
    assert torch.equal(at_once, torch.full_like(at_once, 9))
    assert first.numpy() == pytest.approx(9, rel=1e-6)
    assert (first > hour).all()
    assert (hour > year).all()


def published_pcm(
    target_us: torch.Tensor, seconds: float, generator: torch.Generator
) -> torch.Tensor:
    """aihwkit's PCMLikeNoiseModel as its documentation and source state it, in uS of 25, written
    from its formulas: programming noise, then drift by an exponent of the target, then 1/f."""

    def normal() -> torch.Tensor:
        return torch.randn(target_us.shape, generator=generator, dtype=torch.float64)

    relative = target_us / 25
    programmed = target_us + (0.26348 + 1.9650 * relative - 1.1731 * relative**2) * normal()
    programmed = programmed.clamp(min=0)
    logs = relative.clamp(min=1e-7).log()
    nu = (-0.0155 * logs + 0.0244).clamp(0.049, 0.1)
    nu = (nu + (-0.0125 * logs - 0.0059).clamp(0.008, 0.045) * normal()).abs()
    age = seconds + 20
    drifted = programmed * (age / 20) ** -nu
    q = (0.0088 / ((programmed / 25) ** 0.65).clamp(min=1e-3)).clamp(max=0.2)
    noise = q * math.sqrt(math.log((age + 250e-9) / (2 * 250e-9)))
    return (drifted + drifted * noise * normal()).clamp(min=0)


@pytest.mark.parametrize("after", ["1s", "1h", "1y"])
@pytest.mark.parametrize("level", [0, 1, 5, 15])
def test_pcm_cells_are_those_of_the_published_model(level, after):
    """Quantiles of the whole distribution, in uS; its 1/f noise and drift at this age included."""
    chip = Chip(**options_of(PCM), after=after)
    found = written(level, chip) * 25 / 15
    generator = torch.Generator().manual_seed(1)
    target = torch.full((MANY,), level * 25 / 15, dtype=torch.float64)
    expected = published_pcm(target, seconds(after), generator)
    at = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]).double()
    places = (at * MANY).long()
    ordered, ours = expected.sort().values, found.sort().values
    for share, place in zip(at.tolist(), places.tolist(), strict=True):
        slack = int(6 * math.sqrt(MANY * share * (1 - share)))
        assert ordered[max(0, place - slack)] - 1e-6 <= ours[place] <= ordered[place + slack] + 1e-6
    assert found.mean().item() == pytest.approx(expected.mean().item(), rel=0.01)
    assert found.std().item() == pytest.approx(expected.std().item(), rel=0.02)


def test_levels_that_are_not_equidistant_add_what_the_table_says():
    table = [0, 0.1, 0.3, 1]
    chip = Chip(cell_bits=2, level_conductances=",".join(map(str, table)), on_off_ratio=4.0)
    cells = Cells(3, chip).programmed(torch.arange(4))
    torch.testing.assert_close(cells, 3 * torch.tensor(table) + 1)
    # of a weight of 2 bits a cell has the two levels at the ends, of one of 4 bits those between
    assert Cells(2, chip).programmed(torch.arange(2)).tolist() == pytest.approx([1 / 3, 4 / 3])
    chip = Chip(cell_bits=3, level_conductances="0,0.1,0.3,1")
    halfway = Cells(4, chip).programmed(torch.arange(8)) / 7
    places = [3 * level / 7 for level in range(8)]
    assert halfway.tolist() == pytest.approx(np.interp(places, range(4), table).tolist())


def one_column(chip: Chip, codes: list[int], input_bits: int = 1, seed: int = 0) -> CrossbarLayer:
    weights = torch.tensor(codes)[None, :, None, None]
    layer = Layer("a", 1, len(codes), 1, (1, 1), (1, 1), input_bits, ())
    network = LayerList(1, 5, 32, (layer,), ())
    generator = torch.Generator().manual_seed(seed)
    return CrossbarLayer(weights, layer, network, chip, generator=generator)


def test_read_noise_is_new_at_every_read_and_plane_and_has_the_cells_deviation():
    codes = [15, 8, 3, 1]
    chip = Chip(read_noise=0.02, adc_bits=None)
    layer = one_column(chip, codes, input_bits=2)
    x = torch.tensor([1.0, 3.0, 0.0, 2.0])[None, :, None, None].repeat(20_000, 1, 1, 1)
    sums = layer(x).double().flatten()
    # each plane of bits is a read: 15 and 8 in the first, twice 8 and 1 in the second
    variance = 0.02**2 * (15**2 + 8**2 + 4 * (8**2 + 1**2))
    check_moments(sums, 15 + 3 * 8 + 2, math.sqrt(variance))
    assert not torch.equal(layer(x), sums.float()[:, None, None, None])
    assert torch.equal(one_column(chip, codes, 2)(x).double().flatten(), sums)
    assert not torch.equal(one_column(chip, codes, 2, seed=1)(x).double().flatten(), sums)


def test_read_noise_is_that_of_cells_drawn_one_by_one():
    """Against a crossbar whose every cell is drawn anew for every read."""
    codes, relative, many = torch.tensor([15.0, 8, 3, 1]).double(), 0.05, 50_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(many, 4, generator=generator, dtype=torch.float64)
    drawn = (codes * (1 + relative * noise)).sum(dim=1)
    layer = one_column(Chip(read_noise=relative, adc_bits=None), [15, 8, 3, 1])
    sums = layer(torch.ones(many, 4, 1, 1)).double().flatten()
    assert sums.std().item() == pytest.approx(drawn.std().item(), rel=0.02)
    at = torch.tensor([0.05, 0.5, 0.95]).double()
    torch.testing.assert_close(sums.quantile(at), drawn.quantile(at), rtol=0.003, atol=0)


def test_a_floor_of_read_noise_is_that_of_cells_drawn_one_by_one():
    """Also those that are off have it, here all of the negative columns, whose sums the ADC does
    not read below 0."""
    codes, share, relative, many = torch.tensor([15.0, 8, 3, 1]).double(), 0.01, 0.02, 50_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, many, 4, generator=generator, dtype=torch.float64)
    deviation = ((relative * codes).square() + (15 * share) ** 2).sqrt()
    negative = (15 * share * noise[1]).sum(dim=1).clamp_min(0)
    drawn = (codes + deviation * noise[0]).sum(dim=1) - negative
    chip = Chip(read_noise=relative, read_floor=share, adc_bits=None)
    sums = one_column(chip, [15, 8, 3, 1])(torch.ones(many, 4, 1, 1)).double().flatten()
    # of 2 columns of 4 cells: the mean of what is positive of n is 1 / sqrt(2 pi)
    floor = 15 * share * 2
    mean = 27 - floor / math.sqrt(2 * math.pi)
    squares = (relative * codes).square().sum().item() + floor**2
    deviation = math.sqrt(squares + floor**2 * (1 / 2 - 1 / (2 * math.pi)))
    check_moments(drawn, mean, deviation)
    check_moments(sums, mean, deviation)
    at = torch.tensor([0.05, 0.5, 0.95]).double()
    torch.testing.assert_close(sums.quantile(at), drawn.quantile(at), rtol=0.003, atol=0)


def test_a_floor_of_read_noise_grows_with_the_rows_that_are_driven():
    layer = one_column(Chip(read_floor=0.01, adc_bits=None, columns="offset"), [15, 8, 3, 1])
    x = torch.ones(50_000, 4, 1, 1)
    x[:, 1:] = 0
    one = layer(x).std().item()
    assert layer(torch.ones_like(x)).std().item() == pytest.approx(2 * one, rel=0.02)
    assert not layer(torch.zeros_like(x)).any()


def test_read_noise_of_an_image_is_new_at_every_timestep_and_the_same_whenever_it_is_read():
    layer = one_column(Chip(read_noise=0.1, adc_bits=None), [15, 8, 3, 1])
    network = nn.Identity()
    layer.images = Images(network)
    images = torch.rand(4000, 1)
    network(images)
    at = layer(torch.ones(3 * len(images), 4, 1, 1)).view(3, -1)
    check_moments(at.flatten().double(), 27, 0.1 * math.sqrt(15**2 + 8**2 + 3**2 + 1))
    others = torch.corrcoef(at)[[0, 0, 1], [1, 2, 2]]
    assert others.abs().max() < 5 / math.sqrt(len(images))
    network(images[7:9])
    assert torch.equal(layer(torch.ones(6, 4, 1, 1)).view(3, 2), at[:, 7:9])


def test_an_adc_of_noisy_sums_neither_reads_below_0_nor_above_its_range():
    layer = one_column(Chip(read_noise=3.0, adc_bits=3), [1])
    assert set(layer(torch.ones(5000, 1, 1, 1)).flatten().tolist()) == set(map(float, range(8)))


@given(st.sampled_from(sorted(TIMES)), st.floats(1e-3, 90))
def test_times_have_units(unit, value):
    assert seconds(f"{value!r}{unit}") == pytest.approx(value * TIMES[unit])


MISTAKES = {
    "--programming=-0.1": "programming is a deviation, and must be at least 0",
    "--programming 0.1,-0.2": "for all g from 0 to 1, got '0.1,-0.2'",
    "--read_floor=-0.1": "read_floor must be a number from 0 to 10",
    "--after 1h": "spikesim-65nm does not say how its cells drift (device.drift",
    "--after 1h --set device.drift=0.05 --set device.drift_start_s=1": "device.drift_deviation",
    "--technology spikesim-65nm-pcm --after 1": "a time with its unit (s, min, h, d, y)",
    "--technology spikesim-65nm-pcm --after=-1h": "at most 100y, as 1h, got '-1h'",
    "--technology spikesim-65nm-pcm --after 1000y": "at most 100y",
    "--technology spikesim-65nm-pcm --set device.drift=a": "device.drift must be 1 or 4 numbers",
    "--technology spikesim-65nm-pcm --set device.drift=1,2": "device.drift must be 1 or 4 numbers",
    "--technology spikesim-65nm-pcm --set device.drift_start_s=0": "from 1e-15 to 1e+15, in s",
    "--set device.flicker=0.1,0,1": "write it as device.flicker_read_s=...",
    "--set device.drift=0.1,0,0.3,0.2": "c of at least 0 and d of at least c",
    "--set device.drift_deviation=-0.1": "give a number of at least 0",
    "--programming 0,1e300": "programming must be",
    "--set device.drit=1": "did you mean device.drift?",
    "--stuck_on 0.6 --stuck_off 0.6": "are more than all",
    "--stuck_on 1.1": "stuck_on",
    "--stuck_off=-0.1": "stuck_off",
    "--read_noise nan": "read_noise",
    "--programming 0.1,x": "programming must be 1 to 9 numbers, as 0.1,0.2, got '0.1,x'",
    "--programming inf": "programming",
    "--level_conductances 0,0.5": "must rise from 0 to 1",
    "--level_conductances 0,0.7,0.5,1": "must rise from 0 to 1",
    "--level_conductances 1": "level_conductances must be 2 to 256 numbers",
    "--over sigma": "--over must be as sigma=0.05,0.1,0.2, of one of sigma, ",
    "--over adc_bits=4,5": "got 'adc_bits=4,5'",
    "--over sigma=0.1,x": "--over sigma must be numbers, got 'x'",
    "--over sigma=0.1,-1": "sigma must be",
    "--over after=1h": "does not say how its cells drift",
    "--technology spikesim-65nm-pcm --over after=1h,2": "a time with its unit",
    "--set device.flicker=0.1,0,1 --set device.flicker_read_s=1e-6": "device.drift (mean exponent",
    "--max_drop -1": "max_drop",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_read(mistake, tmp_path, capsys):
    line = f"nonideal --checkpoint not_read.pth --out {tmp_path / 'out'} {mistake}"
    error = refused(capsys, main, line.split())
    assert MISTAKES[mistake] in error, error
    assert not (tmp_path / "out").exists()


HEAD = 'like = "spikesim-65nm"\n[sources]\nmine = "mine"\n[device]\n'
IN_FILES = {
    'drift = { value = 0.05, source = "mine" }': "device.drift_deviation .* missing beside the",
    'flicker = { value = "1,2", source = "mine" }': "device.flicker must be 3 numbers",
    'flicker = { value = [1, 2, 3], source = "mine" }': "device.flicker must be 3 numbers",
    'flicker = { value = "0,1,-1", source = "mine" }': "a and c must be at least 0",
    'stuck_on = { value = 2, source = "mine" }': "device.stuck_on: stuck_on must be",
    'stuck_on = { value = -1, source = "mine" }': "device.stuck_on is -1: give 0, or a number",
    'read_noise = { value = 0.1, unit = "S", source = "mine" }': "has the unit 'S': it has none",
    'programming = { value = "0,,1", source = "mine" }': "programming must be 1 to 9 numbers",
    'drift_end_s = { value = 1, unit = "s", source = "mine" }': "unknown key 'device.drift_end_s'",
}


@pytest.mark.parametrize("mistake", IN_FILES)
def test_a_mistake_in_a_files_device_is_one_line(mistake, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(f"{HEAD}{mistake}\n")
    with pytest.raises(UserError) as caught:
        options_of(load_technology(str(path)))
    assert "\n" not in str(caught.value)
    assert "own.toml" in str(caught.value)
    assert re.search(IN_FILES[mistake], str(caught.value)), caught.value


def test_a_technology_says_what_its_cells_do_where_its_chip_does_not(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(f'{HEAD}read_noise = {{ value = 0.01, source = "mine" }}\n')
    own = load_technology(str(path))
    assert Chip(**options_of(own)).read_noise == 0.01
    assert Chip(**options_of(own) | {"read_noise": 0.0}).read_noise == 0
    assert Chip(**options_of(PCM)).programming == PCM["device.programming"]
    assert not any(Chip(**options_of(DEFAULT)).ideal.options("simulation").get(x) for x in NOISES)
    assert not Chip(**options_of(PCM), after="1h").ideal.is_random


CERTAIN = {
    "no noise": {},
    "programming": {"programming": "0,0"},
    "drift": {"technology": drifting(0.05), "after": "1h"},
    "drift, limits": {"technology": drifting("0.1,0.1,0,1", "0.1,0.1,0,0"), "after": "1h"},
    "flicker": {"technology": flickering("0,-0.65,0.2"), "after": "1h"},
    "all on": {"stuck_on": 1.0, "sigma": 0.1},
    "all off": {"stuck_off": 1.0, "programming": "0.1"},
}
DRAWN = {
    "variation": {"sigma": 1e-3},
    "programming": {"programming": "0,0.1"},
    "drift": {"technology": drifting(0.05, 0.01), "after": "1h"},
    "drift, limits": {"technology": drifting(0.05, "0.1,0.1,0,1"), "after": "1h"},
    "flicker": {"technology": flickering("0.1,-0.65,0.2"), "after": "1h"},
    "some on": {"stuck_on": 0.1},
    "some on, others off": {"stuck_on": 0.5, "stuck_off": 0.5},
}


def test_in_less_time_than_a_read_takes_no_flicker_adds_up():
    long = written(9, Chip(technology=flickering("0.1,-0.65,0.2", 1e6), after="1h"))
    assert torch.equal(long, written(9, Chip(technology=drifting(0.05), after="1h")))


@pytest.mark.parametrize("factor", [0.0, 0.0088])
def test_a_cell_that_conducts_nothing_does_not_flicker(factor):
    chip = Chip(technology=flickering(f"{factor},-0.65,0.2"), after="1h")
    assert not written(0, chip).any()


@pytest.mark.parametrize("case", CERTAIN)
def test_chips_that_cannot_differ_are_not_random(case):
    chip = Chip(**CERTAIN[case])
    assert torch.equal(written(9, chip, many=1000), written(9, chip, seed=1, many=1000))
    assert not chip.is_random


@pytest.mark.parametrize("case", DRAWN)
def test_chips_that_differ_are_random(case):
    chip = Chip(**DRAWN[case])
    assert not torch.equal(written(9, chip, many=1000), written(9, chip, seed=1, many=1000))
    assert chip.is_random
    assert Chip(**DRAWN[case] | {"read_noise": 0.1}).is_random
    assert Chip(**DRAWN[case] | {"read_floor": 0.1}).is_random


NOISES = (
    "sigma",
    "programming",
    "after",
    "stuck_on",
    "stuck_off",
    "read_noise",
    "read_floor",
    "wire_ohm",
)
