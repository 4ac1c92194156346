"""Why it works or not, for the report: figures, tables and a sentence each, from the metrics of the analysis stages."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from pkt_stages.reporting import figures
from pkt_stages.reporting.figures import SITE_TITLES
from pkt_stages.reporting.reading import Folder
from pkt_stages.reporting.table import TASKS, title_of

AGAINST = {"weight": "W", "reduced_base": "W - ΔW", "submatrix": "source's sub-matrix"}
SAMPLES = {
    "mean": "each text's mean token",
    "last": "each text's last token",
    "all": "all tokens",
    "per_sequence": "the tokens of each text",
}
MOMENTS = {"initial": "start", "trained": "trained"}


@dataclass(frozen=True)
class Drawing:
    """A figure: the name of its file, the image, and what it shows in words."""

    name: str
    png: bytes
    alt: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Grid:
    """A small table: column heads, and rows whose first cell is their head."""

    heads: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page; `wide` drawings take the whole width, others stand side by side."""

    title: str
    text: str
    drawings: list[Drawing] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    wide: bool = False


def sections(folder: Folder, settings: Mapping[str, Any]) -> list[Section]:
    """All parts, in the order of the paper's analysis; those without anything listed are left out."""
    changes = list(_changes(settings))
    made = [
        _cka(folder, settings, changes),
        _similarity(folder, [c for c in changes if c.similar]),
        _deltas(folder, settings, changes),
        _neurons(folder, settings),
    ]
    return [section for section in made if section is not None]


@dataclass(frozen=True)
class _Change:
    """A method on a task: where its metrics lie, what it is called, and whether it is an adapter with a start."""

    below: tuple[str, ...]
    label: str
    target: str
    similar: bool

    @property
    def slug(self) -> str:
        return "-".join(self.below)


def _changes(settings: Mapping[str, Any]) -> Sequence[_Change]:
    found = []
    for task in settings["analysed_task"]:
        for target in settings["target"]:
            for source in settings["source"]:
                for method in settings["analysed_pair_methods"]:
                    below = (method, f"{source}-{target}", task)
                    similar = method in settings["analysed_seeking_methods"]
                    label = f"{title_of(method)}, {TASKS.get(task, task)}"
                    more = f", from {source}" if len(settings["source"]) > 1 else ""
                    found.append(_Change(below, label + more, target, similar))
            for method in settings["analysed_target_methods"]:
                label = f"{title_of(method)}, {TASKS.get(task, task)}"
                found.append(_Change((method, target, task), label, target, True))
    return found


def _cka(folder: Folder, settings: Mapping[str, Any], changes: Sequence[_Change]) -> Section:
    maps: list[tuple[str, str, str, dict[str, Any]]] = []
    for source in settings["source"]:
        for target in settings["target"]:
            maps.append((source, target, f"{source} and {target}", folder.read("cka", f"{source}-{target}")))
    for name in settings["sft"]:
        maps.append((f"{name}-base", f"{name}-chat", f"{name}: base and chat", folder.read("cka", name)))
    for change in changes:
        label = f"target before and after {change.label}"
        maps.append((change.target, "the changed target", label, folder.read("cka", *change.below)))
    drawings, rows = [], []
    for number, (first, second, label, found) in enumerate(maps):
        values = {site: found["cka"][site] for site in SITE_TITLES}
        alt = f"CKA of {label}, every layer with every layer"
        drawings.append(Drawing(f"cka_{number:02d}", figures.cka_maps(label, values, first, second), alt))
        square = len(values["ffn_up"]) == len(values["ffn_up"][0])
        means = [fmean(x for row in values[site] for x in row) for site in SITE_TITLES]
        same = [fmean(values[site][i][i] for i in range(len(values[site]))) for site in SITE_TITLES] if square else []
        same_layer = [f"{x:.2f}" for x in same] if same else [""] * len(SITE_TITLES)
        rows.append([label, *(f"{x:.2f}" for x in means), *same_layer])
    params = maps[0][3]["params"]
    sites = list(SITE_TITLES.values())
    heads = ["mean CKA", *(f"{s}, all pairs" for s in sites), *(f"{s}, same layer" for s in sites)]
    across = dict(zip(sites, (float(x) for x in rows[0][1:5]), strict=True))
    highest, lowest = max(across, key=across.__getitem__), min(across, key=across.__getitem__)
    text = (
        f"Linear CKA (unbiased HSIC) between the outputs of each projection on {params['num_texts']} texts; samples:"
        f" {SAMPLES[params['reduction']]}. 1: the same up to rotation and scale, 0: unrelated. Between"
        f" {maps[0][2]} it is {across[highest]:.2f} on average for {highest} and {across[lowest]:.2f} for {lowest}."
        " Models that share their weights' history (base and chat, target before and after) are the yardstick."
    )
    return Section("Do the models compute alike? (CKA)", text, drawings, [Grid(heads, rows)], wide=True)


