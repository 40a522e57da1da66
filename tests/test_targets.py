"""Tables of whole-volume labels."""

import pytest

from data.targets import as_classes, as_numbers, read_targets

SUBJECTS = ["a/1", "a/2", "b/2", "b/3", "sub/x.nii"]


def table(tmp_path, *lines, name="t.csv"):
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path / name


def test_subjects_are_found_with_or_without_their_data_set(tmp_path):
    by_comma = table(tmp_path, "subject, age", "1,30", "a/2,31", "b/2,32", "3,33", ",", "sub/x.nii,9.5", "other,1")
    with pytest.warns(UserWarning, match=r"1 of the 6 that .* lists have no volume, such as other"):
        targets = read_targets(by_comma, "age", SUBJECTS)
    assert as_numbers(targets) == {"a/1": 30, "a/2": 31, "b/2": 32, "b/3": 33, "sub/x.nii": 9.5}
    by_tab = table(tmp_path, "path\tage", "1\t30", "2\t31", name="t.tsv")
    left_out = pytest.warns(UserWarning, match=r"4 of 5 subjects are not in .* and are left out, such as a/2")
    with left_out, pytest.warns(UserWarning, match=r"1 of the 2 that .* lists have no volume, such as 2"):
        assert read_targets(by_tab, "age", SUBJECTS) == {"a/1": "30"}  # whose 2 it is, is not known


def test_classes_are_in_order_of_their_numbers_then_of_their_names():
    targets = dict(zip("abcdef", ("10", "9", "yes", "yes", "9", "10")))
    assert as_classes(targets) == (("9", "10", "yes"), {"a": 1, "b": 0, "c": 2, "d": 2, "e": 0, "f": 1})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["subject,age", "1,nan"], "line 2 has no age"),
        (["subject,age", "1,30", "3,"], "line 3 has no age"),
        (["subject,age", "1"], "line 2 has no age"),
        (["subject,age", ","], "no line below its columns"),
        (["subject,age", ",3"], "line 2 has no subject"),
        (["subject,age", "1,30", "1,31"], "line 3: 1 has two values of age, 30 and 31"),
        (["subject,sex", "1,f"], "no column age among its columns subject, sex"),
        (["age", "1"], "no column subject or path"),
        ([""], "no column subject or path among its columns"),
        (["subject,age", "7,30"], "lists none of the 5 subjects, such as a/1"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, lines, said):
    with pytest.raises(ValueError, match=said):
        read_targets(table(tmp_path, *lines), "age", SUBJECTS)


def test_a_missing_table_and_values_that_do_not_fit_are_said(tmp_path):
    with pytest.raises(ValueError, match="no such table"):
        read_targets(tmp_path / "none.csv", "age", SUBJECTS)
    with pytest.raises(ValueError, match="a has 'old', which is no number"):
        as_numbers({"a": "old"})
    with pytest.raises(ValueError, match="a has 'inf'"):
        as_numbers({"a": "inf"})
    with pytest.raises(ValueError, match="class 2 has one subject of 3"):
        as_classes({"a": "1", "b": "2", "c": "1"})
    with pytest.raises(ValueError, match="all 2 subjects are of one class, 1"):
        as_classes({"a": "1", "b": "1"})
