"""Recordings of events: every kind against the layout that its makers publish and other people's
readers and writers, and frames against SpikingJelly's."""

import struct
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.datasets import CIFAR10DVS, utils

from data_sets.recordings import READERS, DamagedError, Events, frames_of, read_events
from runtime.errors import UserError

DATA = Path(__file__).parent / "data"
# t in µs, x, y, p: a camera of 128×128 pixels, both ends of each side, two events at the last time.
EVENTS = np.array(
    [
        *[(0, 0, 0, 1), (7, 127, 0, 0), (7, 0, 127, 1), (300, 64, 3, 0), (65536, 127, 127, 1)],
        *[(70000, 2, 1, 0), (70000, 9, 127, 1)],
    ]
)


def read(path: Path, content: bytes | str) -> Events:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_events(path)


def columns(events: Events) -> list[list[int]]:
    return np.stack(events[:4], axis=1).tolist()


def five_bytes(events: np.ndarray) -> bytes:
    rows = [(x, y, p << 7 | t >> 16 & 127, t >> 8 & 255, t & 255) for t, x, y, p in events.tolist()]
    return np.array(rows, np.uint8).tobytes()


def dat(events: np.ndarray, header: str = "% Version 2\n% Width 640\n% Height 480\n", kind=12):
    words = b"".join(struct.pack("<II", t, p << 28 | y << 14 | x) for t, x, y, p in events.tolist())
    return f"% Data file containing CD events\n{header}".encode() + bytes([kind, 8]) + words


HEADER = "#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n"
CHIP = "# AEChip: eu.seebetter.ini.chips.{}\r\n"


def aedat2(pairs: list[tuple[int, int]], header: str = HEADER) -> bytes:
    return header.encode() + b"".join(struct.pack(">II", address, t) for address, t in pairs)


def of_dvs128(events: np.ndarray, header: str = HEADER) -> bytes:
    """Written so that the reader of SpikingJelly's CIFAR10DVS gives back the events."""
    found = [((127 - x) << 8 | (127 - y) << 1 | 1 - p, t) for t, x, y, p in events.tolist()]
    return aedat2(found, header)


def of_davis(events: np.ndarray, header: str = HEADER) -> bytes:
    return aedat2([(y << 22 | x << 12 | p << 11, t) for t, x, y, p in events.tolist()], header)


def aedat3(events: np.ndarray) -> bytes:
    """One packet of polarity events, of events with type 1, of 8 bytes, little-endian."""
    packet = struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, *(len(events),) * 3)
    for t, x, y, p in events.tolist():
        packet += struct.pack("<II", x << 17 | y << 2 | p << 1 | 1, t)
    return b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n" + packet


def saved(save, *arrays, **named) -> bytes:
    file = BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def named(events: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip("txyp", events.T, strict=True))


def structured(events: np.ndarray) -> np.ndarray:
    kind = [("p", "?"), ("x", "<u2"), ("y", ">u2"), ("t", "<u8")]  # in another order
    return np.array([(p, x, y, t) for t, x, y, p in events.tolist()], kind)


def table(events: np.ndarray, between: str = " ") -> str:
    return "".join(between.join(map(str, row)) + "\n" for row in events.tolist())


