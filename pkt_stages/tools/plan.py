"""What will a profile take? Stages that are out of date, with estimates of time, GPU memory and disk, before any runs.

The estimates are formulas of the models' sizes, the params and a machine's two speeds (docs/scale.md), good to a factor
of two or three; nothing is loaded. Sizes come from a model's `hub.yaml` if it has them, else from its config.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages.errors import UserError
from pkt_stages.models.sites import SITES, Geometry
from pkt_stages.params import read_method, read_section

if TYPE_CHECKING:
    from pkt_stages.tools.sweep import Graph

GIB = 2**30
TEST_ROWS = {"mmlu": 14042, "gsm8k": 1319, "humaneval": 164, "mbpp": 500}  # of the benchmarks
ANSWER_TOKENS = {"mmlu": 0, "gsm8k": 150, "humaneval": 150, "mbpp": 150}  # written per answer, about
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
START_SECONDS = 10  # of a process: imports, reading weights not counted


@dataclass(frozen=True)
class Need:
    """What a stage takes.

    Attributes:
        flops: floating-point operations.
        moved: bytes read from the GPU's memory where that, not arithmetic, is the limit.
        memory: bytes of GPU memory at the peak.
        disk: bytes of its outputs.
    """

    flops: float = 0.0
    moved: float = 0.0
    memory: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Speeds that long matrix products and reads reach, per second."""

    flops: float
    bandwidth: float

    def seconds(self, need: Need) -> float:
        return START_SECONDS + need.flops / self.flops + need.moved / self.bandwidth


def num_parameters(sizes: Geometry) -> int:
    """Without norms and biases; the head counts even where it is the embedding."""
    names = (*SITES, "ffn_gate", "attn_q", "attn_k")
    layer = sum(rows * columns for rows, columns in map(sizes.weight_shape, names))
    return sizes.num_layers * layer + 2 * sizes.vocab_size * sizes.d_model


