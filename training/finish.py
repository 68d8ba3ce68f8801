"""After the last epoch: fit what the card needs on held-out images, measure on test, once, and draw the curves.

And the other way round: open what was finished.
"""

import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from model.contract import (
    BackboneInfo,
    InterflowError,
    LayerAttentionInfo,
    MethodInfo,
    ModelCard,
    Provenance,
    StageInfo,
)
from model.interflow import Interflow, InterflowOutput
from training import calibration, ranks
from training.artefact import network_of
from training.checkpoint import load_network, weights_sha256
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

    Readings, temperature and importance are fitted on the validation split, or on train where nothing was held out. On
    the validation split alone, where the recipe says so, the attention weights get a factor for each stage. The run's
    checkpoint keeps those that were trained, so that to finish it again gives the same; the card has the others.

    Several processes share the images; the first does all the rest, and the others get None.
    """
    held_out = predict(network, data, data.val or data.train, recipe)
    test = predict(network, data, data.test, recipe)
    if not ranks.first():
        return None
    weigh_anew = recipe.weigh_anew and network.method.learned and data.val is not None
    if weigh_anew:
        held_out, test = calibration.weigh_anew(held_out, test)
        network.attention.set_matrix(torch.from_numpy(held_out.branch_weights))
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
            weighed_anew=weigh_anew,
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


def open_finished(run: Run) -> tuple[ModelCard, Interflow]:
    """A finished run's card and its network, in evaluation mode, on the CPU.

    Raises:
        InterflowError: not finished, or not with the weights that the card describes.
    """
    card = run.finished_card()
    network = network_of(card)
    load_network(run.checkpoint, network)
    if card.method.weighed_anew:
        network.attention.set_matrix(torch.tensor(card.branch_weights))
    if weights_sha256(network) != card.provenance.weights_sha256:
        raise InterflowError(f"{run.checkpoint}: not the weights that {run.card} describes; train the run again.")
    return card, network


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
