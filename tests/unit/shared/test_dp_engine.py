"""Book-keeping against a loop of ordinary autograd over patients, layer by layer."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.dp.engine import BookKeeping
from shared.dp.opacus_engine import OpacusHooks
from shared.errors import FederationError

Build = Callable[[], nn.Module]


class First(nn.Module):
    """A recurrent layer's outputs as an ordinary module."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


def seq(*layers: nn.Module) -> Build:
    return lambda: nn.Sequential(*copy.deepcopy(layers))


CASES: dict[str, tuple[Build, tuple[int, ...]]] = {
    "linear": (seq(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2, bias=False)), (5,)),
    "linear over positions": (seq(nn.Linear(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)), (2, 3, 5)),
    "linear long": (seq(nn.Linear(2, 3), nn.Tanh(), nn.Flatten()), (40, 2)),
    "conv1d": (seq(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 4, 2, stride=2)), (2, 9)),
    "conv2d": (seq(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3)), (1, 8, 8)),
    "conv2d strided": (seq(nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0))), (2, 7, 9)),
    "conv2d dilated": (seq(nn.Conv2d(2, 3, 3, dilation=2, padding=2, bias=False)), (2, 7, 7)),
    "conv2d grouped": (seq(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 6, 2, groups=6)), (4, 6, 6)),
    "conv2d same": (seq(nn.Conv2d(1, 2, 3, padding="same"), nn.Conv2d(2, 2, 1, padding="valid")), (1, 5, 5)),
    "conv2d deep": (seq(nn.Conv2d(16, 20, 3, padding=1)), (16, 2, 2)),  # the Gram product is cheaper
    "conv2d deep without bias": (seq(nn.Conv2d(16, 20, 4, stride=2, padding=1, bias=False)), (16, 4, 6)),
    "conv2d deep, blocks of a pixel": (seq(nn.Conv2d(16, 20, 3, stride=2, padding=1)), (16, 4, 5)),
    "conv2d deep, blocks of two": (seq(nn.Conv2d(16, 20, (6, 3), stride=(4, 1), padding=(3, 1))), (16, 4, 3)),
    "conv2d deep, no overlap": (seq(nn.Conv2d(32, 20, (1, 2), stride=(2, 3))), (32, 3, 5)),
    "conv2d deep dilated": (seq(nn.Conv2d(16, 20, 3, dilation=2, padding=2)), (16, 3, 3)),
    "conv1d deep": (seq(nn.Conv1d(16, 20, 3, padding=1)), (16, 3)),
    "conv3d deep": (seq(nn.Conv3d(16, 20, 2, padding=1)), (16, 1, 1, 1)),
    "conv3d": (seq(nn.Conv3d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv3d(2, 3, 2, stride=2)), (1, 4, 5, 4)),
    "transposed": (seq(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1)), (3, 4, 4)),
    "transposed 2x2": (seq(nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False)), (4, 3, 3)),
    "transposed grouped": (seq(nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2)), (4, 4, 4)),
    "transposed deep": (seq(nn.ConvTranspose2d(24, 16, 2, stride=2)), (24, 2, 2)),
    "transposed deep overlapping": (seq(nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1)), (24, 2, 3)),
    "group norm": (seq(nn.Conv2d(1, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 3)), (1, 7, 7)),
    "layer norm": (seq(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)), (3, 4)),
    "layer norm 2d": (seq(nn.LayerNorm((3, 4), bias=False), nn.Flatten(), nn.Linear(12, 2)), (3, 4)),
    "instance norm": (seq(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh()), (1, 6, 6)),
    "lstm": (seq(First(nn.LSTM(3, 4, batch_first=True))), (5, 3)),
    "lstm deep both ways": (
        seq(First(nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)), nn.Linear(8, 1)), (5, 3)
    ),
    "lstm without bias": (seq(First(nn.LSTM(3, 4, bias=False, batch_first=True))), (5, 3)),
    "gru": (seq(First(nn.GRU(3, 4, batch_first=True))), (5, 3)),
    "gru deep both ways": (
        seq(First(nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)), nn.Linear(8, 1)), (5, 3)
    ),
    "gru without bias": (seq(First(nn.GRU(3, 4, bias=False, batch_first=True))), (5, 3)),
    "lstm wide": (seq(First(nn.LSTM(3, 16, batch_first=True))), (2, 3)),  # the Gram product is cheaper
    "lstm wide without bias": (seq(First(nn.LSTM(3, 16, bias=False, batch_first=True))), (2, 3)),
    "gru wide": (seq(First(nn.GRU(3, 16, batch_first=True))), (2, 3)),
    "gru wide without bias": (seq(First(nn.GRU(3, 16, bias=False, batch_first=True))), (2, 3)),
    "only Opacus knows": (seq(nn.Linear(4, 4), nn.InstanceNorm1d(3, affine=True), nn.RMSNorm(4)), (3, 4)),
}  # fmt: skip


