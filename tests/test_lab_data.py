"""Data of the lab: determinism, strict splits, no side effects, provenance, and errors that say what to do."""
import functools
import gzip
import hashlib
import http.server
import random
import threading

import numpy as np
import pytest
import torch

from curvlab.lab import data

LOADERS = {
    "digits": data.digits, "digits-image": functools.partial(data.digits, flat=False, scale="standard"), "breast-cancer": data.breast_cancer, "wine": data.wine,
    "diabetes": data.diabetes, "mnist1d": functools.partial(data.mnist1d, n=500), "curves": functools.partial(data.curves, n=40, test=10),
    "language": functools.partial(data.language, "python", n=50, n_test=20), "least-squares": functools.partial(data.least_squares, noise=0.1, test=5), "separable": functools.partial(data.separable, n=50, test=10),
}
every = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@every
def test_seed_decides_and_global_random_states_stay(load):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    data._mnist1d_arrays.cache_clear()
    one, same, other = load(seed=3), load(seed=3), load(seed=4)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.x_train, other.x_train)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])


@every
def test_record_is_complete(load):
    found = load(seed=0)
    assert found.licence and found.source and len(found.x_train) == len(found.y_train) == len(found) and len(found.x_test) == len(found.y_test)
    assert found.x_train.isfinite().all() and found.first(5).x_train.shape == (5, *found.x_train.shape[1:])
    if found.x_train.is_floating_point():
        double = found.to(dtype=torch.float64)
        assert double.x_train.dtype == torch.float64 and double.y_train.is_floating_point() == found.y_train.is_floating_point()


@pytest.mark.parametrize("test", [0, 1, 7, 0.25, 19])
def test_split_is_a_partition(test):
    x = np.arange(20)
    a, ya, b, yb = data.split(x, -x, test, seed=5)
    assert sorted([*a, *b]) == list(range(20)) and (ya == -a).all() and (yb == -b).all()
    assert len(b) == (5 if test == 0.25 else test)


@pytest.mark.parametrize("test", [20, -1, 1.5e3])
def test_split_refuses(test):
    with pytest.raises(ValueError, match="test="):
        data.split(np.arange(20), np.arange(20), test, 0)


def test_standardising_uses_training_rows_only():
    x = np.random.default_rng(0).normal(3, 5, (50, 2))
    train, test = data.standardise(x[:40], x[40:])
    again, _ = data.standardise(x[:40], 100 * x[40:])
    assert np.allclose(train, again) and np.allclose(train.mean(0), 0) and np.allclose(train.std(0), 1)
    assert (data.standardise(np.ones((4, 1)), np.ones((2, 1)))[0] == 0).all()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fake_fashion(tmp_path, monkeypatch):
    """A tiny set in the published format, with the checksums patched to match, and no other source."""
    rng = np.random.default_rng(0)
    folder, table = tmp_path / "fashion", {}
    folder.mkdir()
    for name in data.FASHION_FILES:
        raw = idx(rng.integers(0, 256, (6, 28, 28)) if "images" in name else rng.integers(0, 10, 6))
        packed = gzip.compress(raw)
        (folder / f"{name}.gz").write_bytes(packed)
        table[name] = hashlib.sha256(packed).hexdigest(), hashlib.sha256(raw).hexdigest()
    monkeypatch.setattr(data, "FASHION_FILES", table)
    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path / "none")
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CURVLAB_OFFLINE", "1")
    monkeypatch.delenv("CURVLAB_FASHION_MNIST", raising=False)
    return folder


def test_fashion_pooling_and_scale(fake_fashion, monkeypatch):
    monkeypatch.setenv("CURVLAB_FASHION_MNIST", str(fake_fashion))
    whole = data.fashion_mnist(4, 2, standardised=False, flat=False, dtype=torch.float64)
    pooled = data.fashion_mnist(4, 2, pool=4, standardised=False, flat=False, dtype=torch.float64)
    assert torch.allclose(torch.nn.functional.avg_pool2d(whole.x_train, 4), pooled.x_train) and pooled.x_test.shape == (2, 1, 7, 7)
    scaled = data.fashion_mnist(4, 2, dtype=torch.float64)
    assert abs(scaled.x_train.mean()) < 1e-12 and abs(scaled.x_train.std(unbiased=False) - 1) < 1e-12
    assert torch.allclose((whole.x_test.flatten(1) - whole.x_train.mean()) / whole.x_train.std(unbiased=False), scaled.x_test)
    assert data.have_fashion_mnist()


