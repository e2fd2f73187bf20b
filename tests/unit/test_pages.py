"""Page accounting: nothing leaks, nothing is held twice, nothing that is still visible is given back."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_runtime.pages import PagePool, PageRules, PageTable


def held(table: PageTable) -> tuple[list[int], list[int]]:
    view = table.view
    return view.full.tolist(), [page for page in view.sliding.tolist() if page >= 0]


def test_a_sequence_grows_page_by_page() -> None:
    full, sliding = PagePool(10), PagePool(10)
    rules = PageRules(page_size=4, sliding_window=6, max_encode_tokens=4)
    table = PageTable(full, sliding, rules, rules.need(20))
    table.extend(1)
    assert (len(table.view.full), full.used, sliding.used) == (1, 1, 1)
    table.extend(4)
    assert full.used == 1
    table.extend(5)
    assert full.used == 2
    table.release()
    assert full.used == sliding.used == 0
    assert full.unreserved == sliding.unreserved == 10


def test_sliding_pages_go_back_once_no_token_sees_them() -> None:
    full, sliding = PagePool(10), PagePool(10)
    rules = PageRules(page_size=4, sliding_window=6, max_encode_tokens=8)
    table = PageTable(full, sliding, rules, rules.need(24))
    table.extend(8)
    table.trim(8)  # sees from 8 - 5 = 3 on: the first page is still visible
    assert (table.view.sliding >= 0).tolist() == [True, True]
    table.trim(9)  # sees from 4 on
    assert (table.view.sliding >= 0).tolist() == [False, True]
    assert (full.used, sliding.used) == (2, 1)
    table.trim(9)
    assert sliding.used == 1


def test_a_view_in_use_never_changes() -> None:
    pool = PagePool(10)
    rules = PageRules(page_size=4, sliding_window=2, max_encode_tokens=8)
    table = PageTable(pool, PagePool(10), rules, rules.need(16))
    table.extend(8)
    before = table.view
    full, sliding = before.full.copy(), before.sliding.copy()
    table.extend(12)
    table.trim(12)
    assert np.array_equal(before.full, full)
    assert np.array_equal(before.sliding, sliding)
    again = table.view
    table.extend(12)
    table.trim(12)
    assert table.view is again, "without a change the engine sees the same object"


def test_pages_given_back_last_are_taken_first() -> None:
    pool = PagePool(4)
    taken = pool.take(3)
    assert taken.tolist() == [0, 1, 2]
    pool.give_back(taken[1:2])
    assert pool.take(2).tolist() == [1, 3]


@given(
    page_size=st.integers(1, 9),
    window=st.integers(1, 30),
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=40),
)
def test_a_sequence_stays_within_its_reservation(page_size: int, window: int, chunks: list[int]) -> None:
    rules = PageRules(page_size, window, max(chunks))
    need = rules.need(sum(chunks))
    full, sliding = PagePool(need.full), PagePool(need.sliding)
    table = PageTable(full, sliding, rules, need)
    length = 0
    for chunk in chunks:
        table.extend(length + chunk)  # raises when the reservation is too small
        length += chunk
        table.trim(length)
        visible = range(max(0, length - (window - 1)), length)
        assert all(table.view.sliding[position // page_size] >= 0 for position in visible)
        gone = [page for page in range(len(table.view.sliding)) if table.view.sliding[page] < 0]
        assert all((page + 1) * page_size <= length - (window - 1) for page in gone)
        assert sliding.used == len(table.view.sliding) - len(gone)
        assert sliding.used <= -(-(window - 1) // page_size) + 1, "nothing is held that has left every window"
    table.release()
    assert full.used == sliding.used == 0


@settings(max_examples=60)
@given(st.data())
def test_many_sequences_never_share_or_leak_pages(data: st.DataObject) -> None:
    full, sliding = PagePool(40), PagePool(25)
    rules = PageRules(page_size=3, sliding_window=8, max_encode_tokens=7)
    live: dict[PageTable, int] = {}
    limits: dict[PageTable, int] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["join", "grow", "grow", "leave"]))
        if action == "join":
            total = data.draw(st.integers(1, 45))
            need = rules.need(total)
            if need.full <= full.unreserved and need.sliding <= sliding.unreserved:
                table = PageTable(full, sliding, rules, need)
                live[table], limits[table] = 0, total
        elif live:
            table = data.draw(st.sampled_from(list(live)))
            if action == "leave":
                table.release()
                del live[table]
            else:
                chunk = data.draw(st.integers(1, 7))
                if live[table] + chunk <= limits[table]:
                    table.extend(live[table] + chunk)
                    live[table] += chunk
                    table.trim(live[table])
        for pool, index in ((full, 0), (sliding, 1)):
            pages = [page for table in live for page in held(table)[index]]
            assert len(set(pages)) == len(pages) == pool.used
            assert all(0 <= page < pool.num_pages for page in pages)
    for table in live:
        table.release()
    assert (full.used, full.unreserved, sliding.used, sliding.unreserved) == (0, 40, 0, 25)
