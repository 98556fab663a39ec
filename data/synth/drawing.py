"""Draw one face with OpenCV polygons. No command; ``synthetic_faces.render`` calls it.

Face coordinates: pixels of the 112x112 crop, origin between the eyes, x to the right of the image,
y down, z towards the camera. Features lie on an ellipsoid that is turned by yaw and pitch, so they
move sideways and the far side is foreshortened.
"""

import cv2
import numpy as np

SIZE = 112
# the eye midpoint of InsightFace's alignment template, a little lower to show more forehead
ORIGIN = np.array([56.0, 53.0])
SUPERSAMPLE = 2  # drawn larger, then averaged: smooth edges without the price of cv2.LINE_AA
FRACTION_BITS = 4  # cv2 takes polygon corners as fixed-point integers

UPPER = 24  # points of the silhouette's upper half, and of its lower
ARC = np.linspace(0, np.pi, UPPER)
CHORD = np.linspace(-1, 1, 17)  # along an eye, a brow, a mouth, a hairline
BULGE = (1 - CHORD**2) ** 0.8
RING = np.stack(
    [
        np.cos(np.linspace(0, 2 * np.pi, 20, endpoint=False)),
        np.sin(np.linspace(0, 2 * np.pi, 20, endpoint=False)),
    ],
    axis=-1,
)
DOT = RING[::3]
SHOULDER = 40  # hair that ends lower falls over the shoulders


def ellipse(centre, radii, unit=None) -> np.ndarray:
    """Points of an ellipse (K, 2)."""
    return centre + (RING if unit is None else unit) * radii


def to_scalar(colour) -> list[float]:
    """Bring a colour into 0..255, as cv2 takes it."""
    return [min(max(float(channel), 0.0), 255.0) for channel in colour]


