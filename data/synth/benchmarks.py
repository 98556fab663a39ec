"""Synthetic counterparts of IJB-B/C and of TinyFace, each in both layouts people have.

The IJB-like set has templates of several media, a media being a still or some frames of a video.
Its loose crops show the face somewhere, turned and scaled, with the five points and the score a
detector would give. data/README.md describes the files.
"""

import os
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data.contact_sheet import COLUMNS, Row
from data.synth.canvas import SIZE
from data.synth.faces import NUISANCE, draw_identity, draw_nuisance, encode, render
from data.synth.render_pool import Photograph
from utils.align import TEMPLATE, align
from utils.errors import InputError
from utils.files import write_json
from utils.images import decode_bgr

# random streams; 0 .. 3 are those of make_synthetic.py
IJB, TINYFACE = 4, 5
NAME = "IJBsynth"
# in each folder: how it was made, and the sign that it may be replaced
ORIGIN = "synthetic.json"
IJB_FOLDERS = Path("ijb") / NAME, Path("ijb_arrow") / f"{NAME}_gt_aligned"
TINYFACE_FOLDERS = (
    Path("tinyface") / "Testing_Set",
    Path("tinyface_arrow") / "tinyface_aligned_pad_0.1",
)

# of a subject: the first is enrolled in a gallery, the others are probes
TEMPLATES = 5
# of an enrolled template, of a probe (fewest, most)
MEDIA = {True: (2, 3), False: (1, 3)}
# how often a media is a video, and its frames (fewest, most)
VIDEO = 0.5, (2, 4)
# of the media
VIEW_SHARES = {"any": 0.4, "frontal": 0.3, "turned": 0.2, "small": 0.1}
# share of a frame's circumstances that is its own; the rest it has in common with its media
OWN = 0.25
# width and height of a loose crop (least, most)
CROP = 130, 220

# photographs of each TinyFace identity
PROBE_NUMBERS, GALLERY_NUMBERS = (1, 2), (3, 4)
# further people for each identity, one photograph each, in no relation to it
DISTRACTORS = 3


def check_folders(output: Path, folders) -> None:
    """Raise InputError if one of ``folders`` below ``output`` was not written by this script, or if
    the library to write them is missing.
    """
    for folder in folders:
        if os.path.lexists(output / folder) and not (output / folder / ORIGIN).is_file():
            raise InputError(
                f"--output {output} holds a {folder} that this script did not write "
                f"(no {ORIGIN} in it); choose another folder"
            )
    if folders and find_spec("datasets") is None:
        raise InputError(
            "CVLFace's layout takes Hugging Face's datasets library: pip install -r "
            "requirements/requirement.txt, "
            "or leave these sets out with --ijb-subjects 0 --tinyface-identities 0"
        )


