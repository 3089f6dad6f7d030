"""Embeddings of the same test images by each network: how tight the categories are, and 2-D plots of them."""

import itertools
import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from cskd_jax.data import ImageDataset
from cskd_jax.errors import UserError, printable
from cskd_jax.report.runs import Comparison, Run
from cskd_jax.report.statistics import Summary, summarize
from cskd_jax.runs import schema
from cskd_jax.runs.build import load_data, load_data_of_run, load_trained, make_normalize
from cskd_jax.training.checkpoint import FOLDER
from cskd_jax.training.embedding import embed, tightness

_MEASURED = 2000  # test images whose embeddings are measured
_SHOWN, _SHOWN_CATEGORIES = 400, 10  # of those, the number of test images in a plot, and of their categories


class Panel(NamedTuple):
    """The plot of one network.

    Attributes:
      title: Method and seed.
      points: float [N, 2], in the unit square.
    """

    title: str
    points: np.ndarray


class Embeddings(NamedTuple):
    """Measurements of the networks of a comparison, on the same test images.

    Attributes:
      images: Number of images measured.
      ratios: {row label or "teacher": `Tightness.ratio` over its runs}.
      labels: int [N], categories of the points of every panel.
      categories: {label: name} of the labels that occur.
      panels: Panels of the teacher and of the first run of each row.
    """

    images: int
    ratios: dict[str, Summary]
    labels: np.ndarray
    categories: dict[int, str]
    panels: list[Panel]


def measure(comparison: Comparison, data_dir: str | None) -> Embeddings:
    """Embeds test images with the networks of all runs.

    Args:
      comparison: Runs with their checkpoints.
      data_dir: Folder of the data sets; None uses the `dataset.data_dir` of the runs if they are prepared there, and
        the default folder otherwise.

    Raises:
      UserError: Data or checkpoints are missing, the configuration is invalid, or images have several categories.
    """
    networks = _networks(comparison)
    for _, folder in itertools.chain(*networks.values()):
        if not (folder / FOLDER).is_dir():
            raise UserError(f"there are no checkpoints in {folder}")
    config = schema.restore(comparison.runs[0].config, str(comparison.runs[0].folder))
    schema.validate(config)
    if data_dir is None:
        dataset = load_data_of_run(config)
    else:
        config.dataset.data_dir = data_dir
        dataset = load_data(config)
    if dataset.multilabel:
        raise UserError("images have several classes each, so an embedding has no single center")
    # These are the same images for every network, and for every report on this data set.
    chosen = np.sort(np.random.default_rng(0).permutation(len(dataset.test.labels))[:_MEASURED])
    images, labels = dataset.test.images[chosen], dataset.test.labels[chosen]
    shown = np.flatnonzero(np.isin(labels, np.unique(labels)[:_SHOWN_CATEGORIES]))[:_SHOWN]
    ratios, panels = {}, []
    for label, folders in networks.items():
        values = []
        for position, (title, folder) in enumerate(folders):
            embeddings = embed_images(folder, config, dataset, images)
            values.append(tightness(embeddings, labels).ratio)
            if position == 0:
                panels.append(Panel(title, project(embeddings[shown])))
        ratios[label] = summarize(values)
    categories = {int(label): printable(dataset.categories[label]) for label in np.unique(labels[shown])}
    return Embeddings(len(images), ratios, labels[shown], categories, panels)


def _networks(comparison: Comparison) -> dict[str, list[tuple[str, pathlib.Path]]]:
    """Returns {row label or "teacher": [(title, folder of its checkpoints)]}."""
    networks = {}
    taught = [run for run in comparison.distilled if run.teacher_folders]
    if taught:
        networks["teacher"] = [(f"teacher {comparison.teacher}", _teacher_folder(run)) for run in taught]
    for row in comparison.rows:
        networks[row.label] = [(f"{row.label}, seed {r.results['seed']}", r.folder / "student") for r in row.runs]
    return networks


def _teacher_folder(run: Run) -> pathlib.Path:
    """Returns the first existing folder where the teacher may be; the last candidate if none exists."""
    folders = run.teacher_folders
    return next((folder for folder in folders if folder.is_dir()), folders[-1])


def embed_images(
    folder: pathlib.Path, config: ml_collections.ConfigDict, dataset: ImageDataset, images: np.ndarray
) -> np.ndarray:
    """Returns the embeddings of images by a trained network.

    Args:
      folder: Folder of the network.
      config: Configuration of its run.
      dataset: Data set that the images belong to.
      images: uint8 [N, H, W, C].

    Returns:
      float64 [N, D].
    """
    network, saved = load_trained(folder, config, dataset, other_classes=True)
    return embed(network, saved.variables, make_normalize(config), images)


def project(embeddings: np.ndarray) -> np.ndarray:
    """Projects embeddings [N, D] into the unit square, [N, 2], by t-SNE; equal input gives equal output.

    Embeddings that are all the same up to rounding, which end a process in t-SNE, become the center of the square.
    """
    center = np.full((len(embeddings), 2), 0.5)
    if np.all(embeddings == embeddings[0]):
        return center
    # There are two principal components only if there are two features.
    embeddings = np.pad(embeddings, [(0, 0), (0, max(0, 2 - embeddings.shape[1]))])
    # Threads do not help with so few points, and on a busy machine they wait for each other for minutes.
    with threadpool_limits(1), np.errstate(all="ignore"):
        # As TSNE does with init="pca", but it does not notice if the points are too close to be scaled.
        start = PCA(2, random_state=0).fit_transform(embeddings).astype(np.float32)
        start = start / np.std(start[:, 0]) * 1e-4
        if not np.all(np.isfinite(start)):
            return center
        perplexity = min(30, (len(embeddings) - 1) / 3)
        points = TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(embeddings)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / max(high - low) + 0.5