def _similarity(folder: Folder, changes: Sequence[_Change]) -> Section | None:
    if not changes:
        return None
    drawings, rows = [], []
    for number, change in enumerate(changes):
        found = folder.read("similarity", *change.below)["similarity"]
        panels: dict[str, dict[str, list[float]]] = {}
        for site in SITE_TITLES:
            panels[site] = {
                f"{against}, {when}": [pair[0] for pair in found[f"{site}.{moment}.{key}"]]
                for key, against in AGAINST.items()
                for moment, when in MOMENTS.items()
                if f"{site}.{moment}.{key}" in found
            }
        alt = f"Cosine similarity by layer of the update of {change.label}"
        png = figures.similarity_by_layer(f"{change.label}: cosine of the update ΔW and ...", panels)
        drawings.append(Drawing(f"similarity_{number:02d}", png, alt))
        for what in panels["ffn_up"]:
            rows.append([f"{change.label}: {what}", *(f"{fmean(panels[site][what]):+.3f}" for site in SITE_TITLES)])
    text = (
        "Cosine similarity between the LoRA update ΔW and the target's weight W, the base W - ΔW that it is trained on,"
        " and the source's sub-matrix it was cut from: mean over neuron rows by layer, at the start and after training."
        " PiSSA's start is a part of W and orthogonal to what is left of it; Seeking's has nothing of W, and the base"
        " holds its negative: the paper's opposite patterns."
    )
    heads = ["mean over layers", *SITE_TITLES.values()]
    return Section("What do the adapters resemble?", text, drawings, [Grid(heads, rows)], wide=True)


def _deltas(folder: Folder, settings: Mapping[str, Any], changes: Sequence[_Change]) -> Section | None:
    items = [(f"{name}: chat - base", folder.read("deltas", name)) for name in settings["sft"]]
    items += [(change.label, folder.read("deltas", *change.below)) for change in changes]
    if not items:
        return None
    drawings, rows = [], []
    for number, (label, found) in enumerate(items):
        png = figures.delta_histogram(label, found["edges"], found["counts"], found["within"], found["beyond"])
        drawings.append(Drawing(f"deltas_{number:02d}", png, f"Histogram of the entries of the delta: {label}"))
        o = found["overall"]
        rows.append(
            [
                label,
                f"{o['min']:+.4f}",
                f"{o['max']:+.4f}",
                f"{o['rms']:.2e}",
                f"{o['share_within']:.1%}",
                f"{o['share_beyond']:.1%}",
            ]
        )
    found = items[0][1]
    heads = ["delta", "min", "max", "rms", f"within {found['within']}", f"beyond {found['beyond']}"]
    text = (
        f"Entries of what is added to the weights. The paper finds fine-tuning's within ±{found['within']}, Seeking's"
        f" beyond ±{found['beyond']} (extremes -1.13 and 1.12). LaTen's counts its rows alone; all else is zero."
    )
    return Section("How large are the deltas?", text, drawings, [Grid(heads, rows)])


def _neurons(folder: Folder, settings: Mapping[str, Any]) -> Section | None:
    grids = []
    for task in settings["analysed_task"]:
        for model in settings["models"]:
            for example in folder.read("neurons", model, task)["examples"]:
                rows = [
                    [
                        SITE_TITLES[neuron["site"]].removesuffix("_proj"),
                        str(neuron["layer"]),
                        str(neuron["neuron"]),
                        f"{neuron['score']:+.3f}",
                        " ".join(token.replace("\n", "⏎").replace(" ", "␣") for token in neuron["tokens"]),
                    ]
                    for neuron in example["neurons"]
                ]
                caption = f"{model}, {example['id']}: predicts {example['predicted']!r}"
                grids.append(Grid(["site", "layer", "neuron", "score (nats)", "top tokens of the lens"], rows, caption))
    if not grids:
        return None
    text = (
        "The neurons that raise the log-probability of the answer's last token most, and the tokens that each raises"
        " most (its subvalue times its coefficient through the logit lens). ␣ is a space, ⏎ a line break."
    )
    return Section("What do the best neurons stand for?", text, grids=grids)