@contextmanager
def replacing_folder(path: Path, made: dict):
    """Yield a new folder to fill; it takes the name and the place of ``path`` when the block ends
    well, else it is removed.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    outgoing = path.with_name(f"{path.name}.old-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        write_json(temporary / ORIGIN, made)
        if path.exists():
            path.rename(outgoing)
        temporary.rename(path)
        shutil.rmtree(outgoing, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- IJB-like


class Frame(NamedTuple):
    """Names one image of the IJB-like set: a still, or a frame of a video; with seed and nuisance
    scale this decides every byte of it.
    """

    subject: int
    # 1 ..., each of one subject
    template: int
    # 1 ..., each in one template
    media: int
    # 1 ... within the media
    number: int
    view: str

    def take(self, seed: int, nuisance: float) -> "Shot":
        """Draw it.

        How the face lies in the loose crop does not depend on ``nuisance``: alignment undoes it.
        """
        who = draw_identity(np.random.default_rng([seed, IJB, self.subject, 0]))
        look = draw_look(self, seed, nuisance)
        rng = np.random.default_rng([seed, IJB, self.subject, self.media, self.number, 1])
        crop, points = place_face(render(who, look), rng)
        loose = encode(crop, look.quality)
        aligned = align(decode_bgr(loose), points)
        return Shot(loose, points, rate_face(look, rng), cv2.imencode(".png", aligned)[1].tobytes())


class Shot(NamedTuple):
    """One image of the IJB-like set, as photographed and aligned."""

    # JPEG, of any size
    loose: bytes
    # (5, 2) float32, (x, y) in pixels of ``loose``, as rounded as they are written
    points: np.ndarray
    # a detector's, 0.3 .. 1
    score: float
    # PNG, 112 x 112: exactly what utils.align.align makes of the two
    aligned: bytes


def list_frames(seed: int, subjects: int) -> list[Frame]:
    """All images in the order of the lists; templates, then media, are numbered through the set."""
    frames, media = [], 0
    often, (fewest, most) = VIDEO
    for subject in range(subjects):
        rng = np.random.default_rng([seed, IJB, subject, 0, 0])
        for k in range(TEMPLATES):
            for _ in range(rng.integers(*MEDIA[k == 0], endpoint=True)):
                media += 1
                view = str(rng.choice(list(VIEW_SHARES), p=list(VIEW_SHARES.values())))
                count = rng.integers(fewest, most, endpoint=True) if rng.random() < often else 1
                frames += [
                    Frame(subject, subject * TEMPLATES + k + 1, media, number, view)
                    for number in range(1, count + 1)
                ]
    return frames


def draw_look(frame: Frame, seed: int, nuisance: float):
    """The circumstances of a frame: those of its media (place, light, camera, view, clothes), of
    which pose and expression vary a little.
    """
    stream = [seed, IJB, frame.subject, frame.media]
    scene = draw_nuisance(np.random.default_rng([*stream, 0]), nuisance, frame.view)
    moment = draw_nuisance(np.random.default_rng([*stream, frame.number]), nuisance, frame.view)
    # between two profiles lies a frontal face, which would be another view
    moment.yaw = np.copysign(moment.yaw, scene.yaw)
    for name in (*NUISANCE, "yaw", "mouth_open", "eye_close", "blur"):
        setattr(scene, name, (1 - OWN) * getattr(scene, name) + OWN * getattr(moment, name))
    return scene


def place_face(face: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Put an aligned face into a loose crop by a random similarity: (crop (H, W, 3) uint8, its five
    points (5, 2) float32, to 1/1000 pixel).
    """
    size = rng.integers(*CROP, 2, endpoint=True)
    scale, angle = size.min() / SIZE * rng.uniform(0.75, 0.95), rng.uniform(-0.4, 0.4)
    turn = scale * np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    centre = size * rng.uniform(0.45, 0.55, 2)
    shift = centre - turn @ np.full(2, SIZE / 2)
    matrix = np.column_stack([turn, shift])
    # the photograph ends there; elsewhere it goes on, out of focus
    black = rng.random() < 0.3
    border = cv2.BORDER_CONSTANT if black else cv2.BORDER_REPLICATE
    extent = tuple(size.tolist())
    crop = cv2.warpAffine(face, matrix, extent, borderMode=border)
    if not black:
        drawn = cv2.warpAffine(np.ones(face.shape[:2], np.uint8), matrix, extent) > 0
        crop = np.where(drawn[..., None], crop, cv2.GaussianBlur(crop, (0, 0), 4))
    return crop, (TEMPLATE @ turn.T + shift).round(3).astype(np.float32)


def rate_face(look, rng: np.random.Generator) -> float:
    """What a detector might think of a face, 0.3 .. 1 and to 1/10000: little of small, turned,
    blurred and hidden ones.
    """
    hidden = look.mask or look.sunglasses or look.patch
    worse = (
        0.6 * (1 - look.size / SIZE)
        + 0.4 * abs(look.yaw)
        + 0.1 * look.blur
        + 0.25 * hidden
        + rng.uniform(0, 0.05)
    )
    return round(0.31 + 0.68 * float(np.exp(-1.5 * worse)), 4)


