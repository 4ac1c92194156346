"""Every figure that needs a GPU, in one run of eight minutes, on random weights in the sizes of Llama-2 13B and 7B.

    python -m benchmarks.gpu --out FOLDER                                          # a GPU of 80 GB or more
    TRITON_INTERPRET=1 python -m benchmarks.gpu --small --out FOLDER --device cpu  # a rehearsal; times mean nothing

Writes FOLDER/gpu.json after every item, so that a run that is cut off loses one, and prints a table in the end. Each
item stands beside a plain baseline of the same run; the card's own rates of products and of copying come first.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import align, cka
from benchmarks.cka import FULL, clock, random_model
from pkt_stages.core import attribution as core
from pkt_stages.core import halves
from pkt_stages.core.transport import polar
from pkt_stages.models import attribution
from pkt_stages.models.capture import batches, capture, capture_all
from pkt_stages.models.sites import geometry

TINY = ((96, 256, 3, 6), (64, 160, 2, 4))
# Neurons, vocabulary entries and examples of a tile, warps, and the span of the vocabulary that a program goes over.
TILES = (
    (64, 64, 32, 4, 2048),
    (64, 64, 64, 4, 2048),
    (64, 64, 16, 4, 2048),
    (128, 64, 32, 8, 2048),
    (128, 64, 64, 8, 2048),
    (64, 128, 32, 8, 2048),
    (64, 32, 32, 4, 2048),
    (64, 64, 32, 4, 4096),
)


class Run:
    """Sizes, device, and what was measured so far."""

    def __init__(self, out: Path, device: str, small: bool, seconds: float) -> None:
        self.path = out / "gpu.json"
        out.mkdir(parents=True, exist_ok=True)
        self.device, self.small, self.end = device, small, time.monotonic() + seconds
        self.source, self.target = TINY if small else FULL
        self.vocab, self.num_examples, self.tokens = (300, 4, 9) if small else (32000, 35, 128)
        self.dtype = torch.float32 if small else torch.float16
        self.found: dict[str, Any] = {"torch": torch.__version__, "device": device, "small": small}
        if device.startswith("cuda"):
            self.found["card"] = torch.cuda.get_device_name()

    def item(self, name: str, needed: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one thing if there is time for it, and write all down."""
        if self.end - time.monotonic() < needed and not self.small:
            self.found[name] = {"skipped": f"needs {needed} s"}
        else:
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            start = clock(self.device)
            try:
                made = measure()
            except Exception as error:  # the next items are wanted all the same
                traceback.print_exc()
                made = {"failed": " ".join(str(error).split())[:300]}
            made["in_all_s"] = clock(self.device) - start
            if self.device.startswith("cuda"):
                made["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.found[name] = made
        print(name, json.dumps(self.found[name]), flush=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def timed(self, work: Callable[[], Any], turns: int = 3) -> float:
        """Seconds, the median after one turn that does not count."""
        taken = []
        for _ in range(1 if self.small else turns + 1):
            start = clock(self.device)
            work()
            taken.append(clock(self.device) - start)
        return sorted(taken[1:] or taken)[(len(taken) - 1) // 2]


def limits(run: Run) -> dict[str, Any]:
    """Rates of the card."""
    n = 256 if run.small else 8192
    found = {}
    for name, dtype in (("16_bit", torch.float16), ("float32", torch.float32), ("float64", torch.float64)):
        a, b = (torch.randn(n, n, device=run.device).to(dtype) for _ in range(2))
        found[f"{name}_tflop_s"] = 2 * n**3 / run.timed(lambda a=a, b=b: a @ b, 5) / 1e12
    x = torch.randn(n * n * 4, device=run.device)
    found["copy_gb_s"] = 2 * x.numel() * 4 / run.timed(x.clone, 5) / 1e9
    return found


class Attribution:
    """All neurons of the source on some examples."""

    def __init__(self, run: Run, model: Any) -> None:
        self.run, self.model, self.sizes = run, model, geometry(model.config)
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, run.vocab, (run.num_examples, run.tokens + 1), generator=draw).tolist()
        self.contexts, self.predicted = [row[:-1] for row in ids], [row[-1] for row in ids]
        self.captured = [vars(c) for batch in batches(self.contexts) for c in self._pass(batch)]
        on_lens = attribution.on_lens(model, self.captured, self.predicted, ("rms",), ("all_positions",))
        made = halves.HalvedPowers(model.get_output_embeddings().weight, model.model.norm.weight.float())
        self.fused = dataclasses.replace(on_lens, fused=made)
        self.plain = dataclasses.replace(on_lens, fused=None)
        self.layer = self.sizes.num_layers // 2

    def _pass(self, batch: list[int]) -> list[Any]:
        return capture_all(self.model, [self.contexts[i] for i in batch])

    def tune(self) -> dict[str, Any]:
        """Seconds of a tile's powers for each shape of the kernel's tiles; the fastest is kept for what follows."""
        weight = self.model.model.layers[self.layer].mlp.down_proj.weight
        subvalues = weight.mT.float().contiguous()[: core.TILES["cuda"][0]]
        rest = torch.rand(self.run.vocab, self.run.num_examples, device=self.run.device).softmax(0)
        found = {}
        for shape in TILES[:1] if self.run.small else TILES:
            self._shape(shape)
            try:
                found[str(shape)] = self.run.timed(lambda: self.fused.fused(subvalues, rest))
            except Exception as error:  # too much shared memory, say
                print(shape, " ".join(str(error).split())[:200], flush=True)
        best = min(found, key=found.__getitem__)
        self._shape(next(shape for shape in TILES if str(shape) == best))
        factors = subvalues.half().repeat(1, self.fused.fused.parts.shape[1] // self.sizes.d_model)
        product = self.run.timed(lambda: [halves._product(factors, u) for u in self.fused.fused.parts.split(16384)])
        plain = self.run.timed(lambda: core.powers(subvalues, self.plain.centred, rest), 1)
        return {"seconds": found, "best": best, "product_alone_s": product, "float32_s": plain}

    def _shape(self, shape: tuple[int, ...]) -> None:
        halves.ROWS, halves.COLUMNS, halves.PART, halves.NUM_WARPS, halves.SPAN = shape

    def profile(self) -> dict[str, Any]:
        """What the time of a layer goes to."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            attribution.score_layer(self.fused, self.layer, 1e-6)
            clock(self.run.device)
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:25]
        return {row.key[:60]: [row.self_device_time_total / 1e3, row.count] for row in rows}

    def measure(self) -> dict[str, Any]:
        run, layers = self.run, range(self.sizes.num_layers)
        one_by_one = run.timed(lambda: [capture(self.model, c) for c in self.contexts], 1)
        batched = run.timed(lambda: [self._pass(batch) for batch in batches(self.contexts)], 1)
        scored: list[dict[str, Tensor]] = []
        scoring = run.timed(lambda: scored.append(attribution.score_layer(self.fused, self.layer, 1e-6)))
        start = clock(run.device)
        every = [attribution.score_layer(self.fused, layer, 1e-6) for layer in layers]
        all_layers = clock(run.device) - start
        start = clock(run.device)
        oracle = attribution.score_layer(self.plain, self.layer, 1e-6)
        float32 = clock(run.device) - start
        start = clock(run.device)
        attribution.collected(self.fused, every, 10, 10)
        collecting = clock(run.device) - start
        plain = self._definition()
        neurons = self.sizes.num_layers * (self.sizes.d_ff + self.sizes.num_attn_neurons)
        tflop = 2 * neurons * self.sizes.d_model * run.vocab / 1e12
        limit = tflop / run.found["limits"]["16_bit_tflop_s"]
        return {
            "neurons": neurons,
            "examples": run.num_examples,
            "forward_one_by_one_s": one_by_one,
            "forward_batched_s": batched,
            "one_layer_s": scoring,
            "all_layers_s": all_layers,
            "lens_tokens_s": collecting,
            "total_s": batched + all_layers + collecting,
            "limit_s": limit,
            "scoring_over_limit": all_layers / limit,
            "float32_one_layer_s": float32,
            "ratio_to_float32_products": float32 / scoring,
            "definition_s": plain,
            "ratio_to_definition": plain / (batched + all_layers),
            "plain_pairs": sum(int(layer[f"{s}_plain"]) for layer in every for s in ("ffn", "attn")),
            "worst_nats_to_float32": max(float((scored[0][s] - oracle[s]).abs().max()) for s in ("ffn", "attn")),
            **self._against_float64(scored[0], oracle),
        }

    def _ffn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Subvalues, residuals in front, and coefficients of the FFN of one layer."""
        subvalues = self.model.model.layers[self.layer].mlp.down_proj.weight.mT.float()
        stacked = self.plain.stacked
        residual = stacked("layer_input", self.layer) + stacked("attn_output", self.layer)
        return subvalues, residual, stacked("ffn_coefficients", self.layer)

    def _definition(self) -> float:
        """Seconds of a softmax per neuron and example, from one example and FFN, for all neurons and examples."""
        subvalues, residual, c = self._ffn()
        u, divisor = self.plain.lens.unembedding, self.plain.divisor[0]

        def one() -> None:
            for part in torch.arange(len(subvalues), device=c.device).split(4096):
                moved = (residual[0] + c[0, part, None] * subvalues[part]) @ u.mT / divisor
                torch.log(torch.softmax(moved, -1))[:, self.predicted[0]]

        neurons = self.sizes.num_layers * (self.sizes.d_ff + self.sizes.num_attn_neurons)
        return self.run.timed(one, 1) * neurons / self.sizes.d_ff * self.run.num_examples

    def _against_float64(self, fused_scores: dict[str, Tensor], plain_scores: dict[str, Tensor]) -> dict[str, Any]:
        subvalues, residual, c = self._ffn()
        some = torch.arange(0, len(subvalues), max(1, len(subvalues) // 64), device=c.device)
        exact = core.plain_neuron_scores(
            subvalues[some].double(),
            self.plain.lens.unembedding.double(),
            residual.double(),
            self.plain.divisor.double(),
            c[None][..., some].double(),
            self.plain.token,
        ).cpu()
        return {
            "largest_score_nats": float(exact.abs().max()),
            "worst_nats_to_float64": float((fused_scores["ffn"][..., some.cpu()].double() - exact).abs().max()),
            "float32_to_float64": float((plain_scores["ffn"][..., some.cpu()].double() - exact).abs().max()),
        }

    def sharper(self) -> dict[str, Any]:
        """One FFN with coefficients so large that about one pair in a hundred takes the plain path."""
        subvalues, residual, c = self._ffn()
        log_p = core.log_softmax(self.plain.logits(residual[None]))
        [base] = core.bases(log_p, self.plain.token, self.plain.centred)
        scaled = c[None] / self.plain.divisor[:, None]
        factor, share = 1.0, 0.0
        while share < 0.01 and factor < 1e9:
            factor *= 2
            found = core.neuron_scores(subvalues, self.plain.centred, base, scaled * factor, fused=self.fused.fused)
            share = found.num_plain / c.numel()

        def score(form: core.Powers | None) -> core.Scores:
            return core.neuron_scores(subvalues, self.plain.centred, base, scaled * factor, fused=form)

        found, oracle = score(self.fused.fused), score(None)
        every = core.neuron_scores(
            subvalues[:256], self.plain.centred, base, scaled[..., :256] * factor, tolerance=0.0
        ).values
        return {
            "plain_share": share,
            "one_ffn_s": self.run.timed(lambda: score(self.fused.fused), 1),
            "float32_s": self.run.timed(lambda: score(None), 1),
            "largest_score_nats": float(every.abs().max()),
            "worst_nats_to_float32": float((found.values - oracle.values).abs().max()),
            "worst_nats_to_plain_path": float((found.values[..., :256] - every).abs().max()),
        }

    def selection(self) -> dict[str, Any]:
        """Ranking all neurons of every example, as `select` does."""
        scores = torch.randn(self.run.num_examples, self.sizes.num_layers, self.sizes.d_ff)

        def rank() -> Tensor:
            return scores.sort(dim=-1, descending=True, stable=True).indices

        return {"rank_s": self.run.timed(rank, 1)}


def sensitivity(run: Run, model: Any) -> dict[str, Any]:
    """Seeking's sensitivity of the four sites, a step of gradients without it beside it."""
    from pkt_stages.encoding import Encoded
    from pkt_stages.models.losses import example_losses
    from pkt_stages.models.sensitivity import sensitivities
    from pkt_stages.models.sites import SITES, weight_name

    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, run.vocab, (4, run.tokens), generator=draw).tolist()
    examples = [(str(n), Encoded(row, row)) for n, row in enumerate(ids)]
    wanted = {weight_name(layer, s) for layer in range(geometry(model.config).num_layers) for s in SITES}

    def bare() -> None:
        handles = []
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))
        for _, example in examples:
            example_losses(model, [example]).sum().backward()
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)

    plain = run.timed(bare, 1) / len(examples)
    taken = run.timed(lambda: sensitivities(model, examples, wanted), 1) / len(examples)
    return {"example_s": taken, "forward_and_backward_s": plain, "ratio": taken / plain}


def generation(run: Run, model: Any) -> dict[str, Any]:
    """Greedy answers through `evaluate`'s backend, and transformers' own generate on the same prompts."""
    from types import SimpleNamespace

    from pkt_stages.evaluation.backends import Continuation, HfBackend, Request, Sampling

    count, length = (4, 6) if run.small else (64, 96)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, run.vocab, (count, run.tokens), generator=draw).tolist()
    model.generation_config.eos_token_id = run.vocab - 1
    backend = HfBackend(model, SimpleNamespace(eos_token_id=run.vocab - 1), batch_size=count, identity="random")
    made: list[Any] = []
    ours = run.timed(
        lambda: made.append(backend.generate([Request(i, length, 0) for i in ids], Sampling(0.0, 1.0, ()))), 1
    )

    def plain() -> Tensor:
        prompt = torch.tensor(ids, device=run.device)
        with torch.inference_mode():
            return model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length, pad_token_id=0
            )

    theirs = run.timed(plain, 1)
    same = [a == b[run.tokens :][: len(a)] for a, b in zip(made[-1], plain().tolist(), strict=True)]
    asked = [Continuation(row[: run.tokens // 2], row[run.tokens // 2 :]) for row in ids]
    likelihood = run.timed(lambda: backend.continuation_logprobs(asked), 1)
    tokens = sum(len(a) for a in made[-1])
    return {
        "answers": count,
        "tokens_s": tokens / ours,
        "ratio_to_generate": theirs / ours,
        "equal_answers": sum(same),
        "likelihoods_s": count / likelihood,
    }


def maps(run: Run) -> dict[str, Any]:
    """Orthogonal maps of the residual stream and of an FFN, by the singular value decomposition, float64."""
    found = {}
    for d_source, d_target in ((96, 64),) if run.small else ((5120, 4096), (13824, 11008)):
        cross = torch.randn(d_source, d_target, device=run.device, dtype=torch.float64)
        start = clock(run.device)
        polar(cross)
        found[f"{d_source}x{d_target}_s"] = clock(run.device) - start
    return found


def main(
    out: Annotated[Path, typer.Option(help="Where gpu.json goes.")],
    device: str = "cuda",
    small: Annotated[bool, typer.Option(help="Tiny sizes, to rehearse.")] = False,
    seconds: Annotated[float, typer.Option(help="Begin nothing that would not be done by then.")] = 420,
) -> None:
    torch.manual_seed(0)
    run = Run(out, device, small, seconds)
    run.item("limits", 5, lambda: limits(run))
    source = random_model(run.source, device, run.dtype, run.vocab).requires_grad_(False)
    whole = Attribution(run, source)
    run.item("tiles", 60, whole.tune)
    run.item("layer_profile_ms", 5, whole.profile)
    run.item("attribution", 40, whole.measure)
    run.item("one_in_a_hundred_plain", 20, whole.sharper)
    run.item("ranking", 5, whole.selection)
    del whole
    run.item("sensitivity", 20, lambda: sensitivity(run, source))
    target = random_model(run.target, device, run.dtype, run.vocab).requires_grad_(False)
    texts, pairs = (8, 4) if small else (200, 40)
    run.item(
        "cka",
        40,
        lambda: cka.measure([source, target], texts=texts, tokens=run.tokens, micro_batch=8, pairs=pairs),
    )
    del source
    step = {"examples": 4, "micro_batch": 2} if small else {"examples": 16, "micro_batch": 4}
    run.item(
        "laten_step",
        40,
        lambda: align.measure(target, run.source[0], tokens=run.tokens, rate=0.1, turns=3, **step),
    )
    run.item("generation", 40, lambda: generation(run, target))
    del target
    run.item("maps", 30, lambda: maps(run))
    for name, figures in run.found.items():
        for figure, value in figures.items() if isinstance(figures, dict) and name != "layer_profile_ms" else ():
            print(
                f"{name:24} {figure:28} {value:.5g}"
                if isinstance(value, int | float)
                else f"{name:24} {figure}: {value}"
            )


if __name__ == "__main__":
    typer.run(main)
