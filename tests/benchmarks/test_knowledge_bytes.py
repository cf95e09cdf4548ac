"""`benchmarks/knowledge_bytes.py`: its bytes and rates against those counted by hand."""

import pytest
from knowledge_bytes import STUDENTS, Case, bytes_a_token, figures, objective_of, savings

STUDENT = STUDENTS["6x768"]
BY_HAND = {
    Case("att-mse"): 2 * 768 * 2,
    Case("hid-seq"): 768 * 2,
    Case("hid-seq", "int8"): 768 + 2,  # and a scale
    Case("hid-cls"): 768 * 2 / 128,
    Case("minilmv2"): 3 * 768 * 2,
    Case("tinybert"): 6 * 2 * 768 * 2 + 7 * 768 * 2,  # embeddings and six layers
    Case("att-mse", "fp16", "10t", "attention"): (12 * 10 * 128 * 2 + 10) / 128,
    Case("hid-seq", "int8", "1l_10t_0.1h"): 10 * (77 + 2) / 128,
    Case("hid-seq", "int8", "1l_10t_0.1h", "attention", "importance"): 10 * (77 + 2 + 1 + 96) / 128,
    Case("vanilla-kd"): 19 * 30522 * 2 / 128,
}


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_bytes_are_those_counted_by_hand(case: Case) -> None:
    assert bytes_a_token(case, STUDENT) == BY_HAND[case]


def test_rates_and_hours_follow_from_flops() -> None:
    """Att-MSE of 12x768 -> 6x768, as docs count it: 162.4 and 226.1 MFLOP a token."""
    layer, projections = 24 * 768**2 + 4 * 128 * 768, 4 * 768**2
    scores = 2 * 128 * 768  # of one model; the student's goes backward twice
    teacher = 11 * layer + projections
    student = 3 * (5 * layer + projections) + scores + 3 * scores
    found = figures(Case("att-mse"), flops_per_second=1e12)
    assert found["write"] == pytest.approx(3072 * 1e12 / teacher)
    assert found["read"]["6x768"] == pytest.approx(3072 * 1e12 / student)
    saved = savings("att-mse", flops_per_second=1e12)
    assert saved["hours"] == pytest.approx(13.1e9 * teacher / 1e12 / 3600)
    assert saved["ratio"]["6x768"] == pytest.approx((teacher + student) / student)


def test_zstd_takes_the_share_that_was_measured() -> None:
    plain, packed = (Case("vanilla-kd", top_k=50, zstd=zstd) for zstd in (False, True))
    share = bytes_a_token(packed, STUDENT) / bytes_a_token(plain, STUDENT)
    assert 0.2 < share < 0.9
    assert objective_of("vanilla-kd", STUDENT).names == ("kd", "mlm")
