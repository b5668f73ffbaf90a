"""The report: one page that says what a result records, honestly, and needs nothing but itself."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

import spaformer_sc as sf
from spaformer_sc.training.reliability import LEVELS
from tests import made_up
from tests.conftest import contents

pytestmark = pytest.mark.usefixtures("unseen")

VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """A page taken apart; refuses one whose tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def report(adata, tmp_path: Path, **choices) -> Page:
    path = tmp_path / "report.html"
    assert sf.pl.report(adata, path, **choices) == path
    return Page(path)


def test_says_what_the_result_records(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    adata = made_up.result()
    before, figures, style = contents(adata), plt.get_fignums(), dict(mpl.rcParams)
    page = report(adata, tmp_path)
    assert contents(adata) == before
    assert plt.get_fignums() == figures
    assert dict(mpl.rcParams) == style
    for said in (
        "288 cells × 30 genes, 2 fields of view",
        "were 1.49 times as likely under this imputation",
        "and 1.07 times as likely as under what each gene's own counts",
        "10 of 30 genes are reliable. Of 4 others too few transcripts were held out to tell.",
        "1 of 2 fields of view are not reliable as a whole: right",
        "All scores rest on 4,500 transcripts",
        "gain over own counts+0.070 ± 0.010",
        "Over all entries the gap is at most 1.0 points",
        "plain (weight 0.60), wide (weight 0.40)",
        "arXiv 2302.03038",
        "test the counts",
    ):
        assert said in page.text, said
    assert "Do not rely on it" not in page.text
    genes = [row for row in page.rows if row[0] in adata.var_names]
    assert len(genes) == 30
    assert genes[0] == ["gene29", "reliable", "+0.127 ± 0.020", "0.93 ± 0.05", "295"]
    order = [LEVELS.index(row[1].removesuffix(" (too few)")) for row in genes]
    assert order == sorted(order, reverse=True)
    assert [row[0] for row in genes if row[1].endswith("(too few)")] == ["gene15", "gene14", "gene13", "gene0"]
    assert ["right", "144", "2,500", "−0.010 ± 0.020", "no better than baseline"] in page.rows


def test_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = report(made_up.result(), tmp_path)
    images = page.of("img")
    assert len(images) == 3 + 4 * 3
    for image in images:
        assert len(image["alt"]) > 15
        assert int(image["width"]) > 100
    for address in [*(image["src"] for image in images), *(source["srcset"] for source in page.of("source"))]:
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert [link["href"] for link in page.of("a")] == ["https://arxiv.org/abs/2302.03038"]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|\son\w+=", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.of("html") == [{"lang": "en"}]
    levels = [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == "h1"
    assert levels.count("h1") == 1


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    adata = made_up.result()
    adata.var_names = ["<b>&1", *adata.var_names[1:]]
    adata.obs["fov"] = adata.obs["fov"].cat.rename_categories({"left": "<i>", "right": "a&b"})
    adata.uns["spaformer"]["fovs"]["fov"] = ["<i>", "a&b"]
    page = report(adata, tmp_path, genes=["<b>&1"], title="<script>x</script>", fov="<i>")
    assert "<b>&1 ·" in page.text
    assert "<script>x</script>" in page.text
    assert "Field of view <i>." in page.text
    assert page.of("script") == page.of("b") == page.of("i") == []


def test_says_plainly_what_is_wrong(tmp_path: Path) -> None:
    adata = made_up.result()
    record = adata.uns["spaformer"]
    adata.var["spaformer_reliability"] = LEVELS[0]
    record["scores"] |= {"better_than_baseline": False, "gain_over_baseline": -0.02}
    record["params"] |= {"zeros": "keep", "missing": "absent"}
    record["params"]["graph_summary"] |= {"n_components": 50, "n_fovs": 9}
    record["history"]["validation"][-1] = 0.9
    record["posterior"] = None
    adata.layers["absent"] = np.zeros(adata.shape, dtype=bool)
    page = report(adata, tmp_path)
    for said in (
        "0.98 times as likely as under what each gene's own counts",
        "was not shown to be better than each gene's mean and own counts. Do not rely on it.",
        "No gene is reliable.",
        "There are only 288 cells",
        "fitted to, and scored on, 2 of the 9 fields of view",
        "falls into 50 parts",
        "Of network 2 the score was best at the last step",
        "were left at 0",
        "The decoder is Gaussian",
        "Some entries were not measured",
        "none is drawn",
    ):
        assert said in page.text, said
    assert len(page.of("img")) == 2


def test_too_little_to_say_anything(tmp_path: Path) -> None:
    adata = made_up.result()
    record = adata.uns["spaformer"]
    record["scores"] = dict.fromkeys(record["scores"], float("nan")) | {"better_than_baseline": False}
    for score in ("gain_over_baseline", "gain_over_baseline_se", "true_correlation"):
        adata.var[f"spaformer_{score}"] = np.nan
    adata.var["spaformer_reliability"] = LEVELS[0]
    page = report(adata, tmp_path)
    assert "Too little was held out to say how good this imputation is." in page.text
    assert "nothing can be said of how good the result is" in page.text
    assert ["gene0", f"{LEVELS[0]} (too few)", "–", "–", "5"] in page.rows


@pytest.mark.parametrize(("level", "drawn"), [(LEVELS[2], "reliable"), (LEVELS[1], "weak")])
def test_draws_the_surest_genes(level: str, drawn: str, tmp_path: Path) -> None:
    adata = made_up.result()
    if level != LEVELS[2]:
        adata.var["spaformer_reliability"] = LEVELS[1]
    page = report(adata, tmp_path)
    assert re.findall(r"(gene\d+) · ", page.text) == ["gene29", "gene28", "gene27", "gene26"]
    assert f"The {drawn} genes whose gain" in page.text


def test_survives_a_file(tmp_path: Path) -> None:
    import anndata as ad

    adata = made_up.result()
    adata.write_h5ad(tmp_path / "result.h5ad")
    page = report(ad.read_h5ad(tmp_path / "result.h5ad"), tmp_path)
    assert "10 of 30 genes are reliable" in page.text


def test_a_whole_file_or_none(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    adata = made_up.result()
    monkeypatch.setattr("spaformer_sc.pl._report.chart", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sf.pl.report(adata, path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    with pytest.raises(ValueError, match=r"must end in \.html"):
        sf.pl.report(adata, tmp_path / "report.pdf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sf.pl.report(adata, tmp_path / "nowhere" / "report.html")
    with pytest.raises(KeyError, match=r"run `sf\.tl\.impute` first"):
        sf.pl.report(adata, path, key_added="other")
    with pytest.raises(KeyError, match="nothere"):
        sf.pl.report(adata, path, genes=["nothere"])
    adata.X = adata.X * 2
    with pytest.raises(ValueError, match="no longer holds the counts"):
        sf.pl.report(adata, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"
