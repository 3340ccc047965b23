"""The inspection of any network: the caller's model stays bit for bit, the numbers agree with dense matrices, the budget is kept and told, and the command writes a page."""
import copy
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from curvlab.batch.cli import app
from curvlab.curvature.operators import Hessian
from curvlab.curvature.spectrum import Eigenpairs
from curvlab.lab.inspect import SECTIONS, inspect, layer_of, traces
from curvlab.lab.inspect_inputs import Purse, loader_named, loss_named, model_named, read
from curvlab.lab.inspect_page import about, numbers, outside, page, percent, save, say_layers, say_spectrum, say_top, say_training, short, three
from curvlab.objective import Objective

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore:eigenpairs did not converge")]
CE = nn.CrossEntropyLoss()


class Small(nn.Module):
    """Convolution, batch norm, dropout, attention over rows, and a parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.attention, self.head, self.shift = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3), nn.Parameter(torch.randn(16))

    def forward(self, x):
        rows = self.drop(torch.tanh(self.norm(self.conv(x)))).transpose(1, 2).flatten(2) + self.shift
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


def problem(n=30, seed=0):
    torch.manual_seed(seed)
    return Small(), torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,))


def dense_net(seed=0):
    """A net in float64, its batch, and its Hessian and gradient written out."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(25, 5, dtype=torch.double), torch.randint(0, 4, (25,))
    shapes = [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def of(flat):
        parts = flat.split([s.numel() for s in shapes])
        return CE(torch.func.functional_call(model, {n: p.view(s) for n, p, s in zip(names, parts, shapes)}, (x,)), y)

    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    return model, x, y, torch.func.hessian(of)(w), torch.func.grad(of)(w)


@pytest.fixture(scope="module")
def seen():
    model, x, y, H, g = dense_net()
    return inspect(model, CE, [(x[:10], y[:10]), (x[10:], y[10:])], budget="1500 products", k=4, training_steps=30, name="dense net"), model, H, g


def test_a_model_with_everything_stays_bit_for_bit():
    model, x, y = problem()
    model.norm.eval()   # a mixture of modes must survive
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    state, grads, modes = copy.deepcopy(model.state_dict()), [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()], [m.training for m in model.modules()]
    storage, hooks = [p.data_ptr() for p in model.parameters()], [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    world = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), loader.generator.get_state()
    with torch.no_grad():
        found = inspect(model, CE, loader, budget="350 products", k=3, training_steps=12, optimizer="torch.optim.Adam(lr=0.01)")
    assert found.left_out == {} and found.training.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values())) and state.keys() == model.state_dict().keys()
    for p, before in zip(model.parameters(), grads):
        assert p.grad is None if before is None else p.grad is before[0] and torch.equal(p.grad, before[1])
    assert modes == [m.training for m in model.modules()] and storage == [p.data_ptr() for p in model.parameters()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(world[0], torch.get_rng_state()) and world[1] == random.getstate() and np.array_equal(world[2], np.random.get_state()[1]) and torch.equal(world[3], loader.generator.get_state())


def test_the_model_stays_when_a_measurement_fails():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return Once.apply(self.layer(x))

    model, x, y = Stubborn(), torch.randn(9, 3), torch.randint(0, 2, (9,))
    before, world = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = inspect(model, CE, (x, y), budget="300 products")
    assert set(found.failed) >= {"top", "hessian", "ggn", "traces", "training"}
    assert "once_differentiable" in found.left_out["hessian"]   # products with the Hessian would lose this part without an error
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values())) and torch.equal(world, torch.get_rng_state())
    assert "No top directions" in page(found) and "loss" in page(found)


