"""Places of image tokens, and their positions under M-RoPE, against transformers."""

import random
from types import SimpleNamespace

import pytest
import torch

from octavo.errors import InvalidImageError
from octavo.vision import ImageSpan, Placeholder, expand_placeholders
from octavo.vision.positions import GridSpan, mrope_positions

TEXT, IMAGE, VIDEO = 5, 7, 8
MERGE, TOKENS_PER_SECOND = 2, 4


def transformers_positions(kinds, image_grids, video_grids, seconds):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=TOKENS_PER_SECOND)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision),
        get_vision_position_ids=lambda *args, **kwargs: Qwen2_5_VLModel.get_vision_position_ids(
            None, *args, **kwargs
        ),
    )
    positions, deltas = Qwen2_5_VLModel.get_rope_index(
        model,
        torch.tensor([kinds]),
        torch.tensor([kinds]),
        torch.tensor(image_grids) if image_grids else None,
        torch.tensor(video_grids) if video_grids else None,
        torch.tensor(seconds) if seconds else None,
    )
    return positions[:, 0], deltas.item()


def test_positions_are_those_of_transformers():
    draw = random.Random(3)
    for _ in range(60):
        kinds, spans, images, videos, seconds = [], [], [], [], []
        for _ in range(draw.randrange(1, 6)):
            kinds += [0] * draw.randrange(1, 9)
            kind = draw.choice([0, 1, 2])
            if not kind:
                continue
            deep = draw.randrange(1, 5) if kind == 2 else 1
            grid = deep, 2 * draw.randrange(1, 7), 2 * draw.randrange(1, 7)
            step = 1.0
            if kind == 2:
                seconds.append(draw.choice([0.3, 0.5, 1.0, 2.0, 1.7]))
                step = TOKENS_PER_SECOND * seconds[-1]
            (images if kind == 1 else videos).append(grid)
            merged = grid[0], grid[1] // MERGE, grid[2] // MERGE
            num_tokens = merged[0] * merged[1] * merged[2]
            spans.append(GridSpan(ImageSpan(len(kinds), num_tokens), merged, step))
            kinds += [kind] * num_tokens
        kinds += [0] * draw.randrange(3)
        ours, offset = mrope_positions(len(kinds), spans)
        theirs, delta = transformers_positions(kinds, images, videos, seconds)
        assert torch.equal(torch.from_numpy(ours), theirs)
        assert offset == delta


def test_text_alone_counts_up():
    positions, offset = mrope_positions(5, [])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3 and offset == 0
    assert mrope_positions(0, [])[0].shape == (3, 0)


@pytest.mark.parametrize(
    "images",
    [
        [GridSpan(ImageSpan(2, 3), (1, 2, 2))],  # not its grid's number
        [GridSpan(ImageSpan(8, 4), (1, 2, 2))],  # beyond the prompt
        [GridSpan(ImageSpan(2, 4), (1, 2, 2)), GridSpan(ImageSpan(5, 4), (1, 2, 2))],
    ],
)
def test_spans_that_cannot_be_are_refused(images):
    with pytest.raises(ValueError, match="does not fit"):
        mrope_positions(10, images)


def test_placeholders_become_as_many_tokens_as_their_images():
    images = Placeholder("images", 9, [3, 1, 2])
    ids, [spans] = expand_placeholders([1, 9, 2, 9, 9, 3], [images])
    assert ids == [1, 9, 9, 9, 2, 9, 9, 9, 3]
    assert spans == [ImageSpan(1, 3), ImageSpan(5, 1), ImageSpan(6, 2)]
    assert [span.end for span in spans] == [4, 6, 8]
    assert expand_placeholders([1, 2], [Placeholder("images", 9, [])]) == ([1, 2], [[]])


def test_images_and_videos_have_places_of_their_own():
    kinds = [Placeholder("images", 9, [2, 1]), Placeholder("videos", 8, [3])]
    ids, spans = expand_placeholders([9, 1, 8, 9], kinds)
    assert ids == [9, 9, 1, 8, 8, 8, 9]
    assert spans == [[ImageSpan(0, 2), ImageSpan(6, 1)], [ImageSpan(3, 3)]]
    with pytest.raises(InvalidImageError, match="2 places for videos, but there are 1 videos"):
        expand_placeholders([8, 8], [Placeholder("videos", 8, [3])])


@pytest.mark.parametrize("counts", [[], [1, 1], [1, 1, 1, 1]])
def test_places_and_images_must_be_as_many(counts):
    with pytest.raises(
        InvalidImageError, match=f"3 places for images, but there are {len(counts)}"
    ):
        expand_placeholders([9, 1, 9, 9], [Placeholder("images", 9, counts)])