def write_ijb(output: Path, studio, seed: int, nuisance: float, subjects: int) -> int:
    """Write the IJB-like set in both layouts (IJB_FOLDERS); every two templates are a pair.

    Returns the number of images.
    """
    frames = list_frames(seed, subjects)
    shots = list(studio(frames, NAME))
    # subject of each template
    owner = np.repeat(np.arange(subjects), TEMPLATES)
    first, second = np.triu_indices(len(owner), 1)
    pairs = {
        "p1": first + 1,
        "p2": second + 1,
        "label": (owner[first] == owner[second]).astype(np.int64),
    }
    metadata = {
        "faceness_scores": np.array([shot.score for shot in shots], np.float32),
        "templates": np.array([frame.template for frame in frames]),
        "medias": np.array([frame.media for frame in frames]),
        **pairs,
    }
    made = {"seed": seed, "nuisance": nuisance, "ijb_subjects": subjects}
    loose, arrow = (output / folder for folder in IJB_FOLDERS)
    with replacing_folder(loose, made) as folder, replacing_folder(arrow, made) as arrow_folder:
        write_insightface_ijb(folder, frames, shots, pairs)
        write_identification_lists(folder / "meta", frames)
        write_arrow(arrow_folder, {"image": [shot.aligned for shot in shots]}, metadata)
        write_identification_lists(arrow_folder / "meta", frames)
    print(
        f"{loose}: {subjects} subjects, {len(owner)} templates, {frames[-1].media} media, "
        f"{len(frames)} images, {len(first)} pairs; 1:N lists"
    )
    print(f"{arrow}: the same, aligned, in CVLFace's layout")
    return len(frames)


def write_insightface_ijb(
    folder: Path, frames: list[Frame], shots: list[Shot], pairs: dict
) -> None:
    """Write ``loose_crop/*.jpg`` and the three lists of 1:1 verification in ``meta``."""
    for sub_folder in ("loose_crop", "meta"):
        (folder / sub_folder).mkdir()
    prefix = NAME.lower()
    for k, shot in enumerate(shots):
        (folder / "loose_crop" / file_name(k)).write_bytes(shot.loose)
    lines = [f"{file_name(k)} {frame.template} {frame.media}\n" for k, frame in enumerate(frames)]
    (folder / "meta" / f"{prefix}_face_tid_mid.txt").write_text("".join(lines))
    lines = [
        f"{file_name(k)} {' '.join(f'{x:.3f}' for x in shot.points.flat)} {shot.score:.4f}\n"
        for k, shot in enumerate(shots)
    ]
    (folder / "meta" / f"{prefix}_name_5pts_score.txt").write_text("".join(lines))
    np.savetxt(
        folder / "meta" / f"{prefix}_template_pair_label.txt",
        np.stack([pairs["p1"], pairs["p2"], pairs["label"]], axis=1),
        "%d",
    )


def write_identification_lists(folder: Path, frames: list[Frame]) -> None:
    """Write the 1:N lists: gallery G1 has the even subjects, G2 the odd ones, so that each probe
    has its mate in one and none in the other.
    """
    folder.mkdir(exist_ok=True)
    lists = {"gallery_G1": [], "gallery_G2": [], "probe_mixed": []}
    for k, frame in enumerate(frames):
        is_enrolled = frame.template % TEMPLATES == 1
        name = f"gallery_G{frame.subject % 2 + 1}" if is_enrolled else "probe_mixed"
        lists[name].append(f"{frame.template},{frame.subject},{file_name(k)}\n")
    for name, lines in lists.items():
        text = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n" + "".join(lines)
        (folder / f"{NAME.lower()}_1N_{name}.csv").write_text(text)


def file_name(k: int) -> str:
    """The loose crop of the k-th frame."""
    return f"{k + 1}.jpg"


# -- TinyFace-like


