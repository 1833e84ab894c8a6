"""The event camera of digits-dvs: scikit-learn's digits as N-Caltech101's camera would see them.

The camera makes three saccades of 100 ms along an isosceles triangle (Orchard et al. 2015,
10.3389/fnins.2015.00437) in front of the enlarged digit. A pixel sends an event when its log
intensity has moved by THRESHOLD since its last one, at the time that linear interpolation gives
(the ideal sensor of ESIM, Rebecq et al. 2018): no noise, no refractory time, no mismatch.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_sets.sources import in_threads, whole_folder

SENSOR = 180, 240  # height and width, pixels
SACCADE_MS = 100  # each of the three, as N-Caltech101's (Orchard et al. 2015)
STEPS = 24  # per saccade
REACH = 8  # pixels from the centre to a side of the triangle
SIDE = 160  # pixels of the displayed digit with a frame of one of its own pixels
DARK = 0.1  # of the background, where the digit's brightest pixel is 1
THRESHOLD = 0.3  # of the logarithm of the intensity


def write_digit_events(folder: Path) -> None:
    """All 1,797 digits, in N-Caltech101's layout."""
    from sklearn.datasets import load_digits

    digits = load_digits()

    def write(number: int) -> None:
        path = unfinished / str(digits.target[number]) / f"image_{number:04d}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(as_atis(*digit_events(digits.images[number])))

    with whole_folder(folder) as unfinished:
        for _ in in_threads(write, range(len(digits.images)), "making the events of digits-dvs"):
            pass


def digit_events(digit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Events (t in µs, x, y, p) of an 8×8 digit of values 0 … 16, in order of time."""
    H, W = SENSOR
    framed = F.pad(torch.from_numpy(digit)[None, None] / 16, [1] * 4)  # a hard edge would flash
    enlarged = F.interpolate(framed, (SIDE, SIDE), mode="bilinear")[0, 0]
    scene = DARK + (1 - DARK) * F.pad(enlarged, [REACH + 1] * 4).numpy()
    corners = np.array([(-REACH, REACH), (0, -REACH), (REACH, REACH), (-REACH, REACH)])
    places = np.concatenate(
        [a + (b - a) * np.arange(STEPS)[:, None] / STEPS for a, b in pairwise(corners)]
        + [corners[-1:]]
    )
    # Log intensity in thresholds since the start: a pixel sends an event at each whole number.
    seen = [np.log(_shifted(scene, *place)) / THRESHOLD for place in places]
    start, last = seen[0], np.zeros(scene.shape, int)
    step = SACCADE_MS * 1000 / STEPS
    parts = []
    for k, (before, now) in enumerate(pairwise(seen)):
        before, now = before - start, now - start
        reached = np.where(now > last, np.floor(now), np.ceil(now)).astype(int)
        y, x = (reached != last).nonzero()
        rises, number = reached[y, x] > last[y, x], np.abs(reached - last)[y, x]
        pixel = np.repeat(np.arange(len(y)), number)
        event = np.arange(len(pixel)) - np.repeat(number.cumsum() - number, number) + 1
        y, x, rises = y[pixel], x[pixel], rises[pixel]
        level = last[y, x] + np.where(rises, event, -event)
        moved = (level - before[y, x]) / (now[y, x] - before[y, x])
        parts.append(((k + moved) * step, x, y, rises))
        last = reached
    t, x, y, p = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(t, kind="stable")
    top, left = (H - scene.shape[0]) // 2, (W - scene.shape[1]) // 2
    return t[order].astype(int), x[order] + left, y[order] + top, p[order]


def _shifted(image: np.ndarray, down: float, right: float) -> np.ndarray:
    """The image moved by parts of pixels, bilinearly, and cyclically: give it a margin."""
    for axis, shift in ((0, down), (1, right)):
        whole = int(np.floor(shift))
        part = shift - whole
        image = (1 - part) * np.roll(image, whole, axis) + part * np.roll(image, whole + 1, axis)
    return image


def as_atis(t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> bytes:
    """Events as N-Caltech101 stores them, 5 bytes each: x, y, p and the 23 bits of t."""
    columns = (x, y, p.astype(int) << 7 | t >> 16, t >> 8 & 255, t & 255)
    return np.stack(columns, axis=1).astype(np.uint8).tobytes()
