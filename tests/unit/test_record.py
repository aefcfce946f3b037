"""Test records: fields by position or name, defaults, equality, immutability."""

from __future__ import annotations

from typing import Any

import pytest

from caisson.proto.record import NOTHING, Record


class Point(Record):
    x: int
    y: int = 2


class Point3(Point):
    z: int = 3


#: As seen by an untyped program.
POINT: Any = Point


def test_fields_and_defaults() -> None:
    assert (Point(1).x, Point(1).y) == (1, 2)
    assert Point(1, y=5) == Point(x=1, y=5)
    assert Point(1) != Point(2)
    assert Point(1) != Point3(1)
    assert repr(Point3(1)) == "Point3(x=1, y=2, z=3)"
    assert hash(Point(1)) == hash(Point(1, 2))


def test_a_change_is_another_record() -> None:
    point = Point3(1)
    assert point.but(y=9) == Point3(1, 9, 3)
    assert point == Point3(1)
    with pytest.raises(AttributeError):
        point.x = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x


@pytest.mark.parametrize(
    "make", [lambda: POINT(), lambda: POINT(1, 2, 3), lambda: POINT(1, x=1), lambda: POINT(1, q=1)]
)
def test_wrong_fields_are_refused(make: object) -> None:
    with pytest.raises(TypeError):
        make()  # type: ignore[operator]


def test_nothing_stays_nothing() -> None:
    assert NOTHING == {}
    with pytest.raises(TypeError):
        NOTHING["x"] = 1  # type: ignore[index]
