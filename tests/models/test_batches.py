from __future__ import annotations

from pkt_stages.models.batches import padded, padding_mask

ROWS = [[5, 6, 7], [8]]


def test_rows_are_filled_up_on_either_side() -> None:
    assert padded(ROWS, -100).tolist() == [[5, 6, 7], [8, -100, -100]]
    assert padded(ROWS, 0, left=True).tolist() == [[5, 6, 7], [0, 0, 8]]


def test_the_mask_hides_what_was_filled_up() -> None:
    assert padding_mask(ROWS).tolist() == [[1, 1, 1], [1, 0, 0]]
    assert padding_mask(ROWS, left=True).tolist() == [[1, 1, 1], [0, 0, 1]]
