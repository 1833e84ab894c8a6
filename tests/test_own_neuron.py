"""--leak, --threshold, --reset, --surrogate: from a command line to the networks and back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import main
from checkpoints import build_network, load_checkpoint
from conftest import DIGITS, evaluated, refused, reported
from load_settings import load_network, parse_settings, run_name
from models.graph import graph_of
from models.neuron import DEFAULT_NEURON, LIF, Neuron, neuron_of
from runtime.errors import UserError
from spikesim_eval import Chip, estimate
from spikesim_eval.layer_list import LayerList
from spikesim_eval.trace import describe
from test_bad_input import ORIGINAL, QAMD, STUDENT
from test_kept_checkpoints import KEPT

OPTIONS_OF_NEURON = ["--leak", "0.5", "--threshold", "0.75", "--reset", "soft"]
OWN = [*OPTIONS_OF_NEURON, "--surrogate", "atan", "--surrogate_width", "0.4"]
NEURON = Neuron(0.5, 0.75, "soft", "atan", 0.4)


@pytest.fixture(scope="module")
def trained_own(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of a teacher and its student, which has another surrogate."""
    folder, found = tmp_path_factory.mktemp("own"), {}
    teacher = folder / "teacher" / "original-best.pth"
    student = ["qamd", "--bits", "4", "--teacher_path", str(teacher)]
    for name, how in {
        "teacher": ["original", *OWN],
        "student": [*student, *OPTIONS_OF_NEURON],
    }.items():
        command = [*DIGITS, "--time_window", "2", "--paper_setting", *how]
        assert main.main([*command, "--save_path", str(folder / name)]) == 0
        (found[name],) = (folder / name).glob("*-best.pth")
    return found


def test_the_options_become_the_neuron_of_every_layer_and_the_thresholds_of_all_starts():
    assert parse_settings(ORIGINAL).neuron == DEFAULT_NEURON
    settings = parse_settings([*STUDENT, *OWN])
    assert settings.neuron == NEURON
    for given in (settings, replace(settings, paper_setting="original", bits=None, bn_bits=None)):
        network = build_network(given)
        assert {layer.neuron for layer in network.modules() if isinstance(layer, LIF)} == {NEURON}
        assert network.stem.bn.weight.unique().item() == 0.75
        assert network.blocks[0].bn2.weight.unique().item() == pytest.approx(0.15)
    network = build_network(settings)
    quantizer = network.lif.quantizer
    stream = network.blocks[2].shortcut.stream.step.item()
    assert stream == pytest.approx(2 * 0.75 * math.sqrt(2 / math.pi / 7))  # LSQ's start
    assert (quantizer.high * quantizer.used_step()).item() == pytest.approx(1.5, rel=0.01)


def test_a_run_is_named_after_what_is_no_default():
    own = "leak0.5-threshold0.75-resetsoft-surrogateatan-surrogate-width0.4"
    assert own in run_name(parse_settings([*ORIGINAL, *OWN]))
    assert "leak" not in run_name(parse_settings(ORIGINAL))


def test_a_checkpoint_has_its_neuron_and_one_from_before_has_the_default(trained_own):
    assert neuron_of(load_network(KEPT / "original-last.pth")) == DEFAULT_NEURON
    assert neuron_of(load_network(trained_own["teacher"])) == NEURON
    student = load_network(trained_own["student"])
    assert neuron_of(student) == NEURON._replace(surrogate="rect", width=0.5)
    saved = json.loads((trained_own["student"].parent / "settings.json").read_text())
    assert saved["reset"] == "soft"


@pytest.mark.parametrize("other", [["--leak", "0.25"], ["--threshold", "0.5"], ["--reset", "hard"]])
def test_a_teacher_of_another_neuron_is_refused_and_one_of_another_surrogate_is_not(
    other, trained_own, complaint
):
    with_teacher = [*QAMD, *OPTIONS_OF_NEURON, "--teacher_path", str(trained_own["teacher"])]
    line = complaint([*with_teacher, *other])
    assert f"was trained with {other[0]} " in line
    assert f"this run with {other[0]} {other[1]}: a teacher and its students need the same" in line
    assert parse_settings([*with_teacher, "--surrogate", "triangle"]).surrogate == "triangle"


