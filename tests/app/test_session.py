"""An artefact is served only if it is whole, is what its card says, and keeps both exact sums."""

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from app import session as module
from app.errors import InferenceError
from app.session import ModelError, Session
from app.settings import Settings
from model.contract import (
    BRANCH_LOGITS,
    BRANCH_WEIGHTS,
    CARD_FILE,
    LAYER_ATTENTION,
    LOGITS,
    MODEL_FILE,
    CardError,
)
from model.explain import contributions

CPU = Settings(provider="cpu", threads=1)


@pytest.fixture
def images(artefact):
    spec = Session(artefact, CPU).card.input
    shape = (5, spec.height, spec.width, spec.channels)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def test_a_batch_gives_what_its_images_give_alone(artefact, images):
    session = Session(artefact, CPU)
    names = list(session.card.outputs)
    together = session.run(images, names)
    assert list(together) == names
    for index in range(len(images)):
        alone = session.run(images[index : index + 1], names)
        for name in names:
            np.testing.assert_allclose(together[name][index], alone[name][0], rtol=1e-4, atol=1e-4)
    added = contributions(together[BRANCH_LOGITS], together[BRANCH_WEIGHTS])
    np.testing.assert_allclose(added.sum(axis=1), together[LOGITS], rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_is_computed(artefact, images):
    assert list(Session(artefact, CPU).run(images, [BRANCH_WEIGHTS, "branch_map_1"])) == [
        BRANCH_WEIGHTS,
        "branch_map_1",
    ]


def test_runtime_is_reported(artefact):
    runtime = Session(artefact, CPU).runtime
    assert (runtime.provider, runtime.requested_provider, runtime.fallback) == ("cpu", "cpu", None)
    assert (runtime.onnxruntime, runtime.threads) == (onnxruntime.__version__, 1)
    assert runtime.batch_sizes is None


def test_lanes_and_threads_share_the_usable_cpus_unless_they_are_set(artefact, monkeypatch):
    def chosen(cpus, **settings):
        monkeypatch.setattr(module, "usable_cpus", lambda workers: cpus // workers)
        runtime = Session(artefact, Settings(provider="cpu", **settings)).runtime
        assert runtime.helpers == 0
        return runtime.cpus, runtime.lanes, runtime.threads, runtime.lone_threads, runtime.max_batch

    assert [chosen(cpus) for cpus in (1, 2, 3)] == [(1, 1, 1, 1, 16), (2, 1, 2, 2, 32), (3, 1, 3, 3, 48)]
    assert [chosen(cpus) for cpus in (4, 16)] == [(4, 1, 4, 4, 64), (16, 4, 13, 16, 64)]
    assert chosen(8, workers=4) == (2, 1, 2, 2, 32)
    assert chosen(2, lanes=2) == (2, 2, 1, 2, 16)
    assert chosen(2, lanes=3) == (2, 3, 1, 2, 16)
    assert chosen(2, threads=1) == (2, 1, 1, 1, 32)
    monkeypatch.setattr(module, "LARGE_IMAGE", 10)
    assert chosen(2) == (2, 1, 2, 2, 16)
    monkeypatch.setattr(module, "ALONE_BYTES", 0)
    assert chosen(2, lanes=2) == (2, 2, 1, 1, 8)


@pytest.mark.parametrize(("cpus", "expected"), [(1, (1, 1, 0)), (2, (1, 1, 1)), (4, (1, 3, 1)), (16, (4, 12, 1))])
def test_int8_leaves_a_cpu_to_the_event_loop_but_where_full_batches_wait(bundled, monkeypatch, cpus, expected):
    monkeypatch.setattr(module, "usable_cpus", lambda workers: cpus)
    runtime = Session(bundled.parents[1] / "cifar10-int8" / "1", Settings(provider="cpu")).runtime
    assert (runtime.lanes, runtime.threads, runtime.helpers) == expected


def test_only_an_inference_that_is_alone_spins_and_only_while_it_runs(artefact, monkeypatch, images):
    monkeypatch.setattr(module, "usable_cpus", lambda workers: 2)
    ran = []

    class Told(onnxruntime.InferenceSession):
        def run(self, names, feeds):
            options = self.get_session_options()
            spinning = options.get_session_config_entry("session.intra_op.allow_spinning")
            stops = spinning == "0" or options.get_session_config_entry("session.force_spinning_stop")
            ran.append((options.intra_op_num_threads, spinning, stops))
            return super().run(names, feeds)

    session = Session(artefact, Settings(provider="cpu", lanes=2))
    for opened in (session._session, session._alone_session):
        monkeypatch.setattr(opened, "__class__", Told)
    beside, alone = (session.run(images, [LOGITS], alone=alone)[LOGITS] for alone in (False, True))
    assert ran == [(1, "0", True), (2, "1", "1")]
    np.testing.assert_allclose(alone, beside, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="threads stay on a CPU on Linux alone")
@pytest.mark.parametrize(
    ("settings", "own", "pinned"),
    [
        ({}, 2, True),
        ({}, 1, False),  # of two usable ones: who has the other is not known
        ({"threads": 3}, 2, False),
        ({"threads": 3}, 3, True),
        ({"threads": 1}, 2, False),  # it has no second thread
        ({"pinning": False}, 2, False),
    ],
)
def test_threads_of_an_inference_that_is_alone_stay_on_cpus_of_their_own(artefact, monkeypatch, settings, own, pinned):
    def on_one_cpu():
        found: dict[str, set[int]] = {}
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended since it was listed
                found[task.name] = os.sched_getaffinity(int(task.name))
        return {name: cpus for name, cpus in found.items() if len(cpus) == 1}

    here = sorted(os.sched_getaffinity(0))
    if len(here) < 2:
        pytest.skip("every thread is on the only CPU")
    monkeypatch.setattr(module, "usable_cpus", lambda workers: 2)
    monkeypatch.setattr(module, "own_cpus", lambda workers: [here[0], here[1], here[0]][:own])
    before = on_one_cpu()
    session = Session(artefact, Settings(provider="cpu", **settings))
    expected = [[here[1]], [here[0], here[1]]][own - 2] if pinned else []

    def stay():
        return sorted(cpu for name, cpus in on_one_cpu().items() if name not in before for cpu in cpus)

    deadline = time.monotonic() + 10  # a thread goes to its CPU once it runs
    while stay() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stay() == expected
    assert session.runtime.pinned is pinned


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
def test_threads_that_compute_are_nice_and_no_others(artefact, monkeypatch, images):
    def niceness(thread):
        with contextlib.suppress(ProcessLookupError):  # it has ended since it was listed
            return os.getpriority(os.PRIO_PROCESS, thread)

    def threads():
        return {int(task.name) for task in Path("/proc/self/task").iterdir()}

    before = threads()
    monkeypatch.setattr(module, "usable_cpus", lambda workers: 3)
    session = Session(artefact, Settings(provider="cpu", lanes=1, niceness=niceness(0) + 3))

    def nice():
        return [thread for thread in threads() - before if niceness(thread) == niceness(0) + 3]

    # The thread that opened the sessions was joined, but the kernel may list it for a moment more.
    deadline = time.monotonic() + 10
    while len(nice()) > 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(nice()) == 2 * 2  # of the session for an inference alone, too
    assert session.runtime.niceness == niceness(0) + 3


def test_choices_are_reported(artefact):
    settings = Settings(provider="cpu", spinning=True, max_batch=7, batch_wait_us=5, max_queue=9, lanes=2, threads=1)
    runtime = Session(artefact, settings).runtime
    assert (runtime.lanes, runtime.threads, runtime.lone_threads, runtime.niceness) == (2, 1, 1, 5)
    assert (runtime.spinning, runtime.max_batch, runtime.batch_wait_us, runtime.max_queue) == (True, 7, 5, 9)
    assert runtime.small_batch == 7  # who waits to fill a batch has it full
    assert Session(artefact, Settings(provider="cpu", max_batch=7)).runtime.small_batch == 4


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])])
def test_sizes_double_up_to_the_largest_batch(most, sizes):
    assert module._doubling(most) == sizes


