"""Functions that workers run for the tests of `gather_tokens`, and of single steps over whole rows."""

import contextlib
import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from trl.trainer import utils as trl_utils

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, RankPlan, attach, gather_tokens, plan_documents
from hf_flashcp.data.boundaries import shift, without_starts
from hf_flashcp.doctor.float64 import float64_throughout
from tests.accelerate_state import fresh_accelerate
from tests.device import DEVICE
from tests.model_cases import cp_mesh, sum_gradients
from tests.models import FAMILIES, SMALL, build_model, gradients, largest_error, make_documents
from tests.row_cases import VOCABULARY, InOrder, classifier, found_in, in_precision, perturbed
from tests.trainer_cases import KeepGradient, training_arguments
from tests.wrapper_cases import with_lora


def gathered_loss(outputs, labels, num_items_in_batch=None, flashcp_plan=None):
    """Return the squared log probabilities of documents, a loss that is no sum over tokens."""
    of_tokens = -F.cross_entropy(outputs.logits[0], labels[0], reduction="none")
    row = gather_tokens(of_tokens[None], flashcp_plan)
    documents = row.split(list(flashcp_plan.plan.lengths))
    return sum(document.sum() ** 2 for document in documents) / num_items_in_batch


def custom_loss(cp_size, accumulation=2):
    """Return gradients, parameters and logs of a Trainer with a loss of gathered tokens."""
    fresh_accelerate()
    keep = KeepGradient()
    features = make_documents([40, 3, 17, 9, 25, 2, 30, 7, 12, 5, 33, 20], prompt=0.3)
    with float64_throughout():
        trainer = type("Ordered", (InOrder, FlashCPTrainer), {})(
            model=build_model("llama"),
            args=training_arguments(
                parallelism_config=FlashCPPlugin(cp_size=cp_size, strategy="per_doc"),
                per_device_train_batch_size=3,
                per_device_eval_batch_size=3,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                learning_rate=0.1,
            ),
            train_dataset=features,
            eval_dataset=features[:5],
            compute_loss_func=gathered_loss,
            callbacks=[keep],
        )
        trainer.train()
        evaluation = trainer.evaluate()
    return found_in(trainer, keep, evaluation)


def loop_of_documents(lengths):
    """Call [`_loop_of_documents`] with everything in fp64."""
    with float64_throughout():
        return _loop_of_documents(lengths)


def _loop_of_documents(lengths):
    """Return loss and gradient error of a loop with gathered log probabilities, compared with documents run alone."""
    mesh, size = cp_mesh(), dist.get_world_size()
    features, model = make_documents(lengths), build_model("llama")
    handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=size, strategy="per_doc"))
    batch = FlashCPCollator(size)(features)
    labels = batch.pop("labels")
    model.train()
    outputs = model(**batch)
    targets = _targets(labels, handle.plan)
    log_probs = -F.cross_entropy(outputs.logits[0], targets, reduction="none")
    loss = _of_documents(gather_tokens(log_probs[None], handle.plan), lengths)
    loss.backward()
    sum_gradients(model)
    ours = {name: gradient / size for name, gradient in gradients(model).items()}
    alone = build_model("llama", "sdpa")
    rows = []
    for feature in features:
        ids = torch.tensor([feature["input_ids"]])
        logits = alone(input_ids=ids, use_cache=False).logits[0, :-1]
        rows.append(F.pad(-F.cross_entropy(logits, ids[0, 1:], reduction="none"), (0, 1)))
    expected = _of_documents(torch.cat(rows), lengths)
    expected.backward()
    handle.remove()
    return {"loss": loss.item(), "expected": expected.item(), "error": largest_error(ours, gradients(alone))}


def _targets(labels, plan):
    shifted = shift(without_starts(labels, plan.plan.lengths))
    return shifted[0, plan.layout.token_index]


def _of_documents(row, lengths):
    return sum(torch.tanh(document.sum() / 20) for document in row.split(lengths))


def gathered(lengths, dtype, width=()):
    """Assert that a gathered tensor is the whole row, and that its gradient is the sum over ranks."""
    mesh = cp_mesh()
    size, rank = mesh.size(), mesh.get_local_rank()
    plan = RankPlan(plan_documents(lengths, size, strategy="per_doc"), rank, mesh.get_group())
    row = torch.arange(sum(lengths) * max(1, torch.Size(width).numel())).view(-1, *width).to(DEVICE, dtype)
    row = row % 2 == 0 if dtype == torch.bool else row
    mine = row[plan.layout.token_index][None].clone().requires_grad_(dtype.is_floating_point)
    other = torch.zeros_like(row, requires_grad=dtype.is_floating_point)
    doubled = 2 * other  # before, so that its backward comes after
    whole = gather_tokens(mine, plan)
    assert torch.equal(whole, row) and whole.dtype == dtype
    if dtype.is_floating_point:
        ((whole + doubled) * (rank + 1)).sum().backward()
        assert torch.equal(mine.grad, torch.full_like(mine, size * (size + 1) / 2))
        assert torch.equal(other.grad, torch.full_like(other, 2 * (rank + 1)))


