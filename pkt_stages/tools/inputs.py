"""The models and data that a profile names: are they there, and do they go with its settings and with each other?

Of a model its config and the headers of its weights are read, of a model on the hub what its hub.yaml says. Of data the
files are read as `pkt prepare` reads them, and the longest examples of each set are tokenised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages import hub, tasks
from pkt_stages.errors import UserError, meant
from pkt_stages.examples import Example, read_jsonl
from pkt_stages.models.sites import OTHER_WEIGHTS, SITES, Geometry, check_same_shape, context_length, geometry
from pkt_stages.params import build, mistakes, read_params
from pkt_stages.profile import GROUPS, OF_CODE, Method, chat_model
from pkt_stages.stages import prepare, texts
from pkt_stages.stages.prepare import PrepareParams
from pkt_stages.stages.reexpress import ReexpressParams, new_sizes
from pkt_stages.tools.plan import num_parameters

if TYPE_CHECKING:
    from pkt_stages.models.load import ModelRef
    from pkt_stages.tools.check import Checked

LONGEST = 3  # examples of a set, by characters, that are tokenised
SOME_TEXTS = 20  # that two tokenizers must read alike


@dataclass
class Model:
    """What is known of a model without its weights.

    Attributes:
        name: as the params have it.
        ref: None for one that a stage makes.
        sizes: None where nobody says.
        config: of a model in a folder; None for others.
        tied: whether its head is known to be its embedding.
    """

    name: str
    ref: ModelRef | None
    sizes: Geometry | None
    config: Any = None
    tied: bool = False

    @property
    def context(self) -> int | None:
        """Tokens that it takes."""
        return context_length(self.config) if self.config is not None else None

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            UserError: as `load_tokenizer`.
        """
        from pkt_stages.models.load import load_tokenizer

        assert self.ref is not None
        return load_tokenizer(self.ref)


def check_inputs(checked: Checked, *, allow_missing: bool) -> None:
    """Note what is wrong with the models and data of a profile.

    Args:
        allow_missing: models need not be here.
    """
    models = Models(checked, allow_missing)
    models.check_sizes()
    sets = Sets(checked)
    sets.check_counts()
    sets.check_lengths(models)
    check_texts(checked, models)


