"""The numbers of docs/results.md and README.md are those of the raw results in docs/results."""

import re
import shutil

import pytest

from benchmarks import evidence


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The pages, as copies that may be changed."""
    pages = tuple(tmp_path / page.name for page in evidence.PAGES)
    for page, copy in zip(evidence.PAGES, pages, strict=True):
        shutil.copy(page, copy)
    monkeypatch.setattr(evidence, "PAGES", pages)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "figures", lambda folder: {})  # Drawing them takes matplotlib.
    return pages


def test_pages_and_figures_are_as_the_raw_results_have_them(capsys):
    assert evidence.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_is_named_and_mended(copies, capsys):
    found = {page: page.read_text(encoding="utf-8") for page in copies}
    texts = {page: text for page, text in found.items() if "<!-- evidence:" in text}
    assert {"results.md", "methods.md", "scaling.md", "checkpoints.md"} <= {page.name for page in texts}
    for page, text in texts.items():
        place = re.search(r"<!-- evidence:.*?\| [0-9]+\.[0-9]*([0-9]) ", text, re.DOTALL).start(1)
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        page.write_text(changed, encoding="utf-8")
        assert evidence.main(["--check"]) == 1
        assert capsys.readouterr().out == f"{page.name}: not as the raw results have it\n"
        assert page.read_text(encoding="utf-8") == changed
        assert evidence.main([]) == 0
        assert capsys.readouterr().out == f"{page.name}: rebuilt\n"
        assert page.read_text(encoding="utf-8") == text


def test_every_run_is_packed(tmp_path, monkeypatch):
    """Those that failed too: what is left of them says why."""
    for name in ("methods/a/results.json", "methods/b/config.json", "methods/b/checkpoints/array"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    evidence.pack([tmp_path / "methods"], tmp_path / "packed.tar.xz")
    monkeypatch.setattr(evidence, "RAW", tmp_path)
    evidence.unpack(tmp_path / "again")
    found = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert {str(path): (tmp_path / "again" / path).read_text() for path in found} == {
        "methods/a/results.json": "methods/a/results.json", "methods/b/config.json": "methods/b/config.json",
    }  # fmt: skip
