import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, roc_auc_score

from benchmarks.real_birds import macro_ap, macro_ap_of_folds, paired_gain
from src import metrics


def padded_cmap_of_kaggle(target, probability):
    ones = np.ones((5, target.shape[1]))
    return average_precision_score(np.vstack([target, ones]), np.vstack([probability, ones]), average="macro")


@given(st.integers(0, 10_000), st.integers(2, 40), st.sampled_from([1, 2, 8]))
@settings(deadline=None, max_examples=60)
def test_metrics_equal_scikit_learn_s_with_ties_and_weights(seed, n, decimals):
    rng = np.random.default_rng(seed)
    target, weight = (rng.random((n, 6)) < 0.3).astype(float), rng.integers(0, 4, n)
    weight[0] = 1
    probability = np.round(rng.random((n, 6)), decimals)
    precision, auc = metrics.per_class(target, probability, np.stack([np.ones(n), weight], axis=1))
    for c in range(6):
        for column, w in ((0, np.ones(n)), (1, weight)):
            if (target[:, c] * w).sum() > 0:
                assert precision[c, column] == pytest.approx(average_precision_score(target[:, c], probability[:, c], sample_weight=w))
                if ((1 - target[:, c]) * w).sum() > 0:
                    assert auc[c, column] == pytest.approx(roc_auc_score(target[:, c], probability[:, c], sample_weight=w))
    assert metrics.padded_cmap(target, probability)[0] == pytest.approx(padded_cmap_of_kaggle(target, probability))
    labelled = target.max(axis=1) > 0
    if labelled.any():
        ours = np.nanmean(metrics.ranking_precision(target, probability))
        assert ours == pytest.approx(label_ranking_average_precision_score(target[labelled], probability[labelled]))


def test_intervals_hold_the_value_and_shrink_with_more_rows(rng):
    def width(n):
        target = np.eye(4)[rng.integers(4, size=n)]
        estimates = metrics.score(target, target * 0.3 + rng.random((n, 4)))
        assert all(e.low <= e.value <= e.high for e in estimates.values())
        return estimates["macro_ap"].high - estimates["macro_ap"].low

    assert width(1000) < 0.6 * width(100)


def test_rows_and_classes_without_a_label_are_scored_as_promised():
    target = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]], float)
    probability = np.array([[0.9, 0.1, 0.2], [0.8, 0.2, 0.1], [0.1, 0.7, 0.1]])
    estimates = metrics.score(target, probability, resamples=5)
    assert estimates["macro_ap"].value == 1 and estimates["top1"].value == 1  # over two classes, over two rows
    assert np.isnan(metrics.top1(target, probability)[1])


def test_the_mean_over_folds_is_narrower_than_each_of_them():
    folds = [{"top1": metrics.Estimate(0.5, 0.4, 0.6)}, {"top1": metrics.Estimate(0.7, 0.6, 0.9)}]
    mean, deviation = metrics.mean_over(folds)["top1"]
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.6, 0.6 - 0.1 / 2**0.5, 0.6 + 0.05**0.5 / 2)) and deviation == pytest.approx(0.02**0.5)
    alone, deviation = metrics.mean_over(folds[:1])["top1"]
    assert alone == folds[0]["top1"] and np.isnan(deviation) and str(metrics.Estimate(np.nan, np.nan, np.nan)) == "–"


def test_intervals_are_scipy_s_bootstrap_put_around_the_value(rng):
    values = rng.exponential(0.1, 80)
    weights = metrics.bootstrap_weights(80, 4000)
    estimate = metrics.estimate(values @ weights / 80)
    low, high = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=rng).confidence_interval
    assert estimate.value == pytest.approx(values.mean()) and (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.003)
    assert estimate.high - estimate.value > 1.02 * (estimate.value - estimate.low)  # skewed as the values are


def test_a_gain_is_paired_and_folds_need_no_common_scale():
    """Six recordings of two folds; the second fold's model says everything more softly, which costs the pooled macro AP and not the folds' own."""
    target = np.eye(2)[[0, 1, 0, 0, 1, 0]]
    fold, one = np.array([0, 0, 0, 1, 1, 1]), np.ones((6, 1))
    ours = np.array([[0.9, 0.5], [0.5, 0.9], [0.9, 0.5], [0.4, 0.05], [0.3, 0.1], [0.4, 0.05]])
    theirs = ours[:, ::-1]
    assert macro_ap_of_folds(target, ours, one, fold)[0] == 1
    pooled = np.mean([average_precision_score(target[:, c], ours[:, c]) for c in range(2)])
    assert macro_ap(target, ours, one)[0] == pytest.approx(pooled) and pooled < 1
    gain = paired_gain(target, ours, theirs, 50)
    assert gain["top1"].value == pytest.approx((5 - 1) / 6)  # the softly spoken fourth's neighbour, the fifth, is wrong for ours and right for theirs
    assert gain["macro_ap"].value == pytest.approx(macro_ap(target, ours, one)[0] - macro_ap(target, theirs, one)[0])
    same = paired_gain(target, ours, ours, 50)["top1"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