class Models:
    """The models that a profile names, by name; those with something wrong are noted, and missing."""

    def __init__(self, checked: Checked, allow_missing: bool) -> None:
        self._checked, self._profile = checked, checked.profile
        folder = checked.content.get("models_dir")
        self._folder = Path(os.path.normpath(checked.root / folder)) if isinstance(folder, str) else None
        self._known: dict[str, Model] = {}
        named: dict[str, list[str]] = {}
        for where, name in self._named():
            if name:
                named.setdefault(name, []).append(where)
        for name, wheres in named.items():
            if name in self._profile.reexpressed or self._folder is None:
                continue
            if (model := self._opened(name, ", ".join(dict.fromkeys(wheres)), allow_missing)) is not None:
                self._known[name] = model
        for name in self._profile.reexpressed:
            self._known[name] = Model(name, None, self._written(name))

    def _named(self) -> Iterator[tuple[str, str]]:
        """Where in the params a model is named, and which."""
        its = self._profile
        for source in its.sources["source"]:
            yield "source", chat_model(source)
        for source in its.sources["transport_source"]:
            yield "transport_source", base_model(source)
        yield "target", its.target
        yield "oracle", its.oracle or ""
        for where, names in (("models", its.models), ("attributed", its.attributed)):
            yield from ((where, name) for name in names)
        for pair, both in its.pairs.items():
            yield from ((f"pairs.{pair}", name) for name in both.values() if isinstance(name, str))
        for key, entry in its.reexpressed.items():
            for end in ("of", "like"):
                if isinstance(entry.get(end), str):
                    yield f"reexpressed.{key}", entry[end]

    def _opened(self, name: str, where: str, allow_missing: bool) -> Model | None:
        from pkt_stages.models.load import load_config, resolve
        from pkt_stages.models.rows import Checkpoint

        assert self._folder is not None
        at = self._folder / name
        if not at.is_dir():
            if not allow_missing and name not in made_elsewhere(self._checked.root):
                there = [path.name for path in self._folder.glob("*") if path.is_dir()]
                todo = "put its weights there, or a hub.yaml that names them"
                self._checked.note(where, f"{name!r}: no folder {at}{meant(name, there)}; {todo}")
            return None
        try:
            ref = resolve(str(at))
            if ref.is_local:
                config = load_config(ref)
                tied = Checkpoint(ref).tied  # which holds the headers of all files to the config
                return Model(name, ref, geometry(config), config, tied)
            if ref.sizes:
                return Model(name, ref, Geometry(**dict(ref.sizes)))
            commit = hub.cached_commit(ref.location, ref.revision)
            config = load_config(replace(ref, revision=commit)) if commit is not None else None
            return Model(name, ref, geometry(config) if config is not None else None)
        except UserError as error:
            self._checked.note(where, error)
            return None

    def _written(self, name: str) -> Geometry | None:
        """The sizes of a model that `pkt reexpress` writes."""
        from pkt_stages.models.reexpression import check_shapes

        entry, where = self._profile.reexpressed[name], f"reexpressed.{name}"
        how, ends = entry.get("how"), [entry.get("of"), entry.get("like")]
        if not isinstance(how, dict):
            return None
        values: dict[str, Any] = {}
        for key, value in how.items():  # as DVC makes options of them
            plain = str(key).replace("-", "_")
            values |= (
                {plain.removeprefix("no_"): False} if plain.startswith("no_") and value is True else {plain: value}
            )
        if found := mistakes(ReexpressParams, values):
            for _, problem in found:
                self._checked.note(f"{where}.how", problem)
            return None
        of, like = (self.sizes(end) if isinstance(end, str) else None for end in ends)
        if of is None or like is None:
            return None
        new = new_sizes(build(ReexpressParams, values, where), of, like)
        self._try(where, check_shapes, of, new)
        return new

    def get(self, name: str | None) -> Model | None:
        return self._known.get(name or "")

    def sizes(self, name: str | None) -> Geometry | None:
        model = self.get(name)
        return model.sizes if model is not None else None

    def tokenized(self, name: str) -> Model | None:
        """A model whose tokenizer can be had here; None for others, and for one whose tokenizer has something wrong."""
        model = self.get(name)
        if model is None or model.config is None:
            return None
        return model if tried(self._checked, f"tokenizer of {name}", lambda: model.tokenizer) else None

    def _try(self, where: str, check: Callable[..., object], *given: Any) -> None:
        tried(self._checked, where, check, *given)

    def check_sizes(self) -> None:
        """That sizes go with the settings, and with each other for the methods that need it."""
        from pkt_stages.models.submatrices import check_sizes

        its, target = self._profile, self.sizes(self._profile.target)
        if target is None:
            return
        for source in its.sources["source"]:
            if (large := self.sizes(chat_model(source))) is not None:
                self._check_source(source, large, target)
        if (seek := self._checked.settings("seek")) is not None:
            weights = [*SITES, *(OTHER_WEIGHTS if seek.sites == "all" else ())]
            for source in its.sources["seek_source"]:
                if (large := self.sizes(chat_model(source))) is not None:
                    self._try(f"seek_source: {source}", check_sizes, large, target, weights)
        for source in its.sources["transport_source"]:
            tuned, base = self.sizes(chat_model(source)), self.sizes(base_model(source))
            if tuned is not None and base is not None:
                self._try("transport_source", check_same_shape, tuned, base, chat_model(source), base_model(source))
        if its.in_group("oracle") and its.oracle and (tuned := self.sizes(its.oracle)) is not None:
            self._try("oracle", check_same_shape, tuned, target, its.oracle, its.target)
        for method in its.methods:
            self._check_method(method, target)
        self._check_vocabularies()

    def _check_source(self, source: str, large: Geometry, target: Geometry) -> None:
        name, aim = chat_model(source), self._profile.target
        have, want = (num_parameters(replace(sizes, vocab_size=0)) for sizes in (large, target))
        # A small model with a large vocabulary may have most of its parameters outside its layers
        if have < want and num_parameters(large) < num_parameters(target):
            told = f"{name} has {have:,} parameters in its layers, the target {aim} {want:,}"
            self._checked.note(
                "source", f"{told}; expected a source that is no smaller: are source and target swapped?"
            )
        from pkt_stages.core.selection import num_selected

        select = self._checked.settings("select")
        if select is None:
            return
        for what, wanted, neurons in (
            ("ffn", target.d_ff, (large.d_ff, target.d_ff)),
            ("attn", target.d_model, (large.num_attn_neurons, target.num_attn_neurons)),
        ):
            count, have = num_selected(select.max_rate, wanted), min(neurons)
            if not 1 <= count <= have:
                told = f"{select.max_rate} of {wanted} {what} neurons are {count}"
                self._checked.note(
                    "select.max_rate", f"{told}; {name} and {aim} have {have} a layer, expected 1 to {have}"
                )

    def _check_method(self, method: Method, target: Geometry) -> None:
        """An alignment's rate, and what the method's own file says of the sizes if it has a `check`."""
        from pkt_stages.models.selection import check_rate

        for task in self._profile.tasks if method.group == "align" else []:
            if (settings := self._checked.settings("align", task=task, method=method.name)) is not None:
                tried(self._checked, f"made_by.align.{method.name}", check_rate, settings.rate, target)
        if (code := self._checked.code(method)) is None:
            return
        module, params = code
        where = f"made_by.{method.group}.{method.name}"
        group = GROUPS[method.group]
        for source in self._profile.sources[group.sources] if group.sources else []:
            if (large := self.sizes(chat_model(source))) is None:
                continue
            if hasattr(module, "check"):
                self._try(f"{where}, {source}", module.check, large, target, params)
            if getattr(params, "vocabulary", False) and self._moves_into_tied(source):
                told = f"{self._profile.target}: its head is its embedding, which get different changes"
                self._checked.note(where, f"{told}; set vocabulary: false")

    def _moves_into_tied(self, source: str) -> bool:
        """Whether a source's changes of the vocabulary would go, token by token, to a target that has one weight."""
        from pkt_stages.models.load import odd_token

        target, base = self.get(self._profile.target), base_model(source)
        if target is None or not target.tied:
            return False
        written = self._profile.reexpressed.get(base, {})
        both = [self.tokenized(name) for name in (written.get("of", base), target.name)]
        if any(model is None for model in both):
            return False
        return odd_token([model.tokenizer for model in both if model is not None], ("", "")) is None

    def _check_vocabularies(self) -> None:
        """Of a teacher's logits the target's must be the same tokens."""
        from pkt_stages.models.distillation import check_vocabularies

        of_tokens = [  # all objectives but that of distributions alone
            method
            for method in self._profile.in_group("distill")
            for task in self._profile.tasks
            if getattr(self._checked.settings("distill", task=task, method=method.name), "objective", "uld") != "uld"
        ]
        target = self.tokenized(self._profile.target) if of_tokens else None
        if target is None:
            return
        for source in self._profile.sources["teacher"]:
            if (model := self.tokenized(chat_model(source))) is not None:
                self._try("teacher", check_vocabularies, model.tokenizer, target.tokenizer)


