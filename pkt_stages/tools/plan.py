"""What will a profile take? Stages that are out of date, with estimates of time, GPU memory and disk, before any runs.

The estimates are formulas of the models' sizes, the params and a machine's two speeds (docs/scale.md), good to a factor
of two or three; nothing is loaded. Sizes come from a model's `hub.yaml` if it has them, else from its config.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pkt_stages import methods, tasks
from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import MAX_LOGITS
from pkt_stages.evaluation.settings import EvaluateParams
from pkt_stages.models.sites import PROJECTIONS, SHAPE, SITES, Geometry
from pkt_stages.options import PAIRS_AT_ONCE
from pkt_stages.params import build, mapping, read_params, read_settings
from pkt_stages.profile import GROUPS, read_profile
from pkt_stages.reach import Package
from pkt_stages.stages import code
from pkt_stages.stages.align import AlignParams
from pkt_stages.stages.attribute import AttributeParams
from pkt_stages.stages.compare import CompareParams
from pkt_stages.stages.correlate import CorrelateParams
from pkt_stages.stages.derive import DeriveParams
from pkt_stages.stages.distill import DistillParams
from pkt_stages.stages.finetune import FinetuneParams
from pkt_stages.stages.generate import GenerateParams
from pkt_stages.stages.gradients import GradientsParams
from pkt_stages.stages.prepare import PrepareParams
from pkt_stages.stages.scale import ScaleParams
from pkt_stages.stages.seek import SeekParams
from pkt_stages.stages.select import SelectParams

if TYPE_CHECKING:
    from pkt_stages.tools.graph import Graph

Params = TypeVar("Params")
GIB = 2**30
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
WRITTEN_TOKENS = 150  # per answer of the source that is trained on, about
START_SECONDS = 10  # of a process: imports, reading weights not counted
# To set off one layer's operations one by one, whatever their size; its backward pass has twice as many. A pass of 32
# layers takes 25 to 40 ms on an H200 where arithmetic and memory would take 10 (docs/benchmarks.md).
LAYER_SECONDS = 0.001
STEP_SECONDS = 0.02  # the trainer's own of a micro-batch: 28 ms of CPU with the passes through 2 layers, measured
MICRO_BATCH = 4  # examples of a training at a time
REPORTED_SECONDS = 0.3  # the report's statistics and figures of a row on a task


@dataclass(frozen=True)
class Need:
    """What a stage takes.

    Attributes:
        flops: floating-point operations.
        moved: bytes read from the GPU's memory where that, not arithmetic, is the limit.
        memory: bytes of GPU memory at the peak.
        disk: bytes of its outputs.
        host: seconds of the host's processor for which the GPU waits, which no faster GPU shortens.
    """

    flops: float = 0.0
    moved: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    host: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Speeds that long matrix products and reads reach, per second."""

    flops: float
    bandwidth: float

    def seconds(self, need: Need) -> float:
        return START_SECONDS + need.host + need.flops / self.flops + need.moved / self.bandwidth


def num_parameters(sizes: Geometry) -> int:
    """Without norms and biases; the head counts even where it is the embedding."""
    layer = sum(rows * columns for rows, columns in map(sizes.weight_shape, PROJECTIONS))
    return sizes.num_layers * layer + 2 * sizes.vocab_size * sizes.d_model


def launching(sizes: Geometry, passes: float, *, trained: bool = False) -> float:
    """Seconds to set off the operations of so many passes through a model, its head like a layer; with gradients."""
    return passes * (3 if trained else 1) * (sizes.num_layers + 1) * LAYER_SECONDS


def selected_bytes(source: Geometry, target: Geometry, examples: int, rate: float, *, random: bool) -> int:
    """The most that the rows of a selection take, two bytes a number: a neuron that examples share is stored once.

    Args:
        examples: whose rows are stored, times the variants of the selection.
        random: as many random neurons of every source layer are stored, too.
    """
    pairs, rows = min(source.num_layers, target.num_layers), 0
    for neurons, receiving in ((source.d_ff, target.d_ff), (source.num_attn_neurons, target.d_model)):
        layers = examples * pairs + random * source.num_layers
        rows += min(layers * int(rate * receiving + 1e-9), source.num_layers * neurons)
    return 2 * rows * 2 * source.d_model  # subkeys and subvalues


