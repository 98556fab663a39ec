"""Synthetic 112x112 aligned "faces": ``render(draw_identity(rng), draw_nuisance(rng))``.

What makes a person (IDENTITY: geometry, colours, marks) and what changes between two photographs of
one (NUISANCE, VIEWS: pose, expression, light, occlusion, background, image quality) are drawn
apart, so that a network has something to learn: colours come from narrow palettes which the light
overlaps, and who it is shows in geometry and marks. Lengths are pixels of the crop, angles radians,
colours RGB 0..255; data/synth/drawing.py uses them.
"""

from types import SimpleNamespace

import cv2
import numpy as np

from data.synth.canvas import SIZE
from data.synth.drawing import Face

# name: (centre, half range), uniform
IDENTITY = {
    "head_width": (34.0, 3.6),
    "head_top": (47.0, 4.0),
    "chin": (53.0, 4.5),
    "jaw": (2.6, 0.9),
    "chin_round": (0.58, 0.13),
    "depth": (36.0, 3.0),
    "eye_spacing": (17.0, 2.3),
    "eye_y": (0.0, 2.6),
    "eye_size": (6.6, 1.3),
    "eye_open": (3.4, 1.0),
    "eye_tilt": (0.0, 0.20),
    "iris": (3.0, 0.4),
    "lid": (1.8, 1.0),
    "brow_y": (9.2, 2.2),
    "brow_thick": (1.8, 0.95),
    "brow_tilt": (0.0, 0.20),
    "brow_arch": (1.6, 1.5),
    "brow_length": (10.0, 1.8),
    "nose_length": (20.5, 3.6),
    "nose_width": (7.2, 2.0),
    "nose_bridge": (3.0, 1.0),
    "nose_relief": (7.0, 3.0),
    "nose_drop": (0.8, 1.6),
    "mouth_y": (37.0, 3.0),
    "mouth_width": (13.0, 3.0),
    "lip_upper": (2.2, 1.1),
    "lip_lower": (3.0, 1.3),
    "cupid": (0.8, 0.8),
    "lip_red": (0.5, 0.4),
    "ear_size": (8.0, 2.0),
    "ear_y": (6.0, 3.0),
    "hairline": (29.0, 7.0),
    "hair_curve": (0.0, 7.0),
    "hair_part": (0.0, 16.0),
    "hair_volume": (5.0, 3.5),
    "hair_wave": (1.5, 1.5),
    "hair_phase": (3.0, 3.0),
    "temple": (-6.0, 9.0),
    "fold": (0.5, 0.5),
    "cheek": (0.5, 0.5),
    "age_line": (0.4, 0.4),
    "skin_tone": (0.5, 0.5),
    "skin_warmth": (0.0, 1.0),
    "hair_tone": (0.5, 0.5),
    "hair_red": (0.5, 0.5),
    "iris_tone": (0.5, 0.5),
}
# name: (neutral value, half range at scale 1), uniform
NUISANCE = {
    "pitch": (0.0, 0.16),
    "roll": (0.0, 0.08),
    "zoom": (0.95, 0.05),
    "shift_x": (0.0, 2.5),
    "shift_y": (0.0, 2.5),
    "smile": (0.0, 2.0),
    "brow_raise": (0.0, 1.4),
    "gaze": (0.0, 1.5),
    "light_x": (0.0, 0.35),
    "light_y": (0.0, 0.25),
    "side_light": (0.0, 0.30),
    "gain": (-0.08, 0.34),
    "contrast": (0.0, 0.20),
    "temperature": (0.0, 0.14),
    "tint": (0.0, 0.05),
}
SKIN = np.array([(151, 108, 84), (230, 190, 165)], np.float64)
HAIR = np.array([(30, 24, 22), (62, 44, 33), (104, 76, 52), (142, 112, 78)], np.float64)
IRIS = np.array([(52, 34, 22), (88, 62, 36), (84, 96, 70), (86, 112, 140)], np.float64)
# kinds of photograph: range of |yaw|, pixels of detail before enlargement, how often something
# hides the face relative to "any"
VIEWS = {
    "any": {"yaw": (0.0, 0.60), "detail": (18, 112), "hidden": 1.0},
    "frontal": {"yaw": (0.0, 0.15), "detail": (56, 112), "hidden": 0.4},
    "turned": {"yaw": (0.50, 0.75), "detail": (56, 112), "hidden": 0.4},
    "small": {"yaw": (0.0, 0.25), "detail": (14, 24), "hidden": 0.4},
}


