"""Measures one whole training step of the CIFAR-100 recipe against PyTorch."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.loss_part import COMPILED, EAGER
from benchmarks.measuring import MISSING_TORCH, Part, milliseconds
from cskd_jax.distributed.devices import AXIS, Devices
from cskd_jax.runs.build import describe_network, make_augment, make_network, make_normalize
from cskd_jax.runs.optimization import make_optimizer
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.objective import Objective
from cskd_jax.training.state import init_network, init_state
from cskd_jax.training.step import make_teacher_pass, make_train_step

NUM_CLASSES = 100
IMAGE_SHAPE = (32, 32, 3)
_STEPS_PER_EPOCH = 391


def make_batch(batch_size: int) -> dict[str, np.ndarray]:
    """Returns random images and labels."""
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(batch_size, *IMAGE_SHAPE), dtype=np.uint8)
    return {"image": images, "label": generator.integers(NUM_CLASSES, size=batch_size, dtype=np.int32)}


def jax_call(batch: dict[str, np.ndarray]) -> tuple[Callable[[], Any], float]:
    """Returns a function that takes one step, from uint8 images to the new state, and the seconds of its first call."""
    config = load_recipe("cifar100", [])
    settings = {"num_classes": NUM_CLASSES, "axis_name": AXIS}
    student, teacher = (
        make_network(describe_network(settings, IMAGE_SHAPE), NUM_CLASSES, config.dtype).on_axis(AXIS)
        for settings in (config.student, config.teacher)
    )
    objective = Objective.create(config.losses.to_dict(), **settings)
    _, optimizer = make_optimizer(config.optimizer, config.epochs, _STEPS_PER_EPOCH)
    augment, normalize, devices = make_augment(config), make_normalize(config), Devices()

    def preprocess(images, key, positions):
        return normalize(augment(images, key, positions))

    prepare = devices.map_teacher_pass(make_teacher_pass(teacher, preprocess=preprocess, axis_name=AXIS))
    step = devices.map_train_step(make_train_step(student, objective, optimizer, axis_name=AXIS))
    key = jax.random.PRNGKey(0)

    def init(key):
        variables, output = init_network(teacher, key, IMAGE_SHAPE)
        return init_state(key, student, objective, optimizer, IMAGE_SHAPE, output), variables

    state, variables = devices.replicate(jax.jit(init)(key))
    batch = devices.shard(batch)

    def call():
        nonlocal state
        prepared = prepare(variables, batch["image"], key, np.int32(0))
        # The old state is donated to the new one.
        state, metrics = step(state, batch | prepared, key, None)
        return state, metrics

    start = time.perf_counter()
    jax.block_until_ready(call())
    return call, time.perf_counter() - start


def torch_call(batch: dict[str, np.ndarray], compiled: bool) -> Callable[[], dict[str, float]]:
    """Returns a function that takes a step in PyTorch on normalized images and returns milliseconds of its parts."""
    import torch

    from benchmarks import torch_reference

    device = torch_reference.pick_device(jax.default_backend())
    teacher = torch_reference.ResNet(NUM_CLASSES, (3, 4, 23, 3), bottleneck=True, width=0.5)
    student = torch_reference.ResNet(NUM_CLASSES, (2, 2, 2, 2), bottleneck=False, width=0.25)
    step = torch_reference.Step(teacher, student, device, compiled)
    config = load_recipe("cifar100", [])
    images = (batch["image"] / 255 - config.dataset.mean) / config.dataset.std
    images = torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2).copy())
    images = images.to(device, memory_format=torch.channels_last)
    labels = torch.from_numpy(batch["label"]).long().to(device)
    return lambda: step(images, labels)[1]


def measure(repeats: int, with_torch: bool) -> Part:
    """Measures the median times of whole steps, interleaved, and of the parts in PyTorch."""
    batch = make_batch(load_recipe("cifar100", []).batch_size)
    ours, compile_seconds = jax_call(batch)
    references = {column: torch_call(batch, column == COMPILED) for column in ((EAGER, COMPILED) if with_torch else ())}
    for reference in references.values():
        reference()  # Compiles, or warms up.
    times, parts = [], {column: [] for column in references}
    for _ in range(max(3, repeats // 2)):
        times.append(milliseconds(ours))
        for column, reference in references.items():
            parts[column].append(reference())
    rows = [
        {"part": part, "JAX ms": None}
        | {f"{column} ms": statistics.median(step[part] for step in steps) for column, steps in parts.items()}
        for part in (parts[EAGER][0] if parts else ())
    ]
    total = {"part": "whole step", "JAX ms": statistics.median(times)}
    total |= {
        f"{column} ms": statistics.median(sum(step.values()) for step in steps) for column, steps in parts.items()
    }
    notes = [
        "Teacher ResNet101 (width 0.5) in evaluation mode, student ResNet18 (width 0.25) with sigma, variant "
        "reference, SGD. JAX runs two programs, the teacher pass and the student's step; it also crops, mirrors and "
        "normalizes, PyTorch does not.",
        f"The first step in JAX took {compile_seconds:.0f} s: it is traced and compiled.",
    ]
    text = f"{EAGER}: eager, channels-last, fused SGD; {COMPILED}: networks and loss by `torch.compile`."
    notes.append(text if with_torch else MISSING_TORCH)
    return Part(f"Training step: batch {len(batch['label'])} of 32x32 images, 100 categories", [*rows, total], notes)
