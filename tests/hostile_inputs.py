"""Inputs that should hang, fill the memory, or run a program, and a process that reads them and is watched.

`python -m tests.hostile_inputs GROUP FOLDER` reads all inputs of a group and prints what became of each as JSON.
"""

import contextlib
import io
import json
import logging
import os
import pathlib
import struct
import sys
import time
import traceback
import zipfile
import zlib

import numpy as np
from PIL import Image

from tests.archive_files import drawing, photograph
from tests.torch_files import Call, Global, pickled

# What an input must not make happen; see "Audit events table" of Python's documentation.
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
              "pty.spawn", "socket.connect", "pickle.find_class", "ftplib.connect", "webbrowser.open")  # fmt: skip
happened: list[str] = []


def watch(event, _):
    """An audit hook that adds what must not happen to `happened`."""
    if event in _FORBIDDEN:
        happened.append(event)


# Weights: name -> content of a file of PyTorch in the zip format, as a pickle.


def _u32(number):
    return struct.pack("<I", number)


def _text(value):
    data = value.encode()
    return b"X" + _u32(len(data)) + data


def _collisions(count, begin, end):
    """Integers with the same hash."""
    numbers = (b"\x8a\x10" + ((2**61 - 1) * number).to_bytes(16, "little") for number in range(1, count))
    return begin + b"".join(number + (b"N" if begin == b"}(" else b"") for number in numbers) + end


_TENSOR_PARTS = [-1, 2**62, 2**63, 2**64, 2**72_000, 1.5, None, "7", (), [1]]


def pickles():
    """Returns {name: pickle} of small files."""
    found = {f"tuple that doubles {n} times": b"\x80\x04}N" + b"2\x86" * n + b"Ns." for n in (20, 60, 5000)}
    found |= {f"list that doubles {n} times": b"\x80\x04]" + b"2a" * n + b"." for n in (20, 5000)}
    found["a dictionary in itself"] = b"\x80\x04}q\x00h\x00h\x00s."
    found["a list in itself"] = b"\x80\x04]q\x00h\x00a."
    found["integers that collide as keys"] = b"\x80\x04" + _collisions(30_000, b"}(", b"u.")
    found["integers that collide in a set"] = b"\x80\x04" + _collisions(30_000, b"\x8f(", b"\x90.")
    found["integers that collide in a frozen set"] = b"\x80\x04" + _collisions(30_000, b"(", b"\x91.")
    found["a set of tuples"] = b"\x80\x04\x8f(" + b"N" + b"2\x86" * 60 + b"\x90."
    found["a call with a tuple that doubles"] = b"\x80\x02ctorch\nSize\nN" + b"2\x86" * 60 + b"R."
    found["an unknown extension"] = b"\x80\x02\x82\x01."
    found["a buffer outside of the file"] = b"\x80\x05\x97\x98."
    found["a state for a set"] = b"\x80\x04\x8f}(" + _text("a") + b"Nub."
    found["a number of 9,000 digits"] = b"\x80\x02L" + b"9" * 9000 + b"L\n."
    found["a number of 72,000 bits"] = b"\x80\x02\x8b" + _u32(9000) + b"\x7f" * 9000 + b"."
    found["a number of four gigabytes"] = b"\x80\x02\x8b\xff\xff\xff\xff."
    found["a text of two gigabytes"] = b"\x80\x02X" + _u32(2**31) + b"a."
    found["bytes of a million million"] = b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"."
    found["a class of a name that is too long"] = b"\x80\x02c" + b"a" * 5000 + b"\nB\n)\x81."
    found["a class without a name"] = b"\x80\x04NN\x93."
    found["a terminal escape in a name"] = pickled(Call(Global("os\x1b[2J", "system"), ("true",)))
    for name in ("eval", "exec", "__import__", "getattr", "open", "breakpoint", "compile", "print"):
        found[f"builtins.{name}"] = pickled(Call(Global("builtins", name), ("1",)))
    for module, name in (("os", "system"), ("nt", "system"), ("subprocess", "Popen"), ("runpy", "run_path"),
                         ("webbrowser", "open"), ("pickle", "loads"), ("torch.hub", "load"), ("pydoc", "pipepager"),
                         ("torch._utils", "_rebuild_device_tensor_from_numpy"), ("numpy", "load")):  # fmt: skip
        found[f"{module}.{name}"] = pickled(Call(Global(module, name), ("touch canary",)))
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x07tQ"
    for number, part in enumerate(_TENSOR_PARTS):
        value = b"N" if part is None else pickled_value(part)
        for place in range(3):
            parts = [b"K\x00", b"K\x01\x85", b"K\x01\x85"]
            parts[place] = value if place == 0 or isinstance(part, tuple | list) else value + b"\x85"
            call = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"".join(parts) + b"tR"
            found[f"a tensor with {number} as part {place}"] = b"\x80\x02}" + _text("fc.bias") + call + b"s."
    for length in (1, 3, 4, 6):
        found[f"a storage of {length} parts"] = b"\x80\x02(" + _text("storage") + b"N" * (length - 1) + b"tQ."
    for code in b"abesuRbQ0123th\x81\x85\x86\x87\x90\x91\x92\x93\x94":
        found[f"operation {code} alone"] = b"\x80\x04" + bytes([code]) + b"."
    return found


