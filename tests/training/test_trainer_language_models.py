"""The Trainer with models that are not a GPT of homebrew: transformers' and any nn.Module."""

import inspect
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from language_models import CONFIGS, MODULES, SIZES, MixedBag, NanoGPT, build_model, transformers_model
from safetensors.torch import load_model as load_safetensors
from tiny_runs import (
    CONFIG,
    Recorder,
    StopAt,
    UnevenTargets,
    checkpoint_path,
    checkpoint_tensors,
    equal,
    make_trainer,
    random_tokens,
    token_dataset,
    weights,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from homebrew import (
    GPT,
    LanguageModel,
    Sampling,
    TokenDataset,
    Trainer,
    TrainerConfig,
    generate_text,
    get_tokenizer,
    load_model,
    score_hellaswag,
    score_text,
    train_tokenizer,
)
from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.cli.main import main
from homebrew.data.sampler import sample_indices
from homebrew.data.tokenizer import ByteTokenizer
from homebrew.errors import ConfigError, DataError, HomebrewError, ModelError, ResumeMismatch
from homebrew.model.interfaces import interface_of
from homebrew.training.arguments import check_model

TRANSFORMERS = ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2", "mixtral", "mamba", "bart"]
ALL = TRANSFORMERS + list(MODULES)
ROWS = random_tokens(8 * 17, seed=5).view(8, 17)
ON_GPU = torch.cuda.is_available()
INPUT_IDS, TARGETS = ROWS[:, :-1].contiguous(), ROWS[:, 1:].contiguous()


def batch(num_ignored=0):
    """Return a batch, the first targets of which are ignored."""
    targets = TARGETS.clone()
    targets.view(-1)[:num_ignored] = -100
    return INPUT_IDS, targets


@pytest.mark.parametrize("num_ignored", [0, 1, 40])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_loss_is_that_of_transformers(name, num_ignored):
    """transformers shifts labels itself: it gets the targets one to the right, behind an ignored first label."""
    model = transformers_model(name)  # without dropout
    model.train(name == "mixtral")  # its auxiliary loss is not evaluated
    input_ids, targets = (ids[:, :-1] for ids in batch(num_ignored))
    loss = interface_of(model).loss_function()(model, input_ids, targets)
    longer = torch.cat([input_ids, input_ids[:, -1:]], dim=1)  # for the last target; its logits are not scored
    labels = F.pad(targets, (1, 0), value=-100)
    expected = (
        model(input_ids=input_ids, labels=targets.contiguous())
        if name == "bart"
        else model(input_ids=longer, labels=labels)
    )
    if name == "mixtral":  # the added position would change the balance of the experts
        balance = model(input_ids=input_ids, labels=input_ids)
        expected.loss = expected.loss + 0.001 * (balance.aux_loss - expected.aux_loss)
        assert balance.aux_loss > 0
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    assert model.training is (name == "mixtral")


EXPERTS = {
    "mixtral": lambda: transformers_model("mixtral"),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SIZES,
            num_experts=4,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            output_router_logits=True,
        )
    ),
    "adapter": lambda: peft.get_peft_model(
        transformers_model("mixtral"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    ),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
@pytest.mark.parametrize("name", EXPERTS)
def test_the_loss_that_balances_experts_is_trained_but_not_evaluated(tmp_path, name):
    model = EXPERTS[name]()
    with torch.no_grad():
        logits = model.eval()(input_ids=INPUT_IDS).logits
    expected = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    trainer = make_trainer(tmp_path, model=model)
    assert trainer.evaluate(list(zip(INPUT_IDS, TARGETS, strict=True))).loss == pytest.approx(
        expected.item(), abs=1e-3 if ON_GPU else 1e-6
    )
    on_device = [ids.to(trainer.accelerator.device) for ids in batch()]
    assert interface_of(model).loss_function()(model.train(), *on_device).item() > expected.item() + 5e-4


class Strict(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


class Ignoring(transformers.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, use_cache=None, **options):
        assert use_cache is False
        return super().forward(input_ids=input_ids, labels=labels, return_dict=False)


@pytest.mark.parametrize("model_class", [Strict, Ignoring])
def test_models_that_ignore_shift_labels_get_their_loss_from_the_logits(model_class):
    model = transformers_model("llama").eval()
    other = model_class(model.config).eval()
    other.load_state_dict(model.state_dict())
    losses = [interface_of(m).loss_function()(m, *batch(3)) for m in (model, other)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)


class TakesTargets(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, targets=None, **options):
        outputs = super().forward(input_ids=input_ids, **options)
        if targets is not None:
            outputs.loss = F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())
        return outputs


class OwnGenerate(transformers.PreTrainedModel):
    """A model around another, with nanoGPT's interface."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = NanoGPT()
        self.post_init()

    def forward(self, idx, targets=None):
        return self.inner(idx, targets)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        return self.inner.generate(idx, max_new_tokens, temperature, top_k)


@pytest.mark.parametrize("model_class", [TakesTargets, OwnGenerate])
def test_a_model_of_transformers_that_takes_targets_is_still_one_of_transformers(tmp_path, model_class):
    model = model_class(CONFIGS["llama"]())
    if model_class is OwnGenerate:
        model.ignore_index = -1
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    trainer = make_trainer(tmp_path / "run", model=model, train_dataset=dataset, max_steps=2, progress=False)
    trainer.train()
    assert len({trainer.sample("a cab", 8, seed=seed) for seed in range(4)}) == 4  # not greedy
    longer = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=17, tokenizer="char")
    with pytest.raises(DataError, match="16"):
        make_trainer(tmp_path, model=model, train_dataset=longer)


class MaskBeforeTargets(TakesTargets):
    def forward(self, input_ids=None, attention_mask=None, targets=None):
        return super().forward(input_ids, targets)


def plain_loop(model, dataset, *, steps, micro_batch_size, loss):
    """Train with AdamW at a constant learning rate, on the Trainer's samples; return the losses."""
    decayed, others = (
        [p for p in model.parameters() if p.requires_grad and (p.dim() >= 2) is d] for d in (True, False)
    )
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        indices = sample_indices(np.arange(step * 8, step * 8 + 8), len(dataset), 42)
        samples = [dataset[i] for i in indices]
        input_ids, targets = (torch.stack([sample[i] for sample in samples]) for i in (0, 1))
        total = (targets != -100).sum()
        losses.append(0.0)
        for x, y in zip(input_ids.split(micro_batch_size), targets.split(micro_batch_size), strict=True):
            if (count := (y != -100).sum()) == 0:
                continue
            part = loss(model, x, y) * count / total
            part.backward()
            losses[-1] += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def own_loss(model, input_ids, targets):
    """The loss from the logits, with PyTorch's cross-entropy."""
    if isinstance(model, NanoGPT):
        logits = model(input_ids, targets.masked_fill(targets == -100, -1))[0]
    elif isinstance(model, MixedBag):
        return model(input_ids, targets)["loss"]
    else:
        logits = model(input_ids=input_ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@pytest.mark.parametrize(
    ("name", "micro_batch_size"),
    [(name, 2) for name in ("llama", "gpt_neox", "gpt2", "mamba", "bart", "nanogpt")] + [("llama", 8), ("nanogpt", 8)],
)
def test_twenty_steps_equal_a_plain_loop(tmp_path, name, micro_batch_size):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        model=build_model(name),
        train_dataset=UnevenTargets(),
        micro_batch_size=micro_batch_size,
        max_steps=20,
        schedule=lambda step: 1.0,
        callbacks=[recorder],
        progress=False,
    )
    torch.set_float32_matmul_precision("highest")  # no TF32
    trainer.train()
    losses = plain_loop(build_model(name), UnevenTargets(), steps=20, micro_batch_size=micro_batch_size, loss=own_loss)
    assert list(recorder.losses.values()) == pytest.approx(losses, abs=1e-3 if ON_GPU else 1e-5)  # other kernels


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("name", "averaged"), [(name, False) for name in ALL] + [("llama", True), ("nanogpt", True), ("mixed", True)]
)
def test_a_stopped_run_resumes_bitwise(tmp_path, name, averaged):
    optimizer = "adamw" if name == "mixed" else "muon"  # it has no blocks for Muon
    options = {"optimizer": optimizer, "ema_decay": 0.9} if averaged else {}
    options |= {"progress": False, "train_dataset": UnevenTargets(), "micro_batch_size": 2}
    make_trainer(tmp_path / "uninterrupted", model=build_model(name), **options).train()
    make_trainer(tmp_path / "stopped", model=build_model(name), callbacks=[StopAt(3)], **options).train()
    resumed = make_trainer(tmp_path / "stopped", model=build_model(name, seed=1), **options)  # other initial values
    resumed.train(resume=True)
    assert equal(checkpoint_tensors(tmp_path / "stopped", 6), checkpoint_tensors(tmp_path / "uninterrupted", 6))