def draw_identity(rng: np.random.Generator) -> SimpleNamespace:
    """Draw one person: every name of IDENTITY, plus hair style, beard, and marks as arrays of (x,
    y, radius, strength).
    """
    who = SimpleNamespace()
    for name, (center, half) in IDENTITY.items():
        setattr(who, name, center + half * rng.uniform(-1, 1))
    who.skin = pick_colour(SKIN, who.skin_tone) + who.skin_warmth * np.array([5.0, 0.0, -6.0])
    who.hair = pick_colour(HAIR, who.hair_tone) + who.hair_red * np.array([22.0, 2.0, -4.0])
    who.iris_colour = pick_colour(IRIS, who.iris_tone)
    who.bald = rng.random() < 0.08
    length = rng.choice([-4.0, 12.0, 34.0, 70.0], p=[0.45, 0.15, 0.2, 0.2])
    who.hair_end = length + rng.uniform(-5, 5)
    who.beard = rng.uniform(0.2, 0.75) if rng.random() < 0.22 else 0.0
    who.moustache = rng.uniform(0.3, 0.8) if rng.random() < 0.2 else 0.0
    who.moles = draw_marks(rng, rng.integers(0, 5), radius=(0.8, 1.7), strength=(0.45, 0.8))
    freckles = rng.integers(15, 45) if rng.random() < 0.25 else 0
    who.freckles = draw_marks(rng, freckles, radius=(0.5, 0.8), strength=(0.15, 0.35))
    # length and direction
    who.scars = draw_marks(rng, int(rng.random() < 0.2), radius=(3.0, 8.0), strength=(0.0, np.pi))
    return who


def draw_marks(rng, count: int, radius, strength) -> np.ndarray:
    """Draw (count, 4) marks: x and y as fractions of the face, so that they stay on every head,
    then radius and strength.
    """
    low, high = np.array([(-0.75, 0.75), (-0.45, 0.85), radius, strength]).T
    return rng.uniform(low, high, (count, 4))


def draw_nuisance(
    rng: np.random.Generator, scale: float = 1.0, view: str = "any"
) -> SimpleNamespace:
    """Draw the circumstances of one photograph. ``scale`` multiplies all ranges and chances (0 =
    none); ``view`` is a name of VIEWS.
    """
    look = SimpleNamespace()
    for name, (neutral, half) in NUISANCE.items():
        setattr(look, name, neutral + scale * half * rng.uniform(-1, 1))
    kind = VIEWS[view]
    yaw = scale * rng.uniform(*kind["yaw"]) * rng.choice([-1, 1])
    # beyond, the far eye would wrap around the head
    look.yaw = float(np.clip(yaw, -0.85, 0.85))
    detail = np.exp(rng.uniform(*np.log(kind["detail"])))
    look.size = int(np.clip(round(SIZE * (detail / SIZE) ** scale), 8, SIZE))

    def happens(chance):
        return rng.random() < chance * scale

    look.mouth_open = scale * rng.uniform(0, 5) if happens(0.35) else 0.0
    look.eye_close = min(1.0, scale * rng.uniform(0, 0.85)) if happens(0.35) else 0.0
    look.glasses = happens(0.22 * kind["hidden"])
    look.sunglasses = look.glasses and happens(0.2)
    look.cap = happens(0.10 * kind["hidden"])
    look.mask = happens(0.05 * kind["hidden"])
    look.patch = happens(0.08 * kind["hidden"])
    look.blur = scale * rng.uniform(0, 1.3) if happens(0.5) else 0.0
    look.noise = scale * rng.uniform(0, 9)
    look.clutter = scale
    look.quality = int(np.clip(95 - scale * rng.uniform(0, 35), 5, 95))
    # seed for what has no name: background, clothes, accessories, sensor noise
    look.texture = int(rng.integers(2**32))
    return look


def pick_colour(palette: np.ndarray, position: float) -> np.ndarray:
    """Interpolate an RGB palette (K, 3) at ``position`` in [0, 1]."""
    knots = np.linspace(0, 1, len(palette))
    return np.array([np.interp(position, knots, channel) for channel in palette.T])


def encode(image: np.ndarray, quality: int) -> bytes:
    """Encode an RGB image as JPEG bytes."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def render(who: SimpleNamespace, look: SimpleNamespace) -> np.ndarray:
    """Draw one photograph: uint8 RGB (112, 112, 3), a function of its two arguments only."""
    rng = np.random.default_rng(look.texture)
    face = Face(who, look, rng)
    face.draw_background()
    face.draw_shoulders()
    face.draw_head()
    face.draw_marks()
    for side in (-1, 1):
        face.draw_eye(side)
    face.draw_nose()
    face.draw_mouth()
    face.draw_hair()
    face.draw_occlusion()
    image = cv2.resize(face.canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return photograph(light(image, face.shade, look), look, rng)


def light(image: np.ndarray, shade: np.ndarray, look: SimpleNamespace) -> np.ndarray:
    """Multiply by the soft shadows (1 = none), the light's gradient, gain and colour; returns
    float32, 0..255 and above.
    """
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    gradient = (1 + look.light_x * ramp[None, :] + look.light_y * ramp[:, None]).clip(0.15)
    colour = np.exp(look.gain + np.array([look.temperature, look.tint, -look.temperature]))
    weight = cv2.GaussianBlur(shade, (0, 0), 2.5) * gradient
    lit = image * weight[..., None] * colour.astype(np.float32)
    return (lit - 110) * np.float32(np.exp(look.contrast)) + 110


def photograph(image: np.ndarray, look: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """Blur, reduce to ``look.size`` pixels and enlarge again, add sensor noise; returns uint8."""
    if look.blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), look.blur)
    if look.size < SIZE:
        small = cv2.resize(image, (look.size, look.size), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    if look.noise > 0:
        image = image + rng.standard_normal(image.shape, np.float32) * np.float32(look.noise)
    return np.clip(image, 0, 255).astype(np.uint8)
