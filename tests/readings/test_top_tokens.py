import mlx.core as mx

from metalens.ops import LensStats
from metalens.readings.top_tokens import predictions_of


def test_predictions_are_plain_python():
    ids = mx.array([[[5, 2], [7, 5]], [[2, 7], [5, 2]]], dtype=mx.int32)
    logits = mx.array([[[3.0, 1.0], [2.0, 0.5]], [[9.0, -1.0], [0.0, -2.0]]])
    stats = LensStats(mx.zeros((2, 2)), mx.zeros((2, 2)), mx.ones((2, 2)), ids, logits)
    found = predictions_of(stats, [4, 0], {2: "b", 5: "e", 7: "g"})
    assert found == {
        4: [[(5, 3.0, "e"), (2, 1.0, "b")], [(7, 2.0, "g"), (5, 0.5, "e")]],
        0: [[(2, 9.0, "b"), (7, -1.0, "g")], [(5, 0.0, "e"), (2, -2.0, "b")]],
    }
    assert list(found) == [4, 0]
    assert all(type(i) is int and type(z) is float for layer in found.values() for position in layer for i, z, _ in position)