class Estimator:
    """Turns a stage's command line into what it needs."""

    def __init__(self, root: Path, tokens: int) -> None:
        """
        Args:
            tokens: of an example's prompt and answer, on average.
        """
        self._root, self._tokens = root, tokens
        self._sizes: dict[str, Geometry] = {}

    def need(self, command: str) -> Need:
        """
        Raises:
            UserError: a model's sizes are not known here.
        """
        words = shlex.split(command)
        options = {name: value for name, value in pairwise(words) if name.startswith("--")}
        formula = getattr(self, f"_{words[1]}", None)
        found: Need = formula(options) if formula is not None else Need()
        return found

    def _model(self, name: str) -> tuple[Geometry, int]:
        from pkt_stages.models.load import load_config, resolve
        from pkt_stages.models.sites import geometry

        if name not in self._sizes:
            ref = resolve(str(self._root / name) if (self._root / name).is_dir() else name)
            known = dict(ref.sizes)
            self._sizes[name] = Geometry(**known) if known else geometry(load_config(ref))
        return self._sizes[name], num_parameters(self._sizes[name])

    def _section(self, options: Mapping[str, str], section: str, task: str | None) -> dict[str, Any]:
        file = self._root / options["--params"]
        values = read_section(file, section, task)
        if "--method" in options and section not in ("prepare", "evaluate"):
            values = {**values, **read_method(file, options["--method"], section)}
        return values

    def _count(self, options: Mapping[str, str], name: str) -> int:
        """How many examples the profile's sets hold; the most of any task, where the command does not name its own."""
        found = read_section(self._root / options["--params"], "prepare", options.get("--task"))
        return int(found[name])

    def _attribute(self, options: Mapping[str, str]) -> Need:
        sizes, size = self._model(options["--model"])
        settings = self._section(options, "attribute", None)
        examples = self._count(options, "extract") + self._count(options, "transfer")
        variants = len(settings["norms"])
        neurons = sizes.num_layers * (sizes.d_ff + sizes.num_attn_neurons)
        stored = sizes.num_layers * (sizes.d_ff + len(settings["coefficients"]) * sizes.num_attn_neurons)
        lens = 2 * sizes.vocab_size * neurons
        return Need(
            flops=2 * size * examples * self._tokens + lens * (sizes.d_model + 4 * examples * variants),
            memory=size * WIDTHS[settings.get("dtype", "auto")] + 8 * sizes.vocab_size * sizes.d_model,
            disk=4 * examples * variants * stored,
        )

    def _select(self, options: Mapping[str, str]) -> Need:
        sizes, _ = self._model(options["--source"])
        # At most: every neuron of every layer is wanted by some example.
        return Need(disk=2 * 2 * sizes.num_layers * (sizes.d_ff + sizes.num_attn_neurons) * sizes.d_model)

    def _align(self, options: Mapping[str, str]) -> Need:
        sizes, size = self._model(options["--target"])
        settings = self._section(options, "align", options["--task"])
        # The mapping's width is the source's; the target's stands in for it, which underrates by a third or so.
        mapping = len(SITES) * 2 * sizes.d_model**2
        validated = settings["validation_size"] * self._count(options, "transfer")
        tokens = self._tokens * (2 * settings["batch_size"] + validated) * settings["steps"]
        activations = 4 * self._tokens * sizes.num_layers * 34 * sizes.d_model * 2
        return Need(
            flops=2 * size * tokens,
            memory=size * WIDTHS[settings.get("dtype", "auto")] + activations + 16 * mapping,
            disk=4 * mapping * settings["steps"],
        )

    def _inject(self, options: Mapping[str, str]) -> Need:
        sizes, _ = self._model(options["--target"])
        file = self._root / options["--params"]
        settings, examples = read_section(file, "align", None), read_section(file, "prepare", None)
        return Need(disk=settings["rate"] * examples["transfer"] * self._rows(sizes))

    def _unaligned(self, options: Mapping[str, str]) -> Need:
        sizes, _ = self._model(options["--target"])
        rank = self._section(options, "unaligned", None).get("rank")
        return Need(disk=self._adapter(sizes, rank) if rank else self._rows(sizes))

    @staticmethod
    def _rows(sizes: Geometry) -> float:
        """Bytes of a delta at all of a model's neurons."""
        return 4 * sizes.num_layers * 2 * (sizes.d_ff + sizes.num_attn_neurons) * sizes.d_model

    @staticmethod
    def _adapter(sizes: Geometry, rank: int) -> float:
        return 4 * sum(sum(sizes.weight_shape(site)) for site in SITES) * sizes.num_layers * rank

    def _seek(self, options: Mapping[str, str]) -> Need:
        (source, size), (target, _) = self._model(options["--source"]), self._model(options["--target"])
        settings = self._section(options, "seek", None)
        held, kept = (
            s.num_layers * sum(rows * columns for rows, columns in map(s.weight_shape, SITES)) for s in (source, target)
        )
        width = WIDTHS[settings.get("dtype", "auto")]
        return Need(
            flops=6 * size * self._count(options, "extract") * self._tokens,
            memory=size * width + 4 * held + self._tokens * source.num_layers * 34 * source.d_model * 2,
            disk=width * kept,
        )

    def _finetune(self, options: Mapping[str, str]) -> Need:
        return self._training(options, "finetune", sources=0)

    def _distill(self, options: Mapping[str, str]) -> Need:
        return self._training(options, "distill", sources=1)

    def _training(self, options: Mapping[str, str], section: str, sources: int) -> Need:
        sizes, size = self._model(options["--target"])
        settings = self._section(options, section, options["--task"])
        examples = settings.get("num_examples") or self._count(options, settings["train_set"])
        tokens = examples * self._tokens * settings["epochs"] * len(settings["seeds"])
        beside = self._model(options["--source"])[1] if sources else 0
        own = settings.get("objective") == "gkd"
        width = WIDTHS[settings["dtype"]]
        return Need(
            flops=(4 * size + 2 * beside) * tokens,
            # Written a token at a time, a micro-batch of 4 together.
            moved=own * tokens / 2 / 4 * size * width,
            memory=(size + beside) * width + 4 * self._tokens * sizes.num_layers * 34 * sizes.d_model * width,
            disk=self._adapter(sizes, settings["rank"]) * len(settings["seeds"]),
        )

    def _generate(self, options: Mapping[str, str]) -> Need:
        _, size = self._model(options["--source"])
        return self._written(size, self._count(options, "train"), 150, WIDTHS["auto"])

    def _evaluate(self, options: Mapping[str, str]) -> Need:
        _, size = self._model(options["--model"])
        task = options["--task"]
        settings = self._section(options, "evaluate", task)
        rows = settings.get("limit") or self._section(options, "prepare", task).get("test") or TEST_ROWS[task]
        runs = self._count(options, "transfer") if "--delta" in options else 1
        answers = rows * runs * settings["num_samples"]
        return self._written(size, answers, ANSWER_TOKENS[task], WIDTHS[settings["dtype"]])

    def _written(self, size: int, answers: int, tokens: int, width: int) -> Need:
        """Prompts are read at the speed of arithmetic, answers written at that of memory, 64 at a time."""
        return Need(
            flops=2 * size * answers * self._tokens,
            moved=answers * tokens / 64 * size * width,
            memory=size * width * 1.3,
            disk=answers * 1000,
        )

    def _cka(self, options: Mapping[str, str]) -> Need:
        sizes = [self._model(options[side])[1] for side in ("--first", "--second")]
        settings = self._section(options, "cka", None)
        return Need(flops=2 * sum(sizes) * settings["num_texts"] * self._tokens, memory=2 * sum(sizes))