KINDS = {
    "five bytes.bin": five_bytes(EVENTS),
    "CAPITALS.BIN": five_bytes(EVENTS),
    "arrays.npz": saved(np.savez_compressed, **named(EVENTS)),
    "arrays of bytes.npz": saved(
        np.savez, **named(EVENTS.astype("u1")) | {"t": EVENTS[:, 0].astype(">u4")}
    ),
    "columns.npy": saved(np.save, EVENTS),
    "columns of float.npy": saved(np.save, np.asfortranarray(EVENTS.astype("f8"))),
    "fields.npy": saved(np.save, structured(EVENTS)),
    "spaces.txt": "# a comment\n" + table(EVENTS),
    "commas.csv": table(EVENTS, ","),
    "named.csv": "x, y, t, p\n" + table(EVENTS[:, [1, 2, 0, 3]], ", "),
    "savetxt.txt": "# recorded today: t x y p\n# y x t p\n" + table(EVENTS[:, [2, 1, 0, 3]]),
    "more columns.csv": "n,t,x,y,p\n" + table(np.c_[EVENTS[:, 0], EVENTS], ","),
    "seconds.txt": "".join(f"{t / 1e6:.6f} {x} {y} {p}\n" for t, x, y, p in EVENTS.tolist()),
    "cd.dat": dat(EVENTS),
    "2d.dat": dat(EVENTS, "% Version 2\n", 0),
    "two.aedat": of_dvs128(EVENTS),
    "two.aedat2": of_dvs128(EVENTS, HEADER + CHIP.format("retina.DVS128")),
    "davis.aedat": of_davis(EVENTS),
    "davis240.aedat": of_davis(EVENTS, HEADER + CHIP.format("davis.DAVIS240C")),
    "three.aedat": aedat3(EVENTS),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_events(name, tmp_path):
    events = read(tmp_path / name, KINDS[name])
    assert columns(events) == EVENTS.tolist()
    assert all(column.dtype == np.int64 for column in events[:4])


@pytest.mark.parametrize("name", ["arrays.npz", "columns.npy", "fields.npy", "spaces.txt"])
def test_a_polarity_of_minus_one_is_that_of_zero(name, tmp_path):
    signed = EVENTS * 1
    signed[:, 3] = 2 * signed[:, 3] - 1
    fields = structured(EVENTS)
    fields = fields.astype([(x, "i1" if x == "p" else "i8") for x in fields.dtype.names])
    fields["p"] = signed[:, 3]
    content = {
        "arrays.npz": saved(np.savez, **named(signed)),
        "columns.npy": saved(np.save, signed),
        "fields.npy": saved(np.save, fields),
        "spaces.txt": table(signed),
    }
    assert columns(read(tmp_path / name, content[name])) == EVENTS.tolist()


def test_what_a_file_says_of_its_camera_is_read(tmp_path):
    said = {
        "cd.dat": (480, 640),
        "2d.dat": None,
        "two.aedat": (128, 128),
        "davis.aedat": None,
        "davis240.aedat": (180, 240),
        "spaces.txt": None,
    }
    for name, sensor in said.items():
        assert read(tmp_path / name, KINDS[name]).sensor == sensor


def test_aedat_4_of_the_makers_own_writer(tmp_path, monkeypatch):
    """tests/data/events.aedat4 is what dv-processing 2.0.4 (dv.io.MonoCameraWriter, LZ4) made of
    the events in events.npz."""
    pytest.importorskip("aedat")
    theirs, given_to_it = read_events(DATA / "events.aedat4"), read_events(DATA / "events.npz")
    assert columns(theirs) == columns(given_to_it)
    assert theirs.sensor == (180, 240)
    assert len(theirs.t) == 1000
    monkeypatch.setitem(sys.modules, "aedat", None)
    with pytest.raises(UserError, match="pip install aedat") as error:
        read_events(DATA / "events.aedat4")
    assert not isinstance(error.value, DamagedError)  # --skip_damaged does not leave it out


@pytest.mark.parametrize(("size", "said"), [(30, "failed to fill"), (4000, "failed to fill")])
def test_half_an_aedat_4_is_damaged(size, said, tmp_path):
    pytest.importorskip("aedat")
    with pytest.raises(DamagedError, match=f"is damaged: .*{said}"):
        read(tmp_path / "a.aedat4", (DATA / "events.aedat4").read_bytes()[:size])


def test_what_crashes_the_reader_of_aedat_4_does_not_end_the_program(tmp_path):
    pytest.importorskip("aedat")
    content = bytearray((DATA / "events.aedat4").read_bytes())
    content[142] = 236  # aedat 2.3.0 aborts
    with pytest.raises(DamagedError, match="is damaged: "):
        read(tmp_path / "a.aedat4", bytes(content))


def test_aedat_2_is_what_spikingjelly_reads_of_cifar10_dvs(tmp_path):
    rng = np.random.default_rng(1)
    pairs = [(int(a), 50 * i) for i, a in enumerate(rng.integers(0, 0x8000, 300))]
    (tmp_path / "extract" / "cat").mkdir(parents=True)
    (tmp_path / "raw").mkdir()
    ours = read(tmp_path / "extract" / "cat" / "a.aedat", aedat2(pairs))
    CIFAR10DVS.create_raw_from_extracted(tmp_path / "extract", tmp_path / "raw")
    theirs = np.load(tmp_path / "raw" / "cat" / "a.npz")
    for name, column in zip("txyp", ours, strict=False):
        assert np.array_equal(column, theirs[name])
    assert columns(read_events(tmp_path / "raw" / "cat" / "a.npz")) == columns(ours)


def test_the_first_event_is_no_line_of_the_header(tmp_path):
    """It may begin with the "#" that begins those."""
    events = np.array([(10 + 256 * i, 5, 140 + i % 2, 1) for i in range(300)])
    assert ord("#") == (140 << 22) >> 24
    assert columns(read(tmp_path / "a.aedat", of_davis(events))) == events.tolist()


def test_what_is_no_pixel_s_event_is_left_out(tmp_path):
    """Frames and signals from outside of a DAVIS, those of a DVS128's pin."""
    pairs = [(3 << 22 | 4 << 12, 1), (1 << 31 | 5 << 12, 2), (1 << 10, 3), (2 << 22 | 1 << 11, 4)]
    content = aedat2(pairs, HEADER + CHIP.format("davis.DAVIS346BSI"))
    assert columns(read(tmp_path / "a.aedat", content)) == [[1, 4, 3, 0], [4, 0, 2, 1]]
    events = read(tmp_path / "b.aedat", aedat2([(0x8000, 1), (0, 2)]))
    assert events.t.tolist() == [2]


@pytest.mark.parametrize(("name", "bits"), [("a.bin", 23), ("a.dat", 32), ("a.aedat", 32)])
def test_a_counter_that_begins_again_goes_on(name, bits, tmp_path):
    t = [2**bits - 5, 2**bits - 1, 3, 40]
    events = np.array([(time, 1, 2, 1) for time in t])
    content = {"a.bin": five_bytes, "a.dat": dat, "a.aedat": of_dvs128}[name](events)
    expected = [*t[:2], 2**bits + 3, 2**bits + 40]
    assert read(tmp_path / name, content).t.tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *((f"empty{ending}", b"", "it is empty") for ending in READERS),
        ("a.bin", five_bytes(EVENTS)[:-1], "34 bytes are not events of 5 bytes each"),
        ("a.npz", saved(np.savez, t=EVENTS[0], x=EVENTS[0]), "lacks the arrays y, p"),
        ("a.npz", saved(np.savez, frames=np.zeros(3)), "lacks the arrays t, x, y, p"),
        ("a.npz", KINDS["arrays.npz"][:-30], ""),
        ("a.npz", saved(np.savez, **named(EVENTS) | {"p": EVENTS[1:, 3]}), "not four arrays"),
        ("a.npz", saved(np.savez, **named(EVENTS) | {"p": np.array([None] * 7)}), ""),
        ("a.npy", saved(np.save, EVENTS[:0]), "holds no events"),
        ("a.npy", saved(np.save, EVENTS.T), "shape is (4, 7), not (N, 4)"),
        ("a.npy", saved(np.save, EVENTS - [0, 1, 0, 0]), "negative pixels"),
        (
            "a.npy",
            saved(np.save, np.add(EVENTS, [0, 0, 0, 1])),
            "p is neither 0 and 1 nor -1",
        ),
        ("a.npy", saved(np.save, EVENTS - [0, 0, 0, 1]), "p is neither 0 and 1 nor -1"),
        ("a.npy", saved(np.save, np.add(EVENTS, [0, 0.5, 0, 0])), "x holds fractions"),
        ("a.npy", saved(np.save, np.add(EVENTS, [np.nan, 0, 0, 0])), "t holds what is no number"),
        ("a.npy", saved(np.save, EVENTS.astype("c8")), "t holds what is no number"),
        ("a.txt", "1 2 3\n", "columns, not t, x, y and p"),
        ("a.txt", "1 2 3 1 9\n", "columns, not t, x, y and p"),
        ("a.txt", "This is what was recorded.\n", ""),
        ("a.csv", "# nothing\n\n", "holds no events"),
        ("a.csv", "t,x,y,p\n", "holds no events"),
        ("a.csv", "t,x,y,p\n1,2,3\n", ""),
        ("a.dat", dat(EVENTS)[:-3], "53 bytes are not events of 8 bytes each"),
        ("a.dat", b"% Version 2\n", "it ends before its first event"),
        ("a.dat", dat(EVENTS, "% Version 1\n"), "DAT of version 1, not 2"),
        ("a.dat", dat(EVENTS, kind=14), "type 14"),
        ("a.aedat", b"0" * 80, "first line is not #!AER-DAT2.0, 3.1 or 4.0"),
        ("a.aedat", KINDS["two.aedat"][:-4], "are not events of 8 bytes each"),
        ("a.aedat", KINDS["three.aedat"][:-4], ""),
        ("a.aedat", HEADER.encode(), "holds no events"),
    ],
)
def test_a_damaged_recording_is_one_line_with_its_path(name, content, said, tmp_path):
    with pytest.raises(DamagedError) as error:
        read(tmp_path / name, content)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / name} is damaged: ")
    assert said in text
    assert "\n" not in text


