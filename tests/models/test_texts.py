"""Texts as models with different tokenizers read them: which tokens belong together, and where examples are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pkt_stages.core.similarity import CkaSums, centred_gram
from pkt_stages.encoding import locate, tokens_at
from pkt_stages.errors import UserError
from pkt_stages.examples import Example, write_jsonl
from pkt_stages.models.correlation import Correlation
from pkt_stages.models.load import ModelRef, load_model, load_tokenizer
from pkt_stages.models.texts import check_same_reading, paired_texts, partners, whole
from pkt_stages.templates import render_prompt
from tests import tokenizers
from tests.conftest import make_model, write_examples
from tests.tokenizers import TEXTS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models, each with another tokenizer."""
    found = {}
    for number, name in enumerate(tokenizers.WORDS):
        folder = tmp_path_factory.mktemp("read") / name.replace(" ", "-")
        found[name] = make_model(folder, seed=number, vocab_size=400, hidden_size=32 + 16 * number)
        tokenizers.save(folder, name)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    return tmp_path / "t.jsonl"


def brute_force(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """All pairs of tokens that end at one character, each the last of its model that does."""
    found = []
    for i, (_, end) in enumerate(first):
        for j, (_, other) in enumerate(second):
            later = any(e == end for _, e in first[i + 1 :]) or any(e == end for _, e in second[j + 1 :])
            if end == other and not later:
                found.append((i, j))
    return found


@pytest.mark.parametrize("names", [("bytes", "metaspace"), ("bytes", "other bytes"), ("metaspace", "other bytes")])
@pytest.mark.parametrize("max_tokens", [None, 6])
def test_pairs_have_read_the_same(
    models: dict[str, Path], file: Path, names: tuple[str, str], max_tokens: int | None
) -> None:
    refs = [ModelRef(str(models[name])) for name in names]
    read = paired_texts(refs, file, len(TEXTS), max_tokens)
    made = [load_tokenizer(ref) for ref in refs]
    fewer = 0
    for number, text in enumerate(TEXTS):
        ids, spans = zip(*(tokens_at(tokenizer, text) for tokenizer in made), strict=True)
        for own, batch in zip(ids, read, strict=True):
            assert batch.ids[number] == own[:max_tokens]
        places = [batch.places[number] for batch in read if batch.places is not None]
        pairs = list(zip(*places, strict=True))
        limit = max_tokens or 1000
        assert pairs == [(i, j) for i, j in brute_force(spans[0], spans[1]) if max(i, j) < limit]
        assert pairs[0] == (0, 0)  # both have a BOS
        fewer += len(pairs) < min(map(len, ids))
        for i, j in pairs:
            said = [
                t.decode(own[: k + 1], skip_special_tokens=True) for t, own, k in zip(made, ids, (i, j), strict=True)
            ]
            assert said[0].strip() == said[1].strip() and "\ufffd" not in said[0]
    assert fewer


def test_inside_a_character_the_last_token_counts() -> None:
    assert partners([[0, 1, 1, 1, 4], [0, 1, 2, 4, 4]]) == [[0, 3, 4], [0, 1, 4]]
    assert partners([[2, 3], [4, 5]]) == [[], []]
    assert partners([[1, 2, 3], [1, 3], [2, 3]]) == [[2], [1], [1]]
    assert partners([[0, 1, 1], [0, 1]], max_tokens=2) == [[0], [0]]  # a character that is not whole yet


def test_a_blank_before_the_text_has_read_none_of_it(models: dict[str, Path], tmp_path: Path) -> None:
    """SentencePiece's way writes one before the first word, and says that it is the word's first character."""
    assert whole([(0, 0), (0, 1), (0, 5), (5, 6), (5, 6), (6, 9)]) == [True, False, True, False, True, True]
    write_jsonl(tmp_path / "t.jsonl", [{"text": "osts and"}])
    refs = [ModelRef(str(models[name])) for name in ("metaspace", "bytes")]
    read = paired_texts(refs, tmp_path / "t.jsonl", 1, None)
    tokens = [load_tokenizer(ref).convert_ids_to_tokens(batch.ids[0]) for ref, batch in zip(refs, read, strict=True)]
    assert tokens[0][:3] == ["<s>", "▁", "osts"]
    assert [batch.places[0][:2] for batch in read if batch.places is not None] == [[0, 2], [0, tokens[1].index("s", 3)]]


def test_line_breaks_before_a_text_count() -> None:
    refs = [ModelRef("a"), ModelRef("b")]
    check_same_reading([" a\n", "a\n "], refs, "here")
    with pytest.raises(UserError, match="here: a reads '\\\\nThe', b reads 'The', so that"):
        check_same_reading(["\nThe", "The"], refs, "here")


def test_one_tokenizer_keeps_all_tokens(models: dict[str, Path], file: Path) -> None:
    """Also those that end inside a character."""
    ref = ModelRef(str(models["bytes"]))
    read = paired_texts([ref, ref], file, 5, None)
    assert read[0].places is None and read[0] == read[1]


def test_tokenizers_that_read_other_characters(models: dict[str, Path], file: Path) -> None:
    refs = [ModelRef(str(models[name])) for name in ("bytes", "lower")]
    with pytest.raises(UserError) as caught:
        paired_texts(refs, file, 5, None)
    assert str(caught.value) == (
        f"{file}: text 1: {refs[0].location} reads 'The café costs €12,5', {refs[1].location} reads 'the café costs"
        " €12,5', so that their tokens cannot be paired; use models whose tokenizers keep texts as they are, or leave"
        " the text out"
    )


def last_stream(model: Any, ids: list[int], places: list[int]) -> Tensor:
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return states[-1][0, places].double()


def test_correlate(pkt: Run, models: dict[str, Path], file: Path, tmp_path: Path) -> None:
    """Sums over pairs are those of a loop over texts, whatever the minibatches; what is left out is said."""
    refs = [ModelRef(str(models[name])) for name in ("metaspace", "bytes")]
    given = ("--texts", file, "--num-texts", 5, "--batch-size", 2, "--layer-pairs", "proportional")
    status, printed, err = pkt(
        *("correlate", "--source", refs[0].location, "--target", refs[1].location, "--out", tmp_path / "c", *given)
    )
    assert status == 0, err
    read = paired_texts(refs, file, 5, 512)
    counts = [sum(map(len, batch.ids)) for batch in read]
    num_pairs = sum(map(len, read[0].places or []))
    said = (
        f"correlate: {num_pairs:,} tokens that end at one character in both, of {counts[0]:,} and {counts[1]:,}, layers"
    )
    assert printed.startswith(said)
    found = Correlation(tmp_path / "c")
    assert found.count == num_pairs and found.meta["tokens_of"] == counts
    loaded = [load_model(ref) for ref in refs]
    sides = []
    for model, batch in zip(loaded, read, strict=True):
        assert batch.places is not None
        sides.append(torch.cat([last_stream(model, *both) for both in zip(batch.ids, batch.places, strict=True)]))
    assert torch.allclose(found.of(None).cross("final"), sides[0].mT @ sides[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["all", "per_sequence", "mean", "last"])
def test_compare(pkt: Run, models: dict[str, Path], file: Path, tmp_path: Path, reduction: str) -> None:
    """Every reduction takes two tokenizers; over tokens the samples are the pairs."""
    given = ("--texts", file, "--num-texts", 5, "--reduction", reduction, "--metrics", tmp_path / "m.json")
    pair = ("--first", models["bytes"], "--second", models["metaspace"])
    status, _, err = pkt("compare", *pair, "--out", tmp_path / "c", *given)
    assert status == 0, err
    if reduction != "all":
        return
    from safetensors.torch import load_file

    found = load_file(tmp_path / "c" / "cka.safetensors")["cka.ffn_down"]
    refs = [ModelRef(str(models[name])) for name in ("bytes", "metaspace")]
    sides = []
    for ref, batch in zip(refs, paired_texts(refs, file, 5, None), strict=True):
        model, kept = load_model(ref), []
        handle = model.model.layers[1].mlp.down_proj.register_forward_hook(
            lambda _m, _i, out, kept=kept: kept.append(out[0])
        )
        with torch.no_grad():
            for ids in batch.ids:
                model(torch.tensor([ids]))
        handle.remove()
        sides.append(torch.cat([out[places] for out, places in zip(kept, batch.places or [], strict=True)]))
    sums = CkaSums()
    sums.add(*(centred_gram(side)[None] for side in sides))
    assert float(found[1, 1]) == pytest.approx(float(sums.cka()[0, 0]), abs=1e-6)


def test_examples_are_cut_before_the_same_word(models: dict[str, Path]) -> None:
    """Each model's own tokens before the first one that has a character of the last word."""
    for answer, word in (
        ("It is 1234656.", "1234656"),
        ("x = café(naïve)", "naïve"),
        ("so — 🙂🙂 ", "🙂🙂"),
        ("(A)", "A"),
    ):
        example = Example("e", "toy", "", answer)
        for name in ("bytes", "other bytes", "metaspace"):
            tokenizer = load_tokenizer(ModelRef(str(models[name])))
            found = locate(tokenizer, example, template="none", max_length=100, cut="word")
            text = render_prompt(tokenizer, "none", "") + answer.rstrip('. ")\n,]`')
            ids, spans = tokens_at(tokenizer, text)
            begins = text.rindex(word)
            place = min(i for i, span in enumerate(spans) if begins in range(*span))
            assert (found.context, found.predicted) == (ids[:place], ids[place]), (answer, name)
            last = locate(tokenizer, example, template="none", max_length=100)
            assert (last.context, last.predicted) == (ids[:-1], ids[-1])


def test_select_says_where_examples_are_cut(pkt: Run, models: dict[str, Path], tmp_path: Path) -> None:
    extract = write_examples(tmp_path / "e.jsonl", ["It is 1234567."])
    cuts = {}
    for name in ("bytes", "metaspace"):
        for cut in ("token", "word"):
            out = cuts[name, cut] = tmp_path / f"{name}-{cut}.safetensors"
            given = ("--extract", extract, "--out", out, "--cut", cut, "--scratch", tmp_path / "s")
            status, _, err = pkt("attribute", "--model", models[name], *given)
            assert status == 0, err

    def select(source: str, target: str) -> tuple[int, str]:
        scores = ("--source-scores", cuts["metaspace", source], "--target-scores", cuts["bytes", target])
        status, _, err = pkt("select", *scores, "--source", models["metaspace"], "--out", tmp_path / "o")
        return status, err

    assert select("word", "word") == (0, "")
    status, err = select("token", "token")
    assert status == 0 and err.startswith(
        "warning: the tokenizers divide the last word of 1 of 1 examples in different ways (source and target predict"
    )
    assert select("word", "token")[0] == 2
