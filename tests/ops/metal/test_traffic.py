"""Compare what the kernels read, write and multiply, counted in emulation, with the formulas of metalens.ops.metal.cost."""

import mlx.core as mx
import pytest

import mslcpu
from metalens.ops import lens_compare, lens_kl, lens_stats, lens_target
from metalens.ops.metal import constants, cost, source, speed, tuning
from metalens.ops.metal import stats as metal_stats
from support import oracle
from support.metal_emulation import M1, M3, emulated, needs_clang

pytestmark = needs_clang

V, D = 515, 64


def head_bytes(head, rows=None):
    w = head.weight
    return (rows or V) * (w.values.shape[1] * 4 + 2 * w.scales.shape[1] * w.scales.itemsize)


def of_weight(report):
    return [report.buffers[name] for name in ("values", "scales", "biases")]


def only(reports, part):
    (found,) = [r for r in reports if part in r.name]
    return found


@pytest.mark.parametrize("device", [M1, M3], ids=["M1", "M3"])
@pytest.mark.parametrize(("layers", "tokens"), [(4, 5), (16, 4), (7, 11)])
@pytest.mark.parametrize("with_model", [True, False])
def test_lens_stats_writes_no_logits_and_reads_the_head_once_per_block(rng, device, layers, tokens, with_model):
    head = oracle.make_head(rng, V, D)
    n, n_model = oracle.random_array(rng, layers, tokens, D), oracle.random_array(rng, tokens, D)
    with emulated(device), mslcpu.recording() as reports:
        stats = lens_stats(n, head, 5, n_model if with_model else None)
        mx.eval(stats.lse)
    report = only(reports, "lens_stats_float")
    blocks = tuning.blocks(*((layers, tokens) if with_model else (1, layers * tokens)), with_model, device.generation)
    assert sum(t.unique_read for t in of_weight(report)) == head_bytes(head)
    assert report.buffers["values"].read == blocks.count * V * D // 2  # each block reads each byte once
    # Every unit reads its scale, all but the first unit of a group from the cache.
    assert report.buffers["scales"].read == blocks.count * V * D // 8 * 4
    assert report.matrix_ops == cost.lens_stats(layers, tokens, V, D, head_bytes(head), with_model, device.generation).matrix_ops
    written = sum(t.unique_written for t in report.buffers.values())
    _, splits = tuning.tile_split(V, blocks.count, device)
    assert written == splits * blocks.count * blocks.rows * 4 * (constants.FIELDS + 2 * 5) < layers * tokens * V * 4


@pytest.mark.parametrize("labels", [1, 3])
def test_labels_cost_one_tile_for_each_block_however_many_splits(rng, labels):
    head, n = oracle.make_head(rng, V, D), oracle.random_array(rng, 3, 8, D)
    with emulated(), mslcpu.recording() as reports:
        mx.eval(lens_stats(n, head).lse, lens_stats(n, head, labels=mx.arange(8 * labels).reshape(8, labels)).lse)
    without, with_labels = (r for r in reports if "lens_stats_float" in r.name)
    assert only(reports, "lens_label_logits").matrix_ops == cost.label_logits(1, 24, False, labels, D, M1.generation).matrix_ops
    assert with_labels.matrix_ops == without.matrix_ops == cost.tile_product(24, V, D)
    # A split counts the tokens above every label; once it has read the vocabulary, nothing more is written.
    assert with_labels.buffers["above"].unique_written == 4 * labels * 24 * tuning.tile_split(V, 1, M1)[1]


