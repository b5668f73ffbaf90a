from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pooch
import pytest

from spaformer_sc.datasets import _download, _parse, cosmx_nsclc, xenium_mouse_brain
from spaformer_sc.datasets._parse import read_cosmx, read_xenium

EXPR = """"fov","cell_ID","EPCAM","CD3E","KRT8","NegPrb3","NegPrb5"
2,0,9,9,9,9,9
2,1,1,0,0,0,1
2,2,0,0,3,0,0
10,0,7,7,7,7,7
10,2,0,2,0,2,0
10,1,5,0,4,0,0
"""
META = """"fov","cell_ID","Area","CenterX_local_px","CenterY_local_px","CenterX_global_px","CenterY_global_px","PanCK"
2,1,5836,100,200,25100,162200.5,3715
2,2,6841,300,400,25300,162400,1200
10,1,3300,10,20,1010,99020,11
10,2,3296,30,40,1030,99040,12
"""
COUNTS = np.array([[1, 0, 0], [0, 0, 3], [0, 2, 0], [5, 0, 4]])


def write_cosmx(folder: Path, expr: str = EXPR, meta: str = META, sample: str = "Lung6") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{sample}_exprMat_file.csv").write_text(expr)
    (folder / f"{sample}_metadata_file.csv").write_text(meta)


