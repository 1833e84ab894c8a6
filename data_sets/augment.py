"""Augmentation of training images: of one image in a loader's worker, of a batch on the device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = 128  # what AutoAugment and cutout fill with: the images' mean, nearly


class CropAndFlip(torch.nn.Module):
    """Crop of the image padded with zeros to its own size again, flipped in half of the cases.

    Called on one image (torchvision's transforms, in a loader's worker) or, as `of_batch`, on a
    batch on any device: the same distribution, other draws.
    """

    def __init__(self, size: tuple[int, int]):
        from torchvision.transforms import v2  # here, as it takes a second of every start

        super().__init__()
        self.padding = size[0] // 8, size[1] // 8  # 4 of 32 pixels, 8 of 64
        crop = v2.RandomCrop(size, padding=self.padding[::-1])  # of the sides, then above and below
        self.of_one = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def forward(self, image: Tensor) -> Tensor:
        return self.of_one(image)

    def draw(self, number: int, seed: int) -> Tensor:
        """(number, 3): first row, first column of each crop, whether it is flipped."""
        generator = torch.Generator().manual_seed(seed)
        limits = (2 * self.padding[0] + 1, 2 * self.padding[1] + 1, 2)
        draws = [torch.randint(limit, (number,), generator=generator) for limit in limits]
        return torch.stack(draws, dim=1)

    def of_batch(self, images: Tensor, draws: Tensor) -> Tensor:
        """(B, C, H, W) images, each cropped and flipped as its row of `draws` says."""
        B, C, H, W = images.shape
        above, beside = self.padding
        padded = F.pad(images, [beside, beside, above, above])
        row, column, flipped = draws.unsqueeze(-1).unbind(1)  # (B, 1) each
        rows = row + torch.arange(H, device=images.device)
        columns = torch.arange(W, device=images.device)
        columns = column + torch.where(flipped == 1, columns.flip(0), columns)
        image = torch.arange(B, device=images.device)[:, None, None, None]
        channel = torch.arange(C, device=images.device)[:, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Cutout(torch.nn.Module):
    """A square of `side` pixels around a random pixel is grey (DeVries, Taylor: 1708.04552)."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        H, W = image.shape[-2:]
        top, left = (int(torch.randint(n, ())) - self.side // 2 for n in (H, W))
        image = image.clone()
        image[..., max(top, 0) : top + self.side, max(left, 0) : left + self.side] = GRAY
        return image


def roll(frames: Tensor) -> Tensor:
    """Shift (…, H, W) frames by −3 … 3 pixels along each axis, cyclically."""
    return frames.roll(torch.randint(-3, 4, (2,)).tolist(), dims=(-2, -1))


def augmentation(
    name: str, events: bool, size: tuple[int, int]
) -> Callable[[Tensor], Tensor] | None:
    """The transform of --augment; all T frames of a sample get the same one."""
    if name == "none":
        return None
    if name == "basic" and not events:
        return CropAndFlip(size)
    from torchvision.transforms import v2

    if events:
        nearest = v2.InterpolationMode.NEAREST  # keeps counts whole
        rotate = v2.RandomRotation(15, interpolation=nearest)
        return v2.RandomChoice([roll, rotate, v2.RandomAffine(0, shear=15, interpolation=nearest)])
    # AutoAugment's policy for CIFAR-10 (Cubuk et al.: 1805.09501)
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=GRAY)
    return v2.Compose([CropAndFlip(size), policy, Cutout(min(16, *(side // 2 for side in size)))])
