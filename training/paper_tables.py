"""The paper's tables, as data: which networks a table trains, and what it found."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from model.methods import METHODS
from training import published
from training.published import S1_RUNS, S3_RUNS, Published


class Row(NamedTuple):
    """One network of a table.

    Attributes:
        x: where it stands on the table's axis, such as a method's or a depth.
        settings: of the recipe, that make it this network.
        series: which curve it belongs to, where a table compares two.
        weights: that the paper's network learned, where it says.
    """

    x: str
    settings: Mapping[str, Any]
    series: str = ""
    weights: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Unique in its table."""
        return f"{self.x} {self.series}".strip()

    def is_called(self, name: str) -> bool:
        """Whether a user's `name` means this row: by its name, or a part of it, or its method."""
        return name.lower() in {part.lower() for part in (self.name, self.x, self.series, self.settings["method"])}


class Table(NamedTuple):
    """One of the paper's tables.

    Attributes:
        title: as a heading.
        axis: what `Row.x` says.
        rows: in the paper's order.
        published: by data set and row's name; nothing for a data set that the paper's table does not have.
        picture: "rows" draws the rows side by side, "runs" the runs of one row in their order, as Fig. 4.
        shows_weights: whether the learned weights belong to it.
        notes: sentences below it, for the data sets that the paper has.
    """

    title: str
    axis: str
    rows: tuple[Row, ...]
    published: Mapping[str, Mapping[str, Published]]
    picture: Literal["rows", "runs"] = "rows"
    shows_weights: bool = False
    notes: tuple[str, ...] = ()


def _table_3() -> dict[str, dict[str, Published]]:
    columns = {data: {name: Published(value) for name, value in c.items()} for data, c in published.TABLE_3.items()}
    for name, runs in (("S1", S1_RUNS), ("S3", S3_RUNS)):
        columns["cifar10"][name] = runs._replace(cell=published.TABLE_3["cifar10"][name])
    return columns


def _deep_rows() -> tuple[Row, ...]:
    rows = []
    for layers, deep in published.TABLE_6.items():
        rows.append(Row(f"{layers}", {"backbone": f"plain{layers}", "method": "normal"}, "Normal"))
        rows.append(Row(f"{layers}", {"backbone": f"plain{layers}", "method": "S1"}, "Interflow", deep.weights))
    return tuple(rows)


_WEIGHTS_NOTE = (
    "Signs and sizes of weights are not identified: a branch with (w, z) is the same network as one with (-w, -z), and "
    "branches that share a linear layer flip together."
)

TABLES = {
    "table1": Table(
        "Table I: Normal networks by number of convolutions",
        "convolutions",
        # all 13 are the whole network: the cell of Table III's Normal
        tuple(Row(f"{n}", {"method": "normal", "depth": None if n == 13 else n}) for n in published.TABLE_1),
        {"cifar10": {f"{n}": Published(value) for n, value in published.TABLE_1.items()}},
    ),
    "table3": Table(
        "Table III: the methods",
        "method",
        tuple(Row(name, {"method": name}) for name in METHODS),
        _table_3(),
        notes=(
            "The paper's Table III looks like the best of several runs: its S3 on CIFAR-10, 92.12, is the maximum of "
            "the ten runs of Table VII (mean 91.89), and its S1, 92.04, is above the mean of the thirty of Table IV "
            "(91.81). Where the paper has a mean, ours is compared with that; elsewhere with the published cell, which "
            "may be a maximum.",
        ),
    ),
    "table4": Table(
        "Table IV: runs of S1",
        "method",
        (Row("S1", {"method": "S1"}, weights=published.TABLE_4_WEIGHTS),),
        {"cifar10": {"S1": S1_RUNS}},
        picture="runs",
        shows_weights=True,
        notes=(
            "The paper's variances of the weights over 30 runs: "
            f"{' '.join(f'{v:.4f}' for v in published.TABLE_4_WEIGHT_VARIANCES)}; without its 13th run, which ended "
            f"with other signs, its means are {' '.join(f'{v:.4f}' for v in published.TABLE_4_WEIGHTS_WITHOUT_13)}.",
            _WEIGHTS_NOTE,
        ),
    ),
    "table6": Table(
        "Table VI: very deep plain networks, without and with Interflow",
        "convolutions",
        _deep_rows(),
        {
            "cifar10": {
                f"{layers} {series}": Published(value)
                for layers, deep in published.TABLE_6.items()
                for series, value in (("Normal", deep.normal), ("Interflow", deep.interflow))
            }
        },
        shows_weights=True,
        notes=(_WEIGHTS_NOTE,),
    ),
    "table7": Table(
        "Table VII: runs of S3",
        "method",
        (Row("S3", {"method": "S3"}),),
        {"cifar10": {"S3": S3_RUNS}},
        picture="runs",
        notes=(f"The paper's ten runs: {' '.join(f'{value:.2f}' for value in published.TABLE_7)}.",),
    ),
    "fig4": Table(
        "Fig. 4: accuracy and learned weights of S1, run by run",
        "method",
        (Row("S1", {"method": "S1"}, weights=published.TABLE_4_WEIGHTS),),
        {"cifar10": {"S1": S1_RUNS}},
        picture="runs",
        shows_weights=True,
        notes=("The same runs as Table IV's.", _WEIGHTS_NOTE),
    ),
}
"""By the name that `training/reproduce.py` gives them."""
