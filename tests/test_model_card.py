"""The page beside the best checkpoint of a run."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import main
from checkpoints import load_checkpoint
from conftest import DIGITS
from data_loader import Share, evaluation_loader, load_data_sets
from engine.evaluate import evaluate
from engine.model_card import command_of, told
from engine.run_folder import read_metrics
from load_settings import load_network, parse_settings
from settings import Settings


def facts_of(card: Path) -> dict[str, str]:
    """The rows of all its tables that have two columns."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.read_text(), re.MULTILINE))


def test_a_card_says_what_is_known_of_the_best_checkpoint(trained):
    for setting, path in trained.items():
        card, checkpoint = path.with_suffix(".md"), load_checkpoint(path)
        text, facts, settings = card.read_text(), facts_of(card), checkpoint.settings
        _, test_set = load_data_sets(settings)
        network = load_network(checkpoint)
        tested = evaluate(network, evaluation_loader(test_set, Share(64)), torch.device("cpu"))
        assert text.startswith(f"# {path.name}\n")
        assert facts["epoch"] == str(checkpoint.epoch)
        assert facts["accuracy on test images"].startswith(f"{100 * tested.accuracy:.2f} % (")
        assert facts["spikes per neuron and timestep"] == f"{100 * tested.spike_rate:.2f} %"
        for name, (fired, seen) in tested.spikes.items():
            rates = " | ".join(f"{100 * x:.2f} %" for x in (fired / seen).tolist())
            assert f"\n| {name} | {rates} |\n" in text
        assert facts["training images"] == "1,437"
        assert f"torch {torch.__version__.partition('+')[0]}" in facts["versions"]
        assert facts["parameters"] == f"{sum(x.numel() for x in network.parameters()):,}"
        teacher = checkpoint.rest["teacher"]
        assert facts.get("teacher") == (teacher and f"SHA-256 {teacher}")
        assert str(path.parent.parent) not in text
        assert facts.get("`bits`") == (None if setting == "original" else "4")


def test_the_command_of_a_card_is_that_of_the_run(trained, monkeypatch):
    for path in trained.values():
        settings = load_checkpoint(path).settings
        command = facts_of(path.with_suffix(".md"))["command"].strip("`")
        assert command == command_of(settings)
        monkeypatch.chdir(trained["original"].parent)  # where the teacher lies
        again = parse_settings(shlex.split(command)[2:])
        assert told(again) == told(settings)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"time_windows": (1, 2, 4), "time_window": 4, "val_share": 0.25, "seed": 7},
        {"arch": "vgg9", "model_depth": None, "lr": 0.05, "amp": True, "fold": 3},
    ],
)
def test_the_command_gives_back_every_setting_of_the_network(options):
    settings = Settings.of("digits", "student", bits=3, **options)
    assert told(parse_settings(shlex.split(command_of(settings))[2:])) == told(settings)


def test_a_card_of_another_epoch_is_written_anew_without_what_is_not_known(tmp_path):
    run = [*DIGITS, "--paper_setting", "original", "--save_path", str(tmp_path), "--resume"]
    assert main.main(run) == 0
    card = tmp_path / "original-best.md"
    whole = card.read_text()
    assert main.main(run) == 0
    assert card.read_text() == whole  # of this epoch
    card.write_text(whole.replace("| epoch | 1 |", "| epoch | 7 |"))
    assert main.main(run) == 0
    facts = facts_of(card)
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert facts["accuracy on test images"].startswith(f"{100 * row['test_accuracy']:.2f} %")
    assert "versions" not in facts
    assert "t = 1" not in card.read_text()