def base_model(source: str) -> str:
    """What the training of a source began with."""
    return f"{source}-base"


def made_elsewhere(root: Path) -> set[str]:
    """Models that some profile of the project makes."""
    found: set[str] = set()
    for path in (root / "params.yaml", *sorted(root.glob("*/*/params.yaml"))):
        try:
            made = read_params(path).get("reexpressed")
        except UserError:
            continue  # another profile's affair
        found |= set(made) if isinstance(made, dict) else set()
    return found


class Sets:
    """The example sets of the tasks that are prepared here, as far as their data are files.

    Attributes:
        known: by task and set; a set of a pool on the hub is missing.
    """

    def __init__(self, checked: Checked) -> None:
        self._checked, self.known = checked, dict[str, dict[str, list[Example]]]()
        folder = checked.content.get("data_dir")
        prepared = checked.content.get("prepared_task")
        for name in checked.profile.tasks:
            try:
                task = tasks.load(name)
            except UserError as error:
                checked.note("task", error)
                continue
            part = checked.content["task"][name]
            its = part.get("evaluate") if isinstance(part, dict) else None
            for key in OF_CODE:
                if task.judge is None and isinstance(its, dict) and key in its:
                    checked.note(f"task.{name}.evaluate", f"{key} has no effect: no generated code is run; take it out")
            if isinstance(folder, str) and isinstance(prepared, dict) and name in prepared:
                self.known[name] = self._prepared(task, Path(os.path.normpath(checked.root / folder)) / name)

    def _prepared(self, task: tasks.Task, folder: Path) -> dict[str, list[Example]]:
        params = self._checked.settings("prepare", task=task.name)
        if not folder.is_dir():
            there = [path.name for path in folder.parent.glob("*") if path.is_dir()]
            todo = "put train.jsonl and test.jsonl there, own splits, or a hub.yaml that names them"
            self._checked.note("data_dir", f"task {task.name}: no folder {folder}{meant(task.name, there)}; {todo}")
            return {}
        own, pointer = (folder / "extract.jsonl").is_file(), folder / hub.POINTER
        pools = [pool for pool in ("train", "test") if pointer.is_file() and not prepare.pool_files(folder, pool)]
        where = f"prepare, task {task.name}"
        try:
            for pool in pools:
                hub.read_data_pointer(pointer, pool)
            if params is None or (pools and not (own and pools == ["test"])):
                return {}
            given = prepare.read_given(folder, task, [pool for pool in ("train", "test") if pool not in pools])
            if "test" not in given:
                params = replace(params, test=None)
            sets = prepare.run({"test": [], **given}, params)
        except UserError as error:
            self._checked.note(where, error)
            return {}
        return sets if "test" in given else {name: rows for name, rows in sets.items() if name != "test"}

    def count(self, task: str, name: str) -> int | None:
        """How many examples a set holds; None if nobody knows."""
        if name in self.known.get(task, {}):
            return len(self.known[task][name])
        params: PrepareParams | None = self._checked.settings("prepare", task=task)
        return params.count(name) if params is not None else None

    def check_counts(self) -> None:
        """Steps and numbers of examples in the settings of rows against what the sets hold."""
        checked = self._checked
        select, attribute, seek = (checked.settings(name) for name in ("select", "attribute", "seek"))
        if select is not None and attribute is not None:
            for name, rule in select.rules().items():
                where = "select" if name == "default" else f"select.variants.{name}"
                for key, stored in (("norm", attribute.norms), ("coefficient", attribute.coefficients)):
                    if (value := getattr(rule, key)) not in stored:
                        checked.note(where, f"{key} {value} is not among `attribute.{key}s` ({', '.join(stored)})")
        for method in checked.profile.methods:
            where = f"made_by.{method.group}.{method.name}"
            code = checked.code(method)
            its = code[1] if code is not None else None
            for task in checked.profile.tasks:
                if method.group == "align":
                    self._check_alignment(where, task, checked.settings("align", task=task, method=method.name), select)
                for command in filter(None, (GROUPS[method.group].before, GROUPS[method.group].command)):
                    settings = checked.settings(command, task=task, method=method.name)
                    self._check_training(where, task, settings)
                    its = settings if hasattr(settings, "init") and settings.init == "seeking" else its
            block = getattr(its, "block", "sensitive")
            kept = ("sensitive", *(seek.more_blocks if seek is not None else (block,)))
            if GROUPS[method.group].sources == "seek_source" and block not in kept:
                checked.note(where, f"block {block} is not among `seek.more_blocks` ({', '.join(kept[1:]) or 'none'})")
        scale = checked.settings("scale")
        for task in scale.tasks if scale is not None else ():
            if task not in checked.profile.tasks:
                known = checked.profile.tasks
                checked.note("scale.tasks", f"{task!r} is not in `task` ({', '.join(known)}){meant(task, known)}")

    def _check_alignment(self, where: str, task: str, settings: Any, select: Any) -> None:
        if settings is None:
            return
        extract, align = self.count(task, "extract"), self.count(task, "align")
        note = self._checked.note
        if extract is not None and settings.steps > extract:
            note(
                where,
                f"task {task}: {settings.steps} steps need as many extract examples, found {extract}; lower steps",
            )
        needed = settings.validation_size + settings.batch_size - 1
        if align is not None and needed > align:
            parts = f"{settings.validation_size} held out (validation_size) and {settings.batch_size - 1} in a step"
            note(where, f"task {task}: {parts} (batch_size - 1) need {needed} align examples, found {align}")
        if select is None:
            return
        if settings.rate > select.max_rate:
            note(where, f"rate {settings.rate} is above `select.max_rate` {select.max_rate}; raise that, or lower it")
        if settings.variant != "default" and settings.variant not in (select.variants or {}):
            known = ", ".join(["default", *(select.variants or {})])
            note(where, f"variant {settings.variant!r} is none of `select.variants`; expected one of {known}")

    def _check_training(self, where: str, task: str, settings: Any) -> None:
        """That a training's `num_examples` are there."""
        wanted = getattr(settings, "num_examples", None)
        if wanted is None:
            return
        found = self.count(task, settings.train_set)
        if found is not None and wanted > found:
            told = f"num_examples {wanted}, the {settings.train_set} set has {found}"
            self._checked.note(where, f"task {task}: {told}; lower it, or raise `prepare.{settings.train_set}`")

    def check_lengths(self, models: Models) -> None:
        """That the longest examples fit into the models' contexts, and into `max_length`."""
        from pkt_stages.encoding import encode, locate

        checked, its = self._checked, self._checked.profile
        for task, sets in self.known.items():
            if "test" in sets:
                for name in dict.fromkeys([*its.models, its.target]):
                    if (model := models.tokenized(name)) is not None and model.context is not None:
                        self._check_evaluation(task, longest(sets["test"]), model)
            if "extract" not in sets:
                continue
            jobs: list[tuple[str, str, Any, str]] = []
            jobs += [("seek", chat_model(s), checked.settings("seek"), "extract") for s in its.sources["seek_source"]]
            for method in its.methods:
                command = GROUPS[method.group].command
                settings = checked.settings(command, task=task, method=method.name)
                if command == "align":
                    jobs += [("align", its.target, settings, name) for name in ("extract", "align")]
                elif hasattr(settings, "train_set") and not GROUPS[method.group].before:
                    jobs.append((f"made_by.{method.group}.{method.name}", its.target, settings, settings.train_set))
            for where, name, settings, of in dict.fromkeys((w, n, s, o) for w, n, s, o in jobs if s is not None):
                if (model := models.tokenized(name)) is not None:
                    for example in longest(sets[of]):
                        how = {"template": settings.template, "max_length": settings.max_length}
                        if not tried(checked, f"{where}, task {task}", encode, model.tokenizer, example, **how):
                            break
            attribute = checked.settings("attribute")
            for name in its.attributed if attribute is not None else []:
                if (model := models.tokenized(name)) is not None and model.context is not None:
                    for example in longest([*sets["extract"], *sets["transfer"]]):
                        how = {"template": attribute.template, "max_length": model.context}
                        at = f"attribute, task {task}, model {name}"
                        if not tried(checked, at, locate, model.tokenizer, example, **how):
                            break

    def _check_evaluation(self, task: str, examples: Sequence[Example], model: Model) -> None:
        """Prompt, prefix and new tokens, or the reference answer, in a model's context."""
        from pkt_stages.evaluation.likelihood import continuation, prompt_ids

        settings = self._checked.settings("evaluate", task=task)
        if settings is None or model.context is None:
            return
        written = tasks.load(task).answer_tokens > 0
        how = self._checked, f"evaluate, task {task}, model {model.name}"
        for example in examples:
            asked = model.tokenizer, example, settings.template, model.context
            num_new = settings.max_new_tokens if written else 1
            if not (written and settings.nats_only) and not tried(*how, prompt_ids, *asked, num_new):
                return
            if written and not tried(*how, continuation, *asked):
                return


