"""Features, pairs and lists in the shapes of IJB-C, TinyFace and LFW, drawn at random."""

import numpy as np

DIMENSIONS = 512
IJBC = {
    "images": 469_375,
    "templates": 23_124,
    "medias": 138_836,
    "people": 3_531,
    "genuine": 19_557,
    "impostor": 15_638_932,
    "first gallery": 1_772,
}
TINYFACE = {"people": 2_569, "probes": 3_728, "gallery": 4_443, "distractors": 153_428}
PAIRS = 6_000


def faces_of(person: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """(N, 512) float32 features of various norms: a direction for each person, and noise; person -1
    has noise alone.
    """
    directions = rng.standard_normal((person.max() + 2, DIMENSIONS), dtype=np.float32)
    directions[-1] = 0
    faces = np.empty((len(person), DIMENSIONS), np.float32)
    for start in range(0, len(person), 10_000):
        part = person[start : start + 10_000]
        drawn = rng.standard_normal((len(part), DIMENSIONS), dtype=np.float32)
        faces[start : start + 10_000] = directions[part] + noise * drawn
    return faces * rng.uniform(0.5, 1.5, (len(faces), 1)).astype(np.float32)


def make_ijb(scale: int) -> tuple[tuple, tuple, list[tuple]]:
    """Images in random order, pairs of random templates, and the lists of two galleries: person n
    has gallery template n, all others are probes.
    """
    rng = np.random.default_rng(0)
    size = {name: number // scale for name, number in IJBC.items()}
    people, templates = size["people"], size["templates"]
    person = np.append(np.arange(people), rng.integers(0, people, templates - people))
    more = rng.integers(0, templates, size["images"] - templates)
    of_image = np.append(np.arange(templates), more)
    rng.shuffle(of_image)
    faceness_scores = rng.uniform(0.5, 1, len(of_image)).astype(np.float32)
    medias = rng.integers(0, size["medias"], len(of_image))
    images = faces_of(person[of_image], 8, rng), faceness_scores, of_image, medias

    p1, p2 = rng.integers(0, templates, (2, size["genuine"] + size["impostor"]))
    # probe templates, person by person
    probes_of = np.argsort(person[people:], kind="stable") + people
    first = rng.integers(0, len(probes_of) - 1, size["genuine"])
    p1[: size["genuine"]], p2[: size["genuine"]] = probes_of[first], probes_of[first + 1]
    order = rng.permutation(len(p1))
    p1, p2 = p1[order], p2[order]
    pairs = (person[p1] == person[p2]).astype(np.int64), p1, p2

    probes = np.arange(people, templates)
    galleries = np.split(np.arange(people), [size["first gallery"]])
    searches = [(gallery, person[gallery], probes, person[probes]) for gallery in galleries]
    return images, pairs, searches


def make_tinyface(scale: int) -> tuple[np.ndarray, list[str], dict]:
    rng = np.random.default_rng(1)
    size = {name: number // scale for name, number in TINYFACE.items()}
    people = size["people"]
    probes = rng.integers(0, people, size["probes"])
    more = rng.integers(0, people, size["gallery"] - people)
    person = {
        "Probe": probes,
        "Gallery_Distractor": np.full(size["distractors"], -1),
        "Gallery_Match": np.append(np.arange(people), more),
    }
    paths = {
        role: [f"{role}/{one}_{role}{index}.jpg" for index, one in enumerate(persons)]
        for role, persons in person.items()
    }
    meta = {
        "probe_paths": paths["Probe"],
        "gallery_paths": paths["Gallery_Match"],
        "distractor_paths": paths["Gallery_Distractor"],
    }
    features = faces_of(np.concatenate(list(person.values())), 3, rng)
    return features, [path for role in paths.values() for path in role], meta


def make_pairs_of_faces() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    issame = np.arange(PAIRS) % 600 < 300
    person = np.arange(2 * PAIRS)
    person[1::2][issame] = person[0::2][issame]
    embeddings = faces_of(person, 3, rng)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), issame