def write_xenium(folder: Path, prefix: str = "", cells: str | None = None) -> None:
    """Write a matrix of three cells, two genes, one control probe and one blank codeword, as Xenium's software does."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = np.array([[4, 0, 1, 0], [0, 0, 0, 2], [3, 7, 0, 0]], dtype=np.int32)  # cells × features
    row, column = np.nonzero(dense)
    with h5py.File(folder / f"{prefix}cell_feature_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array([b"1", b"2", b"3"])
        matrix["data"] = dense[row, column]
        matrix["indices"] = column.astype(np.int64)
        matrix["indptr"] = np.searchsorted(row, np.arange(4)).astype(np.int64)
        matrix["shape"] = np.array([4, 3], dtype=np.int32)
        features = matrix.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        kinds = ["Gene Expression", "Gene Expression", "Negative Control Probe", "Blank Codeword"]
        features["feature_type"] = np.array([kind.encode() for kind in kinds])
        features["genome"] = np.array([b"Unknown"] * 4)
        features["id"] = np.array([b"ENSMUSG01", b"ENSMUSG02", b"NegControlProbe_1", b"BLANK_1"])
        features["name"] = np.array([b"Acta2", b"Slc17a7", b"NegControlProbe_1", b"BLANK_1"])
    if cells is None:
        cells = '"cell_id","x_centroid","y_centroid","cell_area"\n1,10.5,20.25,305.1\n3,1,2,50\n2,30,40,176.6\n'
    with gzip.open(folder / f"{prefix}cells.csv.gz", "wt") as file:
        file.write(cells)


def test_cosmx_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cosmx(tmp_path)
    adata = read_cosmx(tmp_path, slide="Lung6")
    assert list(adata.var_names) == ["EPCAM", "CD3E", "KRT8"]
    assert list(adata.obs_names) == ["Lung6_2_1", "Lung6_2_2", "Lung6_10_2", "Lung6_10_1"]
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs["fov"]) == ["fov2", "fov2", "fov10", "fov10"]
    assert list(adata.obs["fov"].cat.categories) == ["fov2", "fov10"]
    assert list(adata.obs["slide"].cat.categories) == ["Lung6"]
    assert list(adata.obs.columns) == ["slide", "fov", "cell_ID", "Area", "PanCK"]
    assert list(adata.obs["Area"]) == [5836, 6841, 3296, 3300]
    um = 0.18
    np.testing.assert_allclose(
        adata.obsm["spatial"], um * np.array([[25100, 162200.5], [25300, 162400], [1030, 99040], [1010, 99020]])
    )
    np.testing.assert_allclose(adata.obsm["spatial_local"], um * np.array([[100, 200], [300, 400], [30, 40], [10, 20]]))
    negative = adata.obsm["negative_probes"]
    assert list(negative.columns) == ["NegPrb3", "NegPrb5"]
    np.testing.assert_array_equal(negative.to_numpy(), [[0, 1], [0, 0], [2, 0], [0, 0]])

    monkeypatch.setattr(_parse, "ROWS_PER_CHUNK", 1)
    one_by_one = read_cosmx(tmp_path, slide="Lung6")
    assert (one_by_one.X != adata.X).nnz == 0
    pd.testing.assert_frame_equal(one_by_one.obs, adata.obs)
    pd.testing.assert_frame_equal(one_by_one.obsm["negative_probes"], negative)

    adata.write_h5ad(tmp_path / "cosmx.h5ad")
    back = ad.read_h5ad(tmp_path / "cosmx.h5ad")
    np.testing.assert_array_equal(back.X.toarray(), COUNTS)
    np.testing.assert_array_equal(back.obsm["negative_probes"].to_numpy(), negative.to_numpy())


def test_cosmx_keeps_cells_that_both_files_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cosmx(tmp_path, expr=EXPR + "10,3,1,1,1,0,0\n", meta=META.replace("10,2,3296", "10,9,3296"))
    adata = read_cosmx(tmp_path, slide="s")
    assert list(adata.obs_names) == ["s_2_1", "s_2_2", "s_10_1"]
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[[0, 1, 3]])
    assert "kept the 3 cells" in caplog.text
    assert "left out 2 without metadata, 1 without counts" in caplog.text


@pytest.mark.parametrize(
    ("expr", "meta", "message"),
    [
        (EXPR.replace('"cell_ID"', '"cell"', 1), META, r"exprMat_file.csv lacks the columns \['cell_ID'\]"),
        (EXPR, META.replace("CenterY_global_px", "y"), r"metadata_file.csv lacks the columns \['CenterY_global_px'\]"),
        (EXPR + "2,1,0,0,0,0,0\n", META, "exprMat_file.csv lists cell 1 of FOV 2 more than once"),
        (EXPR, META + META.splitlines()[1] + "\n", "metadata_file.csv lists cell 1 of FOV 2 more than once"),
        (EXPR.replace("2,1,1,0", "2,1,1.5,0"), META, "values that are not counts"),
        (EXPR.replace("2,1,1,0", "2,1,-1,0"), META, "values that are not counts"),
        (EXPR.replace("2,1,1,0", "2,1,,0"), META, "values that are not counts"),
    ],
)
def test_cosmx_bad_files(tmp_path: Path, expr: str, meta: str, message: str) -> None:
    write_cosmx(tmp_path, expr, meta)
    with pytest.raises(ValueError, match=message):
        read_cosmx(tmp_path, slide="s")


def test_files_missing_or_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \*exprMat_file.csv file"):
        read_cosmx(tmp_path, slide="s")
    with pytest.raises(FileNotFoundError, match=r"holds no \*cell_feature_matrix.h5 file"):
        read_xenium(tmp_path)
    write_cosmx(tmp_path, sample="a")
    write_cosmx(tmp_path, sample="b")
    with pytest.raises(ValueError, match=r"several .* \(a_exprMat_file.csv, b_exprMat_file.csv\)"):
        read_cosmx(tmp_path, slide="s")


def check_xenium(adata: ad.AnnData) -> None:
    assert list(adata.obs_names) == ["1", "2", "3"]
    assert list(adata.var_names) == ["Acta2", "Slc17a7"]
    assert list(adata.var["gene_ids"]) == ["ENSMUSG01", "ENSMUSG02"]
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), [[4, 0], [0, 0], [3, 7]])
    assert adata.obsm["spatial"].dtype == np.float64
    np.testing.assert_array_equal(adata.obsm["spatial"], [[10.5, 20.25], [30, 40], [1, 2]])
    assert list(adata.obs["cell_area"]) == [305.1, 176.6, 50]


def test_xenium_folder(tmp_path: Path) -> None:
    write_xenium(tmp_path)
    adata = read_xenium(tmp_path)
    check_xenium(adata)
    adata.write_h5ad(tmp_path / "xenium.h5ad")
    check_xenium(ad.read_h5ad(tmp_path / "xenium.h5ad"))


def test_xenium_cells_as_parquet_with_names_in_bytes(tmp_path: Path) -> None:
    write_xenium(tmp_path, prefix="run_")
    table = pd.read_csv(tmp_path / "run_cells.csv.gz")
    (tmp_path / "run_cells.csv.gz").unlink()
    table["cell_id"] = [str(name).encode() for name in table["cell_id"]]
    table.to_parquet(tmp_path / "run_cells.parquet")
    check_xenium(read_xenium(tmp_path))


def test_xenium_bad_files(tmp_path: Path) -> None:
    write_xenium(tmp_path, cells="cell_id,x_centroid,y_centroid\n1,0,0\n2,0,0\n")
    with pytest.raises(ValueError, match="lacks 1 of the 3 cells"):
        read_xenium(tmp_path)
    write_xenium(tmp_path, cells="cell_id,x\n1,0\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['x_centroid', 'y_centroid'\]"):
        read_xenium(tmp_path)


class Server:
    """A web server on this machine. `files` maps paths to contents; those in `cut` break off half way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = unquote(self.path)
                server.requests.append(path)
                if path not in server.files:
                    self.send_error(404)
                    return
                body = server.files[path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if path in server.cut else body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr(pooch.get_logger(), "disabled", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_download, "DOWNLOAD_RETRIES", 0)
    monkeypatch.setattr(_download, "COSMX_URL", server.url + "/{sample}/{sample}+SMI+Flat+data.tar.gz")
    monkeypatch.setattr(_download, "XENIUM_URL", server.url)
    yield server
    server.close()


LUNG6 = "/Lung6/Lung6+SMI+Flat+data.tar.gz"


def archive(members: dict[str, str], link: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        if link:
            info = tarfile.TarInfo("Lung6_exprMat_file.csv")
            info.type = tarfile.SYMTYPE
            info.linkname = "/etc/hostname"
            tar.addfile(info)
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def flat_files(expr: str = EXPR, link: bool = False) -> bytes:
    inner = "Lung6/Lung6-Flat_files_and_images"
    return archive(
        {
            "../../escaped.csv": "outside",
            f"{inner}/CellComposite/CellComposite_F001.jpg": "picture",
            f"{inner}/Lung6_exprMat_file.csv": expr,
            f"{inner}/Lung6_tx_file.csv": "transcripts",
            f"{inner}/Lung6_metadata_file.csv": META,
        },
        link,
    )


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_cosmx_download_and_cache(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    server.files[LUNG6] = flat_files(link=True)
    adata = cosmx_nsclc("Lung6", cache_dir=cache)
    assert "100%" in capsys.readouterr().err
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs["slide"].unique()) == ["Lung6"]
    assert adata.uns["source"]["url"] == server.url + LUNG6
    assert adata.uns["source"]["um_per_pixel"] == 0.18
    adata.write_h5ad(tmp_path / "lung6.h5ad")

    folder = cache / "cosmx_nsclc" / "Lung6"
    kept = ["Lung6_exprMat_file.csv", "Lung6_flat_files.tar.gz.sha256", "Lung6_metadata_file.csv"]
    assert names_in(cache) == kept
    assert not (folder / "Lung6_exprMat_file.csv").is_symlink()
    recorded = (folder / "Lung6_flat_files.tar.gz.sha256").read_text().strip()
    assert recorded == hashlib.sha256(server.files[LUNG6]).hexdigest()

    again = cosmx_nsclc("Lung6", cache_dir=cache)
    assert server.requests == [LUNG6]
    assert (again.X != adata.X).nnz == 0
    assert not list(tmp_path.rglob("escaped.csv"))


def test_recorded_checksum_is_enforced(server: Server, tmp_path: Path) -> None:
    server.files[LUNG6] = flat_files()
    cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False)
    folder = tmp_path / "cosmx_nsclc" / "Lung6"
    (folder / "Lung6_exprMat_file.csv").unlink()
    server.files[LUNG6] = flat_files(EXPR.replace("5,0,4", "6,0,4"))
    before = names_in(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not have the expected SHA-256 .* delete .*Lung6_flat_files.tar.gz.sha256"
    ):
        cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False)
    assert names_in(tmp_path) == before

    (folder / "Lung6_flat_files.tar.gz.sha256").unlink()
    assert cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False).X[3, 0] == 6


