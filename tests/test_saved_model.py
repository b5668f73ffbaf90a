"""Saved models that were cut, altered, mixed up or made by others: a clear error, or a model that predicts."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import spaformer_sc as sf
from spaformer_sc._saved import SCHEMA
from tests.conftest import seal, sha256

N_MUTATIONS = 200
"""Altered copies of each of the two kinds that the suite tries: as they come, and with checksums made anew."""

DESCRIPTION, WEIGHTS = "model.json", "weights.safetensors"


@pytest.fixture(scope="module")
def saved(shared_tissue, tmp_path_factory):
    """A saved model of two small networks, the cells it was fitted to, and what it predicts for them."""
    cells = shared_tissue[:40, :12].copy()
    model = sf.SpaFormer(
        library_key="fov",
        n_latent=4,
        max_epochs=1,
        positional=["fourier", "laplacian"],
        settings={"dim": 16, "n_heads": 2, "n_networks": 2, "n_frequencies": 6},
        progress=False,
    ).fit(cells)
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save(path)
    return path, cells, model.impute(cells)


@pytest.fixture
def path(saved, tmp_path):
    """A copy of the saved model to do anything with."""
    return shutil.copytree(saved[0], tmp_path / "model")


def described(path):
    return json.loads((path / DESCRIPTION).read_text())


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_format(saved):
    description = described(saved[0])
    assert description["format"] == "spaformer_sc"
    assert description["schema"] == SCHEMA
    assert re.fullmatch("[0-9a-f]{64}", description["sha256"])
    assert description["weights_sha256"] == hashlib.sha256((saved[0] / WEIGHTS).read_bytes()).hexdigest()
    assert set(load_file(saved[0] / WEIGHTS)) >= {"gene_share", "typical"}


def test_both_files_have_the_usual_permissions(saved, tmp_path):
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE((saved[0] / name).stat().st_mode) for name in (DESCRIPTION, WEIGHTS)} == {usual}


def test_layout_and_order_of_the_description_do_not_matter(saved, path):
    _, cells, wanted = saved
    description = described(path)
    (path / DESCRIPTION).write_text(json.dumps(dict(reversed(description.items())), indent=7))
    np.testing.assert_array_equal(sf.SpaFormer.load(path, progress=False).impute(cells), wanted)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_one_altered_bit_of_the_weights_is_found(path, share):
    data = bytearray((path / WEIGHTS).read_bytes())
    data[round(share * (len(data) - 1))] ^= 1
    (path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path}.*weights.safetensors is not as it was written"):
        sf.SpaFormer.load(path)


@pytest.mark.parametrize(
    ("old", "new"), [('"target_sum": ', '"target_sum": 1'), ('"plain"', '"wide"'), ('"fov"', '"FOV"')]
)
def test_one_altered_word_of_the_description_is_found(path, old, new):
    text = (path / DESCRIPTION).read_text()
    assert old in text
    (path / DESCRIPTION).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"{path}.*model.json is not as it was written"):
        sf.SpaFormer.load(path)


def test_weights_of_another_model_are_found(path):
    weights = load_file(path / WEIGHTS)
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, path / WEIGHTS)
    with pytest.raises(ValueError, match="belongs to another model"):
        sf.SpaFormer.load(path)


def test_a_future_format_is_refused_whatever_else_it_says(path):
    (path / DESCRIPTION).write_text(json.dumps({"format": "spaformer_sc", "schema": SCHEMA + 1, "version": "7.1"}))
    with pytest.raises(ValueError, match=rf"{path}.*newer than this version of the package reads \(7\.1 wrote it\)"):
        sf.SpaFormer.load(path)


# --- nothing is executed ----------------------------------------------------------------------------------------------

WATCHED = """
import json, pathlib, sys
import spaformer_sc

spaformer_sc.SpaFormer.load(sys.argv[1], device="cpu", progress=False)
watching, seen = False, []

def watch(event, arguments):
    if watching and event in ("open", "exec", "compile", "import", "os.system", "subprocess.Popen", "socket.connect",
                              "pickle.find_class", "os.remove", "os.rename", "os.mkdir", "ctypes.dlopen"):
        seen.append([event, str(arguments[0])])