def test_fashion_places_in_order(fake_fashion, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist.*CURVLAB_FASHION_MNIST"):
        data.fashion_mnist(4, 2)
    assert not data.have_fashion_mnist()
    fake_fashion.rename(tmp_path / "cache").joinpath("x")
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").mkdir()
    (tmp_path / "moved").rename(tmp_path / "cache" / "fashion-mnist")
    assert data.fashion_mnist_folder() == tmp_path / "cache" / "fashion-mnist"
    monkeypatch.setenv("CURVLAB_FASHION_MNIST", str(tmp_path))     # a wrong folder is not passed over in silence
    with pytest.raises(FileNotFoundError, match="CURVLAB_FASHION_MNIST"):
        data.fashion_mnist(4, 2)


def test_fashion_refuses_other_bytes(fake_fashion, monkeypatch):
    monkeypatch.setenv("CURVLAB_FASHION_MNIST", str(fake_fashion))
    (fake_fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(6))))
    with pytest.raises(ValueError, match="not the published file"):
        data.fashion_mnist(4, 2)


def test_fashion_refuses_sizes(fake_fashion):
    for wrong in ({"n": 0}, {"n": 60001}, {"n_test": 10001}, {"pool": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            data.fashion_mnist(**wrong)


@pytest.fixture
def server(fake_fashion):
    handler = functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None}), directory=str(fake_fashion))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def test_fashion_download_is_verified(fake_fashion, server, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "FASHION_URL", server)
    monkeypatch.delenv("CURVLAB_OFFLINE")
    assert data.fashion_mnist(4, 2).source == str(tmp_path / "cache" / "fashion-mnist")
    url, folder = f"{server}train-labels-idx1-ubyte.gz", tmp_path / "other"
    with pytest.raises(ValueError, match="hash"):
        data.download(url, "0" * 64, folder)
    assert not any(folder.glob("*.gz"))
    with pytest.raises(FileNotFoundError, match="could not download"):
        data.download(f"{server}missing.gz", "0" * 64, folder)


@pytest.fixture
def no_text(tmp_path, monkeypatch):
    monkeypatch.delenv("CURVLAB_TEXT", raising=False)
    monkeypatch.setenv("CURVLAB_OFFLINE", "1")
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    data.corpus.cache_clear()
    yield tmp_path
    data.corpus.cache_clear()


def test_corpus_error_says_how(no_text, monkeypatch):
    for name in ("auto", "king-james", "shakespeare"):
        with pytest.raises(FileNotFoundError, match="apt-get install bible-kjv bible-kjv-text.*CURVLAB_TEXT"):
            data.corpus(name)
    monkeypatch.setenv("CURVLAB_TEXT", str(no_text / "none.txt"))
    with pytest.raises(FileNotFoundError, match="CURVLAB_TEXT"):
        data.corpus()
    assert len(data.corpus("python").text) > 100_000


def test_corpus_places_in_order(no_text, monkeypatch):
    cached = no_text / "cache" / "shakespeare" / "input.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text("To be, or not to be\n")
    assert data.corpus().name == "tiny-shakespeare"
    program = no_text / "bible"
    program.write_text("#!/bin/sh\ni=0; while [ $i -lt 30001 ]; do echo \"Ge1:$i In the beginning\"; i=$((i+1)); done\n")
    program.chmod(0o755)
    data.corpus.cache_clear()
    assert data.corpus().name == "king-james" and data.corpus().text.splitlines()[0] == "In the beginning"
    mine = no_text / "mine.txt"
    mine.write_text("abc")
    monkeypatch.setenv("CURVLAB_TEXT", str(mine))
    data.corpus.cache_clear()
    assert data.corpus().text == "abc" and data.corpus("python").name == "python-help"


def test_language_windows_do_not_leak(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("ab" * 450 + "cd" * 50)        # c and d occur in the last tenth only
    found = data.language(str(text), n=200, n_test=50, context=5, size=10)
    assert found.info["vocabulary"][1:] == ["a", "b"] and (found.x_train > 0).all() and (found.x_test == 0).all() and (found.y_test == 0).all()
    with pytest.raises(ValueError, match="context=100"):
        data.language(str(text), context=100)
    with pytest.raises(ValueError, match="unit="):
        data.language(str(text), unit="letter")


def test_words_are_units(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat. the cat ran. " * 40)
    found = data.language(str(text), n=10, n_test=5, context=3, unit="word", size=4)
    assert found.info["vocabulary"][1:] == [".", "cat", "the"]


def test_noise_free_regression_interpolates_and_noisy_one_does_not():
    assert data.least_squares(dtype=torch.float64).info["residual"] < 1e-25
    noisy = data.least_squares(noise=0.5, dtype=torch.float64)
    x, y = noisy.train
    assert noisy.info["residual"] > 0.1 and (x.T @ (x @ noisy.info["solution"][:, None] - y)).abs().max() < 1e-10
