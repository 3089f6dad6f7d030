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


def torch_call(inputs: dict[str, np.ndarray], settings: dict[str, Any], by_product: bool) -> Callable[[], Any]:
    """Returns the same in PyTorch, with cosines from one matrix product or row by row (`by_product`)."""
    import torch

    from benchmarks import torch_reference

    device = torch_reference.pick_device(jax.default_backend())
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    tensors["labels"] = tensors["labels"].long()
    trained = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name in TRAINED}
    options = {name: value for name, value in settings.items() if name != "variant"}
    options["cosines"] = torch_reference.cosines_by_product if by_product else torch_reference.cosines_by_rows

    def call():
        if settings["variant"] == "paper":
            value = torch_reference.paper_loss(**tensors, **options)
        else:
            value = torch_reference.reference_terms(**tensors, **options)["category"]
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
    """Measures median times at 100 and 20,000 categories, and of PyTorch at 100."""
    rows = []
    for name, (settings, with_logits) in CASES.items():
        inputs = make_inputs(FEW, with_logits)
        few = jax_call(inputs, FEW, settings)
        many = jax_call(make_inputs(MANY, with_logits), MANY, settings)
        few_ms, many_ms = interleaved([few, many], repeats)
        few_median, many_median = statistics.median(few_ms), statistics.median(many_ms)
        row = {
            "value and gradient": name,
            f"JAX {FEW:,}": few_median,
            f"JAX {MANY:,}": many_median,
            f"{MANY:,}/{FEW:,}": many_median / few_median,
            "in pairs": median_ratio(many_ms, few_ms),
        }
        for column, by_product in (("PyTorch", False), ("PyTorch*", True)):
            milliseconds = None
            if with_torch:
                reference = torch_call(inputs, settings, by_product)
                check_equal(name, few(), reference())
                milliseconds = statistics.median(interleaved([reference], max(3, repeats // 4), warm_up=1)[0])
            row[f"{column} {FEW:,}"] = milliseconds
            row[f"{column}/JAX"] = milliseconds / few_median if milliseconds else None
        rows.append(row)
    return Part(f"Loss: batch {BATCH}, features {'x'.join(map(str, FEATURES))}, float32", rows, _notes(with_torch))


def _notes(with_torch):
    features = int(np.prod(FEATURES))
    growth = (features + MANY) / (features + FEW)
    notes = [
        f"Median milliseconds; {FEW:,} and {MANY:,}: categories of the label set, labels uniformly random; in pairs: "
        "median ratio of calls made one right after the other.",
        f"With {MANY:,} categories a batch of {BATCH} holds up to {BATCH} centers, with {FEW} at most {FEW}: their "
        f"cosines are {(BATCH / FEW) ** 2:.2f} times as much work. A larger label set adds nothing further.",
        f"Logits of {MANY:,} categories make the inputs themselves {growth:.1f} times larger (row reference); the rows "
        "without logits leave that out.",
    ]
    text = (
        "PyTorch: a direct port with loops over samples, categories and rows of cosines; PyTorch*: with the cosines "
        "from one matrix product. Value and gradient are checked to be those of JAX."
    )
    return notes + [text if with_torch else MISSING_TORCH]
