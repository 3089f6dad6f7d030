"""Files that strangers may have made: nothing runs, hangs or fills the memory, and every error is one line."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from cskd_jax.commands import together
from cskd_jax.data import load_dataset
from cskd_jax.data.images import read_image
from cskd_jax.errors import UserError
from cskd_jax.files import csv_text
from cskd_jax.inputs import open_regular, parse_json, read_bytes
from cskd_jax.interop import unpickle
from cskd_jax.report.embedding import measure
from cskd_jax.report.markdown import render
from cskd_jax.report.runs import compare, find_runs
from cskd_jax.runs import recipes
from cskd_jax.runs.build import load_data_of_run
from cskd_jax.runs.results import read_results, write_results
from cskd_jax.training import records
from cskd_jax.training.metrics import check_measured
from cskd_jax.training.records import read_rows
from tests.conftest import ROOT
from tests.hostile_inputs import GROUPS
from tests.report_runs import write_run

_SECONDS, _MEGABYTES = 10, 1024
# Least numbers of inputs, so that a mistake in making them is noticed.
_COUNTS = {
    "pickles": 90,
    "safetensors": 40,
    "records": 40,
    "runs": 150,
    "images": 25,
    "zip archives": 10,
    "tar archives": 20,
    "large pickles": 7,
}
_SLOW = ("runs", "zip archives", "tar archives", "large pickles")
# Groups of which some inputs are sound enough to be read, such as metrics without the lines that are not.
_LENIENT = ("runs", "images")


@pytest.mark.slow
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=[pytest.mark.slow] if group in _SLOW else []) for group in GROUPS]
)
def test_hostile_inputs(group, tmp_path):
    """A process of its own, because what an input makes happen and the memory that it takes stay with the process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile_inputs", group, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) >= _COUNTS[group]
    for name, outcome in found.items():
        assert outcome["happened"] == [], name
        assert outcome["code"] == 2 or (outcome["code"] == 0 and group in _LENIENT), (name, outcome)
        lines = outcome["error"].splitlines()
        assert len(lines) == (outcome["code"] == 2), (name, lines)
        assert all(line.startswith("error: ") and line.isprintable() for line in lines), (name, lines)
        assert outcome["seconds"] < _SECONDS, name
        assert outcome["memory"] < _MEGABYTES, name


def test_a_pickle_changes_nothing_that_outlives_it():
    """A state for a function was kept by the reader, for all files to come."""
    methods = {name: method for name, method in vars(unpickle.TorchUnpickler).items() if callable(method)}
    before = {name: dict(vars(method)) for name, method in methods.items()}
    for name in (b"collections\nOrderedDict", b"torch._utils\n_rebuild_tensor_v2", b"torch\nSize"):
        with pytest.raises(UserError, match="no valid pickle"):
            unpickle.load(io.BytesIO(b"\x80\x02c" + name + b"\n}U\x01aNsb."))
    assert before == {name: dict(vars(method)) for name, method in methods.items()}


@pytest.mark.parametrize(
    "text", ["1" + "0" * 50, "1e999", "NaN", "-Infinity", "[" * 51 + "]" * 51, "[" * 99_999, "", "{"]
)
def test_json_that_is_refused(text):
    with pytest.raises(ValueError, match="."):
        parse_json(text)


def test_json_keeps_what_python_writes():
    value = {"a": [1, -2.5, 1e-30, 2**64, None, True, "é\u2028"], "b": {"c": {}}}
    assert parse_json(json.dumps(value)) == value


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        read_bytes(tmp_path / "pipe", 10)
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(UserError, match="has 11 bytes; at most 10 are allowed"):
        read_bytes(tmp_path / "large", 10)


def test_a_large_file_of_holes_is_refused(tmp_path):
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.write(b"PK")
        file.truncate(3 << 30)
    with pytest.raises(UserError, match="is 3,221,225,472 bytes large, but most of them were never written"):
        open_regular(path, 4 << 30)
    path.write_bytes(b"data")
    os.truncate(path, 100 << 20)  # It costs little.
    with open_regular(path, 4 << 30) as file:
        assert file.read(5) == b"data\0"


def test_csv_is_not_executed():
    cells = ["=1+1", "+1", "-1", "@x", "\t=1", "\uff1d1", "a\nb", "\x1b[2J", "sound", -1]
    assert csv_text([cells]) == "'=1+1,'+1,'-1,'@x,\\t=1,'\uff1d1,a\\nb,\\x1b[2J,sound,-1\n"


def test_markdown_shows_html_as_text():
    text = render("<script>", "![x](http://a) ~~b~~ $c$ _d_ e_f", [])
    assert text == "## \\<script>\n\n!\\[x](http://a) \\~\\~b\\~\\~ \\$c\\$ \\_d\\_ e_f\n"


# Folders of images.


def save(path, size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / "data" / split / name / "1.png")
    return tmp_path / "data"


def load(root, **options):
    return load_dataset("image_folder", path=str(root), streaming=False, **options)


