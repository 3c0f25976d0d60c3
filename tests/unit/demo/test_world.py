"""The generated pictures: none twice, the same for a seed, and painted where the description says."""

import numpy as np

from vlmo.demo.drawing import box, picture
from vlmo.demo.scenes import COLORS, PICTURE_SIZE, PLACES, SHAPES, Scene, Thing, World


def test_no_picture_is_drawn_twice() -> None:
    scenes = World(0).scenes(3000)
    assert len({scene.signature for scene in scenes}) == 3000


def test_a_seed_gives_the_same_pictures_and_another_seed_others() -> None:
    assert World(3).scenes(20) == World(3).scenes(20)
    assert World(3).scenes(20) != World(4).scenes(20)


def test_things_have_a_quarter_each_in_reading_order_and_everything_occurs() -> None:
    things = [thing for scene in World(1).scenes(300) for thing in scene.things]
    for scene in World(1).scenes(300):
        places = [thing.place for thing in scene.things]
        assert places == sorted(set(places)) and len(places) in (2, 3)
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.place for thing in things} == set(range(len(PLACES)))


def test_neighbours() -> None:
    left, right, below = Thing("star", "red", 0), Thing("heart", "blue", 1), Thing("circle", "red", 2)
    scene = Scene((left, right, below), "sand")
    assert scene.neighbour(right, "left of") == left
    assert scene.neighbour(left, "right of") == right
    assert scene.neighbour(left, "below") == below
    assert scene.neighbour(below, "above") == left
    assert scene.neighbour(right, "below") is None
    assert scene.neighbour(left, "left of") is None


def test_pictures_are_painted_the_same_every_time() -> None:
    scene = World(5).scene()
    image = picture(scene)
    assert image.size == (PICTURE_SIZE, PICTURE_SIZE) and image.mode == "RGB"
    assert image.tobytes() == picture(scene).tobytes()


def test_a_thing_is_painted_within_its_box() -> None:
    for scene in World(6).scenes(60):
        empty = np.asarray(picture(Scene((), scene.ground, scene.painting)), int)
        for thing in scene.things:
            alone = np.asarray(picture(Scene((thing,), scene.ground, scene.painting)), int)
            rows, columns = np.nonzero(np.abs(alone - empty).max(-1) > 60)  # the soft shadow is below that
            x, y, width, height = box(thing)
            assert len(rows) > 200
            assert x - 1 <= columns.min() and columns.max() <= x + width
            assert y - 1 <= rows.min() and rows.max() <= y + height
            assert min(x, y) >= 0 and max(x + width, y + height) <= PICTURE_SIZE
