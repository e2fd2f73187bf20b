"""The corpus of transcripts: it is read as it was meant, and what was written by hand cut anywhere as well."""

from __future__ import annotations

from dgemma_build.accept.transcript_corpus import Transcript, corpus
from dgemma_build.accept.transcripts import AT_LEAST, every_cut, means, parsed

CORPUS = corpus()


def test_there_are_enough_and_each_has_a_name() -> None:
    assert len({transcript.name for transcript in CORPUS}) == len(CORPUS) >= AT_LEAST
    assert corpus() == CORPUS


def test_all_mean_what_they_were_made_to_mean() -> None:
    wrong = [one.name for one in CORPUS if not means(one, parsed(one, [one.text]))]

    assert wrong == []


def test_what_was_written_by_hand_means_the_same_cut_anywhere() -> None:
    """The acceptance table's row cuts all of them."""
    wrong = []
    for one in CORPUS:
        whole = parsed(one, [one.text])
        if not one.name.startswith("seed") and any(parsed(one, pieces) != whole for pieces in every_cut(one.text)):
            wrong.append(one.name)

    assert wrong == []


def test_a_wrong_reading_is_seen() -> None:
    transcript = Transcript("wrong", "<|channel>thought\nHm<channel|>4", reasoning="Hm", content="5")

    assert not means(transcript, parsed(transcript, [transcript.text]))


def test_every_cut_is_there() -> None:
    cuts = list(every_cut("abcde"))

    assert all("".join(pieces) == "abcde" for pieces in cuts)
    assert {len(pieces[0]) for pieces in cuts if len(pieces) == 2} == {1, 2, 3, 4}
    assert ["ab", "cd", "e"] in cuts
    assert list("abcde") in cuts
