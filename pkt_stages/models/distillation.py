"""Distillation of a source's logits with trl's GKD trainer (Agarwal et al. 2024), on this project's encoded examples.

The loss is the generalised Jensen-Shannon divergence per supervised token; beta 0 is KL(source || target). trl's
temperature draws the target's own answers and does not enter the loss. Between different tokenizers trl's universal
logit distillation (Boizard et al. 2024) takes its place: the L1 distance of sorted probabilities, tokens grouped where
both tokenizers end at the same character of the answer, and a group's probability by the chain rule.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pkt_stages.encoding import Encoded, tokens_at
from pkt_stages.errors import UserError
from pkt_stages.examples import Example
from pkt_stages.models.batches import padded, padding_mask
from pkt_stages.models.load import odd_token
from pkt_stages.models.texts import whole
from pkt_stages.models.train_set import collate, rows
from pkt_stages.templates import Template, render_prompt


def check_vocabularies(source: Any, target: Any) -> int:
    """The number of tokens that both tokenizers have.

    Raises:
        UserError: they are not the same tokens with the same numbers.
    """
    if odd := odd_token([source, target], ("in the source", "in the target")):
        raise UserError(
            f"source and target must share their vocabulary: {odd}; use objective uld, or `pkt generate` and"
            " `pkt finetune` (SeqKD), instead"
        )
    return max(target.get_vocab().values()) + 1


def cut_vocabularies(source: Any, target: Any, num_tokens: int) -> None:
    """Drop the padding rows that one model's embedding and head have more than the other's.

    Raises:
        UserError: a model has fewer rows than there are tokens.
    """
    models = {"source": source, "target": target}
    rows = {name: model.get_input_embeddings().weight.shape[0] for name, model in models.items()}
    for name, found in rows.items():
        if found < num_tokens:
            raise UserError(f"the {name}'s embedding has {found} rows, its tokenizer {num_tokens} tokens")
        if found > min(rows.values()):
            models[name].resize_token_embeddings(min(rows.values()), mean_resizing=False).requires_grad_(False)


def check_lengths(examples: Sequence[Encoded], max_new_tokens: int, max_length: int) -> None:
    """Raise UserError if a prompt leaves no room for an answer of `max_new_tokens`."""
    longest = max(prompt_length(e.labels) for e in examples)
    if longest + max_new_tokens > max_length:
        raise UserError(
            f"the longest prompt has {longest} tokens, with max_new_tokens {max_new_tokens} more than the {max_length}"
            " that the target takes; lower max_new_tokens"
        )


def prompt_length(labels: Sequence[int]) -> int:
    """How many tokens stand before the answer."""
    return next(i for i, label in enumerate(labels) if label != -100)


def collate_with_prompts(examples: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch as trl's GKD trainer takes it: the examples padded on the right, their prompts on the left."""
    prompts = [example["ids"][: prompt_length(example["labels"])] for example in examples]
    return {
        **collate(examples),
        "prompts": padded(prompts, pad, left=True),
        "prompt_attention_mask": padding_mask(prompts, left=True),
    }


def gkd_trainer(
    model: Any,
    source: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    arguments: dict[str, Any],
    *,
    own_answers: bool,
    beta: float,
    temperature: float,
    max_new_tokens: int,
) -> Any:
    """trl's trainer for these settings.

    With gold answers a step's loss is the mean over the batch's supervised tokens. How many tokens the target will
    write is not known beforehand, so with its own answers it is the mean over micro-batches of their token means; trl
    itself divides by the number of gold tokens then.

    Args:
        model: the target with its adapter (PEFT).
        arguments: values for TrainingArguments.
        own_answers: the target writes the answers itself, instead of the examples' gold ones.
        beta: 0 .. 1: 0 is KL(source || target), 1 is KL(target || source).
        temperature, max_new_tokens: of the target's own answers.
    """
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl: the trainer is experimental
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    # It recommends its other trainer.
    logging.getLogger("trl.experimental.gkd.gkd_trainer").setLevel(logging.ERROR)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GKDConfig(
        **arguments,
        lmbda=float(own_answers),  # share of the batches
        beta=beta,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        disable_dropout=False,
        max_length=None,
    )
    trainer = GKDTrainer(
        model=model,
        teacher_model=source,
        args=config,
        data_collator=lambda batch: collate_with_prompts(batch, tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(rows(examples)),
        processing_class=tokenizer,
    )
    # The target's own distribution, whatever its generation config asks for.
    trainer.generation_config.repetition_penalty = 1.0
    if own_answers:
        trainer.model_accepts_loss_kwargs = False
    return trainer


def answer_ends(tokenizer: Any, example: Example, template: Template, side: int) -> list[int]:
    """Where in the answer each token of the encoded example ends: 0 in the prompt, and for EOS the answer's end.

    In units of which a character has `_UNITS`, so that a token that ends inside a character ends nowhere where one of
    the other side (0 or 1) does.
    """
    prompt = render_prompt(tokenizer, template, example.prompt)
    _, spans = tokens_at(tokenizer, prompt + example.answer)
    ends = [max(0, end - len(prompt)) for _, end in spans]
    found = []
    inside = 0
    for end, is_whole in zip(ends, whole(spans), strict=True):
        inside = inside + 1 if not is_whole and end > 0 else 0
        found.append(end * _UNITS if not inside else (end - 1) * _UNITS + 2 * inside + side)
    return [*found, len(example.answer) * _UNITS]


_UNITS = 64


def uld_trainer(
    model: Any,
    source: Any,
    examples: Sequence[tuple[Encoded, Encoded]],
    ends: Sequence[tuple[list[int], list[int]]],
    arguments: dict[str, Any],
) -> Any:
    """A trainer on trl's ULD loss: mean over examples of the mean over groups of an answer's tokens, EOS left out.

    Args:
        model: the target with its adapter (PEFT).
        examples: as target and source read them.
        ends: of their tokens, from `answer_ends`.
        arguments: values for TrainingArguments.
    """
    from datasets import Dataset
    from transformers import Trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl: the trainer is experimental
        from trl.experimental.gold.gold_config import GOLDConfig
        from trl.experimental.gold.gold_trainer import ULDLoss
    config = GOLDConfig(**arguments, use_uld_loss=True, uld_token_merge_strategy="bayesian", disable_dropout=False)
    uld: Any = ULDLoss(config)

    def batch_of(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            f"{side}{name}": tensor
            for side in ("", "source_")
            for name, tensor in {
                **collate([{"ids": e[f"{side}ids"], "labels": e[f"{side}labels"]} for e in batch]),
                "ends": padded([e[f"{side}ends"] for e in batch], 0)[..., None].expand(-1, -1, 2),
            }.items()
        }

    class AcrossTokenizers(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            with torch.no_grad():
                theirs = source(
                    input_ids=inputs["source_input_ids"], attention_mask=inputs["source_attention_mask"]
                ).logits
            names = [f"{side}{name}" for name in ("labels", "input_ids", "ends") for side in ("", "source_")]
            loss = uld(outputs.logits, theirs, *(inputs[name] for name in names))
            return (loss, outputs) if return_outputs else loss

    data = [
        {"ids": t.ids, "labels": t.labels, "ends": own}
        | {"source_ids": s.ids, "source_labels": s.labels, "source_ends": theirs}
        for (t, s), (own, theirs) in zip(examples, ends, strict=True)
    ]
    trainer = AcrossTokenizers(model, config, data_collator=batch_of, train_dataset=Dataset.from_list(data))
    trainer.model_accepts_loss_kwargs = False  # or gradients of micro-batches would be summed
    return trainer
