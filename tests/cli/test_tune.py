"""`octavo tune kernels`, where there is no GPU."""

import pytest
import torch

from octavo.bench.tuned_shapes import model_shapes, parse_shape
from octavo.cli import main
from octavo.errors import ConfigError
from octavo.testing.tiny_llama import write_tiny_llama


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU to tune on")
def test_without_a_gpu_it_says_so_in_one_line(capsys, tmp_path):
    output = tmp_path / "table.json"
    assert main(["tune", "kernels", "--shape", "64,128", "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing to tune here" in error
    assert not output.exists()


@pytest.mark.parametrize("text", ["", "64", "64x128", "64,0", "a,b", "1,2,3", "-1,2"])
def test_a_shape_is_two_sizes(text):
    assert parse_shape("64,128") == (64, 128)
    with pytest.raises(ConfigError, match="--shape is N,K"):
        parse_shape(text)


def test_it_wants_to_know_what_to_tune(capsys):
    assert main(["tune", "kernels"]) == 1
    assert "--model MODEL or --shape N,K" in capsys.readouterr().err


def test_a_model_is_its_weights_in_the_order_in_which_they_are_made(tmp_path):
    shapes = model_shapes(str(write_tiny_llama(tmp_path / "tiny")))
    head, *layers = shapes
    assert head[1] == layers[0][1] and head not in layers
    assert layers == layers[:4] * (len(layers) // 4)