def rows_forward(rows, *, batches="shared", of_rank=None, **inputs):
    """Return the outputs of a fused forward over rows, from a model whose forwards are sharded, and from a plain one.

    Args:
        rows: for each row, its padding before, its tokens, its padding after, and how many of its tokens are targets.
        batches: as in FlashCPPlugin.
        of_rank: rows of each rank, if they differ.
    """
    fresh_accelerate()
    mesh = cp_mesh()
    rows = rows if of_rank is None else of_rank[dist.get_rank()]
    ids, mask, labels = _padded(rows)
    outputs = []
    with in_precision(torch.float64), torch.no_grad():
        for attention in ("flashcp", "sdpa"):
            model = build_model("llama", attention)
            trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
            if attention == "flashcp":
                handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=mesh.size(), strategy="per_doc"))
                handle.read_rows(model, batches)
            found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **inputs)
            assert attention == "sdpa" or found.loss is None
            outputs.append((found.log_probs, found.entropy, found.is_top1.double()))
        handle.remove()
    return max(float((ours - plain).abs().max()) for ours, plain in zip(*outputs))


def _padded(rows):
    generator = torch.Generator().manual_seed(3)
    width = max(sum(row[:3]) for row in rows)
    ids, mask, labels = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=int), None
    labels = torch.full_like(ids, -100)
    for index, (before, tokens, _, targets) in enumerate(rows):
        here = slice(before, before + tokens)
        ids[index, here] = torch.randint(3, VOCABULARY, (tokens,), generator=generator)
        mask[index, here] = 1
        targeted = slice(before + tokens - targets, before + tokens)
        labels[index, targeted] = ids[index, targeted]
    return ids.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE)


def replay():
    """Return the largest difference between the outputs of two forwards with dropout and those of their replay."""
    fresh_accelerate()
    mesh = cp_mesh()
    with in_precision(torch.float64):
        model = with_lora(build_model("llama"), dropout=0.5)
        trl_utils.add_fused_lm_head(model.get_base_model())
        handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=mesh.size(), strategy="per_doc"))
        handle.read_rows(model.get_base_model(), "turns")
        model.train()
        expected, found = [], []
        with handle.turns.recording():
            for tokens in (9, 14):  # ranks have different rows
                ids, mask, labels = _padded([(0, tokens + 5 * dist.get_rank(), 0, 6), (0, 3, 2, 1)])
                batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
                expected.append(model(**batch).log_probs)
            sum(each.square().sum() for each in expected).backward()

        def replayed(**batch):
            found.append(model(**batch))
            return found[-1]

        handle.turns.replay(replayed, True, contextlib.nullcontext)
        handle.remove()
    mine = [output.log_probs for output in found][dist.get_rank() :: mesh.size()]
    assert len(found) == 2 * mesh.size() and not torch.equal(expected[0][:, :8], expected[1][:, :8])
    return max(float((each - output).detach().abs().max()) for each, output in zip(expected, mine))


def copied_model():
    """Return whether a copied model whose forwards run in turns computes with its own parameters."""
    fresh_accelerate()
    mesh = cp_mesh()
    ids, mask, labels = _padded([(0, 9, 0, 3), (0, 12, 0, 3)])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
    model = build_model("llama")
    trl_utils.add_fused_lm_head(model)
    handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=mesh.size()))
    handle.read_rows(model, "turns")
    copied = perturbed(copy.deepcopy(model))
    with torch.no_grad():
        before, found = model(**batch).log_probs, copied(**batch).log_probs
        model.load_state_dict(copied.state_dict())
        expected = model(**batch).log_probs
    handle.remove()
    return torch.equal(found, expected) and not torch.equal(found, before)


def dynamic_rope(batches):
    """Attach a model whose rotary frequencies depend on earlier rows."""
    fresh_accelerate()
    mesh = cp_mesh()
    model = build_model("llama, dynamic")
    handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=mesh.size()))
    try:
        handle.read_rows(model, batches)
    finally:
        handle.remove()


