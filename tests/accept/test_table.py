"""The file of the acceptance table, where single rows are measured again."""

from __future__ import annotations

from dgemma_build.accept.__main__ import ROWS, _merged


def test_rows_measured_again_take_their_places() -> None:
    first, second, third, *_ = (row.what for row in ROWS)
    old = [
        {"what": first, "figure": "old"},
        {"what": third, "figure": "old"},
        {"what": "a row no more", "figure": "old"},
    ]
    new = [{"what": third, "figure": "new"}, {"what": second, "figure": "new"}]
    merged = _merged(old, new)
    assert [(row["what"], row["figure"]) for row in merged] == [(first, "old"), (second, "new"), (third, "new")]
