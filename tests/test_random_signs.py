"""Random signs from the bits of random words: fair, independent at every lag that the words could tie together, and reproducible."""
import pytest
import torch

from curvlab.curvature.estimators import random_signs

N = 1 << 18


@pytest.mark.parametrize("seed", range(3))
def test_fair_and_independent(seed):
    "Standard scores of the mean and of products at a lag, within words and bytes and across the places of a bit; about one in 30000 would exceed 4.2 by chance."
    z = random_signs((N,), torch.Generator().manual_seed(seed))
    assert set(z.tolist()) == {-1.0, 1.0}
    scores = [z.sum() / N**0.5]
    for lag in (1, 2, 3, 7, 8, 9, 63, 64, 65, 512, N // 8 - 1, N // 8, N // 8 + 1, N // 4, N // 2):
        scores.append((z[:-lag] * z[lag:]).sum() / (N - lag) ** 0.5)
    assert max(abs(float(s)) for s in scores) < 4.2


def test_seeds_and_calls_are_independent():
    rows = [random_signs((1000,), torch.Generator().manual_seed(s)) for s in range(40)]
    g = torch.Generator().manual_seed(0)
    rows = torch.stack([*rows[1:], *(random_signs((1000,), g) for _ in range(40))])
    scores = (rows @ rows.T).fill_diagonal_(0) / 1000**0.5
    assert 0.9 < float(scores.square().sum() / (79 * 78)) < 1.1 and float(scores.abs().max()) < 5


@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (63,), (64,), (65,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_dtypes_and_repetition(shape, dtype):
    a, b = (random_signs(shape, torch.Generator().manual_seed(4), dtype) for _ in range(2))
    assert a.shape == shape and a.dtype == dtype and torch.equal(a, b) and bool((a.abs() == 1).all())
