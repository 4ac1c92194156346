from __future__ import annotations

import base64
import html
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.artifacts import write_json
from pkt_stages.profile import Method
from pkt_stages.reporting.paper import descriptions
from tests.reporting.metrics import metrics, params

Run = Callable[..., tuple[int, str, str]]
MADE_BY = {
    "align": {"laten": {}, "control_random_rows": {"given": "random"}},
    "grid": {"unaligned_top_pca_random": {}},
    "finetune": {"postpkt_random": {}},
}
DESCRIPTIONS = descriptions([Method("laten", "align", {})])
STEPS = [{"validation_loss": 1.5}, {"validation_loss": 1.25}]
ALIGNMENT = {"chosen_step": 2, "validation_loss_without_delta": 2.0, "steps": STEPS}
ALIGNMENT |= {"params": {"steps": 2}, "selection": {"max_rate": 0.1}}


def laten(given: str) -> dict[str, Any]:
    return {"command": "inject", "params": {"steps": 2, "given": given, "inject": {"dtype": "auto"}}, "facts": {}}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write(tmp_path, made_by=MADE_BY)
    e = tmp_path / "r/evaluate"
    write_json(e / "s-chat/gsm8k.json", metrics([1, 1, 1, 1]))
    write_json(e / "t/gsm8k.json", metrics([1, 0, 0, 1]))
    write_json(e / "laten/s/gsm8k.json", metrics([1, 1, 0, 1], [1, 0, 0, 1], made=laten("selected")))
    write_json(e / "control_random_rows/s/gsm8k.json", metrics([1, 0, 0, 1], [1, 0, 0, 1], made=laten("random")))
    grid = {"command": "derive", "params": {"code": "grid", "layers": "top"}, "facts": {}}
    write_json(e / "unaligned_top_pca_random/s/gsm8k.json", metrics([0, 0, 0, 0], made=grid))
    tuned = {"command": "finetune", "params": {"init": "random"}, "facts": {}}
    write_json(e / "postpkt_random/gsm8k.json", metrics([1, 1, 0, 1], [1, 0, 1, 1], made=tuned))
    for method in MADE_BY["align"]:
        write_json(tmp_path / f"r/analysis/align/{method}/s/gsm8k.json", ALIGNMENT)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params(**changes), sort_keys=False))


def report(pkt: Run, folder: Path, *more: object) -> tuple[int, str, str]:
    return pkt(
        *("report", "--params", folder / "params.yaml", "--results", folder / "r", "--figures", folder / "figures"),
        *("--html", folder / "r.html", "--table", folder / "r.md", "--out", folder / "r.json"),
        *("--scores", folder / "scores.json", "--csv", folder / "scores.csv", "--tex", folder / "table.tex"),
        *more,
    )