def test_what_a_checkpoint_holds(tmp_path):
    model = MixedBag()
    make_trainer(tmp_path, model=model, progress=False).train()
    saved = {name for name in checkpoint_tensors(tmp_path, 6) if name.startswith("model/")}
    assert {"model/num_calls", "model/mean", "model/frozen.weight", "model/unused.bias", "model/scale"} <= saved
    assert not {"model/scratch", "model/second.weight"} & saved  # not persistent; the same as first.weight
    other = MixedBag(seed=1)
    load_safetensors(other, checkpoint_path(tmp_path, 6) / "model.safetensors")
    assert equal(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_export_has_equal_logits_in_transformers(tmp_path, name):
    model = transformers_model(name)
    trainer = make_trainer(tmp_path / "run", model=model, progress=False, max_steps=2, compile=False)
    trainer.train()
    trainer.save_pretrained(tmp_path / "export")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert type(loaded) is type(trainer.model)
    with torch.no_grad():
        expected = trainer.model.cpu().eval()(input_ids=INPUT_IDS).logits
        assert torch.equal(loaded.eval()(input_ids=INPUT_IDS).logits, expected)


@pytest.mark.parametrize("model", [NanoGPT, MixedBag])
def test_a_module_is_exported_as_safetensors(tmp_path, model):
    trainer = make_trainer(tmp_path / "run", model=model(), progress=False, max_steps=2, ema_decay=0.5)
    trainer.train()
    trainer.save_pretrained(tmp_path / "export")
    loaded = model(seed=1)
    load_safetensors(loaded, tmp_path / "export" / "model.safetensors")
    assert equal(loaded.state_dict(), trainer.model.state_dict())
    with pytest.raises(ModelError, match="checkpoint"):
        trainer.save_pretrained(checkpoint_path(tmp_path / "run", 2))


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [(name, "own") for name in (*TRANSFORMERS, "module")] + [("llama", "char"), ("llama", "bytes")],
)
def test_every_model_is_saved_with_its_tokenizer(tmp_path, name, tokenizer):
    text = "It's  a cab, don't!\n\n 12345 bags\n" * 20
    if tokenizer == "own":
        (tmp_path / "text.txt").write_text(text)
        tokenizer = train_tokenizer(tmp_path / "text.txt", tmp_path / "own.json", vocab_size=260)
    dataset = TokenDataset.from_text(text, block_size=16, tokenizer=tokenizer)
    model = NanoGPT(vocab_size=260) if name == "module" else transformers_model(name, vocab_size=260)
    trainer = make_trainer(tmp_path / "run", model=model, train_dataset=dataset, progress=False, max_steps=1)
    trainer.train()
    saved = open_checkpoint(checkpoint_path(tmp_path / "run", 1)).state
    assert saved["tokenizer"] == dataset.tokenizer.to_json()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "added_tokens.json").write_text('{"bag": 3}')  # of another tokenizer
    is_fixed = name == "qwen2"  # transformers has a fixed class for it
    with pytest.warns(UserWarning, match="PreTrainedTokenizerFast") if is_fixed else nullcontext():
        trainer.save_pretrained(tmp_path / "export")
    kind = transformers.PreTrainedTokenizerFast if is_fixed else transformers.AutoTokenizer
    loaded = kind.from_pretrained(tmp_path / "export")
    assert loaded(text)["input_ids"] == dataset.tokenizer.encode(text).tolist()
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded) == dataset.vocab_size


