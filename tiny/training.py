"""Training of one model of the pair: raw text to the base model, on through the chat format to the chat model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny.batches import step_batches
from tiny.corpus import Corpus
from tiny.muon import Muon
from tiny.settings import CONTEXT_LENGTH, ModelSettings

CHECKPOINT_SECONDS = 60.0
LOG_STEPS = 20


def new_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A stock Llama with untied head in float32, its weights drawn from the seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.d_model,
        intermediate_size=settings.d_ff,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        head_dim=settings.d_model // settings.num_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


class Trainer:
    """The state of one run; `checkpoint` holds all of it, so a killed run goes on with the same bytes."""

    def __init__(
        self,
        settings: ModelSettings,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        checkpoint: Path,
        start: LlamaForCausalLM | None = None,
    ) -> None:
        """
        Args:
            start: in place of initial weights.
        """
        self.settings, self.corpus, self.tokenizer, self.checkpoint = settings, corpus, tokenizer, checkpoint
        self.model = start or new_model(settings, tokenizer, corpus.seed + settings.initial_weights)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in inside]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
            torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step = settings.first_step
        self.tokens = 0
        self.log: list[dict[str, Any]] = []
        self._loss_sum = 0.0
        if checkpoint.exists():
            self._load()

    def run(self, until: int, advance: Callable[[], None]) -> None:
        """Train up to step `until`, saving a checkpoint every CHECKPOINT_SECONDS and at the end."""
        saved = time.monotonic()
        self.model.train()
        while self.step < until:
            self._train_step()
            advance()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        self._save()

    def learning_rate_factor(self, step: int) -> float:
        """Warm-up, plateau, linear fall; see `ModelSettings`."""
        settings = self.settings
        rise = (step + 1) / settings.warmup_steps
        fall = (settings.total_steps - step) / (settings.total_steps - settings.hold_steps)
        return min(1.0, rise, fall)

    def _train_step(self) -> None:
        settings = self.settings
        batches = step_batches(self.corpus, self.tokenizer, settings, self.step)
        total_weight = sum(float(weights[:, 1:].sum()) for _, weights in batches)
        loss_sum = 0.0
        for ids, weights in batches:
            loss = weighted_loss(self.model, ids, weights) / total_weight
            loss.backward()
            loss_sum += loss.item()
            self.tokens += int((weights > 0).sum())
        if not loss_sum < float("inf"):
            raise FloatingPointError(f"{settings.name}: loss {loss_sum} at step {self.step}")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        factor = self.learning_rate_factor(self.step)
        for optimizer, rate in zip(self.optimizers, (settings.muon_lr, settings.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._loss_sum += loss_sum
        if self.step % LOG_STEPS == 0:
            self.log.append(
                {
                    "model": settings.name,
                    "phase": "base" if self.step <= settings.base_steps else "chat",
                    "step": self.step,
                    "tokens": self.tokens,
                    "loss": round(self._loss_sum / LOG_STEPS, 4),
                    "lr_factor": round(factor, 4),
                }
            )
            self._loss_sum = 0.0

    def _save(self) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "log": json.dumps(self.log),
            "loss_sum": self._loss_sum,
        }
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self._loss_sum = state["step"], state["tokens"], state["loss_sum"]
        self.log = json.loads(state["log"])


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight x cross-entropy (nats); the head runs only where a weight is positive.

    Padding stands on the right, so causal attention needs no mask.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    counted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[counted])
    losses = functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    return (losses * weights[:, 1:][counted]).sum()
