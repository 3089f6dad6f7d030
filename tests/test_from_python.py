"""docs/from_python.md: its blocks run one after the other, as a reader would run them."""

import re
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "from_python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
CHECKS = """
assert student.metrics["test"]["top1"] > 0.5, student.metrics
assert vit.metrics["test"]["top1"] > 0.2, vit.metrics
assert distilled.metrics["test"]["top1"] > 0.3, distilled.metrics
assert options.validation["best"]["epoch"] == options.best["epoch"]
assert options.metrics["test"]["top1"] > 0.2, options.metrics
assert loaded.metrics["test"]["top1"] > 0.2, loaded.metrics
assert trained(images[:5].astype(np.float32)).shape == (5, 10)
assert {"at", "rkd/angle"} <= at.history[0].keys(), at.history[0]
assert best.top1 > 0.1
assert "mse_logits" in several.history[0], several.history[0]
assert {"kd", "dml/mutual"} <= peers.history[0].keys(), peers.history[0]
assert "top1" not in free.history[0], free.history[0]
assert tuned.metrics["test"]["top1"] > 0.2, tuned.metrics
assert [row["epoch"] for row in result.history if row["split"] == "test"] == [1, 2, 3]
assert logits.shape == (5, 10)
assert again.results["student"]["last"] == run.results["student"]["last"]
"""


@pytest.mark.slow
def test_blocks(start, tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join([*BLOCKS, CHECKS]))
    process = start([str(script)], cwd=tmp_path, program=(sys.executable,))
    output, error = process.communicate()
    assert process.returncode == 0, f"{output}\n{error}"
    assert {path.name for path in tmp_path.iterdir()} == {"page.py", "runs"}


def test_students_take_at_most_fifteen_lines():
    calls = re.findall(r"^\w+ = cskd_jax\.distill\((?:.*\n)+?\)$", PAGE, flags=re.MULTILINE)
    assert len(calls) >= 4
    assert max(len(call.splitlines()) for call in calls) <= 15
