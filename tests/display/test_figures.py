"""The picture of layer transfer is tested with the evaluation; here is what is said on it."""

from metalens.display.figures import transfer_figure
from metalens.evaluation import Transfer


def test_what_the_picture_says():
    transfer = Transfer(ce=[[1.0, 2.0], [3.0, 1.5]], kl=[[0.0, 1.0], [2.0, 0.0]], kl_model=[[0.0, 1.0], [2.0, 0.0]])
    figure = transfer_figure(transfer, "layer transfer of $model")
    axes = figure.axes[0]
    assert axes.get_title() == "layer transfer of $model"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("output of block", "translator of block")
    assert figure.axes[1].get_ylabel() == "transfer penalty (nats per token)"