def make(build: Build, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(11)
    model = build().to(dtype)
    for parameter in model.parameters():  # no gradient may vanish because a bias starts at zero
        nn.init.normal_(parameter, std=0.5)
    return model


def patient_losses(model: nn.Module, x: Tensor) -> Tensor:
    """A loss ``(B,)`` that is no plain sum: K records of ``(B, K, ...)`` weigh 1, 2, 3 …"""
    output = model(x.flatten(0, 1)).flatten(1)
    by_record = (output.sin() * torch.linspace(0.5, 1.5, output.shape[1], dtype=output.dtype)).sum(1)
    weights = torch.arange(1, x.shape[1] + 1, dtype=output.dtype)
    return (by_record.view(x.shape[:2]) * weights).mean(1)


def by_hand(model: nn.Module, x: Tensor, bound: float) -> tuple[list[Tensor], Tensor]:
    """The oracle: one ordinary backward pass per patient."""
    parameters = list(model.parameters())
    total, norms = [torch.zeros_like(p) for p in parameters], []
    for index in range(len(x)):
        gradients = torch.autograd.grad(patient_losses(model, x[index : index + 1]).sum(), parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        norms.append(norm)
        factor = min(1.0, bound / (norm.item() + 1e-6))
        total = [summed + factor * gradient for summed, gradient in zip(total, gradients, strict=True)]
    return total, torch.stack(norms)


def by_engine(model: nn.Module, x: Tensor, bound: float) -> tuple[list[Tensor], Tensor]:
    engine = BookKeeping(model)
    engine.start(len(x))
    norms = engine.clipped_sum(patient_losses(model, x), bound, len(x))
    engine.close()
    return [parameter.grad for parameter in model.parameters()], norms


def assert_same(build: Build, x: Tensor, bound: float, tolerance: float) -> None:
    expected, norms = by_hand(make(build, x.dtype), x, bound)
    found, found_norms = by_engine(make(build, x.dtype), x, bound)
    torch.testing.assert_close(found_norms, norms, rtol=tolerance, atol=tolerance)
    scale = max(gradient.abs().max().item() for gradient in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def data(shape: tuple[int, ...], patients: int, records: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(patients, records, *shape, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-1, 0.3, patients, dtype=torch.float64).view(-1, *[1] * (x.dim() - 1))
    return (x * scale).to(dtype)


@pytest.mark.parametrize("bound", [0.05, 1e6])
@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_agrees_with_autograd(case: str, records: int, bound: float) -> None:
    if case == "only Opacus knows" and not hasattr(nn, "RMSNorm"):
        pytest.skip("this torch has no RMSNorm")
    build, shape = CASES[case]
    assert_same(build, data(shape, 4, records), bound, 1e-12)


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-4])
@pytest.mark.parametrize("case", CASES)
def test_a_patient_whose_records_cancel_does_not_pass_the_bound(case: str, apart: float, scale: float) -> None:
    """Rounding must not make a norm vanish while the sum does not: hostile weights can bring this about."""
    if case == "only Opacus knows" and not hasattr(nn, "RMSNorm"):
        pytest.skip("this torch has no RMSNorm")
    build, shape = CASES[case]
    one = data(shape, 3, 1, torch.float32)
    x = torch.cat([one, one * (1 + apart * torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))], dim=1)
    model = make(build, torch.float32)
    engine = BookKeeping(model)
    for first, patient in enumerate(x):  # alone in the sum, each as the first of three rows
        engine.start(3)
        output = model(torch.stack([patient, *x[[(first + 1) % 3, (first + 2) % 3]]]).flatten(0, 1)).flatten(1)
        engine.clipped_sum(scale * (output.view(3, 2, -1).sum(2) * torch.tensor([1.0, -1.0])).sum(1), 1.0, 1)
        total = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
        assert total.norm() <= 1.0 + 1e-6


@pytest.mark.parametrize("records", [1, 2])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (seq(nn.Linear(64, 64, bias=False)), (64,)),
        (seq(nn.Conv2d(16, 20, 4, stride=2, padding=1, bias=False)), (16, 4, 6)),
        (seq(First(nn.LSTM(3, 16, bias=False, batch_first=True))), (2, 3)),
    ],
    ids=["linear", "convolution", "lstm"],
)
def test_values_whose_squares_vanish_do_not_pass_the_bound(build: Build, shape: tuple[int, ...], records: int) -> None:
    """Squared, tiny inputs are nothing and the norm with them, unless what they lack is made up for."""
    model = make(build, torch.float32)
    engine = BookKeeping(model)
    engine.start(2)
    x = torch.full((2 * records, *shape), 2.6e-23)
    engine.clipped_sum(4e17 * model(x).flatten(1).sum(1).view(2, records).sum(1), 1e-3, 1)
    total = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
    assert total.norm() <= 1e-3 * (1.0 + 1e-6)


