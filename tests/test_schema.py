"""The table of keys: what follows from an entry, and that everything follows from it."""

import json
import types

import pytest
from ml_collections import ConfigDict

from cskd_jax.errors import UserError
from cskd_jax.losses import LOSSES
from cskd_jax.report.runs import Run
from cskd_jax.runs import document, keys, schema
from cskd_jax.runs.loss_keys import loss_keys
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.runs.workdir import check_workdir, identify, run_config
from cskd_jax.training import rules
from tests.conftest import ROOT

OLD_RECIPE = ROOT / "tests" / "fixtures" / "old_recipe" / "cifar100.py"


def test_document_is_up_to_date():
    path = ROOT / "docs" / "configuration.md"
    assert path.read_text(encoding="utf-8") == document.document(), (
        "docs/configuration.md is out of date; write it anew: python -m cskd_jax.runs.document > docs/configuration.md"
    )


@pytest.mark.parametrize("name", ["", *LOSSES])
def test_every_key_is_explained_in_a_sentence(name):
    for path, key in (loss_keys(name) if name else keys.KEYS).items():
        assert len(key.meaning) > 10, path
        assert key.meaning.endswith("."), path


def test_every_default_is_allowed():
    tables = [keys.KEYS, *(loss_keys(name) for name in LOSSES)]
    for path, key in ((path, key) for table in tables for path, key in table.items()):
        if key.default is not keys.REQUIRED:
            rules.check(path, key.default, key.rule)


def test_table_is_frozen():
    with pytest.raises(TypeError):
        keys.KEYS["new"] = keys.KEYS["seed"]


def minimal():
    """What every recipe must say."""
    return ConfigDict(
        {
            "method": "ce",
            "dataset": {"name": "digits", "mean": (0.5,), "std": (1.0,)},
            "student": {"name": "resnet8"},
            "losses": {"cross_entropy": {"weight": 1}},
        }
    )


def test_defaults_and_what_is_required():
    required = {path for path, key in keys.KEYS.items() if key.default is keys.REQUIRED}
    assert required == {"method", "dataset.name", "dataset.mean", "dataset.std", "student.name"}
    assert schema.flatten(schema.defaults()).keys() == keys.KEYS.keys() - required
    config = schema.fill(minimal())
    schema.validate(config)
    assert (config.epochs, config.optimizer.milestones, config.teacher.name) == (200, (), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__delitem__("losses"), "config.losses must name at least one of ab, abkd, at"),
        (lambda c: c.__delitem__("method"), "configuration key method is missing; it must be a non-empty string"),
        (
            lambda c: c.student.__delitem__("name"),
            "key student.name is missing; it must be one of .*resnet18",
        ),
        (lambda c: c.losses.cross_entropy.__delitem__("weight"), "losses.cross_entropy must have a weight"),
        (lambda c: c.update(epoch=3), "unknown configuration key epoch; did you mean epochs"),
        (lambda c: c.update(optimizer=3), "unknown configuration key optimizer; did you mean optimizer.name"),
        (lambda c: c.update(epochs="3"), "epochs is '3'; it must be an integer from 1 to 1000000"),
        (lambda c: c.losses.update(kd={"weight": 1.0, "temperature": -1}), "temperature is -1.0; it must be a number"),
        (lambda c: c.losses.update(kd={"weight": 1.0, "temprature": 1}), "did you mean losses.kd.temperature"),
        (
            lambda c: c.losses.update(kdd={"weight": 1.0}),
            "configuration key losses.kdd; did you mean losses.kd",
        ),
    ],
)
def test_mistakes_in_a_recipe(change, message):
    config = minimal()
    change(config)
    with pytest.raises(UserError, match=message):
        schema.validate(schema.fill(config))


