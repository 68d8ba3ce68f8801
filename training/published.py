"""The figures of the paper (Interflow, Sec. IV), as data: test accuracies in %, and learned weights."""

from typing import NamedTuple


class Published(NamedTuple):
    """What our mean of a row is compared with.

    Attributes:
        accuracy: %, of one run or, with `runs`, the mean of so many.
        variance: over these runs, where the paper gives it.
        runs: behind `accuracy`; 1 where the paper does not say.
        cell: %, what the table itself prints, where a mean stands elsewhere in the paper.
    """

    accuracy: float
    variance: float | None = None
    runs: int = 1
    cell: float | None = None


S1_RUNS = Published(91.81, variance=0.020, runs=30)
"""Table IV: method S1 on CIFAR-10."""
S3_RUNS = Published(91.89, variance=0.01, runs=10)
"""Table VII: method S3 on CIFAR-10."""

TABLE_1 = {4: 83.21, 5: 85.85, 6: 86.41, 7: 87.02, 8: 90.39, 9: 90.53, 10: 90.70, 11: 91.01, 12: 90.40, 13: 91.12}
"""Accuracy on CIFAR-10 by number of convolutions."""

_METHODS = ("normal", "S0", "S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9")
_TABLE_3 = {
    "cifar10": (91.12, 91.75, 92.04, 91.74, 92.12, 91.93, 91.75, 91.97, 91.68, 91.64, 91.81),
    "cifar100": (67.78, 68.95, 68.68, 68.45, 68.53, 69.05, 68.11, 68.31, 68.23, 68.46, 68.44),
    "svhn": (93.91, 94.23, 94.17, 94.32, 94.25, 94.30, 94.20, 94.34, 94.22, 94.24, 94.27),
    "mnist": (99.39, 99.50, 99.54, 99.58, 99.57, 99.55, 99.54, 99.56, 99.57, 99.54, 99.56),
    "kmnist": (96.61, 97.12, 97.08, 97.14, 97.10, 97.17, 97.11, 97.10, 97.10, 97.12, 97.16),
    "fashion_mnist": (93.18, 93.38, 93.55, 93.32, 93.36, 93.64, 93.41, 93.43, 93.38, 93.57, 93.47),
}
TABLE_3 = {data: dict(zip(_METHODS, column, strict=True)) for data, column in _TABLE_3.items()}
"""Accuracy by data set and method. Looks like the best of several runs: S3 on CIFAR-10 is Table VII's maximum."""

TABLE_4_WEIGHTS = (-0.6881, 0.6791, 0.1978, 2.3720)
"""Mean learned weights of the four branches over the 30 runs of S1."""
TABLE_4_WEIGHT_VARIANCES = (0.0439, 0.0462, 0.2256, 0.4428)
TABLE_4_WEIGHTS_WITHOUT_13 = (-0.7269, 0.6959, 0.2860, 2.4949)
"""Without the 13th run, which ended with other signs."""


class Deep(NamedTuple):
    """A row of Table VI: accuracies on CIFAR-10, and the weights that Interflow learned, shallow to deep."""

    normal: float
    interflow: float
    weights: tuple[float, ...]


TABLE_6 = {
    40: Deep(91.03, 91.60, (-2.4543, -1.1796, 0.7401, 0.6060, 0.3428)),
    50: Deep(82.21, 91.55, (2.7535, 0.5910, -0.4226, -0.2770, -0.2512, -0.1325, 0.0196)),
    60: Deep(31.48, 90.39, (2.9065, -0.2477, -0.4238, 0.0191, -0.1099, -0.3008, -0.3012, -0.1194, -0.3278)),
    70: Deep(29.88, 90.36, (
        2.8246, -0.5821, -0.0617, -0.1784, -0.3335, -0.3279, -0.0849, -0.0069, 0.0001, -0.0058, -0.0276,
    )),
    80: Deep(35.29, 88.05, (
        -2.6898, 0.5479, 0.2242, 0.2640, 0.1101, 0.2565, -0.0210, 0.0209, 0.1539, -0.0346, 0.0012, -0.0534, 0.7578,
    )),
    90: Deep(10.00, 87.55, (
        3.8587, -0.4778, -0.2281, -0.0808, 0.0410, -0.0608, -0.0877, 0.0568, -0.0199, 0.1128, -0.4170, -0.0108,
        -0.0486, -2.0337, 0.1874,
    )),
    100: Deep(10.01, 85.91, (
        -2.0836, 0.3801, 0.0767, 0.1188, -0.0165, -0.0480, -0.0364, -0.0364, -0.0212, 0.0002, 0.0034, -0.0327,
        -0.1295, -0.0127, 1.3403,
    )),
}  # fmt: skip
"""By number of convolutions."""

TABLE_7 = (91.75, 91.89, 91.77, 91.87, 91.92, 91.95, 91.95, 91.92, 91.75, 92.12)
"""Accuracies of the ten runs of S3 on CIFAR-10."""
