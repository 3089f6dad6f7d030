"""docs/from_python.md: its blocks run one after the other, as a reader would run them."""

import re

import jax
import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "from_python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A reader has the defaults of JAX, not the strict ones of these tests.
    with jax.numpy_dtype_promotion("standard"):
        names = {"__name__": "from_python"}
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"docs/from_python.md, block {number}", "exec"), names)
    assert names["student"].metrics["test"]["top1"] > 0.5
    assert names["vit"].metrics["test"]["top1"] > 0.2
    assert names["best"].top1 > 0.1
    # What the second phase began with, the first has not touched.
    assert names["result"].history[-1]["epoch"] == 3
    assert names["logits"].shape == (5, 10)
    assert names["again"].results["student"]["last"] == names["run"].results["student"]["last"]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_students_take_at_most_fifteen_lines():
    calls = re.findall(r"^\w+ = cskd_jax\.distill\((?:.*\n)+?\)$", PAGE, flags=re.MULTILINE)
    assert len(calls) >= 4
    assert max(len(call.splitlines()) for call in calls) <= 15
