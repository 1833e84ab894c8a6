"""The running statistics that an evaluation reads are those of the weights that it evaluates."""

import copy

import pytest
import torch

import main
from checkpoints import load_checkpoint
from conftest import DIGITS
from data_loader import ImageSet, Share, training_loader
from data_sets.augment import CropAndFlip
from engine.data import first_images
from models import MSResNet, QuanMSResNet
from models.batch_norm import BatchNorm, estimate_statistics


def batches(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(number)]


def network_of(bits: int | None) -> MSResNet:
    torch.manual_seed(0)
    shape = 18, 3, 2, 1, 2
    network = MSResNet(*shape) if bits is None else QuanMSResNet(*shape, bits=bits)
    return network.double()


@pytest.mark.parametrize("bits", [None, 4])
def test_estimated_statistics_are_the_means_of_those_of_the_batches(bits):
    network = network_of(bits)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, BatchNorm):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].detach())
            )
    estimate_statistics(network, batches(3), (2,))
    layers = {n: x for n, x in network.named_modules() if isinstance(x, BatchNorm)}
    assert inputs.keys() == layers.keys()
    for name, layer in layers.items():
        assert len(inputs[name]) == 3
        means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs[name]])
        # The stem's, of images that stand for all timesteps, counts them all.
        repeats = 2 if name == "stem.bn" else 1
        biased = torch.stack([x.var(dim=(0, 2, 3), correction=0) for x in inputs[name]])
        counts = repeats * inputs[name][0][:, 0].numel()
        torch.testing.assert_close(layer.running_mean, means.mean(0), rtol=1e-12, atol=1e-12)
        expected = biased.mean(0) * counts / (counts - 1)
        torch.testing.assert_close(layer.running_var, expected, rtol=1e-12, atol=1e-12)
        assert layer.momentum == 0.1


def test_statistics_of_several_t_are_means_over_each_of_them_equally_often():
    network, images = network_of(4), batches(2)
    estimate_statistics(network, images, (1, 2, 5))
    several = [x.clone() for name, x in network.named_buffers() if "running" in name]
    sums = [torch.zeros_like(x) for x in several]
    for image, T in ((0, 1), (1, 2), (0, 5)):
        estimate_statistics(network, [images[image]], (T,))
        of_one = [x for name, x in network.named_buffers() if "running" in name]
        for total, x in zip(sums, of_one, strict=True):
            total += x / 3
    for found, expected in zip(several, sums, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert network.time_window == 2


def test_estimating_statistics_forgets_those_of_before_and_moves_no_weight():
    network = network_of(4)
    weights = copy.deepcopy(list(network.parameters()))
    estimate_statistics(network, batches(2), (2,))
    found = [x.clone() for x in network.buffers()]
    network.train()(torch.randn(6, 1, 8, 8, dtype=torch.float64))
    estimate_statistics(network, batches(2), (2,))
    for ours, theirs in zip(network.buffers(), found, strict=True):
        assert torch.equal(ours, theirs) or ours.dtype == torch.int64  # the count of batches
    for ours, theirs in zip(network.parameters(), weights, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is None


def test_a_training_evaluates_with_statistics_of_its_last_weights(tmp_path, monkeypatch):
    estimated = []

    def estimate(network, images, time_windows) -> None:
        estimate_statistics(network, images, time_windows)
        estimated.append((copy.deepcopy(network.state_dict()), [x.clone() for x in images]))

    monkeypatch.setattr(main, "estimate_statistics", estimate)
    options = [*DIGITS, "--batch_size", "64", "--epochs", "2"]
    options += ["--paper_setting", "student", "--bits", "2"]
    assert main.main([*options, "--save_path", str(tmp_path)]) == 0
    last = load_checkpoint(tmp_path / "student-last.pth")
    assert len(estimated) == 2
    for name, x in estimated[1][0].items():
        assert torch.equal(x, last.model[name]), name
    # The same images each time: of two in twenty-two steps.
    assert len(estimated[0][1]) == 2
    assert all(map(torch.equal, estimated[0][1], estimated[1][1]))


@pytest.mark.parametrize(("images", "expected"), [(1, 1), (100, 5), (401, 20), (600, 20)])
def test_few_batches_are_kept_however_large_the_data_set_is(images, expected):
    pixels = torch.arange(images, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    data_set = ImageSet(pixels, [0] * images)
    batches = training_loader(data_set, Share(1))
    assert len(first_images(batches, torch.device("cpu"))) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_keeping_images_leaves_the_random_numbers_of_a_training_as_they_were(workers):
    pixels = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    data_set = ImageSet(pixels, [0] * 8, CropAndFlip((8, 8)).of_one)
    batches, before = training_loader(data_set, Share(2, workers=workers)), torch.get_rng_state()
    first_images(batches, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
