"""The picture of layer transfer is tested with the evaluation; here is what is said on it."""

from matplotlib.backends.backend_agg import FigureCanvasAgg

from metalens.display.figures import evaluation_figure, readings_figure, transfer_figure
from metalens.display.tables import transfer_table
from metalens.evaluation import Evaluation, Scores, Transfer


def test_what_the_picture_says():
    transfer = Transfer(ce=[[1.0, 2.0], [3.0, 1.5]], kl=[[0.0, 1.0], [2.0, 0.0]], kl_model=[[0.0, 1.0], [2.0, 0.0]])
    figure = transfer_figure(transfer, "layer transfer of $model")
    axes = figure.axes[0]
    assert axes.get_title() == "layer transfer of $model"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("output of block", "translator of block")
    assert figure.axes[1].get_ylabel() == "transfer penalty (nats per token)"


def test_layers_are_whole_numbers_and_labels_are_inside_the_picture():
    matrix = [[float(abs(i - j)) for j in range(4)] for i in range(4)]
    figure = transfer_figure(Transfer(ce=matrix, kl=matrix, kl_model=matrix), "layer transfer of a model with a long name")
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    for ticks, (low, high) in ((axes.get_xticks(), axes.get_xlim()), (axes.get_yticks(), axes.get_ylim())):
        assert [tick for tick in ticks if low <= tick <= high] == [0, 1, 2, 3]
    box, page = axes.yaxis.label.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0
    assert box.x1 <= page.x1
    title = axes.title.get_window_extent()
    assert page.x0 <= title.x0
    assert title.x1 <= page.x1


def test_an_evaluation_by_layer():
    scores = [
        Scores(kl=2.0 - i, ce=4.0 - i, entropy=1.0, top1=0.2 * i, bits_per_byte=1.0, kl_bits_per_byte=1.0, entropy_bits_per_byte=1.0)
        for i in range(3)
    ]
    model = Scores(kl=0.0, ce=1.5, entropy=1.0, top1=1.0, bits_per_byte=1.0, kl_bits_per_byte=0.0, entropy_bits_per_byte=1.0)
    evaluation = Evaluation(100, 4.0, model, scores, [*scores[:2], scores[0]], untranslated=(1,))
    figure = evaluation_figure(evaluation, "of $model")
    FigureCanvasAgg(figure).draw()
    kl, ce, agreement = figure.axes[:3]
    assert [line.get_label() for line in ce.lines] == ["logit lens", "tuned lens", "model"]
    assert kl.lines[0].get_ydata().tolist() == [2, 1, 0]
    assert (kl.lines[1].get_xdata().tolist(), kl.lines[1].get_ydata().tolist()) == ([0, 2], [2, 2])
    assert agreement.lines[0].get_ydata().tolist() == [0, 20, 40]
    assert ce.lines[2].get_ydata()[0] == 1.5
    assert ce.child_axes[0].yaxis.get_major_formatter()(1.0, 0) == "2.72"
    alone = evaluation_figure(Evaluation(100, 4.0, model, scores, None))
    assert len(alone.axes[0].lines) == 1


def test_readings_side_by_side(tiny):
    readings = {"one $lens": tiny.read([1, 2, 3]), "another": tiny.read([1, 2, 3], layers=[0])}
    figure = readings_figure(readings, "What each layer says")
    FigureCanvasAgg(figure).draw()
    assert figure.get_suptitle() == "What each layer says"
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in maps] == list(readings)
    assert [len(axes.texts) for axes in maps] == [3 * (tiny.num_layers + 1), 3 * 2]
    first, second = (axes.get_window_extent() for axes in maps)
    assert first.x1 < second.x0
    assert FigureCanvasAgg(figure).figure.bbox.x1 >= second.x1


def test_a_rounding_error_below_zero_has_no_sign_in_the_table():
    matrix = [[1.0, 2.0], [1.0 - 1e-7, 2.0]]
    cells = list(transfer_table(Transfer(ce=matrix, kl=matrix, kl_model=matrix)).columns[1].cells)
    assert cells == ["0.00", "0.00"]