def stale(graph: Graph) -> list[Any]:
    """The stages that are out of date, or follow from one that is."""
    found: dict[Any, bool] = {}
    with graph.locked() as locked:
        if not locked:
            raise UserError("DVC is in use here; try again when its command has ended")
        for stage in graph.stages:
            found[stage] = any(found[u] for u in graph.upstream[stage]) or graph.changed(stage)
    return [stage for stage, changed in found.items() if changed]


def plan(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages or dvc.yaml files, as for `dvc repro`.", show_default="dvc.yaml")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Do not count a stage only because its files are not here.")
    ] = False,
    tflops: Annotated[float, typer.Option(help="What long matrix products reach, TFLOP/s (H200 about 400).")] = 400.0,
    bandwidth: Annotated[float, typer.Option(help="What reading weights reaches, GB/s (H200 about 3000).")] = 3000.0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an example's prompt and answer, on average.")] = 256,
    each: Annotated[bool, typer.Option("--each", help="A line for every stage.")] = False,
) -> None:
    """List the stages that `dvc repro` would run, with estimated time, GPU memory and disk. Runs nothing."""
    from rich.console import Console
    from rich.table import Table

    from pkt_stages.tools.sweep import Graph, open_repo

    if not tflops > 0 or not bandwidth > 0:
        raise UserError("--tflops and --bandwidth must be above 0")
    repo = open_repo()
    graph = Graph(repo, targets or [], glob=False, allow_missing=allow_missing)
    machine, estimator = Machine(tflops * 1e12, bandwidth * 1e9), Estimator(Path(repo.root_dir), tokens)
    needs = {stage.addressing: estimator.need(stage.cmd) for stage in stale(graph)}
    groups: dict[str, list[Need]] = {}
    for name, need in needs.items():
        groups.setdefault(name if each else name.split(":")[-1].split("@")[0], []).append(need)
    table = Table("stage", *(() if each else ("number",)), "hours, one GPU", "GPU memory, GiB", "disk, GiB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, members in groups.items():
        hours = sum(map(machine.seconds, members)) / 3600
        peak, disk = max(n.memory for n in members) / GIB, sum(n.disk for n in members) / GIB
        number = () if each else (str(len(members)),)
        table.add_row(name, *number, f"{hours:.2f}", f"{peak:.1f}", f"{disk:.2f}")
    Console(width=None if Console().is_terminal else 120).print(table)
    seconds = sum(map(machine.seconds, needs.values()))
    peak = max((need.memory for need in needs.values()), default=0) / GIB
    disk = sum(need.disk for need in needs.values()) / GIB
    typer.echo(
        f"plan: {len(needs)} of {len(graph.stages)} stages are out of date: about {seconds / 3600:.1f} GPU hours,"
        f" {peak:.0f} GiB of GPU memory at the peak, {disk:.1f} GiB of disk (formulas, not measurements: docs/scale.md)"
    )
