import pytest
import torch
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_calibration_error

from kd.evaluation.metrics import BINS, Measures, against_teacher, agreement, calibration_bins, calibration_error
from kd.objective import losses
from kd.objective.target import Target
from tests.cases import close, dense, logits

N, V, D = 200, 17, 8


def sure(*p: float) -> torch.Tensor:
    """Two tokens, the first of which has these probabilities."""
    p = torch.tensor(p)
    return torch.stack([p, 1 - p], -1).log()


@pytest.fixture
def validation():
    """A student's head, hidden states and labels, and a teacher's target."""
    torch.manual_seed(0)
    head = torch.nn.Linear(D, V)
    hidden, label = torch.randn(N, D), torch.randint(V, (N,))
    teacher = (head(hidden).detach() * 3 + torch.randn(N, V)).log_softmax(-1)
    return head, hidden, label, Target(label, teacher)


def measured(validation, chunk: int = N, parts: int = N) -> dict[str, float]:
    head, hidden, label, target = validation
    measures = Measures(chunk)
    for start in range(0, N, parts):
        part = slice(start, start + parts)
        measures.update(head, hidden[part], label[part], target[part].__getitem__)
    return measures.result()


def test_calibration_error_by_hand():
    logp = sure(0.9, 0.9, 0.62, 0.62, 0.35)
    bins = calibration_bins(logp, torch.tensor([0, 1, 0, 0, 1]))
    counts = torch.zeros(BINS)
    counts[[9, 13]] = torch.tensor([3.0, 2.0])  # 0.62 and 0.65 share a bin
    close(bins[:, 0], counts)
    assert calibration_error(bins) == pytest.approx((abs(3 - 0.62 * 2 - 0.65) + abs(1 - 1.8)) / 5)


def test_a_sure_and_right_student_is_calibrated():
    bins = calibration_bins(sure(1.0, 1.0), torch.tensor([0, 0]))
    assert bins[-1].tolist() == [2, 2, 2]
    assert calibration_error(bins) == 0


def test_calibration_error_is_that_of_torchmetrics():
    for seed in range(5):
        p = logits(seed, N, V).softmax(-1)
        label = torch.where(torch.arange(N) % 2 == 0, p.argmax(-1), torch.arange(N) % V)
        expected = multiclass_calibration_error(p, label, V, n_bins=15, norm="l1")
        assert calibration_error(calibration_bins(p.log(), label)) == pytest.approx(expected.item(), abs=1e-6)


def test_agreement_counts_equal_first_tokens():
    teacher = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 5.0, 2.0]])
    student = torch.tensor([[1.0, 0.0, 0.9], [0.0, 1.0, 0.5], [0.0, 9.0, 0.0]])
    close(agreement(student.log_softmax(-1), dense(teacher)), [1.0, 0.0, 1.0])


def test_measures_are_means_over_all_positions(validation):
    head, hidden, label, target = validation
    with torch.no_grad():
        z = head(hidden)
    student = z.log_softmax(-1)
    expected = {
        "lm": functional.cross_entropy(z, label).item(),
        "teacher_lm": functional.nll_loss(target.logp, label).item(),
        "ece": multiclass_calibration_error(z.softmax(-1), label, V, n_bins=15, norm="l1").item(),
        "teacher_ece": multiclass_calibration_error(target.logp.exp(), label, V, n_bins=15, norm="l1").item(),
        "fkl": functional.kl_div(student, target.logp, log_target=True, reduction="batchmean").item(),
        "rkl": functional.kl_div(target.logp, student, log_target=True, reduction="batchmean").item(),
        "tvd": losses.tvd(student, target).mean().item(),
        "accuracy": (z.argmax(-1) == label).double().mean().item(),
        "teacher_accuracy": (target.logp.argmax(-1) == label).double().mean().item(),
        "agreement": (z.argmax(-1) == target.logp.argmax(-1)).double().mean().item(),
    }
    result = measured(validation)
    assert result == pytest.approx(result | expected, rel=1e-5)
    assert result.keys() == expected.keys() | against_teacher().keys()


@pytest.mark.parametrize(("chunk", "parts"), [(1, N), (7, N), (1000, N), (64, 1), (64, 33), (3, 7)])
def test_measures_depend_neither_on_chunks_nor_on_updates(validation, chunk, parts):
    assert measured(validation, chunk, parts) == pytest.approx(measured(validation), rel=1e-6)


def test_without_a_teacher_only_the_student_is_measured(validation):
    head, hidden, label, _ = validation
    measures = Measures(64)
    measures.update(head, hidden, label, None)
    whole = measured(validation)
    assert measures.result() == pytest.approx({name: whole[name] for name in ("lm", "ece", "accuracy")})


def test_a_student_that_is_its_teacher(validation):
    head, hidden, label, _ = validation
    measures = Measures(64)
    with torch.no_grad():
        measures.update(head, hidden, label, Target(label, head(hidden).log_softmax(-1)).__getitem__)
    result = measures.result()
    assert [result[name] for name in ("fkl", "rkl", "tvd", "agreement")] == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert result["lm"] == pytest.approx(result["teacher_lm"])
    assert result["ece"] == pytest.approx(result["teacher_ece"])