def tried(checked: Checked, where: str, check: Callable[..., object], *given: Any, **named: Any) -> bool:
    """Whether a check raises no UserError; one that does is noted."""
    try:
        check(*given, **named)
    except UserError as error:
        checked.note(where, error)
        return False
    return True


def longest(examples: Sequence[Example]) -> list[Example]:
    """Some examples, the longest by characters."""
    return sorted(examples, key=lambda example: -len(example.prompt) - len(example.answer))[:LONGEST]


def check_texts(checked: Checked, models: Models) -> None:
    """The texts that models are compared on, and that those of a transport read the same in them."""
    from pkt_stages.encoding import tokens_at
    from pkt_stages.models.texts import check_same_reading, read_by

    folder, its = checked.content.get("data_dir"), checked.profile
    compared = its.pairs or any(its.analysed[key] for key in ("methods", "seeking", "target_methods"))
    wanted: list[tuple[str, int]] = []
    for command, used in (("compare", compared), ("correlate", its.sources["transport_source"])):
        if used and (settings := checked.settings(command)) is not None:
            wanted.append((command, settings.num_texts))
    if not wanted or not isinstance(folder, str):
        return
    at = Path(os.path.normpath(checked.root / folder)) / "texts"
    file = at / "texts.jsonl"
    if not file.is_file():
        if not (at / hub.POINTER).is_file():
            checked.note("data_dir", f"no {file} and no {hub.POINTER} beside it; {wanted[0][0]} needs texts")
        return
    try:
        found = texts.run([str(row.get("text", "")) for _, row in read_jsonl(file)])
    except UserError as error:
        checked.note("data_dir", error)
        return
    for command, count in wanted:
        if len(found) < count:
            checked.note(f"{command}.num_texts", f"{count} texts wanted, {file} holds {len(found)}; lower it")
    target = models.tokenized(its.target)
    for source in its.sources["transport_source"] if target is not None else []:
        if (base := models.tokenized(base_model(source))) is not None:
            both = [model for model in (base, target) if model is not None and model.ref is not None]
            refs = [model.ref for model in both if model.ref is not None]
            for number, text in enumerate(found[:SOME_TEXTS], start=1):
                read = [read_by(model.tokenizer, tokens_at(model.tokenizer, text)[0]) for model in both]
                where = f"{file}: text {number}"
                if not tried(checked, f"transport_source: {source}", check_same_reading, read, refs, where):
                    break
