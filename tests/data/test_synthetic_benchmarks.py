"""The synthetic IJB and TinyFace: lists that tell the truth, points that undo the placement, both
layouts one set with the same figures.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import make_synthetic
from data.synth import benchmarks as benchmarks
from data.synth.faces import draw_identity, draw_nuisance, render
from data.synth.render_pool import open_studio
from eval import ijb, tinyface
from eval.sets.ijb import load_ijb
from eval.sets.tinyface import load_tinyface
from utils.align import TEMPLATE, align
from utils.errors import InputError

SUBJECTS, IDENTITIES = 10, 8
META = Path("ijb/IJBsynth/meta")
PREFIX = "ijbsynth"


def write(output, subjects=SUBJECTS, identities=IDENTITIES, nuisance=1.0):
    with open_studio(1, 0, nuisance) as studio:
        if subjects:
            benchmarks.write_ijb(output, studio, 0, nuisance, subjects)
        if identities:
            benchmarks.write_tinyface(output, studio, 0, nuisance, identities)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmarks")
    write(output)
    return output


def read_lines(path, separator=None):
    return [line.split(separator) for line in path.read_text().splitlines()]


def read_list(output, name):
    header, *rows = read_lines(output / META / f"{PREFIX}_1N_{name}.csv", ",")
    assert header[:2] == ["TEMPLATE_ID", "SUBJECT_ID"]
    return [(int(template), int(subject), file) for template, subject, file in rows]


def read_image(path):
    return cv2.imread(str(path))[..., ::-1]


def listing(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


# -- the lists


def test_lists_have_a_row_for_each_image(made):
    crops = listing(made / "ijb/IJBsynth/loose_crop")
    medias = read_lines(made / META / f"{PREFIX}_face_tid_mid.txt")
    points = read_lines(made / META / f"{PREFIX}_name_5pts_score.txt")
    assert [row[0] for row in medias] == [row[0] for row in points] and sorted(
        row[0] for row in medias
    ) == crops
    assert {len(row) for row in medias} == {3} and {len(row) for row in points} == {12}
    template_of_media = {}
    for _, template, media in medias:
        assert template_of_media.setdefault(media, template) == template
    # videos
    assert max(Counter(media for _, _, media in medias).values()) > 1
    # templates of several media
    assert max(Counter(template_of_media.values()).values()) > 1


def test_pairs_tell_the_truth(made):
    subject = {
        template: subject
        for name in ("gallery_G1", "gallery_G2", "probe_mixed")
        for template, subject, _ in read_list(made, name)
    }
    pairs = np.array(read_lines(made / META / f"{PREFIX}_template_pair_label.txt"), int)
    assert len(subject) == SUBJECTS * benchmarks.TEMPLATES and set(pairs[:, :2].flat) == set(
        subject
    )
    assert [subject[a] == subject[b] for a, b in pairs[:, :2]] == pairs[:, 2].tolist()
    assert (
        len({frozenset(pair) for pair in pairs[:, :2].tolist()}) == len(pairs)
        and (pairs[:, 0] != pairs[:, 1]).all()
    )
    assert 0 < pairs[:, 2].sum() < len(pairs) / 10


def test_each_probe_has_its_mate_in_one_gallery(made):
    galleries = [read_list(made, f"gallery_{name}") for name in ("G1", "G2")]
    probes = read_list(made, "probe_mixed")
    first, second = ({subject for _, subject, _ in rows} for rows in galleries)
    assert (
        first
        and second
        and not first & second
        and {subject for _, subject, _ in probes} == first | second
    )
    for rows in galleries:
        assert len({template for template, _, _ in rows}) == len(
            {subject for _, subject, _ in rows}
        )
    template_of = {
        name: int(template)
        for name, template, _ in read_lines(made / META / f"{PREFIX}_face_tid_mid.txt")
    }
    rows = galleries[0] + galleries[1] + probes
    # a row per image
    assert {file: template for template, _, file in rows} == template_of and len(rows) == len(
        template_of
    )


def test_default_sizes():
    """Impostor pairs enough to resolve an FPR of 1e-4, images few enough for a demonstration."""
    frames = benchmarks.list_frames(0, 40)
    templates = 40 * benchmarks.TEMPLATES
    assert {frame.template for frame in frames} == set(range(1, templates + 1)) and 600 <= len(
        frames
    ) <= 900
    assert templates * (templates - benchmarks.TEMPLATES) / 2 >= 1e4
    assert 300 <= sum(map(len, benchmarks.list_tinyface(60).values())) <= 500


def test_nobody_is_in_another_set():
    streams = [
        make_synthetic.TRAIN,
        *(split for split, _, _ in make_synthetic.PAIR_SETS.values()),
        benchmarks.IJB,
        benchmarks.TINYFACE,
    ]
    assert len(set(streams)) == len(streams)
    listed = benchmarks.list_tinyface(5)
    people = {
        name: {photograph.identity for photograph in photographs}
        for name, photographs in listed.items()
    }
    assert (
        people["Probe"] == people["Gallery_Match"]
        and not people["Probe"] & people["Gallery_Distractor"]
    )
    photographs = sum(listed.values(), [])
    assert len(set(photographs)) == len(photographs) and {
        photograph.split for photograph in photographs
    } == {benchmarks.TINYFACE}


# -- the images


def test_loose_crops_are_larger_turned_and_of_many_sizes(made):
    rows = read_lines(made / META / f"{PREFIX}_name_5pts_score.txt")
    points = np.array([row[1:11] for row in rows], float).reshape(-1, 5, 2)
    shapes = np.array(
        [read_image(made / "ijb/IJBsynth/loose_crop" / row[0]).shape[:2] for row in rows]
    )
    assert shapes.min() >= 130 and shapes.max() <= 220 and len(np.unique(shapes)) > 30
    assert (points > 0).all() and (points < shapes[:, None, ::-1]).all()
    eyes = points[:, 1] - points[:, 0]
    assert np.ptp(np.arctan2(eyes[:, 1], eyes[:, 0])) > 0.5 and np.ptp(np.hypot(*eyes.T)) > 15
    scores = np.array([row[11] for row in rows], float)
    assert 0.3 < scores.min() < scores.max() < 1


def test_points_undo_the_placement():
    """A face put somewhere and aligned by the points is the face again, but for what interpolation
    blurs and the corners that were cut off.
    """
    face = render(
        draw_identity(np.random.default_rng(0)), draw_nuisance(np.random.default_rng(0), 0.0)
    )
    for number in range(20):
        crop, points = benchmarks.place_face(face, np.random.default_rng(number))
        back = align(crop, points)
        assert np.abs(back[20:92, 20:92].astype(int) - face[20:92, 20:92]).mean() < 3
        assert np.abs(align(face, TEMPLATE).astype(int) - face).max() <= 1


def test_without_nuisance_a_subject_looks_the_same_once_aligned(tmp_path):
    frames = benchmarks.list_frames(0, 2)
    with open_studio(1, 0, 0.0) as studio:
        images = [
            cv2.imdecode(np.frombuffer(shot.aligned, np.uint8), cv2.IMREAD_COLOR)[
                25:90, 25:90
            ].astype(int)
            for shot in studio(frames)
        ]
    for frame, image in zip(frames, images, strict=True):
        same, other = (
            [
                np.abs(image - images[k]).mean()
                for k, f in enumerate(frames)
                if (f.subject == frame.subject) == answer
            ]
            for answer in (True, False)
        )
        assert max(same) < 6 < min(other)


def test_frames_of_a_video_are_alike():
    """They share light, place and clothes; photographs of one person from different media do
    not.
    """
    frames = benchmarks.list_frames(0, 10)
    looks = [benchmarks.draw_look(frame, 0, 1.0) for frame in frames]
    pairs = [
        (a, b)
        for a in range(len(frames))
        for b in range(a)
        if frames[a].subject == frames[b].subject
    ]
    within = [(a, b) for a, b in pairs if frames[a].media == frames[b].media]
    assert within and all(
        looks[a].texture == looks[b].texture and looks[a].gain != looks[b].gain for a, b in within
    )

    def differ(pairs):
        return np.mean([abs(looks[a].gain - looks[b].gain) for a, b in pairs])

    assert 3 * differ(within) < differ([pair for pair in pairs if pair not in within])


def test_worse_images_have_lower_scores():
    frames = [
        benchmarks.Frame(0, 1, media, 1, view)
        for view in ("frontal", "turned", "small")
        for media in range(1, 41)
    ]
    scores = np.array(
        [
            benchmarks.rate_face(benchmarks.draw_look(frame, 0, 1.0), np.random.default_rng(0))
            for frame in frames
        ]
    ).reshape(3, -1)
    frontal, turned, small = scores.mean(axis=1)
    assert frontal > turned > small


def test_tinyface_tree_holds_the_listed_photographs(made):
    tree = made / "tinyface/Testing_Set"
    names = [name for name in listing(tree) if name != "synthetic.json"]
    assert Counter(name.split("/")[0] for name in names) == {
        name: len(listed) for name, listed in benchmarks.list_tinyface(IDENTITIES).items()
    }
    # CVLFace's own code tells images apart by their name alone
    assert len({Path(name).name for name in names}) == len(names)
    assert all(read_image(tree / name).shape == (112, 112, 3) for name in names)


# -- the folders


def test_a_second_run_leaves_nothing_of_the_first(made, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(made, output)
    write(output, 2, 2)
    write(tmp_path / "fresh", 2, 2)
    assert listing(output) == listing(tmp_path / "fresh") != listing(made)
    assert all(
        (output / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
        for name in listing(output)
    )


def test_a_run_that_fails_leaves_the_old_folders(made, tmp_path, monkeypatch):
    output = tmp_path / "set"
    shutil.copytree(made, output)
    monkeypatch.setattr(benchmarks, "write_arrow", lambda *_: 1 / 0)
    for sizes in ((2, 0), (0, 2)):
        with pytest.raises(ZeroDivisionError):
            write(output, *sizes)
    assert listing(output) == listing(made)
    assert not [path for path in output.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]


def test_what_others_put_there_is_refused(made, tmp_path):
    folders = benchmarks.IJB_FOLDERS + benchmarks.TINYFACE_FOLDERS
    benchmarks.check_folders(made, folders)
    benchmarks.check_folders(tmp_path, folders)
    for folder in folders:
        assert set(json.loads((made / folder / "synthetic.json").read_text())) < {
            "seed",
            "nuisance",
            "ijb_subjects",
            "tinyface_identities",
        }
        (tmp_path / folder).parent.mkdir()
        (tmp_path / folder).write_text("a file")
        with pytest.raises(InputError, match=f"holds a {folder} that this script did not write"):
            benchmarks.check_folders(tmp_path, [folder])


def test_a_missing_library_is_said_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    benchmarks.check_folders(tmp_path, ())
    with pytest.raises(InputError, match="datasets library: pip install"):
        benchmarks.check_folders(tmp_path, benchmarks.IJB_FOLDERS)


# -- both layouts


def embed(images):
    """Features of uint8 images from their pixels alone: 16 x 16 thumbnails, standardised, the
    mirror image's added.
    """
    thumbnails = [
        cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32)
        for image in images
    ]
    return np.stack(
        [
            sum((x - x.mean()).ravel() / x.std() for x in (image, image[:, ::-1]))
            for image in thumbnails
        ]
    )


@pytest.fixture(scope="module")
def ijb_sets(made):
    return load_ijb(made / "ijb", "IJBsynth"), load_ijb(made / "ijb_arrow", "IJBsynth")


@pytest.fixture(scope="module")
def tinyface_sets(made):
    return load_tinyface(made, "tinyface"), load_tinyface(
        made / "tinyface_arrow", "tinyface_aligned_pad_0.1"
    )


def test_ijb_layouts_hold_the_same(ijb_sets):
    loose, arrow = ijb_sets
    assert len(loose.images) == len(arrow.images) > 100
    assert all(np.array_equal(loose.images[k], arrow.images[k]) for k in range(len(loose.images)))
    for name in ("faceness_scores", "templates", "medias", "label", "p1", "p2"):
        assert np.array_equal(getattr(loose, name), getattr(arrow, name)), name
    assert loose.galleries.keys() == arrow.galleries.keys() == {"G1", "G2"}
    for name in loose.galleries:
        assert np.array_equal(loose.galleries[name], arrow.galleries[name])
    assert np.array_equal(loose.probes, arrow.probes)


def test_ijb_layouts_give_the_same_figures(ijb_sets):
    figures = []
    for data in ijb_sets:
        rows = embed(data.images), data.faceness_scores, data.templates, data.medias
        searches = {
            name: ijb.evaluate_1n(*rows, *gallery, *data.probes, ijb.FARS)
            for name, gallery in data.galleries.items()
        }
        figures.append((ijb.evaluate(*rows, data.label, data.p1, data.p2), searches))
    np.testing.assert_equal(*figures)
    verification, searches = figures[0]
    # pixels tell something, not all
    assert 15 < verification["Norm:True_Det:True_tpr_at_fpr_0.1"] < 100
    for search in searches.values():
        assert search["mated"] == search["non_mated"] == SUBJECTS // 2 * (benchmarks.TEMPLATES - 1)
        # a gallery has SUBJECTS / 2 entries
        assert 2 / SUBJECTS < search["top1"] <= search["top5"] == 1


def test_tinyface_layouts_hold_the_same(tinyface_sets):
    tree, arrow = tinyface_sets
    place = {Path(path).name: k for k, path in enumerate(arrow.image_paths)}
    assert len(tree.images) == len(arrow.images) == len(place)
    assert all(
        np.array_equal(tree.images[k], arrow.images[place[Path(path).name]])
        for k, path in enumerate(tree.image_paths)
    )
    for role in ("probe_paths", "gallery_paths", "distractor_paths"):
        assert {Path(path).name for path in tree.meta[role]} == {
            Path(path).name for path in arrow.meta[role]
        }


def test_tinyface_layouts_give_the_same_figures(tinyface_sets):
    tree, arrow = (
        tinyface.evaluate(embed(data.images), data.image_paths, data.meta) for data in tinyface_sets
    )
    assert tree == arrow
    assert 0 < tree["rank-1"] <= tree["rank-5"] <= tree["rank-20"] <= 100 and tree["rank-1"] < 100
