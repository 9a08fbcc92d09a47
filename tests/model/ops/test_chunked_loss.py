"""Tests of the chunked loss against PyTorch's cross-entropy of all logits, with autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew import GPT, GPTConfig
from homebrew.constants import IGNORE_INDEX
from homebrew.model.ops import chunked_loss
from homebrew.model.ops.chunked_loss import linear_cross_entropy

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
REQUESTED = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(chunked_loss, "FROZEN_CHUNK_TOKENS", 3)


def reference_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(hidden.flatten(0, 1), weight)[:, :vocab_size].float()
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def random_inputs(batch, length, width, vocab_size, padded, dtype=torch.float32, ignored=0.3, device="cpu"):
    generator = torch.Generator().manual_seed(batch * length + vocab_size)
    hidden = torch.randn(batch, length, width, generator=generator).to(device, dtype)
    weight = torch.randn(padded, width, generator=generator).to(device, dtype)
    targets = torch.randint(0, vocab_size, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < ignored] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(device)


def loss_and_gradients(loss_function, hidden, weight, targets, vocab_size, scale=1.0):
    value = loss_function(hidden, weight, targets, vocab_size)
    inputs_with_grad = [x for x in (hidden, weight) if x.requires_grad]
    return value, *torch.autograd.grad(value, inputs_with_grad, torch.tensor(scale, device=value.device))


def assert_matches_reference(loss_function, case):
    actual, expected = (loss_and_gradients(function, *case) for function in (loss_function, reference_loss))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "length", "width", "vocab_size", "padded"),
    [(2, 7, 16, 128, 128), (3, 5, 8, 65, 128), (1, 1, 4, 2, 128), (4, 9, 12, 300, 384), (1, 3, 8, 1, 128)],
)
def test_loss_and_gradients_match_the_reference(device, batch, length, width, vocab_size, padded):
    case = *random_inputs(batch, length, width, vocab_size, padded, device=device), vocab_size
    assert_matches_reference(linear_cross_entropy, case)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_a_bfloat16_head_is_accumulated_in_float32(device):
    *case, targets = random_inputs(8, 64, 16, 65, 128, ignored=0.0, device=device, dtype=torch.bfloat16)
    exact = loss_and_gradients(reference_loss, *(x.detach().float().requires_grad_() for x in case), targets, 65)[2]
    actual = loss_and_gradients(linear_cross_entropy, *case, targets, 65)[2]
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - exact).norm() < 2**-8 * exact.norm()  # 2**-7 if accumulated in bfloat16


@pytest.mark.parametrize("num_logits", [1, 128, 3 * 128 + 5])
def test_loss_and_gradients_match_for_any_cpu_chunk_size(monkeypatch, num_logits):
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK_LOGITS", num_logits)
    case = *random_inputs(3, 5, 8, 65, 128), 65
    assert_matches_reference(linear_cross_entropy, case)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_loss_matches_the_eager_one(device, dtype, frozen):
    hidden, weight, targets = random_inputs(3, 9, 16, 65, 128, device=device, dtype=dtype)
    weight.requires_grad = not frozen
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    actual, expected = (
        loss_and_gradients(function, hidden, weight, targets, 65) for function in (compiled, linear_cross_entropy)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_error_under_autocast_is_no_larger_than_that_of_the_reference(device):
    hidden, weight, targets = random_inputs(4, 33, 64, 300, 384, device=device)
    exact = loss_and_gradients(reference_loss, hidden, weight, targets, 300)
    with torch.autocast(device, torch.bfloat16):
        actual = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 300)
        expected = loss_and_gradients(reference_loss, hidden, weight, targets, 300)
    assert actual[0].dtype == actual[2].dtype == torch.float32
    for a, b, true in zip(actual, expected, exact, strict=True):
        assert (a - true).norm() <= 1.5 * (b - true).norm() + 1e-4 * true.norm()


def test_gradients_are_scaled_by_the_gradient_of_the_loss():
    hidden, weight, targets = random_inputs(3, 11, 16, 65, 128)
    scale = 1.00390625 / 3  # not representable in bfloat16
    for one, scaled in zip(
        loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 65)[1:],
        loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 65, scale)[1:],
        strict=True,
    ):
        torch.testing.assert_close(scaled, one * scale)


def test_mean_excludes_ignored_targets():
    hidden, weight, targets = random_inputs(2, 8, 16, 65, 128, ignored=0.0)
    first_row_only = targets.clone()
    first_row_only[1] = IGNORE_INDEX
    actual = linear_cross_entropy(hidden, weight, first_row_only, 65)
    torch.testing.assert_close(actual, linear_cross_entropy(hidden[:1], weight, targets[:1], 65))


def test_mean_of_a_single_target_is_its_loss():
    hidden, weight, targets = random_inputs(1, 9, 16, 65, 128, ignored=1.1)
    targets[0, 4] = 3
    assert_matches_reference(linear_cross_entropy, (hidden, weight, targets, 65))


@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_zero_if_all_targets_are_ignored(device):
    hidden, weight, targets = random_inputs(2, 5, 16, 65, 128, ignored=1.1, device=device)
    for value in loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 65):
        assert not value.any()


@pytest.mark.parametrize("device", DEVICES)
def test_targets_may_be_a_view_with_gaps(device):
    hidden, weight, targets = random_inputs(1, 12, 16, 65, 128, device=device)
    loss = linear_cross_entropy(hidden[:, ::2], weight, targets[:, ::2], 65)
    assert loss == linear_cross_entropy(hidden[:, ::2], weight, targets[:, ::2].clone(), 65)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_rows_affect_neither_loss_nor_gradients(device):
    hidden, weight, targets = random_inputs(2, 5, 16, 65, 128, device=device)
    value = linear_cross_entropy(hidden, weight, targets, 65)
    with torch.no_grad():
        weight[65:] = 1e4
    with_large_padding, d_hidden, d_weight = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 65)
    assert with_large_padding == value
    assert not d_weight[65:].any()
    torch.testing.assert_close(d_hidden, loss_and_gradients(reference_loss, hidden, weight, targets, 65)[1])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_gets_no_gradient(frozen):
    hidden, weight, targets = random_inputs(2, 9, 16, 65, 128)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad = False
    case = hidden, weight, targets, 65
    assert len(loss_and_gradients(linear_cross_entropy, *case)) == 2
    assert_matches_reference(linear_cross_entropy, case)


def test_no_gradients_are_computed_under_no_grad(monkeypatch):
    hidden, weight, targets = random_inputs(2, 9, 16, 65, 128)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # computes the gradient of the logits
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets, 65)
    torch.testing.assert_close(value, reference_loss(hidden, weight, targets, 65))


def test_nan_input_gives_a_nan_loss():
    hidden, weight, targets = random_inputs(2, 9, 16, 65, 128)
    with torch.no_grad():
        hidden[0, 0, 0] = float("nan")
    targets[0, 0] = 1
    assert linear_cross_entropy(hidden, weight, targets, 65).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grad_hidden", "grad_weight"), REQUESTED)
def test_custom_operator_passes_opcheck(dtype, grad_hidden, grad_weight):
    hidden, weight, targets = random_inputs(2, 5, 8, 65, 128, dtype=dtype)
    torch.library.opcheck(
        torch.ops.homebrew.linear_cross_entropy.default,
        (hidden.detach().flatten(0, 1), weight.detach(), targets.flatten(), 65, grad_hidden, grad_weight),
    )


@pytest.mark.parametrize(("grad_hidden", "grad_weight"), REQUESTED)
def test_gradients_that_are_not_requested_are_empty(grad_hidden, grad_weight):
    hidden, weight, targets = random_inputs(2, 5, 8, 65, 128)
    total, d_hidden, d_weight = torch.ops.homebrew.linear_cross_entropy(
        hidden.flatten(0, 1), weight, targets.flatten(), 65, grad_hidden, grad_weight
    )
    assert d_hidden.shape == ((10, 8) if grad_hidden else (0,))
    assert d_weight.shape == ((128, 8) if grad_weight else (0,))
    assert total.requires_grad
    assert not d_hidden.requires_grad
    assert not d_weight.requires_grad


@pytest.fixture
def products(monkeypatch):
    """Return the results of `torch.mm` so far."""
    products, mm = [], torch.mm

    def record(*args, out):
        products.append(mm(*args, out=out))
        return out

    monkeypatch.setattr(torch, "mm", record)
    return products


@pytest.mark.parametrize(
    ("frozen", "max_logits", "lengths"),
    [
        (False, 10_000, [7, 7, 4]),
        (True, 10_000, [3] * 6),
        (False, 5 * 128 + 127, [5, 5, 5, 3]),
        (True, 2 * 128, [2] * 9),
        (False, 0, [1] * 18),
    ],
)
def test_a_chunk_has_at_most_the_allowed_tokens_and_logits(monkeypatch, products, frozen, max_logits, lengths):
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK_LOGITS", max_logits)
    hidden, weight, targets = random_inputs(2, 9, 16, 65, 128)
    weight.requires_grad = not frozen
    linear_cross_entropy(hidden, weight, targets, 65)
    assert [len(product) for product in products if product.shape[1] == 128] == lengths


def test_chunks_share_their_buffers(products):
    hidden, weight, targets = random_inputs(2, 14, 16, 65, 128, dtype=torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets, 65)
    for shape in ((7, 128), (128, 16)):  # logits, gradient of the weight
        addresses = [product.data_ptr() for product in products if product.shape == shape]
        assert len(addresses) == 4
        assert len(set(addresses)) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_matrix_products_run_in_the_dtype_of_autocast(products, enabled):
    hidden, weight, targets = random_inputs(2, 9, 16, 65, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        linear_cross_entropy(hidden, weight, targets, 65)
    assert {product.dtype for product in products} == {torch.bfloat16 if enabled else torch.float32}


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("with_gradient", [True, False])
def test_loss_and_gradients_with_a_kernel_match_the_reference(with_gradient):
    hidden, weight, targets = random_inputs(2, 9, 16, 65, 128)
    if with_gradient:
        assert_matches_reference(linear_cross_entropy, (hidden, weight, targets, 65))
    else:
        case = hidden.detach(), weight.detach(), targets, 65
        torch.testing.assert_close(linear_cross_entropy(*case), reference_loss(*case))


def test_rows_whose_logits_differ_by_orders_of_magnitude_are_exact():
    hidden = torch.tensor([[[1e3], [-1e3]]], requires_grad=True)
    weight = torch.linspace(1.0, 1.001, 128)[:, None].requires_grad_()
    assert_matches_reference(linear_cross_entropy, (hidden, weight, torch.tensor([[3, 4]]), 65))


def test_tied_weight_accumulates_both_gradients():
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=16))
    ids = torch.randint(0, 65, (2, 16))
    targets = torch.randint(0, 65, (2, 16))
    model(ids, targets).backward()
    actual = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    for a, b in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