class ReversedBytes(ByteTokenizer):
    name = "reversed"


@pytest.mark.parametrize(
    ("tokenizer", "stops", "warns"),
    [
        ("char", 2, "which is 'a'"),
        ("char", [40, 2], "which is 'a'"),
        ("char", None, None),
        ("char", 49, None),
        ("bytes", 2, "'.x02'"),
        ("gpt2", 50_256, None),
        ("gpt2", 11, "eos_token_id=50256"),
    ],
)
def test_a_stop_token_that_is_text_is_a_warning(tmp_path, tokenizer, stops, warns):
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer=tokenizer)
    model = transformers_model("llama", vocab_size=max(50, dataset.vocab_size))
    model.generation_config.eos_token_id = stops
    with pytest.warns(UserWarning, match=warns) if warns else nullcontext():
        make_trainer(tmp_path, model=model, train_dataset=dataset)


@pytest.mark.parametrize("vocab_size", [8, 10_000])
def test_a_vocabulary_that_is_much_larger_than_the_datasets_is_a_warning(tmp_path, vocab_size):
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    with pytest.warns(UserWarning, match=r"10,000.* only 8\..*vocab_size") if vocab_size > 8 else nullcontext():
        make_trainer(tmp_path, model=GPT(replace(CONFIG, vocab_size=vocab_size)), train_dataset=dataset)


def test_a_custom_tokenizer_is_not_saved_as_another_one(tmp_path):
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer=ReversedBytes())
    trainer = make_trainer(tmp_path / "run", model=NanoGPT(vocab_size=256), train_dataset=dataset, progress=False)
    with pytest.warns(UserWarning, match="'reversed' is not saved"):
        trainer.save_pretrained(tmp_path / "export")
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["model.safetensors"]
    gpt = make_trainer(tmp_path / "gpt", model=GPT(replace(CONFIG, vocab_size=256)), train_dataset=dataset)
    with pytest.warns(UserWarning, match="'reversed' is not saved"):
        gpt.save_pretrained(tmp_path / "gpt-export")
    assert {path.name for path in (tmp_path / "gpt-export").iterdir()} >= {"config.json", "model.safetensors"}


def test_a_gpt_is_exported_with_its_tokenizer(tmp_path):
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    trainer = make_trainer(tmp_path / "run", train_dataset=dataset, progress=False, max_steps=2)
    trainer.train()
    trainer.save_pretrained(tmp_path / "export")
    model, tokenizer = load_model(tmp_path / "export")
    assert equal(model.state_dict(), trainer.model.state_dict())
    assert tokenizer.decode(tokenizer.encode("a cab")) == "a cab"


class FailingSave(NanoGPT):
    def save_pretrained(self, folder):
        raise KeyError(folder.name)