def test_top_directions_against_the_dense_matrix(seen):
    found, model, H, g = seen
    values, vectors = torch.linalg.eigh(H)
    values, V = values.flip(0)[:4], vectors.flip(1)[:, :4]
    assert torch.allclose(found.top.pairs.values, values, atol=1e-3 * float(values[0]))
    shares = ((V.T @ g) ** 2 / (g @ g)).cumsum(0)
    assert torch.allclose(found.top.gradient, shares, atol=1e-2) and 0.05 < shares[-1] < 1
    assert found.top.along == pytest.approx(float(g @ H @ g / (g @ g)), rel=1e-6)
    ends = np.cumsum([0] + [p.numel() for p in model.parameters()])
    for layer, rows in (("0", slice(0, int(ends[2]))), ("2", slice(int(ends[2]), int(ends[4])))):
        assert torch.allclose(found.top.layers[layer], (V[rows] ** 2).sum(0), atol=2e-2)
    assert found.gradient_norm == pytest.approx(float(g.norm())) and found.parameters == {"0": 36, "2": 28} and found.kinds == {"0": "Linear", "2": "Linear"}


def test_traces_by_layer_and_densities_against_the_dense_matrix(seen):
    found, model, H, _ = seen
    for layer, rows in (("0", slice(0, 36)), ("2", slice(36, 64))):
        e, exact = found.traces["hessian"].layers[layer], H.diagonal()[rows].sum()
        low, high = e.interval(0.9999)
        assert low < exact < high and 0 < e.standard_error < abs(exact) / 5
    low, high = found.hessian.moment(2).interval(0.9999)
    assert low < (H**2).sum() / len(H) < high
    assert found.hessian.nodes.max() == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3) and found.ggn.nodes.min() > -1e-12
    share = (torch.linalg.eigvalsh(H).abs() > 0.01 * torch.linalg.eigvalsh(H).max()).double().mean()
    low, high = outside(found).interval(0.9999)
    assert low < share < high


def test_known_eigenpairs_make_the_trace_sharper_and_its_interval_honest(seen):
    found, model, H, _ = seen
    x, y = dense_net()[1:3]
    A = Hessian(Objective(model, CE), x, y)
    wrong = Eigenpairs(found.top.pairs.values * 0.7 + 0.1, found.top.pairs.vectors.roll(3, 0), found.top.pairs.residuals, True, 0)
    for known in (found.top.pairs, wrong):   # unbiased whatever is known
        runs = [traces(A, 12, torch.Generator().manual_seed(s), known=known) for s in range(60)]
        values = torch.stack([t.total.value for t in runs])
        assert abs(values.mean() - H.trace()) < 4 * values.std() / 60**0.5
        for layer, rows in (("0", slice(0, 36)), ("2", slice(36, 64))):
            mine = torch.stack([t.layers[layer].value for t in runs])
            assert abs(mine.mean() - H.diagonal()[rows].sum()) < 4 * mine.std() / 60**0.5
    runs = [[traces(A, 12, torch.Generator().manual_seed(s), known=known).total for s in range(60)] for known in (None, found.top.pairs)]
    covered = [sum(bool(e.interval()[0] < H.trace() < e.interval()[1]) for e in r) for r in runs]
    errors = [torch.stack([(e.value - H.trace()) ** 2 for e in r]).mean() for r in runs]
    V, values = found.top.pairs.vectors, found.top.pairs.values
    for error, B in zip(errors, (H, H - V @ torch.diag(values) @ V.T)):   # the variance of z'Bz for random signs z
        assert error == pytest.approx(float(2 * (B.square().sum() - B.diagonal().square().sum()) / 12), rel=0.6)
    assert errors[1] < errors[0] / 1.5 and covered[1] >= 52   # 95 % of 60 are 57


def test_training_starts_at_the_measured_sharpness_and_takes_the_steps_of_gradient_descent(seen):
    found, model, H, g = seen
    lr = 1 / float(found.top.pairs.values[0])
    mine = copy.deepcopy(model)
    x, y = dense_net()[1:3]
    for _ in range(found.training.steps):
        loss = torch.func.functional_call(mine, dict(mine.named_parameters()), (x,))
        for p, d in zip(mine.parameters(), torch.autograd.grad(CE(loss, y), list(mine.parameters()))):
            p.data -= lr * d
    assert found.training.steps == 30 and found.training.recorder["loss"][-1] == pytest.approx(float(CE(mine(x), y)), rel=1e-6)
    assert found.training.recorder["sharpness"][0] == pytest.approx(1 / lr, rel=0.02) and found.training.limit == pytest.approx(2 / lr)


