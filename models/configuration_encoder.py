"""Bounds for the numbers of a configuration: a file that is damaged or hostile is refused before anything is allocated.

Needs nothing: this file is copied next to the weights.
"""

MOST_PARAMETERS = 10**10


def whole(name, values, most, length=None):
    """`values` as a list of integers from 1 to `most`, `length` of them; ValueError says what is wrong with `name`."""
    values = list(values) if isinstance(values, (list, tuple)) else values
    fits = isinstance(values, list) and all(type(v) is int and 0 < v <= most for v in values)
    if not fits or not values or (length and len(values) != length):
        count = f"{length} integers" if length else "a list of integers"
        raise ValueError(f"{name}={values!r} must be {count} from 1 to {most}: the configuration is damaged")
    return values


def check_parameters(count):
    """Raise ValueError if a network of so many parameters is more than anyone trains."""
    if count > MOST_PARAMETERS:
        raise ValueError(f"this configuration asks for {count:.1e} parameters: it is damaged")
