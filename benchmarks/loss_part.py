"""Measures the loss alone: value and gradient, few and many categories, against PyTorch."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.measuring import MISSING_TORCH, Part, interleaved, median_ratio
from cskd_jax.losses import category_structure_loss

BATCH = 128
FEATURES = (4, 4, 1024)
TRAINED = ("student_features", "student_logits")
FEW, MANY = 100, 20_000
EAGER, COMPILED = "PyTorch", "compiled PyTorch"
# {name: (static arguments of category_structure_loss, whether it takes logits)}
CASES = {
    "paper": ({"variant": "paper"}, False),
    "reference": ({"variant": "reference"}, True),
    "reference, no logits": ({"variant": "reference", "filter_misclassified": False}, False),
}


def make_inputs(num_classes: int, with_logits: bool) -> dict[str, np.ndarray]:
    """Returns random arguments of the loss; the student is right about 70 % of the samples, the teacher about 85 %."""
    generator = np.random.default_rng(0)
    labels = generator.integers(num_classes, size=BATCH, dtype=np.int32)
    inputs = {"labels": labels}
    for network, accuracy in (("student", 0.7), ("teacher", 0.85)):
        inputs[f"{network}_features"] = generator.standard_normal((BATCH, *FEATURES), dtype=np.float32)
        if with_logits:
            logits = generator.standard_normal((BATCH, num_classes), dtype=np.float32)
            logits[np.arange(BATCH), labels] += 20 * (generator.random(BATCH) < accuracy)
            inputs[f"{network}_logits"] = logits
    return inputs


def jax_call(inputs: dict[str, np.ndarray], num_classes: int, settings: dict[str, Any]) -> Callable[[], Any]:
    """Returns a compiled function without arguments that computes (value, {name: gradient}) from device arrays."""
    inputs = jax.device_put(inputs)
    trained = {name: inputs.pop(name) for name in TRAINED if name in inputs}

    def loss(trained, inputs):
        return category_structure_loss(**trained, **inputs, num_classes=num_classes, **settings)[0]

    # All arrays are arguments, because XLA would compute with closed-over ones while it compiles.
    return partial(jax.jit(jax.value_and_grad(loss)), trained, inputs)


def torch_call(
    inputs: dict[str, np.ndarray], num_classes: int, settings: dict[str, Any], compiled: bool
) -> Callable[[], Any]:
    """Returns the same in PyTorch, eager or by `torch.compile`."""
    import torch

    from benchmarks import torch_reference

    device = torch_reference.pick_device(jax.default_backend())
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    tensors["labels"] = tensors["labels"].long()
    trained = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name in TRAINED}
    options = {name: value for name, value in settings.items() if name != "variant"}

    def loss(student_features, teacher_features, labels, **logits):
        group = torch_reference.group_all if compiled else torch_reference.group_present
        groups = group(labels, num_classes) if compiled else group(labels)
        if settings["variant"] == "paper":
            return torch_reference.paper_loss(student_features, teacher_features, groups)
        arguments = student_features, teacher_features, labels, groups
        return torch_reference.reference_terms(*arguments, **logits, **options)["category"]

    function = torch.compile(loss) if compiled else loss

    def call():
        value = function(**tensors)
        gradients = torch.autograd.grad(value, list(trained.values()))
        torch_reference.synchronize(device)
        return value.detach(), dict(zip(trained, gradients, strict=True))

    return call


def check_equal(name: str, ours: Any, theirs: Any) -> None:
    """Raises AssertionError unless two (value, {name: gradient}) agree."""
    np.testing.assert_allclose(float(ours[0]), float(theirs[0]), rtol=1e-4, err_msg=f"{name}: value")
    for argument, gradient in ours[1].items():
        expected = theirs[1][argument].cpu().numpy()
        # Single elements near 0 have no significant digits in float32.
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=atol, err_msg=f"{name}: gradient of {argument}")


def measure(repeats: int, with_torch: bool) -> Part:
    """Measures median times at 100 and 20,000 categories, and of PyTorch at 100, all interleaved."""
    rows = []
    for name, (settings, with_logits) in CASES.items():
        inputs = make_inputs(FEW, with_logits)
        calls = {
            f"JAX {FEW:,}": jax_call(inputs, FEW, settings),
            f"JAX {MANY:,}": jax_call(make_inputs(MANY, with_logits), MANY, settings),
        }
        if with_torch:
            calls |= {column: torch_call(inputs, FEW, settings, column == COMPILED) for column in (EAGER, COMPILED)}
        few, *others = calls.values()
        for reference in others[1:]:
            check_equal(name, few(), reference())
        times = dict(zip(calls, interleaved(list(calls.values()), repeats), strict=True))
        row = {"value and gradient": name} | {column: statistics.median(values) for column, values in times.items()}
        row |= dict.fromkeys(column for column in (EAGER, COMPILED) if column not in row)
        few_ms = times[f"JAX {FEW:,}"]
        row[f"{MANY:,}/{FEW:,}"] = median_ratio(times[f"JAX {MANY:,}"], few_ms)
        for column in (EAGER, COMPILED):
            row[f"{column}/JAX"] = median_ratio(times[column], few_ms) if column in times else None
        rows.append(row)
    return Part(f"Loss: batch {BATCH}, features {'x'.join(map(str, FEATURES))}, float32", rows, _notes(with_torch))


def _notes(with_torch):
    features = int(np.prod(FEATURES))
    growth = (features + MANY) / (features + FEW)
    notes = [
        f"Median milliseconds; {FEW:,} and {MANY:,}: categories of the label set, labels uniformly random. Ratios are "
        "medians over calls made one right after the other.",
        f"With {MANY:,} categories a batch of {BATCH} holds up to {BATCH} centers, with {FEW} at most {FEW}: their "
        f"cosines are {(BATCH / FEW) ** 2:.2f} times as much work. A larger label set adds nothing further.",
        f"Logits of {MANY:,} categories make the inputs themselves {growth:.1f} times larger (row reference); the rows "
        "without logits leave that out.",
    ]
    text = (
        f"{EAGER}: without loops, sums by `index_add`; {COMPILED}: by `torch.compile`, sums by one-hot products. Both "
        f"at {FEW:,} categories. Value and gradient are checked to be those of JAX."
    )
    return notes + [text if with_torch else MISSING_TORCH]
