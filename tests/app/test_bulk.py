"""An archive of images: answers as the server's, every image once, whoever worked and however often it was killed."""

import argparse
import ctypes
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app.bulk import __main__ as command
from app.bulk import on_ray, processes, progress
from app.bulk import run as bulk
from app.bulk.addresses import Output, files_of
from app.bulk.listing import Item, _parts, sorted_outside
from app.bulk.plan import Plan, alone
from app.bulk.scorer import Scorer
from app.cuda import provider_options
from app.main import create_app
from app.settings import PREFIX, Settings
from model.contract import InterflowError

ROOT = Path(__file__).parents[2]
LIMITS = {"max_pixels": 300_000, "max_bytes": 400_000}
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "TIFF": "TIFF"}


@pytest.fixture(scope="module")
def archive(photographs, tmp_path_factory):
    """Folders of crops of photographs in all formats, and of what can go wrong."""
    root = tmp_path_factory.mktemp("archive")
    dice = random.Random(0)
    opened = [Image.open(path).convert("RGB") for path in photographs.values()]
    for number in range(60):
        picture = dice.choice(opened)
        side = dice.randrange(20, 120)
        left, top = (dice.randrange(size - side) for size in picture.size)
        suffix, kind = list(FORMATS.items())[number % len(FORMATS)]
        path = root / f"{'abc'[number % 3]}" / f"{number * 7919 % 1000:03d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        picture.crop((left, top, left + side, top + side)).save(path, kind)
    whole = next((root / "a").glob("*.png")).read_bytes()
    (root / "a" / "empty.png").touch()
    (root / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "text.jpg").write_text("no picture at all")
    Image.new("RGB", (700, 700)).save(root / "b" / "wide.png")
    (root / "b" / "heavy.png").write_bytes(whole + bytes(LIMITS["max_bytes"]))
    (root / "c" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "c" / "pipe.png")
    (root / "c" / "folder.png" / "deep").mkdir(parents=True)
    (root / "c" / "folder.png" / "deep" / "one.png").write_bytes(whole)
    (root / "c" / "itself.png").symlink_to("itself.png")
    (root / "c" / "loop").symlink_to(root, target_is_directory=True)
    (root / "c" / "notes.txt").write_text("left out")
    (root / "c" / ".hidden.png").write_bytes(whole)
    return root


UNREADABLE = {
    "a/cut.png": "invalid_image",
    "a/empty.png": "empty_image",
    "b/heavy.png": "too_many_bytes",
    "b/text.jpg": "invalid_image",
    "b/wide.png": "too_many_pixels",
    "c/gone.png": "missing_file",
    "c/itself.png": "unreadable_file",
    "c/pipe.png": "no_file",
}
IMAGES = 60 + 1 + len(UNREADABLE)


def in_this_process(plan, output, settings, processes, threads):
    scorer = Scorer(plan, output, settings, threads)
    yield from map(scorer.finish, range(plan.listed.parts))


@pytest.fixture(scope="module")
def score(only_bundled):
    """Runs `app.bulk` in this process, without workers; gives the summary."""

    def run(*inputs, out, settings=None, **options):
        given = {
            "model": None, "version": None, "column": None, "top_k": 3, "part_images": 10,
            "processes": None, "threads": None, "ray": None, "gpus": 0,
        }  # fmt: skip
        asked = argparse.Namespace(inputs=[str(one) for one in inputs], out=str(out), **given | options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bulk, "score_here", in_this_process)
            return bulk.run(asked, settings or Settings(exports=only_bundled, provider="cpu", **LIMITS))

    return run


