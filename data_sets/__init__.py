"""The data sets, each declared once: `DATA_SETS`. One of your own is a function and a line here
(docs/data.md)."""

from dataclasses import replace

from data_sets import events, static
from data_sets.sources import DataSet, Request, Samples

__all__ = ["DATA_SETS", "DataSet", "Request", "Samples"]

DATA_SETS = {
    "CIFAR10": DataSet(static.cifar, 10, 3, (32, 32)),
    "CIFAR100": DataSet(static.cifar, 100, 3, (32, 32)),
    "TinyImagenet": DataSet(static.tiny_imagenet, 200, 3, (64, 64)),
    "ncaltech101": events.frames_of_recordings(events.N_CALTECH101, 101, (48, 48), batch_size=32),
    "nmnist": events.frames_of_recordings(events.N_MNIST, 10, (34, 34), batch_size=64),
    "digits": DataSet(static.digits, 10, 1, (16, 16), batch_size=64, augmented=False),
    "digits-dvs": events.frames_of_recordings(events.DIGITS_DVS, 10, (24, 24), batch_size=32),
    "cifar10dvs": events.frames_of_recordings(events.CIFAR10_DVS, 10, (48, 48), batch_size=32),
    "dvs128gesture": events.frames_of_recordings(
        events.DVS128_GESTURE, 11, (48, 48), batch_size=32
    ),
    # As many classes as there are folders: they are in Settings.classes.
    "folder": DataSet(
        static.folder, 0, 3, (64, 64), any_size=True, classes_of=static.classes_of_folder
    ),
    "events": replace(
        events.frames_of_recordings(events.OWN, 0, (48, 48), batch_size=32),
        classes_of=events.classes_of_own,
    ),
}