def test_a_failing_export_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path / "run", model=FailingSave(), progress=False, max_steps=1)
    with pytest.raises(ModelError, match=r"FailingSave.*'export'"):
        trainer.save_pretrained(tmp_path / "export")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ModelError, match="Cannot write"):
        trainer.save_pretrained(tmp_path / "file")


class AllIgnored(torch.utils.data.Dataset):
    """Of every two samples of a micro-batch, or in all of a step, no target counts."""

    def __init__(self, ignored):
        self.ignored = ignored

    def __len__(self):
        return 64

    def __getitem__(self, i):
        input_ids, targets = INPUT_IDS[i % 8], TARGETS[i % 8]
        return input_ids, torch.full_like(targets, -100) if self.ignored(i) else targets


@pytest.mark.parametrize("micro_batch_size", [1, 8])
@pytest.mark.parametrize("name", ["llama", "bart", "nanogpt", "mixed"])
def test_a_micro_batch_without_targets_changes_nothing(tmp_path, name, micro_batch_size):
    """Its mean loss would be NaN. Its targets are replaced, and it has no weight."""
    recorder = Recorder()
    options = {"callbacks": [recorder], "progress": False, "max_steps": 1, "micro_batch_size": micro_batch_size}
    model = build_model(name).requires_grad_(True)
    before = {parameter: value.detach().clone() for parameter, value in model.named_parameters()}
    dataset = AllIgnored(lambda i: True if micro_batch_size == 8 else i % 3 == 0)
    trainer = make_trainer(tmp_path, model=model, train_dataset=dataset, weight_decay=0.0, **options)
    warns = pytest.warns(UserWarning, match="step 1 are 0") if micro_batch_size == 8 else nullcontext()
    with warns:
        trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p.cpu(), before[n])]
    if micro_batch_size == 8:
        assert (recorder.losses[1], changed) == (0.0, [])
    else:
        assert 3 < recorder.losses[1] < 5
        assert changed


def test_evaluation_counts_each_target_once(tmp_path):
    model = NanoGPT()
    metrics = make_trainer(tmp_path, model=model, micro_batch_size=3, global_batch_tokens=None).evaluate(
        UnevenTargets()
    )
    dataset = UnevenTargets()
    with torch.no_grad():
        logits = model.cpu().eval()(dataset.input_ids, dataset.targets.clamp(min=0))[0]
    expected = F.cross_entropy(logits.flatten(0, 1), dataset.targets.flatten())
    assert metrics.loss == pytest.approx(expected.item(), abs=1e-3 if ON_GPU else 1e-6)
    assert metrics.num_tokens == (dataset.targets != -100).sum()


class ReturnsLoss(nn.Module):
    """A model of a few lines, which returns its loss in the given form."""

    def __init__(self, form=lambda loss: loss):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.form = form

    def forward(self, tokens, y):
        return self.form(F.cross_entropy(self.head(self.embedding(tokens)).flatten(0, 1), y.flatten()))


LOGITS = torch.zeros(8, 16, 50)


@pytest.mark.parametrize(
    "form",
    [
        lambda loss: loss,
        lambda loss: {"loss": loss, "logits": LOGITS},
        lambda loss: SimpleNamespace(loss=loss, other=1),
        lambda loss: (LOGITS, loss),
        lambda loss: (loss, LOGITS, None),
        lambda loss: [loss, torch.tensor(3)],
        lambda loss: loss.bfloat16(),
        lambda loss: transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=LOGITS),
    ],
)
def test_the_forms_of_a_loss(tmp_path, form):
    recorder = Recorder()
    make_trainer(tmp_path, model=ReturnsLoss(form), callbacks=[recorder], progress=False, max_steps=40).train()
    assert recorder.losses[40] < recorder.losses[1] < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_loss_in_half_precision_becomes_float32(dtype):
    model = ReturnsLoss(lambda loss: loss.to(dtype))
    loss = interface_of(model).loss_function()(model, *batch())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "form",
    [
        lambda loss: None,
        lambda loss: loss.item(),
        lambda loss: loss[None],
        lambda loss: loss.long(),
        lambda loss: LOGITS,
        lambda loss: {"logits": LOGITS},
        lambda loss: (LOGITS, None),
        lambda loss: (loss, loss),
        lambda loss: SimpleNamespace(logits=LOGITS),
        lambda loss: loss.detach(),
        lambda loss: transformers.modeling_outputs.CausalLMOutput(logits=LOGITS),
    ],
)
def test_what_is_no_loss_is_an_error(tmp_path, form):
    trainer = make_trainer(tmp_path, model=ReturnsLoss(form), progress=False)
    with pytest.raises(ModelError, match="loss") as raised:
        trainer.train()
    assert len(str(raised.value)) < 400


class NoTargets(nn.Linear):
    pass


class Labels(ReturnsLoss):
    def forward(self, input_ids, labels=None):
        return super().forward(input_ids[:, :-1], labels[:, 1:])