def test_tables_numbers_and_page(pkt: Run, inputs: Path) -> None:
    status, printed, err = report(pkt, inputs)
    assert status == 0, err
    assert "report: 6 rows on 1 tasks, 2 figures ->" in printed
    names = ["s-t_differences_gsm8k", "s-t_loss_laten_gsm8k"]
    files = sorted(path.name for path in (inputs / "figures").iterdir())
    assert files == ["captions.md", *(f"{name}.{kind}" for name in names for kind in ("pdf", "png", "svg"))]
    captions = (inputs / "figures/captions.md").read_text()
    assert re.findall(r"\*\*Figure (\d)\*\* \(`(.*?)`\)", captions) == [("1", names[0]), ("2", names[1])]
    page = (inputs / "r.html").read_text()
    heads = re.findall(r'<th scope="row"[^>]*>(.*?)</th>', page.split("<h2>Settings in force</h2>")[0])
    labels = [head.split("<small>")[0] for head in heads]
    assert html.unescape(heads[2]) == f"LaTen<small>{DESCRIPTIONS['laten']}</small>" and heads[-1] == "LaTen, GSM8K"
    methods = ["LaTen", "grid top, pca random", "LoRA, random init", "LaTen on random rows"]
    claims = ["LaTen improves the target", "LaTen beats itself on random rows"]
    tables = ["source: s-chat", "target: t", *methods, "source: s-chat", *methods]
    # Scores and likelihoods, each with differences, claims, and LaTen's alignment (not its controls').
    assert labels == [*tables, *tables, *claims, "LaTen, GSM8K"]
    table = (inputs / "r.md").read_text()
    assert "| LaTen                | 2    | 62.5 ±23.9 (17.7) |" in table
    sections = re.findall(r"\*\*(\w+)\*\*", table)
    assert sections == ["PrePKT", "PostPKT", "Controls"] * 4
    numbers = json.loads((inputs / "r.json").read_text())["s-t"]
    assert numbers["order"] == [
        *("s-chat", "t"),
        *("laten", "unaligned_top_pca_random", "postpkt_random", "control_random_rows"),
    ]
    assert numbers["rows"]["laten"]["cells"]["gsm8k"]["versus"]["difference"] == 12.5
    assert numbers["rows"]["t"]["cells"]["gsm8k"]["versus"] is None
    assert numbers["nats"].keys() == set(numbers["order"])
    assert numbers["nats"]["laten"]["cells"]["gsm8k"]["versus"]["difference"] == 0.125
    assert numbers["alignments"] == {
        "laten": {"gsm8k": {"chosen_step": 2, "validation_loss_without_delta": 2.0, "validation_loss": [1.5, 1.25]}}
    }
    (claim,), (control,) = numbers["claims"], numbers["controls"]
    assert claim["claim"] == "LaTen improves the target" and control["claim"] == "LaTen beats itself on random rows"
    assert (claim["tasks"]["gsm8k"]["difference"], claim["tasks"]["gsm8k"]["verdict"]) == (12.5, "not shown (≥35.0)")

    files = [f"figures/{name}" for name in files]
    files += ["r.html", "r.md", "r.json", "scores.json", "scores.csv", "table.tex"]
    first = {name: (inputs / name).read_bytes() for name in files}
    (inputs / "figures/of_a_removed_row.png").write_bytes(b"")
    report(pkt, inputs)
    assert first == {name: (inputs / name).read_bytes() for name in first}
    assert not (inputs / "figures/of_a_removed_row.png").exists()


def test_the_page_says_what_was_in_force_and_shows_the_params_file(pkt: Run, inputs: Path) -> None:
    with (inputs / "params.yaml").open("a") as file:
        file.write("# why < because\n")
    assert report(pkt, inputs)[0] == 0
    said = (inputs / "r.html").read_text().split("<h2>Settings in force</h2>")[1]
    assert re.findall(r"<h3>(.*?)</h3>(?:\s*<p>(.*?)</p>)?", said) == [
        ("pkt select", "max_rate 0.1."),
        ("pkt evaluate", "backend hf, template chat."),
        ("pkt inject", "given selected, inject.dtype auto, steps 2."),
        ("pkt derive", "code grid, layers top."),
        ("pkt finetune", "init random."),
    ]
    assert re.findall(r'<th scope="row">(.*?)</th><td class="text">(.*?)</td>', said) == [
        ("LaTen on random rows", "given random"),
    ]
    assert "# why &lt; because" in said


