"""How well classes can be told apart in the embedding of a network."""

import json

import numpy as np
import pytest

from cskd_jax.errors import UserError
from cskd_jax.evaluate.__main__ import main
from cskd_jax.evaluate.embedding import score
from cskd_jax.training.embedding import embed

KEYS = ("knn", "probe", "within", "between")


def make_classes(count, spread):
    """Embeddings of three classes around three directions of lengths that do not matter, and their labels."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 3, count)
    points = np.eye(3, 5)[labels] + spread * rng.normal(size=(count, 5))
    return points * rng.uniform(1, 3, (count, 1)), labels


def test_nearest_neighbors_vote_by_their_cosine():
    train, test = make_classes(90, 0.5), make_classes(60, 0.5)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], test[0])]
    cosines = unit[1] @ unit[0].T
    nearest = np.argsort(-cosines, axis=1)[:, :20]
    votes = np.zeros((60, 3))
    for row, indices in enumerate(nearest):
        np.add.at(votes[row], train[1][indices], np.exp(cosines[row, indices] / 0.07))
    assert score(*train, *test)["knn"] == np.mean(votes.argmax(axis=1) == test[1])


def test_classes_apart_and_classes_mixed():
    apart = score(*make_classes(90, 0.05), *make_classes(60, 0.05))
    assert apart["knn"] == apart["probe"] == 1
    assert apart["within"] < 0.5 * apart["between"]
    points, labels = make_classes(90, 0.05)
    mixed = score(points, np.random.default_rng(0).permutation(labels), *make_classes(60, 0.05))
    assert max(mixed["knn"], mixed["probe"]) < 0.8


def test_few_images_are_all_neighbors():
    assert score(*make_classes(9, 0.01), *make_classes(30, 0.01)).keys() == set(KEYS)


def test_a_network_without_an_embedding():
    class Network:
        def apply(self, variables, images, *, train):
            del variables, images, train
            return type("Output", (), {"embedding": None}), {}

    with pytest.raises(UserError, match="the network returns no embedding"):
        embed(Network(), {}, lambda x: x, np.zeros((3, 4, 4, 1), np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
def test_an_embedding_that_is_not_finite(value):
    class Network:
        def apply(self, variables, images, *, train):
            del variables, train
            return type("Output", (), {"embedding": images[:, 0, 0] + value}), {}

    with pytest.raises(UserError, match=r"holds a value that is not a finite number below 1e\+15"):
        embed(Network(), {}, lambda x: x.astype(np.float32), np.zeros((3, 4, 4, 1), np.uint8))


def test_embeddings_that_are_all_zero():
    labels = np.arange(30) % 3
    assert set(score(np.zeros((30, 5)), labels, np.zeros((30, 5)), labels)) == set(KEYS)


@pytest.mark.slow
def test_command(done, digits_dir, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("student", "config.json"):
        (tmp_path / "run" / name).symlink_to(done / name)
    arguments = [str(tmp_path / "run"), "--embedding", f"--config.dataset.data_dir={digits_dir}"]
    assert main(["evaluate", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("nearest neighbors") for line in lines)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    measured = evaluation["networks"]["student"]["embedding"]
    assert all(0.1 < measured[name] <= 1 for name in ("knn", "probe"))
    ratio = measured["within"] / measured["between"]
    assert any(line.split() == ["within", "/", "between", f"{ratio:.4f}"] for line in lines)
    assert "20 training images" in evaluation["embedding"]
    data, fingerprint = evaluation["dataset"], json.loads((done / "config.json").read_text())["dataset fingerprint"]
    assert (data["path"], data["data_dir"], data["fingerprint"]) == (None, str(digits_dir), fingerprint)
    count = f"{data['test_examples']} test images, data fingerprint {fingerprint}"
    assert f"digits from {digits_dir}: {count}" in lines
