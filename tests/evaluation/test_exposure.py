"""Excess accumulated error of a student's own text."""

import numpy as np
import pytest
import torch

from kd.data.batches import ValidationBatches
from kd.evaluation import metrics
from kd.evaluation.exposure import excess_error, teacher_gap
from kd.teachers.online import OnlineTeacher
from tests.cases import close
from tests.evaluation.written import written
from tests.rollout.test_generate import T, model


def test_excess_error_by_hand():
    by_student = torch.tensor([[2, 2.0], [2, 4.0], [1, 3.0], [1, 5.0], [0, 0.0]])  # means 1, 2, 3, 5
    oracle = torch.tensor([[4, 4.0], [2, 2.0], [2, 2.0], [0, 0.0], [0, 0.0]])  # means 1, 1, 1
    # R = 1, 3, 6 and l eps(l) = 1, 2, 3; nothing is known of a fourth token.
    close(excess_error(by_student, oracle), [0.0, 0.5, 1.0])
    close(excess_error(oracle, by_student), [0.0, -1 / 3, -1 / 2])


def test_a_student_that_is_its_teacher_has_no_excess_error():
    by_student = torch.tensor([[2, 0.0], [2, 0.0], [0, 0.0]])
    close(excess_error(by_student, by_student), [0.0, 0.0])
    assert len(excess_error(by_student[2:], by_student)) == 0


def test_the_gap_is_what_plain_loops_say():
    student, teacher = model("llama", 0).eval(), model("gpt2", 1).eval()
    text, generated = written()
    by_place, bins = np.zeros((T, 4)), torch.zeros(metrics.BINS, 3, dtype=torch.float64)
    with torch.no_grad():
        q, p = (m.model(input_ids=generated.ids).logits.double().log_softmax(-1) for m in (student, teacher))
    for row, (prompt, end) in enumerate(text.span):
        for place, at in enumerate(range(prompt - 1, end - 1)):  # the position that says token `at` + 1
            a, b = q[row, at], p[row, at]
            values = ((b.exp() * (b - a)).sum(), (a.exp() * (a - b)).sum(), (a.exp() - b.exp()).abs().sum() / 2)
            by_place[place] += [1, *(x.item() for x in values)]
            sure, best = a.exp().max(0)
            bins[int(sure * metrics.BINS)] += torch.tensor([1, sure.item(), b[best].exp().item()])
    assert by_place[0, 0] == 5 and 0 < by_place[6, 0] < 5  # some responses are shorter than others

    for rows, chunk in ((5, None), (2, 3)):
        batches = ValidationBatches(text.tokens, rows, response_spans=text.span)
        got = teacher_gap(student, OnlineTeacher(teacher), batches, T, chunk)
        close(got.by_place, by_place, rtol=1e-4)
        close(got.bins, bins, rtol=1e-4)
    means = got.means()
    total = by_place.sum(0)
    assert (means["rkl"], means["tvd"]) == pytest.approx((total[2] / total[0], total[3] / total[0]), rel=1e-4)
    assert means["ece"] == pytest.approx(((bins[:, 2] - bins[:, 1]).abs().sum() / total[0]).item(), rel=1e-4)


def test_a_student_that_is_its_teacher_has_no_gap():
    same, (text, _) = model("llama", 0).eval(), written()
    got = teacher_gap(same, OnlineTeacher(same), ValidationBatches(text.tokens, 5, response_spans=text.span), T, None)
    assert list(got.means().values()) == pytest.approx([0, 0, 0], abs=1e-5)