@pytest.mark.parametrize("labels", [1, 9])
def test_labels_of_few_rows_cost_a_matrix_each(rng, labels):
    head, n = oracle.make_head(rng, V, D), oracle.random_array(rng, 1, 3, D)
    ids = mx.array(rng.integers(0, V, (3, labels)))
    with emulated(), mslcpu.recording() as reports:
        mx.eval(vars(lens_stats(n, head, 1, None, ids)))
    report = only(reports, "lens_label_logits_vector")
    assert report.matrix_ops == cost.label_logits(1, 3, False, labels, D, M1.generation).matrix_ops
    assert report.buffers["values"].read == 3 * labels * D // 2
    assert report.buffers["n"].read == -(-labels // constants.VECTOR_SIMDS) * 3 * D * 4


@pytest.mark.parametrize(("layers", "tokens", "one"), [(3, 7, True), (3, 7, False)])
def test_a_comparison_writes_each_chunk_once_and_reads_it_twice(rng, layers, tokens, one):
    head = oracle.make_head(rng, V, D, offset=1.0)
    a, b = oracle.random_array(rng, layers, tokens, D), oracle.random_array(rng, 1 if one else layers, tokens, D)
    rows, rows_b = layers * tokens, b.shape[0] * tokens
    with emulated(), mslcpu.recording() as reports:
        mx.eval(vars(lens_compare(a, b, head)))
    assert len(reports) == 3
    expected = cost.lens_compare(rows, rows_b, V, D, head_bytes(head), M1.generation, with_offset=True)
    assert sum(r.matrix_ops for r in reports) == expected.matrix_ops
    report = only(reports, "lens_compare").buffers
    assert (report["a"].read, report["a"].unique_read) == (2 * rows * V * 4, rows * V * 4)
    assert (report["b"].read, report["b"].unique_read) == (2 * rows * V * 4, rows_b * V * 4)  # the layers of a share a row of b, from the cache
    # Both sides read the offset, which has two names.
    counted = sum(t.unique_read + t.unique_written for r in reports for t in r.buffers.values()) - report["offset_b"].unique_read
    assert expected.bytes <= counted <= expected.bytes + 3 * 64


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (7, 1), (3, 2), (1, 4)])
def test_few_rows_read_the_head_exactly_once_and_the_rows_once_per_threadgroup(rng, layers, tokens):
    head = oracle.make_head(rng, V, D)
    n, n_model = oracle.random_array(rng, layers, tokens, D), oracle.random_array(rng, tokens, D)
    with emulated(), mslcpu.recording() as reports:
        mx.eval(lens_stats(n, head, 3, n_model).lse)
    report = only(reports, "lens_stats_vector")
    assert sum(t.read for t in of_weight(report)) == sum(t.unique_read for t in of_weight(report)) == head_bytes(head)
    groups = -(-V // (constants.VECTOR_SIMDS * constants.VECTOR_IDS))
    assert report.buffers["n"].read + report.buffers["n_model"].read == groups * (layers + 1) * tokens * D * 4
    expected = cost.lens_stats(layers, tokens, V, D, head_bytes(head), True, M1.generation)
    assert report.matrix_ops == expected.matrix_ops == -(-V // 8) * 128 // 8


@pytest.mark.parametrize("vocab", [128_256, 262_144])
@pytest.mark.parametrize("architecture", ["applegpu_g13g", "applegpu_g14s", "applegpu_g16s", "applegpu_g15d"])
def test_few_rows_of_a_large_head_cost_little_beside_the_head(architecture, vocab):
    """The test above shows that each threadgroup reads X once in a pass. Eight rows in float32 then add a ninth to the bytes of a 4-bit head."""
    gpu, depth = tuning.Device(architecture, 2**34), 2048
    with tuning.planned_for(gpu):
        plan = metal_stats.division(7, 1, vocab, True)
    passes = -(-plan.ids_per_split // constants.VECTOR_PASS)
    rows = plan.groups * passes * 8 * depth * 4
    largest = constants.VECTOR_SIMDS * constants.VECTOR_PASS
    whole = plan.ids_per_split >= constants.VECTOR_PASS
    assert rows <= (0.12 if whole else 0.12 * largest / (plan.ids_per_split * constants.VECTOR_SIMDS)) * vocab * (depth // 2 + 4 * depth // 64)


@pytest.mark.parametrize(("architecture", "cores", "ids", "added"), [("applegpu_g15s", 40, 16, 0.44), ("applegpu_g14d", 76, 8, 0.89)])
def test_few_rows_of_a_small_head_are_read_more_often_because_longer_splits_take_longer(architecture, cores, ids, added, monkeypatch):
    """A head of 32,000 ids: metal/README.md tells these counts. Splits with twice the ids, which halve the rows' bytes, lose by the model."""
    gpu, vocab, depth = tuning.Device(architecture, 2**35, cores), 32_000, 2048
    head = speed.Matrix(vocab, depth, vocab * (depth // 2 + 4 * depth // 64))
    with tuning.planned_for(gpu):
        plan = metal_stats.division(7, 1, vocab, True)
    assert plan.ids_per_split == ids
    assert plan.groups * 8 * depth * 4 / head.stored == pytest.approx(added, abs=0.01)
    planned = speed.lens_stats(speed.Asked(7, 1), head, speed.rates_of(gpu))
    monkeypatch.setattr(tuning, "vector_split", lambda *_: (2 * ids, -(-vocab // (2 * ids * constants.VECTOR_SIMDS))))
    assert 1.1 < speed.lens_stats(speed.Asked(7, 1), head, speed.rates_of(gpu)) / planned < 1.3


def test_sixteen_simdgroups_that_share_the_rows_would_not_fit():
    """Twice the simdgroups of a threadgroup would halve the rows' bytes too, but the logits of a pass exceed Metal's 32 KB of threadgroup memory."""
    of_row = source.constant("tile.h", "TILE_IDS") + 4  # floats of Z
    of_threadgroup = 4 * constants.VECTOR_SIMDS * constants.VECTOR_ROWS * of_row
    assert of_threadgroup <= 2**15 < 2 * of_threadgroup


def test_a_pass_serves_every_id_of_a_split(rng, monkeypatch):
    # 72 ids in a split of their own simdgroup: a whole pass and a second one, each of which reads the rows once.
    head, n = oracle.make_head(rng, 72, D), oracle.random_array(rng, 1, 3, D)
    monkeypatch.setattr(tuning, "vector_split", lambda *_: (128, 1))
    with emulated(), mslcpu.recording() as reports:
        found = lens_stats(n, head, 5, n[0], mx.arange(3))
        mx.eval(vars(found))
    report = only(reports, "lens_stats_vector")
    assert report.buffers["values"].read == 72 * D // 2
    assert report.buffers["n"].read + report.buffers["n_model"].read == 2 * 6 * D * 4
    z = oracle.head_logits(oracle.wide(n), head)
    assert (mx.array(z.argsort(-1)[..., ::-1][..., :5].copy()) == found.top_ids).all()


@pytest.mark.parametrize("device", [M1, M3], ids=["M1", "M3"])
def test_training_multiplies_twice_and_holds_one_chunk(rng, device):
    layers, tokens = 4, 16  # one chunk of whole tiles; MLX multiplies fewer rows of the model itself
    rows, generation = layers * tokens, device.generation
    head = oracle.make_head(rng, V, D)
    n_model = oracle.random_array(rng, tokens, D)
    n = n_model[None] + oracle.random_array(rng, layers, tokens, D, scale=0.3)
    with emulated(device):
        target = lens_target(n_model, head)
        mx.eval(target.lse)
        with mslcpu.recording() as reports:
            mx.eval(*lens_kl(n, target, head))
    of_model, of_rows = (r for r in reports if "_linear_" in r.name)
    softmax, back = only(reports, "lens_softmax_grad"), only(reports, "lens_backward")
    assert len(reports) == 4
    assert of_model.buffers["y"].written == of_model.buffers["y"].unique_written == tokens * V * 4
    assert of_rows.buffers["y"].written == of_rows.buffers["y"].unique_written == rows * V * 4
    # The chunk is written once and read three times by one threadgroup per row (once from memory); its gradient is written once.
    assert (softmax.buffers["chunk"].unique_read, softmax.buffers["chunk"].read) == (rows * V * 4, 3 * rows * V * 4)
    assert softmax.buffers["gradient"].written == softmax.buffers["gradient"].unique_written == rows * V * 4
    assert softmax.buffers["tile_absmax"].written == rows * -(-V // 32) * 4
    assert back.buffers["g"].unique_read == rows * V * 4
    assert sum(t.unique_read for t in of_weight(back)) == head_bytes(head)
    assert back.buffers["dn"].unique_written % (rows * D * 4) == 0
    expected = cost.lens_kl(layers, tokens, V, D, head_bytes(head), generation)
    assert sum(r.matrix_ops for r in reports) == expected.matrix_ops
    # Bytes that cross the bus once. The formula omits small items (problems, results per row, the splits' sums).
    counted = sum(t.unique_read + t.unique_written for r in reports for t in r.buffers.values())
    assert expected.bytes <= counted <= 1.1 * expected.bytes + back.buffers["dn"].written


@pytest.mark.parametrize(("layers", "tokens"), [(3, 2), (7, 11)], ids=["few rows", "tiles"])
def test_statistics_read_the_offset_once_per_block(rng, layers, tokens):
    head, n = oracle.make_head(rng, V, D, offset=3.0), oracle.random_array(rng, layers, tokens, D)
    with emulated(), mslcpu.recording() as reports:
        mx.eval(lens_stats(n, head, 5, n[0]).lse)
    offset = only(reports, "lens_stats_vector" if tokens == 2 else "lens_stats_float").buffers["head_offset"]
    bytes_read = [cost.lens_stats(layers, tokens, V, D, head_bytes(head), True, M1.generation, with_offset).bytes for with_offset in (False, True)]
    assert offset.unique_read == bytes_read[1] - bytes_read[0] == 4 * V


def test_training_reads_the_offset_once(rng):
    head, n_model = oracle.make_head(rng, V, D, offset=3.0), oracle.random_array(rng, 9, D)
    n = n_model[None] + oracle.random_array(rng, 5, 9, D, scale=0.3)
    with emulated():
        target = lens_target(n_model, head)
        mx.eval(target.lse)
        with mslcpu.recording() as reports:
            mx.eval(*lens_kl(n, target, head))
    assert len(reports) == 4
    with_offset = cost.lens_kl(5, 9, V, D, head_bytes(head), M1.generation, with_offset=True)
    without = cost.lens_kl(5, 9, V, D, head_bytes(head), M1.generation)
    assert sum(r.buffers["offset"].unique_read for r in reports if "offset" in r.buffers) == with_offset.bytes - without.bytes == 4 * V
    assert sum(r.matrix_ops for r in reports) == with_offset.matrix_ops == without.matrix_ops
    # Each of a row's three passes over its logits reads the offset, all but the first time from a cache.
    assert only(reports, "lens_softmax_grad").buffers["offset"].read == 3 * 5 * 9 * V * 4


def test_a_head_without_an_offset_reads_none(rng):
    head, n = oracle.make_head(rng, V, D), oracle.random_array(rng, 3, 5, D)
    with emulated(), mslcpu.recording() as reports:
        mx.eval(*lens_kl(n, lens_target(n[0], head), head), lens_stats(n, head).lse)
    offsets = [t for r in reports for name, t in r.buffers.items() if name in ("offset", "head_offset")]
    assert len(offsets) == 3
    assert all(t.read == 0 for t in offsets)


def test_tiles_that_would_not_matter_are_not_multiplied(rng):
    # With this bias only the first 64 ids have any probability: the gradient of the others is negligible.
    head = oracle.make_head(rng, V, D, bias=True)
    head.bias[64:] = -60.0
    n_model = oracle.random_array(rng, 6, D)
    n = n_model[None] + oracle.random_array(rng, 3, 6, D, scale=0.3)
    with emulated(), mslcpu.recording() as reports:
        ours = lens_kl(n, lens_target(n_model, head), head)
        mx.eval(*ours)
    back = only(reports, "lens_backward")
    assert back.matrix_ops == cost.lens_backward(18, 64, D, 0, 4, M1.generation).matrix_ops
    assert back.buffers["values"].unique_read == 64 * D // 2
    for found, expected in zip(ours, oracle.lens_kl(n, n_model, head), strict=True):
        assert oracle.row_errors(found[..., None] if found.ndim == 2 else found, expected[..., None] if expected.ndim == 2 else expected).max() < 1e-5


def test_skipping_can_be_turned_off_and_changes_nothing_beyond_rounding(rng):
    from metalens.ops.metal import kl as metal_kl

    head = oracle.make_head(rng, V, D, bias=True)
    head.bias[64:] = -25.0
    n_model = oracle.random_array(rng, 6, D)
    n = n_model[None] + oracle.random_array(rng, 3, 6, D, scale=0.3)
    with emulated():
        lse = lens_target(n_model, head).lse
        with mslcpu.recording() as skipping:
            some = metal_kl.lens_kl(n, n_model, lse, head)[1]
        with mslcpu.recording() as complete:
            everything = metal_kl.lens_kl(n, n_model, lse, head, skip=False)[1]
    assert only(complete, "lens_backward").matrix_ops == cost.lens_backward(18, V, D, 0, 4, M1.generation).matrix_ops
    assert only(skipping, "lens_backward").matrix_ops < only(complete, "lens_backward").matrix_ops
    assert oracle.row_errors(some, oracle.wide(everything)).max() < 2e-7