@pytest.mark.parametrize("case", [name for name, (_, shape) in CASES.items() if len(shape) == 3])
def test_channels_last_agrees_too(case: str) -> None:
    build, shape = CASES[case]
    x = data(shape, 4, 2)
    if x.dim() != 5:
        return
    expected, _ = by_hand(make(build), x, 0.05)
    model = make(build).to(memory_format=torch.channels_last)
    engine = BookKeeping(model)
    engine.start(4)
    rows = x.flatten(0, 1).to(memory_format=torch.channels_last)
    output = model(rows).flatten(1)
    by_record = (output.sin() * torch.linspace(0.5, 1.5, output.shape[1], dtype=output.dtype)).sum(1)
    engine.clipped_sum((by_record.view(4, 2) * torch.tensor([1.0, 2.0])).mean(1), 0.05, 4)
    for parameter, b in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_single_precision(case: str) -> None:
    build, shape = CASES[case]
    assert_same(build, data(shape, 4, 2, torch.float32), 0.05, 1e-5)


def test_embeddings_agree_with_autograd() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(15, 2))

    tokens = torch.tensor([[[0, 1, 1, 2, 0]], [[6, 6, 6, 6, 6]], [[3, 0, 4, 1, 0]]])
    expected, norms = by_hand(make(build), tokens, 0.3)
    found, found_norms = by_engine(make(build), tokens, 0.3)
    torch.testing.assert_close(found_norms, norms, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_mask_is_a_shorter_sequence(kind: type[nn.RNNBase]) -> None:
    """Masked steps leave state and gradient alone: the same as leaving them out, both ways."""
    torch.manual_seed(0)
    plain = kind(3, 4, batch_first=True, bidirectional=True).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    expected = [plain(x[:1])[0][0], plain(x[1:, :4])[0][0]]
    reference = torch.autograd.grad(expected[1].sin().sum(), list(plain.parameters()))
    masked = copy.deepcopy(plain)
    engine = BookKeeping(masked)
    engine.start(2)
    outputs = masked(x, mask=mask)[0]
    torch.testing.assert_close(outputs[0], expected[0])
    torch.testing.assert_close(outputs[1, :4], expected[1])
    losses = torch.stack([0.0 * outputs[0].sum(), outputs[1, :4].sin().sum()])
    engine.clipped_sum(losses, 1e6, 2)
    for parameter, gradient in zip(masked.parameters(), reference, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


layers = st.lists(st.sampled_from(["conv", "grouped", "strided", "norm", "instance", "transposed", "relu"]), max_size=4)


@settings(max_examples=40)
@given(layers=layers, patients=st.integers(1, 4), records=st.integers(1, 2), bound=st.sampled_from([0.01, 1.0, 1e6]))
def test_random_architectures_agree_with_autograd(layers: list[str], patients: int, records: int, bound: float) -> None:
    makers: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
        "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
        "strided": lambda: nn.Conv2d(4, 4, 2, stride=2, padding=1),
        "norm": lambda: nn.GroupNorm(2, 4),
        "instance": lambda: nn.InstanceNorm2d(4, affine=True),
        "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=1),
        "relu": nn.Tanh,
    }

    def build() -> nn.Module:
        hidden = [makers[name]() for name in layers]
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), *hidden, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)
        )

    assert_same(build, data((1, 6, 6), patients, records), bound, 1e-10)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), case=st.sampled_from(sorted(CASES)))