def pickled_value(value):
    """Returns the operations that put a value onto the stack, of which a number may be of any size."""
    if isinstance(value, int) and abs(value) >= 2**120:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8b" + _u32(len(data)) + data
    return pickled(value)[2:-1]


def large_pickles():
    """Returns {name: pickle} of files of megabytes."""
    names = b"".join(_text(f"{number:05}") + b"N" for number in range(50_000))
    keys = b"".join(_text(f"{number:06}") + b"h\x00" for number in range(90_000))
    long = b"X" + _u32(7 << 20) + b"a" * (7 << 20)
    return {
        "a million million empty sets": b"\x80\x04" + b"\x8f" * 4_900_000 + b".",
        "dictionaries": b"\x80\x04(" + b"}" * 900_000 + b"l.",
        "marks": b"\x80\x04" + b"(" * 999_990 + b".",
        "module names": b"\x80\x04"
        + b"".join(b"\x8c\xff%0255d\x8c\xff%0255d\x93" % (number, number) for number in range(1100))
        + b".",
        "one large dictionary under many names": b"\x80\x04}(" + _text("a") + b"}(" + names + b"uq\x00" + keys + b"u.",
        "equal keys that are long": b"\x80\x04}" + long + b"q\x010" + long + b"q\x020"
        + b"h\x01Nsh\x02Ns" * 50_000 + b".",
        "a large tuple as arguments, again and again": b"\x80\x04(" + b"N" * 400_000 + b"tq\x00"
        b"ccollections\ndefaultdict\nq\x01" + b"h\x01h\x00R0" * 100_000 + b"N.",
        "large numbers": b"\x80\x04(" + b"".join(b"\x8a\x80" + b"\x7f" * 128 for _ in range(200_000)) + b"l.",
    }  # fmt: skip


def write_weights(folder, contents):
    """Writes {name: pickle}, each as a file; returns {name: path}."""
    paths = {}
    for number, (name, content) in enumerate(contents.items()):
        paths[name] = folder / f"{number}.pth"
        with zipfile.ZipFile(paths[name], "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/data/0", bytes(28))
    return paths


_SHAPES = [
    [1] * 9,
    [1] * 65,
    [1] * 1000,
    [0, 2**62],
    [2**62, 2**62],
    [-1],
    [1.5],
    ["1"],
    None,
    {},
    [[1]],
    10**400,
    True,
]