def test_same_budget_in_products_gives_same_numbers_and_seed_matters():
    model, x, y = problem()
    runs = [numbers(inspect(model, CE, (x, y), budget="150 products", k=2, training_steps=5, seed=seed)) for seed in (0, 0, 1)]
    for r in runs:
        del r["costs"], r["made"], r["seed"]
        r.get("training", {}).get("columns", {}).pop("recording seconds", None)
    assert runs[0] == runs[1] and runs[0]["hessian"] != runs[2]["hessian"]


def test_budget_is_kept_and_what_is_missing_is_told():
    model, x, y = problem(60)
    wide = inspect(model, CE, (x, y), budget="400 products", k=5)
    assert 250 < sum(c.products for c in wide.costs.values()) < 480
    poor = inspect(model, CE, (x, y), budget="30 products")
    assert set(poor.left_out) >= {"traces", "training"} and not poor.failed and all("affordable" in r or "spent" in r for r in poor.left_out.values())
    assert sum(c.products for c in poor.costs.values()) < 100
    some = inspect(model, CE, (x, y), budget="100 products", sections=["traces"])
    assert some.traces and set(some.left_out) == set(SECTIONS) - {"traces"} and "No top" not in page(some)
    short_time = inspect(model, CE, [(x, y)] * 20, budget=1e-6, examples=1000)
    assert set(short_time.left_out) == set(SECTIONS) and short_time.total == 1200


def test_little_memory_means_chunks_and_fewer_vectors_and_the_same_eigenvalues(seen):
    found, model, H, _ = seen
    x, y = dense_net()[1:3]
    tight = inspect(model, CE, (x, y), budget="900 products", k=2, memory=0.008, sections=["top", "hessian", "traces"])   # 16 vectors of 64 numbers
    assert any("examples at a time" in note for note in tight.notes) and any("Lanczos steps" in note for note in tight.notes) and tight.hessian.nodes.shape[1] == 16
    assert torch.allclose(tight.top.pairs.values, torch.linalg.eigvalsh(H).flip(0)[:2], rtol=2e-3) and tight.left_out.keys() == {"ggn", "kronecker", "training"}
    assert "memory" in inspect(model, CE, (x, y), budget="900 products", memory=0.003, sections=["top"]).left_out["top"]


def test_losses_without_likelihood_and_models_that_lack_something():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(20, 4), torch.randn(20, 2)
    found = inspect(model, nn.HuberLoss(), (x, y), budget="500 products", training_steps=5)
    assert set(found.left_out) == {"kronecker"} and "likelihood" in found.left_out["kronecker"] and not found.failed
    model[0].weight.requires_grad_(False)
    assert inspect(model, nn.MSELoss(), (x, y), budget="100 products", sections=["top"]).n == 6 + 12 + 2
    words = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    tokens = torch.randint(0, 11, (12, 5))
    found = inspect(words, CE, (tokens, tokens.roll(1, 1)), budget="900 products", training_steps=5, class_dim=-1)
    assert found.kronecker.curvature == "fisher-mc" and any("sampled" in note for note in found.notes)
    by_name = inspect(Pair(), nn.MSELoss(), [({"a": x, "b": x}, y), ({"a": x, "b": x}, y)], budget="150 products", sections=["top", "hessian"])
    assert by_name.examples == 40 and by_name.top.pairs.converged


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, a, b):
        return torch.tanh(self.layer(a)) * b[:, :2]


def test_divergence_is_told():
    model, x, y, _, _ = dense_net()
    target = torch.randn(25, 4, dtype=torch.double)
    found = inspect(model, nn.MSELoss(), (x, target), budget="400 products", sections=["training"], training_steps=100, optimizer="torch.optim.SGD(lr=1e6)")
    assert any("diverged" in note for note in found.notes) and found.training.steps < 100
    page(found), numbers(found)


