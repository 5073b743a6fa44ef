"""The drawn world: what is drawn is what was asked for, and the same for the same seed."""

import numpy as np
import pytest

from fastunlearn.data import canvas


def test_size_of_the_world():
    assert len(canvas.STYLES) == 24
    assert len(canvas.OBJECTS) == 20
    assert canvas.THEMES[0] == canvas.SEED_STYLE == "Photo"
    assert set(canvas.THEMES) == {canvas.SEED_STYLE, *canvas.STYLES}


def test_prompt_is_the_benchmarks_sentence():
    assert canvas.prompt("Cat", "Pop Art") == "A Cat image in Pop Art style."
    assert canvas.prompt("Cat", "Pop_Art") == "A Cat image in Pop Art style."


@pytest.mark.parametrize("style", canvas.THEMES)
def test_every_pair_is_drawn_and_no_two_alike(style):
    rng = np.random.default_rng(3)
    pictures = [canvas.draw(object, style, rng) for object in canvas.OBJECTS]
    for picture in pictures:
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 5  # something is there
    assert len({p.tobytes() for p in pictures}) == len(pictures)


def test_same_seed_same_picture_and_jitter():
    first, again, other = (canvas.draw("Key", "Clay", np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_styles_differ_more_between_than_within():
    # Mean colours and their spread tell most styles apart: the nearest picture of the same object is of the same style.
    def signature(style, seed):
        picture = canvas.draw("Star", style, np.random.default_rng(seed)).astype(np.float64)
        return np.concatenate(
            [picture.mean((0, 1)), picture.std((0, 1)), np.abs(np.diff(picture, axis=1)).mean((0, 1))]
        )

    known = {style: [signature(style, s) for s in range(8)] for style in canvas.THEMES}
    hits = 0
    for style in canvas.THEMES:
        new = signature(style, 99)
        hits += style == min(known, key=lambda k: min(np.linalg.norm(new - old) for old in known[k]))
    assert hits >= 20  # of 25


@pytest.mark.parametrize(
    ("name", "found"), [("pop_art", "Pop Art"), (" CAT ", "Cat"), ("Stained Glass", "Stained Glass")]
)
def test_spelling_of_concepts(name, found):
    assert canvas.concept(name) == found


def test_unknown_concepts_are_named_with_the_list():
    with pytest.raises(ValueError, match=r"'Waterclor' is not on the canvas. Did you mean 'Watercolor'\?.*Woodcut"):
        canvas.concept("Waterclor")
    with pytest.raises(ValueError, match=r"'Dragon' is not on the canvas.*Umbrella"):
        canvas.draw("Dragon", "Clay", np.random.default_rng(0))
    with pytest.raises(ValueError, match="size: 50"):
        canvas.draw("Cat", "Clay", np.random.default_rng(0), size=50)
