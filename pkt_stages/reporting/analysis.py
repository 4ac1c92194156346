"""Why it works or not, for the report: figures, tables and a sentence each, from the metrics of the analysis stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from pkt_stages.profile import Profile
from pkt_stages.reporting import figures
from pkt_stages.reporting.figures import SITE_TITLES, Drawing
from pkt_stages.reporting.reading import Folder

COMPARISON = ("params", "cka", "ranges", "similarity")
AGAINST = {"weight": "W", "reduced_base": "W - ΔW", "submatrix": "source's sub-matrix"}
SAMPLES = {
    "mean": "each text's mean token",
    "last": "each text's last token",
    "all": "all tokens",
    "per_sequence": "the tokens of each text",
}
MOMENTS = {"initial": "start", "trained": "trained"}


@dataclass(frozen=True)
class Grid:
    """A small table: column heads, and rows whose first cell is their head."""

    heads: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    text: str
    drawings: list[Drawing] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


@dataclass(frozen=True)
class Compared:
    """Two models, or the target before and after a method; `change` says what tells the second from the first.

    `name` is the pair's, or that of the method, its source and the task: a part of names of files.
    """

    name: str
    first: str
    second: str
    both: str
    change: str
    metrics: dict[str, Any]


Neurons = tuple[str, Mapping[str, Any]]  # a model, and what `pkt neurons` found in it


def compared(folder: Folder, profile: Profile, titles: Mapping[str, str], tasks: Mapping[str, str]) -> list[Compared]:
    """All that the params have compared, pairs of models first, with their metrics.

    Args:
        titles, tasks: of the methods and the tasks, by name.
    """
    found = []
    for name, pair in profile.pairs.items():
        first, second = pair["first"], pair["second"]
        if metrics := folder.read("compare", "models", name, keys=COMPARISON):
            found.append(Compared(name, first, second, f"{first} and {second}", f"{second} - {first}", metrics))
    by_source = [profile.method(name) for key in ("methods", "seeking") for name in profile.analysed[key]]
    listed = [(method, source) for source in profile.analysed["source"] for method in by_source]
    listed += [(profile.method(name), "") for name in profile.analysed["target_methods"]]
    for task in profile.analysed["task"]:
        for method, source in listed:
            more = f", from {source}" if source and len(profile.analysed["source"]) > 1 else ""
            label = f"{titles[method.name]}, {tasks[task]}{more}"
            below = (*method.folder(source), task)
            if metrics := folder.read("compare", *below, keys=COMPARISON):
                both = f"target before and after {label}"
                found.append(Compared("_".join(below), profile.target, "the changed target", both, label, metrics))
    return found


def sections(comparisons: Sequence[Compared], neurons: Sequence[Neurons]) -> list[Section]:
    """All parts, in the order of the paper's analysis; those without anything listed are left out."""
    made = [_cka(comparisons), _similarity(comparisons), _deltas(comparisons), _neurons(neurons)]
    return [section for section in made if section is not None]


def _cka(comparisons: Sequence[Compared]) -> Section | None:
    if not comparisons:
        return None
    drawings, rows = [], []
    for compared in comparisons:
        values = {site: compared.metrics["cka"][site] for site in SITE_TITLES}
        caption = f"Linear CKA of {compared.both}, every layer with every layer, by projection."
        image = figures.cka_maps(compared.both, values, compared.first, compared.second)
        drawings.append(Drawing(f"cka_{compared.name}", image, caption, wide=True))
        square = len(values["ffn_up"]) == len(values["ffn_up"][0])
        means = [fmean(x for row in values[site] for x in row) for site in SITE_TITLES]
        same = [fmean(values[site][i][i] for i in range(len(values[site]))) for site in SITE_TITLES] if square else []
        same_layer = [f"{x:.2f}" for x in same] if same else [""] * len(SITE_TITLES)
        rows.append([compared.both, *(f"{x:.2f}" for x in means), *same_layer])
    params = comparisons[0].metrics["params"]
    sites = list(SITE_TITLES.values())
    heads = ["mean CKA", *(f"{s}, all pairs" for s in sites), *(f"{s}, same layer" for s in sites)]
    across = dict(zip(sites, (float(x) for x in rows[0][1:5]), strict=True))
    highest, lowest = max(across, key=across.__getitem__), min(across, key=across.__getitem__)
    text = (
        f"Linear CKA (unbiased HSIC) between the outputs of each projection on {params['num_texts']} texts; samples:"
        f" {SAMPLES[params['reduction']]}. 1: the same up to rotation and scale, 0: unrelated. Between"
        f" {comparisons[0].both} it is {across[highest]:.2f} on average for {highest} and {across[lowest]:.2f} for"
        f" {lowest}."
        " Models that share their weights' history (base and chat, target before and after) are the yardstick."
    )
    return Section("Do the models compute alike? (CKA)", text, drawings, [Grid(heads, rows)])


def _similarity(comparisons: Sequence[Compared]) -> Section | None:
    alike = [(compared, found) for compared in comparisons if (found := compared.metrics["similarity"])]
    if not alike:
        return None
    drawings, rows = [], []
    for compared, found in alike:
        label = compared.change
        panels: dict[str, dict[str, list[float]]] = {}
        for site in SITE_TITLES:
            panels[site] = {
                f"{against}, {when}": [pair[0] for pair in found[f"{site}.{moment}.{key}"]]
                for key, against in AGAINST.items()
                for moment, when in MOMENTS.items()
                if f"{site}.{moment}.{key}" in found
            }
        cut = ", the source's sub-matrix" if any("submatrix" in key for key in found) else ""
        caption = (
            f"{label}: cosine similarity by layer between the update ΔW and what the legend names (the target's weight"
            f" W, the base W - ΔW that the adapter was trained on{cut}), at the start and after training."
        )
        image = figures.similarity_by_layer(f"{label}: cosine of the update ΔW and ...", panels)
        drawings.append(Drawing(f"similarity_{compared.name}", image, caption, wide=True))
        for what in panels["ffn_up"]:
            rows.append([f"{label}: {what}", *(f"{fmean(panels[site][what]):+.3f}" for site in SITE_TITLES)])
    text = (
        "Cosine similarity between the LoRA update ΔW and the target's weight W, the base W - ΔW that it is trained on,"
        " and the source's sub-matrix it was cut from: mean over neuron rows by layer, at the start and after training."
        " PiSSA's start is a part of W and orthogonal to what is left of it; Seeking's has nothing of W, and the base"
        " holds its negative: the paper's opposite patterns."
    )
    heads = ["mean over layers", *SITE_TITLES.values()]
    return Section("What do the adapters resemble?", text, drawings, [Grid(heads, rows)])


def _deltas(comparisons: Sequence[Compared]) -> Section | None:
    items = [(compared, found) for compared in comparisons if (found := compared.metrics["ranges"])]
    if not items:
        return None
    drawings, rows = [], []
    for compared, found in items:
        label = compared.change
        image = figures.delta_histogram(label, found["edges"], found["counts"], found["within"], found["beyond"])
        caption = f"{label}: how many entries of the change have which size (both signs, logarithmic)."
        drawings.append(Drawing(f"deltas_{compared.name}", image, caption))
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


def _neurons(neurons: Sequence[Neurons]) -> Section | None:
    grids = []
    for model, found in neurons:
        for example in found["examples"]:
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