class ShiftLabels(ReturnsLoss):
    def forward(self, input_ids, shift_labels):
        return super().forward(input_ids, shift_labels)


class AttentionMask(ReturnsLoss):
    def forward(self, input_ids, attention_mask=None, targets=None):
        return super().forward(input_ids, attention_mask)


def device_map():
    model = transformers_model("llama")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    return model


def with_ignore_index(ignore_index):
    model = NanoGPT()
    model.ignore_index = ignore_index
    return model


BERT = transformers.BertConfig(
    **{
        k: v
        for k, v in CONFIGS["llama"]().to_dict().items()
        if k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
)
T5 = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def with_buffer(tensor):
    model = ReturnsLoss()
    model.register_buffer("expanded", tensor)
    return model


def failing_model():
    model = transformers_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    return model


WRONG_MODELS = {
    "class .*ReturnsLoss": lambda: ReturnsLoss,
    "class .*LlamaForCausalLM": lambda: transformers.LlamaForCausalLM,
    "forward": lambda: NoTargets(2, 2),
    "labels.*rename": Labels,
    "shift_labels.*rename": ShiftLabels,
    "attention_mask.*rename": AttentionMask,
    "is attention_mask.*rename": lambda: MaskBeforeTargets(CONFIGS["llama"]()),
    "OptimizedModule": lambda: torch.compile(ReturnsLoss()),
    "DataParallel": lambda: nn.DataParallel(ReturnsLoss()),
    "float16": lambda: transformers_model("llama").half(),
    "ignore_index is '-1'": lambda: with_ignore_index("-1"),
    "ignore_index is 0,": lambda: with_ignore_index(0),
    "ignore_index is 49,": lambda: with_ignore_index(49),
    "ignore_index is True": lambda: with_ignore_index(True),
    "trainable": lambda: ReturnsLoss().requires_grad_(False),
    "BertForMaskedLM.*causal": lambda: transformers.BertForMaskedLM(BERT),
    "LlamaModel.*causal": lambda: transformers.LlamaModel(CONFIGS["llama"]()),
    "ForSequenceClassification": lambda: transformers.LlamaForSequenceClassification(CONFIGS["llama"](pad_token_id=0)),
    "T5.*causal": lambda: transformers.T5ForConditionalGeneration(T5),
    "devices": device_map,
    "attends to later tokens": lambda: transformers.BertLMHeadModel(BERT),
    "attends to later": lambda: transformers.RobertaForCausalLM(transformers.RobertaConfig(**BERT.to_diff_dict())),
    **({} if ON_GPU else {"expanded": lambda: with_buffer(torch.ones(1).expand(3))}),  # moving it makes it whole
    "two tokens": failing_model,
}


def test_a_model_whose_signature_is_not_known_is_not_refused():
    model = ReturnsLoss()
    model.forward = max  # like the forward of a traced module
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(model.forward)
    check_model(model)


@pytest.mark.parametrize("message", WRONG_MODELS)
def test_a_model_that_cannot_be_trained_is_an_error(tmp_path, message):
    with pytest.raises(HomebrewError, match=message) as raised:
        make_trainer(tmp_path, model=WRONG_MODELS[message]())
    assert len(str(raised.value)) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (ReturnsLoss, {"activation_checkpointing": True}, "enable_activation_checkpointing"),
        (lambda: transformers_model("mamba"), {"activation_checkpointing": True}, None),
        (ReturnsLoss, {"optimizer": "muon"}, "ModuleList"),
        (lambda: transformers_model("llama", max_position_embeddings=8), {}, "block_size is 8"),
        (lambda: transformers_model("llama", vocab_size=49), {}, "vocab_size is 49"),
    ],
)
def test_options_that_a_model_does_not_support(tmp_path, model, options, message):
    if message is None:
        make_trainer(tmp_path, model=model(), **options)
        return
    with pytest.raises((ConfigError, DataError), match=message):
        make_trainer(tmp_path, model=model(), **options)


def test_targets_that_a_loss_does_not_ignore_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the GPU is tested below
    trainer = make_trainer(tmp_path, model=SimpleLoss(), train_dataset=UnevenTargets(), progress=False)
    with pytest.raises(ModelError, match="ignore_index"):
        trainer.train()


class SimpleLoss(ReturnsLoss):
    """A model that ignores -1, and does not say so."""

    def forward(self, tokens, targets):
        logits = self.head(self.embedding(tokens)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def test_without_a_vocabulary_size_ids_are_not_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    dataset = [(torch.full((16,), 50), torch.zeros(16, dtype=torch.int64))] * 8
    trainer = make_trainer(tmp_path, model=ReturnsLoss(), train_dataset=dataset, progress=False)
    with pytest.raises(ModelError, match="up to 50"):
        trainer.train()


class FailsOnTheGPU(ReturnsLoss):
    def forward(self, tokens, targets):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def test_a_failed_assertion_of_the_gpu_is_explained(tmp_path):
    trainer = make_trainer(tmp_path, model=FailsOnTheGPU(), eval_dataset=token_dataset(), progress=False)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ModelError, match="vocabulary"):
            run()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_an_id_outside_the_vocabulary_is_an_error_on_a_gpu(tmp_path):
    """In a process of its own, which cannot use the GPU afterwards."""
    script = (
        "from test_trainer_language_models import *; trainer = make_trainer(sys.argv[1], model=SimpleLoss(), "
        "train_dataset=UnevenTargets()); trainer.train()"
    )
    command = [sys.executable, "-c", script, tmp_path]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert "homebrew.errors.ModelError: An index on the GPU is out of range" in result.stderr, result.stderr


