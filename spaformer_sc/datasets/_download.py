"""Public data sets: download, check, cache, read."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from pathlib import Path

from anndata import AnnData

from spaformer_sc._settings import settings

from ._parse import COSMX_NSCLC_PIXEL_UM, read_cosmx, read_xenium

DOWNLOAD_RETRIES = 2

COSMX_SAMPLES = ("Lung5_Rep1", "Lung5_Rep2", "Lung5_Rep3", "Lung6", "Lung9_Rep1", "Lung9_Rep2", "Lung12", "Lung13")
COSMX_URL = (
    "https://nanostring-public-share.s3.us-west-2.amazonaws.com/SMI-Compressed/{sample}/{sample}+SMI+Flat+data.tar.gz"
)
COSMX_FILES = ("{sample}_exprMat_file.csv", "{sample}_metadata_file.csv")

XENIUM_SAMPLE = "Xenium_V1_FF_Mouse_Brain_Coronal_Subset_CTX_HP"
XENIUM_URL = f"https://cf.10xgenomics.com/samples/xenium/1.0.2/{XENIUM_SAMPLE}"
# 10x publishes a checksum of the whole output only. These are of the two files in it, taken from the copies that the
# Bioconductor package SpatialExperimentIO carried.
XENIUM_FILES = {
    f"{XENIUM_SAMPLE}_cell_feature_matrix.h5": "c46affded533ee3802a8136ab61b51868831a9cd07226121f5426c81bccde12d",
    f"{XENIUM_SAMPLE}_cells.csv.gz": "9fbeb446c201e12802808ae58d027daaeb7b90051a09c3d4c74bcf46aec253f2",
}


def cosmx_nsclc(
    sample: str = "Lung5_Rep3", *, cache_dir: str | os.PathLike[str] | None = None, progress: bool | None = None
) -> AnnData:
    """Human lung cancer by CosMx: one slide of NanoString's public release (He et al. 2022, Nat Biotechnol 40:1794).

    FFPE tissue of non-small-cell lung cancer, 960 genes and 20 negative probes, 70,000 to 140,000 cells per slide.
    The archive of a slide takes about 1.6 GB. It is removed once the two files that are needed are taken out of
    it; they stay in the cache, so later calls need no network.

    NanoString publishes no checksums. The SHA-256 of the archive is therefore recorded beside it in the cache when it
    first arrives (``*.sha256``), and every later download of it has to match. An archive that you put there
    yourself, as ``cosmx_nsclc/<sample>/<sample>_flat_files.tar.gz`` in the cache, is used as it is.

    Parameters
    ----------
    sample
        Slide: ``"Lung5_Rep1"``, ``"Lung5_Rep2"``, ``"Lung5_Rep3"``, ``"Lung6"``, ``"Lung9_Rep1"``, ``"Lung9_Rep2"``,
        ``"Lung12"`` or ``"Lung13"``. Samples of one number come from one patient.
    cache_dir
        Folder to keep the files in. None means ``sf.settings.cache_dir``: the environment variable
        ``SPAFORMER_SC_DATA``, and without it the cache folder of the operating system, unless you set it.
    progress
        Show a progress bar while downloading; None for what ``sf.settings.progress`` says.

    Returns
    -------
    Cells × 960 genes, without the transcripts outside cells (``cell_ID`` 0), with

    - ``X``: CSR, float32, counts.
    - ``obs["slide"]``, ``obs["fov"]``: categorical; ``obs["cell_ID"]`` and the area, shape and staining of the cells as
      in the release.
    - ``obsm["spatial"]``: float64, cells × 2, µm (0.18 µm per pixel), in the frame of the slide;
      ``obsm["spatial_local"]``: the same in the frame of the FOV. Both keep the directions of the release.
    - ``obsm["negative_probes"]``: data frame, int32, counts of the negative probes.
    - ``uns["source"]``: where the data come from.

    Raises
    ------
    ValueError
        If `sample` is not one of the slides, or the file has the wrong checksum or cannot be read.
    ConnectionError
        If the download fails; nothing is left in the cache then.
    """
    if sample not in COSMX_SAMPLES:
        raise ValueError(f"`sample={sample!r}` is not in the release; its slides are: {', '.join(COSMX_SAMPLES)}.")
    folder = _cache_folder(cache_dir) / "cosmx_nsclc" / sample
    url = COSMX_URL.format(sample=sample)
    names = [name.format(sample=sample) for name in COSMX_FILES]
    if not all((folder / name).exists() for name in names):
        archive = _fetch(url, folder, f"{sample}_flat_files.tar.gz", sha256=None, progress=progress)
        _extract(archive, names)
        archive.unlink()
    adata = read_cosmx(folder, slide=sample)
    adata.uns["source"] = {
        "name": f"NanoString CosMx SMI NSCLC FFPE, {sample}",
        "url": url,
        "paper": "He et al. 2022, Nat Biotechnol 40:1794, doi:10.1038/s41587-022-01483-z",
        "um_per_pixel": COSMX_NSCLC_PIXEL_UM,
    }
    return adata


def xenium_mouse_brain(*, cache_dir: str | os.PathLike[str] | None = None, progress: bool | None = None) -> AnnData:
    """Mouse brain by Xenium: 10x Genomics' public coronal subset of cortex and hippocampus.

    Fresh frozen tissue, 248 genes, 36,602 cells, one continuous region without fields of view. Two files of together
    4.6 MB are downloaded from "Fresh Frozen Mouse Brain for Xenium Explorer Demo" (CC BY 4.0) and have to match the
    SHA-256 checksums that are kept in this package, at every call.

    Parameters
    ----------
    cache_dir
        Folder to keep the files in. None means ``sf.settings.cache_dir``: the environment variable
        ``SPAFORMER_SC_DATA``, and without it the cache folder of the operating system, unless you set it.
    progress
        Show a progress bar while downloading; None for what ``sf.settings.progress`` says.

    Returns
    -------
    36,602 cells × 248 genes, without control probes and codewords, with

    - ``X``: CSR, float32, counts.
    - ``obs``: the columns of the table of cells, such as ``cell_area`` (µm²) and ``transcript_counts``.
    - ``obsm["spatial"]``: float64, cells × 2, µm.
    - ``var["gene_ids"]``: Ensembl identifiers.
    - ``uns["source"]``: where the data come from.

    Raises
    ------
    ValueError
        If a file has the wrong checksum.
    ConnectionError
        If the download fails; nothing is left in the cache then.
    """
    folder = _cache_folder(cache_dir) / "xenium_mouse_brain"
    for name, sha256 in XENIUM_FILES.items():
        _fetch(f"{XENIUM_URL}/{name}", folder, name, sha256=sha256, progress=progress)
    adata = read_xenium(folder)
    adata.uns["source"] = {
        "name": f"10x Genomics {XENIUM_SAMPLE}",
        "url": XENIUM_URL,
        "licence": "CC BY 4.0",
    }
    return adata


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(cache_dir).expanduser() if cache_dir else settings.cache_dir


def _fetch(url: str, folder: Path, name: str, *, sha256: str | None, progress: bool | None) -> Path:
    """Path of file `name` in `folder`, downloaded from `url` unless it is there with the right checksum.

    The checksum is `sha256` or, where that is None, the one recorded when the file was first seen. pooch downloads to
    a temporary name, which becomes `name` only once the checksum is right.
    """
    import pooch
    from requests.exceptions import RequestException

    record = folder / f"{name}.sha256"
    recorded = record.read_text().strip() if sha256 is None and record.exists() else None
    store = pooch.create(
        path=folder,
        base_url="",
        registry={name: sha256 or recorded},
        urls={name: url},
        retry_if_failed=DOWNLOAD_RETRIES,
    )
    try:
        path = Path(store.fetch(name, progressbar=settings.progress if progress is None else progress))
    except RequestException as error:
        raise ConnectionError(
            f"Could not download {url}: {error}. Try again, or download it by other means to {folder / name}."
        ) from error
    except ValueError as error:
        advice = f" If the publisher has replaced it, delete {record} to accept the new one." if recorded else ""
        raise ValueError(
            f"The file at {url} does not have the expected SHA-256 {sha256 or recorded}, so it was not kept. Try again "
            f"in case the download was damaged.{advice}"
        ) from error
    if sha256 is None and recorded is None:
        record.write_text(pooch.file_hash(str(path)) + "\n")
    return path


def _extract(archive: Path, names: list[str]) -> None:
    """Take the files `names` out of a tar archive, from whichever folder in it, to beside it.

    Only contents are copied, to names chosen here, so nothing in the archive decides where something is written.
    """
    missing = set(names)
    advice = f"delete it and {archive.name}.sha256, and call again."
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                source = tar.extractfile(member) if name in missing and member.isfile() else None
                if source is not None:
                    partial = archive.with_name(f"{name}.part")
                    try:
                        with source, partial.open("wb") as target:
                            shutil.copyfileobj(source, target)
                        partial.replace(archive.with_name(name))
                    finally:
                        partial.unlink(missing_ok=True)
                    missing.remove(name)
                if not missing:
                    return
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be read as a tar archive ({error}); {advice}") from error
    raise ValueError(f"{archive} lacks {', '.join(sorted(missing))}; {advice}")
