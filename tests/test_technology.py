"""Technology files: what the parts of a chip cost, and every mistake in them as one line."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from conftest import read_csv, refused, reported
from experiments import against_the_field
from runtime.errors import UserError
from spikesim_eval.__main__ import main
from spikesim_eval.chip import Chip, chips, options_of
from spikesim_eval.estimate import estimate
from spikesim_eval.layer_list import LayerList, Subject
from spikesim_eval.nonideal import on_chip
from spikesim_eval.sweep import sweep
from spikesim_eval.technology import DEFAULT, FOLDER, load_technology, presets
from spikesim_eval.technology_keys import KEYS
from spikesim_eval.trace import trace_checkpoint

ROOT = Path(__file__).parent.parent
LAYERS = re.findall(r"```json\n(.*?)```", (ROOT / "docs/layer_list.md").read_text(), re.DOTALL)[0]
NETWORK = LayerList.from_json(json.loads(LAYERS))
HEAD = 'like = "spikesim-65nm"\n[sources]\nmine = "measured in May"\n'


NEEDED = [name for name, key in KEYS.items() if not key.optional]


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.toml"
    path.write_text(HEAD + text)
    return str(path)


@pytest.mark.parametrize("name", presets())
def test_every_value_of_a_preset_has_its_unit_and_a_source(name):
    technology = load_technology(name)
    assert set(NEEDED) <= set(technology.entries)
    for row in technology.rows():
        assert row["unit"] == KEYS[f"{row['table']}.{row['name']}"].unit
        assert len(row["source"]) > 10, row
    found = estimate(NETWORK, Chip(**options_of(technology)))
    assert found.total["energy_pj"] > 0
    assert all(value >= 0 for value in found.energy_by_component.values())


def test_the_default_technology_says_what_a_chip_is_by_default():
    assert Chip(**options_of(load_technology("spikesim-65nm")) | {"technology": DEFAULT}) == Chip()


def test_a_value_is_charged_where_it_happens_and_nowhere_else():
    own = estimate(NETWORK, Chip(noc="mesh"))
    for key in NEEDED:
        section, _, name = key.partition(".")
        if name != "energy_pj" or not DEFAULT[key]:
            continue
        changed = DEFAULT.with_values({key: 3 * DEFAULT[key]})
        found = estimate(NETWORK, Chip(technology=changed, noc="mesh"))
        moved = {x for x, y in found.energy_by_component.items() if y != own.energy_by_component[x]}
        users = {
            "cell": {"crossbar"},
            "tile_read": {"tile_buffer"},
            "read": {"membrane", "stream", "kept_sums"},
            "write": {"membrane", "stream", "kept_sums", "input_buffer"},
            "add_bit": {"shift_add", "batch_norm"},
            "multiply_bit": {"batch_norm"},
        }
        assert moved <= users.get(section, {section}), key
        unseen = ("read", "multiply_bit", "dram", "cell_write")  # nothing is loaded here
        assert moved or section in unseen, key


def test_a_driven_row_is_charged_in_every_crossbar_that_it_runs_through():
    """A 1x1 layer of 64 inputs on differential crossbars of 64 columns with one-cell weights."""
    layer = {"kernel": 1, "in_channels": 64, "out_channels": 150, "in_size": [4, 4]}
    layer |= {"name": "a", "out_size": [4, 4], "input_bits": 1, "after": [], "spike_rate": 0.25}
    network = {"time_steps": 1, "weight_bits": 4, "membrane_bits": 4, "layers": [layer], "lif": []}
    technology = DEFAULT.with_values({"driver.energy_pj": 1.0, "cell.energy_pj": 0.0})
    found = estimate(LayerList.from_json(network), Chip(technology=technology))
    # 16 pixels, a quarter of 64 rows, 3 crossbars side by side, twice
    assert found.energy_by_component["crossbar"] == pytest.approx(16 * 16 * 3 * 2)


def test_a_flash_converts_in_the_same_time_whatever_its_bits():
    flash = DEFAULT.with_values({"adc.kind": "flash", "adc.clocks": 1})
    delays = {
        kind: [
            estimate(NETWORK, Chip(technology=x, adc_bits=bits)).total["delay_ns"]
            for bits in (4, 8)
        ]
        for kind, x in (("sar", DEFAULT), ("flash", flash))
    }
    assert delays["flash"][0] == delays["flash"][1] < delays["sar"][0] < delays["sar"][1]


def test_sram_crossbars_leak_by_their_area_and_hold_one_bit_a_cell():
    sram = DEFAULT.with_values({"cell.kind": "SRAM"})
    rram, found = (estimate(NETWORK, Chip(technology=x, cell_bits=1)) for x in (DEFAULT, sram))
    more = rram.area_by_component["crossbar"] * DEFAULT["leakage.lstp_mw"]
    assert found.total["leakage_mw"] - rram.total["leakage_mw"] == pytest.approx(more)
    with pytest.raises(UserError, match="an SRAM cell has 1 bit"):
        Chip(technology=sram)


@pytest.mark.parametrize("celsius", [27.0, 77.0])
def test_drivers_leak_in_every_crossbar_and_cells_as_the_technology_says(celsius):
    def leakage(**values: float) -> float:
        said = {f"{x.replace('_', '.', 1)}": y for x, y in values.items()}
        chip = Chip(technology=DEFAULT.with_values(said), celsius=celsius)
        return estimate(NETWORK, chip).total["leakage_mw"]

    chip = Chip(celsius=celsius)
    total = estimate(NETWORK, chip).total
    crossbars = total["tiles"] * chip.pe_per_tile * chip.crossbars_per_pe
    of_drivers = crossbars * 64 * 0.5 * chip.leakage_mw_per_um2
    assert leakage(driver_area_um2=0.5) - total["leakage_mw"] == pytest.approx(of_drivers)
    of_cells = crossbars * 64 * 64 * 1e-6 * chip.leakage_growth
    assert leakage(cell_leakage_mw=1e-6) - total["leakage_mw"] == pytest.approx(of_cells)
    assert (chip.leakage_growth == 1) == (celsius == 27)


# CACTI 7, tech_params/65nm.dat: A/um through transistors that are off at 300, 350 and 400 K (its
# rows 0, 50 and 100), A/um through their gates at any, V, and, of cells alone at 300 K, W/KB.
CACTI = {
    "hp": ((1.96e-7, 3.95e-7, 6.3e-7), 4.09e-8, 1.1, 641e-6),
    "lstp": ((9.12e-12, 8.05e-11, 3.21e-10), 1.09e-10, 1.2, 0.35e-6),
    "lop": ((4.9e-9, 1.71e-8, 3.42e-8), 9.61e-9, 0.8, 29e-6),
}


@pytest.mark.parametrize("process", CACTI)
def test_warm_transistors_leak_as_their_currents_say(process):
    currents, gates, volt, power = CACTI[process]
    cold, *warm = (volt * (2463 * current + 2484 * gates) for current in currents)
    assert cold == pytest.approx(power, rel=0.01)
    at_27 = estimate(NETWORK, Chip(process=process))
    for celsius, leaks in zip((77.0, 127.0), warm, strict=True):
        found = estimate(NETWORK, Chip(process=process, celsius=celsius))
        leakage, before = found.total["leakage_mw"], at_27.total["leakage_mw"]
        assert leakage / before == pytest.approx(leaks / cold, rel=1e-3)
        more = (leakage - before) * found.total["delay_ns"]
        assert found.total["energy_pj"] - at_27.total["energy_pj"] == pytest.approx(more)
        assert found.area_by_component == at_27.area_by_component


def test_a_file_of_ones_own_changes_what_it_says(tmp_path, capsys):
    path = written(
        tmp_path,
        '[adc]\nenergy_pj = { value = 1, unit = "pJ", source = "mine", scaled = "by two" }\n'
        '[chip]\nxbar_size = { value = 128, unit = "cells", source = "mine" }\n',
    )
    layers = tmp_path / "net.json"
    layers.write_text(LAYERS)
    out = tmp_path / "out"
    report = reported(out, f"--layers {layers} --technology {path} --set cell.energy_pj=0")
    assert report["chip"]["technology"] == f"{path} with cell.energy_pj=0"
    assert report["chip"]["xbar_size"] == 128
    values = {f"{x['table']}.{x['name']}": x for x in report["constants"]}
    assert values["adc.energy_pj"]["source"] == "measured in May; by two"
    assert report["energy_by_component"]["crossbar"] == 0
    (chip,) = chips(technology=path, adc_bits=5)
    assert (
        report["energy_by_component"]["adc"] == estimate(NETWORK, chip).energy_by_component["adc"]
    )
    assert chip.xbar_size == 128


HUNDRED = '[chip]\nxbar_size = { value = 100, unit = "cells", source = "mine" }\n'
ADC = '[adc]\nenergy_pj = { value = 1, unit = "pJ", source = "mine" }\n'
MISTAKES = {
    ADC.replace("1,", "9" * 400 + ","): ["adc.energy_pj is 9999", "from 1e-15 to 1e+15, in pJ"],
    ADC.replace("1,", "9" * 5000 + ","): ["no TOML file"],
    ADC.replace("1,", "1e999,"): [
        "adc.energy_pj is inf",
        "give 0, or a number from 1e-15 to 1e+15",
    ],
    ADC.replace("1,", "1e-16,"): ["adc.energy_pj is 1e-16", "from 1e-15"],
    ADC.replace("1,", "[" * 5000): ["no TOML file"],
    "yours = 1\n": ["sources must be a table of texts"],
    'yours = " "\n': ["sources must be a table of texts that say where values are from"],
    ADC.replace("source", "scaled = 3, source"): ["adc.energy_pj: scaled must say", "got 3"],
    "[device]\n"
    + "".join(f'stuck_{x} = {{ value = 0.6, source = "mine" }}\n' for x in ("on", "off")): [
        "0.6 and 0.6 are more than all (what is not given is that of"
    ],
    "[adc.energy_pj.value]\nvalue = 1\n": ["adc.energy_pj has the unit ''"],
    ADC.replace("1,", "-1,"): ["adc.energy_pj is -1", "give 0, or a number from"],
    ADC.replace("1,", "nan,"): ["adc.energy_pj is nan", "give 0, or"],
    ADC.replace("1,", "true,"): ["adc.energy_pj is True", "give 0, or"],
    ADC.replace('"pJ"', '"nJ"'): ["adc.energy_pj has the unit 'nJ'", "give it in pJ"],
    ADC.replace("energy_pj", "energie_pj"): ["unknown key 'adc.energie_pj'", "adc.energy_pj?"],
    ADC.replace("[adc]", "[acd]"): ["unknown key 'acd.energy_pj'", "did you mean"],
    ADC.replace("value", "valeu"): ["adc.energy_pj must be written as"],
    ADC.replace("source", "sauce"): ["adc.energy_pj has an unknown key 'sauce'", "source?"],
    ADC.replace('"mine"', '"yours"'): ["adc.energy_pj has the source 'yours'", "(mine)"],
    ADC.replace(', source = "mine"', ""): ["adc.energy_pj has no source", "(mine)"],
    "[adc]\nenergy_pj = 1\n": ["adc.energy_pj must be written as", 'unit = "pJ"'],
    '[cell]\nkind = { value = "DRAM", source = "mine" }\n': ["cell.kind must be one of", "FeFET"],
    '[cell]\nbits = { value = 0, unit = "bit", source = "mine" }\n': [
        "cell.bits is 0",
        "give a number",
    ],
    '[adc]\nbits = { value = 4.5, unit = "bit", source = "mine" }\n': ["adc.bits must be a whole"],
    '[cell]\nkind = { value = "SRAM", source = "mine" }\n': ["SRAM", "cell.bits"],
    '[cell]\nbits = { value = 9, unit = "bit", source = "mine" }\n': ["cell.bits: cell_bits", "8"],
    '[chip]\ncolumns_per_adc = { value = 7, unit = "columns", source = "mine" }\n': ["is that of"],
    '[chip]\nxbar_size = { value = 4, unit = "cells", source = "mine" }\n': ["chip.xbar_size", "8"],
    "[adc\n": ["no TOML file", "line"],
    ADC.replace("pj", "by_bits"): ["adc.energy_by_bits is 1", "as { 4 = 0.8"],
    '[leakage]\nhp_by_celsius = { value = 2, unit = "mW", source = "mine" }\n': ["whole degrees"],
    '[leakage]\nhp_by_celsius = { value = {50 = 1, 90 = 2}, unit = "mW", source = "mine" }\n': [
        "of 50 to 90 degrees: it must hold 27"
    ],
    ADC.replace("pj", "by_bits").replace("1,", f"{{ 4 = 1, {'9' * 5000} = 2 }},"): ["numbers of"],
    ADC.replace("pj", "by_bits").replace("1,", "{ 8 = 2, 4 = 1 },"): [
        "adc.energy_by_bits is of '8, 4'",
        "the smallest first",
    ],
    ADC.replace("pj", "by_bits").replace("1,", "{ 4 = 0, 8 = 1 },"): ["numbers from 1e-15"],
    ADC.replace("pj", "by_bits").replace("1,", "{ 4 = 1, 8 = 1e-300 },"): ["numbers from 1e-15"],
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_in_a_file_is_one_line_with_file_key_and_remedy(mistake, tmp_path, capsys):
    path, layers = written(tmp_path, mistake), tmp_path / "net.json"
    layers.write_text(LAYERS)
    line = f"report --layers {layers} --technology {path} --out {tmp_path / 'out'}"
    error = refused(capsys, main, line.split())
    assert "own.toml" in error
    assert all(words in error for words in MISTAKES[mistake]), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", presets())
def test_a_sweep_prices_the_chips_of_a_technology_as_the_estimate_does(name):
    axes = {"adc_bits": [5, 6], "pe_per_tile": [8]}
    grid = list(chips(technology=name, **axes))
    columns = sweep([Subject("net", NETWORK)], grid[0], axes)
    for key in ("energy_pj", "edap_pj_ns_um2"):
        expected = [estimate(NETWORK, chip).total[key] for chip in grid]
        assert columns[key].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_sweep_over_cells_that_sram_has_not_is_refused(tmp_path, capsys):
    layers = tmp_path / "net.json"
    layers.write_text(LAYERS)
    line = f"sweep --layers {layers} --technology spikesim-65nm-sram --out {tmp_path / 'out'}"
    for cells in ("1,4", "4"):
        assert main(f"{line} --cell_bits {cells}".split()) == 2
        assert (
            "an SRAM cell has 1 bit: cell_bits (cell.bits in a file) must be 1, got 4"
            in capsys.readouterr().err
        )


def test_figures_are_in_proportion_to_what_the_parts_cost():
    """Ten times every energy and three times every area; leakage is by area."""
    chip = Chip(noc="mesh")
    times = {"energy_pj": 10, "area_um2": 3, "lstp_mw": 0}
    said = {x: DEFAULT[x] * times[x.split(".")[1]] for x in NEEDED if x.split(".")[1] in times}
    still = DEFAULT.with_values({"leakage.lstp_mw": 0})
    one = estimate(NETWORK, replace(chip, technology=still)).total
    many = estimate(NETWORK, replace(chip, technology=DEFAULT.with_values(said))).total
    assert many["energy_pj"] == pytest.approx(10 * one["energy_pj"])
    assert many["area_um2"] == pytest.approx(3 * one["area_um2"])
    assert many["delay_ns"] == one["delay_ns"]
    said["leakage.lstp_mw"] = DEFAULT["leakage.lstp_mw"]
    leaking = estimate(NETWORK, replace(chip, technology=DEFAULT.with_values(said))).total
    assert leaking["leakage_mw"] == pytest.approx(3 * estimate(NETWORK, chip).total["leakage_mw"])


def test_options_of_the_command_mend_what_a_file_alone_cannot_be(tmp_path):
    layers = tmp_path / "net.json"
    layers.write_text(LAYERS)
    for options in (
        "--set cell.kind=SRAM --cell_bits 1",
        "--set adc.bits=4.0",
        f"--technology {written(tmp_path, HUNDRED)} --columns_per_adc 10",
    ):
        assert reported(tmp_path / "out", f"--layers {layers} {options}")["total"]["energy_pj"] > 0


def test_a_word_that_is_no_section_is_an_unknown_key(tmp_path):
    (tmp_path / "own.toml").write_text('colour = "red"\n' + HEAD)
    with pytest.raises(UserError, match=r"own.toml: unknown key 'colour' \(sections: process, "):
        load_technology(str(tmp_path / "own.toml"))


def test_what_a_file_does_not_say_is_named(tmp_path):
    text = (FOLDER / "spikesim-65nm.toml").read_text()
    for key in NEEDED:
        section, name = key.split(".")
        without = re.sub(rf"(\[{section}\]\n(?:.+\n)*?){name} = .*\n", r"\1", text)
        assert without != text, key
        (tmp_path / "own.toml").write_text(without)
        with pytest.raises(UserError, match=rf"own.toml: {re.escape(key)} .* is missing"):
            load_technology(str(tmp_path / "own.toml"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--technology spikesim-66nm", ["no technology 'spikesim-66nm'", "did you mean"]),
        ("--set adc.energie_pj=1", ["unknown key 'adc.energie_pj'", "did you mean adc.energy_pj?"]),
        (f"--technology {'a' * 5000}", ["there is no technology 'aaa"]),
        ("--set chip.xbar_size=128", ["--set chip.xbar_size", "an option of its own, --xbar_size"]),
        ("--set chip.xbar_sise=128", ["unknown key 'chip.xbar_sise'"]),
        ("--set adc.energy_by_bits={4=1}", ['a file with like = "spikesim-65nm"']),
        ("--set adc.energy_pj=1 --set adc.energy_pj=2", ["says adc.energy_pj twice"]),
        (
            "--set cell.on_ohm=1e9",
            ["--set cell.on_ohm says how a chip is simulated: add --on_chip"],
        ),
        (
            "--set device.drift=1 --set device.drift_start_s=1 --set device.drift_deviation=0",
            ["add"],
        ),
        (f"--technology {FOLDER}", ["cannot read", "technologies'"]),
        ("--set process.node_nm=7", ["process.node_nm", "nothing is of it"]),
        ("--set adc.energy_pj=-1", ["adc.energy_pj is -1", "in pJ"]),
        ("--set adc.energy_pj", ["wants a key and a value"]),
        ("--technology isaac-32nm --celsius 85", ["leakage.lstp_by_celsius is missing"]),
        ("--celsius 151", ["celsius must be a number from 0 to 150"]),
        ("--celsius 20", ["celsius must be 27 to 127 on spikesim-65nm, got 20"]),
        ("--technology isaac-32nm --set adc.bits=12", ["adc.bits 12 is none of its tables"]),
        ("--celsius 85 --preset published", ["celsius goes with counted costs"]),
        ("--set adc.energy_pj=1 --preset published", ["leave --technology and --set out"]),
    ],
)
def test_a_mistake_in_the_options_is_one_line(options, words, tmp_path, capsys):
    layers = tmp_path / "net.json"
    layers.write_text(LAYERS)
    line = f"report --layers {layers} {options} --out {tmp_path / 'out'}"
    error = refused(capsys, main, line.split())
    assert all(word in error for word in words), error


def test_where_nothing_takes_energy_there_is_nothing_to_compare(tmp_path, capsys):
    layers, out = tmp_path / "net.json", tmp_path / "out"
    layers.write_text(LAYERS)
    none = " ".join(f"--set {x}=0" for x in NEEDED if x.endswith(("energy_pj", "lstp_mw")))
    for line in (
        f"report --layers {layers} --out {out}",
        f"compare {layers} {layers} --out {out}",
        f"sweep --layers {layers} --adc_bits 4,5 --out {out}",
        f"technologies --layers {layers}",
    ):
        error = refused(capsys, main, f"{line} {none}".split())
        assert "a network takes no energy there" in error
        assert "the leakage, a value above 0" in error


def test_pages_say_what_was_set_by_hand(tmp_path, capsys):
    layers, out = tmp_path / "net.json", tmp_path / "out"
    layers.write_text(LAYERS)
    by_hand = "spikesim-65nm with cell.kind=RRAM, adc.energy_pj=0.6"
    options = "--set adc.energy_pj=0.6 --set cell.kind=RRAM"
    report = reported(out, f"--layers {layers} {options}")
    assert report["chip"]["technology"] == by_hand
    assert main(f"compare {layers} {layers} {options} --out {out}".split()) == 0
    assert main(f"sweep --layers {layers} --adc_bits 4,5 {options} --out {out}".split()) == 0
    for page in ("compare.md", "compare.html", "sweep.html"):
        text = (out / page).read_text()
        assert f"Component figures are those of {by_hand} (SpikeSim, RRAM, 65 nm)" in text
        assert text.count(by_hand) == 2
    assert "<td>adc_bits</td><td>4, 5</td>" in (out / "sweep.html").read_text()


def test_a_file_may_be_of_windows_and_of_several_lines(tmp_path):
    """A byte order mark, and texts that would break a table."""
    path, source = tmp_path / "own.toml", '"""measured\nin May"""'
    text = HEAD.replace('"measured in May"', source) + ADC.replace(
        "source", 'scaled = """by\nhand""", source'
    )
    path.write_text('name = """of\nours"""\n' + text, encoding="utf-8-sig", newline="\r\n")
    technology = load_technology(str(path))
    assert technology.title == "of ours"
    (row,) = [x for x in technology.rows() if (x["table"], x["name"]) == ("adc", "energy_pj")]
    assert row["source"] == "measured in May; by hand"
    path.write_text("name = 5\n" + HEAD)
    with pytest.raises(UserError, match="name must be a text, got 5"):
        load_technology(str(path))


def test_a_chip_that_cannot_be_is_refused_before_a_network_is_measured(tmp_path, capsys):
    path = written(
        tmp_path, '[chip]\nxbar_size = { value = 63, unit = "cells", source = "mine" }\n'
    )
    line = f"technologies {path} --checkpoint {tmp_path / 'none.pth'}"
    assert "xbar_size must be a multiple" in refused(capsys, main, line.split())


def test_the_file_of_the_documentation_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/hardware.md").read_text(), re.DOTALL)
    (tmp_path / "doc.toml").write_text(text)
    (chip,) = chips(technology=str(tmp_path / "doc.toml"))
    assert (chip.cell_bits, chip.xbar_size, chip.technology.energy["adc"]) == (1, 128, 1.2)


def test_technologies_are_listed_with_what_a_network_costs_on_each(tmp_path, capsys):
    layers, out = tmp_path / "net.json", tmp_path / "out"
    layers.write_text(LAYERS)
    own = written(tmp_path, ADC)
    assert main(["technologies", "isaac-32nm", own]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(f"technologies --layers {layers} --out {out}".split()) == 0
    printed = capsys.readouterr().out
    rows = read_csv(out / "technologies.csv")
    assert [row["technology"] for row in rows] == presets()
    for row in rows:
        (chip,) = chips(technology=row["technology"])
        total = estimate(NETWORK, chip).total
        assert float(row["energy_pj"]) == total["energy_pj"]
        assert float(row["area_um2"]) == total["area_um2"]
        assert printed.count(f"\n{row['technology']} ") == 2
    page = (out / "technologies.md").read_text()
    assert page.count("isaac-32nm") == 3
    for key in NEEDED:
        assert f"| {key} | {KEYS[key].unit} | {load_technology(presets()[0])[key]} |" in page
    assert main(f"technologies --layers {layers} --set adc.energy_pj=2 --out {out}".split()) == 0
    assert "set by hand: adc.energy_pj = 2" in capsys.readouterr().out
    for row in read_csv(out / "technologies.csv"):
        technology = load_technology(row["technology"]).with_values({"adc.energy_pj": 2})
        total = estimate(NETWORK, Chip(**options_of(technology))).total
        assert float(row["energy_pj"]) == total["energy_pj"]


def test_a_network_is_simulated_on_the_chip_of_each_technology(tmp_path, capsys):
    checkpoint, out = ROOT / "tests/data/student-last.pth", tmp_path / "out"
    names = ["isaac-32nm", "spikesim-65nm"]
    line = f"technologies {' '.join(names)} --checkpoint {checkpoint} --on_chip --out {out}"
    assert main(f"{line} --test_images 90".split()) == 0
    rows = read_csv(out / "technologies.csv")
    subject = trace_checkpoint(str(checkpoint), test_images=90)
    for name, row in zip(names, rows, strict=True):
        (chip,) = chips(technology=name)
        assert [float(row["chip_accuracy_share"])] == on_chip(subject, chip)[0]
    assert main(f"technologies {names[0]} --on_chip".split()) == 2
    assert "--on_chip runs checkpoints" in capsys.readouterr().err


def test_the_page_has_what_the_command_against_the_field_prints():
    assert "\n".join(against_the_field.lines()) in (ROOT / "docs/hardware.md").read_text()


def test_the_published_parts_of_neurosim_add_up_to_what_it_prints():
    about = against_the_field.neurosim()
    energy, area = ([x.value for x in about.figures if x.unit == unit] for unit in ("pJ", "um^2"))
    assert sum(energy[1:]) == pytest.approx(energy[0], rel=1e-5)
    assert sum(area[1:]) == pytest.approx(area[0], rel=1e-5)
    # its efficiency: the operations of its network over that energy
    ops = estimate(about.network, about.chip).total["ops"]
    assert ops / energy[0] == pytest.approx(about.figures[-1].value, rel=1e-3)


def test_the_published_parts_of_the_macros_give_their_efficiencies():
    macro = against_the_field.jia("linear")
    wans = [x for x in against_the_field.published() if x.title.startswith("Wan")]
    adc, array, *_ = (x.value for x in macro.figures)
    assert 2 * 2304 * 256 / (adc + array) == pytest.approx(192, rel=0.01)
    for about in wans:
        parts = sum(x.value for x in about.figures if x.unit == "pJ")
        efficiency = next(x.value for x in about.figures if x.unit == "TOPS/W")
        assert 2 * 256 * 128 / parts == pytest.approx(efficiency, rel=0.02)


def test_an_adc_grows_as_the_technologys_table_has_it():
    """ISAAC's, of 4 to 10 bits; between two of them the logarithm is in proportion, below the first
    all is as there."""
    pj = {4: 0.79, 5: 0.99, 8: 1.67, 10: 2.379022742}
    (chip,) = chips(technology="isaac-32nm", adc_law="table")
    technology = chip.technology
    for bits, published in pj.items():
        of_bits = replace(chip, adc_bits=bits)
        assert of_bits.adc_scale("energy") == pytest.approx(published / 1.67, rel=1e-5)
        assert of_bits.adc_clocks == pytest.approx(1)
    assert replace(chip, adc_bits=8).adc_scale("area") == 1
    assert replace(chip, adc_bits=2).adc_scale("area") == pytest.approx(361.04 / 1200)
    between = technology.adc_growth("energy", 4.5)
    assert between == pytest.approx(math.sqrt(0.79 * 0.99) / 1.67)
    grid = technology.adc_growth("energy", np.array([[4.0], [8.0]]))
    assert grid == pytest.approx(np.array([[0.79 / 1.67], [1]]))
    for bad in ({"adc_bits": 11}, {"layer_adc_bits": "stem=12"}):
        with pytest.raises(UserError, match="isaac-32nm gives ADCs of at most 10 bits"):
            replace(chip, **bad)
    (sram,) = chips(technology="spikesim-65nm-sram", adc_law="table")
    four, eight = (replace(sram, adc_bits=bits).adc_scale("energy") for bits in (4, 8))
    assert four == 1
    sar = (3.7506 * 8 + 25.844) * 9 / ((3.7506 * 4 + 25.844) * 5)
    assert eight == pytest.approx(sar, rel=1e-5)


def test_auto_starts_within_a_table_that_ends_early(tmp_path):
    path = written(
        tmp_path,
        ADC.replace("pj", "by_bits").replace("1,", "{ 1 = 1, 4 = 2 },")
        + '[chip]\nadc_law = { value = "table", source = "mine" }\n',
    )
    chip = f"--technology {path} --on_chip --adc_bits auto --max_drop 100 --test_images 9"
    report = reported(tmp_path / "out", f"--checkpoint {ROOT}/tests/data/student-last.pth {chip}")
    assert report["chip"]["adc_bits"] == 1


def test_a_sweep_beyond_the_table_is_refused(tmp_path, capsys):
    path = tmp_path / "net.json"
    path.write_text(json.dumps(asdict(NETWORK)))
    line = ["sweep", "--layers", str(path), "--technology", "isaac-32nm", "--out", str(tmp_path)]
    assert main([*line, "--adc_bits", "4,11"]) == 2
    assert "adc_bits 11: isaac-32nm gives ADCs of at most 10" in capsys.readouterr().err
