"""main.py in float64 on 48 digits: in float32 a rounding can flip a spike (see test_processes)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main


class Float64Digits(torch.utils.data.Dataset):
    def __init__(self, data_set):
        self.data_set = data_set

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int):
        image, label = self.data_set[index]
        return image.double(), label


load_data_sets = main.load_data_sets
main.load_data_sets = lambda *arguments: [
    Float64Digits(part) for part in load_data_sets(*arguments)
]
torch.set_default_dtype(torch.float64)
shape = ["--data", "digits", "--width", "4", "--batch_size", "16", "--epochs", "1"]
sys.exit(main.main([*shape, "--workers", "0", *sys.argv[1:]]))