@pytest.mark.parametrize("name", ["llama", "nanogpt", "mixed"])
def test_samples_of_different_lengths(tmp_path, name):
    rows = [row[: 4 + i % 9] for i, row in enumerate(random_tokens(64 * 17).view(64, 17).tolist())]
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, model=build_model(name), train_dataset=rows, global_batch_tokens=None, callbacks=[recorder]
    )
    assert 4 <= trainer.sequence_length <= 12  # the longest of the checked samples
    trainer.train()
    assert list(recorder.losses) == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
@pytest.mark.usefixtures("deterministic")
def test_an_adapter_of_peft_is_trained_resumed_and_saved(tmp_path):
    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
            return peft.get_peft_model(transformers_model("llama"), config)

    base = transformers_model("llama").lm_head.weight
    make_trainer(tmp_path / "uninterrupted", model=build(), progress=False).train()
    make_trainer(tmp_path / "stopped", model=build(), callbacks=[StopAt(3)], progress=False).train()
    trainer = make_trainer(tmp_path / "stopped", model=build(), progress=False)
    trainer.train(resume=True)
    assert equal(checkpoint_tensors(tmp_path / "stopped", 6), checkpoint_tensors(tmp_path / "uninterrupted", 6))
    trainer.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(transformers_model("llama"), tmp_path / "adapter")
    assert equal(loaded.state_dict(), trainer.model.state_dict())
    assert base.equal(trainer.model.get_base_model().lm_head.weight.cpu())


def adapted(**changes):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    return peft.get_peft_model(transformers_model("llama"), peft.LoraConfig(**settings))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lora_alpha": 16}, "lora_alpha was None, is 16"),
        ({"lora_dropout": 0.5}, "lora_dropout was None, is 0.5"),
        ({"use_rslora": True}, "use_rslora was None, is True"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern was None, is {'q_proj': 3}"),
    ],
)
def test_the_settings_of_an_adapter_of_peft_belong_to_a_run(tmp_path, changes, difference):
    make_trainer(tmp_path, model=adapted(), max_steps=2, progress=False).train()
    with pytest.raises(ResumeMismatch, match=f"default {difference}"):
        make_trainer(tmp_path, model=adapted(**changes)).train(resume=True)


class Wrapped(ReturnsLoss):
    """A module around a model with adapters."""

    def __init__(self):
        super().__init__()
        self.model = adapted()


def injected():
    model = NanoGPT()
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["attention"]), model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("model", [adapted, Wrapped, injected])
def test_muon_does_not_train_adapters_of_peft(tmp_path, model):
    with pytest.raises(ConfigError, match=r"muon.*LoRA"):
        make_trainer(tmp_path, model=model(), optimizer="muon")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