def test_the_page_is_self_contained(pkt: Run, inputs: Path) -> None:
    assert report(pkt, inputs)[0] == 0
    page = (inputs / "r.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)|@import|url\(|<script|<link|https?://', page) == []
    images = re.findall(r'<img [^>]*alt="[^"]+"\s+src="data:image/png;base64,([^"]*)"', page)
    assert len(images) == page.count("<img") == 2  # the differences and LaTen's losses
    for image in images:
        data = base64.b64decode(image, validate=True)
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 300 and height > 300


def test_every_source_has_its_own_table(pkt: Run, inputs: Path) -> None:
    names = ["s-chat", "s2-chat", "t"]
    write(inputs, source=["s", "s2"], models=names, attributed=names, made_by=MADE_BY)
    for method, given in (("laten", "selected"), ("control_random_rows", "random"), ("unaligned_top_pca_random", "-")):
        write_json(inputs / f"r/evaluate/{method}/s2/gsm8k.json", metrics([1, 0, 0, 1], made=laten(given)))
    for method in MADE_BY["align"]:
        write_json(inputs / f"r/analysis/align/{method}/s2/gsm8k.json", ALIGNMENT)
    write_json(inputs / "r/evaluate/s2-chat/gsm8k.json", metrics([1, 0, 0, 0]))
    status, _, err = report(pkt, inputs)
    assert status == 0, err
    table = (inputs / "r.md").read_text()
    assert table.count("| LoRA, random init") == 2 * 4  # points and nats, each with differences
    assert "### s to t\n" in table and "### s2 to t\n" in table
    assert list(json.loads((inputs / "r.json").read_text())) == ["s-t", "s2-t"]
    assert '<th scope="row">LaTen on random rows, from s2</th>' in (inputs / "r.html").read_text()


def test_rows_taken_over_stand_in_their_section(pkt: Run, inputs: Path) -> None:
    """A model is told from a method by what made it: nothing."""
    made_by = {"align": {"laten": {}}, "finetune_seeking": {"postpkt_seeking": {}}}
    write(inputs, models=["s-chat"], made_by=made_by, adopted=["t", "postpkt_random"])
    for old in (
        "evaluate/control_random_rows",
        "evaluate/unaligned_top_pca_random",
        "analysis/align/control_random_rows",
    ):
        (inputs / "r" / old / "s/gsm8k.json").unlink()
    write_json(inputs / "r/evaluate/postpkt_seeking/s/gsm8k.json", metrics([1, 0, 0, 1], made=laten("selected")))
    status, _, err = report(pkt, inputs)
    assert status == 0, err
    numbers = json.loads((inputs / "r.json").read_text())["s-t"]
    assert numbers["order"] == ["s-chat", "t", "laten", "postpkt_random", "postpkt_seeking"]
    assert [numbers["rows"][name]["group"] for name in numbers["order"][2:]] == ["PrePKT", "PostPKT", "PostPKT"]
    page = (inputs / "r.html").read_text()
    assert "<li>t: m at revision unpinned.</li>" in page and "<dd>t (m), target; revision unpinned</dd>" in page


@pytest.mark.parametrize("method", ["laten", "control_random_rows"])
def test_the_curve_of_every_step(pkt: Run, inputs: Path, method: str) -> None:
    write(inputs, made_by=MADE_BY, every_step=[method])
    found = metrics([1, 0, 0, 1], [1, 1, 0, 1])
    for step, run in enumerate(found["runs"], start=1):
        run["label"] = f"step_{step:02d}/example"
    write_json(inputs / f"r/evaluate/steps/{method}/s/gsm8k.json", found)
    status, printed, err = report(pkt, inputs)
    assert status == 0, err
    assert "3 figures" in printed and (inputs / f"figures/s-t_steps_{method}_gsm8k.pdf").is_file()


@pytest.mark.parametrize(
    "missing",
    [
        "evaluate/laten/s/gsm8k",
        "evaluate/postpkt_random/gsm8k",
        "evaluate/s-chat/gsm8k",
        "analysis/align/laten/s/gsm8k",
    ],
)
def test_a_listed_row_without_metrics_is_an_error(pkt: Run, inputs: Path, missing: str) -> None:
    (inputs / f"r/{missing}.json").unlink()
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert f"{missing}.json: no such metrics; the params list this row, run `dvc repro`" in err
    assert not (inputs / "r.html").exists()


def test_metrics_that_are_not_listed_are_an_error(pkt: Run, inputs: Path) -> None:
    e = inputs / "r/evaluate"
    for path in ("old one/s/gsm8k.json", "old one/s/mmlu.json", "laten/s2/gsm8k.json", "s-chat/mmlu.json"):
        write_json(e / path, metrics([0, 0, 0, 0]))
    write_json(inputs / "r/analysis/align/old/gsm8k.json", {})
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert (
        f"{inputs}/r/analysis/align/old and 3 more: metrics that {inputs}/params.yaml does not list; list their rows"
        f" (again) or delete them: rm -r {inputs}/r/analysis/align/old {e}/laten/s2 '{e}/old one'"
        f" {e}/s-chat/mmlu.json\n" in err
    )
    assert not (inputs / "r.html").exists()


def test_a_partial_look_shows_gaps_and_says_so(pkt: Run, inputs: Path) -> None:
    """One row on one task, without its alignment, before the target is evaluated; and after."""
    for path in (inputs / "r").rglob("*.json"):
        if path.parts[-3:-1] != ("laten", "s") or "align" in path.parts:
            path.unlink()
    target = ("--params", inputs / "params.yaml", "--results", inputs / "r", "--partial")
    status, printed, err = pkt("report", *target)
    assert status == 0, err
    assert "**Partial: 7 of the 8 metrics that the params list are not there yet" in printed
    scores = [[cell.strip() for cell in line.split("|")] for line in printed.split("| difference")[0].splitlines()]
    cells = {line[1]: line[3] for line in scores if len(line) > 3}
    assert (cells["LaTen"], cells["LoRA, random init"]) == ("62.5 ±23.9 (17.7)", "-")
    assert sorted(path.name for path in inputs.iterdir()) == ["params.yaml", "r"]
    write_json(inputs / "r/evaluate/t/gsm8k.json", metrics([1, 0, 0, 1]))
    write_json(inputs / "r/evaluate/left_over/gsm8k.json", metrics([1, 0, 0, 1]))
    status, _, err = report(pkt, inputs, "--partial")
    assert status == 0, err
    assert '<p class="banner">Partial: 6 of the 8' in (inputs / "r.html").read_text()
    scores = json.loads((inputs / "scores.json").read_text())
    assert {row: scores[row] for row in ("laten", "t", "s-chat")} == {
        "laten": {"s": {"gsm8k": 62.5}},
        "t": {"gsm8k": 50.0},
        "s-chat": {},
    }


def test_nothing_yet_is_a_page_as_well(pkt: Run, inputs: Path) -> None:
    for path in (inputs / "r").rglob("*.json"):
        path.unlink()
    status, _, err = report(pkt, inputs, "--partial")
    assert status == 0, err
    assert "Nothing has been evaluated yet." in (inputs / "r.html").read_text()


def test_a_report_that_fails_leaves_the_last_one(pkt: Run, inputs: Path) -> None:
    assert report(pkt, inputs)[0] == 0
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file() and "r/" not in str(path)}
    (inputs / "r/evaluate/t/gsm8k.json").write_text("{")
    assert report(pkt, inputs)[0] == 2
    assert before == {path: path.read_bytes() for path in before}