@pytest.mark.parametrize(
    "text",
    ["-" * 9_000 + "1", "(" * 9_000, "[" * 90, "0x" + "f" * 6_000, "((0x" + "f" * 6_000 + ",),)", "1" * 5_000, "{[1]}"],
)
@pytest.mark.parametrize(
    "rule", [rules.DEVIATIONS, rules.CHANNELS, rules.SHARES, rules.SIDES, rules.EPOCHS, rules.LOSS_TEACHER]
)
def test_text_that_python_cannot_calculate_with(text, rule):
    with pytest.raises(UserError, match="it must be "):
        rules.check("key", rules.parse("key", text, rule), rule)


def test_values_have_the_types_of_their_keys():
    """So that what overrides them is converted to these types."""
    config = minimal()
    config.teacher = ConfigDict({"checkpoint": None, "width": 2})
    config.epochs = 9
    config.keep_checkpoints = config.get_ref("epochs")
    schema.fill(config)
    assert (config.get_type("epochs"), config.teacher.get_type("checkpoint")) == (int, str)
    assert (config.teacher.get_type("width"), config.losses.cross_entropy.get_type("weight")) == (float, float)
    assert config.losses.cross_entropy.get_type("end_epoch") is int
    config.epochs = 10
    assert config.keep_checkpoints == 10, "a reference stays one"


@pytest.fixture
def new_key(monkeypatch):
    """Adds an entry to the table, and nothing anywhere else."""

    def add(path, key):
        monkeypatch.setattr(keys, "KEYS", types.MappingProxyType({**keys.KEYS, path: key}))

    return add


@pytest.mark.parametrize("before", [None, 0.5])
def test_a_new_key_is_one_entry(new_key, tmp_path, before):
    """It reaches configurations, their validation, the documentation, old recipes, old workdirs, and old results."""
    old = identify(load_recipe("digits:ce", []))
    (tmp_path / "student" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(old))
    extra = {} if before is None else {"before": before}
    new_key("ema.decay", keys.Key(0.0, rules.FRACTION, "Decay of the average of the weights.", **extra))

    assert schema.defaults().ema.decay == 0.0
    assert "| `ema.decay` | `0.0` | a number in [0, 1) | Decay of the average of the weights. |" in document.document()
    config = load_recipe(f"{OLD_RECIPE}:kd", ["--config.ema.decay=0.9"])
    schema.validate(config)
    assert (config.ema.decay, load_recipe(f"{OLD_RECIPE}:kd", []).ema.decay) == (0.9, 0.0)
    with pytest.raises(UserError, match="ema.decay is 2.0; it must be a number in"):
        schema.validate(load_recipe("digits:kd", ["--config.ema.decay=2"]))

    meant, other = (0.0, 0.5) if before is None else (0.5, 0.0)
    check_workdir(tmp_path, identify(load_recipe("digits:ce", [f"--config.ema.decay={meant}"])))
    with pytest.raises(UserError, match=rf"another configuration \(ema.decay {meant} != {other}\); use another"):
        check_workdir(tmp_path, identify(load_recipe("digits:ce", [f"--config.ema.decay={other}"])))
    assert run_config(tmp_path).ema.decay == meant
    assert Run(tmp_path, {"config": old}).config["ema.decay"] == meant


def test_a_new_setting_of_a_loss_is_one_field(monkeypatch, tmp_path):
    """At its default it changes nothing for the runs before it."""
    old = identify(load_recipe("digits:kd", []))
    (tmp_path / "student" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(old))

    class NewKD(LOSSES["kd"]):
        """Distillation with a bias.

        Attributes:
          bias: Number added to all logits.
        """

        bias: float | None = None

    monkeypatch.setitem(LOSSES, "kd", NewKD)
    assert "| `bias` | `None` | a non-negative number, or None | Number added to all logits. |" in document.document()
    check_workdir(tmp_path, identify(load_recipe("digits:kd", [])))
    changed = load_recipe("digits:kd", ["--config.losses.kd.bias=2"])
    schema.validate(changed)
    with pytest.raises(UserError, match=r"another configuration \(losses.kd.bias None != 2.0\)"):
        check_workdir(tmp_path, identify(changed))
