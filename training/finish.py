"""After the last epoch: fit what the card needs on held-out images, measure on test, once, and draw the curves."""

import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from model.contract import BackboneInfo, LayerAttentionInfo, MethodInfo, ModelCard, Provenance, StageInfo
from model.interflow import Interflow, InterflowOutput
from training import calibration, ranks
from training.checkpoint import weights_sha256
from training.data import ImageData
from training.files import replacing, write_text
from training.fitting import fitted_fields
from training.loop import predict
from training.plots import plot_accuracy, plot_confusion, plot_weights
from training.recipe import Recipe
from training.run import SAMPLES, Run, git_revision
from training.work import stage_work


def finish(network: Interflow, data: ImageData, recipe: Recipe, run: Run) -> ModelCard | None:
    """Write the run's samples, plots and, last, its card.

    Readings, temperature and importance are fitted on the validation split, or on train where nothing was held out.

    Several processes share the images; the first does all the rest, and the others get None.
    """
    held_out = predict(network, data, data.val or data.train, recipe)
    test = predict(network, data, data.test, recipe)
    if not ranks.first():
        return None
    output = _one_pass(network, data)
    work = stage_work(network, data.spec)

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
            StageInfo(
                name=stage.name,
                depth=stage.depth,
                channels=stage.channels,
                map_size=(height, width),
                work=done,
            )
            for stage, (_, _, height, width), done in zip(
                network.stages, (m.shape for m in output.branch_maps), work, strict=True
            )
        ),
        layer_attention=tuple(
            LayerAttentionInfo(block=row.block, module=row.module, kind=row.kind, sources=row.sources)
            for row in output.layer_attention
        ),
        provenance=Provenance(
            created=datetime.now(UTC),
            run=run.folder.name,
            init=None if recipe.init is None else Path(recipe.init).name,
            weights_sha256=weights_sha256(network),
            git_revision=git_revision(),
            versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        ),
        **fitted_fields(
            held_out,
            test,
            per_class=network.method.attention == "class",
            work=work,
            data=data.name,
            fitted_on=fitted_on(data),
            seed=recipe.seed,
        ),
    )
    with replacing(run.samples) as temporary:
        np.save(temporary, _samples(data))
    rows = run.history()
    plot_accuracy(rows, run.folder / "accuracy.png")
    plot_weights(rows, run.folder / "weights.png")
    plot_confusion(calibration.confusion(test), data.classes, run.folder / "confusion.png")
    write_text(run.card, card.to_json() + "\n")
    return card


def fitted_on(data: ImageData) -> str:
    """What the card says of the images that `data.val`, or else `data.train`, gives to fit on."""
    if data.val:
        return f"{data.name}: {len(data.val)} images held out of train"
    return f"{data.name}: the {len(data.train)} training images themselves; nothing was held out"


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
    return images.cpu().numpy()  # in a grid, they lie on the device
