"""The benchmarks run, and the PyTorch that they compare with computes the same as we do."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    accelerator,
    category_structure,
    loop_part,
    loss_part,
    measuring,
    methods,
    pairs,
    saved_tables,
    scaling,
    start_part,
)
from cskd_jax import losses
from cskd_jax.data import Split
from cskd_jax.models import BasicBlock, Bottleneck, ResNet
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.objective import Objective
from cskd_jax.training.optimizers import StepSchedule, sgd
from cskd_jax.training.state import TrainState
from tests.whole_step import make_whole_step

try:
    import torch

    from benchmarks import torch_pairs, torch_reference, torch_training
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed: pip install 'cskd_jax[torch]'")
compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "for the compiler"])


@needs_torch
@compiled
def test_torch_reference_is_golden(loss_file, compiled):
    with np.load(loss_file) as file:
        case = dict(file)
    tensors = {
        f"{network}_{kind}": torch.from_numpy(case[f"{network}_{kind}"])
        for network in ("student", "teacher")
        for kind in ("features", "logits")
    }
    trained = [tensors[f"student_{kind}"].requires_grad_() for kind in ("features", "logits")]
    labels = torch.from_numpy(case["labels"]).long()
    num_classes = case["student_logits"].shape[1]
    groups = torch_reference.group_all(labels, num_classes) if compiled else torch_reference.group_present(labels)
    terms = torch_reference.reference_terms(
        **tensors, labels=labels, groups=groups, filter_misclassified=bool(case["filter_misclassified"])
    )
    for name, value in terms.items():
        # A squared difference of cosines that should be 0 is the square of float32's rounding in the golden file.
        np.testing.assert_allclose(value.item(), case[name], rtol=1e-5, atol=1e-13, err_msg=name)
    gradients = torch.autograd.grad(terms["category"], trained)
    for gradient, kind in zip(gradients, ("features", "logits"), strict=True):
        expected = case[f"grad_category_student_{kind}"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(), err_msg=kind)


@needs_torch
def test_torch_training_resumes(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (70, 32, 32, 3), np.uint8), rng.integers(0, 100, 70))
    dataset = types.SimpleNamespace(train=split, test=split)
    monkeypatch.setattr(torch_training, "load_data", lambda config: dataset)
    torch.save(torch_pairs.NETWORKS["resnet20"]().state_dict(), tmp_path / "teacher.pth")

    def start(workdir, *overrides):
        recipe = ["--config=cifar100_standard:resnet20/resnet8/kd", *overrides]
        arguments = [*recipe, f"--teacher={tmp_path / 'teacher.pth'}", f"--workdir={tmp_path / workdir}"]
        return torch_training.main(["torch_training", *arguments]), capsys.readouterr().err

    def train(workdir, epochs):
        assert start(workdir, f"--config.epochs={epochs}")[0] == 0
        rows = (tmp_path / workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [(row["epoch"], row["loss"], row["test_top1"]) for row in map(json.loads, rows)]

    whole = train("whole", 2)
    assert train("resumed", 1) == whole[:1]
    assert train("resumed", 2) == whole
    for override in ("epochs=1", "optimizer.learning_rate=0.01"):
        code, error = start("whole", f"--config.{override}")
        assert code == 2
        assert "holds another run" in error
    code, error = start("whole", "--config.augment.flip=False")
    assert code == 2
    assert "augment.flip cannot be changed here" in error


@needs_torch
@pytest.mark.parametrize("name", loss_part.CASES)
def test_loss_in_both(monkeypatch, name):
    monkeypatch.setattr(loss_part, "FEATURES", (2, 2, 24))
    settings, with_logits = loss_part.CASES[name]
    inputs = loss_part.make_inputs(100, with_logits)
    ours = loss_part.jax_call(inputs, 100, settings)()
    theirs = loss_part.torch_call(inputs, 100, settings, compiled=False)()
    assert set(ours[1]) == set(theirs[1])
    loss_part.check_equal(name, ours, theirs)


def network_variables(network):
    """Variables of our ResNet from a torch_reference.ResNet."""
    params, stats = {}, {}

    def take(path, module):
        target, target_stats = params, stats
        for key in path[:-1]:
            target, target_stats = target.setdefault(key, {}), target_stats.setdefault(key, {})
        conv, norm = module
        kernel = conv.weight.permute(2, 3, 1, 0)
        target[path[-1]] = {"kernel": kernel, "scale": norm.weight, "bias": norm.bias}
        target_stats[path[-1]] = {"mean": norm.running_mean, "var": norm.running_var}

    take(["stem"], network.stem)
    for stage, blocks in enumerate(network.stages, start=1):
        for index, block in enumerate(blocks, start=1):
            name = f"stage{stage}_block{index}"
            for number, layer in enumerate(block.layers, start=1):
                take([name, f"conv{number}"], layer)
            if isinstance(block.downsample, torch_reference.ConvBatchNorm):
                take([name, "downsample"], block.downsample)
    classifier = network.classifier
    params["classifier"] = {"kernel": classifier.weight.T, "bias": classifier.bias}
    return jax.tree.map(lambda x: jnp.array(x.detach().numpy()), {"params": params, "batch_stats": stats})


@needs_torch
def test_step_in_both():
    # Widths 8, 16, 32, 64: with 4 channels, channels-last, PyTorch 2.13 computes a wrong gradient of a strided 1x1
    # convolution. In evaluation mode, fresh statistics would let the features of a teacher grow without bound.
    torch.manual_seed(0)
    teacher = torch_reference.ResNet(10, (1, 1, 1, 1), bottleneck=True, width=1 / 8)
    student = torch_reference.ResNet(10, (1, 1, 1, 1), bottleneck=False, width=1 / 8)
    step = torch_reference.Step(teacher, student)
    teacher_variables, student_variables = network_variables(teacher), network_variables(student)
    sigma = jnp.array(step.sigma.weight.detach().numpy()[:, :, 0, 0].T.copy())

    common = {"num_classes": 10, "stage_sizes": (1, 1, 1, 1), "width": 1 / 8}
    losses = {
        "cross_entropy": {"weight": 0.9},
        "category_structure": {"weight": 1.0, "variant": "reference"},
        "mse_logits": {"weight": 1e-6},
    }
    optimizer = sgd(StepSchedule(0.1), momentum=0.9, weight_decay=1e-4)
    train_step = make_whole_step(
        LinenNetwork(ResNet(block=BasicBlock, **common)), Objective.create(losses, num_classes=10), optimizer,
        teacher=LinenNetwork(ResNet(block=Bottleneck, **common)),
    )  # fmt: skip
    params = {"network": student_variables.pop("params"), "losses": {"category_structure": {"sigma": sigma}}}
    state = TrainState(jnp.int32(0), params, student_variables, optimizer.init(params))
    train_step = jax.jit(train_step)

    generator = np.random.default_rng(0)
    for _ in range(3):
        images = generator.standard_normal((16, 8, 8, 3), dtype=np.float32)
        labels = generator.integers(10, size=16, dtype=np.int32)
        state, metrics = train_step(state, teacher_variables, {"image": images, "label": labels}, jax.random.PRNGKey(0))
        images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        total, parts = step(images, torch.from_numpy(labels).long())
        np.testing.assert_allclose(metrics["loss"], total.item(), rtol=1e-4)
        assert min(parts.values()) > 0
    expected = network_variables(student)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4), state.variables, expected)


@needs_torch
def test_parameter_counts_of_the_recipe():
    def size(network):
        return sum(p.numel() for p in network.parameters())

    assert size(torch_reference.ResNet(100, (3, 4, 23, 3), bottleneck=True, width=0.5)) == 10_752_388
    assert size(torch_reference.ResNet(100, (2, 2, 2, 2), bottleneck=False, width=0.25)) == 713_076


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # From PyTorch itself, which compiles.
def test_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loss_part, "FEATURES", (1, 1, 8))
    path = tmp_path / "figures.json"
    category_structure.main(["--parts", "loss", "--repeats", "2", "--json", str(path)])
    assert "20,000/100" in capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert [row["value and gradient"] for row in figures["loss"]["rows"]] == list(loss_part.CASES)
    assert figures["environment"]["versions"]["jax"] == jax.__version__


@pytest.mark.slow
@pytest.mark.exhaustive
def test_loop(monkeypatch, capsys):
    monkeypatch.setattr(loop_part, "CASES", {"small": ("resnet8", 0.25, 8, 3)})
    category_structure.main(["--parts", "loop", "--repeats", "1"])
    assert "overhead %" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.exhaustive
def test_start(small_run, tmp_path):
    seconds = start_part.seconds_to_first_steps(tmp_path / "run", *small_run)
    assert 0 < seconds["teacher"] < seconds["student"]


@pytest.mark.slow
def test_accelerator_in_miniature(tmp_path, capsys):
    accelerator.main(["--small", "--seconds=0", "--parts=steps", f"--json={tmp_path / 'figures.json'}"])
    assert "Left out for lack of time" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "figures.json").read_text())["steps"]["rows"]
    assert row["images/s"] > 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_scaling(tmp_path, monkeypatch, capsys):
    path = tmp_path / "scaling-cifar100.json"
    networks = ["--teacher=resnet8:0.25", "--student=resnet8:0.25", "--image=8"]
    monkeypatch.setattr(
        "sys.argv", ["scaling.py", "--devices=2", "--processes=1", "--sizes=", f"--json={path}", *networks]
    )
    scaling.main()
    assert scaling.STEP in capsys.readouterr().out
    assert "| resnet8:0.25 to resnet8:0.25, 8x8 | 2 | 128 | 100 | " in saved_tables.memory(tmp_path)


@pytest.mark.slow
def test_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(loss_part, "FEATURES", (1, 1, 8))
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: None)
    category_structure.main(["--parts", "loss", "--repeats", "1"])
    assert "pip install 'cskd_jax[torch]'" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--parts=nothing", "--repeats=0"])
def test_mistakes(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        category_structure.main([argument])
    assert argument.split("=")[0] in capsys.readouterr().err


@needs_torch
def test_methods_in_both():
    """The methods that a step is compared with compute what ours do."""
    generator = np.random.default_rng(0)
    student, teacher = (
        torch_pairs.Output(
            torch.from_numpy(generator.normal(size=(6, 5))),
            [torch.from_numpy(generator.normal(size=(6, channels, 4, 4))) for channels in (3, 5)],
            torch.from_numpy(generator.normal(size=(6, 7))),
        )
        for _ in range(2)
    )
    labels = np.arange(6, dtype=np.int32) % 5
    logits, embeddings = ([np.asarray(x) for x in pair] for pair in zip(student[::2], teacher[::2], strict=True))
    maps = [[np.asarray(x).transpose(0, 2, 3, 1) for x in output.maps] for output in (student, teacher)]
    attention = [losses.attention_transfer_loss(*pair) for pair in zip(*maps, strict=True)]
    expected = {
        "kd": losses.kd_loss(*logits),
        "at": sum(map(float, attention)),
        "sp": losses.similarity_preserving_loss(maps[0][-1], maps[1][-1]),
        "pkt": losses.pkt_loss(*embeddings),
        "rkd": losses.rkd_loss(*embeddings)[0],
    }
    for name, method in torch_pairs.METHODS.items():
        np.testing.assert_allclose(method(student, teacher).item(), expected[name], rtol=1e-4, err_msg=name)
    value = torch_pairs.dkd(student, teacher, torch.from_numpy(labels).long()).item()
    np.testing.assert_allclose(value, losses.dkd_loss(*logits, labels)[0], rtol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_pairs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pairs, "set_up_jax", lambda: None)
    path = tmp_path / "figures.json"
    pairs.main(
        ["--pairs=resnet8/resnet8", "--methods=kd,ce", "--devices=2", "--batch=4", "--rounds=1", f"--json={path}"]
    )
    assert "of one by one" in capsys.readouterr().out
    rows = json.loads(path.read_text())["resnet8/resnet8"]["rows"]
    assert [row["method"] for row in rows] == ["kd", "ce", "all, one by one", "kd+ce"]
    assert all(row["JAX/2 ms"] > 0 for row in rows)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_methods(monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "set_up_jax", lambda: None)
    path = tmp_path / "figures.json"
    methods.main(["--pair=resnet8/resnet8", "--methods=sp", "--batch=4", "--side=8", "--rounds=1", f"--json={path}"])
    (row,) = json.loads(path.read_text())["methods"]["rows"]
    assert row["method"] == "sp"
    assert min(row["of kd"], row["memory MB"]) > 0