class Face:
    """The canvas, and the person on it: ``draw_*`` in the order of ``render``; colours are RGB,
    points are face coordinates.
    """

    def __init__(self, who, look, rng):
        self.who = who
        self.look = look
        self.rng = rng
        self.canvas = np.empty((SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE, 3), np.uint8)
        self.shade = np.ones((SIZE, SIZE), np.float32)
        self.sin = np.sin(look.yaw)
        self.cos = np.cos(look.yaw)
        nod = np.sin(look.pitch)
        # yaw, pitch, and no perspective
        head = np.array([(self.cos, 0.0), (0.0, np.cos(look.pitch)), (self.sin, -nod)])
        sin, cos = np.sin(look.roll), np.cos(look.roll)
        self.camera = look.zoom * head @ np.array([(cos, sin), (-sin, cos)])
        # alignment brings the eyes, nose and mouth back to the middle: it undoes most of the turn's
        # shift, and the head moves instead
        self.centre = (
            ORIGIN + (look.shift_x, look.shift_y) - 0.8 * who.depth * np.array([self.sin, -nod])
        )

    # -- from face coordinates to the canvas

    def place(self, x, y, z) -> np.ndarray:
        """Turn points of the head by yaw and pitch, then roll, zoom and shift: crop coordinates (N,
        2).
        """
        return np.array([x, y, z]).T @ self.camera + self.centre

    def place_feature(self, points, relief=0.0) -> np.ndarray:
        """Place points (N, 2) that lie on the face's surface, ``relief`` pixels above it."""
        x, y = np.asarray(points, np.float64).T
        round_off = 1 - (x / (self.who.head_width + 4)) ** 2 - 0.45 * (y / self.who.chin) ** 2
        return self.place(x, y, self.who.depth * np.sqrt(np.maximum(round_off, 0.02)) + relief)

    def place_outline(self, points) -> np.ndarray:
        """Place points (N, 2) of the silhouette: the skull shows its longer side as it turns, the
        chin goes with the face.
        """
        x, y = np.asarray(points, np.float64).T
        widen = np.hypot(self.cos, 1.1 * self.who.depth / self.who.head_width * self.sin)
        depth = self.who.depth * np.interp(y / self.who.chin, [-1, 0, 1], [0.1, 0.25, 0.75])
        # a silhouette is never foreshortened: undo the cosine
        return self.place(x * widen / self.cos, y, depth)

    def fill(self, placed, colour, alpha=1.0) -> None:
        """Fill a polygon of crop coordinates, mixing with what is there when ``alpha`` < 1."""
        corners = np.rint(placed * (SUPERSAMPLE << FRACTION_BITS)).astype(np.int32)
        colour = to_scalar(colour)
        if alpha >= 1:
            cv2.fillPoly(self.canvas, [corners], colour, cv2.LINE_8, FRACTION_BITS)
            return
        (x0, y0), (x1, y1) = (
            np.clip(corners.min(0) >> FRACTION_BITS, 0, SIZE * SUPERSAMPLE),
            (corners.max(0) >> FRACTION_BITS).clip(0) + 2,
        )
        region = self.canvas[y0:y1, x0:x1]
        if region.size:
            painted = region.copy()
            cv2.fillPoly(
                painted,
                [corners - (np.array([x0, y0]) << FRACTION_BITS)],
                colour,
                cv2.LINE_8,
                FRACTION_BITS,
            )
            region[...] = cv2.addWeighted(painted, alpha, region, 1 - alpha, 0)

    def stroke(self, placed, colour, width) -> None:
        """Draw an open line, ``width`` in pixels of the crop."""
        corners = np.rint(placed * (SUPERSAMPLE << FRACTION_BITS)).astype(np.int32)
        thickness = max(1, round(width * SUPERSAMPLE))
        cv2.polylines(
            self.canvas, [corners], False, to_scalar(colour), thickness, cv2.LINE_8, FRACTION_BITS
        )

    def cast(self, placed, amount) -> None:
        """Darken (amount < 0) or brighten a polygon by that fraction; ``light`` blurs the edges.

        Overlaps multiply.
        """
        corners = np.rint(placed * (1 << FRACTION_BITS)).astype(np.int32)
        (x0, y0), (x1, y1) = (
            np.clip(corners.min(0) >> FRACTION_BITS, 0, SIZE),
            np.clip((corners.max(0) >> FRACTION_BITS) + 2, 0, SIZE),
        )
        region = self.shade[y0:y1, x0:x1]
        if region.size:
            factor = np.ones_like(region)
            cv2.fillPoly(
                factor,
                [corners - (np.array([x0, y0]) << FRACTION_BITS)],
                float(1 + amount),
                cv2.LINE_8,
                FRACTION_BITS,
            )
            region *= factor

    # -- the person, and what is behind

    def draw_background(self) -> None:
        """A vertical and horizontal colour gradient with a few shapes; neutral grey without
        nuisance.
        """
        rng, scale = self.rng, self.look.clutter
        corners = 128 + min(scale, 1.0) * rng.uniform(-85, 85, (2, 2, 3))
        self.canvas[...] = cv2.resize(
            corners.astype(np.float32), self.canvas.shape[1::-1], interpolation=cv2.INTER_LINEAR
        )
        for _ in range(rng.poisson(2 * scale)):
            shape = rng.uniform(0, SIZE, 2) + rng.uniform(-45, 45, (rng.integers(3, 7), 2))
            self.fill(shape, rng.uniform(10, 245, 3), rng.uniform(0.3, 0.9))

    def draw_shoulders(self) -> None:
        """Hair behind the head, neck and clothes."""
        who, fancy = self.who, min(self.look.clutter, 1.0)
        if not who.bald:
            back = self.outline() * (1 + (0.6 * who.hair_volume + 2) / who.head_width)
            if who.hair_end < SHOULDER:
                back[:, 1] = np.minimum(back[:, 1], who.hair_end)
            else:
                back = np.concatenate([back[:UPPER], [(44, 70), (-44, 70)]])
            self.fill(self.place_outline(back), 0.75 * who.hair)
        self.fill(self.place_outline([(-17, 30), (17, 30), (20, 75), (-20, 75)]), 0.78 * who.skin)
        clothes = 90 + fancy * self.rng.uniform(-80, 120, 3)
        collar = 66 + 4 * fancy * self.rng.random()
        outline = [(-60, 72), (-20, 59), (0, collar), (20, 59), (60, 72), (60, 90), (-60, 90)]
        self.fill(self.place_outline(outline), clothes)

    def outline(self, grow: float = 0.0) -> np.ndarray:
        """The head's silhouette from the left temple over the top to the right, then down and
        around the chin (2 * UPPER, 2).
        """
        who = self.who
        upper = np.stack(
            [-(who.head_width + grow) * np.cos(ARC), -(who.head_top + grow) * np.sin(ARC)], axis=-1
        )
        fall = np.sin(ARC)[: UPPER // 2]  # 0 at the temples .. 1 at the chin, denser there
        width = who.head_width * (1 - np.minimum(fall, 1) ** who.jaw) ** who.chin_round
        right = np.stack([width, who.chin * fall], axis=-1)
        return np.concatenate([upper, right, right[::-1] * (-1, 1)])

    def draw_head(self) -> None:
        """Ears, head, and the soft shadows that give it a shape."""
        who = self.who
        self.draw_ears(far=True)
        self.fill(self.place_outline(self.outline()), who.skin)
        self.draw_ears(far=False)
        if self.look.side_light:
            side = np.sign(self.look.side_light)
            half = np.array(
                [(4 * side, -60), (6 * side, 8), (3 * side, 60), (50 * side, 60), (50 * side, -60)]
            )
            self.cast(self.place_feature(half), -abs(self.look.side_light))
        for side in (-1, 1):
            eye = (side * who.eye_spacing, who.eye_y - 2)
            self.cast(
                self.place_feature(ellipse(eye, (who.eye_size + 2.5, 6.0))),
                -0.10 - 0.10 * who.lid / 2.8,
            )
            cheek = (side * 0.62 * who.head_width, 0.45 * who.chin)
            self.cast(self.place_feature(ellipse(cheek, (7.0, 9.0))), 0.10 - 0.28 * who.cheek)
            corner = who.mouth_width + 1
            fold = np.array(
                [
                    (who.nose_width + 1, who.nose_length - 2),
                    (corner + 2, who.mouth_y - 2),
                    (corner, who.mouth_y),
                ]
            )
            self.fill(self.place_feature(fold * (side, 1)), 0.75 * who.skin, 0.55 * who.fold)
        self.cast(
            self.place_feature(ellipse((0, who.mouth_y + who.lip_lower + 3.5), (8.0, 2.2))), -0.20
        )
        for height in (0.32, 0.42):
            brow = [(x, -height * who.head_top - 1.5 * np.cos(x / 9)) for x in (-13, -6, 0, 6, 13)]
            if who.age_line > 0.35:
                self.stroke(self.place_feature(brow), (1 - 0.25 * who.age_line) * who.skin, 0.6)
        if who.beard:
            jaw = self.outline()[UPPER:]
            jaw = jaw[jaw[:, 1] > 0.35 * who.chin]
            shaven = np.stack(
                [
                    CHORD * 0.85 * who.head_width,
                    who.mouth_y - 3 - (who.mouth_y - 0.40 * who.chin) * CHORD**4,
                ],
                axis=-1,
            )
            self.fill(
                self.place_outline(np.concatenate([jaw * 0.99, shaven])), 0.9 * who.hair, who.beard
            )

    def draw_ears(self, far: bool) -> None:
        """The ear that the turn hides goes behind the head, the other one in front of its edge."""
        who = self.who
        for side in (-1, 1):
            if far == (side * self.sin > 0) or self.sin == 0:
                x = side * (
                    who.head_width + 1.0 - 0.5 * who.head_width * (not far) * (1 - self.cos)
                )
                for shrink, colour in ((1.0, 0.88), (0.55, 0.68)):
                    points = ellipse(
                        (x, who.ear_y), (0.5 * shrink * who.ear_size, shrink * who.ear_size)
                    )
                    self.fill(self.place_outline(points), colour * who.skin)

    def draw_marks(self) -> None:
        """Moles, freckles, scars: darker or lighter skin at fixed places of the face."""
        who = self.who
        face = np.array([who.head_width, who.chin])
        for marks in (who.freckles, who.moles):
            for x, y, radius, strength in marks:
                self.fill(
                    self.place_feature(ellipse(face * (x, y), (radius, radius), DOT)),
                    (1 - strength) * who.skin,
                )
        for x, y, length, direction in who.scars:
            along = length * np.array([np.cos(direction), np.sin(direction)])
            self.stroke(
                self.place_feature([face * (x, y) - along, face * (x, y) + along]),
                0.72 * who.skin + (30, 0, 0),
                1.0,
            )

    def draw_eye(self, side: int) -> None:
        """White, iris, pupil, lids and brow; ``side`` -1 is the image's left."""
        who, look = self.who, self.look
        centre = np.array([side * who.eye_spacing, who.eye_y])
        height = who.eye_open * (1 - look.eye_close)
        along = CHORD * who.eye_size
        slope = -side * who.eye_tilt * along  # outer corner up for a positive tilt, on both sides
        upper, lower = slope - height * BULGE, slope + 0.55 * height * BULGE

        def at(x, y):
            return self.place_feature(centre + np.stack([x, y], axis=-1))

        self.fill(at(np.append(along, along[::-1]), np.append(upper, lower[::-1])), (226, 222, 218))
        middle = np.interp(look.gaze, along, slope)
        for radius, colour in ((who.iris, who.iris_colour), (0.48 * who.iris, (16, 13, 12))):
            ring = ellipse((look.gaze, middle - 0.2 * height), (radius, radius))
            ring[:, 1] = np.clip(
                ring[:, 1], np.interp(ring[:, 0], along, upper), np.interp(ring[:, 0], along, lower)
            )
            self.fill(at(*ring.T), colour)
        self.stroke(at(along, upper), 0.25 * who.skin, 1.1)
        self.stroke(at(along, lower), 0.62 * who.skin, 0.6)
        self.stroke(at(along, upper - who.lid), 0.68 * who.skin, 0.7)
        self.stroke(at(along, lower + 2.6), (0.92 - 0.2 * who.age_line) * who.skin, 0.7)

        along = CHORD * who.brow_length + 0.15 * side * who.brow_length
        base = -who.brow_y - look.brow_raise - side * who.brow_tilt * along - who.brow_arch * BULGE
        thick = who.brow_thick * (0.45 + 0.55 * BULGE) * (1 - 0.35 * side * CHORD)
        self.fill(
            at(np.append(along, along[::-1]), np.append(base - thick, (base + thick)[::-1])),
            0.8 * who.hair,
            0.85,
        )

    def draw_nose(self) -> None:
        """Bridge, wings, tip and nostrils; the tip stands out from the face."""
        who = self.who
        tip = who.eye_y + who.nose_length
        for side in (-1, 1):
            width, bridge = side * who.nose_width, side * who.nose_bridge
            flank = [
                (bridge, who.eye_y - 3),
                (1.1 * bridge, tip - 9),
                (0.95 * width, tip - 3),
                (width, tip),
            ]
            flank += [(0.5 * width, tip - 2), (0.55 * bridge, tip - 9)]
            self.fill(self.place_feature(flank, 2.0), 0.8 * who.skin, 0.55)
            wing = [(0.85 * width, tip - 4), (width, tip - 1.5), (0.8 * width, tip + 1)]
            self.stroke(self.place_feature(wing, 2.0), 0.6 * who.skin, 0.9)
            hole = ellipse((0.48 * width, tip + 0.6), (0.26 * who.nose_width, 1.1))
            self.fill(self.place_feature(hole, 0.5 * who.nose_relief), 0.32 * who.skin)
        base = [
            (-0.35 * who.nose_width, tip + 1),
            (0, tip + 1 + who.nose_drop),
            (0.35 * who.nose_width, tip + 1),
        ]
        self.stroke(self.place_feature(base, 0.7 * who.nose_relief), 0.62 * who.skin, 0.9)
        self.cast(
            self.place_feature(ellipse((0, tip - 3), (0.4 * who.nose_width, 3.0)), who.nose_relief),
            0.14,
        )

    def draw_mouth(self) -> None:
        """Two lips around an opening with teeth; a smile widens it and lifts the corners."""
        who, look = self.who, self.look
        half = who.mouth_width + 0.6 * look.smile - 0.25 * look.mouth_open
        along = CHORD * half
        line = who.mouth_y - look.smile * (CHORD**2 - 0.3)
        upper_edge = (
            line
            - who.lip_upper * BULGE
            - who.cupid * np.exp(-(((np.abs(CHORD) - 0.22) / 0.12) ** 2))
        )
        open_edge = line + look.mouth_open * BULGE
        lower_edge = open_edge + who.lip_lower * BULGE

        def between(top, bottom):
            return self.place_feature(
                np.stack([np.append(along, along[::-1]), np.append(top, bottom[::-1])], axis=-1),
                1.5,
            )

        red = who.skin * (
            0.86 - 0.25 * who.lip_red,
            0.66 - 0.2 * who.lip_red,
            0.68 - 0.18 * who.lip_red,
        )
        if who.moustache:
            self.fill(
                between(line - 7 * BULGE, line - who.lip_upper * 0.8), 0.9 * who.hair, who.moustache
            )
        if look.mouth_open > 0:
            self.fill(between(line - 0.3, open_edge), (58, 22, 24))
            self.fill(between(line, np.minimum(line + 2.5 * BULGE, open_edge)), (225, 218, 205))
        self.fill(between(upper_edge, line), 0.92 * red)
        self.fill(between(open_edge, lower_edge), red)
        self.stroke(self.place_feature(np.stack([along, line], axis=-1), 1.5), 0.5 * red, 0.8)

    def draw_hair(self) -> None:
        """Hair above the hairline, which is a parted, waved curve from temple to temple."""
        who = self.who
        if who.bald:
            return
        top = self.place_outline(self.outline(grow=who.hair_volume)[:UPPER])
        across = CHORD * (who.head_width + 0.5)
        parted = who.hair_curve * np.abs(across - who.hair_part) / who.head_width
        rise = who.hairline + parted + who.hair_wave * np.sin(across / 5 + who.hair_phase)
        line = who.temple * (1 - BULGE) - np.minimum(rise, who.head_top - 2) * BULGE**0.6
        edge = self.place_feature(np.stack([across, line], axis=-1))
        edge[[0, -1], 0] = top[[0, -1], 0]  # close the gap that the turn opens at the temples
        self.fill(np.concatenate([top, edge[::-1]]), who.hair)
        for step in (0.3, 0.6):  # two strands that follow the hairline
            strand = np.stack(
                [
                    across * (1 - 0.2 * step),
                    line - step * (who.head_top - who.hairline + who.hair_volume),
                ],
                axis=-1,
            )[3:-3]
            self.stroke(self.place_feature(strand), 1.12 * who.hair + 3, 1.0)

    # -- what hides the person

    def draw_occlusion(self) -> None:
        """Glasses, cap, mask or a patch in front, where the photograph has them."""
        who, look, rng = self.who, self.look, self.rng
        colour = rng.uniform(15, 200, 3)
        if look.glasses:
            lens, drop, width = (
                (rng.uniform(9, 12), rng.uniform(6, 9)),
                rng.uniform(0, 3),
                rng.uniform(0.8, 2.0),
            )
            for side in (-1, 1):
                rim = self.place_feature(ellipse((side * 16.5, drop), lens), 4.0)
                glass, alpha = ((24, 22, 26), 0.92) if look.sunglasses else ((205, 215, 225), 0.12)
                self.fill(rim, glass, alpha)
                self.stroke(np.concatenate([rim, rim[:1]]), 0.5 * colour, width)
                arm = [(side * (16.5 + lens[0]), drop - 2), (side * (who.head_width + 2), 0)]
                self.stroke(self.place_feature(arm, 2.0), 0.5 * colour, width)
            bridge = [(lens[0] - 16.5, drop - 1), (16.5 - lens[0], drop - 1)]
            self.stroke(self.place_feature(bridge, 5.0), 0.5 * colour, width)
        if look.cap:
            brim = -rng.uniform(17, 24)
            crown = self.outline(grow=7)[2 : UPPER - 2]
            edge = [(who.head_width + 4, brim), (-who.head_width - 4, brim)]
            self.fill(self.place_outline(np.concatenate([crown[crown[:, 1] < brim], edge])), colour)
            self.fill(
                self.place_feature(ellipse((0, brim), (who.head_width, 5)), 10.0), 0.65 * colour
            )
        if look.mask:
            jaw = self.outline()[UPPER:]
            ear = 0.8 * who.head_width
            mask = np.concatenate([[(ear, 14)], 0.97 * jaw[jaw[:, 1] > 16], [(-ear, 14), (0, 8)]])
            self.fill(self.place_outline(mask), 0.5 * colour + 120)
        if look.patch:
            spot = rng.uniform(8, SIZE - 8, 2)
            self.fill(spot + rng.uniform(-18, 18, (5, 2)), colour)