@pytest.mark.parametrize("name", ["a.tif", "a.TIFF", "a.gif", "a.jfif"])
def test_formats_that_are_read(name, root):
    save(root / "train" / "cat" / name, format={"g": "GIF", "j": "JPEG"}.get(name[2], "TIFF"))
    assert len(load(root).train.images) == 3


def test_the_first_image_of_an_animation_is_read(root):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    frames[0].save(root / "train" / "cat" / "0.gif", save_all=True, append_images=frames[1:])
    assert load(root).train.images[0, 0, 0].tolist() == [255, 0, 0]


def test_what_is_left_out_is_said(root, caplog):
    save(root / "train" / "cat" / "more" / "2.png")
    (root / "train" / "cat" / "notes.txt").write_text("x", encoding="utf-8")
    (root / "train" / "cat" / "3.png").symlink_to("nowhere")
    (root / "test" / "dog" / ".hidden.png").write_bytes(b"")
    (root / "test" / "readme.md").write_text("x", encoding="utf-8")
    (root / "val").mkdir()
    (root / "test" / ".bird").mkdir()
    load(root)
    (line,) = caplog.messages
    for text in ("1 in folders nested too deeply", "2.png", "1 in formats other than", "notes.txt", "1 broken links",
                 "3.png", "1 hidden", ".hidden.png", "1 outside of a class folder", "readme.md",
                 "1 other files or folders beside train and test", "data/val", "1 hidden folders",
                 ".bird"):  # fmt: skip
        assert text in line


def test_a_class_that_loses_everything_is_refused(root):
    (root / "train" / "cat" / "1.png").rename(root / "train" / "cat" / "1.psd")
    with pytest.raises(UserError, match=r"train/cat has no images: .*; skipped files: 1 in formats other .*1\.psd"):
        load(root)


def test_names_of_classes_that_no_result_can_hold(root):
    for split in ("train", "test"):
        os.rename(root / split / "cat", os.fsencode(root / split) + b"/c\xff")
    with pytest.raises(UserError, match="the name of the folder is not valid UTF-8: rename it"):
        load(root)


def test_names_of_classes_that_look_the_same(root, caplog):
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "Cat")
    load(root)
    assert "'Cat' and 'cat' are distinct, but their names differ only in case" in caplog.text
    (root / "test" / "Cat").rename(root / "test" / "CAT")
    with pytest.raises(UserError, match="is missing the class 'Cat', which train has; it has 'CAT', which differs"):
        load(root)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photographs_are_turned_upright(kind, orientation, tmp_path):
    """As Pillow's own function turns them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "photograph", size=(24, 16), format=kind, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_image(path, "x", 3, None, upright=True), expected)
    shape = (24, 16, 3) if orientation > 4 else (16, 24, 3)
    assert read_image(path, "x", 3, None, expected=shape, upright=True).shape == shape


def test_the_old_reading_does_not_turn_photographs(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    save(root / "train" / "cat" / "1.png", exif=exif)
    upright, old = (load(root, exif_orientation=value).train.images[0] for value in (True, False))
    np.testing.assert_array_equal(upright, old[::-1, ::-1])


def test_photographs_with_much_metadata(tmp_path):
    """A color profile, a thumbnail, a video after the end that looks like scans, and the layers of an editor."""
    exif = Image.Exif()
    exif[0x0112], exif[0x927C] = 3, bytes(60_000)
    jpeg = save(tmp_path / "x.jpg", exif=exif, icc_profile=bytes(2_000_000), progressive=True)
    expected = np.asarray(Image.open(jpeg).convert("RGB"))[::-1, ::-1]
    jpeg.write_bytes(jpeg.read_bytes() + b"\xff\xda" * 1000)
    np.testing.assert_array_equal(read_image(jpeg, "x", 3, None, upright=True), expected)
    layers = {37724: bytes(20_000_000)}
    tiff = save(tmp_path / "x.tiff", tiffinfo=layers, compression="tiff_lzw")
    for source in (tiff, io.BytesIO(tiff.read_bytes())):
        assert read_image(source, "x", 3, None)[3, 5].tolist() == [69, 70, 71]


def test_damaged_exif_is_no_damaged_image(tmp_path):
    path = save(tmp_path / "x.jpg", exif=b"Exif\0\0nonsense")
    assert read_image(path, "x", 3, None, upright=True).shape == (4, 6, 3)


# Results.


def test_no_side_file_costs_the_results(tmp_path, caplog):
    (tmp_path / "confusion_matrix.csv").mkdir()
    write_results(tmp_path, {"method": "ce"}, ["cat", "dog"], np.eye(2, dtype=int))
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"method": "ce"}
    assert "confusion_matrix.csv was not written" in caplog.text


def test_no_infinity_costs_the_results(tmp_path, caplog):
    results = {"method": "ce", "a": [1.5, float("nan")], "b": {"c": float("-inf"), "d": 2}}
    write_results(tmp_path, results, ["cat", "dog"], None)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found == {"method": "ce", "a": [1.5, None], "b": {"c": None, "d": 2}}
    assert "numbers that are not finite are written as null" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e37])
def test_a_network_that_measures_nonsense(value):
    check_measured("teacher a", {"top1": 0.5, "loss": 1e20})
    with pytest.raises(UserError, match=r"^teacher a: its loss is .* on the test split; it must be a finite number"):
        check_measured("teacher a", {"top1": 0.5, "loss": value})


# Metrics.

_ROW = {"phase": "student", "split": "test", "step": 1, "epoch": 1, "top1": 0.5, "loss": 1.0}


def test_lines_of_metrics_that_are_skipped_are_counted(tmp_path, caplog):
    path, row = tmp_path / "metrics.jsonl", json.dumps(_ROW)
    path.write_text(f"{row}\n{row}\n{row[:20]}", encoding="utf-8")
    assert list(read_rows(path)) == [_ROW, _ROW]
    assert not caplog.messages, "a killed run leaves half a line"
    path.write_text(f"\ufeff{row}\n{row}\n\n[]\n", encoding="utf-8")
    assert list(read_rows(path)) == [_ROW]
    assert caplog.messages == [f"{path}: lines that are not rows of JSON were skipped: 3"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n" * 2_000_000, "is not a metrics file: more than 200 of its lines are not rows of JSON"),
        ((json.dumps(_ROW) + "\n").encode() * 1_001, "has more than 1,000 rows"),
    ],
)
def test_metrics_of_no_run(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_EVALUATIONS", 1_000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_rows(path, evaluations=True))


# Configurations of runs.


def test_nothing_is_written_where_a_run_says(tmp_path, monkeypatch, capsys):
    """report and evaluate read the data set in the folder that a stranger's configuration names, or their own."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "own"))
    named = f"--config.dataset.data_dir={tmp_path / 'theirs'}"
    config = recipes.load_recipe(f"{ROOT}/configs/digits.py:ce", [named])
    assert len(load_data_of_run(config).test.labels) == 357
    assert config.dataset.data_dir is None
    assert not (tmp_path / "theirs").exists()
    assert f"is not prepared in {tmp_path / 'theirs'}" in capsys.readouterr().out
    (tmp_path / "own").rename(tmp_path / "theirs")
    config = recipes.load_recipe(f"{ROOT}/configs/digits.py:ce", [named])
    assert len(load_data_of_run(config).test.labels) == 357
    assert not (tmp_path / "own").exists()


