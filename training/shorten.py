"""A trained network without the stages behind one of them: shorter, and still an exact sum of those it keeps.

Each stage's branch sees nothing of the deeper stages, so what is kept says what it said in the whole network. How much
it counts was learned for a longer sum: each stage's attention weights get a factor, fitted on held-out images, and all
that is fitted is fitted anew.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from model.backbones.weights import load_weights
from model.contract import InterflowError, ModelCard
from model.interflow import Interflow
from training import calibration
from training.artefact import network_of
from training.calibration import Predictions, fused_accuracy
from training.checkpoint import read_progress, weights_sha256
from training.data import ImageData, load_data
from training.finish import fitted_on, open_finished
from training.fitting import fitted_fields
from training.loop import choose_device, predict
from training.recipe import Recipe, load_recipe
from training.run import Run
from training.work import stage_work

AUTO = "auto"
"""In a stage's place: the shortest network that loses little."""
TOLERANCE = 0.2
"""Points of accuracy that it may lose, where nobody says."""


@dataclass(frozen=True)
class Trained:
    """A finished run, and what its network says of the run's own images.

    Attributes:
        run, recipe, card: as they were saved; the recipe with the mean and deviation that the images had.
        network: in evaluation mode, on the CPU.
        data: the run's.
        held_out, test: outputs; what was held out is train where nothing was.
    """

    run: Run
    recipe: Recipe
    card: ModelCard
    network: Interflow
    data: ImageData
    held_out: Predictions
    test: Predictions


def open_trained(run: Run, data: ImageData | None = None) -> Trained:
    """Open a finished run and ask its network about all held-out and test images.

    Args:
        run: its folder.
        data: the run's images, where they are loaded already.

    Raises:
        InterflowError: as `open_finished`, or its images are not there or not the same.
    """
    card, network = open_finished(run)
    recipe = load_recipe(run.recipe).model_copy(update={"mean": card.input.mean, "std": card.input.std})
    if data is None:
        data = data_of(run, recipe)
    network.to(choose_device("auto"))
    held_out = predict(network, data, data.val or data.train, recipe)
    test = predict(network, data, data.test, recipe)
    return Trained(run, recipe, card, network.cpu(), data, held_out, test)


def data_of(run: Run, recipe: Recipe) -> ImageData:
    """The images that a run was trained on, to fit another form of its network.

    Raises:
        InterflowError: they are not there, or not the same.
    """
    try:
        data = load_data(recipe)
    except InterflowError as error:
        raise InterflowError(
            f"{run.folder}: a network in another form is fitted anew, which takes the run's own images; put them back "
            f"where {run.recipe} says. {error}"
        ) from error
    require_own_images(run, recipe, data)
    return data


def require_own_images(run: Run, recipe: Recipe, data: ImageData) -> None:
    """Check that what is loaded by a run's recipe is what the run was trained on, or its splits would be others.

    Raises:
        InterflowError: it is not.
    """
    if data.fingerprint != read_progress(run.checkpoint).data:
        raise InterflowError(
            f"{run.folder}: the images of {recipe.data} are not those that the run was trained on; put them back, or "
            f"train a new run."
        )


def require_cuttable(card: ModelCard) -> None:
    """Check that there are shorter networks in this one.

    Raises:
        InterflowError: its shallow branches need the deep stages, or there is one stage.
    """
    if card.backbone.neck:
        raise InterflowError(
            f"{card.name} cannot be cut: behind its neck ({card.backbone.neck}) every stage's branch needs the deeper "
            f"stages. Train it without --neck."
        )
    if len(card.stages) == 1:
        raise InterflowError(f"{card.name} cannot be cut: it has one stage, {card.stages[0].name}.")


def require_stage(card: ModelCard, stage: str) -> None:
    """Check that a network can be cut behind the stage of this name, or behind that of "auto".

    Raises:
        InterflowError: as `require_cuttable`, or it has no such stage.
    """
    require_cuttable(card)
    names = [info.name for info in card.stages]
    if stage not in (AUTO, *names):
        raise InterflowError(f"there is no stage {stage!r}; {card.name} has {', '.join(names)}, or say {AUTO}.")


def shorten(network: Interflow, card: ModelCard, stage: str) -> tuple[Interflow, dict[str, Any]]:
    """Cut a network behind a stage.

    Args:
        network: in evaluation mode, on the CPU; it is left as it is.
        card: describes it.
        stage: the last one to keep.

    Returns:
        The shortened network, in evaluation mode, with copies of the weights; and the fields of a card that describe
        it: backbone, method, stages and layer_attention.

    Raises:
        InterflowError: as `require_stage`, or the backbone is not made to be that short.
    """
    require_stage(card, stage)
    kept = [info.name for info in card.stages].index(stage) + 1
    weights = card.method.initial_weights
    described = {
        "backbone": card.backbone.model_copy(update={"depth": card.stages[kept - 1].depth}),
        "method": card.method.model_copy(
            update={"initial_weights": weights if weights == "random" else weights[:kept]}
        ),
        "stages": card.stages[:kept],
    }
    short = network_of(card.model_copy(update=described))
    tensors = dict(network.state_dict())
    tensors["attention.weight"] = tensors["attention.weight"][:kept]
    load_weights(short, tensors, f"the weights of {card.name}, cut behind {stage}", spare=tensors)

    work = stage_work(short, card.input)
    image = torch.zeros(1, card.input.channels, card.input.height, card.input.width)
    with torch.inference_mode():
        rows = len(short.features(image).attention)
    described["stages"] = tuple(
        info.model_copy(update={"work": done}) for info, done in zip(card.stages[:kept], work, strict=True)
    )
    return short, described | {"layer_attention": card.layer_attention[:rows]}