def test_wrong_arguments_name_the_fix():
    model, x, y = problem()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    stuck = nn.Linear(2, 2)
    stuck.cache = stuck(torch.ones(1, 2))
    for error, message, call in (
        (TypeError, "nn.Module", lambda: inspect(lambda x: x, CE, (x, y))), (ValueError, "requires_grad", lambda: inspect(frozen, CE, (x, y))), (TypeError, "loss", lambda: inspect(model, "mse", (x, y))),
        (TypeError, "cannot be copied", lambda: inspect(stuck, CE, (torch.ones(3, 2), torch.zeros(3, dtype=torch.long)))),
        (ValueError, "budget=", lambda: inspect(model, CE, (x, y), budget="2 hours")), (ValueError, "k=0", lambda: inspect(model, CE, (x, y), k=0)),
        (ValueError, "choose among", lambda: inspect(model, CE, (x, y), sections=[])), (ValueError, "no optimizer", lambda: inspect(model, CE, (x, y), optimizer="Adam(")),
        (TypeError, "DataLoader", lambda: inspect(model, CE, 7)), (ValueError, "empty", lambda: inspect(model, CE, [])), (TypeError, "pair", lambda: inspect(model, CE, [x])),
        (ValueError, "fit together.*float32 30x1x4x3", lambda: inspect(model, CE, (x[..., :3], y))), (ValueError, "finite", lambda: inspect(model, CE, (x * float("nan"), y))),
        (ValueError, "reduction", lambda: inspect(model, nn.CrossEntropyLoss(reduction="none"), (x, y)))):
        with pytest.raises(error, match=message):
            call()


def test_reading_a_loader_keeps_its_order_and_needs_equal_shapes():
    x, y = torch.randn(10, 3), torch.arange(10)
    found = read([({"a": x[:4], "b": (x[:4], y[:4])}, y[:4]), ({"a": x[4:], "b": (x[4:], y[4:])}, y[4:])], 7, torch.device("cpu"))
    assert torch.equal(found.x["a"], x[:7]) and torch.equal(found.x["b"][1], y[:7]) and torch.equal(found.y, y[:7]) and (found.batch, found.total) == (4, 10)
    with pytest.raises(ValueError, match="pad"):
        read([(x, y), (torch.randn(10, 4), y)], 99, torch.device("cpu"))
    assert str(Purse("1 product")) == "1 products" and Purse(5).unit == "seconds"


def test_words_and_numbers(seen):
    found = seen[0]
    for sentence in (say_spectrum(found), say_top(found), say_layers(found), say_training(found)):
        assert re.search(r"\d", sentence) and "nan" not in sentence and "inf" not in sentence
    assert (three(1234.5), three(0.012345), percent(0.5), percent(1e-9), three(-2.5), three(float("nan"))) == ("1,234", "0.0123", "50 %", "< 0.01 %", "−2.5", "not finite")
    assert about(found.hessian.moment(0)) == "1"
    assert short("encoder.layers.0.attention.out_proj", 24) == "e.l.0.attention.out_proj" and short("head") == "head" and layer_of("place") == "place" and layer_of("a.b.weight") == "a.b"


def test_page_is_one_file_and_the_json_holds_the_numbers(seen, tmp_path):
    found = seen[0]
    html, data = save(found, tmp_path / "new" / "folder", "curvlab inspect a.py:b <c>")
    text, record = html.read_text(), json.loads(data.read_text())
    assert text.count("<svg") == 8 and "<script" not in text and "src=" not in text and "&lt;c&gt;" in text and not re.search(r'href="(?!#|data:)', text)
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', text))
    defined = re.findall(r' id="([^"]+)"', text)
    assert used <= set(defined) and len(defined) == len(set(defined))   # no drawing uses another's shapes
    assert record["top"]["eigenvalues"] == found.top.pairs.values.tolist() and record["parameters"] == 64 and record["costs"].keys() == found.costs.keys()
    assert sorted(p.name for p in html.parent.iterdir()) == ["inspection.html", "inspection.json"]