def test_it_evaluates_in_integers_and_goes_on(trained_own, capfd):
    checkpoint = trained_own["student"]
    found = evaluated(capfd, checkpoint, "--integer")
    assert found["integers"]["differing_spikes"] == 0
    assert found["integers"]["correct"] == found["correct"]
    assert main.main(["--eval_only", str(checkpoint), "--leak", "0.25"]) == 2
    assert "--leak 0.25 does not fit" in capfd.readouterr().err
    folder = str(checkpoint.parent)
    again = ["--config", str(checkpoint.parent / "settings.json"), "--save_path", folder]
    again += ["--teacher_path", str(trained_own["teacher"]), "--resume", "--epochs", "2"]
    assert main.main(again) == 0
    assert load_checkpoint(checkpoint.with_name("qamd-last.pth")).epoch == 2
    assert main.main([*again, "--reset", "hard"]) == 2


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (["--leak", "0.3"], "a leak of 0.3 is no shift"),
        (["--reset", "soft", "--threshold", "0.3"], "a soft reset subtracts 0.25 times the"),
    ],
)
def test_what_is_not_exact_trains_and_is_refused_in_integers(how, reason, tmp_path, capfd):
    command = [*DIGITS, "--time_window", "2", "--paper_setting", "student", "--bits", "4", *how]
    assert main.main([*command, "--save_path", str(tmp_path)]) == 0
    checkpoint = str(tmp_path / "student-best.pth")
    assert main.main(["--eval_only", checkpoint]) == 0
    line = refused(capfd, main.main, ["--eval_only", checkpoint, "--integer"])
    assert f"--integer: {checkpoint} is not exact in integers: {reason}" in line


def test_the_hardware_report_charges_what_another_reset_or_leak_takes(trained_own, tmp_path):
    """Against counts of the integer network's updates; 25-bit additions, 4-bit products."""
    settings = load_checkpoint(trained_own["student"]).settings
    found = {}
    for name, how in {
        "default": {"leak": 0.25, "reset": "hard"},
        "shifted": {"leak": 0.5, "reset": "hard"},
        "soft": {"leak": 0.5, "reset": "soft"},
        "multiplied": {"leak": 0.3, "reset": "hard"},
        "forgetful": {"leak": 0.0, "reset": "hard"},
    }.items():
        network = build_network(replace(settings, **how))
        found[name] = estimate(describe(network), Chip())
        updates = sum(2 * math.prod(node.shape) for node in graph_of(network) if node.kind == "lif")
    of = {name: x.energy_by_component["neuron"] for name, x in found.items()}
    assert of["default"] == pytest.approx(updates * 1.274 * 4 / 64)
    assert of["shifted"] == of["forgetful"] == of["default"]
    assert of["soft"] - of["default"] == pytest.approx(updates * 25 * 0.03 / 8 * 1.99)
    assert of["multiplied"] - of["default"] == pytest.approx(updates * 16 * 0.2 / 64 * 1.99)
    for x in (found["forgetful"].energy_by_component, found["forgetful"].area_by_component):
        assert x.pop("membrane") == 0
    for name in ("shifted", "soft", "multiplied"):
        energies = [found[x].energy_by_component | {"neuron": 0} for x in (name, "default")]
        assert energies[0] == energies[1]
        assert found[name].area_by_component == found["default"].area_by_component


def test_the_report_of_a_checkpoint_says_its_neuron(trained_own, tmp_path):
    pair = "--checkpoint {student} --baseline {teacher}".format(**trained_own)
    report = reported(tmp_path, pair)
    assert (report["network"]["leak"], report["network"]["reset"]) == (0.5, "soft")
    assert any("A soft reset takes an addition of 25 bits more" in x for x in report["assumptions"])


def test_a_layer_list_says_leak_and_reset_and_wrong_ones_are_refused():
    layer = {"name": "a", "kernel": 1, "in_channels": 1, "out_channels": 1, "in_size": [1, 1]}
    layer |= {"out_size": [1, 1], "input_bits": 1, "after": []}
    data = {"time_steps": 1, "weight_bits": 4, "membrane_bits": 4, "layers": [layer], "lif": []}
    assert LayerList.from_json(data | {"leak": 1, "reset": "soft"}).reset == "soft"
    assert LayerList.from_json(data) == LayerList.from_json(data | {"leak": 0.25})
    for wrong in ({"leak": 1.5}, {"leak": "all"}, {"reset": "none"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be"):
            LayerList.from_json(data | wrong)