def test_archive_put_there_by_hand(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "cosmx_nsclc" / "Lung6"
    folder.mkdir(parents=True)
    (folder / "Lung6_flat_files.tar.gz").write_bytes(flat_files())
    np.testing.assert_array_equal(cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False).X.toarray(), COUNTS)
    assert server.requests == []


def test_interrupted_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.files[LUNG6] = flat_files()
    server.cut.add(LUNG6)
    with pytest.raises(ConnectionError, match=r"Could not download http://127.0.0.1.*Lung6_flat_files.tar.gz"):
        cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False)
    assert names_in(tmp_path) == []
    server.cut.clear()
    np.testing.assert_array_equal(cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False).X.toarray(), COUNTS)


def test_failed_downloads_are_tried_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_download, "DOWNLOAD_RETRIES", 1)
    with pytest.raises(ConnectionError, match="404"):
        cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False)
    assert server.requests == [LUNG6, LUNG6]
    assert names_in(tmp_path) == []


def test_broken_archives(server: Server, tmp_path: Path) -> None:
    for body in (b"this is not an archive", flat_files()[:-60]):
        server.files[LUNG6] = body
        with pytest.raises(
            ValueError,
            match=r"tar.gz cannot be read as a tar archive .*; delete it and Lung6_flat_files.tar.gz.sha256",
        ):
            cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False)
        assert not list(tmp_path.rglob("*.part"))
        for path in (tmp_path / "cosmx_nsclc" / "Lung6").iterdir():
            path.unlink()
    server.files[LUNG6] = archive({"Lung6_exprMat_file.csv": EXPR}, link=True)
    with pytest.raises(ValueError, match=r"lacks Lung6_metadata_file.csv"):
        cosmx_nsclc("Lung6", cache_dir=tmp_path, progress=False)


