from __future__ import annotations

from pkt_stages.encoding import Encoded
from pkt_stages.models.recipe import TrainingParams
from pkt_stages.models.train_set import collate, counts, rows

EXAMPLES = [Encoded([0, 7, 8, 9, 1], [-100, -100, -100, 9, 1]), Encoded([0, 5, 1], [-100, 5, 1])]


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate(rows(EXAMPLES))
    assert batch["input_ids"].tolist() == [[0, 7, 8, 9, 1], [0, 5, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 9, 1], [-100, 5, 1, -100, -100]]


def test_what_is_counted() -> None:
    """Seven examples in batches of two are four steps an epoch; the first token's label is never used."""
    examples = [Encoded([7, 8, 9, 1], [7, -100, 9, 1])] * 7
    assert counts(examples, TrainingParams(epochs=3, batch_size=2)) == {
        "num_examples": 7,
        "num_steps": 12,
        "num_supervised_tokens": 42,
    }
