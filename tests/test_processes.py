"""One process and two with the same global batch train the same network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("train_in_float64.py")


pytestmark = pytest.mark.device
# Where two share a GPU, NCCL refuses.
DEVICE = ["--device", "cuda-shared" if torch.cuda.is_available() else "cpu"]


def train(processes: int, folder: Path, setting: str, *options: str) -> dict[str, torch.Tensor]:
    """The weights after three steps of 16 digits each."""
    save_path = folder / f"{setting}-{processes}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER)]
    command += ["--paper_setting", setting, "--fold", "3", *DEVICE, *options]
    result = subprocess.run(
        [*command, "--save_path", str(save_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(save_path / f"{setting}-last.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def teachers(folder) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return train(1, folder, "original"), train(2, folder, "original")


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("setting", ["original", "qamd"])
def test_one_and_two_processes_give_the_same_weights(setting, folder, teachers):
    if setting == "original":
        one, two = teachers
    else:
        teacher = str(folder / "original-1" / "original-last.pth")
        options = ["--bits", "4", "--teacher_path", teacher]
        one, two = (train(processes, folder, setting, *options) for processes in (1, 2))
    assert_same(one, two)
    started = torch.load(folder / f"{setting}-1" / f"{setting}-last.pth", weights_only=True)
    assert started["epoch"] == 1


def test_one_and_two_processes_do_the_same_with_parts_of_batches_held_out_images_and_a_warmup(
    folder, teachers, tmp_path
):
    # Part k of all processes together is part k of the one process: the same statistics.
    teacher = folder / "original-1" / "original-last.pth"
    options = ["--bits", "4", "--teacher_path", str(teacher), "--accumulate", "2", "--epochs", "2"]
    options += ["--val_share", "0.2", "--warmup", "1", "--label_smoothing", "0.1"]
    options += ["--time_windows", "2", "4", "5"]
    one, two = (train(processes, tmp_path, "qamd", *options) for processes in (1, 2))
    assert_same(one, two)
    # Parts, and for an evaluation one of each T.
    assert one["stem.bn.num_batches_tracked"] == 2 * (6 + 3)
    for name in ("best", "last"):
        of_one, of_two = (
            torch.load(tmp_path / f"qamd-{processes}" / f"qamd-{name}.pth", weights_only=True)
            for processes in (1, 2)
        )
        assert of_one["epoch"] == of_two["epoch"]
        for row, other in zip(of_one["rows"], of_two["rows"], strict=True):
            assert (row["val_accuracy"] * 9).is_integer()  # each of nine images once
            for metric in row.keys() - {"time", "seconds", "images_per_second"}:
                assert row[metric] == pytest.approx(other[metric], rel=1e-9), metric