def test_unknown_sample(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`sample='Lung7'` is not in the release; its slides are: Lung5_Rep1, .*Lung13"
    ):
        cosmx_nsclc("Lung7", cache_dir=tmp_path)


@pytest.fixture
def xenium_files(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small files under the names of the real ones, on the server, with their checksums known."""
    write_xenium(tmp_path / "made", prefix=f"{_download.XENIUM_SAMPLE}_")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert set(files) == set(_download.XENIUM_FILES)
    known = {name: hashlib.sha256(files[name]).hexdigest() for name in _download.XENIUM_FILES}
    monkeypatch.setattr(_download, "XENIUM_FILES", known)
    server.files = {f"/{name}": body for name, body in files.items()}
    return files


def test_xenium_download_and_cache(
    server: Server, xenium_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAFORMER_SC_DATA", str(tmp_path / "cache"))
    adata = xenium_mouse_brain(progress=False)
    check_xenium(adata)
    assert adata.uns["source"]["licence"] == "CC BY 4.0"
    adata.write_h5ad(tmp_path / "brain.h5ad")
    assert names_in(tmp_path / "cache") == sorted(xenium_files)
    check_xenium(xenium_mouse_brain(progress=False))
    assert len(server.requests) == 2

    matrix = next((tmp_path / "cache").rglob("*.h5"))
    matrix.write_bytes(b"damaged on disk")
    check_xenium(xenium_mouse_brain(progress=False))
    assert len(server.requests) == 3


def test_known_checksum_is_enforced(server: Server, xenium_files: dict[str, bytes], tmp_path: Path) -> None:
    name = next(name for name in xenium_files if name.endswith(".h5"))
    server.files[f"/{name}"] += b"tampered"
    with pytest.raises(ValueError, match=rf"{name} does not have the expected SHA-256 {_download.XENIUM_FILES[name]}"):
        xenium_mouse_brain(cache_dir=tmp_path / "cache", progress=False)
    assert names_in(tmp_path / "cache") == []


def test_cache_folder_of_the_system_is_the_last_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPAFORMER_SC_DATA", raising=False)
    assert _download._cache_folder(None).name == "spaformer_sc"
    monkeypatch.setenv("SPAFORMER_SC_DATA", str(tmp_path / "a"))
    assert _download._cache_folder(None) == tmp_path / "a"
    assert _download._cache_folder(tmp_path / "b") == tmp_path / "b"