def list_tinyface(identities: int) -> dict[str, list[Photograph]]:
    """Photographs by folder of the official tree; the distractors' people come after the
    ``identities`` of the others.
    """
    people = range(identities)
    others = range(identities, (1 + DISTRACTORS) * identities)
    folders = {
        "Probe": (people, PROBE_NUMBERS),
        "Gallery_Match": (people, GALLERY_NUMBERS),
        "Gallery_Distractor": (others, [1]),
    }
    return {
        folder: [
            Photograph(TINYFACE, person, number, "small")
            for person in persons
            for number in numbers
        ]
        for folder, (persons, numbers) in folders.items()
    }


def write_tinyface(output: Path, studio, seed: int, nuisance: float, identities: int) -> int:
    """Write the TinyFace-like set in both layouts (TINYFACE_FOLDERS); returns the number of
    images.
    """
    listed = list_tinyface(identities)
    paths = {
        folder: [f"{folder}/{p.identity}_{p.number}.jpg" for p in photographs]
        for folder, photographs in listed.items()
    }
    photographs, image_paths = sum(listed.values(), []), sum(paths.values(), [])
    faces = list(studio(photographs, "TinyFace"))
    metadata = {
        "image_paths": image_paths,
        "probe_paths": paths["Probe"],
        "gallery_paths": paths["Gallery_Match"],
        "distractor_paths": paths["Gallery_Distractor"],
    }
    made = {"seed": seed, "nuisance": nuisance, "tinyface_identities": identities}
    tree, arrow = (output / folder for folder in TINYFACE_FOLDERS)
    with replacing_folder(tree, made) as folder, replacing_folder(arrow, made) as arrow_folder:
        for name in listed:
            (folder / name).mkdir()
        for path, face in zip(image_paths, faces, strict=True):
            (folder / path).write_bytes(face)
        write_arrow(arrow_folder, {"image": faces, "path": image_paths}, metadata)
    counts = ", ".join(f"{len(names)} {name}" for name, names in paths.items())
    print(f"{tree}: {identities} identities, {counts}")
    print(f"{arrow}: the same in CVLFace's layout")
    return len(faces)


# -- both


def write_arrow(folder: Path, columns: dict, metadata: dict) -> None:
    """Write CVLFace's layout: a ``save_to_disk`` folder of encoded images, ``index`` and what else
    ``columns`` has, and ``metadata.pt``.
    """
    # these two take seconds to load, and the workers import this module too
    import datasets
    import torch

    datasets.disable_progress_bars()
    count = len(columns["image"])
    columns = columns | {
        "index": list(range(count)),
        "image": [{"bytes": face, "path": None} for face in columns["image"]],
    }
    kinds = {
        "image": datasets.Image(),
        "index": datasets.Value("int64"),
        "path": datasets.Value("string"),
    }
    features = datasets.Features({name: kind for name, kind in kinds.items() if name in columns})
    datasets.Dataset.from_dict(
        {name: columns[name] for name in features}, features=features
    ).save_to_disk(folder)
    torch.save(metadata, folder / "metadata.pt")


def sample_rows(studio, seed: int, subjects: int, identities: int) -> list[Row]:
    """Rows for the contact sheet: loose crops and what alignment makes of them, TinyFace probes and
    mates.
    """
    rows = []
    if subjects:
        shots = list(studio(list_frames(seed, subjects)[:COLUMNS]))
        rows.append(Row([shot.loose for shot in shots], ["IJB: loose crops"]))
        rows.append(Row([shot.aligned for shot in shots], ["IJB: aligned"]))
    if identities:
        listed = list_tinyface(identities)
        pairs = zip(listed["Probe"][::2], listed["Gallery_Match"][::2], strict=True)
        photographs = [photograph for pair in pairs for photograph in pair][:COLUMNS]
        rows.append(Row(list(studio(photographs)), ["TinyFace: probe, mate, ..."]))
    return rows