NETS = """
import torch
from torch import nn
model = nn.Linear(64, 10)
number = 3
def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
def make_loader():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 64, generator=generator), torch.rand(20, 10, generator=generator)) for _ in range(3)]
def squared(outputs, targets):
    return (outputs - targets).square().mean()
def wants(size):
    return size
def wrong():
    return [1, 2]
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    sys.modules.pop("mynets", None)
    yield tmp_path
    sys.modules.pop("mynets", None)


def call(*words):
    answer = CliRunner().invoke(app, ["inspect", *map(str, words)])
    if answer.exception and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer.exit_code, " ".join((answer.stdout + answer.stderr).split())


def test_command_writes_a_page(nets):
    torch.save(model_named("mynets:make_model", seed=5).state_dict(), "net.pt")
    code, text = call("mynets:make_model", "--data", "digits", "--budget", "150 products", "--examples", 64, "--out", "found", "--weights", "net.pt", "--name", "My net")
    record = json.loads((nets / "found" / "inspection.json").read_text())
    assert code == 0 and "largest eigenvalue" in text and "found/inspection.html" in text and record["name"] == "My net" and record["examples"] == 64 and record["parameters"] == 64 * 12 + 12 + 130
    assert "<h1>My net</h1>" in (nets / "found" / "inspection.html").read_text()


def test_command_takes_own_loader_and_loss_in_a_process_of_its_own(nets):
    words = ["inspect", "mynets.py:make_model", "--data", "mynets:make_loader", "--loss", "mynets:squared", "--budget", "60 products", "--out", "found"]
    done = subprocess.run([sys.executable, "-c", "from curvlab.batch.cli import main; main()", *words], capture_output=True, text=True, cwd=nets)
    assert done.returncode == 0, done.stderr
    assert json.loads((nets / "found" / "inspection.json").read_text())["command"] == "curvlab " + " ".join(words).replace("60 products", "'60 products'")


@pytest.mark.parametrize("words, message", [
    (["mynets"], "MODEL.*module:name"), (["nowhere:make"], "MODEL.*no module 'nowhere'"), (["nowhere.py:make"], "MODEL.*no file"), (["mynets:make_modl"], "did you mean make_model"),
    (["mynets:number"], "MODEL.*is a int"), (["mynets:wrong"], "returned a list"), (["mynets:wants"], "MODEL.*without arguments"), (["broken:net"], "no_such_package_at_all"), (["failing:net"], "ZeroDivisionError"),
    (["mynets:model", "--data", "cifar"], "--data.*digits-flat"), (["mynets:model", "--data", "mynets:number"], "--data.*is an? int|--data.*gives a int"), (["mynets:model", "--data", "mynets:wants"], "--data.*without arguments"),
    (["mynets:model", "--loss", "hinge"], "--loss.*cross-entropy"), (["mynets:model", "--loss", "mynets:number"], "--loss.*is a int"), (["mynets:model", "--budget", "soon"], "budget='soon'"),
    (["mynets:model", "--weights", "none.pt"], "--weights"), (["mynets:model", "--data", "digits"], "fit together.*digits-flat"), (["mynets:model", "--device", "warp"], "--device.*cpu"),
    (["mynets:make_model", "--optimizer", "Adam("], "no optimizer"), (["mynets:model", "--out", "mynets.py"], "mynets.py"), (["mynets:make_model", "--data", "mynets:wrong"], "pair")])
def test_command_names_what_is_wrong(nets, words, message):
    code, text = call(*words)
    assert code == 2 and re.search(message, text), text


def test_command_tells_a_failed_measurement_by_its_exit_code(nets, monkeypatch):
    import curvlab.lab.inspect as module
    monkeypatch.setattr(module, "eigenpairs", lambda *a, **k: (_ for _ in ()).throw(FloatingPointError("a product is not finite")))
    code, text = call("mynets:make_model", "--budget", "100 products", "--examples", 32, "--out", "found")
    assert code == 1 and "left out: top directions: FloatingPointError" in text and (nets / "found" / "inspection.html").exists()


def test_built_in_data_and_losses():
    x, y = next(iter(loader_named("digits-flat", "mse")))
    assert x.shape == (64, 64) and y.shape == (64, 10) and y.sum() == 64
    assert isinstance(loss_named("cross-entropy"), nn.CrossEntropyLoss) and isinstance(loss_named("torch.nn:MSELoss"), nn.MSELoss)
    assert Objective(nn.Linear(2, 2), loss_named("bce")).likelihood is not None