def hole_in_a_row(batches, rank):
    """Run a forward over rows of which one, on one rank, has padding between its tokens."""
    ids, mask, labels = _padded([(0, 9, 0, 3), (0, 9, 0, 3)])
    if dist.get_rank() == rank or batches == "shared":
        mask[1, 4] = 0
    _forward(batches, input_ids=ids, attention_mask=mask, labels=labels)


class _PooledHead(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden.mean(1, keepdim=True))


def pooled_head():
    """Run a classifier whose head does not score each token by itself."""
    fresh_accelerate()
    mesh = cp_mesh()
    ids, mask, _ = _padded([(0, 9, 0, 3), (0, 7, 2, 3)])
    model = classifier("flashcp", pad_token_id=2)
    model.score = _PooledHead(SMALL["hidden_size"], 1, dtype=torch.float64)
    handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=mesh.size()))
    try:
        model(input_ids=ids, attention_mask=mask)
    finally:
        handle.remove()


def narrow_mask():
    """Run a forward with a mask of fewer tokens."""
    ids, mask, labels = _padded([(0, 9, 0, 3), (0, 9, 0, 3)])
    _forward("shared", input_ids=ids, attention_mask=mask[:, 1:], labels=labels)


def other_rows_on_each_rank():
    """Run a forward over rows of equal lengths that the ranks of a group should share, but do not."""
    ids, mask, labels = _padded([(0, 9, 0, 3 + dist.get_rank()), (0, 9, 0, 3)])
    _forward("shared", input_ids=ids, attention_mask=mask, labels=labels)


def other_inputs_on_each_rank():
    """Run a forward over pooled rows, of which those of one rank have positions."""
    ids, mask, labels = _padded([(0, 9, 0, 3), (0, 9, 0, 3)])
    positions = {"position_ids": torch.arange(9).expand(2, 9)} if dist.get_rank() == 1 else {}
    _forward("own", input_ids=ids, attention_mask=mask, labels=labels, **positions)


def embedded_rows(batches):
    """Run a forward over rows of embeddings."""
    ids, mask, labels = _padded([(0, 9, 0, 3), (0, 9, 0, 3)])
    embeddings = torch.zeros(*ids.shape, SMALL["hidden_size"], dtype=torch.float64)
    _forward(batches, inputs_embeds=embeddings, attention_mask=mask, labels=labels)


def empty_rows(batches):
    """Run a forward over rows without tokens."""
    ids, mask, labels = _padded([(0, 0, 9, 0)])
    _forward(batches, input_ids=ids, attention_mask=mask, labels=labels)


def unrecorded_turns():
    """Run a forward with gradients in turns, outside a training step of the mixin."""
    ids, mask, labels = _padded([(0, 9, 0, 3)])
    _forward("turns", gradients=True, input_ids=ids, attention_mask=mask, labels=labels)


def _forward(batches, gradients=False, **batch):
    fresh_accelerate()
    mesh = cp_mesh()
    model = build_model("llama")
    trl_utils.add_fused_lm_head(model)
    handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=mesh.size()))
    handle.read_rows(model, batches)
    try:
        with torch.set_grad_enabled(gradients):
            model(**batch, fused_lm_head=True)
    finally:
        handle.remove()


def head_errors(names, head):
    """Return the gradient errors of classifiers of these families, compared with the plain model on padded rows."""
    return {name: _head_error(name, head) for name in names}


def _head_error(name, head):
    mesh = cp_mesh()
    auto = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}[head]
    ids, mask, _ = _padded([(0, 9, 8, 0), (0, 17, 0, 0), (0, 2, 15, 0)])
    labels = torch.tensor([0, 2, 1]) if head == "sequence" else (ids % 3).where(mask == 1, -100)
    found = []
    for attention in ("flashcp", "eager"):
        torch.manual_seed(0)
        config = copy.deepcopy(FAMILIES[name])
        config.update({"num_labels": 3, "pad_token_id": 2, "classifier_dropout": 0.0})
        kinds = {"attn_implementation": attention, "experts_implementation": "eager", "dtype": torch.float64}
        model = auto.from_config(config, **kinds).to(DEVICE).train()
        handle = attach(model, mesh) if attention == "flashcp" else None
        with float64_throughout():
            model(input_ids=ids, attention_mask=mask, labels=labels.to(DEVICE)).loss.backward()
        if handle is not None:
            assert handle.plan is not None
            sum_gradients(model)
            handle.remove()
        found.append({key: value / (mesh.size() if handle else 1) for key, value in gradients(model).items()})
    return largest_error(*found)
