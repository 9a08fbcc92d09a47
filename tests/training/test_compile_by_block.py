"""Compiling a model block by block, as in short runs on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from language_models import NanoGPT, transformers_model
from tiny_runs import Recorder, StopAt, equal, make_trainer, token_dataset, weights
from torch import nn

from homebrew import GPT, GPTConfig, LoRAConfig, SampleText, TokenDataset, generate_text, score_hellaswag, score_text
from homebrew.data.tokenizer import ByteTokenizer
from homebrew.evaluation.hellaswag import Question
from homebrew.generation.model_generate import generate_ids
from homebrew.model.interfaces import interface_of
from homebrew.model.lora import add_lora
from homebrew.training.batch_size import BatchPlan
from homebrew.training.compile import COMPILED_BY_BLOCK_FLOPS, LAUNCH_BOUND_FLOPS, compile_model

GPU = SimpleNamespace(
    device=torch.device("cuda"),
    state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
    is_fsdp2=False,
    distributed_type=DistributedType.NO,
)
DDP = SimpleNamespace(**vars(GPU) | {"distributed_type": DistributedType.MULTI_GPU})
FSDP = SimpleNamespace(**vars(GPU) | {"distributed_type": DistributedType.FSDP, "is_fsdp2": True})


def compile_on(accelerator, model, *, flops=LAUNCH_BOUND_FLOPS, steps=100, wanted="auto", micro_batches=1):
    batch = BatchPlan(micro_batches, 1, micro_batches)
    return compile_model(model, wanted, accelerator, batch, micro_batch_flops=flops, max_steps=steps)


CASES = {
    "short": (GPU, {}, True),
    "long": (GPU, {"steps": COMPILED_BY_BLOCK_FLOPS / LAUNCH_BOUND_FLOPS}, False),
    "many_micro_batches": (GPU, {"micro_batches": COMPILED_BY_BLOCK_FLOPS / LAUNCH_BOUND_FLOPS / 100}, False),
    "asked_for": (GPU, {"wanted": True}, False),
    "ddp": (DDP, {"flops": 1e9}, True),
    "fsdp": (FSDP, {"steps": 10**9}, True),
    "fsdp_asked_for": (FSDP, {"wanted": True}, True),
}


@pytest.fixture
def compiled(monkeypatch):
    """Record the modules that are compiled, instead of compiling them."""
    modules = []

    def record(self, *, options, dynamic):
        assert (options, dynamic) == ({}, False)
        modules.append(self)

    monkeypatch.setattr(nn.Module, "compile", record)
    return modules


@pytest.mark.parametrize(("accelerator", "run", "by_block"), CASES.values(), ids=CASES)
def test_short_runs_and_sharded_ones_are_compiled_by_block(compiled, accelerator, run, by_block):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=16))
    assert compile_on(accelerator, model, **run) == "kernels"
    assert compiled == (list(model.transformer.h) if by_block else [model])


def test_another_model_is_compiled_whole(compiled):
    model = NanoGPT()
    assert compile_on(GPU, model) == "kernels"
    assert compiled == [model]


@pytest.fixture
def graphs(monkeypatch):
    """Compile with a fast backend, and record the graphs."""
    torch.compiler.reset()
    graphs, compile_in_place = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_with_backend(self, *, options, dynamic):
        compile_in_place(self, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_with_backend)
    return graphs


def freeze(*names):
    def change(model):
        for name in names:
            model.get_submodule(name).requires_grad_(requires_grad=False)

    return change


def adapt(model):
    add_lora(model, LoRAConfig(rank=2))


def double_output(model):
    model.transformer.h[2].attn.register_forward_hook(lambda _, x, y: 2 * y)


def double_gradient(model):
    model.transformer.h[2].mlp.register_full_backward_hook(lambda _, d_x, d_y: (2 * d_x[0],))


EMBEDDINGS = "transformer.wte", "transformer.wpe"
CHANGES = {
    "none": (lambda _: None, 1),
    "recompute": (GPT.enable_activation_checkpointing, 1),
    "adapter": (adapt, 2),  # the first block's input needs no gradient
    "adapter_recompute": (lambda model: (adapt(model), model.enable_activation_checkpointing()), 2),
    "frozen_block": (freeze("transformer.h.2"), 2),
    "frozen_beginning": (freeze(*EMBEDDINGS, "transformer.h.0", "transformer.h.1"), 3),
    "frozen_bias": (lambda model: model.transformer.h[1].ln_1.bias.requires_grad_(requires_grad=False), 2),
    "other_epsilon": (lambda model: setattr(model.transformer.h[1].ln_2, "eps", 0.5), 2),
    "hook_in_a_block": (double_output, 2),
    "backward_hook_in_a_block": (double_gradient, None),  # of which Dynamo makes several graphs
}


def loss_and_gradients(model, ids):
    loss = model(ids, ids)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("change", "num_graphs"), CHANGES.values(), ids=CHANGES)
def test_equal_blocks_share_one_graph_and_others_do_not(graphs, change, num_graphs):
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=4, n_head=2, n_embd=16)
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, model = GPT(config), GPT(config)
    change(plain), change(model)
    compile_on(GPU, model)
    expected, actual = loss_and_gradients(plain, ids), loss_and_gradients(model, ids)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    assert num_graphs is None or len(graphs) == num_graphs


OTHER_MODELS = {
    "llama": lambda: transformers_model("llama", num_hidden_layers=4),
    "nanogpt": NanoGPT,
}


@pytest.mark.parametrize(
    ("build", "recompute"),
    [(OTHER_MODELS["llama"], False), (OTHER_MODELS["llama"], True), (NanoGPT, False)],
    ids=["llama", "llama_recompute", "nanogpt"],
)
def test_sharded_blocks_of_other_models_share_one_graph(graphs, build, recompute):
    model, ids = build(), torch.arange(16)[None]
    interface = interface_of(model)
    if recompute:
        interface.enable_activation_checkpointing()
    loss_function = interface.loss_function()
    expected = loss_function(model, ids, ids)
    compile_on(FSDP, model)
    loss = loss_function(model, ids, ids)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("build", OTHER_MODELS.values(), ids=OTHER_MODELS)
@pytest.mark.parametrize("wanted", ["auto", True])
def test_other_models_generate_uncompiled(graphs, build, wanted):
    model = build()
    compile_on(GPU, model, wanted=wanted)
    assert len(generate_ids(model, [1, 2, 3], 4, sampling=None, vocab_size=50, seed=0)) == 7
    assert not graphs


def test_48_blocks_are_compiled_once(graphs):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=48, n_head=1, n_embd=8))
    compile_on(GPU, model)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(ids, ids).backward()
    with torch.no_grad():
        model.eval()(ids, ids)
    assert len(graphs) == 2


def test_each_block_has_its_own_dropout_mask(graphs):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=1, n_embd=8, dropout=0.5))
    compile_on(GPU, model)
    masks = []
    with torch.no_grad():
        for block in model.transformer.h:
            x = torch.ones(1, 16, 8)
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight.zero_(), module.bias.fill_(1.0)
            masks.append(block(x))
    assert len(graphs) == 1
    assert not torch.equal(*masks)


@pytest.fixture
def train_by_block(monkeypatch):
    """Let a Trainer on a CPU compile as one on a GPU."""
    monkeypatch.setattr("homebrew.training.setup.compile_model", lambda model, *_, **__: compile_on(GPU, model))


def test_a_run_resumes_and_has_the_losses_of_an_uncompiled_one(graphs, train_by_block, tmp_path, monkeypatch):
    by_block, plain = Recorder(), Recorder()
    settings = {"eval_dataset": token_dataset(400, seed=1), "eval_every": 3}
    trainer = make_trainer(tmp_path / "run", callbacks=[by_block], **settings)
    trainer.train()
    assert trainer.compile_mode == "kernels"
    assert trainer.model._compiled_call_impl is None
    make_trainer(tmp_path / "stopped", callbacks=[StopAt(3)], **settings).train()
    resumed = make_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume=True)
    assert equal(weights(resumed), weights(trainer))
    assert len(graphs) == 2  # for training and for evaluation, in all Trainers of the process
    monkeypatch.undo()
    make_trainer(tmp_path / "plain", callbacks=[plain], **settings).train()
    assert by_block.losses == pytest.approx(plain.losses, rel=1e-5)
    assert by_block.evaluations[6].loss == pytest.approx(plain.evaluations[6].loss, rel=1e-5)


def test_what_sees_other_lengths_than_training_is_not_compiled(graphs, train_by_block, tmp_path):
    dataset = TokenDataset.from_text("A tiny text. " * 40, block_size=16, tokenizer=ByteTokenizer())
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    trainer = make_trainer(tmp_path / "run", model=model, train_dataset=dataset, callbacks=[SampleText(every=3)])
    trainer.train()
    trainer.sample("A", max_new_tokens=20)
    generate_text(model, ByteTokenizer(), "A", max_new_tokens=3)
    score_hellaswag(model, ByteTokenizer(), [Question("A", ("b", "bcd", "d", "e"), 1)])
    score_text(model, ByteTokenizer(), "A short text.")
    trainer.save_pretrained(tmp_path / "export")
    assert len(graphs) == 1
