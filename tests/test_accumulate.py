"""--accumulate N is the large batch: in float64, for all but batch norm's batch statistics."""

import pytest
import torch
from torch import Tensor, nn

import main
from checkpoints import load_checkpoint
from conftest import DIGITS
from distiller import Distiller, LossFunction, cross_entropy
from load_settings import parse_settings
from models import MSResNet, QuanMSResNet
from models.batch_norm import BatchNorm, estimate_statistics
from settings import Settings


def settings_with(parts: int) -> Settings:
    return parse_settings([*DIGITS, "--paper_setting", "original", "--accumulate", str(parts)])


def network_and_loss(setting: str, device: torch.device) -> tuple[nn.Module, LossFunction]:
    """The same at every call; the running statistics are such that all layers fire."""
    torch.manual_seed(0)
    shape = (18, 10, 4, 1, 4)
    teacher = MSResNet(*shape).double()
    network = teacher
    if setting != "original":
        network = QuanMSResNet(*shape, bits=4).double()
    network.to(device), teacher.to(device)
    images = torch.rand(64, 1, 16, 16).double().to(device)
    for each in dict.fromkeys((network, teacher)):
        estimate_statistics(each, [images], (4,))
    if setting == "qamd":
        return network, Distiller(teacher, network)
    return network, cross_entropy(network)


def batch(images: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(images, 1, 16, 16).double().to(device), torch.arange(images).to(device) % 10


def gradients(
    setting: str, parts: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    network, loss_function = network_and_loss(setting, device)
    network.eval()  # running statistics do not know the batch
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.quantizer = None  # with one it has no gradient in evaluation mode
    means = main.add_gradients(network, loss_function, *batch(14, device), settings_with(parts))
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}, means


@pytest.mark.parametrize("parts", [2, 4])  # of 7 and 7; of 4, 4, 4 and 2 images
@pytest.mark.parametrize("setting", ["original", "student", "qamd"])
def test_the_gradients_of_the_parts_add_up_to_those_of_the_whole_batch(setting, parts, device):
    whole, means_of_whole = gradients(setting, 1, device)
    added, means = gradients(setting, parts, device)
    assert whole["stem.conv.weight"].abs().max() > 1e-3
    for name in whole:
        scale = whole[name].abs().max().item()
        torch.testing.assert_close(added[name], whole[name], rtol=0, atol=1e-12 * scale, msg=name)
    torch.testing.assert_close(means, means_of_whole, rtol=1e-12, atol=0)


def test_evaluation_reads_the_same_statistics_whether_steps_had_parts_or_not(tmp_path):
    statistics = {}
    for parts in (1, 4):
        # At a learning rate of 0 the weights are the same.
        options = [*DIGITS, "--batch_size", "476", "--lr", "0", "--accumulate", str(parts)]
        path = ["--save_path", str(tmp_path / str(parts))]
        assert main.main([*options, "--paper_setting", "original", *path]) == 0
        model = load_checkpoint(tmp_path / str(parts) / "original-last.pth").model
        statistics[parts] = [x for name, x in model.items() if "running" in name]
    assert statistics[1][0].abs().max() > 0.01
    assert all(map(torch.equal, statistics[1], statistics[4]))