def tables(out):
    """Predictions and unreadable ones, as lists of rows, in order."""
    return [
        [row for path in sorted((Path(out) / kind).glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
        for kind in ("predictions", "unreadable")
    ]


def plan_in(out):
    return Plan.model_validate_json((Path(out) / "run.json").read_bytes())


# As the server answers


def test_answers_and_reasons_are_those_of_the_server(archive, score, serve, only_bundled, tmp_path):
    score(archive, out=tmp_path / "out")
    predictions, unreadable = tables(tmp_path / "out")
    with serve(create_app(Settings(exports=only_bundled, provider="cpu", **LIMITS))) as client:
        for row in predictions:
            answer = client.post("/predict?top_k=3", content=Path(row["image"]).read_bytes()).json()
            said = {**answer["prediction"], "doubt": answer.get("doubt"), "agreement": answer["agreement"]}
            assert {name: row[name] for name in said} == pytest.approx(said, abs=1e-5)
            assert row["top_k_labels"] == [one["label"] for one in answer["top_k"]]
            assert row["top_k_confidences"] == pytest.approx([one["confidence"] for one in answer["top_k"]], abs=1e-5)
            for stage in answer["stages"]:
                ours = {name: row[f"{stage['name']}_{name}"] for name in ("weight", "contribution", "share")}
                assert ours == pytest.approx({name: stage[name] for name in ours}, abs=1e-4)
                reading = {name: row[f"{stage['name']}_{name}"] for name in stage["prediction"]}
                assert reading == pytest.approx(stage["prediction"], abs=1e-5)
        asked = {
            row["image"]: row for row in unreadable if row["code"] not in ("missing_file", "no_file", "unreadable_file")
        }
        assert len(asked) == 5
        for image, row in asked.items():
            problem = client.post("/predict", content=Path(image).read_bytes()).json()
            assert (row["code"], row["detail"]) == (problem["code"], problem["detail"])


def test_contributions_sum_to_the_fused_logit(archive, score, tmp_path):
    score(archive, out=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "predictions").to_pydict()
    summands = [np.array(values) for name, values in table.items() if name.endswith("_contribution")]
    assert len(summands) > 1
    np.testing.assert_allclose(sum(summands), table["logit"], rtol=1e-4, atol=1e-4)
    assert np.ptp(table["logit"]) > 0.1


def test_labels_are_dictionaries_and_files_say_what_made_them(archive, score, tmp_path):
    score(archive, out=tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "predictions" / "part-000000.parquet")
    assert schema.field("label").type == pa.dictionary(pa.int32(), pa.string())
    assert schema.names[:4] == ["image", "label", "index", "confidence"]
    about = json.loads(schema.metadata[b"interflow"])
    assert about["model"] == plan_in(tmp_path / "out").model.model_dump(exclude={"folder"})


# None lost, none counted twice


def test_every_image_is_once_in_one_of_the_tables(archive, score, tmp_path):
    summary = score(archive, out=tmp_path / "out")
    predictions, unreadable = tables(tmp_path / "out")
    images = [row["image"] for row in predictions + unreadable]
    assert len(images) == len(set(images)) == IMAGES
    assert {os.path.relpath(row["image"], archive): row["code"] for row in unreadable} == UNREADABLE
    assert [row["image"] for row in predictions] == sorted(row["image"] for row in predictions)
    assert f"{archive}/c/folder.png/deep/one.png" in images
    done = plan_in(tmp_path / "out").done
    assert (done.images, sum(done.classes.values())) == (IMAGES, len(predictions))
    assert f"{len(predictions)} predictions, {len(UNREADABLE)} unreadable" in summary
    assert "left out: 1 other files" in summary


def test_a_part_without_readable_images_and_overlapping_inputs_and_patterns(archive, score, tmp_path):
    score(archive / "a" / "empty.png", out=tmp_path / "none")
    assert [len(rows) for rows in tables(tmp_path / "none")] == [0, 1]
    score(archive, archive / "a", f"{archive}/a/*.png", archive / "a" / "cut.png", out=tmp_path / "once")
    assert sum(map(len, tables(tmp_path / "once"))) == IMAGES
    score(f"{archive}/**/*.jp[g]", out=tmp_path / "some")
    found = {Path(row["image"]) for rows in tables(tmp_path / "some") for row in rows}
    assert found == set(archive.glob("[abc]/*.jpg"))
    score(f"{archive}/c/no*", out=tmp_path / "any")  # what a pattern names is taken, whatever it is called
    assert [row["code"] for row in tables(tmp_path / "any")[1]] == ["invalid_image"]


def test_the_listing_is_sorted_with_any_number_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr("app.bulk.listing.SORTED_AT_ONCE", 7)
    monkeypatch.setattr("app.bulk.listing.MERGED_AT_ONCE", 3)
    dice = random.Random(1)
    names = [f"{dice.randrange(10**6)}\n\udcff{number}" for number in range(1000)]
    assert list(sorted_outside(iter(names), tmp_path)) == sorted(names)
    assert len(list(tmp_path.iterdir())) < 20


def test_row_groups_stay_whole_where_they_fit():
    dice = random.Random(2)
    for _ in range(50):
        items, first = [], 0
        for _ in range(20):
            items.append(Item("x", first, dice.randrange(1, 30)))
            first += items[-1].rows
        parts = list(_parts(items, 10))
        assert all(0 < sum(item.images for item in part) <= 10 for part in parts)
        rows = [row for part in parts for item in part for row in range(item.first, item.first + item.rows)]
        assert rows == list(range(first))
        for item in items:
            if item.rows <= 10:
                parted = [part for part in parts for one in part if one.first <= item.first < one.first + one.rows]
                (one,) = (one for one in parted[0] if one.first <= item.first < one.first + one.rows)
                assert item.first + item.rows <= one.first + one.rows


def test_a_folder_that_leads_to_itself_ends(archive):
    assert sum(1 for path in files_of(str(archive)) if path.endswith("/one.png")) == 1


# Parquet


@pytest.fixture(scope="module")
def listed(archive):
    """Paths of the archive's files, in the order of the listing."""
    return sorted(
        str(path)
        for path in files_of(str(archive))
        if not path.endswith(("notes.txt", "gone.png", "itself.png", "pipe.png"))
    )


def written(path, listed, kind, rows=13):
    """The files as a Parquet file, in row groups of so many rows."""
    contents = [Path(name).read_bytes() for name in listed]
    column = {
        "bytes": pa.array(contents),
        "struct": pa.array(
            [{"bytes": one, "path": Path(name).name} for one, name in zip(contents, listed, strict=True)]
        ),
        "paths": pa.array([os.path.relpath(name, path.parent) for name in listed]),
        "struct of paths": pa.array(
            [{"bytes": None, "path": name} for name in listed], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
    }[kind]
    pq.write_table(pa.table({"number": range(len(listed)), "image": column}), path, row_group_size=rows)
    return path


@pytest.mark.parametrize("kind", ["bytes", "struct", "paths", "struct of paths"])
@pytest.mark.parametrize("rows", [4, 1000])
def test_rows_are_answered_as_files_are(archive, listed, score, tmp_path, kind, rows):
    file = written(tmp_path / "images.parquet", listed, kind, rows)
    score(*listed, out=tmp_path / "files")
    score(file, out=tmp_path / "rows")
    for of_files, of_rows in zip(tables(tmp_path / "files"), tables(tmp_path / "rows"), strict=True):
        numbers = [int(row.pop("image").removeprefix(f"{file}#")) for row in of_rows]
        paths = [row.pop("path") for row in of_rows]
        assert [listed[number] for number in numbers] == [row.pop("image") for row in of_files]
        if kind != "bytes":
            assert [Path(path).name for path in paths] == [Path(listed[number]).name for number in numbers]
        for one, other in zip(of_files, of_rows, strict=True):
            if one.get("code") != "invalid_image":  # whose sentence may name where in memory it was
                lists = [(one.pop(name), other.pop(name)) for name in list(one) if name.startswith("top_k")]
                assert one == pytest.approx(other, abs=1e-4)
                assert all(left == pytest.approx(right, abs=1e-4) for left, right in lists)


def test_damaged_parquet_files(listed, score, tmp_path):
    (tmp_path / "in").mkdir()
    written(tmp_path / "in" / "a.parquet", listed, "bytes", 5)
    damaged = written(tmp_path / "in" / "b.parquet", listed, "bytes", 5)
    content = bytearray(damaged.read_bytes())
    place = pq.read_metadata(damaged).row_group(4).column(1).data_page_offset
    content[place - 40 : place + 40] = bytes(80)
    damaged.write_bytes(content)
    score(tmp_path / "in", out=tmp_path / "out")
    predictions, unreadable = tables(tmp_path / "out")
    assert len(predictions) + len(unreadable) == 2 * len(listed)
    lost = [row["image"] for row in unreadable if row["code"] == "invalid_parquet"]
    assert f"{damaged}#20" in lost
    assert f"{damaged}#19" not in lost
    assert not [image for image in lost if "a.parquet" in image]
    damaged.write_bytes(content[:-100])
    with pytest.raises(InterflowError, match=r"b\.parquet: not a Parquet file that can be read"):
        score(tmp_path / "in", out=tmp_path / "other")


def test_a_column_that_cannot_be_meant_is_named(listed, score, tmp_path):
    file = tmp_path / "two.parquet"
    pq.write_table(pa.table({"left": [b"1"], "right": [b"2"], "number": [3], "note": ["x"]}), file)
    for column in (None, "number", "middle"):
        with pytest.raises(InterflowError, match=r"left \(binary\), right \(binary\), number \(int64\)"):
            score(file, out=tmp_path / f"{column}", column=column)
    score(file, out=tmp_path / "out", column="right")
    assert [row["code"] for row in tables(tmp_path / "out")[1]] == ["invalid_image"]
    with pytest.raises(InterflowError, match="holds images, and no Parquet files"):
        score(listed[0], out=tmp_path / "wrong", column="right")


# Elsewhere


def test_images_from_and_tables_to_another_file_system(archive, score, tmp_path):
    memory = fsspec.filesystem("memory")
    for name in files_of(str(archive / "a")):
        memory.pipe_file(f"/archive/deep/{Path(name).name}", Path(name).read_bytes())
    memory.pipe_file("/archive/.hidden/x.png", b"")
    try:
        score("memory://archive", out="memory://out/run", part_images=7)
        score(archive / "a", out=tmp_path / "local", part_images=7)
        memory.get("/out/run", str(tmp_path / "copy"), recursive=True)
        assert "memory://archive/deep/cut.png" in {row["image"] for row in tables(tmp_path / "copy")[1]}
        for near, far in zip(tables(tmp_path / "local"), tables(tmp_path / "copy"), strict=True):
            for row in near:
                row["image"] = f"memory://archive/deep/{Path(row['image']).name}"
            assert [row | {"detail": ""} for row in near] == [row | {"detail": ""} for row in far]
        score("memory://archive/*/*.png", out="memory://out/other")
        with pytest.raises(InterflowError, match=r"memory://nothing.*cannot be listed"):
            score("memory://nothing", out=tmp_path / "nothing")
    finally:
        memory.store.clear()


def test_an_address_that_nobody_opens(score, tmp_path):
    with pytest.raises(InterflowError, match=r"nowhere://bucket/images: cannot be opened"):
        score("nowhere://bucket/images", out=tmp_path / "out")


# What may go on, and what not


def test_what_is_done_is_not_done_again_and_what_is_missing_is(archive, score, tmp_path):
    out = tmp_path / "out"
    score(archive, out=out)
    before = tables(out)
    assert "nothing to do" in score(archive, out=out)
    text = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(text | {"done": None}))
    (out / "predictions" / "part-000002.parquet").unlink()
    torn = out / "predictions" / "part-000004.parquet"
    torn.write_bytes(torn.read_bytes()[:500])  # as a store without atomic writes may leave it
    for torn_name in (
        ".run.json-1.tmp",
        "listing/.listing-000000.parquet-1.tmp",
        "predictions/.part-000003.parquet-1.tmp",
    ):
        (out / torn_name).touch()
    untouched = (out / "predictions" / "part-000001.parquet").stat().st_mtime_ns
    listing = (out / "listing" / "listing-000000.parquet").stat().st_mtime_ns
    assert "20 images in " in score(archive, out=out)
    assert tables(out) == before
    assert (out / "predictions" / "part-000001.parquet").stat().st_mtime_ns == untouched
    assert (out / "listing" / "listing-000000.parquet").stat().st_mtime_ns == listing
    assert not list(out.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_k": 4}, "another top_k: 3, where now 4"),
        ({"part_images": 11}, "another part_images: 10, where now 11"),
        ({"column": "x"}, "another column: none, where now x"),
        ({"settings": {"max_pixels": 1000}}, "another max_pixels: 300000, where now 1000"),
        ({"settings": {"cuda_tf32": False}}, "another cuda_tf32: True, where now False"),
    ],
)
def test_a_run_goes_on_with_nothing_else(archive, score, tmp_path, only_bundled, change, said):
    score(archive / "a", out=tmp_path / "out")
    if "settings" in change:
        change = {"settings": Settings(exports=only_bundled, provider="cpu", **LIMITS | change["settings"])}
    with pytest.raises(InterflowError, match=said):
        score(archive / "a", out=tmp_path / "out", **change)
    with pytest.raises(InterflowError, match=f"another input: {archive}/a, where now {archive}/b"):
        score(archive / "b", out=tmp_path / "out")


def test_a_run_goes_on_that_was_begun_before_tf32_was_written_down(archive, score, tmp_path):
    score(archive / "a", out=tmp_path / "out")
    text = json.loads((tmp_path / "out" / "run.json").read_text())
    del text["options"]["cuda_tf32"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(text))
    assert "nothing to do" in score(archive / "a", out=tmp_path / "out")


def test_a_run_goes_on_with_no_other_model(archive, score, tmp_path, artefact, rewrite_card):
    settings = Settings(exports=artefact.parents[1], provider="cpu")
    score(archive / "a", out=tmp_path / "out", settings=settings)
    begun = plan_in(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text(begun.model_copy(update={"done": None}).model_dump_json())
    card = json.loads((artefact / "model.json").read_text())
    rewrite_card(artefact, provenance=card["provenance"] | {"weights_sha256": "f" * 64})
    with pytest.raises(InterflowError, match=r"another model \(sha256\): [0-9a-f]{64}, where now f{64}"):
        score(archive / "a", out=tmp_path / "out", settings=settings)
    with pytest.raises(InterflowError, match="was changed while it was used"):
        Scorer(begun, Output(str(tmp_path / "out")), settings, 1)


def test_folders_that_are_not_for_this(archive, score, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with alone(Output(str(tmp_path / "busy"))), pytest.raises(InterflowError, match="another run works in"):
        score(archive, out=tmp_path / "busy")
    with pytest.raises(InterflowError, match="no image is in"):
        score(tmp_path / "mine", out=tmp_path / "empty")
    with pytest.raises(InterflowError, match=r"nowhere: cannot be listed \(No such file"):
        score(tmp_path / "nowhere", out=tmp_path / "absent")
    with pytest.raises(InterflowError, match="model 'cat' is not in"):
        score(archive, out=tmp_path / "unknown", model="cat")
    with pytest.raises(InterflowError, match="has no version '7'; it has 1"):
        score(archive, out=tmp_path / "unknown", version="7")
    assert not (tmp_path / "unknown").exists()


@pytest.mark.parametrize(
    ("name", "said"), [("thesis.txt", r"holds 'predictions' and no run\.json"), ("run.json", "is not that of a run")]
)
def test_a_folder_of_something_else_stays_as_it_is(archive, score, tmp_path, name, said):
    (tmp_path / "predictions").mkdir()
    (tmp_path / name).write_text("mine")
    (tmp_path / "predictions" / ".part-000001.parquet-1.tmp").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InterflowError, match=said):
        score(archive, out=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_of_a_run_s_folder_only_its_own_leavings_are_swept(archive, score, tmp_path):
    score(archive / "a", out=tmp_path)
    for folder in ("notes", "predictions"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".notes.tmp").touch()
    score(archive / "a", out=tmp_path)
    assert len(list(tmp_path.glob("*/.notes.tmp"))) == 2


@pytest.mark.parametrize(
    ("given", "out"),
    [("in", "in/out"), ("in/**", "in/out"), ("in/**/*.png", "in/x/out"), ("in/*/*.png", "in/out"), ("in/*", "in")],
)
def test_tables_do_not_go_where_images_are_read(score, tmp_path, monkeypatch, given, out):
    monkeypatch.setattr(bulk, "write_listing", Mock(side_effect=AssertionError))
    (tmp_path / "in").mkdir()
    for asked in (tmp_path / given, "/"):
        with pytest.raises(InterflowError, match=f"{tmp_path / out} lies within {re.escape(str(asked))}, whose"):
            score(asked, out=tmp_path / out)
    assert not list(tmp_path.rglob("?*/*"))


def test_tables_may_go_below_a_pattern_that_does_not_look_there(archive, score, tmp_path):
    shutil.copytree(archive / "a", tmp_path / "in")
    score(f"{tmp_path}/in/*.png", out=tmp_path / "in" / "scores")
    found = len(list((tmp_path / "in").glob("*.png")))
    assert sum(map(len, tables(tmp_path / "in" / "scores"))) == found


def test_a_name_that_is_not_utf_8_is_refused_in_a_sentence(archive, score, tmp_path, only_bundled):
    good, bad, out = archive / "a", tmp_path / os.fsdecode(b"bad\xff"), tmp_path / "out"
    shutil.copytree(good, bad / "in")
    shutil.copytree(only_bundled, bad / "exports")
    exports = Settings(exports=bad / "exports", provider="cpu")
    for given, to, others in (
        (bad / "in", out, {}),
        (good, bad / "out", {}),
        (good, out, {"column": bad.name}),
        (good, out, {"settings": exports}),
    ):
        with pytest.raises(
            InterflowError, match=r"bad\\xff.*: the name is not UTF-8\. Rename it, or name a link to it\."
        ):
            score(given, out=to, **others)
        assert {path.name for folder in (tmp_path, bad) for path in folder.iterdir()} == {bad.name, "in", "exports"}
    (tmp_path / "link").symlink_to(bad)
    assert "20 predictions, 2 unreadable" in score(tmp_path / "link" / "in", out=out)


@pytest.mark.parametrize("missing", ["fsspec", "pyarrow"])
def test_what_is_not_installed_is_named(missing):
    code = f"import sys; sys.modules['{missing}'] = None; sys.argv[1:] = ['in', 'out']; import app.bulk.__main__ as m; "
    code += "m.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: python -m app.bulk takes {missing}, which is not installed. Install the extra `bulk` "
        "(uv sync --extra bulk).\n"
    )


# How far it is


def test_what_was_done_before_counts_in_no_rate(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = progress.Progress("scoring", 4000)
    lines.add(2000, fresh=False)
    lines.add(800)
    said = capsys.readouterr().err.splitlines()
    assert said == ["scoring: 2000 of 4000 images, 0 images/s", "scoring: 2800 of 4000 images, 20 images/s"]


def test_what_was_done_before_counts_in_no_remaining_time(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.Progress("scoring", 4000)
    bar.add(2000, fresh=False)
    assert "50%" in str(bar._bar)
    assert "<?, ? images/s" in str(bar._bar)
    bar._bar.start_t -= 100
    bar._bar.last_print_t -= 100
    bar.add(1000)
    assert "3.00k/4.00k [01:40<01:40, 10.0 images/s]" in str(bar._bar)
    bar.close()


def test_a_run_that_goes_on_counts_only_what_it_makes(archive, score, tmp_path, monkeypatch):
    score(archive / "a", out=tmp_path / "out")
    begun = plan_in(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text(begun.model_copy(update={"done": None}).model_dump_json())
    (tmp_path / "out" / "predictions" / "part-000001.parquet").unlink()
    told = Mock(wraps=progress.Progress("scoring"))
    monkeypatch.setattr(bulk, "Progress", lambda *_: told)
    score(archive / "a", out=tmp_path / "out")
    assert [call.args[1] for call in told.add.call_args_list] == [False, True, False]


# Processes


def with_driver(monkeypatch, devices):
    """A libcuda that shows so many devices; None: there is none."""

    def opened(name):
        if devices is None:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(cuInit=lambda _: 0, cuDeviceGetCount=lambda count: setattr(count._obj, "value", devices))

    monkeypatch.setattr(ctypes, "CDLL", opened)


@pytest.mark.parametrize(
    ("devices", "named", "gpus"),
    [
        (None, None, []),
        (None, "0", []),
        (0, "0", []),
        (2, None, ["0", "1"]),
        (2, "3, GPU-5", ["3", "GPU-5"]),
    ],
)
def test_gpus_are_those_that_a_driver_shows(monkeypatch, devices, named, gpus):
    with_driver(monkeypatch, devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert processes.visible_gpus(Settings()) == gpus
    assert processes.visible_gpus(Settings(provider="cpu")) == []
    cpus = processes.usable_cpus()
    assert processes.default_processes(Settings()) == (min(cpus, 4 * len(gpus)) if gpus else cpus)


@pytest.mark.parametrize(("gpus", "share"), [(["0"], 200), (["0", "1"], 333), ([], 1000)])
def test_processes_share_the_memory_of_their_gpu(archive, score, tmp_path, monkeypatch, gpus, share):
    """Five of them, of which a GPU has no more than its share of."""
    score(archive, out=tmp_path / "out")
    plan, output, opened = plan_in(tmp_path / "out"), Output(str(tmp_path / "out")), []

    def session(_, settings):
        opened.append(provider_options(settings, graphs=False)["gpu_mem_limit"])
        raise InterflowError("far enough")

    def start(number, own, *job):
        with pytest.raises(InterflowError, match="far enough"):
            Scorer(*job)
        ours, theirs = Pipe()
        theirs.send("all were started")
        return processes._Worker(number, Mock(), ours)

    monkeypatch.setattr("app.bulk.scorer.Session", session)
    monkeypatch.setattr(processes, "_start", start)
    monkeypatch.setattr(processes, "visible_gpus", lambda _: gpus)
    with pytest.raises(InterflowError, match="all were started"):
        list(processes.score_here(plan, output, Settings(cuda_memory=1000, workers=7), 5, 0))
    assert opened == [str(share)] * 5


def test_actors_share_the_memory_of_their_gpu(archive, score, tmp_path, monkeypatch):
    score(archive, out=tmp_path / "out")
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, Mock())
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray, data = sys.modules["ray"], sys.modules["ray.data"]
    ray.exceptions.RayError = RuntimeError
    ray.cluster_resources.return_value = {"CPU": 4}
    map_batches = data.range.return_value.map_batches
    map_batches.return_value.iter_rows.return_value = []
    for gpus, share in ((0, 1000), (0.25, 250), (0.3, 333), (2, 1000)):
        own = Settings(cuda_memory=1000, workers=7)
        plan, output = plan_in(tmp_path / "out"), Output(str(tmp_path / "out"))
        list(on_ray.score_on_ray(plan, output, own, address=None, processes=4, threads=0, gpus=gpus))
        *_, settings, _ = map_batches.call_args.kwargs["fn_constructor_args"]
        assert provider_options(settings, graphs=False)["gpu_mem_limit"] == str(share)


def test_help_names_the_settings_that_count():
    said = command._argument_parser().format_help()
    for name in ("PROVIDER", "CUDA_MEMORY", "CUDA_TF32", "CUDA_GRAPHS"):
        assert f"INTERFLOW_{name}" in said


@pytest.fixture(scope="module")
def many(archive, score, tmp_path_factory, bundled):
    """Some hundred images in one folder, some of them broken, and their tables made in one piece."""
    root = tmp_path_factory.mktemp("many")
    good = sorted(path for path in archive.rglob("*") if path.is_file() and path.stat().st_size < LIMITS["max_bytes"])
    (root / "in").mkdir()
    for number in range(480):
        os.link(good[number % len(good)], root / "in" / f"{number:04d}.png")
    settings = Settings(exports=bundled.parents[1], provider="cpu")
    score(root / "in", out=root / "out", settings=settings, model="digits", top_k=5, part_images=5)
    return root


def begin(*arguments, **variables):
    """Starts `python -m app.bulk`, in a group of its own."""
    environment = os.environ | {PREFIX + "EXPORTS": str(ROOT / "exports"), PREFIX + "PROVIDER": "cpu"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "app.bulk", "--model", "digits", "--part-images", "5", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def parts_done(out):
    return len(list((out / "predictions").glob("part-*.parquet")))


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def children(process):
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(many, tmp_path):
    out = tmp_path / "out"
    run = begin(many / "in", out, "--processes", "2")
    wait_for(lambda: parts_done(out) >= 3, run)
    run.send_signal(signal.SIGSTOP)  # so that it is in the middle of its work
    os.kill(children(run)[0], signal.SIGKILL)  # one worker: another takes its part
    run.send_signal(signal.SIGCONT)
    wait_for(lambda: parts_done(out) >= 25, run)
    run.terminate()
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, errors
    assert "ended by SIGKILL; another takes part" in errors
    assert "The same command goes on where it was" in errors
    assert not list(out.glob("*/.*.tmp"))
    run = begin(many / "in", out, "--processes", "2")
    wait_for(lambda: parts_done(out) >= 50, run)
    run.kill()  # its workers see that it is gone
    run.communicate(timeout=60)
    finish(many, out)


def finish(many, out, *arguments):
    """Runs what is left, and holds all to what one process made in one piece."""
    run = begin(many / "in", out, "--processes", "2", *arguments)
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert output.startswith("480 images")
    assert "images were done before" in output
    assert tables(out) == tables(many / "out")
    assert plan_in(out).done == plan_in(many / "out").done
    assert {path.name for path in out.iterdir()} == {".lock", "run.json", "listing", "predictions", "unreadable"}
    assert not list(out.glob("*/.*.tmp"))


@pytest.mark.parametrize("on_the_way_out", [None, SystemError("Ray's"), InterflowError("an actor died"), OSError()])
def test_a_signal_ends_it_the_same_way_whatever_comes_of_it(on_the_way_out, monkeypatch, capsys, tmp_path):
    def run(options, settings):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            if on_the_way_out is not None:
                raise on_the_way_out

    monkeypatch.setattr(bulk, "run", run)
    monkeypatch.setattr(command, "start_logging", lambda settings: None)
    monkeypatch.setattr(sys, "argv", ["bulk", str(tmp_path), str(tmp_path / "out")])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            command.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "The same command goes on where it was" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(many, tmp_path):
    dice = random.Random(3)
    out = tmp_path / "out"
    for kill in range(8):
        run = begin(many / "in", out, "--processes", "2")
        enough = parts_done(out) + dice.choice([0, 1, 5, 10])
        wait_for(lambda enough=enough: parts_done(out) >= enough, run)
        time.sleep(dice.random() / 50)
        if kill % 2:
            os.killpg(run.pid, signal.SIGKILL)  # and with it all workers
        else:
            run.kill()
        run.communicate(timeout=60)
    finish(many, out)


@pytest.mark.slow
def test_a_part_that_ends_every_process_ends_the_run(many, tmp_path):
    poison = "import os, PIL.Image as i; o = i.open\n"
    poison += "def f(s, **k): b'POISON' in s.getbuffer()[-9:].tobytes() and os.kill(os.getpid(), 9); return o(s, **k)\n"
    (tmp_path / "sitecustomize.py").write_text(poison + "i.open = f\n")
    shutil.copytree(many / "in", tmp_path / "in")
    deadly = tmp_path / "in" / "0042.png"
    content = deadly.read_bytes()
    deadly.write_bytes(content + b"POISON")
    run = begin(tmp_path / "in", tmp_path / "out", "--processes", "2", PYTHONPATH=str(tmp_path))
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "error: part 8 (" in errors
    assert "ended 2 processes, the last by SIGKILL" in errors
    before = parts_done(tmp_path / "out")
    assert before >= 7
    deadly.write_bytes(content)
    run = begin(tmp_path / "in", tmp_path / "out", "--processes", "2")
    assert f"{5 * before} images were done before" in run.communicate(timeout=120)[0]


@pytest.mark.slow
def test_a_cluster_gives_what_this_machine_gives(many, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    run = begin(many / "in", out, "--processes", "2", "--ray")
    wait_for(lambda: parts_done(out) >= 20, run, seconds=300)
    run.terminate()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, errors
    finish(many, out, "--ray")