def test_no_patient_contributes_more_than_the_bound(seed: int, scale: float, case: str) -> None:
    """In single precision, with every patient alone so that the sum is the contribution."""
    build, shape = CASES[case]
    x = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(seed)) * scale
    gradients, _ = by_engine(make(build, torch.float32), x, 0.01)
    norm = torch.cat([gradient.flatten().double() for gradient in gradients]).norm().item()
    assert norm <= 0.01 * (1 + 1e-6)


def test_a_layer_that_nobody_knows_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(FederationError, match=r"'1'.*Odd"):
        BookKeeping(nn.Sequential(nn.Linear(2, 2), Odd()))


def test_shared_parameters_and_repeated_calls_are_refused() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with pytest.raises(FederationError, match="share parameters"):
        BookKeeping(nn.Sequential(first, second))
    layer = nn.Linear(2, 2)
    engine = BookKeeping(layer)
    engine.start(3)
    with pytest.raises(FederationError, match="called twice"):
        engine.clipped_sum(layer(layer(torch.ones(3, 2))).sum(1), 1.0, 3)


def test_a_layer_that_was_not_used_is_noticed() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    engine = BookKeeping(model)
    engine.start(3)
    with pytest.raises(FederationError, match="got no gradient"):
        engine.clipped_sum(model[0](torch.ones(3, 2)).sum(1), 1.0, 3)


def test_closing_gives_the_model_back() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    x = torch.randn(2, 1, 4, 4)
    before = model(x)
    engine = BookKeeping(model)
    engine.close()
    model(x).sum().backward()
    assert torch.equal(model(x), before)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in ("conv2d", "conv2d deep", "transposed", "conv2d grouped"):
        build, shape = CASES[case]
        whole, _ = by_engine(make(build), data(shape, 5, 2), 0.05)
        with monkeypatch.context() as patched:
            for module in ("unfolding", "field_grams"):
                patched.setattr(f"shared.dp.{module}.CHUNK_FLOATS", 1)
            parts, _ = by_engine(make(build), data(shape, 5, 2), 0.05)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def known_to_opacus(case: str) -> bool:
    """Opacus hooks no recurrent layer of torch's own, and no layer norm without a bias."""
    return not {"lstm", "gru"} & set(case.split()) and case != "layer norm 2d"


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("where", ["records", "loss"])
@pytest.mark.parametrize(
    ("case", "engine"), [(c, BookKeeping) for c in CASES] + [(c, OpacusHooks) for c in CASES if known_to_opacus(c)]
)
def test_one_patients_nan_or_infinity_reaches_no_other_row(case: str, where: str, poison: float, engine: Any) -> None:
    """In every layer: the other patients' norms stay to the bit, and the sum is theirs alone."""
    build, shape = CASES[case]
    x = torch.randn(4, 2, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scale = torch.ones(4, dtype=torch.float64)
    norms, sums = [], []
    for poisoned in (False, True):
        if poisoned and where == "records":
            x[1, 0].view(-1)[-1] = poison
        elif poisoned:
            scale[1] = poison
        model = make(build)
        attached = engine(model)
        attached.start(4)
        norms.append(attached.clipped_sum(patient_losses(model, x) * scale, 0.5, 4))
        sums.append([parameter.grad for parameter in model.parameters()])
        attached.close()
    others = [0, 2, 3]
    assert torch.equal(norms[0][others], norms[1][others])
    if norms[1][1].isfinite():  # a layer that bounds its input
        return
    expected, _ = by_hand(make(build), x[others], 0.5)
    for found, wanted in zip(sums[1], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_tanh_of_the_smallest_numbers_takes_the_short_way(cell: type[nn.RNNBase], monkeypatch: Any) -> None:
    """The library behind tanh takes ten times as long below 1e-30; no such number may reach it."""
    seen: list[Tensor] = []
    tanh = Tensor.tanh_
    monkeypatch.setattr(Tensor, "tanh_", lambda values: seen.append(values.clone()) or tanh(values))
    model = make(seq(First(cell(3, 4, batch_first=True))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-25)
    engine = BookKeeping(model)
    engine.start(2)
    model(torch.ones(2, 5, 3, dtype=torch.float64))
    engine.close()
    values = torch.cat([part.flatten() for part in seen])
    assert len(values) >= 2 * 5 * 4
    assert ((values == 0.0) | (values.abs() > 1e-20)).all()
