"""The pictures show what a run logged, whatever the method calls it."""

import pytest
from matplotlib import pyplot as plt

from training import pictures

RECORD = {
    "step": 1,
    "loss": 3.0,
    "spin": 1.0,
    "spin_accuracy": 0.25,
    "gradient_of_spin": 7.0,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "seconds": 0.5,
    "data_wait": 0.0,
    "skipped": 0,
}


@pytest.fixture
def titles(monkeypatch, tmp_path):
    """Titles and lines of the panels that `draw_losses` draws."""
    drawn = {}

    def keep(figure, path):
        drawn.update({axis.get_title(): axis.lines for axis in figure.axes if axis.get_visible()})
        plt.close(figure)

    monkeypatch.setattr(pictures, "save", keep)

    def draw(records, terms, held_out=()):
        drawn.clear()
        pictures.draw_losses(records, terms, tmp_path / "losses.png", held_out)
        return drawn

    return draw


def test_terms_are_drawn_with_their_words_and_what_was_watched_of_them_but_no_bookkeeping(titles):
    drawn = titles([RECORD, {**RECORD, "step": 2}], {"spin": "guessing a turn"})
    assert list(drawn) == ["loss", "spin\nguessing a turn", "spin accuracy"]
    assert drawn["spin\nguessing a turn"][0].get_xdata().tolist() == [1, 2]


def test_a_key_that_some_records_lack_is_drawn_where_it_is(titles):
    skipped = {"step": 2, "skipped": 1, "grad_norm": 1.0}  # a step that was not finite
    drawn = titles([RECORD, {**skipped, "loss": 2.0}, {**RECORD, "step": 3, "late": 5.0}], {"spin": ""})
    assert drawn["late"][0].get_xdata().tolist() == [3]
    assert drawn["spin"][0].get_xdata().tolist() == [1, 3]


def test_held_out_losses_are_dots_and_what_has_learned_nothing_a_level(titles):
    held_out = [{"step": 1, "spin": 0.9, "spin_by_guessing": 1.5}, {"step": 2, "spin": 0.7, "spin_by_guessing": 1.5}]
    _, dots, level = titles([RECORD, {**RECORD, "step": 2}], {"spin": ""}, held_out)["spin"]
    assert dots.get_xydata().tolist() == [[1, 0.9], [2, 0.7]]
    assert set(level.get_ydata()) == {1.5}
    assert level.get_label() == "guessing"


def test_nothing_logged_yet_is_no_error(titles):
    assert list(titles([], {"spin": ""})) == ["loss"]
