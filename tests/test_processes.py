"""One process and two with the same global batch train the same network."""

from pathlib import Path

import pytest
import torch

from test_faults import assert_close, launch, outcome

pytestmark = pytest.mark.device
# Where two share a GPU, NCCL refuses.
DEVICE = ["--device", "cuda-shared" if torch.cuda.is_available() else "cpu"]


def train(processes: int, folder: Path, setting: str, *options: str) -> tuple:
    """Weights and metrics after epochs of three steps of 16 digits each; one epoch, if `options` do
    not say more."""
    save_path = folder / f"{setting}-{processes}"
    how = ["--paper_setting", setting, "--epochs", "1", "--fold", "3", *DEVICE, *options]
    result = launch(processes, save_path, *how)
    assert result.returncode == 0, result.stderr[-3000:]
    return outcome(save_path, setting)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def teacher(folder) -> tuple:
    return train(1, folder, "original")


def test_one_and_two_processes_give_the_same_weights(folder, teacher):
    assert_close(train(2, folder, "original"), teacher)
    path = folder / "original-1" / "original-last.pth"
    options = ["--bits", "4", "--teacher_path", str(path)]
    one, two = (train(processes, folder / "qamd", "qamd", *options) for processes in (1, 2))
    assert_close(two, one)


def test_one_and_two_processes_do_the_same_with_parts_of_batches_held_out_images_and_a_warmup(
    folder, teacher
):
    # Part k of all processes together is part k of the one process: the same statistics.
    path = folder / "original-1" / "original-last.pth"
    options = ["--bits", "4", "--teacher_path", str(path), "--accumulate", "2", "--epochs", "2"]
    options += ["--val_share", "0.2", "--warmup", "1", "--label_smoothing", "0.1"]
    options += ["--time_windows", "2", "4", "5"]
    one, two = (train(processes, folder, "qamd", *options) for processes in (1, 2))
    assert_close(two, one)
    # Parts, and for an evaluation one of each T.
    assert one[0]["stem.bn.num_batches_tracked"] == 2 * (6 + 3)
    for row in one[1]:
        assert (row["val_accuracy"] * 9).is_integer()  # each of nine images once