def test_prompts_of_peft_are_refused_by_name(tmp_path, kind):
    model = peft.get_peft_model(transformers_model("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match=r"prompt.*LoraConfig"):
        make_trainer(tmp_path, model=model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_description_of_an_adapter_is_json_without_paths():
    model = adapted(revision="main")
    model.peft_config["default"].base_model_name_or_path = "/somewhere"
    adapter = interface_of(model).description()["config"]["adapters"]["default"]
    assert adapter == {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}


class Checkpointed(NanoGPT):
    def enable_activation_checkpointing(self):
        for block in self.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@pytest.mark.usefixtures("deterministic")
def test_a_module_enables_its_own_activation_checkpointing(tmp_path):
    for folder, activation_checkpointing in (("plain", False), ("checkpointed", True)):
        options = {"activation_checkpointing": activation_checkpointing, "compile": False}  # compiled: other kernels
        make_trainer(tmp_path / folder, model=Checkpointed(), **options).train()
    assert equal(checkpoint_tensors(tmp_path / "plain", 6), checkpoint_tensors(tmp_path / "checkpointed", 6))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_activation_checkpointing_changes_no_gradient(tmp_path, name):
    for folder, activation_checkpointing in (("plain", False), ("checkpointed", True)):
        options = {"activation_checkpointing": activation_checkpointing, "compile": False}  # compiled: other kernels
        make_trainer(tmp_path / folder, model=transformers_model(name), **options).train()
    assert equal(checkpoint_tensors(tmp_path / "plain", 6), checkpoint_tensors(tmp_path / "checkpointed", 6))


class FollowsTheProtocol(transformers.LlamaForCausalLM):
    def forward(self, input_ids, targets):
        return super().forward(input_ids=input_ids, labels=targets, shift_labels=targets).loss


def test_a_model_of_transformers_may_follow_the_protocol(tmp_path):
    recorder = Recorder()
    model = FollowsTheProtocol(CONFIGS["llama"]())
    model.register_buffer("mask", torch.ones(1).expand(3), persistent=False)
    make_trainer(tmp_path, model=model, callbacks=[recorder], train_dataset=UnevenTargets()).train()
    assert list(recorder.losses) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt"])
def test_muon_trains_the_matrices_of_the_blocks(tmp_path, name):
    trainer = make_trainer(tmp_path, model=build_model(name), optimizer="muon")
    muon, _ = trainer.optimizer.optimizers
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    matrices = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert len(matrices) == {"llama": 14, "gpt2": 8, "nanogpt": 6}[name]
    assert all(".0." in matrix or ".1." in matrix for matrix in matrices)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["llama", "mixtral", "nanogpt", "mixed"])
def test_auto_micro_batch_size_changes_no_buffer(tmp_path, name):
    options = {"micro_batch_size": "auto", "global_batch_tokens": 8 * 16, "progress": False, "max_steps": 2}
    make_trainer(tmp_path / "auto", model=build_model(name), **options).train()
    make_trainer(tmp_path / "8", model=build_model(name), **options | {"micro_batch_size": 8}).train()
    assert equal(checkpoint_tensors(tmp_path / "auto", 2), checkpoint_tensors(tmp_path / "8", 2))


def test_flops_and_parameters(tmp_path):
    trainer = make_trainer(tmp_path, model=ReturnsLoss())
    num_parameters = 50 * 8 + 8 * 50 + 50
    assert interface_of(trainer.model).flops_per_token(16) == 6 * num_parameters
    assert f"{num_parameters:,} parameters" in repr(trainer)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("llama", None),
        ("llama", Sampling(top_k=5, temperature=0.7, top_p=0.9, min_p=0.1, repetition_penalty=1.2)),
        ("gpt2", Sampling(temperature=0)),
        ("nanogpt", None),
        ("nanogpt", Sampling(top_k=5, temperature=0.7)),
    ],
)
def test_sample_uses_the_own_generate(tmp_path, name, sampling):
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    model = build_model(name)
    trainer = make_trainer(tmp_path, model=model, train_dataset=dataset, progress=False, max_steps=1)
    trainer.train()
    model.train()
    state = torch.get_rng_state()
    texts = {trainer.sample("a cab", 8, sampling=sampling, seed=1) for _ in range(2)}
    assert len(texts) == 1
    assert texts.pop().startswith("a cab")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert set(trainer.sample(max_new_tokens=20)) <= set("a cab in a bag\n")


@pytest.mark.parametrize(
    "setting", [{"return_dict_in_generate": True}, {"return_dict_in_generate": True, "output_scores": True}]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_generation_config_that_returns_a_dictionary_is_overridden(tmp_path, name, setting):
    model = transformers_model(name)
    model.generation_config.update(**setting)
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    assert make_trainer(tmp_path, model=model, train_dataset=dataset).sample("a cab", 4, seed=1).startswith("a cab")


class Broken(NanoGPT):
    def __init__(self, generate):
        super().__init__()
        self.generate = generate


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers_model("gpt2"),  # has 16 positions
        lambda: Broken(lambda idx, steps: idx),
        lambda: Broken(lambda idx, max_new_tokens: idx.tolist()),
        lambda: Broken(lambda idx, max_new_tokens: idx[:, -1:]),
        lambda: Broken(lambda idx, max_new_tokens: None),
    ],
)
def test_a_generate_method_that_fails_is_an_error(tmp_path, model):
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    trainer = make_trainer(tmp_path, model=model(), train_dataset=dataset)
    with pytest.raises(ModelError, match="generate"):
        trainer.sample("a cab in a bag a cab", 8)


def test_sample_without_generate_or_with_unsupported_options(tmp_path):
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    trainer = make_trainer(tmp_path / "1", model=MixedBag(), train_dataset=dataset)
    with pytest.raises(ConfigError, match="generate"):
        trainer.sample("a")
    trainer = make_trainer(tmp_path / "2", model=NanoGPT(), train_dataset=dataset)
    with pytest.raises(ConfigError, match="top_k"):
        trainer.sample("a", sampling=Sampling(top_p=0.5))


GPT_FUNCTIONS = {
    "score_text": lambda model: score_text(model, get_tokenizer("bytes"), "some text"),
    "score_hellaswag": lambda model: score_hellaswag(model, get_tokenizer("bytes"), ["question"]),
    "generate_text": lambda model: next(generate_text(model, get_tokenizer("bytes"), "some text", 5)),
}


@pytest.mark.parametrize("function", GPT_FUNCTIONS)
@pytest.mark.parametrize("name", ["llama", "nanogpt"])
def test_functions_that_need_a_gpt_say_so(name, function):
    with pytest.raises(ModelError, match=f"{function} needs a GPT"):
        GPT_FUNCTIONS[function](build_model(name))


