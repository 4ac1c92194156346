from __future__ import annotations

from typing import Any

import pytest

from pkt_stages.reporting import paper
from pkt_stages.reporting.measure import POINTS
from pkt_stages.reporting.table import Head, table
from tests.reporting.metrics import metrics

TEN = "abcdefghij"


def found(**rows: list[float]) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {"gsm8k": metrics(values, ids=TEN)} for name, values in rows.items()}


def test_claims_are_paired_tests_of_two_rows() -> None:
    """LaTen right on all ten, the target on none: McNemar p 2 / 1024, times the number of tests in the section."""
    rows = found(target=[0.0] * 10, laten=[1.0] * 10, kd=[0.0] * 9 + [1.0], unaligned_seeking=[1.0] * 10)
    made = {claim.text: claim.verdicts["gsm8k"] for claim in paper.claims(rows, ["gsm8k"], section="claims")}
    assert list(made) == [
        "Seeking's parameters added without alignment destroy the target",
        "LaTen improves the target",
        "Supervised KD on the align set leaves the target as it is",
    ]
    unaligned, laten, kd = made.values()
    assert (laten.text, laten.difference.difference, laten.paper) == ("yes", 100.0, pytest.approx(4.40))
    assert laten.difference.adjusted_p == pytest.approx(3 * 2 / 1024)
    assert (unaligned.text, unaligned.paper) == ("no: higher", pytest.approx(7.28 - 16.07))
    # At .05 / 3 seven wins or more and no loss are shown: 80 % of the time if 76.1 % of the examples are won.
    assert (kd.text, kd.difference.difference) == ("no difference shown (≥76.1)", 10.0)
    assert paper.claims(found(target=[0.0]), ["gsm8k"], section="controls") == []


def test_a_claim_without_evidence_is_not_shown() -> None:
    rows = found(laten=[1.0, 1.0, *[0.0] * 8], control_random_delta=[0.0] * 10)
    (claim,) = paper.claims(rows, ["gsm8k"], section="controls")
    # Six wins or more and no loss would have been: 80 % of the time if 67.3 % of the examples are won.
    assert (claim.verdicts["gsm8k"].text, claim.verdicts["gsm8k"].paper) == ("not shown (≥67.3)", None)


def test_a_claim_is_not_tested_where_one_side_has_no_answers() -> None:
    rows = found(laten=[1.0] * 10)
    rows["target"] = {"gsm8k": metrics([0.0] * 10, ids=TEN, answered=False)}
    assert paper.claims(rows, ["gsm8k"], section="claims") == []


def test_tables_of_the_paper_where_the_models_are_its_own() -> None:
    rows = found(target=[0.0] * 10, source=[1.0] * 10, laten=[1.0] * 5 + [0.0] * 5)
    heads = [Head(name, "any", paper.titles([name])[name]) for name in rows]
    found_rows = {row.slug: row for row in table(heads, rows, "target", POINTS)}
    assert paper.tables({("source", "target-chat"): found_rows}) == []
    made = paper.tables({("llama2-13b", "llama2-7b-chat"): found_rows})
    assert [(t.number, [row.label for row in t.rows]) for t in made] == [
        (1, ["target", "source", "LaTen"]),
        (6, ["target", "source"]),
        (7, ["target", "source", "LaTen"]),
    ]
    ours, theirs = made[0].rows[2].cells["gsm8k"]
    assert (ours.mean, theirs) == (50.0, 20.47)
    math = paper.tables({("wizardmath-13b", "llama2-7b-chat"): found_rows})
    assert [(t.number, [(row.pair, row.label) for row in t.rows]) for t in math] == [
        (6, [("WizardMath-13B to Llama-2 7B", "source")])
    ]


def test_every_row_of_the_paper_is_a_method_with_its_scores() -> None:
    content = paper._content()
    assert content["scores"].keys() == content["pairs"].keys()
    for key, rows in content["scores"].items():
        for method, scores in rows.items():
            assert method in ("source", "target", *content["titles"]), (key, method)
            assert all(0 <= score <= 100 for score in scores.values())
    for made in content["tables"]:
        for key, methods in made["rows"].items():
            assert all(set(made["tasks"]) <= set(content["scores"][key][method]) for method in methods)


def test_a_variant_is_called_by_what_its_name_adds() -> None:
    assert paper.titles(
        ["laten", "laten_steps_16", "latent", "unaligned_top_pca_importance", "postpkt_pissa_few", "new_method"]
    ) == {
        "laten": "LaTen",
        "laten_steps_16": "LaTen, steps 16",
        "latent": "latent",
        "unaligned_top_pca_importance": "grid top, pca importance",
        "postpkt_pissa_few": "LoRA, PiSSA init, align set",
        "new_method": "new method",
    }
