"""Pages: every relative link leads somewhere, every public name is in the reference, and paths that are named exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
PUBLIC = ("datasets", "interpret", "metrics", "pl", "positional", "pp", "tl")


def text_of(path: Path) -> str:
    if not path.exists():
        pytest.skip(f"{path.name} is not part of this distribution")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", text_of(page))
    built = [t for t in targets if t.startswith("generated/")]  # pages that Sphinx writes
    missing = [t for t in targets if "://" not in t and t not in built and not (page.parent / t).exists()]
    assert not missing
    listed = reference()
    assert {Path(t).name.removeprefix("spaformer_sc.").removesuffix(".rst") for t in built} <= listed


def reference() -> set[str]:
    """Names that the API reference has a page for, without the name of the package."""
    return set(re.findall(r"^   ([a-z_]+\.\w+(?:\.\w+)?|[A-Z]\w+)$", text_of(ROOT / "docs" / "api.rst"), re.MULTILINE))


def test_every_public_name_is_in_the_reference() -> None:
    listed = reference()
    names = {"SpaFormer"}
    for room in PUBLIC:
        names |= {f"{room}.{name}" for name in importlib.import_module(f"spaformer_sc.{room}").__all__}
    # sf.tl has them too
    names -= {"interpret.attribution", "interpret.reach"}
    assert names <= listed
    for name in listed:
        where, _, what = f"spaformer_sc.{name}".rpartition(".")
        assert hasattr(importlib.import_module(where), what), name


def test_public_rooms_are_those_of_the_package() -> None:
    import spaformer_sc

    rooms = {name for name in spaformer_sc.__all__ if name.islower() and not name.startswith("_")} - {"settings"}
    assert rooms <= set(PUBLIC)


def test_paths_that_contributors_are_sent_to_exist() -> None:
    named = re.findall(r"`((?:spaformer_sc|tests|docs|benchmarks|scripts)(?:/[\w./]+)?)`", text_of(TOP[1]))
    assert len(named) > 20
    absent = [path for path in named if not (ROOT / path).exists()]
    if absent and not (ROOT / "benchmarks").exists():
        pytest.skip("benchmarks are not part of this distribution")
    assert not absent
