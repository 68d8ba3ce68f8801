"""After the last epoch: fit what the card needs on held-out images, measure on test, once, and draw the curves."""

import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from model.contract import BackboneInfo, LayerAttentionInfo, MethodInfo, Metrics, ModelCard, Provenance, StageInfo
from model.interflow import Interflow, InterflowOutput
from training import calibration
from training.checkpoint import weights_sha256
from training.data import ImageData
from training.files import replacing, write_text
from training.loop import predict
from training.plots import plot_accuracy, plot_confusion, plot_weights
from training.recipe import Recipe
from training.run import SAMPLES, Run, git_revision


def finish(network: Interflow, data: ImageData, recipe: Recipe, run: Run) -> ModelCard:
    """Write the run's samples, plots and, last, its card.

    Readings, temperature and importance are fitted on the validation split, or on train where nothing was held out.
    """
    held_out = predict(network, data, data.val or data.train, recipe)
    scales = calibration.fit_reading_scales(held_out, per_class=network.method.attention == "class")
    temperature = calibration.fit_temperature(held_out)
    fitted_on = (
        f"{data.name}: {len(data.val)} images held out of train"
        if data.val
        else f"{data.name}: the {len(data.train)} training images themselves; nothing was held out"
    )
    test = predict(network, data, data.test, recipe)
    counts = calibration.confusion(test)
    output = _one_pass(network, data)

    card = ModelCard(
        name=data.name,
        version="1",  # export gives the final one
        classes=data.classes,
        input=data.spec,
        backbone=BackboneInfo(
            name=recipe.backbone,
            depth=network.backbone.depth,
            width=recipe.width,
            neck=recipe.neck,
            options=recipe.options,
        ),
        method=MethodInfo(
            name=network.method.name,
            attention=network.method.attention,
            initial_weights=network.method.initial_weights or "random",
            learned=network.method.learned,
            shared_heads=network.shared_heads,
        ),
        stages=tuple(
            StageInfo(name=stage.name, depth=stage.depth, channels=stage.channels, map_size=(height, width))
            for stage, (_, _, height, width) in zip(network.stages, (m.shape for m in output.branch_maps), strict=True)
        ),
        layer_attention=tuple(
            LayerAttentionInfo(block=row.block, module=row.module, kind=row.kind, sources=row.sources)
            for row in output.layer_attention
        ),
        branch_weights=_rows(held_out.branch_weights),
        reading_scales=_rows(scales),
        temperature=temperature,
        branch_importance=tuple(calibration.importance(held_out).tolist()),
        fitted_on=fitted_on,
        metrics=Metrics(
            data=data.name,
            split="test",
            images=len(data.test),
            seed=recipe.seed,
            accuracy=calibration.fused_accuracy(test),
            macro_f1=calibration.macro_f1(test),
            auroc=calibration.fused_auroc(test, temperature),
            class_recall=tuple(calibration.class_recall(counts).tolist()),
            class_images=tuple(counts.sum(axis=1).tolist()),
            branch_accuracy=tuple(calibration.branch_accuracy(test, scales)),
            ece=calibration.fused_ece(test, temperature),
            branch_ece=tuple(calibration.branch_ece(test, scales)),
        ),
        provenance=Provenance(
            created=datetime.now(UTC),
            run=run.folder.name,
            init=None if recipe.init is None else Path(recipe.init).name,
            weights_sha256=weights_sha256(network),
            git_revision=git_revision(),
            versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        ),
    )
    with replacing(run.samples) as temporary:
        np.save(temporary, _samples(data))
    rows = run.history()
    plot_accuracy(rows, run.folder / "accuracy.png")
    plot_weights(rows, run.folder / "weights.png")
    plot_confusion(counts, data.classes, run.folder / "confusion.png")
    write_text(run.card, card.to_json() + "\n")
    return card


@torch.inference_mode()
def _one_pass(network: Interflow, data: ImageData) -> InterflowOutput:
    """Of one image of zeros: for the sizes of the maps, and the blocks that have attention of their own."""
    network.eval()
    device = next(network.parameters()).device
    return network(torch.zeros(1, data.spec.channels, data.spec.height, data.spec.width, device=device))


def _samples(data: ImageData) -> np.ndarray:
    """Test images from all over the split, uint8 (SAMPLES, height, width, channels)."""
    indices = torch.linspace(0, len(data.test) - 1, SAMPLES).round().long()
    images, _ = next(data.test.batches([indices], workers=0))
    return images.numpy()


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