def test_a_remote_data_dir_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://evil/bucket is a URL, not a folder"):
        load_dataset("digits", data_dir="gs://evil/bucket")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "float99"),
        ("dataset.validation_seed", -1),
        ("losses.cross_entropy.teacher", "9" * 5_000),
    ],
)
def test_a_report_does_not_use_an_invalid_configuration(key, value, tmp_path):
    write_run(tmp_path / "run", "digits", "ce", 0, 0.5)
    (tmp_path / "run" / "student" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["config"][key] = value
    path.write_text(json.dumps(results), encoding="utf-8")
    (comparison,) = compare(find_runs([tmp_path]))
    with pytest.raises(UserError, match=key):
        measure(comparison, None)


# Results of other kinds.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["student"].update(last={"epoch": 1, "mean_average_precision": 0.5}), "metrics of different tasks"),
        (lambda r: r["config"].pop("method"), "missing or wrong in config"),
        (lambda r: r["config"].update({"dataset.path": "~\0x"}), "missing or wrong in config"),
        (lambda r: r["config"].update({"dataset.path": "~\ud800x"}), "missing or wrong in config"),
        (lambda r: r["config"].update({f"x{n}": n for n in range(2_000)}), "missing or wrong in config"),
    ],
)
def test_results_that_are_refused(change, words, tmp_path):
    write_run(tmp_path / "run", "digits", "kd", 0, 0.5)
    path = tmp_path / "run" / "results.json"
    read_results(path)
    results = json.loads(path.read_text(encoding="utf-8"))
    change(results)
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_results(path)


def test_long_labels_are_cut_and_stay_distinct(tmp_path):
    for number in range(2):
        write_run(tmp_path / str(number), "digits", "kd", 0, 0.5)
        path = tmp_path / str(number) / "results.json"
        results = json.loads(path.read_text(encoding="utf-8"))
        results["config"] |= {f"key{key}": "x" * 2_000 + str(number) for key in range(9)}
        path.write_text(json.dumps(results), encoding="utf-8")
    (comparison,) = compare(find_runs([tmp_path]))
    first, second = (row.label for row in comparison.rows)
    assert first != second
    assert first[:1000] == second[:1000]
    assert max(len(first), len(second)) < 1100


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", "[[1]]", "[" * 99_999, '[["a", "b", "c", "d"]]', "[[]]"])
def test_runs_that_no_sweep_sent(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert together.main(["together"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input must hold a JSON list of runs")