def safetensors():
    """Returns {name: content} of safetensors files."""
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    found = {f"shape {number}": _safe({"x": good | {"shape": shape}}) for number, shape in enumerate(_SHAPES)}
    found["nothing of a large shape"] = _safe({"x": good | {"shape": [0] + [2**31] * 3, "data_offsets": [0, 0]}})
    for number, offsets in enumerate([[0], [4, 0], [0, 8], [-4, 0], [0, 2**63], ["0", "4"], None, {}, [0, 4, 4], 4]):
        found[f"place {number}"] = _safe({"x": good | {"data_offsets": offsets}})
    for number, dtype in enumerate(["F31", 1, None, [], "\x1b[2J"]):
        found[f"type {number}"] = _safe({"x": good | {"dtype": dtype}})
    for number, header in enumerate([[], 1, None, "x", {"x": 1}, {"x": []}, {"x": {}}, {"__metadata__": 1}, {}]):
        found[f"header {number}"] = _safe(header)
    found["overlapping"] = _safe({str(number): good for number in range(1000)})
    texts = (b"[" * 100_000, b'{"a":' * 100_000, b'{"x": NaN}', b'{"x": 1' + b"0" * 5000 + b"}", b"\xff\xfe{}", b"{}x")
    for number, text in enumerate(texts):
        found[f"text {number}"] = struct.pack("<Q", len(text)) + text
    for number, size in enumerate((0, 1, 2**31, 2**63, 2**64 - 1)):
        found[f"header size {number}"] = struct.pack("<Q", size) + b"{}"
    return found