def test_images_of_a_wrong_shape_are_an_inference_error(artefact):
    with pytest.raises(InferenceError, match="inference failed"):
        Session(artefact, CPU).run(np.zeros((1, 2, 3, 4), np.uint8), [LOGITS])


# Broken artefacts


@pytest.mark.parametrize("name", [MODEL_FILE, CARD_FILE])
def test_a_missing_file(artefact, name):
    (artefact / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        Session(artefact, CPU)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_truncated_graph(artefact, kept):
    whole = (artefact / MODEL_FILE).read_bytes()
    (artefact / MODEL_FILE).write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ModelError, match=MODEL_FILE) as caught:
        Session(artefact, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff\xfe", b'{"format_version": 2}', b"[" * 100_000])
def test_a_card_that_is_none(artefact, text):
    (artefact / CARD_FILE).write_bytes(text)
    with pytest.raises(CardError, match="not a model card"):
        Session(artefact, CPU)


@pytest.mark.parametrize(("name", "version"), [("other", "1"), ("digits", "2")])
def test_a_card_of_another_model(artefact, rewrite_card, name, version):
    rewrite_card(artefact, name=name, version=version)
    with pytest.raises(ModelError, match=f"the card is that of {name}, version {version}"):
        Session(artefact, CPU)


def test_a_card_that_differs_from_the_one_inside(artefact, rewrite_card):
    rewrite_card(artefact, metadata=False, temperature=9.0)
    with pytest.raises(ModelError, match=r"the card inside differs from model\.json in `temperature`"):
        Session(artefact, CPU)


def test_a_graph_without_a_card(artefact):
    whole = (artefact / MODEL_FILE).read_bytes()
    assert b"\x0a\x09interflow" in whole
    (artefact / MODEL_FILE).write_bytes(whole.replace(b"\x0a\x09interflow", b"\x0a\x09otherflow"))
    with pytest.raises(ModelError, match="holds no metadata entry `interflow`"):
        Session(artefact, CPU)


def test_an_input_of_another_size(artefact, rewrite_card):
    spec = Session(artefact, CPU).card.input
    rewrite_card(artefact, input=spec.model_dump() | {"height": spec.height + 1})
    with pytest.raises(
        ModelError, match=rf"input `image` is uint8\[N, {spec.height}, .* says uint8\[N, {spec.height + 1}"
    ):
        Session(artefact, CPU)


def test_maps_of_another_size(artefact, rewrite_card):
    stages = [stage.model_dump() for stage in Session(artefact, CPU).card.stages]
    stages[0]["map_size"] = (3, 5)
    rewrite_card(artefact, stages=stages)
    with pytest.raises(
        ModelError, match=r"output `branch_map_0` is float32\[N, .* but its card says float32\[N, \d+, 3, 5\]"
    ):
        Session(artefact, CPU)


def test_one_stage_less_on_the_card(artefact, rewrite_card):
    card = Session(artefact, CPU).card
    fewer = len(card.stages) - 1
    importance = np.asarray(card.branch_importance[:-1])
    rewrite_card(
        artefact,
        stages=card.stages[:-1],
        branch_weights=card.branch_weights[:-1],
        reading_scales=card.reading_scales[:-1],
        branch_importance=tuple(importance / importance.sum()),
        metrics=card.metrics.model_dump()
        | {"branch_accuracy": card.metrics.branch_accuracy[:-1], "branch_ece": card.metrics.branch_ece[:-1]},
    )
    with pytest.raises(ModelError, match=rf"output `branch_logits` is .* says float32\[N, {fewer}, "):
        Session(artefact, CPU)


def test_weights_that_are_not_the_graphs(artefact, rewrite_card):
    weights = np.asarray(Session(artefact, CPU).card.branch_weights)
    weights[0, 0] += 0.01 * np.abs(weights).max()
    rewrite_card(artefact, branch_weights=weights.tolist())
    with pytest.raises(ModelError, match="`branch_weights` are not the card's"):
        Session(artefact, CPU)


@pytest.mark.parametrize(
    ("output", "change", "complaint"),
    [
        (LOGITS, lambda values: values * 1.01, "not the sum of the contributions"),
        ("branch_map_0", lambda values: values + 1, "does not average to its logits"),
        (BRANCH_LOGITS, lambda values: values[:1], "came as"),
        (LOGITS, lambda values: values * np.nan, "not finite"),
    ],
)
def test_a_graph_that_breaks_its_promises(artefact, monkeypatch, output, change, complaint):
    run = onnxruntime.InferenceSession.run

    def broken(self, names, feeds):
        return [change(values) if name == output else values for name, values in zip(names, run(self, names, feeds))]  # noqa: B905

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", broken)
    with pytest.raises(ModelError, match=complaint):
        Session(artefact, CPU)


def test_a_graph_that_fails_when_run(artefact, monkeypatch):
    def failing(self, names, feeds):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", failing)
    with pytest.raises(ModelError, match=r"fails on 1 images \(first line\)"):
        Session(artefact, CPU)


# The layers' own attention: rows of 2 shares, 3 shares and 1 gate; g differs from image to image

CONSTANT = np.array([[0, 1, 0], [0.5, 0, 0.5], [0, 0, 0]])
VARYING = np.array([[1, -1, 0], [-0.5, 0.5, 0], [1, 0, 0]])


@pytest.fixture
def rows(layered_model):
    return layered_model.card.layer_attention


def test_layer_attention_is_the_graphs_image_by_image(artefact, images, rows, add_layer_attention):
    plain = Session(artefact, CPU).run(images, [LOGITS, BRANCH_LOGITS])
    add_layer_attention(artefact, rows, CONSTANT, VARYING)
    outputs = Session(artefact, CPU).run(images, [LOGITS, LAYER_ATTENTION])
    g = 1 / (1 + np.exp(-plain[BRANCH_LOGITS].mean(axis=(1, 2))))
    assert np.ptp(g) > 0.01
    np.testing.assert_allclose(outputs[LAYER_ATTENTION], CONSTANT + g[:, None, None] * VARYING, atol=1e-4)
    np.testing.assert_allclose(outputs[LAYER_ATTENTION][:, :2].sum(axis=2), 1, rtol=1e-6)
    np.testing.assert_array_equal(outputs[LOGITS], plain[LOGITS])


@pytest.mark.parametrize(
    ("place", "added", "complaint"),
    [
        ((1, 2), 0.01, r"of stage2\.block3 does not sum to 1"),
        ((0, slice(0, 2)), (2, -2), r"of stage1\.block3 is not in 0\.\.1"),  # they sum to 1
        ((2, 0), 1.01, r"of stage3\.block1 is not in 0\.\.1"),
        ((2, 0), -1.01, r"of stage3\.block1 is not in 0\.\.1"),
        ((0, 2), 0.01, r"of stage1\.block3 is not zero beyond its sources"),
        ((2, 1), 0.01, r"of stage3\.block1 is not zero beyond its sources"),
        ((0, 0), np.nan, "holds numbers that are not finite"),
    ],
)
def test_layer_attention_that_breaks_the_contract(artefact, rows, add_layer_attention, place, added, complaint):
    constant = CONSTANT.copy()
    constant[place] += added
    add_layer_attention(artefact, rows, constant, VARYING)
    with pytest.raises(ModelError, match=f"`layer_attention` {complaint}"):
        Session(artefact, CPU)


def test_layer_attention_on_the_card_or_in_the_graph_alone(artefact, rows, rewrite_card, add_layer_attention):
    rewrite_card(artefact, layer_attention=rows)
    with pytest.raises(ModelError, match=r"`layer_attention` is nothing, but its card says float32\[N, 3, 3\]"):
        Session(artefact, CPU)
    add_layer_attention(artefact, rows, CONSTANT, VARYING)
    rewrite_card(artefact, layer_attention=rows[1:])
    with pytest.raises(
        ModelError, match=r"`layer_attention` is float32\[N, 3, 3\], but its card says float32\[N, 2, 3"
    ):
        Session(artefact, CPU)
    rewrite_card(artefact, layer_attention=())
    with pytest.raises(ModelError, match=r"`layer_attention` is float32\[N, 3, 3\], but its card says nothing"):
        Session(artefact, CPU)