def test_a_figures_folder_of_something_else_is_not_replaced(pkt: Run, inputs: Path) -> None:
    (inputs / "figures").mkdir()
    (inputs / "figures/mine.txt").touch()
    status, _, err = report(pkt, inputs)
    assert status == 2 and "holds mine.txt and no captions.md, so it is not ours to replace" in err


def test_metrics_of_an_older_version_are_one_line(pkt: Run, inputs: Path) -> None:
    old = metrics([1, 0, 0, 1])
    del old["made"]
    write_json(inputs / "r/evaluate/t/gsm8k.json", old)
    status, _, err = report(pkt, inputs)
    message = "t/gsm8k.json: not the metrics of this version, 'made' is missing; run `dvc repro`\n"
    assert (status, err) == (2, f"pkt: error: {inputs}/r/evaluate/{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, "source: expected a list with at least one name, found None"),
        ({"task": {}}, "task: expected at least one task, found none"),
        ({"made_by": {"finetune": {"x": {}}, "distill": {"x": {}}}}, "made_by.distill: x is in made_by.finetune, too"),
    ],
)
def test_bad_params(pkt: Run, inputs: Path, change: dict[str, Any], message: str) -> None:
    write(inputs, **change)
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert f"{inputs}/params.yaml: {message}" in err


@pytest.mark.parametrize(("text", "message"), [("[", "not readable YAML"), ("[]", "expected a mapping of params")])
def test_unreadable_params(pkt: Run, inputs: Path, text: str, message: str) -> None:
    (inputs / "params.yaml").write_text(text)
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert message in err
