"""Report on a run or an artefact: `python training/evaluate.py --help`."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from model.contract import InterflowError
from training import cli
from training.evaluation import evaluate, figures
from training.evaluation_data import SPLITS, EvaluationData, load_images
from training.files import write_text
from training.loop import choose_device
from training.recipe import Recipe
from training.report import load_explanations, render
from training.run import newest_finished
from training.subjects import Subject, open_subject

REPORTS = Path("reports")


def main(arguments: list[str] | None = None) -> int:
    """Evaluate one network on one split and write its report; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Evaluate a run (in PyTorch) or an artefact (in onnxruntime, as it is served), and write a report: "
        "one HTML file that needs nothing else, and its numbers as JSON beside it."
    )
    parser.add_argument(
        "subject",
        nargs="?",
        type=Path,
        help="runs/<run> or exports/<model>/<version>; default: the newest finished run",
    )
    parser.add_argument("--data", help="a set's name or a folder, as in training/train.py; default: the network's own")
    parser.add_argument(
        "--split", choices=SPLITS, help="default: test; all of another folder that has no train/ and test/ in it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="HTML", help=f"default: {REPORTS}/<run or model>-<data>-<split>.html"
    )
    parser.add_argument(
        "--explanations",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="JSON of benchmarks/explanations.py, and its picture, to be shown, too",
    )
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--data-dir", type=Path, help=f"{Recipe.model_fields['data_dir'].description} (default: data)")
    add("--workers", type=cli.whole_number, help=Recipe.model_fields["workers"].description)
    add("--skip-bad-images", action="store_true", help=Recipe.model_fields["skip_bad_images"].description)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="that a run is evaluated on")
    settings = vars(parser.parse_args(arguments))
    own = {
        name: settings.pop(name) for name in list(settings) if name not in ("data_dir", "workers", "skip_bad_images")
    }

    if own["out"]:
        _require_free(own["out"])
    explanations = load_explanations(*own["explanations"][:2]) if own["explanations"] else None
    subject = open_subject(own["subject"] or newest_finished().folder, choose_device(own["device"]))
    data = load_images(subject, own["data"], own["split"], settings)
    out = own["out"] or REPORTS / f"{report_name(subject, data)}.html"
    _require_free(out)

    evaluation = evaluate(subject, data, settings.get("workers", Recipe().workers))
    found = figures(evaluation) | ({"explanations": explanations.figures} if explanations else {})
    page = render(evaluation, found, explanations)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text(out, page)  # last: where it is, the numbers are, too
    print(summary(found))
    print(f"report: {out} ({len(page.encode()) / 1e6:.1f} MB), numbers: {out.with_suffix('.json')}")
    return 0


def report_name(subject: Subject, data: EvaluationData) -> str:
    """Of a report's files: what was evaluated on what."""
    who = subject.folder.resolve().name
    if subject.kind == "artefact":
        who = f"{subject.card.name}-{subject.card.version}"
    return f"{who}-{data.name}-{data.split}"


def summary(found: dict[str, Any]) -> str:
    """The figures in a few lines, for a terminal."""
    fused, data = found["fused"], found["data"]
    wide = max(10, *(len(stage["name"]) + 2 for stage in found["stages"]))
    lines = [
        f"{data['name']}, {data['split']}: {fused['accuracy']:.2%} of {data['images']} images right, "
        f"macro-F1 {fused['macro_f1']:.2%}, ECE {fused['ece']:.2%}, NLL {fused['nll']:.4f}",
        f"{'stage':<{wide}}{'reading right':>15}{'fused without':>15}{'importance':>13}{'selectivity':>13}",
    ]
    for stage in found["stages"]:
        figures_of = (stage["accuracy"], stage["accuracy_without"])
        shown = "".join(f"{'-' if value is None else f'{value:.2%}':>15}" for value in figures_of)
        selectivity = stage["selectivity"]["mean"]
        shown += f"{stage['importance']:>13.3f}{'-' if selectivity is None else f'{selectivity:.3f}':>13}"
        lines.append(f"{stage['name']:<{wide}}{shown}")
    lines.append(f"maps and logits differ by {found['completeness']['relative']:.1e} of the largest logit at most")
    return "\n".join(lines)


def _require_free(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise InterflowError(f"--out {out}: expected the name of an HTML file, such as report.html.")
    for path in (out, out.with_suffix(".json")):
        if path.exists():
            raise InterflowError(f"{path} is there already; remove it, or give another name by --out.")


if __name__ == "__main__":
    cli.run(main)