def test_a_kind_that_is_not_known_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is no file of events \(\.bin, "):
        read(tmp_path / "a.mp4", b"")


# Frames.

EVENT = st.tuples(st.integers(0, 1000), st.integers(0, 6), st.integers(0, 4), st.integers(0, 1))
RECORDING = st.lists(EVENT, min_size=1, max_size=60)


def as_events(rows: list[tuple[int, int, int, int]]) -> Events:
    return Events(*np.array(rows).T).in_order()


def one_by_one(events: Events, T: int, split_by: str) -> np.ndarray:
    """The definition: for each event, the last part that begins at it or before it."""
    frames, number = np.zeros((T, 2, 5, 7), int), len(events.t)
    for k, (t, x, y, p) in enumerate(columns(events)):
        place = k if split_by == "number" else t - int(events.t[0])
        length = (number if split_by == "number" else int(events.t[-1] - events.t[0])) // T
        frame = max(i for i in range(T) if i * length <= place)
        frames[frame, p, y, x] += 1
    return frames


@given(RECORDING, st.integers(1, 12), st.sampled_from(["number", "time"]))
@settings(max_examples=200, deadline=None)
def test_every_event_is_in_one_frame(rows, T, split_by):
    events = as_events(rows)
    frames = frames_of(events, T, (5, 7), split_by)
    assert frames.shape == (T, 2, 5, 7)
    assert np.array_equal(frames, one_by_one(events, T, split_by))
    of_all = np.zeros((2, 5, 7))
    np.add.at(of_all, (events.p, events.y, events.x), 1)
    assert np.array_equal(frames.sum(0), of_all)
    assert frames.sum() == len(rows)


@given(RECORDING, st.integers(1, 12), st.sampled_from(["number", "time"]))
@settings(max_examples=200, deadline=None)
def test_frames_are_spikingjellys_where_it_has_some(rows, T, split_by):
    events = as_events(rows)
    try:
        theirs = utils.integrate_events_by_fixed_frames_number(
            dict(zip("txyp", events, strict=False)), split_by, T, 5, 7
        )
    except IndexError:  # a part of the time without an event
        return
    ours = frames_of(events, T, (5, 7), split_by)
    assert np.array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype


@given(st.permutations(range(7)), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_the_order_in_the_file_does_not_matter_to_parts_of_time(order, T):
    expected = frames_of(as_events(EVENTS), T, (128, 128), "time")
    mixed = as_events(EVENTS[list(order)])
    assert np.array_equal(frames_of(mixed, T, (128, 128), "time"), expected)


def test_events_of_one_time_keep_the_order_of_the_file():
    events = as_events([(5, 1, 0, 0), (3, 2, 0, 0), (5, 3, 0, 0), (3, 4, 0, 0)])
    assert events.x.tolist() == [2, 4, 1, 3]
