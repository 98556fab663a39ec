"""One face, part by part: ``data.synth.faces.render`` calls the parts in their order."""

import cv2
import numpy as np

from data.synth.canvas import SIZE, Canvas

# points of the silhouette's upper half, and of its lower
UPPER = 24
ARC = np.linspace(0, np.pi, UPPER)
# along an eye, a brow, a mouth, a hairline
CHORD = np.linspace(-1, 1, 17)
BULGE = (1 - CHORD**2) ** 0.8
ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
RING = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
DOT = RING[::3]
# hair that ends lower falls over the shoulders
SHOULDER = 40


def ellipse(center, radii, unit: np.ndarray = RING) -> np.ndarray:
    """Points of an ellipse (K, 2)."""
    return center + unit * radii


def outline_between(along, top, bottom) -> np.ndarray:
    """Points (K, 2) along an upper edge and back along a lower one."""
    return np.stack([np.append(along, along[::-1]), np.append(top, bottom[::-1])], axis=-1)


class Face(Canvas):
    """A person on a canvas: ``draw_*`` in the order of ``render``; points are face coordinates."""

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
        # 0 at the temples .. 1 at the chin, denser there
        fall = np.sin(ARC)[: UPPER // 2]
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
            half = np.array([(4, -60), (6, 8), (3, 60), (50, 60), (50, -60)]) * (side, 1)
            self.cast(self.place_feature(half), -abs(self.look.side_light))
        for side in (-1, 1):
            eye = (side * who.eye_spacing, who.eye_y - 2)
            socket = ellipse(eye, (who.eye_size + 2.5, 6.0))
            self.cast(self.place_feature(socket), -0.10 - 0.10 * who.lid / 2.8)
            cheek = (side * 0.62 * who.head_width, 0.45 * who.chin)
            self.cast(self.place_feature(ellipse(cheek, (7.0, 9.0))), 0.10 - 0.28 * who.cheek)
            corner = who.mouth_width + 1
            nostril = (who.nose_width + 1, who.nose_length - 2)
            fold = [nostril, (corner + 2, who.mouth_y - 2), (corner, who.mouth_y)]
            self.fill(
                self.place_feature(np.array(fold) * (side, 1)), 0.75 * who.skin, 0.55 * who.fold
            )
        below_lip = ellipse((0, who.mouth_y + who.lip_lower + 3.5), (8.0, 2.2))
        self.cast(self.place_feature(below_lip), -0.20)
        for height in (0.32, 0.42):
            brow = [(x, -height * who.head_top - 1.5 * np.cos(x / 9)) for x in (-13, -6, 0, 6, 13)]
            if who.age_line > 0.35:
                self.stroke(self.place_feature(brow), (1 - 0.25 * who.age_line) * who.skin, 0.6)
        if who.beard:
            self.draw_beard()

    def draw_beard(self) -> None:
        """Along the jaw, up to a curve below the cheeks."""
        who = self.who
        jaw = self.outline()[UPPER:]
        jaw = jaw[jaw[:, 1] > 0.35 * who.chin]
        edge = who.mouth_y - 3 - (who.mouth_y - 0.40 * who.chin) * CHORD**4
        shaven = np.stack([CHORD * 0.85 * who.head_width, edge], axis=-1)
        beard = self.place_outline(np.concatenate([jaw * 0.99, shaven]))
        self.fill(beard, 0.9 * who.hair, who.beard)

    def draw_ears(self, far: bool) -> None:
        """The ear that the turn hides goes behind the head, the other one in front of its edge."""
        who = self.who
        for side in (-1, 1):
            if far != (side * self.sin > 0) and self.sin != 0:
                continue
            x = side * (who.head_width + 1.0 - 0.5 * who.head_width * (not far) * (1 - self.cos))
            for shrink, colour in ((1.0, 0.88), (0.55, 0.68)):
                radii = (0.5 * shrink * who.ear_size, shrink * who.ear_size)
                ear = ellipse((x, who.ear_y), radii)
                self.fill(self.place_outline(ear), colour * who.skin)

    def draw_marks(self) -> None:
        """Moles, freckles, scars: darker or lighter skin at fixed places of the face."""
        who = self.who
        face = np.array([who.head_width, who.chin])
        for marks in (who.freckles, who.moles):
            for x, y, radius, strength in marks:
                mark = ellipse(face * (x, y), (radius, radius), DOT)
                self.fill(self.place_feature(mark), (1 - strength) * who.skin)
        for x, y, length, direction in who.scars:
            along = length * np.array([np.cos(direction), np.sin(direction)])
            scar = [face * (x, y) - along, face * (x, y) + along]
            self.stroke(self.place_feature(scar), 0.72 * who.skin + (30, 0, 0), 1.0)

    def draw_eye(self, side: int) -> None:
        """White, iris, pupil, lids and brow; ``side`` -1 is the image's left."""
        who, look = self.who, self.look
        center = np.array([side * who.eye_spacing, who.eye_y])
        height = who.eye_open * (1 - look.eye_close)
        along = CHORD * who.eye_size
        # outer corner up for a positive tilt, on both sides
        slope = -side * who.eye_tilt * along
        upper, lower = slope - height * BULGE, slope + 0.55 * height * BULGE

        def at(x, y):
            return self.place_feature(center + np.stack([x, y], axis=-1))

        def between(top, bottom):
            return self.place_feature(center + outline_between(along, top, bottom))

        self.fill(between(upper, lower), (226, 222, 218))
        middle = np.interp(look.gaze, along, slope)
        for radius, colour in ((who.iris, who.iris_colour), (0.48 * who.iris, (16, 13, 12))):
            ring = ellipse((look.gaze, middle - 0.2 * height), (radius, radius))
            x, y = ring.T
            ring[:, 1] = np.clip(y, np.interp(x, along, upper), np.interp(x, along, lower))
            self.fill(at(*ring.T), colour)
        self.stroke(at(along, upper), 0.25 * who.skin, 1.1)
        self.stroke(at(along, lower), 0.62 * who.skin, 0.6)
        self.stroke(at(along, upper - who.lid), 0.68 * who.skin, 0.7)
        self.stroke(at(along, lower + 2.6), (0.92 - 0.2 * who.age_line) * who.skin, 0.7)

        along = CHORD * who.brow_length + 0.15 * side * who.brow_length
        base = -who.brow_y - look.brow_raise - side * who.brow_tilt * along - who.brow_arch * BULGE
        thick = who.brow_thick * (0.45 + 0.55 * BULGE) * (1 - 0.35 * side * CHORD)
        self.fill(between(base - thick, base + thick), 0.8 * who.hair, 0.85)

    def draw_nose(self) -> None:
        """Bridge, wings, tip and nostrils; the tip stands out from the face."""
        who = self.who
        tip = who.eye_y + who.nose_length
        for side in (-1, 1):
            width, bridge = side * who.nose_width, side * who.nose_bridge
            outer = [(1.1 * bridge, tip - 9), (0.95 * width, tip - 3), (width, tip)]
            inner = [(0.5 * width, tip - 2), (0.55 * bridge, tip - 9)]
            flank = [(bridge, who.eye_y - 3), *outer, *inner]
            self.fill(self.place_feature(flank, 2.0), 0.8 * who.skin, 0.55)
            wing = [(0.85 * width, tip - 4), (width, tip - 1.5), (0.8 * width, tip + 1)]
            self.stroke(self.place_feature(wing, 2.0), 0.6 * who.skin, 0.9)
            hole = ellipse((0.48 * width, tip + 0.6), (0.26 * who.nose_width, 1.1))
            self.fill(self.place_feature(hole, 0.5 * who.nose_relief), 0.32 * who.skin)
        left, right = (-0.35 * who.nose_width, tip + 1), (0.35 * who.nose_width, tip + 1)
        base = [left, (0, tip + 1 + who.nose_drop), right]
        self.stroke(self.place_feature(base, 0.7 * who.nose_relief), 0.62 * who.skin, 0.9)
        highlight = ellipse((0, tip - 3), (0.4 * who.nose_width, 3.0))
        self.cast(self.place_feature(highlight, who.nose_relief), 0.14)

    def draw_mouth(self) -> None:
        """Two lips around an opening with teeth; a smile widens it and lifts the corners."""
        who, look = self.who, self.look
        half = who.mouth_width + 0.6 * look.smile - 0.25 * look.mouth_open
        along = CHORD * half
        line = who.mouth_y - look.smile * (CHORD**2 - 0.3)
        cupid = who.cupid * np.exp(-(((np.abs(CHORD) - 0.22) / 0.12) ** 2))
        upper_edge = line - who.lip_upper * BULGE - cupid
        open_edge = line + look.mouth_open * BULGE
        lower_edge = open_edge + who.lip_lower * BULGE

        def between(top, bottom):
            return self.place_feature(outline_between(along, top, bottom), 1.5)

        red = who.skin * (np.array([0.86, 0.66, 0.68]) - np.array([0.25, 0.2, 0.18]) * who.lip_red)
        if who.moustache:
            moustache = between(line - 7 * BULGE, line - who.lip_upper * 0.8)
            self.fill(moustache, 0.9 * who.hair, who.moustache)
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
        # close the gap that the turn opens at the temples
        edge[[0, -1], 0] = top[[0, -1], 0]
        self.fill(np.concatenate([top, edge[::-1]]), who.hair)
        # two strands that follow the hairline
        for step in (0.3, 0.6):
            height = line - step * (who.head_top - who.hairline + who.hair_volume)
            strand = np.stack([across * (1 - 0.2 * step), height], axis=-1)[3:-3]
            self.stroke(self.place_feature(strand), 1.12 * who.hair + 3, 1.0)

    # -- what hides the person

    def draw_occlusion(self) -> None:
        """Glasses, cap, mask or a patch in front, where the photograph has them."""
        who, look, rng = self.who, self.look, self.rng
        colour = rng.uniform(15, 200, 3)
        if look.glasses:
            self.draw_glasses(0.5 * colour)
        if look.cap:
            brim = -rng.uniform(17, 24)
            crown = self.outline(grow=7)[2 : UPPER - 2]
            edge = [(who.head_width + 4, brim), (-who.head_width - 4, brim)]
            self.fill(self.place_outline(np.concatenate([crown[crown[:, 1] < brim], edge])), colour)
            shield = ellipse((0, brim), (who.head_width, 5))
            self.fill(self.place_feature(shield, 10.0), 0.65 * colour)
        if look.mask:
            jaw = self.outline()[UPPER:]
            ear = 0.8 * who.head_width
            mask = np.concatenate([[(ear, 14)], 0.97 * jaw[jaw[:, 1] > 16], [(-ear, 14), (0, 8)]])
            self.fill(self.place_outline(mask), 0.5 * colour + 120)
        if look.patch:
            spot = rng.uniform(8, SIZE - 8, 2)
            self.fill(spot + rng.uniform(-18, 18, (5, 2)), colour)

    def draw_glasses(self, colour) -> None:
        """Two lenses, dark ones or clear, in a frame with arms and a bridge."""
        rng = self.rng
        lens = (rng.uniform(9, 12), rng.uniform(6, 9))
        drop = rng.uniform(0, 3)
        width = rng.uniform(0.8, 2.0)
        glass, alpha = ((24, 22, 26), 0.92) if self.look.sunglasses else ((205, 215, 225), 0.12)
        for side in (-1, 1):
            rim = self.place_feature(ellipse((side * 16.5, drop), lens), 4.0)
            self.fill(rim, glass, alpha)
            self.stroke(np.concatenate([rim, rim[:1]]), colour, width)
            arm = [(side * (16.5 + lens[0]), drop - 2), (side * (self.who.head_width + 2), 0)]
            self.stroke(self.place_feature(arm, 2.0), colour, width)
        bridge = [(lens[0] - 16.5, drop - 1), (16.5 - lens[0], drop - 1)]
        self.stroke(self.place_feature(bridge, 5.0), colour, width)