@pytest.mark.parametrize("command", ["sample MODEL --prompt a", "eval MODEL --text book.txt", "export MODEL exported"])
@pytest.mark.parametrize("name", ["llama", "mixed"])
def test_commands_on_the_run_of_another_model_say_what_to_do(tmp_path, monkeypatch, capsys, name, command):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("some text")
    make_trainer("run", model=build_model(name), max_steps=1, progress=False).train()
    assert main(command.replace("MODEL", "run").split()) == 1
    assert "only a GPT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: transformers_model("llama"), lambda: transformers_model("llama", intermediate_size=40)),
        (lambda: NanoGPT(vocab_size=60), NanoGPT),
        (NanoGPT, lambda: transformers_model("llama")),
        (NanoGPT, lambda: CONFIG),
        (lambda: CONFIG, NanoGPT),
    ],
)
def test_another_model_is_not_resumed(tmp_path, first, second):
    make_trainer(tmp_path, model=first(), max_steps=2, progress=False).train()
    with pytest.raises(ResumeMismatch, match="saved weights do not fit"):
        make_trainer(tmp_path, model=second()).train(resume=True, accept_changes=["model", "optimizer"])


def test_a_changed_configuration_has_to_be_accepted(tmp_path):
    make_trainer(tmp_path, model=transformers_model("llama"), max_steps=2, progress=False).train()
    changed = {"model": transformers_model("llama", rms_norm_eps=1e-3), "progress": False, "max_steps": 3}
    with pytest.raises(ResumeMismatch, match=r"model: config rms_norm_eps was 1e-06, is 0\.001"):
        make_trainer(tmp_path, **changed).train(resume=True, accept_changes=["schedule"])
    trainer = make_trainer(tmp_path, **changed)
    trainer.train(resume=True, accept_changes=["model", "schedule"])
    assert trainer.step == 3


def needs_half_precision(name):
    """Return a model that, like flash attention, cannot be called in float32."""

    def check(layer, inputs):
        if torch.nn.functional.linear(inputs[0], layer.weight).dtype == torch.float32:
            raise RuntimeError("only supports fp16 and bf16")

    model = transformers_model(name)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    linear.register_forward_pre_hook(check)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bart"])
def test_a_model_that_needs_autocast_is_trained(tmp_path, name):
    trainer = make_trainer(tmp_path, model=needs_half_precision(name), mixed_precision="bf16", max_steps=1)
    trainer.train()
    assert trainer.step == 1


@pytest.mark.parametrize("model", [transformers.BertLMHeadModel, transformers.RobertaForCausalLM])
def test_attention_to_later_tokens_is_found_under_autocast(tmp_path, model):
    config = model.config_class(**BERT.to_diff_dict() | {"initializer_range": 0.5})  # as after training
    with pytest.raises(ConfigError, match="attends to later"):
        make_trainer(tmp_path, model=model(config), mixed_precision="bf16")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_rounding_is_not_taken_for_attention_to_later_tokens(tmp_path, name):
    make_trainer(tmp_path, model=transformers_model(name), mixed_precision="bf16")


@pytest.mark.parametrize("precision", ["no", "bf16"], ids=["weights", "autocast"])
def test_bfloat16(tmp_path, precision):
    model = transformers_model("llama")
    recorder = Recorder()
    options = {"mixed_precision": precision, "callbacks": [recorder], "progress": False, "schedule": lambda step: 1.0}
    dataset = TokenDataset.from_text("a cab in a bag\n" * 40, block_size=16, tokenizer="char")
    model = model.bfloat16() if precision == "no" else model
    with pytest.warns(UserWarning, match=r"model\.float\(\)") if precision == "no" else nullcontext():
        trainer = make_trainer(tmp_path, model=model, train_dataset=dataset, **options)
    trainer.train()
    assert recorder.losses[6] < recorder.losses[1] < 5
    assert trainer.sample("a cab", 4, seed=1).startswith("a cab")
    trainer.save_pretrained(tmp_path / "export")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert equal(loaded.state_dict(), model.state_dict())


def one_bfloat16_layer():
    model = NanoGPT()
    model.h[0].mlp.bfloat16()
    return model


def frozen_bfloat16_base():
    model = transformers_model("llama").bfloat16().requires_grad_(False)
    model.model.norm.float().requires_grad_(True)
    return model


@pytest.mark.parametrize(("model", "count"), [(one_bfloat16_layer, 4), (frozen_bfloat16_base, 0)])
def test_trainable_weights_in_bfloat16_are_one_warning(model, count):
    with warnings.catch_warnings(record=True, action="always") as caught:
        check_model(model())
    assert [str(w.message).partition(" ")[0] for w in caught] == ([str(count)] if count else [])


def test_the_protocol_is_public():
    model: LanguageModel = ReturnsLoss()
    config = TrainerConfig(output_dir="unused", max_steps=1, mixed_precision="no")
    assert Trainer(model, token_dataset(), config=config).model is model
    assert weights(SimpleNamespace(model=model)).keys() == model.state_dict().keys()
