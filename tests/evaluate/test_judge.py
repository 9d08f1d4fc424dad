"""The judge: what the published reader takes, what the strict one takes, and the means."""

from __future__ import annotations

import pytest

from w2c_tui.core.conversation import Attachment
from w2c_tui.evaluate import judge

TEN = (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)
# reply, the ratings as published, strictly
REPLIES = [
    ("10,9,8,7,6,5,4,3,2,1", TEN, TEN),
    ("10, 9, 8, 7, 6, 5, 4, 3, 2, 1", TEN, TEN),
    ("  10,9,8,7,6,5,4,3,2,1  ", TEN, TEN),
    ("10,9,8,7,6,5,4,3,2,1,", TEN, TEN),
    (",10,9,8,7,6,5,4,3,2,1,", TEN, TEN),
    ("10\n9\n8\n7\n6\n5\n4\n3\n2\n1", TEN, TEN),
    ("10,9,8,7\n6,5\n4,3,2\n1", TEN, TEN),
    ("10,9,8,7,6,5,4,3,2,1\n", TEN, TEN),
    ("10 ,9 ,8 ,7 ,6 ,5 ,4 ,3 ,2 ,1", TEN, TEN),
    ("+10,9,8,7,6,5,4,3,2,1", TEN, TEN),
    # Empty places drop the reply as published.
    ("10,9,8,7,\n6,5,\n4,3,2,\n1", None, TEN),
    ("10,,9,8,7,6,5,4,3,2,1", None, TEN),
    ("10,9,8,7\n\n6,5,4,3,2,1", None, TEN),
    # So does everything that is not a whole number.
    ("10.0,9,8,7,6,5,4,3,2,1", None, TEN),
    ("9.5,9,8,7,6,5,4,3,2,1", None, (9.5, *TEN[1:])),
    ("10 9 8 7 6 5 4 3 2 1", None, TEN),
    ("[10,9,8,7,6,5,4,3,2,1]", None, TEN),
    ("Scores: 10,9,8,7,6,5,4,3,2,1", None, TEN),
    ("10;9;8;7;6;5;4;3;2;1", None, TEN),
    ("10,9,8,7,6,5,4,3,2,1.", None, TEN),
    ("10,9,8,7,6,5,4,3,2", None, None),
    ("10,9,8,7,6,5,4,3,2,1,0", None, None),
    ("", None, None),
    ("I cannot rate these pages.", None, None),
    ("nine", None, None),
    ("1. 10\n2. 9", None, None),
    # Numbers out of range pass as published.
    ("11,9,8,7,6,5,4,3,2,1", (11, *TEN[1:]), None),
    ("-1,9,8,7,6,5,4,3,2,1", (-1, *TEN[1:]), None),
]


@pytest.mark.parametrize(("reply", "published", "strict"), REPLIES)
def test_replies_are_read_as_published_and_strictly(reply, published, strict):
    assert judge.published_ratings(reply) == published
    assert judge.strict_ratings(reply) == strict


def test_the_four_scores_are_the_means_of_their_criteria():
    judged = judge.published_scores(["8,8,8,4,6,2,9,3,3,5"])
    assert judged.scores == {"VSA": 7.0, "CAD": 4.0, "TCC": 5.0, "UII": 5.0}
    assert judged.overall == 5.25


def test_unreadable_and_missing_replies_are_left_out_as_published_and_zero_strictly():
    perfect = ",".join(["10"] * 10)
    published = judge.published_scores([perfect, "no idea"])
    assert (published.overall, published.num_pages, published.num_asked) == (10.0, 1, 2)
    strict = judge.strict_scores([perfect, "no idea", None, perfect])
    assert (strict.overall, strict.num_pages, strict.num_asked) == (5.0, 2, 4)
    assert judge.published_scores([]).overall == judge.strict_scores([]).overall == 0.0


def test_the_request_names_all_criteria_and_shows_the_original_first():
    pictures = [Attachment(b"x", digit * 64, 1, 1) for digit in "01"]
    (message,) = judge.request(*pictures)
    assert message.attachments == tuple(pictures)
    assert all(name in message.text for name, _ in judge.CRITERIA)
    assert sum(len(range(10)[part]) for part in judge.GROUPS.values()) == len(judge.CRITERIA) == 10
