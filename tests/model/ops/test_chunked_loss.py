"""The head's loss against the plain path: all logits, PyTorch's cross entropy, autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew import GPT, GPTConfig
from homebrew.constants import IGNORE_INDEX
from homebrew.model.ops import chunked_loss as loss
from homebrew.model.ops.chunked_loss import linear_cross_entropy

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(loss, "FROZEN_TOKENS_AT_ONCE", 3)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(hidden.flatten(0, 1), weight)[:, :vocab_size].float()
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def inputs(batch, length, width, vocab_size, padded, dtype=torch.float32, ignored=0.3, device="cpu"):
    generator = torch.Generator().manual_seed(batch * length + vocab_size)
    hidden = torch.randn(batch, length, width, generator=generator).to(device, dtype)
    weight = torch.randn(padded, width, generator=generator).to(device, dtype)
    targets = torch.randint(0, vocab_size, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < ignored] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(device)


def gradients(loss_function, hidden, weight, targets, vocab_size, scale=1.0):
    value = loss_function(hidden, weight, targets, vocab_size)
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    return value, *torch.autograd.grad(value, wanted, torch.tensor(scale, device=value.device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "length", "width", "vocab_size", "padded"),
    [(2, 7, 16, 128, 128), (3, 5, 8, 65, 128), (1, 1, 4, 2, 128), (4, 9, 12, 300, 384), (1, 3, 8, 1, 128)],
)
def test_equals_the_plain_loss(device, batch, length, width, vocab_size, padded):
    case = *inputs(batch, length, width, vocab_size, padded, device=device), vocab_size
    for ours, theirs in zip(gradients(linear_cross_entropy, *case), gradients(plain, *case), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_bfloat16_head_s_gradient_is_summed_in_float32(device):
    *case, targets = inputs(8, 64, 16, 65, 128, ignored=0.0, device=device, dtype=torch.bfloat16)
    exact = gradients(plain, *(x.detach().float().requires_grad_() for x in case), targets, 65)[2]
    ours = gradients(linear_cross_entropy, *case, targets, 65)[2]
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 2**-8 * exact.norm()  # in 74 chunks; summed in bfloat16 it is 2**-7 off


@pytest.mark.parametrize("logits", [1, 128, 3 * 128 + 5])
def test_equals_the_plain_loss_in_a_cpu_s_chunks(monkeypatch, logits):
    monkeypatch.setattr(loss, "CPU_LOGITS_AT_ONCE", logits)
    case = *inputs(3, 5, 8, 65, 128), 65
    for ours, theirs in zip(gradients(linear_cross_entropy, *case), gradients(plain, *case), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_equals_the_plain_loss(device):
    case = *inputs(3, 9, 16, 65, 128, device=device), 65
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    for ours, theirs in zip(gradients(compiled, *case), gradients(plain, *case), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_is_as_near_to_float32_as_the_plain_loss(device):
    hidden, weight, targets = inputs(4, 33, 64, 300, 384, device=device)
    exact = gradients(plain, hidden, weight, targets, 300)
    with torch.autocast(device, torch.bfloat16):
        ours = gradients(linear_cross_entropy, hidden, weight, targets, 300)
        theirs = gradients(plain, hidden, weight, targets, 300)
    assert ours[0].dtype == ours[2].dtype == torch.float32
    for a, b, right in zip(ours, theirs, exact, strict=True):
        assert (a - right).norm() <= 1.5 * (b - right).norm() + 1e-4 * right.norm()


def test_the_gradient_of_the_loss_is_honoured_exactly():
    hidden, weight, targets = inputs(3, 11, 16, 65, 128)
    scale = 1.00390625 / 3  # no bfloat16 number
    for one, scaled in zip(
        gradients(linear_cross_entropy, hidden, weight, targets, 65)[1:],
        gradients(linear_cross_entropy, hidden, weight, targets, 65, scale)[1:],
        strict=True,
    ):
        torch.testing.assert_close(scaled, one * scale)


def test_the_mean_is_over_scored_targets_only():
    hidden, weight, targets = inputs(2, 8, 16, 65, 128, ignored=0.0)
    first = targets.clone()
    first[1] = IGNORE_INDEX
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, first, 65), linear_cross_entropy(hidden[:1], weight, targets[:1], 65)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_scored_is_zero_with_zero_gradients(device):
    hidden, weight, targets = inputs(2, 5, 16, 65, 128, ignored=1.1, device=device)
    for value in gradients(linear_cross_entropy, hidden, weight, targets, 65):
        assert not value.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_padding_id_never_scores(device):
    hidden, weight, targets = inputs(2, 5, 16, 65, 128, device=device)
    value = linear_cross_entropy(hidden, weight, targets, 65)
    with torch.no_grad():
        weight[65:] = 1e4
    again, d_hidden, d_weight = gradients(linear_cross_entropy, hidden, weight, targets, 65)
    assert again == value
    assert not d_weight[65:].any()
    torch.testing.assert_close(d_hidden, gradients(plain, hidden, weight, targets, 65)[1])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen):
    hidden, weight, targets = inputs(2, 9, 16, 65, 128)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad = False
    ours, theirs = (gradients(f, hidden, weight, targets, 65) for f in (linear_cross_entropy, plain))
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_computes_no_gradients(monkeypatch):
    hidden, weight, targets = inputs(2, 9, 16, 65, 128)
    wanted = []
    score = loss._score_
    monkeypatch.setattr(loss, "_score_", lambda *args: wanted.append(args[3]) or score(*args))
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets, 65)
    assert not any(wanted)
    torch.testing.assert_close(value, plain(hidden, weight, targets, 65))


def test_a_logit_that_is_no_number_shows():
    hidden, weight, targets = inputs(2, 9, 16, 65, 128)
    with torch.no_grad():
        hidden[0, 0, 0] = float("nan")
    targets[0, 0] = 1
    assert linear_cross_entropy(hidden, weight, targets, 65).isnan()


def test_the_custom_operator_keeps_pytorchs_rules():
    hidden, weight, targets = inputs(2, 5, 8, 65, 128)
    torch.library.opcheck(
        loss._head_loss, (hidden.detach().flatten(0, 1), weight.detach(), targets.flatten(), 65, True, True)
    )


def test_a_tied_weight_gets_both_gradients():
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=16))
    ids = torch.randint(0, 65, (2, 16))
    targets = torch.randint(0, 65, (2, 16))
    model(ids, targets).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    for a, b in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