sys.addaudithook(watch)
watching = True
for path in sys.argv[2:]:
    try:
        spaformer_sc.SpaFormer.load(path, device="cpu", progress=False)
    except ValueError as error:
        seen.append(["error", str(error)])
watching = False
print(json.dumps(seen))
"""


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_opens_two_files_and_does_nothing_else(saved, tmp_path):
    """Of pickles in place of files and tensors, of paths that lead elsewhere, and of a model that is whole."""
    elsewhere = str(tmp_path / "elsewhere")
    bombs = {
        "pickle": lambda path: (path / WEIGHTS).write_bytes(pickle.dumps(Bomb(elsewhere))),
        "torch": lambda path: torch.save({"gene_share": Bomb(elsewhere)}, path / WEIGHTS),
        "description": lambda path: (path / DESCRIPTION).write_bytes(pickle.dumps(Bomb(elsewhere), protocol=0)),
        "whole": lambda path: None,
    }
    paths = []
    for name, place in bombs.items():
        paths.append(shutil.copytree(saved[0], tmp_path / name))
        place(paths[-1])
        if name in ("pickle", "torch"):
            seal(paths[-1], described(paths[-1]))
    for number, text in enumerate(["../../etc/passwd", f"{elsewhere}/x", "__import__('os').mkdir('elsewhere')"]):
        paths.append(shutil.copytree(saved[0], tmp_path / f"text {number}"))
        description = described(paths[-1])
        keys = dict.fromkeys(description["keys"], text)
        seal(paths[-1], {**description, "version": text, "keys": keys, "var_names": [f"{text}{i}" for i in range(12)]})
    before = sha256(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED, saved[0], *paths],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    seen = json.loads(done.stdout)
    assert sha256(tmp_path) == before
    assert len([text for event, text in seen if event == "error"]) == 3
    assert [pair for pair in seen if pair[0] not in ("error", "open")] == []
    files = {str(path / name) for path in paths for name in (DESCRIPTION, WEIGHTS)}
    assert {text for event, text in seen if event == "open"} <= files


# --- mutations --------------------------------------------------------------------------------------------------------

VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 10**9, 10**18, 10**400, -(10**400), 0.5, -0.0, 1e-300, 1e300,
    float("nan"), float("inf"), float("-inf"), "", "spatial", "../../model", "\x00", "\ud800", "9" * 50,
    [], [[]], [None], ["a", "a"], [1.0, 2.0], [float("nan")], {}, {"a": 1}, {"": []},
]  # fmt: skip


def places(value, where=()):
    """Every place in nested objects and lists, as keys and positions."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*where, key)
        yield from places(inner, (*where, key))