def _safe(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


# Results and metrics of runs.

_TAMPERED = [None, True, -1, 0, 1e300, "x", [], {}, [[]], {"a": []}, 10**400]
_RAW = {
    "100,000 brackets": b"[" * 100_000,
    "an integer of 5,000 digits": b'{"seed": 1' + b"0" * 5000 + b"}",
    "NaN": b'{"seed": NaN}',
    "a large float": b'{"seed": 1e999}',
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "half": b'{"method": "ce", ',
    "nested 900 deep": b'{"config": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
}
_PLACES = [("method",), ("seed",), ("teacher",), ("student",), ("dataset",), ("devices",), ("versions",), ("config",),
           ("student", "last"), ("student", "best"), ("student", "parameters"), ("student", "last", "top1"),
           ("student", "best", "epoch"), ("teacher", "last"), ("teacher", "digest"), ("teacher", "checkpoint"),
           ("config", "epochs"), ("config", "student.width"), ("config", "dataset.mean"), ("config", "dataset.name"),
           ("dataset", "categories"), ("devices", "count"), ("versions", "cskd_jax"), ("student", "chosen_on"),
           ("student", "model")]  # fmt: skip


def tampered_results(sound):
    """Returns {name: content of results.json} from a sound one."""
    found = dict(_RAW)
    for turn, place in enumerate(_PLACES):
        for step in range(3):
            value = _TAMPERED[(3 * turn + step) % len(_TAMPERED)]
            results = json.loads(json.dumps(sound))
            inner = results
            for key in place[:-1]:
                inner = inner[key]
            # A number of 400 digits is written by hand.
            name = f"{'.'.join(place)} is {'10**400' if value == 10**400 else value}"
            inner[place[-1]] = "MARK" if value == 10**400 else value
            found[name] = json.dumps(results).replace('"MARK"', "1" + "0" * 400).encode()
    for place in _PLACES:
        results = json.loads(json.dumps(sound))
        inner = results
        for key in place[:-1]:
            inner = inner[key]
        inner.pop(place[-1], None)
        found[f"no {'.'.join(place)}"] = json.dumps(results).encode()
    found["a terminal escape"] = json.dumps(sound | {"method": "\x1b[2J=1+1|<script>\u202e"}).encode()
    return found


def tampered_metrics():
    """Returns {name: content of metrics.jsonl}."""
    row = {"phase": "student", "split": "test", "step": 1, "epoch": 1, "top1": 0.5, "loss": 1.0}
    found = {
        f"row of {key} {value}": _rows([row | {key: value}]) for key in row for value in (None, "x", [], -1, 1e300)
    }
    found |= {name: content + b"\n" for name, content in _RAW.items()}
    found["empty lines"] = b"\n" * 10_000_000
    found["lines of a number"] = b"1\n" * 5_000_000
    found["rows of another split"] = _rows([row | {"split": "validation"}]) * 500_000
    found["rows of training"] = _rows([row | {"split": "train"}]).replace(b" ", b"") * 1_000_000
    found["a line without an end"] = b'{"phase": "' + b"a" * 3_000_000
    return found


def _rows(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# Records of checkpoints.


def records():
    """Returns {name: record} of checkpoints with values of wrong types."""
    sound = {"network": {"name": "resnet8", "width": 0.25}, "channels": 3}
    found = {}
    wrong = {
        "network": [
            *(None, "resnet8", {}, {"name": 1}, {"name": "resnet8", "width": "1"}, {"name": "r", "width": 1e300}),
            *({"name": "deit_tiny", "width": 1.0, "settings": wrong} for wrong in ([1], "depth", {"depth": None})),
        ],
        "channels": [None, 0, -1, "3", 1.5, True, [3]],
        "categories": ["abc", 3, [1, 2], [["a"]], {"a": 1}],
        "multilabel": [1, "yes", None],
        "images": [[], {"size": 3}, {"size": [1]}, {"mean": [0.5]}, {"mean": [], "std": []}, {"x": 1},
                   {"mean": [0.5], "std": [0.0]}, {"size": [8, -8]}],
        "method": [1, None, ["kd"]],
        "finished": [1, "yes", None],
        "progress": [[], {"count": -1}, {"sums": []}, {"evaluations": {"best": 1}}, {"x": 1}, {"seconds": "1"}],
        "version": [-1, "2", None, 1.5],
    }  # fmt: skip
    for key, values in wrong.items():
        for number, value in enumerate(values):
            found[f"{key} {number}"] = sound | {key: value}
    return found | {"a list": [], "nothing": None}


# Images, folders of images, and archives.


def _png(width, height, rows=b""):
    """A PNG file that claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(rows or bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def images():
    """Returns {name: image file}."""
    sound = photograph(0, (8, 8), format="PNG")
    gif, tiff = (photograph(0, (8, 8), format=kind) for kind in ("GIF", "TIFF"))
    compressor = zlib.compressobj()
    bomb = b"".join(compressor.compress(bytes(3 * 20_000 + 1)) for _ in range(20_000)) + compressor.flush()
    header = _png(20_000, 20_000)[:33]
    part = struct.pack(">I", len(bomb)) + b"IDAT" + bomb + struct.pack(">I", zlib.crc32(b"IDAT" + bomb))
    return {
        "PNG bomb": header + part,
        "claims 2**31 pixels a side": _png(2**31 - 1, 2**31 - 1),
        "claims 60 million pixels": _png(60_000_000, 1),
        "narrow": photograph(0, (1, 60_000), format="PNG"),
        "claims no pixels": _png(0, 0),
        "EPS": drawing(),
        "PDF": b"%PDF-1.4\n%%EOF",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        "no image": b"no image",
        "empty": b"",
        "truncated": sound[: len(sound) // 2],
        "GIF of a large screen": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "TIFF without end": tiff[:-20],
        "TIFF with a directory of nowhere": tiff[:4] + b"\xff\xff\xff\x7f" + tiff[8:],
    } | _long_headers(sound, gif, photograph(0, (8, 8), format="JPEG"))


def _long_headers(png, gif, jpeg):
    """Returns {name: image file} whose parts besides the pixels are too many."""
    large = io.BytesIO()
    Image.new("RGB", (7200, 7200)).save(large, "JPEG", progressive=True)
    large = large.getvalue()
    scan = large[large.rindex(b"\xff\xda") : -2]
    exif = Image.Exif()
    exif[0x0112] = 6
    webp = io.BytesIO()
    Image.new("RGBA", (7200, 7200)).save(webp, "WEBP", lossless=True, method=0, exif=exif)
    chunks = (struct.pack(">I", 0) + b"aaAa" + struct.pack(">I", zlib.crc32(b"aaAa"))) * 3_000_000
    palette = 13 + 3 * (2 << (gif[10] & 7))
    values = {273: (4, 15_000_000, 8), 279: (4, 15_000_000, 8)}
    tile = {322: (4, 1, 46336), 323: (4, 1, 46336), 324: (4, 1, 8), 325: (4, 1, 500)}
    return {
        "JPEG filled with 30 MB": jpeg[:2] + b"\xff" * 30_000_000 + jpeg[2:],
        "JPEG of 100 MB of EXIF": jpeg[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 1500 + jpeg[2:],
        "JPEG of 2,000 scans": large[:-2] + scan * 2000 + large[-2:],
        "JPEG of several images, the first of 2,000 scans": large[:2]
        + _several()
        + large[2:-2]
        + scan * 2000
        + large[-2:],
        "PNG whose tags share a megabyte": png[:33] + _chunk(b"eXIf", _shared_tags(1000, 1_000_000)) + png[33:],
        "WEBP of 52 million pixels on its side": webp.getvalue(),
        "PNG of 3 million chunks": png[:33] + chunks + png[33:],
        "PNG of 3 million chunks at the end": png[:-12] + chunks + png[-12:],
        "GIF of 15 million comments": gif[:palette] + b"\x21\xfe" + b"\x01a" * 15_000_000 + b"\0" + gif[palette:],
        "TIFF of 15 million strips": _tiff(values, 1) + bytes(60_000_000),
    } | {f"TIFF of large tiles by method {n}": _tiff(tile, n) + b"\x81\0" * 5000 for n in (1, 5, 8, 32773)}


def _several():
    """Returns the segment of a JPEG file that says that there are several images."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    data = file.getvalue()
    start = data.index(b"MPF\0") - 4
    return data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]


def _shared_tags(count, size):
    """Returns EXIF data in which all tags have the same bytes as their value."""
    tags = b"".join(struct.pack("<HHII", 1000 + tag, 7, size, 14 + 12 * count) for tag in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + tags + bytes(4 + size)


def _chunk(kind, data):
    """Returns a part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tiff(tags, compression):
    tags = {
        256: (4, 1, 8),
        257: (4, 1, 8),
        258: (3, 1, 8),
        259: (3, 1, compression),
        262: (3, 1, 1),
        277: (3, 1, 1),
    } | tags
    listed = b"".join(struct.pack("<HHII", tag, *values) for tag, values in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + listed + bytes(4)


def zips():
    """Returns {name: zip archive in the place of tiny-imagenet-200.zip}."""
    names = "tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/val/val_annotations.txt"
    found = {}
    # The last two, which are slow, are refused whatever the size.
    for kind, size in ((zipfile.ZIP_DEFLATED, 300), (zipfile.ZIP_BZIP2, 30), (zipfile.ZIP_LZMA, 30)):
        found[f"a text of {size} MB by method {kind}"] = _zip({names[0]: bytes(size << 20), names[1]: b""}, kind)
        small = _zip({names[0]: b"n1\n" * 999, names[1]: b""}, kind)
        found[f"damaged, method {kind}"] = small[:70] + bytes(40) + small[110:]
    for offset, value in ((6, 1), (4, 99)):  # encrypted; of a version to come
        data = bytearray(_zip({names[0]: b"n1\n", names[1]: b""}, zipfile.ZIP_STORED))
        for start in (data.index(b"PK\1\2") + offset + 2, data.index(b"PK\3\4") + offset):
            data[start] = value
        found[f"field {offset} is {value}"] = bytes(data)
    found["700,000 members without names"] = _listed(700_000)
    found["extra fields"] = _listed(480, b"x", struct.pack("<HH", 0xCAFE, 0) * 16_000)
    found["many extra fields"] = _listed(30_000, b"x", struct.pack("<HH", 0xCAFE, 0) * 250)
    return found | {"no zip": b"PK", "empty": b"", "of nothing": _zip({}, zipfile.ZIP_STORED)}


def _listed(count, name=b"", extra=b""):
    """Returns a zip archive that lists members which it does not hold."""
    fields = (20, 20, 0, 0, 0, 33, 0, 0, 0, len(name), len(extra), 0, 0, 0, 0, 0)
    members = (b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", *fields) + name + extra) * count
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(members), 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(members), 1)
    return (
        members + end + locator + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    )


def _zip(members, kind):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tars():
    """Returns {name: content of cifar-10-binary.tar.gz}."""
    import gzip
    import lzma
    import tarfile

    def header(name, size, kind=tarfile.REGTYPE):
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    member = "cifar-10-batches-bin/data_batch_1.bin"
    zeros = gzip.compress(bytes(64 << 20)) * 12
    found = {
        "zeros": zeros,
        "zeros by xz": lzma.compress(bytes(64 << 20)) * 12,
        "a member of 700 MB": gzip.compress(header(member, 700 << 20)) + zeros,
        "a member of 8 TB": gzip.compress(header(member, 8 << 40)) + zeros,
        "many members": gzip.compress(header("x", 0) * 40_000),
        "sparse": gzip.compress(header(member, 8 << 40, tarfile.GNUTYPE_SPARSE)),
        "no tar": b"text",
        "empty parts of gzip": gzip.compress(b"") * 2_500_000,
        "empty parts of xz": lzma.compress(b"") * 1_000_000,
        "a long name in gzip": b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * 60_000_000,
        "half of gzip": gzip.compress(bytes(1000))[:20],
        "xz of another kind": b"\xfd7zXZ\0" + bytes(100),
    }
    for name, content in _headers(header).items():
        found[name] = gzip.compress(content + bytes(1024), 1)
    for name, kind in (("attributes", tarfile.XHDTYPE), ("a name", tarfile.GNUTYPE_LONGNAME)):
        found[f"{name} of 700 MB"] = gzip.compress(header("x", 700 << 20, kind)) + zeros
    return found


def _headers(header):
    """Returns {name: tar archive} with headers that tarfile reads slowly or that take memory."""
    import tarfile

    def attributes(data, kind=tarfile.XHDTYPE):
        return header("x", len(data), kind) + data + bytes(-len(data) % 512)

    def record(keyword, value=b""):
        rest = b" %s=%s\n" % (keyword, value)
        return next(
            b"%d" % size + rest for size in range(len(rest), len(rest) + 9) if size == len(rest) + len(str(size))
        )

    def keywords(count):
        return b"".join(record(b"%04x" % number) for number in range(count))

    member, everywhere = header("x", 0), tarfile.XGLTYPE
    sparse = b"".join(record(b"GNU.sparse." + key, b"1") for key in (b"major", b"realsize")) + record(
        b"GNU.sparse.minor", b"0"
    )
    extended = header("x", 1 << 30, tarfile.GNUTYPE_SPARSE)
    extended = extended[:482] + b"\1" + extended[483:]
    extended = extended[:148] + b"%06o\0 " % (sum(extended[:148]) + sum(extended[156:]) + 256) + extended[156:]
    return {
        "70,000 attributes of all members": attributes(keywords(70_000), everywhere) + member * 29_000,
        "6,000 attributes of all members": attributes(keywords(6_000), everywhere) + member * 29_000,
        "many attributes of all members": (attributes(keywords(6_000), everywhere) + member) * 400,
        "many attributes of each member": (attributes(keywords(6_000)) + member) * 400,
        "attributes of digits": attributes(b"1" * 65_000) + member,
        "attributes within themselves": attributes(b"0" * 4_000 + b"1 " + b"a" * 60_000 + b"=") + member,
        "an endless sparse map": extended + ((b"00000000001\0" * 42).ljust(504, b"\0") + b"\1" + bytes(7)) * 100_000,
        "a sparse map of numbers": attributes(sparse) + header("x", 1 << 30) + b"99999999\n" + b"0\n" * 20_000_000,
        "2,000 names": (header("x", 10, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 2_000,
    }


# What is done with them. Every function returns an exit code, or raises what a command shows as one line.


def _import(path, folder):
    from cskd_jax.interop.import_torch import main

    return main(["import", str(path), "--model=resnet8", "--num_classes=7", f"--out={folder / 'out'}"])


def _report(path, _):
    from cskd_jax.report.__main__ import main

    return main(["report", str(path)])


def _record(values, _):
    from cskd_jax.errors import UserError
    from cskd_jax.training.saved import Record

    try:
        Record.from_json(values)
    except ValueError as error:  # This is what the reader of checkpoints turns into its own error.
        raise UserError(str(error)) from None


def _folder(path, _):
    from cskd_jax.data import load_dataset

    dataset = load_dataset("image_folder", path=str(path), image_size=8, streaming=False)
    return len(dataset.train.images) and None


def _data(name):
    def read(path, _):
        from cskd_jax.data import load_dataset

        load_dataset(name, data_dir=str(path))

    return read


def _written(folder, contents, name):
    """Writes {case: content} as files of this name in folders of their own; returns {case: folder}."""
    paths = {}
    for number, (case, content) in enumerate(contents.items()):
        paths[case] = folder / str(number)
        (paths[case] / name).parent.mkdir(parents=True)
        (paths[case] / name).write_bytes(content)
    return paths


def _runs(folder, results=None, metrics=None):
    """Returns {case: folder of a run} with a tampered file."""
    from tests.report_runs import write_run

    paths = {}
    for number, (case, content) in enumerate((results or metrics).items()):
        paths[case] = folder / str(number)
        write_run(paths[case], "digits", "kd", 0, 0.5)
        name = "results.json" if results else "metrics.jsonl"
        (paths[case] / name).write_bytes(content)
    return paths


def _sound_results(folder):
    from tests.report_runs import write_run

    write_run(folder / "sound", "digits", "kd", 0, 0.5)
    return json.loads((folder / "sound" / "results.json").read_text(encoding="utf-8"))


def _image_folders(folder):
    paths = {}
    for number, (case, content) in enumerate(images().items()):
        root = paths[case] = folder / str(number)
        for split, name in ((s, n) for s in ("train", "test") for n in ("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / split / name / "1.png")
        (root / "train" / "cat" / "2.png").write_bytes(content)
    return paths


def _special_files(folder):
    """Pipes, devices and links in the places of files."""
    from tests.report_runs import write_run

    found = {}
    makers = {
        "a pipe": os.mkfifo,
        "an endless device": lambda path: path.symlink_to("/dev/zero"),
        "a link to nowhere": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a folder": pathlib.Path.mkdir,
    }
    for number, (case, make) in enumerate(makers.items()):
        for name in ("results.json", "metrics.jsonl"):
            path = folder / f"{number}{name}"
            write_run(path, "digits", "kd", 0, 0.5)
            (path / name).unlink()
            make(path / name)
            found[f"{case} as {name}"] = (_report, path)
        path = folder / f"{number}.pth"
        make(path)
        found[f"{case} as weights"] = (_import, path)
    return found


def _of_runs(folder):
    """Tampered results and metrics, and files of other kinds, together, because the report is slow to import."""
    results = _runs(folder / "results", results=tampered_results(_sound_results(folder)))
    metrics = _runs(folder / "metrics", metrics=tampered_metrics())
    found = {f"results: {name}": (_report, path) for name, path in results.items()}
    found |= {f"metrics: {name}": (_report, path) for name, path in metrics.items()}
    (folder / "special").mkdir()
    return found | _special_files(folder / "special")


GROUPS = {
    "pickles": lambda folder: {n: (_import, p) for n, p in write_weights(folder, pickles()).items()},
    "safetensors": lambda folder: {
        n: (_import, p / "x.safetensors") for n, p in _written(folder, safetensors(), "x.safetensors").items()
    },
    "records": lambda folder: {n: (_record, values) for n, values in records().items()},
    "runs": _of_runs,
    "images": lambda folder: {n: (_folder, p) for n, p in _image_folders(folder).items()},
    "zip archives": lambda folder: {
        n: (_data("tiny_imagenet"), p) for n, p in _written(folder, zips(), "tiny-imagenet-200.zip").items()
    },
    "tar archives": lambda folder: {
        n: (_data("cifar10"), p) for n, p in _written(folder, tars(), "cifar-10-binary.tar.gz").items()
    },
    "large pickles": lambda folder: {n: (_import, p) for n, p in write_weights(folder, large_pickles()).items()},
}


def read_all(group, folder):
    """Returns {name: {"code", "error", "happened", "seconds" of the processor, "memory" in MB so far}} of a group."""
    from cskd_jax.commands.command_line import exit_code

    logging.disable(logging.WARNING)  # Archives of other checksums than the official one are expected here.
    found = {}
    for name, (read, source) in GROUPS[group](folder).items():
        happened.clear()
        begin, error = time.process_time(), io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = exit_code(lambda _, read=read, source=source: read(source, folder), [])
            except BaseException:  # A traceback is what must not come.
                code = traceback.format_exc()
        memory = peak_memory()
        seconds = time.process_time() - begin
        found[name] = {"code": code, "error": error.getvalue(), "happened": list(happened), "seconds": seconds}
        found[name]["memory"] = memory
    return found


def peak_memory():
    """Returns the largest memory of this process in MiB; getrusage would also count that of the process before exec."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    sys.addaudithook(watch)
    json.dump(read_all(sys.argv[1], pathlib.Path(sys.argv[2])), sys.stdout)