def shortened(trained: Trained, stage: str) -> tuple[Interflow, ModelCard]:
    """Cut a run's network behind a stage, and fit and measure anew all that its card needs.

    Returns:
        The network, as `shorten`, its stages weighed anew where it is shorter; and its card: of a model of its own,
        named after the stage.

    Raises:
        InterflowError: as `shorten`.
    """
    network, described = shorten(trained.network, trained.card, stage)
    shorter = len(network.stages) < len(trained.card.stages)
    return _fitted(trained, network, described | {"name": name_of_cut(trained.card.name, stage)}, weigh_anew=shorter)


def _fitted(
    trained: Trained, network: Interflow, described: dict[str, Any], *, weigh_anew: bool
) -> tuple[Interflow, ModelCard]:
    """The network, weighed anew or not, and its card: the run's, with these fields, and all that is fitted."""
    card = trained.card
    held_out, test = up_to(trained, len(network.stages), weigh_anew=weigh_anew)
    network.attention.set_matrix(torch.from_numpy(held_out.branch_weights))
    provenance = card.provenance.model_copy(
        update={"created": datetime.now(UTC), "weights_sha256": weights_sha256(network)}
    )
    fitted = fitted_fields(
        held_out,
        test,
        per_class=network.method.attention == "class",
        work=tuple(info.work for info in described["stages"]),
        data=trained.data.name,
        fitted_on=fitted_on(trained.data),
        seed=trained.recipe.seed,
    )
    method = described["method"].model_copy(
        update={"weighed_anew": card.method.weighed_anew or (weigh_anew and card.method.learned)}
    )
    fields = dict(card) | described | {"method": method, "provenance": provenance} | fitted
    return network, ModelCard.model_validate(fields)


def name_of_cut(name: str, stage: str) -> str:
    """What a network, or run, of this name is called when it is cut behind the stage."""
    return f"{name}-{re.sub('[^A-Za-z0-9._-]+', '-', stage)}"


def up_to(trained: Trained, count: int, *, weigh_anew: bool) -> tuple[Predictions, Predictions]:
    """What the network that is cut behind its stage number `count` says of the held-out and of the test images.

    Args:
        trained: the run.
        count: of stages that are kept.
        weigh_anew: give each stage's attention weights the factor that suits the held-out images, if they were learned.
    """
    weights = trained.held_out.branch_weights[:count]
    held_out, test = (
        Predictions(said.branch_logits[:, :count], weights, said.labels) for said in (trained.held_out, trained.test)
    )
    return calibration.weigh_anew(held_out, test) if weigh_anew and trained.card.method.learned else (held_out, test)


def accuracies(trained: Trained) -> list[tuple[float, float]]:
    """Fused accuracy of the network cut behind each stage, on held-out and test images; the last one's is the whole's.

    The stages of those that are shorter are weighed anew.
    """
    stages = len(trained.card.stages)
    return [
        (fused_accuracy(held_out), fused_accuracy(test))
        for held_out, test in (up_to(trained, count, weigh_anew=count < stages) for count in range(1, stages + 1))
    ]


def within(accuracy: float, whole: float, tolerance: float) -> bool:
    """Whether an accuracy is at most `tolerance` points below the whole network's; fractions, in 0..1."""
    return 100 * (whole - accuracy) <= tolerance + 1e-9  # 0.2 points of 5000 images are ten, not nine


def choose(trained: Trained, tolerance: float) -> tuple[str, str]:
    """The shortest network whose held-out accuracy is within `tolerance` points of the whole's.

    Returns:
        Its last stage (the whole network's, where no shorter one will do), and why, in a sentence.
    """
    names = [info.name for info in trained.card.stages]
    found = [held_out for held_out, _ in accuracies(trained)]
    place = next(i for i, accuracy in enumerate(found) if within(accuracy, found[-1], tolerance))
    listed = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in zip(names, found, strict=True))
    what = (
        f"{names[place]} is the shortest within {tolerance:g} points of the whole network"
        if place + 1 < len(names)
        else f"no shorter network is within {tolerance:g} points of the whole, which is kept"
    )
    return names[place], f"accuracy on {fitted_on(trained.data)}; cut behind {listed}: {what}."


def require_tolerance(tolerance: float) -> float:
    """Check a number of points of accuracy that may be lost, and give it back.

    Raises:
        InterflowError: not a number of points.
    """
    if not 0 <= tolerance <= 100:
        raise InterflowError(f"--tolerance {tolerance:g}: expected points of accuracy, such as {TOLERANCE}.")
    return tolerance
