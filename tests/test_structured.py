"""Every structured matrix against dense linear algebra on generic matrices, in float64."""
import pytest
import torch

from curvlab.curvature import BlockDiagonal, Dense, Diagonal, Kronecker, KroneckerDiagonal, KroneckerEigen, LowRankDiagonal, StructuredOperator, low_rank

ROWS, COLUMNS = 3, 4
N = ROWS * COLUMNS


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.double)


def spd(*shape, seed=0):
    X = normal(*shape, 2 * shape[-1], seed=seed)
    return X @ X.mT / shape[-1]


def positive(*shape, seed=0):
    return normal(*shape, seed=seed).abs() + 0.2


def kinds(*batch):
    A, G = spd(*batch, COLUMNS), spd(*batch, ROWS)
    return {
        "dense": Dense(spd(*batch, N)),
        "diagonal": Diagonal(positive(*batch, ROWS, COLUMNS)),
        "kronecker": Kronecker(A, G),
        "kronecker-diagonal": KroneckerDiagonal(positive(*batch, COLUMNS), G),
        "eigen": Kronecker(A, G).eigen(),
        "eigen-diagonal": KroneckerDiagonal(positive(*batch, COLUMNS), G).eigen(),
        "corrected": KroneckerEigen(Kronecker(A, G).eigen().QA, Kronecker(A, G).eigen().QG, positive(*batch, ROWS, COLUMNS)),
        "low-rank": LowRankDiagonal(normal(*batch, N, 3), positive(*batch, 3), positive(*batch, ROWS, COLUMNS)),
    }


CASES = [(name, batch) for batch in ((), (2,), (2, 3)) for name in kinds()]
case = pytest.mark.parametrize("name, batch", CASES, ids=str)


def slow_product(D, V):
    """`D` `(..., n, n)` times each `V` `(..., rows, columns)`, one group after the other."""
    out = torch.empty_like(V)
    for k, (M, v) in enumerate(zip(D.reshape(-1, N, N), V.reshape(-1, N))):
        out.view(-1, N)[k] = torch.stack([sum(M[i, j] * v[j] for j in range(N)) for i in range(N)])
    return out


@case
def test_products_and_solves(name, batch):
    M, V = kinds(*batch)[name], normal(*batch, ROWS, COLUMNS, seed=5)
    D = M.to_dense()
    assert torch.allclose(M @ V, slow_product(D, V), atol=1e-12)
    many = normal(7, *batch, ROWS, COLUMNS)
    assert torch.allclose(M @ many, torch.stack([M @ v for v in many]), atol=1e-12)
    assert torch.allclose(M.solve(V), slow_product(torch.linalg.inv(D), V), atol=1e-8)
    assert torch.allclose(M.solve(many), torch.stack([M.solve(v) for v in many]), atol=1e-8)
    assert torch.allclose(M.inverse().to_dense(), torch.linalg.inv(D), atol=1e-8)
    assert type(M.inverse()) is type(M)