class Estimator:
    """Turns a stage's command line into what it needs."""

    def __init__(self, root: Path, tokens: int) -> None:
        """
        Args:
            tokens: of an example's prompt and answer, on average.
        """
        self._root, self._tokens = root, tokens
        self._sizes: dict[str, Geometry] = {}
        self._groups: dict[Path, dict[str, str]] = {}  # of a params file, by method
        self._lines: dict[str, int] = {}  # of a test set that is there
        self._given: dict[tuple[Path, str, str | None, str | None], dict[str, Any]] = {}

    def need(self, command: str) -> Need:
        """
        Raises:
            UserError: a model's sizes are not known here, a section of the params is malformed, or the command lacks
                an option.
        """
        words = [*shlex.split(command), "", ""]
        formula = getattr(self, f"_{words[1]}", None) if words[0] == "pkt" else None
        options = _Options({name: value for name, value in pairwise(words) if name.startswith("--")})
        found: Need = formula(options) if formula is not None else Need()
        return found

    def learn(self, command: str) -> None:
        """Note the sizes of a model that a stage makes, which may not be there yet."""
        words = [*shlex.split(command), "", ""]
        if words[:2] == ["pkt", "reexpress"]:
            options = _Options(pairwise(words))
            like, _ = self._model(options["--like"])
            given = {name: int(value) for name in SHAPE if (value := options.get(f"--{name.replace('_', '-')}"))}
            self._sizes[options["--out"]] = replace(like, **given)

    def _model(self, name: str) -> tuple[Geometry, int]:
        from pkt_stages.models.load import load_config, resolve
        from pkt_stages.models.sites import geometry

        if name not in self._sizes:
            ref = resolve(str(self._root / name) if (self._root / name).is_dir() else name)
            known = dict(ref.sizes)
            self._sizes[name] = Geometry(**known) if known else geometry(load_config(ref))
        return self._sizes[name], num_parameters(self._sizes[name])

    def _settings(self, options: Mapping[str, str], command: str, cls: type[Params]) -> Params:
        """The settings in force for the command's task and method, but for those of the method's own code."""
        if "--params" not in options:
            return cls()
        file, given = self._read(options, command)
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        return build(cls, {name: value for name, value in given.items() if name in known}, f"{file}: {command}")

    def _read(self, options: Mapping[str, str], command: str) -> tuple[Path, dict[str, Any]]:
        """The params file, and what it says of a command's settings; read once, as it is large."""
        key = (self._root / options["--params"], command, options.get("--task"), options.get("--method"))
        if key not in self._given:
            self._given[key] = read_settings(key[0], command, task=key[2], method=key[3])
        return key[0], dict(self._given[key])

    def _prepared(self, options: Mapping[str, str]) -> PrepareParams:
        """How many examples the sets hold: of the task, if the command names one, else without what tasks change."""
        named = {name: options[name] for name in ("--params", "--task") if name in options}
        return self._settings(named, "prepare", PrepareParams)

    def _reexpress(self, options: Mapping[str, str]) -> Need:
        """On the CPU: memory is of the host, two shards and the largest weight in float64 four times."""
        sizes, size = self._model(options["--out"])
        return Need(flops=4 * size * sizes.d_model, disk=2 * size)

    def _correlate(self, options: Mapping[str, str]) -> Need:
        (source, size), (target, other) = self._model(options["--source"]), self._model(options["--target"])
        settings = self._settings(options, "correlate", CorrelateParams)
        pairs = min(source.num_layers, target.num_layers)
        squares = (
            2 * source.d_model * target.d_model
            + source.num_attn_neurons * target.num_attn_neurons
            + source.d_ff * target.d_ff
        )
        tokens = settings.num_texts * min(self._tokens, settings.max_tokens)
        own = sum(2 * s.d_model**2 + s.num_attn_neurons**2 + s.d_ff**2 for s in (source, target)) * settings.grams
        return Need(
            flops=2 * tokens * (2 * (size + other) + pairs * (squares + own)),
            memory=(size + other) * WIDTHS[settings.dtype] + 8 * PAIRS_AT_ONCE * (squares + own),
            disk=pairs * (squares + own) * (8 if settings.stored == "float64" else 4),
        )

    def _gradients(self, options: Mapping[str, str]) -> Need:
        (source, size), (target, other) = self._model(options["--source"]), self._model(options["--target"])
        settings = self._settings(options, "gradients", GradientsParams)
        pairs = min(source.num_layers, target.num_layers)
        # At the outputs of a layer's seven projections and of its two norms.
        widths = [
            [*(sizes.weight_shape(weight)[0] for weight in PROJECTIONS), sizes.d_model, sizes.d_model]
            for sizes in (source, target)
        ]
        crossed = sum(s * t for s, t in zip(*widths, strict=True))
        own = sum(width**2 for side in widths for width in side) * settings.grams
        examples = settings.num_examples or self._prepared(options).count("align")
        tokens = 4 * examples * self._tokens  # of four tasks
        passes = -(-pairs // PAIRS_AT_ONCE)
        return Need(
            flops=2 * tokens * (2 * passes * (size + other) + pairs * (crossed + own)),
            memory=(size + other) * WIDTHS[settings.dtype] + 8 * min(pairs, PAIRS_AT_ONCE) * (crossed + own),
            disk=pairs * (crossed + own) * (8 if settings.stored == "float64" else 4),
        )

    def _scale(self, options: Mapping[str, str]) -> Need:
        sizes, size = self._model(options["--model"])
        settings = self._settings(options, "scale", ScaleParams)
        examples = self._prepared(options).count("align") * (len(settings.tasks) or 4)
        width = WIDTHS[settings.dtype]
        factors = 1 + len(settings.scales) * self._changes(options)
        return Need(
            flops=2 * size * examples * self._tokens * factors,
            memory=1.3 * size * width,
            host=launching(sizes, factors * -(-examples // 64)),
        )

    def _changes(self, options: Mapping[str, str]) -> int:
        """How many changes the row has whose folder a command takes: one per unseen example (and step), or per seed."""
        found = re.search(r"/(transfer|steps)/([^/]+)", options["--delta"])
        if "--params" not in options or found is None:
            return 1
        own = {**options, "--method": found[2]}
        group = self._group(own)
        if group not in GROUPS:
            return 1
        if group in ("align", "control"):
            steps = self._settings(own, "align", AlignParams).steps if found[1] == "steps" else 1
            return self._prepared(options).count("transfer") * steps
        if GROUPS[group].command == "finetune":
            return len(self._settings(own, "finetune", FinetuneParams).seeds)
        if GROUPS[group].command == "distill":
            return len(self._settings(own, "distill", DistillParams).seeds)
        if GROUPS[group].command != "derive":
            return 1
        params = self._derived(own)
        return len(params.seeds) if getattr(params, "maps", "fitted") == "random" else 1

    def _group(self, options: Mapping[str, str]) -> str:
        """The group of `made_by` that a method is in; empty if in none."""
        path = self._root / options["--params"]
        if path not in self._groups:
            made_by = mapping(read_params(path), path, "made_by")
            self._groups[path] = {method: group for group, methods in made_by.items() for method in methods}
        return self._groups[path].get(options["--method"], "")

    def _attribute(self, options: Mapping[str, str]) -> Need:
        sizes, size = self._model(options["--model"])
        settings, prepared = self._settings(options, "attribute", AttributeParams), self._prepared(options)
        examples = prepared.count("extract") + prepared.count("transfer")
        variants = len(settings.norms)
        neurons = sizes.num_layers * (sizes.d_ff + sizes.num_attn_neurons)
        stored = sizes.num_layers * (sizes.d_ff + len(settings.coefficients) * sizes.num_attn_neurons)
        lens = 2 * sizes.vocab_size * neurons
        return Need(
            flops=2 * size * examples * self._tokens + lens * (sizes.d_model + 4 * examples * variants),
            memory=size * WIDTHS[settings.dtype] + 8 * sizes.vocab_size * sizes.d_model,
            disk=4 * examples * variants * stored,
        )

    def _select(self, options: Mapping[str, str]) -> Need:
        source, _ = self._model(options["--source"])
        target = source
        if "--params" in options:
            profile = read_params(self._root / options["--params"])
            target, _ = self._model(f"{profile['models_dir']}/{profile['target']}")
        settings, prepared = self._settings(options, "select", SelectParams), self._prepared(options)
        examples = min(settings.steps, prepared.count("extract")) + prepared.count("transfer")
        examples *= len(settings.rules())
        size = selected_bytes(source, target, examples, settings.max_rate, random=settings.random_neurons)
        return Need(disk=size * (2 if "--base" in options else 1))

    def _align(self, options: Mapping[str, str]) -> Need:
        sizes, size = self._model(options["--target"])
        settings = self._settings(options, "align", AlignParams)
        # The mapping's width is the source's; the target's stands in for it, which underrates by a third or so.
        mapping = len(SITES) * 2 * sizes.d_model**2
        validated = settings.validation_size * self._prepared(options).count("transfer")
        tokens = self._tokens * (2 * settings.batch_size + validated) * settings.steps
        activations = 4 * self._tokens * sizes.num_layers * 34 * sizes.d_model * 2
        return Need(
            flops=2 * size * tokens,
            memory=size * WIDTHS[settings.dtype] + activations + 16 * mapping,
            disk=4 * mapping * settings.steps,
        )

    def _inject(self, options: Mapping[str, str]) -> Need:
        sizes, _ = self._model(options["--target"])
        rate = self._settings(options, "align", AlignParams).rate
        return Need(disk=rate * self._prepared(options).count("transfer") * self._rows(sizes))

    def _derive(self, options: Mapping[str, str]) -> Need:
        """Of a delta that is made from another one, as many bytes as that has: few."""
        if "--target" not in options:
            return Need()
        sizes, _ = self._model(options["--target"])
        params = self._derived(options)
        width = WIDTHS[self._settings(options, "derive", DeriveParams).stored]
        inside = num_parameters(sizes) - 2 * sizes.vocab_size * sizes.d_model
        if "--correlation" in options:
            # At most a decomposition of the largest map in float64, on the CPU, and all weights of each layer.
            changes = len(params.seeds) if getattr(params, "maps", "fitted") == "random" else 1
            whole = num_parameters(sizes) if getattr(params, "vocabulary", False) else inside
            return Need(flops=20 * sizes.num_layers * sizes.d_ff**3, disk=width * whole * changes)
        if "--examples" in options:
            return Need(memory=8 * inside, disk=width * inside)
        if "--source" in options and "--submatrices" not in options and hasattr(params, "vocabulary"):
            return Need(disk=width * num_parameters(sizes))
        rank = getattr(params, "rank", None)
        return Need(disk=self._adapter(sizes, rank) if rank else width / 4 * self._rows(sizes))

    def _derived(self, options: Mapping[str, str]) -> Any:
        """The settings of a derived row's own code."""
        file, given = self._read(options, "derive")
        module = methods.load(str(given.pop("code", "")), ("derive",))
        shared = {field.name for field in fields(DeriveParams)}
        own = {name: value for name, value in given.items() if name not in shared}
        return build(module.Params, own, f"{file}: {options['--method']}")

    def _import(self, options: Mapping[str, str]) -> Need:
        """At most what the adapters take in float32, if they are stored in 16 bits."""
        files = (self._root / options["--adapter"]).rglob("*.safetensors")
        return Need(disk=2 * sum(file.stat().st_size for file in files))

    @staticmethod
    def _rows(sizes: Geometry) -> float:
        """Bytes of a delta at all of a model's neurons."""
        return 4 * sizes.num_layers * 2 * (sizes.d_ff + sizes.num_attn_neurons) * sizes.d_model

    @staticmethod
    def _adapter(sizes: Geometry, rank: int) -> float:
        return 4 * sum(sum(sizes.weight_shape(site)) for site in SITES) * sizes.num_layers * rank

    def _seek(self, options: Mapping[str, str]) -> Need:
        (source, size), (target, _) = self._model(options["--source"]), self._model(options["--target"])
        width = WIDTHS[self._settings(options, "seek", SeekParams).dtype]
        held, kept = (
            s.num_layers * sum(rows * columns for rows, columns in map(s.weight_shape, SITES)) for s in (source, target)
        )
        return Need(
            flops=6 * size * self._prepared(options).count("extract") * self._tokens,
            memory=size * width + 4 * held + self._tokens * source.num_layers * 34 * source.d_model * 2,
            disk=width * kept,
        )

    def _finetune(self, options: Mapping[str, str]) -> Need:
        settings = self._settings(options, "finetune", FinetuneParams)
        need = self._training(options, settings, source=None, written=False)
        if settings.num_paired is None:
            return need
        # Before the training and without the target: what each of the source's layers is worth, and its states.
        sizes, size = self._model(options["--source"])
        width = WIDTHS[settings.dtype]
        return replace(
            need,
            flops=need.flops + 6 * size * self._examples(options, settings) * self._tokens,
            memory=max(need.memory, size * width + 4 * self._tokens * sizes.num_layers * 34 * sizes.d_model * width),
        )

    def _distill(self, options: Mapping[str, str]) -> Need:
        settings = self._settings(options, "distill", DistillParams)
        source = self._model(options["--source"])
        return self._training(options, settings, source=source, written=settings.objective == "gkd")

    def _training(
        self,
        options: Mapping[str, str],
        settings: FinetuneParams | DistillParams,
        *,
        source: tuple[Geometry, int] | None,
        written: bool,
    ) -> Need:
        """
        Args:
            source: its sizes and parameters, if it is there, too.
            written: the target writes its own answers.
        """
        sizes, size = self._model(options["--target"])
        shape, other = source or (sizes, 0)
        examples = self._examples(options, settings) * settings.epochs * len(settings.seeds)
        tokens, steps = examples * self._tokens, examples / MICRO_BATCH
        width = WIDTHS[settings.dtype]
        host = steps * STEP_SECONDS + launching(sizes, steps, trained=True) + bool(source) * launching(shape, steps)
        # Written a token at a time, a micro-batch together, half of a text.
        passes = written * tokens / 2 / MICRO_BATCH
        return Need(
            flops=(4 * size + 2 * other) * tokens,
            moved=passes * size * width,
            memory=(size + other) * width + MICRO_BATCH * self._tokens * sizes.num_layers * 34 * sizes.d_model * width,
            disk=self._adapter(sizes, settings.rank) * len(settings.seeds),
            host=host + launching(sizes, passes),
        )

    def _examples(self, options: Mapping[str, str], settings: FinetuneParams | DistillParams) -> int:
        return settings.num_examples or self._prepared(options).count(settings.train_set)

    def _generate(self, options: Mapping[str, str]) -> Need:
        sizes, _ = self._model(options["--source"])
        settings = self._settings(options, "generate", GenerateParams)
        answers = settings.num_examples or self._prepared(options).count(settings.train_set)
        return self._written(sizes, answers, WRITTEN_TOKENS, settings)

    def _evaluate(self, options: Mapping[str, str]) -> Need:
        sizes, _ = self._model(options["--model"])
        task = tasks.load(options["--task"])
        settings, prepared = self._settings(options, "evaluate", EvaluateParams), self._prepared(options)
        rows = self._num_rows(options.get("--test", "")) or prepared.test or task.num_test
        rows = min(rows, settings.limit or rows)
        runs = self._changes(options) if "--delta" in options else 1
        return self._written(
            sizes, rows * runs * settings.num_samples, min(task.answer_tokens, settings.max_new_tokens), settings
        )

    def _num_rows(self, test: str) -> int:
        """How many examples a test set holds; 0 if it is not there yet."""
        if test not in self._lines:
            path = self._root / test
            self._lines[test] = path.read_bytes().count(b"\n") if path.is_file() else 0
        return self._lines[test]

    def _written(self, sizes: Geometry, answers: int, tokens: int, settings: EvaluateParams | GenerateParams) -> Need:
        """Prompts are read at the speed of arithmetic, answers written at that of memory, 64 at a time.

        vLLM records what a pass sets off and replays it; transformers sets it off anew for every token.
        """
        size, width, passes = num_parameters(sizes), WIDTHS[settings.dtype], answers * tokens / 64
        return Need(
            flops=2 * size * answers * self._tokens,
            moved=passes * size * width,
            memory=size * width * 1.3 + 4 * min(MAX_LOGITS, 64 * self._tokens * sizes.vocab_size),
            disk=answers * 1000,
            host=launching(sizes, passes) if settings.backend == "hf" else 0.0,
        )

    def _compare(self, options: Mapping[str, str]) -> Need:
        first = self._model(options["--first"])[1]
        sizes = first + self._model(options.get("--second", options["--first"]))[1]
        settings = self._settings(options, "compare", CompareParams)
        return Need(flops=2 * sizes * settings.num_texts * self._tokens, memory=WIDTHS[settings.dtype] * sizes)

    def _report(self, options: Mapping[str, str]) -> Need:
        profile = read_profile(self._root / options["--params"])
        rows = sum(len(profile.of_source(source)) for source in profile.sources["source"]) + len(profile.models)
        return Need(host=rows * len(profile.tasks) * REPORTED_SECONDS)


class _Options(dict[str, str]):
    """A command's options."""

    def __missing__(self, name: str) -> str:
        raise UserError(f"a stage's command lacks {name}, which its estimate needs; see dvc.yaml")


def stale(graph: Graph) -> list[Any]:
    """The stages that are out of date, or follow from one that is.

    From `code` follows only what its new hashes change.
    """
    coded = [stage for stage in graph.stages if str(stage.cmd).startswith("pkt code ")]
    ran = any(out.hash_info for stage in graph.stages for out in stage.outs)  # else all would run, whatever the code
    known = {path: md5 for stage in coded for path, md5 in code_hashes(stage).items()} if ran else {}
    found: dict[Any, bool] = {}
    with graph.locked() as locked:
        if not locked:
            raise UserError("DVC is in use here; try again when its command has ended")
        for stage in graph.stages:
            upstream = [found[u] for u in graph.upstream[stage] if u not in coded]
            found[stage] = any(upstream) or graph.changed(stage, known)
    return [stage for stage, changed in found.items() if changed]


def code_hashes(stage: Any) -> dict[str, str]:
    """MD5 of what a stage `pkt code --params FILE --out FOLDER` would write now, by path."""
    options = _Options(pairwise(shlex.split(stage.cmd)))
    package, out = Package(Path(__file__).parents[1]), Path(stage.wdir) / options["--out"]
    begins = code.run(package, read_profile(Path(stage.wdir) / options["--params"]))
    return {
        str(out / name): hashlib.md5(f"{package.digest(nodes)}\n".encode()).hexdigest()
        for name, nodes in begins.items()
    }


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
    formulas: Annotated[
        bool, typer.Option("--formulas", help="Estimate also what `pkt sweep` has measured on this machine.")
    ] = False,
    scratch: Annotated[Path, typer.Option(help="Where `pkt sweep` keeps its times.", envvar="PKT_SCRATCH")] = Path(
        ".scratch"
    ),
) -> None:
    """List the stages that `dvc repro` would run, with their time, GPU memory and disk. Runs nothing.

    The time of a stage that `pkt sweep` ran here before is what it took then; any other is estimated.
    """
    from rich.console import Console
    from rich.table import Table

    from pkt_stages.tools.graph import Graph, open_repo
    from pkt_stages.tools.sweep import read_times

    if not tflops > 0 or not bandwidth > 0:
        raise UserError("--tflops and --bandwidth must be above 0")
    machine = Machine(tflops * 1e12, bandwidth * 1e9)
    with open_repo() as repo:
        graph = Graph(repo, targets or [], glob=False, allow_missing=allow_missing)
        estimator = Estimator(Path(repo.root_dir), tokens)
        for stage in graph.stages:
            estimator.learn(str(stage.cmd))
        needs = {stage.addressing: estimator.need(str(stage.cmd)) for stage in stale(graph)}
        measured = {} if formulas else read_times(Path(repo.root_dir) / scratch)
    measured = {name: seconds for name, seconds in measured.items() if name in needs}
    taken = {name: measured.get(name, machine.seconds(need)) for name, need in needs.items()}
    groups: dict[str, list[str]] = {}
    for name in needs:
        groups.setdefault(name if each else name.split(":")[-1].split("@")[0], []).append(name)
    table = Table("stage", *(() if each else ("number",)), "hours", "measured here", "GPU memory, GiB", "disk, GiB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, members in groups.items():
        hours, known = sum(taken[one] for one in members) / 3600, sum(one in measured for one in members)
        peak, disk = max(needs[one].memory for one in members) / GIB, sum(needs[one].disk for one in members) / GIB
        number = () if each else (str(len(members)),)
        table.add_row(name, *number, f"{hours:.3f}", str(known or "-"), f"{peak:.1f}", f"{disk:.2f}")
    Console(width=None if Console().is_terminal else 120).print(table)
    seconds = sum(taken.values())
    peak = max((need.memory for need in needs.values()), default=0) / GIB
    disk = sum(need.disk for need in needs.values()) / GIB
    typer.echo(
        f"plan: at most {len(needs)} of {len(graph.stages)} stages would run (fewer, where what changed makes equal"
        f" outputs): about {seconds / 3600:.1f} hours one after the other ({len(measured)} stages as they took here,"
        f" the others by formula for one GPU: docs/scale.md), {peak:.0f} GiB of GPU memory at the peak, {disk:.1f} GiB"
        " of disk"
    )