def in_bytes(rng, path):
    """Alter the bytes of one of the two files; return what was done."""
    name = str(rng.choice([DESCRIPTION, WEIGHTS]))
    data = bytearray((path / name).read_bytes())
    # Half of the time in the first bytes, where the weights have their header.
    reach = len(data) if rng.random() < 0.5 else min(len(data), 3000)
    at = int(rng.integers(reach))
    some = rng.bytes(int(rng.integers(1, 40)))
    kind = str(rng.choice(["flip", "cut", "insert", "delete", "zero", "double", "number", "nest", "repeat a key"]))
    if kind == "flip":
        for place in rng.integers(reach, size=rng.integers(1, 9)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = some
    elif kind == "delete":
        del data[at : at + len(some)]
    elif kind == "zero":
        data[at : at + len(some)] = bytes(len(some))
    elif kind == "double":
        data += data[at:]
    elif kind == "number":
        found = [match.span() for match in re.finditer(rb"[0-9.]+", bytes(data[:reach]))]
        start, end = found[int(rng.integers(len(found)))]
        data[start:end] = [b"NaN", b"1e999", b"-1", b"9" * 30, b"9" * 5000, b"0"][int(rng.integers(6))]
    elif kind == "nest":
        data[at:at] = b"[" * int(rng.choice([10, 1000, 100_000]))
    elif kind == "repeat a key":
        start = data.index(b"{") + 1
        data[start:start] = b'"schema": 1, "gene_share": {"dtype": "F32"}, "settings": [],'
    (path / name).write_bytes(data)
    return f"{kind} in {name}"


def in_values(rng, path):
    """Alter what the description or the weights say, and make the checksums fit; return what was done."""
    description = described(path)
    kind = str(rng.choice(["value", "value", "value", "delete", "move", "many", "tensor"]))
    if kind == "tensor":
        return f"tensor: {in_tensors(rng, path, description)}"
    found = [place for place in places(description) if place[0] not in ("sha256", "weights_sha256")]
    # Most numbers are scores of genes and coverage: half of the time another place.
    if rng.random() < 0.5:
        found = [place for place in found if place[0] not in ("posterior", "gene_scores", "history", "var_names")]
    *parents, key = found[int(rng.integers(len(found)))]
    holder = description
    for parent in parents:
        holder = holder[parent]
    if kind == "value":
        holder[key] = VALUES[int(rng.integers(len(VALUES)))]
    elif kind == "delete":
        del holder[key]
    elif kind == "move":
        description[str(key)] = holder[key]
        del holder[key]
    elif kind == "many":
        holder[key] = [holder[key]] * int(rng.integers(2, 500))
    seal(path, description)
    return f"{kind} at {[*parents, key]}"


def in_tensors(rng, path, description):
    """Alter the tensors in a file that stays a valid one."""
    weights = load_file(path / WEIGHTS)
    name = str(rng.choice(sorted(weights)))
    tensor = weights.pop(name)
    kinds = ["drop", "rename", "shape", "length", "empty", "scalar", "type", "nan", "inf", "scale", "negative", "swap"]
    kind = str(rng.choice(kinds))
    if kind == "rename":
        weights[f"{name}.more"] = tensor
    elif kind == "shape":
        weights[name] = tensor[None]
    elif kind == "length":
        weights[name] = torch.cat([tensor, tensor])
    elif kind == "empty":
        weights[name] = tensor[:0].clone()
    elif kind == "scalar":
        weights[name] = tensor.sum()
    elif kind == "type":
        types = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]
        weights[name] = tensor.to(types[int(rng.integers(len(types)))])
    elif kind in ("nan", "inf"):
        tensor.view(-1)[int(rng.integers(tensor.numel()))] = float(kind)
        weights[name] = tensor
    elif kind in ("scale", "negative"):
        weights[name] = tensor * (30.0 if kind == "scale" else -1.0)
    elif kind == "swap":
        other = str(rng.choice(sorted(weights)))
        weights[name], weights[other] = weights[other].clone(), tensor
    save_file(weights, path / WEIGHTS)
    seal(path, description)
    return f"{kind} of {name}"


def outcome(path, cells, wanted=None):
    """Load and predict: "refused" with a clear error, or finite values, those that are ``wanted`` if any are."""
    loaded = found = None
    try:
        loaded = sf.SpaFormer.load(path, progress=False)
        found = loaded.impute(cells)
    except (KeyError, TypeError, ValueError) as error:
        name, said = type(error).__name__, str(error)
    if loaded is None:
        assert name == "ValueError"
        assert said.startswith(f"{path} is damaged or not a saved model: ")
        return "refused"
    if found is None:
        # Names of columns, layers or genes that these cells do not have.
        assert wanted is None
        assert re.search("`(library_key|spatial_key|connectivity_key|layer|missing)=|lacks .* genes", said)
        return "does not fit the cells"
    assert np.isfinite(found).all()
    assert found.shape == cells.shape
    if wanted is not None:
        np.testing.assert_array_equal(found, wanted)
    return "predicts"


@pytest.mark.parametrize("mutate", [in_bytes, in_values])
def test_mutated_models_are_refused_or_predict(saved, tmp_path, mutate):
    whole, cells, wanted = saved
    came = Counter()
    for number in range(N_MUTATIONS):
        path = tmp_path / str(number)
        shutil.copytree(whole, path)
        done = mutate(np.random.default_rng(number), path)
        try:
            found = outcome(path, cells, wanted if mutate is in_bytes else None)
        except BaseException as error:
            error.add_note(f"mutation {number}: {done}")
            raise
        came[found] += 1
        shutil.rmtree(path)
    assert came["refused"] > N_MUTATIONS / 4
    if mutate is in_values:  # of altered bytes, those alone that are as they were are not refused
        assert came["predicts"] > 0