@case
def test_numbers(name, batch):
    M = kinds(*batch)[name]
    D = M.to_dense()
    assert D.shape == (*batch, N, N) and M.trace().shape == batch
    assert torch.allclose(D, D.mT, atol=1e-12)
    assert torch.allclose(M.trace(), D.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert torch.allclose(M.diagonal().reshape(*batch, N), D.diagonal(dim1=-2, dim2=-1))
    assert torch.allclose(M.logdet(), torch.linalg.slogdet(D).logabsdet)
    assert torch.allclose(M.frobenius_norm(), torch.linalg.matrix_norm(D))
    if name != "low-rank":
        assert torch.allclose(M.spectral_norm(), torch.linalg.matrix_norm(D, 2))


@pytest.mark.parametrize("name, batch", [c for c in CASES if c[0] != "low-rank"], ids=str)
@pytest.mark.parametrize("p", [-1.0, -0.25, 0.5, 2.0])
def test_powers(name, batch, p):
    M = kinds(*batch)[name]
    values, Q = torch.linalg.eigh(M.to_dense())
    assert torch.allclose(M.power(p).to_dense(), Q @ torch.diag_embed(values**p) @ Q.mT, rtol=1e-7, atol=1e-8)


@case
def test_damping(name, batch):
    M, eye = kinds(*batch)[name], torch.eye(N, dtype=torch.double)
    if name.startswith("kronecker"):  # factored: not exact, but never less than lam
        assert torch.linalg.eigvalsh(M.damped(0.3).to_dense() - M.to_dense()).min() >= 0.3 - 1e-10
        assert torch.allclose(M.eigen().damped(0.3).to_dense(), M.to_dense() + 0.3 * eye)
    else:
        assert torch.allclose(M.damped(0.3).to_dense(), M.to_dense() + 0.3 * eye)


def test_a_diagonal_factor_is_the_dense_factor_with_zeros():
    a, G = positive(2, COLUMNS), spd(2, ROWS)
    ours, dense = KroneckerDiagonal(a, G), Kronecker(torch.diag_embed(a), G)
    for f in (lambda M: M, lambda M: M.damped(0.2), lambda M: M.eigen(), lambda M: M.inverse(), lambda M: M.power(0.5)):
        assert torch.allclose(f(ours).to_dense(), f(dense).to_dense())


def test_woodbury_takes_zero_and_negative_weights():
    M = LowRankDiagonal(normal(N, 3), torch.tensor([0.0, -0.01, 2.0], dtype=torch.double), positive(ROWS, COLUMNS) + 1)
    V, D = normal(ROWS, COLUMNS), M.to_dense()
    assert torch.allclose(M.solve(V).flatten(), torch.linalg.solve(D, V.flatten()))
    assert torch.allclose(M.inverse().to_dense(), torch.linalg.inv(D)) and torch.allclose(M.logdet(), torch.logdet(D))


def test_square_root_of_a_singular_matrix_is_real():
    v = normal(N, 2)
    root = Dense(v @ v.T).power(0.5).matrix
    assert torch.allclose(root @ root, v @ v.T, atol=1e-7)


def test_block_diagonal_is_the_direct_sum():
    blocks = list(kinds(2).values())
    whole, Vs = BlockDiagonal(blocks), [normal(2, ROWS, COLUMNS, seed=k) for k in range(len(blocks))]
    D = torch.block_diag(*(G for M in blocks for G in M.to_dense()))
    flat = lambda Us: torch.cat([U.flatten() for U in Us])
    assert torch.equal(whole.to_dense(), D)
    assert torch.allclose(flat(whole @ Vs), D @ flat(Vs)) and torch.allclose(flat(whole.solve(Vs)), torch.linalg.solve(D, flat(Vs)))
    assert torch.allclose(whole.logdet(), torch.logdet(D)) and torch.allclose(whole.frobenius_norm(), D.norm()) and torch.allclose(whole.trace(), D.trace())
    assert torch.allclose(whole.inverse().to_dense(), torch.linalg.inv(D), atol=1e-8)
    with pytest.raises(TypeError, match="LowRankDiagonal.*spectral_norm"):
        whole.spectral_norm()
    assert torch.allclose(BlockDiagonal(blocks[:-1]).spectral_norm(), torch.linalg.matrix_norm(torch.block_diag(*(G for M in blocks[:-1] for G in M.to_dense())), 2))


def scattered(seed=0):
    """An operator whose blocks lie scattered over the vector."""
    places = torch.randperm(2 * N + 2 * N + 5, generator=torch.Generator().manual_seed(seed))
    pieces = {"a.one": (places[: 2 * N].view(2, ROWS, COLUMNS), kinds(2)["kronecker"]), "a.two": (places[2 * N : 4 * N].view(2, ROWS, COLUMNS), kinds(2)["eigen"]),
              "b": (places[4 * N :].view(1, 1, 5), Dense(spd(1, 5)))}
    return StructuredOperator(pieces, len(places), torch.double, torch.device("cpu"))


def test_operator_over_a_flat_vector():
    A = scattered()
    D, V = torch.zeros(A.shape, dtype=torch.double), normal(A.shape[0], 3)
    for name, M in A.blocks.items():  # entry by entry
        dense = BlockDiagonal([M]).to_dense()
        for i, p in enumerate(A.index[name].flatten()):
            for j, q in enumerate(A.index[name].flatten()):
                D[p, q] = dense[i, j]
    assert torch.allclose(A.to_dense(), D) and torch.allclose(A @ V, D @ V) and torch.allclose(A @ V[:, 0], D @ V[:, 0])
    assert torch.allclose(A.solve(V), torch.linalg.solve(D, V), atol=1e-8) and torch.allclose(A.damped(0.1).to_dense(), D + 0.1 * torch.eye(len(D)))
    assert torch.allclose(A.diagonal(), D.diagonal()) and torch.allclose(A.logdet(), torch.logdet(D)) and torch.allclose((A + 0.5) @ V, D @ V + 0.5 * V)
    mine = torch.cat([A.index["a.one"].flatten(), A.index["a.two"].flatten()]).sort().values
    assert A.layer("a").names == ["a.one", "a.two"] and torch.allclose(A.layer("a").to_dense(), D[mine][:, mine])


def test_operator_refuses_what_it_cannot_do():
    A = scattered()
    with pytest.raises(ValueError, match="name='c' is no block; there are a.one, a.two, b"):
        A.layer("c")
    with pytest.raises(ValueError, match="damping_in='both'"):
        A.damped(0.1, "both")
    with pytest.raises(ValueError, match="b has shape"):
        A.solve(torch.zeros(3))
    hole = StructuredOperator({"a": (torch.arange(4).view(1, 1, 4), Dense(spd(1, 4)))}, 6, torch.double, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 of 6 positions"):
        hole.solve(torch.ones(6, dtype=torch.double))
    with pytest.raises(ValueError, match="rank=0"):
        low_rank(spd(4), 0)


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_low_rank_keeps_the_top_eigenpairs_and_the_diagonal(rank):
    M = spd(20)
    values, Q = torch.linalg.eigh(M)
    top = (Q[:, -rank:] * values[-rank:]) @ Q[:, -rank:].T
    expected = top + torch.diag((M - top).diagonal())
    assert torch.allclose(low_rank(M, rank).to_dense(), expected, atol=1e-5)
    assert torch.allclose(low_rank(scattered(), rank).diagonal(), scattered().diagonal(), atol=1e-8)
